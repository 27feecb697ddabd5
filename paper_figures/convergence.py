"""Order of convergence: the error of each sampler against its steps, where the true law is known.

On tasks with an exact law (`markov`, `hmm`, `product`) and the oracle's exact predictions (`--checkpoint oracle`) the
only error of a sampler is that of its discretisation: total variation to the true n-gram law, and excess NLL. On log
axes a method of order p is a line of slope -p; its slope is fitted over the points that stand clear of the floor, the
error of exact draws at the same number of sequences. Excess NLL has a sign, and that of exact draws is noise around 0:
there the floor is the end of their interval that is farther from 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from tsdfm_bench.paper_figures.base import (
    Made,
    NothingToDraw,
    Scene,
    mark_incomplete,
    named,
    own_names,
    scenes,
    unique_rows,
)
from tsdfm_bench.results.axes import error_bars, log_axis, step_axis
from tsdfm_bench.results.evidence import Evidence, EvidenceCell
from tsdfm_bench.results.rows import Row, finite
from tsdfm_bench.results.style import COLUMN_IN, FAINT, Label, finish, looks, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEASURES = {"tv_2": "total variation\n(bigrams)", "excess_nll": "excess NLL\n(nats/token)"}
SIGNED = ("excess_nll",)
CLEAR = 2.0  # times the floor


class Convergence:
    """See the module's text."""

    title: ClassVar[str] = "order of convergence"
    sweep: ClassVar[str] = "convergence.toml"

    def make(self, evidence: Evidence) -> list[Made]:
        """One figure per task with an exact law."""
        places = [scene for scene in scenes(evidence) if _lines(scene)]
        if not places:
            raise NothingToDraw(
                "no sampler with the oracle's exact predictions at several step counts on a task with an exact law"
            )
        return own_names(_one(scene, named("convergence", scene, places)) for scene in places)


def _lines(scene: Scene) -> dict[str, list[EvidenceCell]]:
    """Oracle cells by label and source, in order of steps; those with at least two step counts."""
    lines: dict[str, list[EvidenceCell]] = {}
    for cell in scene.everything:
        first = cell.first
        measured = any(cell.of(metric) for metric in MEASURES)
        plain = first["temperature"] in (None, 1.0) and first["top_p"] is None and first["draw"] == "fp64"
        if cell.is_oracle and first["steps"] is not None and measured and plain:
            lines.setdefault(f"{first['label']} {first['source']}".strip(), []).append(cell)
    return {
        name: sorted(cells, key=lambda cell: cell.first["steps"]) for name, cells in lines.items() if len(cells) > 1
    }


def fitted_order(steps: list[int], errors: list[float], floor: float) -> float | None:
    """Minus the slope of log error over log steps, over points above twice the floor; None below three points."""
    points = [(s, e) for s, e in zip(steps, errors, strict=True) if e > CLEAR * floor and e > 0]
    if len(points) < 3:
        return None
    x, y = np.log([s for s, _ in points]), np.log([e for _, e in points])
    return -float(np.polyfit(x, y, 1)[0])


def floor_of(metric: str, row: Row) -> float:
    """The error below which a sampler cannot be told from exact draws, from the row of these; see the module's text."""
    if metric not in SIGNED:
        return float(row["value"])
    return max(abs(row[end]) for end in ("value", "low", "high") if finite(row[end]))


def _one(scene: Scene, name: str) -> Made:
    lines = _lines(scene)
    measures = {m: title for m, title in MEASURES.items() if any(c.of(m) for cells in lines.values() for c in cells)}
    rows: list[Row | None] = []
    has_bar: list[bool] = []
    with styled():
        figure, grid = new_figure(COLUMN_IN, 0.3 + 1.9 * len(measures), rows=len(measures), sharex=True, squeeze=False)
        look = looks(lines)
        panels: dict[Axes, list[Label]] = {}
        for axes, (metric, title) in zip(grid[:, 0], measures.items(), strict=True):
            panels[axes] = []
            floor_row = scene.real.of(metric) if scene.real is not None else None
            floor = floor_of(metric, floor_row) if floor_row is not None else 0.0
            for label, cells in lines.items():
                points = [
                    (c.first["steps"], row) for c in cells if (row := c.of(metric)) is not None and row["value"] > 0
                ]
                if not points:
                    continue
                x, values = [int(s) for s, _ in points], [row for _, row in points]
                axes.plot(x, [row["value"] for row in values], **look[label])
                barred = [(s, row) for s, row in zip(x, values, strict=True) if _above(row)]
                has_bar += [_above(row) for row in values]
                error_bars(axes, [s for s, _ in barred], [row for _, row in barred], look[label]["color"])
                order = fitted_order(x, [row["value"] for row in values], floor)
                text = label if order is None else f"{label}\norder {order:.1f}"
                panels[axes].append(Label(x[-1], values[-1]["value"], text, look[label]["color"]))
                rows += values
            if floor > 0 and floor_row is not None:
                axes.axhline(floor, color=FAINT, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
                panels[axes].append(
                    Label(max(c.first["steps"] for cs in lines.values() for c in cs), floor, "exact draws", FAINT)
                )
                rows.append(floor_row)
            axes.set_ylabel(title)
            log_axis(axes, "y")
        grid[-1, 0].set_xlabel("sampling steps")
        step_axis(grid[-1, 0], [c.first["steps"] for cells in lines.values() for c in cells])
        missing = [] if scene.real is not None else ["exact draws (the floor)"]
        mark_incomplete(figure, missing)
        finish(figure, panels)
    shown = unique_rows(rows)
    counts = sorted({int(row["n"]) for row in shown if row["n"] is not None})
    notes = [
        f"Exact predictions, so all error is the sampler's; n = {', '.join(map(str, counts))} sequences. Orders are "
        f"slopes over points above {CLEAR:g} times the floor, the error of exact draws"
        + (" (of excess NLL the end of its interval that is farther from 0)" if {*measures} & {*SIGNED} else "")
        + ". Values of 0 or less are not drawn."
    ]
    if not all(has_bar):
        notes.append(f"Without a bar, since its interval reaches 0: {has_bar.count(False)} of {len(has_bar)} points.")
    notes += [f"{text}." for text in dict.fromkeys(row["definition"] for row in shown if row["definition"])]
    return Made(name, f"Order of convergence; {scene.name}", shown, figure=figure, notes=notes, missing=missing)


def _above(row: Row) -> bool:
    """Whether a log axis can show the interval, if there is one."""
    return not finite(row["low"]) or row["low"] > 0
