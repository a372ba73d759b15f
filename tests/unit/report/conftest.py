"""What pictures are made of, without rendering them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raydistill.report import curves, plot_checkpoints, sweep_plots


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The figures that would have been saved."""
    figures: list[Any] = []

    def keep(figure: Any, path: Path, **_: float) -> Path:
        figures.append(figure)
        return path

    for module in (curves, plot_checkpoints, sweep_plots):
        monkeypatch.setattr(module, "save_figure", keep)
    yield figures
    from matplotlib import pyplot as plt

    for figure in figures:
        plt.close(figure)
