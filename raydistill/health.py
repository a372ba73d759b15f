"""What the completions of a step look like: the numbers that show a policy running away before its loss does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raydistill.messages import Metric, Samples

REPEAT_NGRAM = 4  # completions that loop repeat whole 4-grams; natural text rarely does


def repetition(ids: np.ndarray) -> float:
    """Share of a completion's 4-grams that stood in it before; 0 for completions shorter than two 4-grams."""
    if ids.size <= REPEAT_NGRAM:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(ids, REPEAT_NGRAM)
    return 1.0 - len({tuple(g) for g in grams.tolist()}) / len(grams)


def completion_metrics(samples: Samples) -> tuple[Metric, ...]:
    """Length, finish reasons, emptiness and repetition of sampled completions, weighted by sequences."""
    rows = samples.completions.rows()
    count = float(len(rows))
    # A lone EOS is an answer without content.
    empty = sum(1 for row, why in zip(rows, samples.finish_reasons, strict=True) if row.size <= (why == "stop"))
    cut = sum(1 for why in samples.finish_reasons if why == "length")
    return (
        Metric(name="rollout/completion_tokens", total=float(samples.completions.num_tokens), weight=count),
        Metric(name="rollout/truncated_fraction", total=float(cut), weight=count),
        Metric(name="rollout/empty_fraction", total=float(empty), weight=count),
        Metric(name="rollout/repetition_fraction", total=sum(repetition(row) for row in rows), weight=count),
    )


def health_warning(history: Sequence[dict[str, float]], max_new_tokens: int) -> str | None:
    """One line when completions run away, with the usual cause; `history` is the steps so far, newest last."""
    if not history or "rollout/truncated_fraction" not in history[-1]:
        return None
    now = history[-1]
    first = next(h for h in history if "rollout/truncated_fraction" in h)
    if (
        now["rollout/truncated_fraction"] > 0.5
        and now["rollout/truncated_fraction"] > first["rollout/truncated_fraction"] + 0.3
    ):
        return (
            f"{now['rollout/truncated_fraction']:.0%} of the completions are cut at rollout.max_new_tokens="
            f"{max_new_tokens}, {first['rollout/truncated_fraction']:.0%} were at the start. The usual cause is an "
            "end-of-sequence token that the student does not learn to write: compare the EOS ids of teacher and student."
        )
    if now["rollout/truncated_fraction"] >= 0.95:
        return (
            f"nearly all completions are cut at rollout.max_new_tokens={max_new_tokens}: raise it, or check that the EOS "
            "ids of teacher and student agree (a mismatch is the usual cause)."
        )
    if now["rollout/repetition_fraction"] > 0.5:
        return (
            f"{now['rollout/repetition_fraction']:.0%} of the 4-grams in the completions are repeats: the student loops. "
            "Lower trainer.learning_rate, or raise rollout.temperature."
        )
    if now["rollout/empty_fraction"] > 0.2:
        return (
            f"{now['rollout/empty_fraction']:.0%} of the completions are empty: the student ends at once. Check the chat "
            "template (data.template) and set rollout.min_new_tokens above 0."
        )
    return None
