"""The verb `raydistill export`: a checkpoint of a run as a folder that stands alone, in the layout that its reader wants.

The folder appears complete or not at all: it is written under another name, read back, and renamed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydistill import __version__
from raydistill.cli import command_parser, console
from raydistill.errors import QuantError, RunError, UserError
from raydistill.evaluate.hub import first_line, hub_errors
from raydistill.evaluate.run_defaults import EXPORT_FOLDER, SOURCE_FILE, source_of
from raydistill.quant.formats import LAYOUTS, TEMPLATE, Layout, check_layout, default_layout
from raydistill.recovery.checkpoint import (
    CHECKPOINTS,
    PREFIX,
    checkpoint_folder,
    load_checkpoint,
    read_description,
    version_of,
)
from raydistill.recovery.keeper import read_best
from raydistill.results.record_lines import evaluations_of, read_record, recorded_config, require_start
from raydistill.results.run_folders import refuse_url
from raydistill.results.tables import format_bytes

if TYPE_CHECKING:
    from raydistill.config import Config
    from raydistill.messages import StudentWeights
    from raydistill.results.tables import SummaryRow
    from raydistill.serving.model_card import CardFacts

SUMMARY = """\
Write one checkpoint of a run as a folder that stands alone: weights, configuration, tokenizer, generation settings and a
model card (README.md) with the run's numbers.

--as compressed-tensors  int4 that vLLM and transformers load by themselves (default for int4 in groups of 32, 64 or 128)
--as packed              raydistill's own dense codes, the smallest (default for what else is quantized)
--as dequantized         plain weights with the quantized values, for any tool (default for what is not)
A student trained in served mode keeps its adapter in adapter/ (PEFT's format) beside the weights."""
EXAMPLES = """\
examples:
  raydistill export outputs/runs/NAME --to exports/student
        the best checkpoint
  raydistill export outputs/runs/NAME --to exports/step-100 --checkpoint 100 --as dequantized
        another checkpoint, as plain weights
  raydistill export outputs/runs/NAME --to exports/student --push-to-hub ME/student
        and upload it; a repository that does not exist is made private. The same command again, after an upload that
        failed, uploads the folder that is there
  raydistill evaluate exports/student
        the folder measured against the run's teacher on its held-out rows
  raydistill serve exports/student
        an OpenAI-compatible server
"""

TRAINED = "weights_hash"  # entry of raydistill.json's `extra`: of the checkpoint's tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What was written."""

    folder: Path
    run: str
    version: int
    layout: Layout
    format: str
    codes_hash: str
    bytes: int
    pushed_to: str | None


def export_command(argv: Sequence[str]) -> int:
    """The verb `export`."""
    arguments = _parser().parse_args(list(argv))
    report = export_run(
        arguments.run,
        arguments.to,
        checkpoint=arguments.checkpoint,
        layout=arguments.layout,
        merge_adapter=arguments.merge_adapter,
        push_to=arguments.push_to_hub,
    )
    if arguments.json:
        print(json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in asdict(report).items()}, indent=1))
        return 0
    console.print(
        f"{report.folder}: step {report.version} of {report.run}, {report.format} as {report.layout}, "
        f"{format_bytes(report.bytes)}, codes {report.codes_hash}",
        soft_wrap=True,
    )
    if report.pushed_to:
        console.print(f"uploaded to {report.pushed_to}", soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("export", SUMMARY, EXAMPLES, takes_config=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder (outputs/runs/NAME)")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="the folder to write; must not exist")
    parser.add_argument("--checkpoint", default="best", metavar="best|last|STEP", help="default: %(default)s")
    parser.add_argument("--as", dest="layout", choices=LAYOUTS, help="how the weights are stored (see above)")
    parser.add_argument(
        "--merge-adapter",
        action="store_true",
        help="with --as dequantized: make a served student's adapter part of the plain weights, stored in float32",
    )
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the folder, such as ME/student")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON on stdout")
    return parser


def export_run(
    run: Path,
    to: Path,
    *,
    checkpoint: str = "best",
    layout: Layout | None = None,
    merge_adapter: bool = False,
    push_to: str | None = None,
    hub: Any = None,
) -> ExportReport:
    """Write the folder; everything that can be refused is refused before a model is loaded. A folder that is this very
    export already is uploaded as it is. hub: in place of huggingface_hub, in tests."""
    refuse_url(run)
    start = require_start(run)
    config = recorded_config(start, run, f"its own export is {run / EXPORT_FOLDER}")
    if to.exists() and push_to is None:
        raise UserError(f"--to {to} exists; choose another folder or remove it")
    fmt, is_served = config.quant.weight_format, config.adapter.mode == "served"
    layout = layout or default_layout(fmt)
    check_layout(layout, fmt, is_served, merge_adapter)
    weights = find_weights(run, checkpoint)
    if push_to is not None:
        hub = _hub(hub)

    from raydistill.quant.export import packed_bytes, read_manifest
    from raydistill.quant.hashing import hash_tensors

    name = run.absolute().name
    # The hash tells apart what was trained under one name: in served mode two runs have the same codes.
    extra = {"run": name, "version": weights.version, TRAINED: hash_tensors(weights.tensors)}
    extra[TEMPLATE] = config.data.template
    if not to.exists():
        if merge_adapter and config.student.dtype != "float32":
            console.print(
                "merged weights are stored in float32: 16 bits would round part of the adapter away", style="dim"
            )
        _write_folder(run, to, start, config, weights, layout, merge_adapter, extra)
    elif not _is_export(to, extra, layout, is_beside=is_served and not merge_adapter):
        raise UserError(f"--to {to} exists and is not this export; choose another folder or remove it")
    else:
        console.print(f"{to} is this export already: it is uploaded as it is", soft_wrap=True)
    if push_to is not None:
        push(to, push_to, hub)
    return ExportReport(
        folder=to,
        run=name,
        version=weights.version,
        layout=layout,
        format=fmt.name if fmt else "none",
        codes_hash=read_manifest(to)["codes_hash"],
        bytes=packed_bytes(to),
        pushed_to=push_to,
    )


def _write_folder(
    run: Path,
    to: Path,
    start: Mapping[str, Any],
    config: Config,
    weights: StudentWeights,
    layout: Layout,
    merge_adapter: bool,
    extra: Mapping[str, Any],
) -> None:
    from raydistill.quant.export import packed_bytes
    from raydistill.quant.layouts import write_layout
    from raydistill.serving.model_card import model_card

    building = to.parent / f".{to.name}.{uuid.uuid4().hex[:8]}.partial"
    scratch = building.with_suffix(".packed")
    try:
        packed = _packed_export(run, config, weights, scratch)
        manifest = write_layout(packed, building, layout, merge_adapter, extra)
        facts = _card_facts(run, to, start, config, manifest, weights.version, packed_bytes(building))
        (building / "README.md").write_text(model_card(facts))
        (building / SOURCE_FILE).write_text(json.dumps(source_of(start), indent=1) + "\n")
        building.rename(to)
    except OSError as error:
        raise RunError(f"--to {to} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(scratch, ignore_errors=True)


def _is_export(folder: Path, extra: Mapping[str, Any], layout: Layout, is_beside: bool) -> bool:
    """Whether a folder is what would be written. is_beside: with an adapter beside its weights."""
    from raydistill.quant.export import layout_of, read_manifest

    try:
        manifest = read_manifest(folder)
    except QuantError:
        return False
    kept = manifest.get("extra", {})
    is_same = layout_of(manifest) == layout and (manifest["lora"] is not None) == is_beside
    return is_same and all(kept.get(key) == value for key, value in extra.items())


def find_weights(run: Path, wanted: str) -> StudentWeights:
    """The weights of a checkpoint: "best", "last" or a step. A UserError lists what there is."""
    root = run / CHECKPOINTS
    present = sorted(root.glob(f"{PREFIX}*"), key=version_of)
    steps = [version_of(folder) for folder in present]
    there_are = f"there are {', '.join(map(str, steps))}" if steps else "there is none"
    if wanted == "best":
        best = read_best(root)
        if best is None and steps:
            console.print(f"{run.name} evaluated no checkpoint; the last one is exported", style="yellow")
            return find_weights(run, "last")
        if best not in steps:
            missing = "no checkpoint" if best is None else f"no checkpoint {best} any more"
            raise UserError(f"--checkpoint best: {run} has {missing}; {there_are}")
        return load_checkpoint(checkpoint_folder(root, best))
    if wanted == "last":
        for folder in reversed(present):
            try:
                return load_checkpoint(folder)
            except RunError as error:
                console.print(f"{error}: the one before it", style="yellow", soft_wrap=True)
        raise UserError(f"--checkpoint last: {run} has no whole checkpoint; {there_are}")
    if not wanted.isdecimal():
        raise UserError(f"--checkpoint {wanted} is neither best, last nor a step; {there_are}")
    if int(wanted) not in steps:
        raise UserError(f"--checkpoint {wanted}: {run} has no checkpoint of that step; {there_are}")
    return load_checkpoint(checkpoint_folder(root, int(wanted)))


def _card_facts(
    run: Path, to: Path, start: Mapping[str, Any], config: Config, manifest: Mapping[str, Any], version: int, size: int
) -> CardFacts:
    from raydistill.serving.model_card import CardFacts

    is_beside, evaluations = manifest["lora"] is not None, evaluations_of(run)
    return CardFacts(
        name=to.absolute().name,
        run=run.absolute().name,
        teacher=str(config.teacher.model or config.student.model),
        base=str(config.student.model),
        fmt=config.quant.weight_format,
        layout=manifest.get("as", "packed"),
        dtype=manifest["dtype"],
        adapter="merged" if config.adapter.mode == "served" and not is_beside else config.adapter.mode,
        version=version,
        num_steps=config.trainer.num_steps,
        codes_hash=manifest["codes_hash"],
        data_fingerprint=start.get("data_fingerprint"),
        template=config.data.template,
        size_bytes=size,
        metrics=evaluations.get(version, {}),
        before=evaluations.get(0, {}),
        compared=_compared(run.absolute(), version),
        raydistill=__version__,
    )


def _compared(run: Path, version: int) -> list[SummaryRow]:
    """What the study that a run is an arm of measured of teacher, plain quantization and this run; empty where it was none,
    or measured another checkpoint."""
    from raydistill.report.run_view import comparison_of, view_of

    comparison = comparison_of(view_of(read_record(run), run))
    if comparison is None or not comparison.is_about_this_run or version != read_best(run / CHECKPOINTS):
        return []
    arm = run.name.split("-", 2)[-1]
    return [row for row in comparison.rows if row.role in ("teacher", "ptq") or row.name == arm]


def push(folder: Path, repo: str, hub: Any) -> None:
    """Upload the folder but for the paths of this machine; a repository that does not exist yet is made private."""
    try:
        hub.create_repo(repo, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            commit_message=f"raydistill {__version__}",
            ignore_patterns=[SOURCE_FILE],
        )
    except hub_errors() as error:
        raise RunError(
            f"{folder} is written, but --push-to-hub {repo} failed: {first_line(error)}; the same command uploads it"
        ) from error


def _hub(hub: Any) -> Any:
    if hub is None:
        from huggingface_hub import HfApi

        hub = HfApi()
    if not (hub.token or _stored_token()):
        raise UserError("--push-to-hub needs a token: log in with `hf auth login`, or set HF_TOKEN")
    return hub


def _stored_token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def _packed_export(run: Path, config: Config, weights: StudentWeights, scratch: Path) -> Path:
    """A packed folder of these weights: the run's own export where it is that version, else one made at `scratch`."""
    import torch

    from raydistill.models import StudentSpec, build_student
    from raydistill.quant.export import MANIFEST, export_live, layout_of, read_manifest
    from raydistill.quant.student import load_adapter_state

    trained = read_description(checkpoint_folder(run / CHECKPOINTS, weights.version)).get("codes_hash")
    own = run / EXPORT_FOLDER
    if (own / MANIFEST).is_file():
        manifest = read_manifest(own)
        is_this = manifest.get("extra", {}).get("version") == weights.version and manifest["codes_hash"] == trained
        if is_this and layout_of(manifest) == "packed":
            return own
    spec = StudentSpec.of(config)
    model = build_student(spec)
    load_adapter_state(model, {key: torch.from_numpy(value.copy()) for key, value in weights.tensors.items()})
    codes_hash = export_live(scratch, model, spec.model, {})
    if trained is not None and codes_hash != trained:
        raise QuantError(
            f"the student has codes {codes_hash}, step {weights.version} was trained with {trained}: "
            f"student.model={spec.model!r} is not the model that the run started from"
        )
    return scratch
