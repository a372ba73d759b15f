"""What the command line names: models, adapters, runs and their checkpoints, models of the hub.

Light: no torch here, so that a wrong path is refused at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from raydistill.errors import ModelError, UserError
from raydistill.evaluate.hub import fetch, is_hub_id
from raydistill.evaluate.run_defaults import EXPORT_FOLDER, RunDefaults, config_of, read_defaults
from raydistill.quant.formats import ADAPTER_FOLDER, MANIFEST, TEMPLATE
from raydistill.results.record_lines import RECORD_FILE, read_record
from raydistill.results.run_folders import refuse_url
from raydistill.results.tables import COMPARISON, Role

CHECKPOINTS, STEP = "checkpoints", "step-"  # as in recovery/checkpoint.py, which costs the import of torch
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Target:
    """One model to evaluate: an exported student, any transformers folder, or what is put over one."""

    name: str
    folder: Path  # the weights: of an adapter those of its base, of a checkpoint those that its run started from
    role: Role | None = None  # None: what the folder itself says
    adapter: Path | None = None  # a PEFT folder
    checkpoint: Path | None = None  # a folder under a run's checkpoints/

    @property
    def run(self) -> Path:
        """The run that a checkpoint belongs to."""
        assert self.checkpoint is not None
        return self.checkpoint.parent.parent


def find_targets(
    texts: Sequence[str], base: str | None = None, every_checkpoint: bool = False
) -> tuple[list[Target], list[RunDefaults]]:
    """The models that `MODEL` or `name=MODEL` arguments name, and the records of those that are runs.

    base: what an adapter is put over that does not say so itself. every_checkpoint: the one run's checkpoints are the
    targets, in order.
    """
    if every_checkpoint:
        return _every_checkpoint(texts)
    targets: list[Target] = []
    runs: list[RunDefaults] = []
    for text in texts:
        target, source = _find(*_split(text), base)
        targets.append(target)
        if (defaults := read_defaults(source)) is not None:
            runs.append(defaults)
    names = [target.name for target in targets]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        folder = targets[names.index(twice)].folder
        raise UserError(f"two targets are called {twice!r}; name them apart, as in first={folder}")
    return targets, runs


def _find(name: str | None, text: str, base: str | None) -> tuple[Target, Path]:
    """(the target, the folder that may say how it was evaluated)."""
    refuse_url(text)
    path = Path(text).expanduser()
    if is_hub_id(text):
        path = fetch(text)
        name = name or Path(text).name
    if (run := run_of_checkpoint(path)) is not None:
        return _checkpoint_target(name or f"{run.name} {path.name}", path.absolute(), run), run
    if is_adapter(path):
        return _adapter_target(name, path, base)
    run = _run_of(path)
    folder = path / EXPORT_FOLDER if run == path else path
    _check_model(path, folder)
    return Target(name or (run or folder).absolute().name, folder), folder if run is None else run


def _every_checkpoint(texts: Sequence[str]) -> tuple[list[Target], list[RunDefaults]]:
    refuse_url(texts[0])
    run = Path(texts[0]).expanduser()
    if len(texts) > 1 or not (run / RECORD_FILE).is_file():
        raise UserError("--every-checkpoint follows one run: give its folder alone (outputs/runs/NAME)")
    folders = sorted((run.absolute() / CHECKPOINTS).glob(f"{STEP}*"))
    if not folders:
        raise ModelError(f"the run {run} has kept no checkpoint; checkpoint.keep_last and keep_best say how many stay")
    defaults = read_defaults(run)
    assert defaults is not None, "it has a record"
    names = (f"step {int(folder.name.removeprefix(STEP))}" for folder in folders)
    targets = [_checkpoint_target(name, folder, run.absolute()) for name, folder in zip(names, folders, strict=True)]
    return targets, [defaults]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter and no model: some tools save the base's config.json beside the adapter."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    weights = [path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_")]
    return not (weights and (folder / "config.json").is_file())


def without_export(run: Path, way_out: str = "") -> ModelError:
    """What to say of a record's folder that holds no model. way_out: besides finishing a run."""
    if any(line["kind"] == "table" and line["name"] == COMPARISON for line in read_record(run)):
        return ModelError(
            f"{run} is the record of a comparison and holds no model; `raydistill results show {run}` shows its table, and "
            "the runs beside it are what can be loaded"
        )
    return ModelError(f"the run {run} has no {EXPORT_FOLDER}/ folder, so it did not finish; finish it first{way_out}")


def run_of_checkpoint(path: Path) -> Path | None:
    """The run whose checkpoint a folder is; None if it is none."""
    run = path.absolute().parent.parent
    is_one = path.is_dir() and path.absolute().parent.name == CHECKPOINTS and (run / RECORD_FILE).is_file()
    return run if is_one else None


def version_of(target: Target) -> int:
    """The step of a checkpoint."""
    assert target.checkpoint is not None
    return int(target.checkpoint.name.removeprefix(STEP))


def _checkpoint_target(name: str, path: Path, run: Path) -> Target:
    model = str(config_of(run).student.model)
    folder = Path(model)
    if is_hub_id(model):
        folder = fetch(model)
    elif not folder.is_dir():
        raise ModelError(f"the run {run} started from {model}, which is not there; put it back, or evaluate an export")
    return Target(name, folder, "student", checkpoint=path)


def _adapter_target(name: str | None, path: Path, base: str | None) -> tuple[Target, Path]:
    """A PEFT folder over the base that is named, that it names itself, or that lies around it (an export's adapter/)."""
    around = path.absolute().parent
    if path.absolute().name == ADAPTER_FOLDER and (around / MANIFEST).is_file():  # export and adapter are one student
        return Target(name or around.name, around), around
    try:
        named = json.loads((path / ADAPTER_CONFIG).read_text()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{path / ADAPTER_CONFIG} cannot be read ({error}); save the adapter again") from error
    under = base or named
    if not under:
        raise ModelError(f"{path} is an adapter that does not name its base; give it with --base MODEL")
    folder = fetch(under) if is_hub_id(under) else Path(under).expanduser()
    if run := _run_of(folder):
        folder = run / EXPORT_FOLDER
    if not folder.is_dir():
        raise ModelError(f"the base of adapter {path} is {under}, which is not there; give it with --base MODEL")
    _check_model(folder, folder)
    return Target(name or path.absolute().name, folder, "student", adapter=path), path


def template_of(targets: Sequence[Target], runs: Sequence[RunDefaults]) -> dict[str, Any] | None:
    """The variables of the chat template (`data.template`) that the students were trained with, as their runs or exports
    say; None where none says so. UserError where they differ: their prompts would not be the same."""
    known = [(run.run, run.data.template) for run in runs]
    known += [(target.name, kept) for target in targets if (kept := _kept_template(target.folder)) is not None]
    for name, template in known[1:]:
        if template != known[0][1]:
            raise UserError(
                f"{known[0][0]} was trained with data.template={json.dumps(known[0][1])}, {name} with "
                f"{json.dumps(template)}: their prompts differ; evaluate one after the other"
            )
    return known[0][1] if known else None


def _kept_template(folder: Path) -> dict[str, Any] | None:
    try:
        kept: dict[str, Any] | None = json.loads((folder / MANIFEST).read_text()).get("extra", {}).get(TEMPLATE)
    except (OSError, ValueError, AttributeError):  # no export, or a damaged one, which is refused when it is loaded
        return None
    return kept


def _split(text: str) -> tuple[str | None, str]:
    name, equals, model = text.partition("=")
    if equals and name and not Path(text).exists():
        return name, model
    return None, text


def _run_of(path: Path) -> Path | None:
    """The run's folder if the path is one, or is the export inside one."""
    for candidate in (path, path.absolute().parent):
        if (candidate / RECORD_FILE).is_file() and (candidate == path or path.absolute().name == EXPORT_FOLDER):
            return candidate
    return None


def _check_model(path: Path, folder: Path) -> None:
    if not path.exists():
        siblings = [p.name for p in path.absolute().parent.iterdir()] if path.absolute().parent.is_dir() else []
        near = get_close_matches(path.name, siblings, n=1)
        offer = f"did you mean {path.parent / near[0]}?" if near else "give a model's folder or a run's"
        raise ModelError(f"{path} does not exist; {offer}")
    if folder != path and not folder.is_dir():
        raise without_export(path, ", or measure what it kept with --every-checkpoint")
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} is not a model: it holds no config.json; give an exported student, a transformers folder or a "
            "run's folder (outputs/runs/NAME)"
        )
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} is not a model: it holds no .safetensors file; save it with save_pretrained")
