"""Does every exported folder compute what was trained? KL and largest logit difference of each layout and reader:

    python benchmarks/export_parity.py [--steps 20] [--rows 16] [--output outputs/parity] [--section.field value ...]

Students of the demo's world are distilled for a few steps (int2, int3, int4; merged, and int4 with a served adapter), and
their last checkpoint is exported in every layout. Each folder is loaded by its readers in processes that know nothing else:
raydistill, transformers alone, PEFT, vLLM. Their logits on held-out sequences are compared with those of the student as the
trainer holds it. Where a reader fails, its error stands in the table. Needs the world of `make demo`. Prints the table and
writes <output>/export_parity.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raydistill.cli import console, main_with_errors, print_table

DEFAULTS = ["@configs/demo.toml"]
OVERRIDES = {  # no rollouts: the codes are what is compared here, not how they came about
    "objective.on_policy_fraction": "0",
    "evaluation.exact_match": "off",
    "data.max_rows": "1000",
    "world.folder": "outputs/demo/worlds/stories",
}
STUDENTS = ("int2-merged", "int3-merged", "int4-merged", "int4-served")
LIMIT_S = 1200  # of one reader


def main(argv: Sequence[str]) -> int:
    """Train, export, read back; or, as a child process, read one list of folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each student")
    parser.add_argument("--rows", type=int, default=16, help="held-out sequences")
    parser.add_argument(
        "--students", nargs="+", choices=STUDENTS, default=STUDENTS, metavar="STUDENT", help=f"of {', '.join(STUDENTS)}"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/parity"), help="folder for runs and tables")
    parser.add_argument("--read", nargs="+", metavar="READER=FOLDER", help=argparse.SUPPRESS)
    options, settings = parser.parse_known_args(list(argv))
    if options.read:
        read_all(options.output, options.read)
        return 0
    rows: list[dict[str, Any]] = []
    students = train(options, settings)
    for name, (config, summary) in students.items():
        rows += compare(name, config, summary, options)
    columns = ["student", "layout", "reader", "bytes", "kl_nats", "largest_logit_difference", "error"]
    print_table(rows, columns)
    (options.output / "export_parity.json").write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def train(options: argparse.Namespace, settings: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """name -> (config with real paths, summary) of a short run for each student, on the same actors."""
    from raydistill.config.load import load_config
    from raydistill.launch import make_pools, run, start_cluster
    from raydistill.worlds import resolve_world

    fixed = [part for name, value in OVERRIDES.items() for part in (f"--{name}", value)]
    base = [
        *DEFAULTS,
        *fixed,
        *settings,
        "--trainer.num_steps",
        str(options.steps),
        "--run.output",
        str(options.output),
    ]
    base += ["--evaluation.eval_every", str(options.steps)]
    first = load_config(base).config
    start_cluster(first)
    pools, done = make_pools(first), {}
    try:
        for name in options.students:
            fmt, mode = name.split("-")
            extra = ["--quant.format", fmt, "--adapter.mode", mode]
            config = load_config([*base, *extra]).config
            done[name] = (resolve_world(config, console), run(config, pools, console))
    finally:
        pools.shutdown()
    return done


def compare(name: str, config: Any, summary: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each layout and reader of one student."""
    from raydistill.quant.export import packed_bytes
    from raydistill.serving.export import export_run

    place = options.output / "exports" / name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    expected, ids = as_trained(config, summary, options.rows)
    (place / "ids.json").write_text(json.dumps(ids))
    plan = readers(*name.split("-"))
    for layout in dict.fromkeys(layout for layout, _ in plan):
        as_, merge = layout.removesuffix(", merged"), layout.endswith(", merged")
        export_run(summary.folder, place / layout, checkpoint="last", layout=as_, merge_adapter=merge)
    # vLLM changes its process and may take it down: one for each folder. The others share one.
    alone = [pair for pair in plan if pair[1].startswith("vllm")]
    shared = [pair for pair in plan if pair not in alone]
    ended: dict[tuple[str, str], str | None] = {}
    for group in (shared, *([pair] for pair in alone)):
        error = run_reader(place, [f"{reader}={layout}" for layout, reader in group])
        ended |= dict.fromkeys(group, error)
    rows = []
    for layout, reader in plan:
        row = {"student": name, "layout": layout, "reader": reader, "bytes": packed_bytes(place / layout)}
        file = place / f"{reader}={layout}.npy"
        if file.is_file():
            row |= difference(expected, np.load(file))
        else:
            said = place / f"{reader}={layout}.error"
            row["error"] = ended[layout, reader] or (said.read_text() if said.is_file() else "no answer")
        rows.append(row)
    return rows


def readers(fmt: str, mode: str) -> list[tuple[str, str]]:
    """(layout, reader) pairs that a student of this kind is promised to work with."""
    if mode == "served":
        return [
            ("packed", "raydistill"),
            ("compressed-tensors", "peft"),
            ("dequantized", "peft"),
            ("dequantized", "vllm-lora"),
            ("dequantized, merged", "transformers"),
        ]
    pairs = [("packed", "raydistill"), ("dequantized", "transformers"), ("dequantized", "vllm")]
    if fmt == "int4":
        pairs += [("compressed-tensors", "transformers"), ("compressed-tensors", "vllm")]
    return pairs


def as_trained(config: Any, summary: Any, num_rows: int) -> tuple[np.ndarray, list[list[int]]]:
    """([tokens, V] logits of the student built as trainer ranks build it, token ids of the sequences)."""
    import torch

    from raydistill.data.dataset import load_dataset
    from raydistill.models import StudentSpec, build_student
    from raydistill.preflight.checks import check_models
    from raydistill.quant.student import load_adapter_state
    from raydistill.serving.export import find_weights

    facts = check_models(config)
    data = load_dataset(config.data, facts.tokenizer, facts.max_length, False, stop_ids=facts.eos_ids)
    ids = [[*e.prompt_ids.tolist(), *e.reference_ids.tolist()] for e in data.held_out[:num_rows]]
    student = build_student(StudentSpec.of(config)).eval()
    weights = find_weights(summary.folder, "last")
    load_adapter_state(student, {key: torch.from_numpy(value.copy()) for key, value in weights.tensors.items()})
    return transformers_logits(student, ids), ids


def difference(expected: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """KL(as trained || as read), mean over tokens in float64, and the largest difference of a logit."""
    has_value = ~np.isnan(found[:, 0])  # vLLM says nothing after a sequence's last token
    a, b = (x[has_value].astype(np.float64) for x in (expected, found))
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (a, b))
    kl = float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean())
    return {"kl_nats": max(kl, 0.0), "largest_logit_difference": float(np.abs(a - b).max())}


def run_reader(place: Path, pairs: Sequence[str]) -> str | None:
    """Read folders in a process of its own; returns the error that it ended with."""
    console.print(f"reading {place.name}: {', '.join(pairs)}", style="dim", soft_wrap=True)
    command = [sys.executable, str(Path(__file__).absolute()), "--output", str(place), "--read", *pairs]
    from raydistill.actors.vllm_settings import CPU_ENGINE_ENVIRONMENT, ENGINE_ENVIRONMENT

    engine = ENGINE_ENVIRONMENT | CPU_ENGINE_ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, env={**engine, **os.environ}, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"no answer within {LIMIT_S} s"
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if "Error" in line and not line.startswith(" ")]
    return (lines or done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][-200:]


def read_all(place: Path, pairs: Sequence[str]) -> None:
    """In the child process: the logits of each folder into `READER=LAYOUT.npy`, or why not into `.error`."""
    ids = json.loads((place / "ids.json").read_text())
    for pair in pairs:
        reader, layout = pair.split("=")
        try:
            np.save(place / f"{pair}.npy", READERS[reader](place / layout, ids))
        except Exception as error:  # whatever a library raises belongs into the table
            (place / f"{pair}.error").write_text(f"{type(error).__name__}: {error}".splitlines()[0])
            if reader.startswith("vllm"):
                raise  # the engine's own process knows the cause


def transformers_logits(model: Any, ids: list[list[int]]) -> np.ndarray:
    """[tokens, V] float32, one sequence after the other."""
    import torch

    with torch.inference_mode():
        return np.concatenate([model(torch.tensor([row])).logits[0].float().numpy() for row in ids])


def read_raydistill(folder: Path, ids: list[list[int]]) -> np.ndarray:
    from raydistill.quant.export import load_exported

    return transformers_logits(load_exported(folder), ids)


def read_transformers(folder: Path, ids: list[list[int]]) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    return transformers_logits(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval(), ids)


def read_peft(folder: Path, ids: list[list[int]]) -> np.ndarray:
    """As the model card says: PEFT cannot wrap packed weights, so transformers unpacks them on loading."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    packed = "quantization_config" in json.loads((folder / "config.json").read_text())
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if packed else {}
    base = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options)
    return transformers_logits(PeftModel.from_pretrained(base, folder / "adapter").eval(), ids)


def read_vllm(folder: Path, ids: list[list[int]], adapter: Path | None = None) -> np.ndarray:
    """Logits after every prompt token but the last of each sequence; those are NaN."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    manifest = json.loads((folder / "raydistill.json").read_text())
    options: dict[str, Any] = {"dtype": "bfloat16" if manifest["as"] == "compressed-tensors" else manifest["dtype"]}
    if adapter is not None:
        names = {target.rpartition(".")[2] for target in manifest["lora"]["targets"]}
        options |= {
            "enable_lora": True,
            "max_lora_rank": manifest["lora"]["rank"],
            "lora_target_modules": sorted(names),
        }
    engine = LLM(
        model=str(folder), enforce_eager=True, block_size=32, max_logprobs=-1, logprobs_mode="raw_logits",
        max_model_len=max(map(len, ids)) + 1, **options,
    )  # fmt: skip
    params = SamplingParams(prompt_logprobs=-1, max_tokens=1, temperature=0.0, flat_logprobs=True, detokenize=False)
    lora = LoRARequest("student", 1, str(adapter)) if adapter is not None else None
    prompts = [{"prompt_token_ids": row} for row in ids]
    outputs = engine.generate(prompts, params, use_tqdm=False, lora_request=lora)
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    # What vLLM says at a token is the distribution after the token before it.
    logits = np.full((sum(map(len, ids)), vocab_size), np.nan, np.float32)
    start = 0
    for row, output in zip(ids, outputs, strict=True):
        flat = output.prompt_logprobs
        for place in range(1, len(row)):
            part = slice(flat.start_indices[place], flat.end_indices[place])
            logits[start + place - 1, flat.token_ids[part]] = flat.logprobs[part]
        start += len(row)
    return logits


READERS: dict[str, Callable[[Path, list[list[int]]], np.ndarray]] = {
    "raydistill": read_raydistill,
    "transformers": read_transformers,
    "peft": read_peft,
    "vllm": read_vllm,
    "vllm-lora": lambda folder, ids: read_vllm(folder, ids, folder / "adapter"),
}


if __name__ == "__main__":
    sys.exit(main_with_errors(main))
