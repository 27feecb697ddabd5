"""The growth of cost as a figure: one panel for each of length, vocabulary, batch and steps, both axes logarithmic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tsdfm_bench.speed.scaling import AXES, Growth


def draw_growth(growths: Sequence[Growth], unit: str, folder: Path) -> list[Path]:
    """Write scaling.pdf and scaling.png; returns their paths."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, axis in zip(figure.subplots(2, 2).flat, AXES, strict=True):
        for growth in (g for g in growths if g.axis == axis):
            values, seconds = zip(*growth.points, strict=True)
            panel.plot(values, seconds, marker="o", label=f"{growth.method}, exponent {growth.exponent:.2f}")
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel=unit)
        panel.set_xticks([], minor=True)
        ticks = sorted({value for g in growths if g.axis == axis for value, _ in g.points})
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        if panel.has_data():
            panel.legend(fontsize="small")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "scaling.pdf", folder / "scaling.png"]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths
