"""Pictures are written for full, odd and empty input; labels do not cover each other."""

import warnings
from pathlib import Path

import pytest

from raydistill.messages import Span
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


def test_a_log_axis_on_which_nothing_is_drawn_says_nothing() -> None:
    _, (axes,) = new_figure(1, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_axis(axes, "x")
    assert axes.get_xscale() == "log"
