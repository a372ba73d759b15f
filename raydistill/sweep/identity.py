"""Whether a sweep that goes on is the one that was begun: what its folder holds against what is asked now."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from raydistill.errors import UserError
from raydistill.recovery.resume import NEUTRAL, is_listed
from raydistill.report.page import write_whole_text
from raydistill.results.record_lines import start_of
from raydistill.sweep.spec import Sweep
from raydistill.sweep.state import OVER, named_runs, trials_of

IDENTITY_FILE = "identity.json"
POINTS = "points"


def check_identity(sweep: Sweep, retry_failed: bool) -> None:
    """A sweep that goes on is the one that was begun; UserError with the differences, or if it is over."""
    path, now = sweep.folder / IDENTITY_FILE, json.loads(json.dumps(sweep.identity()))
    if not path.exists() or not _has_begun(sweep):  # a sweep that was refused may change until it fits
        write_whole_text(path, json.dumps(now, indent=1) + "\n")
        return
    changed = list(_differences(json.loads(path.read_text()), now))
    way_out = "choose another --name, or start anew with --resume never, which sets the old folder aside"
    if changed:
        raise UserError(
            f"sweep {sweep.name!r} cannot go on with other settings: {'; '.join(changed)}. Take them back, {way_out}"
        )
    statuses = [trial["status"] for trial in trials_of(sweep.folder)]
    again = retry_failed and "failed" in statuses
    if sum(status in OVER for status in statuses) >= sweep.num_trials and not again:
        raise UserError(f"sweep {sweep.name!r} has finished (see {sweep.folder}); {way_out}")


def check_runs(sweep: Sweep) -> None:
    """UserError if a trial that is not over would go on with a run of its name that is not this sweep's."""
    start = start_of(sweep.folder)
    over = {trial["run"] for trial in trials_of(sweep.folder) if trial["status"] in OVER}
    for folder in named_runs(sweep):
        if folder.name not in over:
            check_run(folder, None if start is None else start["record_id"])


def check_run(folder: Path, record_id: object) -> None:
    """UserError if a trial's folder holds a run that does not belong to the sweep with this record: it had other values."""
    start = start_of(folder)
    if start is not None and (record_id is None or start.get("parent") != record_id):
        raise UserError(
            f"{folder} is a run of the same name that does not belong to this sweep, so it may have had other values; move "
            "it away, choose another --name, or start with --resume never, which sets it aside"
        )


def _has_begun(sweep: Sweep) -> bool:
    """Whether any trial has; a run counts also where the sweep's file has gone."""
    return bool(trials_of(sweep.folder)) or any(start_of(folder) is not None for folder in named_runs(sweep))


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Each key that is not the same, or that one side lacks, but for settings that change no result; the points only where
    nothing else explains them."""
    old, new = _flat(before), _flat(now)
    is_same = True
    for key in dict.fromkeys([*old, *new]):
        if is_listed(key.removeprefix("settings."), NEUTRAL):
            continue
        if key != POINTS and (key not in old or key not in new or old[key] != new[key]):
            is_same = False
            yield f"{key} was {_told(old, key)}, is {_told(new, key)}"
    if is_same and old.get(POINTS) != new.get(POINTS):
        yield _other_point(old.get(POINTS) or [], new.get(POINTS) or [])


def _other_point(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> str:
    """A trial is named by the place of its point: the first place where another one stands now."""
    place = next((k for k, (one, other) in enumerate(zip(old, new, strict=False)) if one != other), None)
    if place is None:
        return f"the sweep had {len(old)} points, has {len(new)}"
    return f"trial {place:03d} was {_words(old[place])}, is {_words(new[place])}"


def _words(point: Mapping[str, Any]) -> str:
    return ", ".join(f"{field}={value}" for field, value in point.items())


def _told(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "not there"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
