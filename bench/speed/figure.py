"""The growth of cost as a figure: a panel for each of length, vocabulary, batch and steps, both axes logarithmic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tsdfm_bench.results.axes import log_axis, step_axis
from tsdfm_bench.results.style import COLUMN_IN, PNG_DPI, Label, finish, looks, new_figure, styled
from tsdfm_bench.speed.scaling import AXES, Growth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("pdf", "png")


def draw_growth(growths: Sequence[Growth], unit: str, folder: Path) -> list[Path]:
    """Write scaling.pdf and scaling.png; returns their paths.

    Args:
        growths: what was measured; a line is labelled with its method and the power it grows with.
        unit: of their seconds.
        folder: made if it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"scaling.{name}" for name in FORMATS]
    with styled():
        figure, grid = new_figure(COLUMN_IN, 1.7 * len(AXES), rows=len(AXES))
        look = looks(growth.method for growth in growths)
        panels: dict[Axes, list[Label]] = {}
        for axes, axis in zip(grid, AXES, strict=True):
            panels[axes] = []
            shown = [growth for growth in growths if growth.axis == axis]
            for growth in shown:
                values, seconds = zip(*growth.points, strict=True)
                axes.plot(values, seconds, **look[growth.method])
                text = f"{growth.method.split()[0]}  x^{growth.exponent:.2f}"
                panels[axes].append(Label(values[-1], seconds[-1], text, look[growth.method]["color"]))
            axes.set(title=axis, ylabel=unit.split(" of ")[0])
            if shown:
                log_axis(axes, "y")
                step_axis(axes, [int(value) for growth in shown for value, _ in growth.points])
        finish(figure, panels)
        for path in paths:
            figure.savefig(path, dpi=PNG_DPI)
    return paths
