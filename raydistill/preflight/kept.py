"""Whether `teacher.cache_gib` holds the answers that runs will ask for again: an estimate from configs and file sizes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from raydistill.config import Config
from raydistill.preflight.estimates import Answer

TEXT_BYTES = 3  # of a data file for one token at least: English has four and a half, and JSON's own characters count


def kept_answers_note(configs: Sequence[Config], completion_tokens: float | None = None) -> str | None:
    """What to say where the caches of all teacher actors together may be too small for the rows that these runs ask for;
    None where they are not, where nothing is kept, or nothing can be said. completion_tokens: mean length of a reference
    completion; without it each counts at its longest."""
    notes = {}
    for config in configs:
        room = config.teacher.cache_gib * 2**30 * config.teacher.num_actors
        each = _token_bytes(config)
        if room == 0 or each is None or not config.needs_teacher:
            continue
        needed = each * _tokens(config, completion_tokens)
        if needed > room:
            actors = f"{config.teacher.num_actors} teacher actor{'s' * (config.teacher.num_actors > 1)}"
            notes[needed] = (
                f"the teacher's answers to the data set's rows may take {needed / 2**30:.2g} GiB ({_rows(config):,} rows, "
                f"{each} bytes a token), and {actors} with teacher.cache_gib={config.teacher.cache_gib:g} keep "
                f"{room / 2**30:.2g} GiB: the rest is computed again in every epoch and trial. Raise teacher.cache_gib (in a "
                "sweep's file: cache_gib) where there is memory, or lower objective.top_k"
            )
    return notes[max(notes)] if notes else None


def _rows(config: Config) -> int:
    return _train_rows(config) + config.data.eval_rows


def _train_rows(config: Config) -> int:
    """Sequences of all steps that are the data set's; fewer where they come again."""
    trainer, share = config.trainer, 1 - config.objective.on_policy_fraction
    most = round(trainer.num_steps * trainer.sequences_per_step * share)
    return most if config.data.max_rows is None else min(most, config.data.max_rows)


def _tokens(config: Config, completion_tokens: float | None) -> int:
    each = min(completion_tokens or config.data.max_length, config.data.max_length)
    trained = _train_rows(config) * each
    if (written := _file_bytes(config.data.path)) is not None:
        trained = min(trained, written / TEXT_BYTES)
    return round(trained + config.data.eval_rows * each)


def _file_bytes(path: Path | None) -> int | None:
    if path is None or not path.exists():
        return None
    return sum(file.stat().st_size for file in (path.glob("*.jsonl") if path.is_dir() else [path]))


def _token_bytes(config: Config) -> int | None:
    """Of one answer; None for a whole vocabulary whose size is not known."""
    if config.objective.target == "top_k":
        return Answer(vocab_size=config.objective.top_k, candidates=config.objective.top_k).token_bytes
    file = Path(config.student.model or "") / "config.json"
    size = json.loads(file.read_text()).get("vocab_size") if file.is_file() else None
    return Answer(vocab_size=size, candidates=None).token_bytes if isinstance(size, int) else None
