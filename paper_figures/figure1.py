"""Figure 1: generative perplexity against steps, with the teacher at 1,024 steps and the student's 8-step point.

One file per scorer; per source distribution a panel of perplexity and below it one of entropy, which belongs to it: a
perplexity below the teacher's says little where entropy is below it too. Networks of several training seeds are one
point, with small marks for the single ones. The paper's own claim (32 % below the teacher,
arXiv 2605.07924, abstract) is drawn as a mark at 8 steps, relative to the teacher measured here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from tsdfm_bench.paper_figures.base import (
    LONG,
    SHORT,
    Made,
    NothingToDraw,
    Scene,
    mark_incomplete,
    named,
    own_names,
    scenes,
    unique_rows,
)
from tsdfm_bench.paper_figures.published import published
from tsdfm_bench.results.axes import error_bars, log_axis, step_axis
from tsdfm_bench.results.evidence import Evidence, EvidenceCell
from tsdfm_bench.results.formula import Quantity
from tsdfm_bench.results.numbers import plain
from tsdfm_bench.results.plots import seed_marks
from tsdfm_bench.results.quantities import Rows
from tsdfm_bench.results.replicates import interval
from tsdfm_bench.results.rows import Row
from tsdfm_bench.results.seeds import about_seeds, over_what
from tsdfm_bench.results.stats import CONFIDENCE, Interval
from tsdfm_bench.results.style import COLUMN_IN, FAINT, INK, Label, finish, looks, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ORDER = ("tsdfm", "fsdfm", "dfm", "mdlm", "sedd")


class Figure1:
    """See the module's text."""

    title: ClassVar[str] = "gen-PPL against steps"
    sweep: ClassVar[str] = "figure1"

    def make(self, evidence: Evidence) -> list[Made]:
        """One figure per text setting and scorer."""
        places = [scene for scene in scenes(evidence) if _drawable(scene)]
        if not places:
            raise NothingToDraw("no generator has gen-PPL and entropy at a step count")
        found = []
        for scene in places:
            judges = scene.scorers(scene.metric("perplexity"))
            found += [_one(scene, judge, named("figure1", scene, places)) for judge in judges]
        return own_names(found)


def _drawable(scene: Scene) -> bool:
    return bool(scene.metric("perplexity") and scene.metric("entropy") and any(c.first["steps"] for c in scene.cells))


def _lines(scene: Scene, judge: str) -> dict[str, dict[str, list[EvidenceCell]]]:
    """Cells with both values by source and method, in order of steps."""
    ppl, entropy = scene.metric("perplexity"), scene.metric("entropy")
    lines: dict[str, dict[str, list[EvidenceCell]]] = {}
    for cell in scene.cells:
        if cell.first["steps"] is not None and cell.of(ppl, judge) and cell.of(entropy):
            lines.setdefault(cell.first["source"], {}).setdefault(cell.first["method"], []).append(cell)
    return {
        source: {
            method: sorted(methods[method], key=lambda cell: cell.first["steps"])
            for method in sorted(methods, key=lambda name: (ORDER.index(name) if name in ORDER else 99, name))
        }
        for source, methods in sorted(lines.items(), key=lambda item: item[0] != "uniform")
    }


def _one(scene: Scene, judge: str, name: str) -> Made:
    ppl, entropy = scene.metric("perplexity"), scene.metric("entropy")
    lines = _lines(scene, judge)
    rows: list[Row | None] = []
    points: list[list[Row]] = []
    notes: list[str] = []
    with styled():
        figure, grid = new_figure(
            COLUMN_IN, 0.3 + 2.35 * len(lines), rows=2 * len(lines), sharex=True, height_ratios=[5, 3] * len(lines)
        )
        look = looks([*ORDER, *(method for methods in lines.values() for method in methods)])
        panels: dict[Axes, list[Label]] = {}
        steps: list[int] = []
        for i, (source, methods) in enumerate(lines.items()):
            top, bottom = grid[2 * i], grid[2 * i + 1]
            panels[top] = []
            for method, cells in methods.items():
                x = [int(cell.first["steps"]) for cell in cells]
                steps += x
                for axes, metric, scorer in ((top, ppl, judge), (bottom, entropy, "")):
                    values = [cell.rows[metric or "", scorer] for cell in cells]
                    networks = [cell.behind(metric, scorer) for cell in cells]
                    axes.plot(x, [row["value"] for row in values], **look[method])
                    seed_marks(axes, x, networks)
                    error_bars(axes, x, values, look[method]["color"])
                    points += networks
                value = float(cells[-1].rows[ppl or "", judge]["value"])
                text = "dfm (teacher)" if method == "dfm" and x[-1] == LONG else method
                panels[top].append(Label(x[-1], value, text, look[method]["color"]))
            rows += _references(scene, judge, top, bottom, panels[top], max(steps))
            notes += _headline(scene, judge, source, top, str(look["dfm"]["color"]))
            top.set_title(f"{source} source" if source else "no source")
            top.set_ylabel(f"gen-PPL ({judge})")
            bottom.set_ylabel("entropy\n(nats)")
            log_axis(top, "y")
        grid[-1].set_xlabel("sampling steps")
        step_axis(grid[-1], steps)
        wanted = [(m, s, n) for s in lines if s for m, n in (("tsdfm", SHORT), ("dfm", LONG))]
        missing = scene.absent(wanted)
        mark_incomplete(figure, missing)
        finish(figure, panels)
    shown = unique_rows([*(row for networks in points for row in networks), *rows])
    notes += _common(shown, points, scene)
    return Made(
        name=f"{name}-{judge}",
        title=f"gen-PPL ({judge}) against steps, {scene.name}",
        rows=shown,
        figure=figure,
        notes=notes,
        missing=missing,
        published=[published().claim("32-percent")],
    )


def _references(scene: Scene, judge: str, top: Axes, bottom: Axes, labels: list[Label], right: int) -> list[Row | None]:
    """Real text as a line in both panels."""
    if scene.real is None:
        return []
    found: list[Row | None] = []
    for axes, metric, scorer in ((top, scene.metric("perplexity"), judge), (bottom, scene.metric("entropy"), "")):
        row = scene.real.of(metric, scorer)
        if row is not None:
            axes.axhline(row["value"], color=INK, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
            if axes is top:
                labels.append(Label(right, row["value"], "real text"))
            found.append(row)
    return found


def against_teacher(scene: Scene, judge: str, source: str) -> Interval | None:
    """By how many percent the student at 8 steps is below the teacher at 1,024; None if one of them is missing."""
    student, teacher = scene.cell("tsdfm", source, SHORT), scene.cell("dfm", source, LONG)
    ppl = scene.metric("perplexity") or ""
    if student is None or teacher is None or not (student.of(ppl, judge) and teacher.of(ppl, judge)):
        return None
    rows = Rows(scene.evidence, {"student": student.networks, "teacher": teacher.networks}, judge)

    def reduction(rows: Rows) -> np.ndarray:  # (1 + resamples,)
        below, above = (rows.quantity(Quantity("ppl", name, ppl))[0] for name in ("student", "teacher"))
        return 100 * (1 - below / above)

    values = reduction(rows)
    if rows.seeds:
        values = reduction(rows.widened(values[1:], CONFIDENCE))
    return interval(float(values[0]), values[1:], n=rows.n)


def _headline(scene: Scene, judge: str, source: str, top: Axes, color: str) -> list[str]:
    """The teacher's level, the student's point and the paper's mark; returns sentences for the caption."""
    from matplotlib.patheffects import withStroke

    ppl = scene.metric("perplexity") or ""
    teacher, student = scene.cell("dfm", source, LONG), scene.cell("tsdfm", source, SHORT)
    notes = []
    claim = published().claim("32-percent")
    level = teacher.of(ppl, judge) if teacher is not None else None
    point = student.of(ppl, judge) if student is not None else None
    if level is not None:
        top.axhline(level["value"], color=color, linewidth=0.8, linestyle=(0, (4, 1.5)), zorder=1.2)
        mark = level["value"] * (1 - (claim.value or 0) / 100)
        top.plot(SHORT, mark, marker="_", markersize=11, markeredgewidth=1.4, color=FAINT, linestyle="none", zorder=3)
        top.annotate(
            f"paper: {claim.value:g} % below",
            (SHORT, mark),
            xytext=(7, -2),
            textcoords="offset points",
            fontsize=5.5,
            color=FAINT,
            zorder=5,
            path_effects=[withStroke(linewidth=2, foreground="white")],  # readable where a curve runs through it
        )
    if point is not None and student is not None:
        top.plot(
            SHORT, point["value"], marker="o", markersize=8, markerfacecolor="none", color=INK, markeredgewidth=0.9
        )
        found = against_teacher(scene, judge, source)
        collapsed = "entropy-low" in student.flags
        if found is not None:
            ends = f" [{plain(found.low)}, {plain(found.high)}]" if found.method != "none" else ""
            notes.append(
                f"{source or 'no'} source: tsdfm at {SHORT} steps is {plain(found.value)} %{ends} below the teacher at "
                f"{LONG:,} steps; the paper says {claim.value:g} %."
            )
        if collapsed:
            notes.append(f"{source} source: the student's entropy is below that of real text: see the lower panel.")
    return notes


def _common(rows: list[Row], points: list[list[Row]], scene: Scene) -> list[str]:
    counts = sorted({int(row["n"]) for row in rows if row["n"] is not None})
    bars_are = f"bars are 95 % intervals {over_what(points)}"
    notes = [f"n = {', '.join(map(str, counts))} sequences; {bars_are}."] if counts else []
    notes += [f"{text} Small marks are single seeds." for text in about_seeds(points)]
    notes += scene.without_some + scene.left_out
    definitions = dict.fromkeys(row["definition"] for row in rows if row["scorer"])
    return [*notes, *(f"{text}." for text in definitions if text)]
