"""Axes as all figures use them: log scales with plain numbers, step counts, error bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tsdfm_bench.results.rows import Row, finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def log_axis(axes: Axes, which: str) -> None:
    """A log axis with plain numbers; 1-2-5 or finer where there are few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = axes.yaxis if which == "y" else axes.xaxis
    (axes.set_yscale if which == "y" else axes.set_xscale)("log")
    low, high = axes.get_ylim() if which == "y" else axes.get_xlim()
    span = high / low
    subs = (
        (1.0,) if span > 300 else (1.0, 3.0) if span > 30 else (1.0, 2.0, 5.0) if span > 4 else (1, 1.5, 2, 3, 4, 6, 8)
    )
    axis.set_major_locator(LogLocator(10, subs=subs, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}" if value < 1e6 else f"{value:.0e}"))
    axis.set_minor_locator(LogLocator(10, subs=tuple(range(1, 10)), numticks=20))
    axis.set_minor_formatter(NullFormatter())


def step_axis(axes: Axes, steps: Sequence[int]) -> None:
    """Step counts on a log axis of base 2, labelled as they are: at most 8 of them, the largest always."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(thinned(steps, 8)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())


def thinned(steps: Sequence[int], most: int) -> list[int]:
    """At most so many different step counts in order, the largest always: every second, fourth, ... from it down."""
    ticks = sorted(set(steps))
    while len(ticks) > most:
        ticks = ticks[::-1][::2][::-1]
    return ticks


def error_bars(axes: Axes, x: Sequence[float], rows: Sequence[Row], color: str, *, along: str = "y") -> None:
    """Thin lines from low to high of each row that has an interval."""
    for at, row in zip(x, rows, strict=True):
        if finite(row["low"]) and finite(row["high"]):
            ends = ([at, at], [row["low"], row["high"]])
            axes.plot(*(ends if along == "y" else ends[::-1]), color=color, linewidth=0.8, alpha=0.8, zorder=1.6)
