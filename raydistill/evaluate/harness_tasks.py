"""lm-eval's tasks, loaded: by name from the hub, over rows of your own, or from definitions of your own.

`--task-data DIR` may hold, for each task by its name, DIR/TASK/SPLIT.jsonl (or .parquet, .csv): rows with the columns of the
task's data set on the hub, for lm-eval's own definition of the task. YAML files in DIR are tasks of your own.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydistill.errors import DataError, UserError
from raydistill.evaluate.task_names import Places, bundled_names, check_names, folders_of, names_under

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
"""Ending of a file of rows -> the loader of `datasets` that reads it."""
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
DOCS = "docs/evaluation.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRequest:
    """What `--tasks` and its companions ask for; names are checked already."""

    names: tuple[str, ...]
    known: Places
    data: Path | None
    num_fewshot: int | None  # None: as each task says
    limit: int | None  # documents of each task
    max_new_tokens: int | None  # None: as each task says
    is_chat: bool  # prompts rendered with the chat template

    @property
    def is_local(self) -> bool:
        """Whether the rows of every task lie in `data`, as far as the names alone can tell."""
        return self.data is not None and all((self.data / name).is_dir() for name in self.names)


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessTask:
    """One name of `--tasks`, loaded."""

    name: str
    tasks: Mapping[str, Any]  # lm-eval's Task objects that are run, by name: several for a group or a tag
    groups: Mapping[str, Any]  # its Group objects, which sum them up


def known_tasks(names: Sequence[str], data: Path | None) -> Places:
    """Every task that there is, those in `data` first; UserError for a name that is none of them."""
    if data is not None and not data.is_dir():
        raise DataError(f"task data {data} is no folder; give one that holds TASK/SPLIT.jsonl files or task YAML files")
    known = {**bundled_names(), **(names_under(data) if data is not None else {})}
    check_names(names, known)
    return known


def load_tasks(request: TaskRequest) -> tuple[HarnessTask, ...]:
    """Load each task with its rows. One error says which task cannot be loaded, and the way out."""
    from datasets import disable_progress_bars

    disable_progress_bars()
    manager = _manager(request.names, request.known, [])
    with tempfile.TemporaryDirectory(prefix="raydistill-tasks-") as scratch:
        if request.data is not None and _write_local_tasks(request, manager, Path(scratch)):
            manager = _manager(request.names, request.known, [Path(scratch)])
        return tuple(_load(name, request, manager) for name in request.names)


def _manager(names: Sequence[str], known: Places, more: Sequence[Path]) -> Any:
    """lm-eval's index of the folders that define the names and all that belongs to them."""
    from lm_eval.tasks import TaskManager

    wanted = set(names)
    while True:
        folders = [*folders_of(wanted, known), *more]
        manager = TaskManager(include_path=[str(folder) for folder in folders], include_defaults=False)
        members = {member for name in wanted for member in _members(manager, name) if member in known}
        if members <= wanted:
            return manager
        wanted |= members


def _members(manager: Any, name: str) -> Iterator[str]:
    """What a group or tag consists of; nothing for a task."""
    entry = manager.task_index.get(name)
    if entry is None or name in manager.all_subtasks:
        return
    yield from sorted(entry.tags) if name in manager.all_tags else ()
    listed = (entry.cfg or {}).get("task")
    for member in listed if isinstance(listed, list) else ():
        yield member if isinstance(member, str) else member.get("task") or member.get("group", "")


def _leaf_names(manager: Any, name: str) -> list[str]:
    members = list(_members(manager, name))
    return [leaf for member in members for leaf in _leaf_names(manager, member)] if members else [name]


def _write_local_tasks(request: TaskRequest, manager: Any, scratch: Path) -> int:
    """lm-eval's definitions again, with rows from files: one YAML for each task that has a folder. Returns how many."""
    assert request.data is not None
    names = {leaf for name in request.names for leaf in _leaf_names(manager, name)}
    own = names_under(request.data)
    local = sorted(name for name in names if name not in own and (request.data / name).is_dir())
    for name in local:
        entry = manager.task_index[name]
        config = _local_config(name, entry.cfg or {}, request.data / name, request.num_fewshot)
        # JSON is YAML. The tag stays with lm-eval's own file: repeated here it would hide the tag's other tasks.
        (scratch / f"{name}.yaml").write_text(json.dumps({"include": str(entry.yaml_path), "tag": None, **config}))
    return len(local)


def _local_config(name: str, config: Mapping[str, Any], folder: Path, num_fewshot: int | None) -> dict[str, Any]:
    """What changes in a task's definition when its rows lie in `folder`; DataError for a file that is missing."""
    if "dataset_path" not in config:
        raise DataError(
            f"task {name} loads its rows by code of its own; leave {folder} out, or write a YAML of your own"
        )
    files = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in BUILDERS}
    measured = config.get("test_split") or config.get("validation_split")
    if measured not in files:
        there = f"; there is {', '.join(path.name for path in files.values())}" if files else ""
        raise DataError(
            f"task {name} is measured on split {measured!r}: put its rows into {folder / f'{measured}.jsonl'}{there}. "
            f"{DOCS} lists the columns"
        )
    shots, source = _shots(config, num_fewshot), _fewshot_split(config)
    if shots and source is not None and source not in files:
        raise DataError(
            f"task {name} takes its {shots} examples from split {source!r}: put them into {folder / f'{source}.jsonl'}, "
            "or measure without examples (--num-fewshot 0)"
        )
    splits = {key: config.get(key) for key in SPLITS}
    used = {split: files[split] for split in splits.values() if split in files}
    builders = {BUILDERS[path.suffix] for path in used.values()}
    if len(builders) > 1:
        raise DataError(f"task {name}: {folder} mixes kinds of files ({', '.join(sorted(builders))}); use one kind")
    return {
        "dataset_path": builders.pop(),
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path.absolute()) for split, path in used.items()}},
        **{key: split if split in files else None for key, split in splits.items()},
    }


def _shots(config: Mapping[str, Any], num_fewshot: int | None) -> int:
    """Examples that lm-eval will show: a task that says 0 keeps to it."""
    own = config.get("num_fewshot")
    return int(own or 0) if num_fewshot is None or own == 0 else num_fewshot


def _fewshot_split(config: Mapping[str, Any]) -> str | None:
    """Where the examples come from; None where the task brings them along."""
    settings = config.get("fewshot_config") or {}
    split = settings.get("split") or config.get("fewshot_split")
    if split is None and settings.get("samples") is not None:
        return None
    return split or next((config[key] for key in SPLITS[:3] if config.get(key)), None)


def _load(name: str, request: TaskRequest, manager: Any) -> HarnessTask:
    try:
        found = manager.load([name])
    except Exception as error:  # a task runs code of its own and reads files of anybody's
        broken, reason = _first_broken(manager, _leaf_names(manager, name), error)
        raise DataError(_complaint(broken, request, manager, reason)) from error
    for task in found["tasks"].values():
        _check_measurable(task)
    return HarnessTask(name=name, tasks=found["tasks"], groups=found.get("groups", {}))


def _first_broken(manager: Any, leaves: Iterable[str], error: Exception) -> tuple[str, Exception]:
    """Which task of a group it was."""
    leaves = list(leaves)
    for leaf in leaves if len(leaves) > 1 else ():
        try:
            manager.load([leaf])
        except Exception as reason:
            return leaf, reason
    return leaves[0], error


def _complaint(name: str, request: TaskRequest, manager: Any, error: Exception) -> str:
    entry = manager.task_index.get(name)
    config = (entry.cfg if entry is not None else None) or {}
    reason = " ".join((str(error).strip() or type(error).__name__).split())
    if request.data is not None and (request.data / name).is_dir():
        return (
            f"task {name}: lm-eval cannot use the rows in {request.data / name} ({type(error).__name__}: {reason}); they "
            f"need the columns of {config.get('dataset_path', 'the data set on the hub')}, see {DOCS}"
        )
    if request.data is not None and any(request.data in path.parents for path in request.known[name]):
        return f"task {name} of {request.data} cannot be loaded: {type(error).__name__}: {reason}"
    if not isinstance(error, (OSError, ValueError)) or "dataset_path" not in config:
        return f"task {name} cannot be loaded: {type(error).__name__}: {reason}"
    split = config.get("test_split") or config.get("validation_split")
    return (
        f"task {name} needs the data set {config['dataset_path']}, which is neither cached here nor can be downloaded; give "
        f"its rows with --task-data DIR as DIR/{name}/{split}.jsonl ({DOCS}), or run where the hub can be reached"
    )


def _check_measurable(task: Any) -> None:
    config = task.config
    settings = config.generation_kwargs or {}
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"task {config.task} asks about images or sound; these models read text only")
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"task {config.task} runs code that the model writes; use lm-eval itself, in a sandbox")
    if settings.get("do_sample") or settings.get("temperature", 0) > 0 or config.repeats > 1:
        raise UserError(f"task {config.task} samples its answers; models are measured by their greedy answers here")


def without_examples(tasks: Sequence[HarnessTask]) -> list[str]:
    """Tasks whose definition shows no examples, whatever `--num-fewshot` says."""
    every = (task for one in tasks for task in one.tasks.values())
    return sorted({str(task.config.task) for task in every if task.get_config("num_fewshot") == 0})
