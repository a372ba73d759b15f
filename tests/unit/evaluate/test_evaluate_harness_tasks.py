"""Which of lm-eval's tasks are refused, before a model is loaded."""

from types import SimpleNamespace
from typing import Any

import pytest

from raydistill.errors import UserError
from raydistill.evaluate.harness_tasks import _check_measurable


def task(generation: dict[str, Any] | None = None, repeats: int = 1, **kind: bool) -> Any:
    """What is read of a task of lm-eval's."""
    return SimpleNamespace(config=SimpleNamespace(task="mine", generation_kwargs=generation, repeats=repeats), **kind)


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        (task(MULTIMODAL=True), "task mine asks about images or sound; these models read text only"),
        (task(UNSAFE_CODE=True), "task mine runs code that the model writes; use lm-eval itself, in a sandbox"),
        (task({"do_sample": True}), "task mine samples its answers"),
        (task({"temperature": 0.2}), "task mine samples its answers"),
        (task({"do_sample": False}, repeats=64), "task mine samples its answers"),
    ],
)
def test_tasks_with_pictures_code_or_sampled_answers_are_refused(refused: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        _check_measurable(refused)


def test_greedy_text_is_measured() -> None:
    _check_measurable(task())
    _check_measurable(task({"do_sample": False, "temperature": 0.0}, MULTIMODAL=False, UNSAFE_CODE=False))
