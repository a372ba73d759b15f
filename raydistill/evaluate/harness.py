"""lm-eval's tasks as a measurement: its prompts and metrics, our engines."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np

from raydistill.cli import console
from raydistill.evaluate.answerers import Answerer, OnDone
from raydistill.evaluate.harness_tasks import HarnessTask
from raydistill.evaluate.measured import Measured
from raydistill.evaluate.paired import RowValues
from raydistill.results.tables import SHARES, Measure

FEWSHOT_SEED = 1234  # lm-eval's own default: the examples of its published numbers
BOOTSTRAPS = 1000  # for the few metrics whose standard error has no formula
NO_FILTER = "none"


class HarnessTasks:
    """The measurement of all tasks of one command.

    max_length: as `HarnessModel`. num_fewshot, limit, max_new_tokens: as `TaskRequest`.
    """

    def __init__(
        self,
        tasks: Sequence[HarnessTask],
        tokenizer: Any,
        template: Mapping[str, Any] | None,
        max_length: int,
        num_fewshot: int | None,
        limit: int | None,
        max_new_tokens: int | None,
    ) -> None:
        self._tasks, self._tokenizer, self._template = tasks, tokenizer, template
        self._max_length, self._limit, self._max_new_tokens = max_length, limit, max_new_tokens
        self._all: dict[str, Any] = {name: task for one in tasks for name, task in one.tasks.items()}
        self.what = f"tasks {', '.join(task.name for task in tasks)}"
        self.num_sequences = sum(self._size(task) for task in self._all.values())
        self.max_tokens = max_length + 1
        for task in self._all.values():
            if num_fewshot is not None and task.get_config("num_fewshot") != 0:
                task.set_config("num_fewshot", num_fewshot)
            elif task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)

    def summary(self) -> str:
        """One line that says how the tasks are asked."""
        chat = "with the chat template" if self._template is not None else "as plain text"
        shots = sorted({int(task.get_config("num_fewshot")) for task in self._all.values()})
        examples = f"{' or '.join(map(str, shots))} examples"
        documents = f"{self.num_sequences:,} documents of {len(self._all)} tasks"
        return f"{documents}, {chat}, {examples}, {self._max_length} tokens at most"

    def _size(self, task: Any) -> int:
        documents = len(task.eval_docs)
        return documents if self._limit is None else min(documents, self._limit)

    def measure(self, model: Answerer, on_done: OnDone | None = None) -> Measured:
        """See `Measurement`. A column for each metric of each name that was asked for; rows for each task that was run."""
        from lm_eval import evaluate

        from raydistill.evaluate.harness_model import HarnessModel

        for task in self._all.values():
            task.set_fewshot_seed(FEWSHOT_SEED)
        harness = HarnessModel(
            model, self._tokenizer, self._template or {}, self._max_length, self._max_new_tokens, on_done
        )
        groups = {name: group for one in self._tasks for name, group in one.groups.items()}
        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # no forks of a process that holds a model
        with redirect_stdout(io.StringIO()):  # lm-eval prints while it bootstraps; results of ours go there
            # Not simple_evaluate, which takes a description of the machine from pip after every model.
            results = evaluate(
                lm=harness,
                task_dict={"tasks": self._all, "groups": groups},
                limit=self._limit,
                bootstrap_iters=BOOTSTRAPS,
                apply_chat_template=self._template is not None,
                fewshot_as_multiturn=True,
            )
        if harness.num_cut:
            console.print(
                f"{harness.num_cut} prompts of {self.what} were cut at their beginning to {self._max_length} tokens",
                style="yellow",
                soft_wrap=True,
            )
        rows = dict(self._rows(results["samples"]))
        measures: dict[str, Measure] = {}
        for one in self._tasks:
            for name in [one.name] if one.name in results["results"] else one.tasks:
                measures |= self._measures(name, results["results"][name], rows)
        return Measured(measures=measures, rows=rows)

    def _measures(
        self, name: str, found: Mapping[str, Any], rows: Mapping[str, RowValues]
    ) -> Iterator[tuple[str, Measure]]:
        for key, value in found.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            column = _column(name, metric, kind)
            error = found.get(f"{metric}_stderr,{kind}")
            se = float(error) if isinstance(error, (int, float)) else None
            if se is None and column in rows:
                se = _error_of_texts(metric, float(value), rows[column])
            yield column, Measure(value=float(value), se=se, is_share=metric.startswith(SHARES))

    def _rows(self, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[tuple[str, RowValues]]:
        """Each metric of each task, document by document, where a document has a number of its own."""
        for name, documents in samples.items():
            for kind in dict.fromkeys(document["filter"] for document in documents):
                chosen = [document for document in documents if document["filter"] == kind]
                for metric in chosen[0]["metrics"]:
                    values = _row_values(chosen, metric)
                    if values is not None:
                        yield _column(name, metric, kind), values


def _column(name: str, metric: str, kind: str) -> str:
    return f"{name} {metric}" if kind == NO_FILTER else f"{name} {metric} ({kind})"


def _row_values(documents: Sequence[Mapping[str, Any]], metric: str) -> RowValues | None:
    """Numbers count as they are; (log-probability, words or bytes) of a text as nats."""
    found = [document.get(metric) for document in documents]
    if all(isinstance(value, (bool, int, float)) for value in found):
        values, weights = [float(value) for value in found], [1.0] * len(found)  # type: ignore[arg-type]
    elif all(isinstance(value, tuple) and len(value) == 2 and value[1] > 0 for value in found):
        values, weights = [-float(value[0]) for value in found], [float(value[1]) for value in found]  # type: ignore[index]
    else:
        return None
    return RowValues(
        row_ids=tuple(str(document["doc_id"]) for document in documents),
        values_R=np.array(values, np.float64),
        weights_R=np.array(weights, np.float64),
    )


def _error_of_texts(metric: str, value: float, rows: RowValues) -> float | None:
    """lm-eval gives perplexities no standard error: here documents are the sample."""
    error = rows.standard_error
    if error is None:
        return None
    if metric.endswith("perplexity"):
        return value * error
    return error / float(np.log(2)) if metric == "bits_per_byte" else None
