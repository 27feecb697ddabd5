"""Figures of any run: frontier, steps, cost, MAUVE, trajectory. Pure functions of stored results.

Each kind takes a summary (and replicates for what is read off curves) and returns drawings: a figure, the rows it
shows, and sentences for its caption (scorer, convention, n, interval, what is missing). Perplexity and cost have log
axes, as the field draws them; every point carries its 95 % interval; lines are labelled at their ends. Networks of
several training seeds are one point, with small marks for the single ones (see `recipes`). Rows of different text,
length, scorer or convention never share a panel. Call `draw` and save with `style.save_figure`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tsdfm_bench.results.axes import error_bars, log_axis, step_axis
from tsdfm_bench.results.columns import terms
from tsdfm_bench.results.files import slug
from tsdfm_bench.results.frontier import (
    SAME_LINE,
    Curve,
    Frontier,
    OutOfRange,
    Point,
    at_entropy,
    corner,
    dominated_area,
    expenses,
    frontiers,
    generator,
    told_apart,
)
from tsdfm_bench.results.numbers import with_interval
from tsdfm_bench.results.recipes import with_recipes
from tsdfm_bench.results.replicates import Replicates
from tsdfm_bench.results.resampling import intervals
from tsdfm_bench.results.rows import CellRows, Row, cells_of, finite, pick
from tsdfm_bench.results.seeds import about_seeds, over_what
from tsdfm_bench.results.style import COLUMN_IN, FAINT, INK, Label, finish, looks, new_figure, styled
from tsdfm_bench.results.training import TRAJECTORIES, Variants, read_trajectories

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEIGHT_IN = 2.6
MOST_CURVES = 8  # in one panel


class NothingToDraw(ValueError):
    """The rows that a figure needs are not there; the message says which, and what to run."""


@dataclass(frozen=True)
class Drawing:
    """A finished figure.

    Args:
        name: file name without ending.
        title: one line.
        figure: to be saved by `style.save_figure`.
        rows: every row of the summary that it shows.
        notes: sentences for the caption.
    """

    name: str
    title: str
    figure: Figure
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


def draw(
    kind: str,
    summary: pd.DataFrame,
    *,
    scorer: str | None = None,
    metric: str | None = None,
    replicates: Replicates | None = None,
    variants: Variants | None = None,
) -> list[Drawing]:
    """The drawings of one kind: one per text setting and scorer.

    Args:
        kind: a key of `KINDS`.
        summary: see `tsdfm_bench.results.schema`.
        scorer: only this one; None = each.
        metric: a perplexity convention, for example "gen_ppl/sedd"; None = the pooled one.
        replicates: for what is read off curves; None: made from the summary alone.
        variants: which networks differ in their training seed alone; None: as the run folder of the replicates says.

    Raises:
        NothingToDraw: the summary lacks the rows.
        ValueError: unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of figure {kind!r}: choose {', '.join(KINDS)}")
    known = sorted({name for name in summary["scorer"] if name})
    if scorer is not None and scorer not in known:
        raise NothingToDraw(f"no scores by {scorer!r} here; scorers with results: {', '.join(known) or 'none'}")
    summary, replicates = with_recipes(summary, replicates or Replicates(summary), variants)
    with styled():
        return KINDS[kind](summary, scorer, metric, replicates)


# ------------------------------------------------------------------------------------------------------ parts


def seed_marks(axes: Axes, at: Sequence[float], networks: Iterable[Sequence[Row]], *, along: str = "y") -> None:
    """Small marks at the values of single training seeds, for points that stand for several networks.

    Args:
        at: where the points are on the other axis.
        networks: rows behind each point, one per network.
        along: the axis of the values.
    """
    for place, rows in zip(at, networks, strict=True):
        if len(rows) > 1:
            places = ([place] * len(rows), [row["value"] for row in rows])
            x, y = places if along == "y" else places[::-1]
            marker = "_" if along == "y" else "|"
            axes.plot(x, y, marker=marker, markersize=4, color=FAINT, linestyle="none", zorder=1.5)


def _networks(rows: Iterable[Row], replicates: Replicates) -> list[list[Row]]:
    """What is behind each row: itself, or the rows of the networks whose mean it is."""
    return [list[Row](replicates.behind(row["cell"], row["metric"], row["scorer"])) for row in rows]


def _single(rows: Iterable[Row], replicates: Replicates) -> list[Row]:
    """The rows of single networks behind these."""
    return [row for networks in _networks(rows, replicates) for row in networks]


def _shown(row: Row) -> str:
    return with_interval(row["value"], row["low"], row["high"])


def _ppl_label(frontier_metric: str, scorer: str) -> str:
    convention = frontier_metric.partition("/")[2]
    return f"gen-PPL, {scorer}" + (f", as {convention}" if convention not in ("", "pooled") else "")


def _caption(rows: Iterable[Row], replicates: Replicates) -> list[str]:
    """Sentences that every caption needs: definitions, n, intervals, seeds, draws."""
    shown = list(rows)
    networks = _networks(shown, replicates)
    rows = [row for behind in networks for row in behind]
    notes = [f"{text}." for text in dict.fromkeys(row["definition"].rstrip(".") for row in rows if row["definition"])]
    counts = sorted({int(row["n"]) for row in rows if row["n"] is not None})
    if counts:
        over = over_what(behind for behind in networks if any(row["kind"] == "method" for row in behind))
        notes.append(f"n = {', '.join(map(str, counts))} sequences per point; bars are 95 % intervals {over}.")
    notes += [f"{text} Small marks are single seeds." for text in about_seeds(networks)]
    notes += _fewer(shown, networks)
    draws = sorted({row["draw"] for row in rows if row["draw"]})
    if draws and draws != ["fp64"]:
        notes.append(f"Draws: {', '.join(draws)}.")
    return notes


def _fewer(rows: Sequence[Row], networks: Sequence[Sequence[Row]]) -> list[str]:
    """Points that stand for fewer networks than their recipe has in this figure."""
    every: dict[tuple[Any, ...], set[str]] = {}
    keys = [tuple(row[name] for name in SAME_LINE) for row in rows]
    for key, behind in zip(keys, networks, strict=True):
        every.setdefault(key, set()).update(row["weights"] for row in behind)
    told = dict.fromkeys(
        f"{_settings(CellRows([row]))} ({len(behind)} of {len(every[key])})"
        for row, key, behind in zip(rows, keys, networks, strict=True)
        if len(behind) < len(every[key])
    )
    return [f"Networks are missing from {'; '.join(told)}."] if told else []


def _undone(summary: pd.DataFrame) -> list[str]:
    """What is missing from a partial run."""
    undone = [cell for cell in cells_of(summary) if cell.first["state"] != "done"]
    if not undone:
        return []
    names = dict.fromkeys(f"{c.first['label'] or c.first['method']} ({c.first['state']})" for c in undone)
    return [f"Not drawn, {len(undone)} cells that are not done: {', '.join(names)}."]


def _mark_partial(axes: Axes, summary: pd.DataFrame) -> None:
    count = len({cell.id for cell in cells_of(summary) if cell.first["state"] != "done"})
    if count:
        what = f"partial: {count} cell{'s' * (count > 1)} not done"
        axes.figure.text(0.995, 0.01, what, ha="right", va="bottom", fontsize=5.5, color=FAINT)


def _real_text(axes: Axes, real: Point) -> None:
    """A star at real text, and a line at its entropy."""
    x, y = real.entropy["value"], real.perplexity["value"]
    axes.axvline(x, color=FAINT, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
    axes.plot(x, y, marker="*", color=INK, markersize=7, linestyle="none", zorder=4)
    axes.annotate(
        "real text",
        (x, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 2),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=6.5,
    )


# ---------------------------------------------------------------------------------------------------- frontier


def _frontier(summary: pd.DataFrame, scorer: str | None, metric: str | None, replicates: Replicates) -> list[Drawing]:
    drawings = []
    for frontier in frontiers(summary, scorer, metric):
        if not any(len(curve.points) > 1 for curve in frontier.curves):
            continue
        parts = _panels(frontier)
        worst = corner(frontier)  # one for all panels, so that their areas can be compared
        drawings += [_one_frontier(summary, part, steps, replicates, len(parts) > 1, worst) for part, steps in parts]
    if not drawings:
        raise NothingToDraw(
            "a frontier needs perplexity and entropy at several temperatures or nucleus masses: run with "
            "--temperatures 0.7,0.85,1 (or --top-p 0.8,0.9,1) --metrics gen-ppl,entropy"
        )
    return _numbered(drawings)


def _panels(frontier: Frontier) -> list[tuple[Frontier, int | None]]:
    """The frontier in one figure, or one figure per step count if that were too many curves; with the step count."""
    counts = sorted({int(curve.first["steps"]) for curve in frontier.curves if finite(curve.first["steps"])})
    if len(counts) == 1:
        return [(frontier, counts[0])]
    if len(frontier.curves) <= MOST_CURVES or not counts:
        return [(frontier, None)]

    def members(count: int) -> tuple[Curve, ...]:
        return tuple(c for c in frontier.curves if not finite(c.first["steps"]) or int(c.first["steps"]) == count)

    parts = [(replace(frontier, curves=members(count)), count) for count in counts]
    return [(part, count) for part, count in parts if any(len(curve.points) > 1 for curve in part.curves)]


def _height(lines: float, least: float) -> float:
    """Inches that give a column of labels room."""
    return max(least, 0.7 + lines * 0.125)


def _one_frontier(
    summary: pd.DataFrame,
    frontier: Frontier,
    steps: int | None,
    replicates: Replicates,
    several: bool,
    worst: tuple[float, float],
) -> Drawing:
    shown = {
        curve.name: _wrapped(curve.name.replace(f", {steps} steps", "") if steps is not None else curve.name)
        for curve in frontier.curves
    }
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure(COLUMN_IN, _height(sum(1.15 + text.count("\n") for text in shown.values()), HEIGHT_IN))
    look = looks(curve.name for curve in frontier.curves)
    notes = []
    labels = []
    if frontier.real is not None:
        _real_text(axes, frontier.real)
    for curve in frontier.curves:
        style = look[curve.name]
        x = [point.entropy["value"] for point in curve.points]
        y = [point.perplexity["value"] for point in curve.points]
        axes.plot(x, y, **style, label=curve.name)
        seed_points(axes, curve.points, replicates)
        error_bars(axes, x, [p.perplexity for p in curve.points], style["color"])
        error_bars(axes, y, [p.entropy for p in curve.points], style["color"], along="x")
        labels.append(Label(x[-1], y[-1], shown[curve.name], style["color"]))
        notes.append(_reading(curve, frontier, replicates) + _area(curve, worst, replicates))
        if not curve.monotone():
            notes.append(f"{curve.name}: perplexity does not rise with entropy everywhere; made monotone for reading.")
    if any(len(curve.points) > 1 for curve in frontier.curves):
        notes.append(about_area(worst))
    axes.set_xlabel("entropy (nats)" + (f", {steps:,} steps" if steps is not None else ""))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylabel(_ppl_label(frontier.metric, frontier.scorer))
    log_axis(axes, "y")
    _mark_partial(axes, summary)
    finish(figure, {axes: labels})
    rows = frontier.rows()
    return Drawing(
        f"frontier-{frontier.scorer}" + (f"-{steps}-steps" if several else ""),
        f"{frontier.title}: gen-PPL ({frontier.scorer}) against entropy"
        + (f", {steps:,} steps" if steps is not None else ""),
        figure,
        _single(rows, replicates),
        [*notes, *_caption(rows, replicates), *_undone(summary)],
    )


def _reading(curve: Curve, frontier: Frontier, replicates: Replicates) -> str:
    if frontier.real is None:
        return f"{curve.name}: no real text to read the curve at."
    try:
        found = at_entropy(curve, frontier.real, replicates)
    except OutOfRange as error:
        return f"{error}."
    shown = with_interval(found.value, found.low, found.high)
    return f"{curve.name}: gen-PPL {shown} at the entropy of real text ({frontier.real.entropy['value']:.3f} nats)."


def seed_points(axes: Axes, points: Sequence[Point], replicates: Replicates) -> None:
    """Small dots at entropy and perplexity of single training seeds, for points that stand for several networks."""
    for point in points:
        x, y = (_networks([row], replicates)[0] for row in (point.entropy, point.perplexity))
        if len(y) > 1:
            places = ([row["value"] for row in rows] for rows in (x, y))
            axes.plot(*places, marker=".", markersize=3, color=FAINT, linestyle="none", zorder=1.5)


def _area(curve: Curve, worst: tuple[float, float], replicates: Replicates) -> str:
    if len(curve.points) < 2:
        return ""
    found = dominated_area(curve, worst, replicates)
    return f" Dominated area {with_interval(found.value, found.low, found.high)}."


def about_area(worst: tuple[float, float]) -> str:
    """What a dominated area is, with its corner."""
    return (
        f"Dominated area: nats of entropy times nats of log gen-PPL, up to the corner at {worst[0]:g} nats and gen-PPL "
        f"{worst[1]:g}; larger is better, comparable only for one corner."
    )


def _wrapped(name: str) -> str:
    """A label on two lines: the generator, then its settings."""
    head, comma, rest = name.partition(", ")
    return head + ("\n" + rest if comma else "")


def _numbered(drawings: list[Drawing]) -> list[Drawing]:
    """Names of their own for drawings that share one (several lengths or prefixes)."""
    names = [drawing.name for drawing in drawings]
    wanted = [f"{name}-{names[: i + 1].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)]
    return [replace(drawing, name=name) for drawing, name in zip(drawings, file_names(wanted), strict=True)]


def file_names(names: Iterable[str]) -> list[str]:
    """A file name for each of these, no two alike: cleaned where that is needed, and numbered where it is taken."""
    found: list[str] = []
    for name in names:
        tries = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        found.append(next(own for one in tries if (own := slug(one)) not in found))
    return found


# -------------------------------------------------------------------------------------------- steps and cost


def _steps(summary: pd.DataFrame, scorer: str | None, metric: str | None, replicates: Replicates) -> list[Drawing]:
    found = []
    for frontier in frontiers(summary, scorer, metric):
        lines = by_steps(frontier)
        if any(len(points) > 1 for points in lines.values()):
            found.append(_one_steps(summary, frontier, lines, replicates))
    if not found:
        raise NothingToDraw(
            "this figure needs several step counts: run with --steps 4,8,16,64 --metrics gen-ppl,entropy"
        )
    return _numbered(found)


def by_steps(frontier: Frontier) -> dict[str, list[Point]]:
    """Points at temperature 1 without nucleus, by generator, in order of steps."""
    lines: dict[tuple[Any, ...], list[Point]] = {}
    seen = set()
    for curve in frontier.curves:
        for point in curve.points:
            first = point.cell.first
            if first["temperature"] in (None, 1.0) and not finite(first["top_p"]) and point.cell.id not in seen:
                seen.add(point.cell.id)
                lines.setdefault(tuple(first[name] for name in SAME_LINE), []).append(point)
    firsts = [points[0].cell.first for points in lines.values()]
    names = told_apart([generator(first) for first in firsts], firsts)
    ordered = (sorted(points, key=lambda p: p.cell.first["steps"] or 0) for points in lines.values())
    return dict(zip(names, ordered, strict=True))


def _one_steps(
    summary: pd.DataFrame, frontier: Frontier, lines: Mapping[str, Sequence[Point]], replicates: Replicates
) -> Drawing:
    figure, (top, bottom) = new_figure(
        COLUMN_IN, _height(1.8 * len(lines), 3.4), rows=2, sharex=True, height_ratios=[3, 2]
    )
    look = looks(lines)
    labels: list[Label] = []
    for name, points in lines.items():
        style = look[name]
        if not finite(points[0].cell.first["steps"]):  # no step count: a level
            for axes, row in ((top, points[0].perplexity), (bottom, points[0].entropy)):
                axes.axhline(row["value"], color=style["color"], linewidth=0.9, linestyle=(0, (4, 2)))
            continue
        x = [int(p.cell.first["steps"]) for p in points]
        for axes, rows in ((top, [p.perplexity for p in points]), (bottom, [p.entropy for p in points])):
            axes.plot(x, [row["value"] for row in rows], **style)
            seed_marks(axes, x, _networks(rows, replicates))
            error_bars(axes, x, rows, style["color"])
        labels.append(Label(x[-1], points[-1].perplexity["value"], name, style["color"]))
    _levels(top, bottom, frontier, lines, look, labels)
    top.set_ylabel(_ppl_label(frontier.metric, frontier.scorer))
    bottom.set_ylabel("entropy (nats)")
    bottom.set_xlabel("sampling steps")
    log_axis(top, "y")
    step_axis(
        bottom, [int(p.cell.first["steps"]) for ps in lines.values() for p in ps if finite(p.cell.first["steps"])]
    )
    _mark_partial(top, summary)
    finish(figure, {top: labels})
    rows = frontier.rows()
    used = {p.cell.id for points in lines.values() for p in points}
    rows = [row for row in rows if row["cell"] in used or row["kind"] == "reference"]
    return Drawing(
        f"steps-{frontier.scorer}",
        f"{frontier.title}: gen-PPL ({frontier.scorer}) and entropy against steps",
        figure,
        _single(rows, replicates),
        [*_caption(rows, replicates), *_undone(summary)],
    )


def _levels(
    top: Axes,
    bottom: Axes,
    frontier: Frontier,
    lines: Mapping[str, Sequence[Point]],
    look: Mapping[str, Mapping[str, Any]],
    labels: list[Label],
) -> None:
    """Horizontal lines for real text and for generators without steps, labelled at the right edge."""
    right = max(
        (int(p.cell.first["steps"]) for points in lines.values() for p in points if finite(p.cell.first["steps"])),
        default=1,
    )
    if frontier.real is not None:
        for axes, row in ((top, frontier.real.perplexity), (bottom, frontier.real.entropy)):
            axes.axhline(row["value"], color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
        labels.append(Label(right, frontier.real.perplexity["value"], "real text"))
    for name, points in lines.items():
        if not finite(points[0].cell.first["steps"]):
            labels.append(Label(right, points[0].perplexity["value"], name, look[name]["color"]))


def _cost(summary: pd.DataFrame, scorer: str | None, metric: str | None, replicates: Replicates) -> list[Drawing]:
    found = []
    for frontier in frontiers(summary, scorer, metric):
        spent = {cost: expenses(frontier, cost) for cost in ("calls", "seconds")}
        spent = {cost: lines for cost, lines in spent.items() if lines}
        if not spent:
            continue
        figure, panel = new_figure(
            COLUMN_IN, _height(max(map(len, spent.values())), 2.3) * len(spent), rows=len(spent), squeeze=False
        )
        grid = panel[:, 0]
        names = [line.name for lines in spent.values() for line in lines]
        look = looks(names)
        rows: list[Row] = []
        panels: dict[Axes, list[Label]] = {}
        for axes, (cost, lines) in zip(grid, spent.items(), strict=True):
            panels[axes] = labels = []
            for line in lines:
                style = look[line.name]
                axes.plot(line.costs, [p.perplexity["value"] for p in line.points], **style)
                seed_marks(axes, line.costs, _networks((p.perplexity for p in line.points), replicates))
                error_bars(axes, line.costs, [p.perplexity for p in line.points], style["color"])
                labels.append(Label(line.costs[-1], line.points[-1].perplexity["value"], line.name, style["color"]))
                rows += [row for p in line.points for row in (p.perplexity, p.entropy)]
            if frontier.real is not None and lines:
                axes.axhline(frontier.real.perplexity["value"], color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
                right = max(line.costs[-1] for line in lines)
                labels.append(Label(right, frontier.real.perplexity["value"], "real text"))
            axes.set_xlabel("network calls per batch" if cost == "calls" else "seconds per sequence")
            axes.set_ylabel(_ppl_label(frontier.metric, frontier.scorer))
            log_axis(axes, "x")
            log_axis(axes, "y")
        unique = list({(row["cell"], row["metric"], row["scorer"]): row for row in rows}.values())
        devices = sorted({row["device"] for row in unique if row["device"]})
        notes = [f"Seconds measured on: {', '.join(devices)}."] if devices else []
        _mark_partial(grid[0], summary)
        finish(figure, panels)
        found.append(
            Drawing(
                f"cost-{frontier.scorer}",
                f"{frontier.title}: gen-PPL ({frontier.scorer}) against calls and seconds",
                figure,
                _single(unique, replicates),
                [*notes, *_caption(unique, replicates), *_undone(summary)],
            )
        )
    if not found:
        raise NothingToDraw("this figure needs generators with measured cost: run with --metrics gen-ppl,entropy,cost")
    return _numbered(found)


# ------------------------------------------------------------------------------------------------------ mauve


def _mauve(summary: pd.DataFrame, scorer: str | None, metric: str | None, replicates: Replicates) -> list[Drawing]:
    groups: dict[tuple[Any, ...], list[tuple[CellRows, Row]]] = {}
    for cell in cells_of(summary[summary["state"] == "done"]):
        name = pick({m for m, _ in cell.rows}, "mauve")
        for judge in cell.judges(name):
            row = cell.of(name, judge)
            if row is not None and (scorer is None or judge == scorer):
                key = (row["task"], row["data_hash"], row["length"], row["prefix"], judge)
                groups.setdefault(key, []).append((cell, row))
    found = []
    for (task, _, length, prefix, judge), members in groups.items():
        bars = [(cell, row) for cell, row in members if cell.first["kind"] == "method" or not cell.is_real]
        if not bars:
            continue
        bars.sort(key=lambda pair: pair[1]["value"])
        figure, axes = new_figure(COLUMN_IN, 0.75 + 0.17 * len(bars))
        look = looks(cell.first["label"] or cell.first["method"] for cell, _ in bars)
        for y, (cell, row) in enumerate(bars):
            style = look[cell.first["label"] or cell.first["method"]]
            reference = cell.first["kind"] == "reference"
            color = FAINT if reference else style["color"]
            axes.plot(row["value"], y, marker="x" if reference else style["marker"], color=color, linestyle="none")
            seed_marks(axes, [y], _networks([row], replicates), along="x")
            error_bars(axes, [y], [row], color, along="x")
        axes.set_yticks(range(len(bars)), [_settings(cell) for cell, _ in bars])
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"MAUVE ({judge} features)")
        axes.set_xlim(-0.02, 1.02)
        rows = [row for _, row in members]
        for cell, row in members:
            if cell.is_real:
                if finite(row["low"]) and finite(row["high"]):
                    axes.axvspan(row["low"], row["high"], color=INK, alpha=0.12, linewidth=0)
                axes.axvline(row["value"], color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
                axes.annotate(
                    "real against real",
                    (row["value"], len(bars) - 0.5),
                    xytext=(-3, 0),
                    textcoords="offset points",
                    ha="right",
                    va="top",
                    fontsize=6,
                )
        axes.set_ylim(-0.6, len(bars) - 0.4)
        _mark_partial(axes, summary)
        finish(figure, {})
        title = f"{task}, {length} tokens" + (f", prefix {prefix}" if prefix else "")
        notes = [text for text in _caption(rows, replicates) if not text.startswith("n = ")]
        single = _single(rows, replicates)
        counts = sorted({int(row["n"]) for row in single if row["n"] is not None})
        notes.append(
            f"n = {', '.join(map(str, counts))} sequences on each side; bars: lowest and highest k-means seed."
        )
        found.append(Drawing(f"mauve-{judge}", f"{title}: MAUVE", figure, single, [*notes, *_undone(summary)]))
    if not found:
        raise NothingToDraw("no MAUVE here: run with --metrics mauve, a scorer with features and --samples 128 or more")
    return _numbered(found)


def _settings(cell: CellRows) -> str:
    first = cell.first
    parts = [" ".join([first["label"] or first["method"], first["source"] or ""]).strip()]
    parts += [f"{int(first['steps'])} steps"] if finite(first["steps"]) else []
    parts += [f"temp. {first['temperature']:g}"] if finite(first["temperature"]) and first["temperature"] != 1 else []
    parts += [f"top-p {first['top_p']:g}"] if finite(first["top_p"]) else []
    return ", ".join(parts)


# ------------------------------------------------------------------------------------------------- trajectory


def _trajectory(summary: pd.DataFrame, scorer: str | None, metric: str | None, replicates: Replicates) -> list[Drawing]:
    path = replicates.root / TRAJECTORIES if replicates.root is not None else None
    if path is None or not path.exists():
        raise NothingToDraw(
            f"this figure needs recorded trajectories, {TRAJECTORIES} in the run folder; there are none"
        )
    frame = read_trajectories(path)
    found = []
    for source, part in frame.groupby("source", sort=False):
        panels = [("nll_nats", "NLL of completion\n(nats per token)"), ("flips", "share of positions\nchanged")]
        figure, grid = new_figure(COLUMN_IN, 3.4, rows=2, sharex=True)
        arms = list(dict.fromkeys(part["arm"]))
        look = looks(arms)
        rows: list[Row] = []
        labels: dict[Axes, list[Label]] = {}
        for axes, (name, title) in zip(grid, panels, strict=True):
            labels[axes] = []
            for arm in arms:
                points = _by_time(part[part["arm"] == arm], str(source), arm, name)
                if not points:
                    continue
                x, y = [p["t"] for p in points], [p["value"] for p in points]
                color = look[arm]["color"]
                axes.plot(x, y, **{**look[arm], "marker": "none"})
                axes.fill_between(
                    x, [p["low"] for p in points], [p["high"] for p in points], color=color, alpha=0.18, lw=0
                )
                labels[axes].append(Label(x[-1], y[-1], arm, color))
                rows += points
            axes.set_ylabel(title)
        grid[-1].set_xlabel("time (0 = noise, 1 = data)")
        finish(figure, labels)
        count = part["sequence"].nunique()
        notes = [f"Mean over {count} sequences per arm; bands are 95 % intervals over sequences."]
        found.append(Drawing(f"trajectory-{source}", f"Trajectories from {source}", figure, rows, notes))
    return _numbered(found)


def _by_time(frame: pd.DataFrame, source: str, arm: str, name: str) -> list[dict[str, Any]]:
    """Mean and interval of a column at each step."""
    points = []
    for step, members in frame.groupby("step"):
        values = members[name].to_numpy(dtype=float)
        values = values[values == values]
        if not len(values):
            continue
        found = intervals([terms("mean", [values])])[0]
        ends = (found.low, found.high) if found.low == found.low else (found.value, found.value)
        points.append(
            {"cell": f"{source}/{arm}/{step}", "metric": name, "scorer": "", "t": float(members["t"].mean())}
            | {"value": found.value, "low": ends[0], "high": ends[1], "n": len(values)}
        )
    return points


KINDS: dict[str, Callable[[Any, str | None, str | None, Replicates], list[Drawing]]] = {
    "frontier": _frontier,
    "steps": _steps,
    "cost": _cost,
    "mauve": _mauve,
    "trajectory": _trajectory,
}
