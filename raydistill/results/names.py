"""Which setting, metric, tag or fact a name means in `--where`, `--sort` and `--columns`.

Whole names first (`trainer.learning_rate`, `evaluate/kl_nats`, `tags.owner`, `status`), then last parts: of held-out metrics,
also without their unit (`exact_match`, `kl`), of settings (`learning_rate`), of other metrics (`loss`). Of metrics the
least nested: `kl` is evaluate/kl_nats beside the evaluate/MODEL/kl_nats of a table of several models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from raydistill.config.fields import config_fields, nearest_fields
from raydistill.errors import UserError
from raydistill.results.runs import FACTS, RunRow

TAGS = "tags."
HELD_OUT = "evaluate/"
STANDARD_ERROR = "_se"
_UNITS = ("nats", "s", "per_s", "tokens_per_s", "bytes", "fraction", "steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """Something that a run may have."""

    kind: Literal["fact", "setting", "metric", "tag"]
    key: str

    def of(self, run: RunRow) -> Any:
        """Its value, None where the run has none."""
        if self.kind == "fact":
            return run.fact(self.key)
        return {"setting": run.settings, "metric": run.metrics, "tag": run.tags}[self.kind].get(self.key)

    @property
    def label(self) -> str:
        return TAGS + self.key if self.kind == "tag" else self.key


class Names:
    """All names of some runs."""

    def __init__(self, runs: Iterable[RunRow]) -> None:
        runs = list(runs)
        self.settings = _in_order([list(config_fields()), *(run.settings for run in runs)])
        self.metrics = _in_order(run.metrics for run in runs)
        self.tags = _in_order(run.tags for run in runs)

    def fields(self) -> list[Field]:
        """Everything that one of the runs has, facts first."""
        kinds: tuple[tuple[Any, Sequence[str]], ...] = (
            ("fact", FACTS),
            ("setting", self.settings),
            ("metric", self.metrics),
            ("tag", self.tags),
        )
        return [Field(kind=kind, key=key) for kind, keys in kinds for key in keys]

    def find(self, name: str) -> Field:
        """The field that a name means; UserError if none does, or several do."""
        for kind, keys in (
            ("fact", [key for key in FACTS if key == ("run" if name == "name" else name)]),
            ("tag", [key for key in self.tags if TAGS + key == name]),
            ("setting", [key for key in self.settings if key == name]),
            ("metric", [key for key in self.metrics if key == name]),
            ("tag", [key for key in self.tags if key == name]),
            ("metric", _short_for(name, [key for key in self.metrics if key.startswith(HELD_OUT)])),
            ("setting", [key for key in self.settings if key.rpartition(".")[2] == name]),
            ("metric", _short_for(name, self.metrics)),
        ):
            if len(keys) > 1:
                raise UserError(f"{name!r} could be {' or '.join(keys)}; write one of them out")
            if keys:
                return Field(kind=kind, key=keys[0])  # type: ignore[arg-type]
        raise UserError(f"no run has a setting, metric or tag {name!r}; {self._hint(name)}")

    def _hint(self, name: str) -> str:
        leaves = {key.rpartition("/")[2]: key for key in sorted(self.metrics, key=_depth, reverse=True)}
        labels = [*self.metrics, *leaves, *FACTS, *(TAGS + key for key in self.tags), *self.settings]
        near = get_close_matches(name, labels, n=3, cutoff=0.75)
        near = list(dict.fromkeys(leaves.get(label, label) for label in near)) or nearest_fields(name)
        if near:
            return f"did you mean {' or '.join(near)}?"
        metrics = ", ".join(sorted(self.metrics)) or "none"
        return f"the metrics are {metrics}; `raydistill config --fields` lists the settings"


def _short_for(name: str, metrics: Iterable[str]) -> list[str]:
    """The least nested of the metrics whose last part, with or without its unit, is the name."""
    parts = (name, *(f"{name}_{unit}" for unit in _UNITS))
    found = [metric for metric in metrics if metric.rpartition("/")[2] in parts]
    return [metric for metric in found if _depth(metric) == min(map(_depth, found))]


def _depth(metric: str) -> int:
    return metric.count("/")


def _in_order(keys: Iterable[Iterable[str]]) -> list[str]:
    return list(dict.fromkeys(key for some in keys for key in some))
