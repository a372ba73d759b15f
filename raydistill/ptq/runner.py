"""Runs GPTQ or AWQ by llm-compressor: a script for the interpreter of `make ptq`, which knows nothing of raydistill.

    python runner.py JOB.json        started and read by overlay.py

The job names a plain transformers model, token ids to calibrate on, the layers to quantize and the grids to try. For each
grid a file `<out>/<number>.safetensors` is written: `<layer>.codes` (int8), `<layer>.scale` and, for asymmetric grids,
`<layer>.zero_point` of every layer, and whatever other parameter was changed on the way (AWQ rescales norms), by its name.
One JSON object a line tells on stdout what happens:

    {"event": "ready"}                                           the libraries are imported
    {"event": "progress", "grid": 0, "done": 2, "total": 5}      parts of the model, one after another
    {"event": "done", "grid": 0, "seconds": 3.1, "notes": [...]}
    {"event": "failed", "grid": 1, "seconds": 0.2, "reason": "..."}   the other grids are still tried

Everything that libraries print goes to stderr. The script ends when its stdin is closed: with whoever started it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

BLOCK = 128  # columns that GPTQ rounds before it spreads their error
SEARCHED: dict[str, Any] = {"maxshrink": 0.7, "grid": 50.0, "patience": 50, "norm": 2.0}
"""What `scale="searched"` means to llm-compressor's observer: the range shrunk from 1 to 0.3 in steps of 0.02, least squared
error, as in raydistill's own search. (Its defaults stop at 0.8, where two bits only begin to gain.)"""


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    say = _protocol()
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from llmcompressor import oneshot  # noqa: F401 the slow import

    say(event="ready")
    for number, grid in enumerate(job["grids"]):
        start = time.monotonic()
        try:
            torch.manual_seed(job["seed"])
            notes = quantize(job, grid, number, say)
        except Exception as error:  # whatever it is, it is the reason why this cell of the table stays empty
            import traceback

            traceback.print_exc()
            lines = str(error).strip().splitlines() or ["no message"]
            reason = f"{type(error).__name__}: {lines[0]}"
            say(event="failed", grid=number, seconds=time.monotonic() - start, reason=reason)
        else:
            say(event="done", grid=number, seconds=time.monotonic() - start, notes=notes)


def quantize(job: Mapping[str, Any], grid: Mapping[str, Any], number: int, say: Any) -> list[str]:
    """Calibrate a fresh copy of the model on one grid and write its codes; returns what a reader should know."""
    import torch
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    _no_pinned_memory_without_accelerator()
    dtype = getattr(torch, job["dtype"]) if job["dtype"] else "auto"
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, use_safetensors=True).eval()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    modifiers = recipe(job, grid)
    watch = _watching_modifier(modifiers, number, say)
    oneshot(
        model=model,
        dataset=torch.utils.data.DataLoader(list(batches(job)), batch_size=None),
        recipe=[*modifiers, watch],
        pipeline="sequential",
        num_calibration_samples=len(job["rows"]),
    )
    tensors = dict(codes_of(model, job["layers"]))
    quantized = {f"{name}.weight" for name in job["layers"]}
    for name, value in model.named_parameters():
        if name in before and name not in quantized and not torch.equal(value, before[name]):
            tensors[name] = value.detach().contiguous()
    from safetensors.torch import save_file

    save_file(tensors, Path(job["out"]) / f"{number}.safetensors")
    return watch.notes()


def recipe(job: Mapping[str, Any], grid: Mapping[str, Any]) -> list[Any]:
    """llm-compressor's modifiers for one grid."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    weights = QuantizationArgs(
        num_bits=grid["bits"],
        type="int",
        symmetric=grid["symmetric"],
        strategy="channel" if grid["group_size"] is None else "group",
        group_size=grid["group_size"],
        scale_dtype=getattr(torch, grid["scale_dtype"]),
        observer="memoryless_mse" if grid["scale"] == "searched" else "memoryless_minmax",
        observer_kwargs=SEARCHED if grid["scale"] == "searched" else {},
    )
    scheme = {"config_groups": {"group_0": QuantizationScheme(targets=list(job["layers"]), weights=weights)}}
    if job["method"] == "gptq":
        return [GPTQModifier(**scheme, block_size=BLOCK)]
    return [AWQModifier(), QuantizationModifier(**scheme)]


def batches(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of equal length together, at most `batch_tokens` in all: no padding, which would count as calibration data."""
    import torch

    rows = sorted(job["rows"], key=len)
    batch: list[list[int]] = []
    for row in rows:
        if batch and (len(row) != len(batch[0]) or (len(batch) + 1) * len(row) > job["batch_tokens"]):
            yield {"input_ids": torch.tensor(batch)}
            batch = []
        batch.append(row)
    if batch:
        yield {"input_ids": torch.tensor(batch)}


def codes_of(model: Any, layers: list[str]) -> Iterator[tuple[str, Any]]:
    """The tensors of every quantized layer, by the library's own rounding."""
    import torch
    from compressed_tensors.quantization.lifecycle.forward import quantize as round_to_codes

    for name in layers:
        layer = model.get_submodule(name)
        weights = layer.quantization_scheme.weights
        zero_point = None if weights.symmetric else layer.weight_zero_point
        codes = round_to_codes(
            x=layer.weight, scale=layer.weight_scale, zero_point=zero_point, args=weights, dtype=torch.int8
        )
        yield f"{name}.codes", codes.contiguous()
        yield f"{name}.scale", layer.weight_scale.detach().to(weights.scale_dtype).contiguous()
        if zero_point is not None:
            yield f"{name}.zero_point", zero_point.detach().to(torch.int8).contiguous()


def _watching_modifier(modifiers: list[Any], number: int, say: Any) -> Any:
    """A modifier that changes nothing: it tells when a part of the model is done, and keeps what the others complain of."""
    from llmcompressor.modifiers import Modifier
    from pydantic import PrivateAttr

    class Watch(Modifier):
        _done: int = PrivateAttr(default=0)
        _total: int = PrivateAttr(default=0)
        _rounded: list[str] = PrivateAttr(default_factory=list)

        def on_initialize(self, state: Any, **_: Any) -> bool:
            self._total = state.model.config.get_text_config().num_hidden_layers + 1
            return True

        def on_sequential_epoch_end(self, state: Any, event: Any, **_: Any) -> None:
            self._done = min(self._done + 1, self._total)
            say(event="progress", grid=number, done=self._done, total=self._total)

        def on_calibration_end(self, state: Any, event: Any, **_: Any) -> None:
            for modifier in modifiers:  # GPTQ keeps this list until it is finalized
                self._rounded += getattr(modifier, "_rtn_fallback_module_names", [])

        def notes(self) -> list[str]:
            names = ", ".join(self._rounded)
            return [f"rounded to nearest, as their Hessian could not be inverted: {names}"] if names else []

    return Watch()


def _no_pinned_memory_without_accelerator() -> None:
    """AWQ pins its cached activations for a faster copy to a GPU; torch without one refuses to."""
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_, **__: None


def _protocol() -> Any:
    """`say(event=..., ...)`: a line on what stdout was; stdout itself becomes stderr, also for C libraries."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(**event: Any) -> None:
        lines.write(json.dumps(event) + "\n")

    return say


def _end_with_stdin() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
