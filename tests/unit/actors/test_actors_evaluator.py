"""What the evaluation actor says of answers, without a model."""

from typing import Any

import pytest

from raydistill.actors.evaluator import EvaluatorActor, _Run
from raydistill.config import ObjectiveSection
from raydistill.messages import Samples, StudentWeights, TokenRows


def answers(*versions: int) -> Samples:
    rows = TokenRows.from_rows([[1]] * len(versions))
    return Samples(
        step=-2,
        indices=tuple(range(len(versions))),
        row_ids=("row",) * len(versions),
        prompts=rows,
        completions=rows,
        policy_versions=versions,
        finish_reasons=("stop",) * len(versions),
    )


@pytest.mark.parametrize(("parts", "stale"), [([(3, 3), (3,)], 0), ([(3, 3), (4,)], 1), ([(2, 2)], 2), ([], 0)])
def test_answers_of_another_version_are_not_matched(
    monkeypatch: pytest.MonkeyPatch, parts: list[tuple[int, ...]], stale: int
) -> None:
    """A share of all rows would mix two versions, one of the others would be that of other rows."""
    actor: Any = EvaluatorActor("evaluator-0")
    actor._runs["run-a"] = _Run(spec=None, objective=ObjectiveSection())  # type: ignore[arg-type]
    monkeypatch.setattr(actor, "_load", lambda run, weights: None)
    monkeypatch.setattr(actor, "_exact_match", lambda references, answers: {"evaluate/exact_match": 0.5})
    weights = StudentWeights(version=3, tensors={}, probe=None)
    report = actor.evaluate("run-a", weights, answers(-1, -1, -1), *(answers(*versions) for versions in parts))
    assert report.stale_answers == stale
    assert ("evaluate/exact_match" in report.metrics) == (bool(parts) and not stale)
