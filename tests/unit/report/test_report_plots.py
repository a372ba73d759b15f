"""Pictures are written for full, odd and empty input; labels do not cover each other."""

import warnings
from pathlib import Path
from typing import Any

import pytest

from raydistill.messages import Span
from raydistill.report.curves import plot_curves
from raydistill.report.plot_checkpoints import plot_checkpoints
from raydistill.report.plot_labels import place_labels
from raydistill.report.plot_style import log_axis, new_figure
from raydistill.report.plots import plot_bytes_kl, plot_spans, plot_training
from raydistill.results.tables import SummaryRow


def size_of(path: Path) -> tuple[int, int]:
    raw = path.read_bytes()
    assert raw.startswith(b"\x89PNG")
    return int.from_bytes(raw[16:20], "big"), int.from_bytes(raw[20:24], "big")


def rows() -> list[SummaryRow]:
    ptq = [SummaryRow(name=f"int{b} a", role="ptq", kl_nats=0.3 / b**3, bytes=50_000 * b) for b in (2, 3, 4)]
    student = SummaryRow(name="student", role="student", kl_nats=0.004, bytes=100_000, exact_match=0.9)
    teacher = SummaryRow(name="teacher", role="teacher", kl_nats=0.0, bytes=1_000_000)
    return [teacher, *ptq, student, SummaryRow(name="unknown", role="control", kl_nats=None, bytes=1)]


def spans(num_steps: int) -> list[Span]:
    found = []
    for step in range(num_steps):
        start = 1e9 + step
        found.append(Span(stage="rollout", actor="rollout-0", step=step, start_s=start, end_s=start + 0.6))
        found.append(Span(stage="wait", actor="trainer-0", step=step, start_s=start, end_s=start + 0.6))
        found.append(Span(stage="trainer", actor="trainer-0", step=step, start_s=start + 0.6, end_s=start + 1))
    return found


def record(num_steps: int) -> list[dict[str, object]]:
    lines: list[dict[str, object]] = [
        {"kind": "step", "step": s, "metrics": {"trainer/loss": 1 / (s + 1), "trainer/kl_nats": float("nan")}}
        for s in range(num_steps)
    ]
    lines.append(
        {"kind": "evaluation", "version": 0, "metrics": {"evaluate/kl_nats": 0.1, "evaluate/exact_match": 0.5}}
    )
    long = {"stage": "wait", "actor": "trainer-0", "step": 0, "start_s": 1e9 - 30, "end_s": 1e9}
    plain = [
        {"stage": s.stage, "actor": s.actor, "step": s.step, "start_s": s.start_s, "end_s": s.end_s}
        for s in spans(num_steps)
    ]
    return [*lines, {"kind": "spans", "spans": [long, *plain]}]


def test_pictures_are_1000_pixels_wide(tmp_path: Path) -> None:
    assert size_of(plot_bytes_kl(rows(), tmp_path / "new" / "kl.png"))[0] == 1000
    assert size_of(plot_spans(spans(5), tmp_path / "spans.png"))[0] == 1000
    assert size_of(plot_training(record(30), tmp_path / "training.png"))[0] == 1000


def test_a_long_run_still_fits_a_picture(tmp_path: Path) -> None:
    assert size_of(plot_spans(spans(500), tmp_path / "spans.png"))[1] < 600


def test_empty_input_draws_an_empty_picture(tmp_path: Path) -> None:
    for path in (
        plot_bytes_kl([], tmp_path / "a.png"),
        plot_spans([], tmp_path / "b.png"),
        plot_training([], tmp_path / "c.png"),
    ):
        assert size_of(path)[0] == 1000


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_labels_do_not_cover_each_other(spread: float) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.text import Text

    figure, axes = plt.subplots(figsize=(10, 5.6), dpi=100)
    points = [(1.0 + spread * i, 1.0 + 0.05 * i) for i in range(8)]
    axes.scatter(*zip(*points, strict=True))
    axes.set_xlim(-5, 10)
    axes.set_ylim(0, 2)
    place_labels(axes, points, [f"model number {i} (95.{i}%)" for i in range(8)])
    figure.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without their lines
    plt.close(figure)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


def test_runs_over_each_other_are_a_line_each_of_one_colour_in_every_panel(tmp_path: Path, drawn: list[Any]) -> None:
    def lines(factor: float) -> list[dict[str, Any]]:
        steps = [{"kind": "step", "step": s, "metrics": {"trainer/loss": factor * (s + 1)}} for s in (1, 0, 2)]
        metrics = {"evaluate/kl_nats": factor, "evaluate/kl_nats_se": 0.1}
        return [*steps, *({"kind": "evaluation", "version": v, "metrics": metrics} for v in (0, 3))]

    plot_curves({"a": lines(1.0), "b": lines(2.0)}, tmp_path / "x.png")
    loss, kl = drawn[0].axes
    assert [axes.get_title(loc="left") for axes in (loss, kl)] == [
        "Loss (nats per token)",
        "KL to the teacher: held out (nats per token)",
    ]
    for line, factor in zip(loss.lines, (1.0, 2.0), strict=True):
        assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 1, 2], [factor, 2 * factor, 3 * factor])
    for bars, factor in zip(kl.containers, (1.0, 2.0), strict=True):
        line, _, (errors,) = bars.lines
        assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 3], [factor, factor])
        assert errors.get_segments()[0].tolist() == [[0, factor - 0.1], [0, factor + 0.1]]
        assert line.get_color() == loss.lines[int(factor) - 1].get_color()
    assert loss.lines[0].get_color() != loss.lines[1].get_color()
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]


def test_the_checkpoints_of_a_run_are_drawn_over_their_steps_beside_the_teacher(
    tmp_path: Path, drawn: list[Any]
) -> None:
    def row(kl: float | None, match: float, perplexity: float) -> SummaryRow:
        return SummaryRow(
            name="x", role="student", bytes=1, kl_nats=kl, kl_se=0.1, exact_match=match, perplexity=perplexity
        )

    rows = {4: row(0.25, 0.75, 1.5), 0: row(2.0, 0.5, 3.0), 2: row(1.0, 0.625, 2.0)}
    plot_checkpoints(rows, row(None, 0.9, 1.2), tmp_path / "x.png")
    kl, match, perplexity = drawn[0].axes
    for axes, values in ((kl, [2.0, 1.0, 0.25]), (match, [0.5, 0.625, 0.75]), (perplexity, [3.0, 2.0, 1.5])):
        (bars,) = axes.containers
        assert (list(bars.lines[0].get_xdata()), list(bars.lines[0].get_ydata())) == ([0, 2, 4], values)
    assert kl.containers[0].lines[2][0].get_segments()[0].tolist() == [[0, pytest.approx(1.9)], [0, pytest.approx(2.1)]]
    dashed = [
        [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"] for axes in (kl, match, perplexity)
    ]
    assert dashed == [[], [0.9], [1.2]]
    assert [axes.get_ylabel() for axes in (kl, match, perplexity)] == ["nats per token", "share", "perplexity"]
    assert [axes.get_yscale() for axes in (kl, match, perplexity)] == ["log", "linear", "linear"]


def test_a_log_axis_on_which_nothing_is_drawn_says_nothing() -> None:
    _, (axes,) = new_figure(1, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_axis(axes, "x")
    assert axes.get_xscale() == "log"
