"""Plots of a report as inline SVG: gen-PPL against entropy, steps and network calls.

Drawn here, so that they are there without JavaScript; the page's script only points, hides and steps through what is
drawn. Every point carries its row (`data-row`) and its numbers in words. Colours are classes, so that the page's style
sheet can give them another shade on dark ground; marker and dash repeat what colour says. Values that are not finite
or not positive are not drawn; the caption counts them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from tsdfm_bench.results.axes import thinned
from tsdfm_bench.results.frontier import (
    Frontier,
    OutOfRange,
    Point,
    at_entropy,
    corner,
    dominated_area,
    expenses,
    frontiers,
)
from tsdfm_bench.results.numbers import plain, with_interval
from tsdfm_bench.results.plots import MOST_CURVES, about_area, by_steps
from tsdfm_bench.results.replicates import Replicates
from tsdfm_bench.results.report.text import visible
from tsdfm_bench.results.rows import finite
from tsdfm_bench.results.style import DASHES, MARKERS, PALETTE, looks, spread

if TYPE_CHECKING:
    import pandas as pd

WIDTH, HEIGHT = 820, 430
LEFT, RIGHT, TOP, BOTTOM = 66, 208, 18, 50
LABEL_PX = 15.0
MOST_LETTERS = 30
_DASH = ("", "7 3", "2 3", "8 3 2 3")


@dataclass(frozen=True)
class Mark:
    """A point: place, ends of its intervals (or None), row and words."""

    x: float
    y: float
    row: str
    words: str
    x_ends: tuple[float, float] | None = None
    y_ends: tuple[float, float] | None = None


@dataclass(frozen=True)
class Line:
    """Points that belong together; `level` = one point drawn as a horizontal line."""

    name: str
    marks: list[Mark]
    colour: int = 0
    dash: int = 0
    marker: str = "o"
    hollow: bool = False
    level: bool = False
    kind: str = "method"


@dataclass(frozen=True)
class Chart:
    """A finished plot.

    Args:
        kind: "frontier", "steps" or "cost".
        title: one line.
        svg: the drawing.
        lines: (name, colour class) of its lines, in order.
        notes: sentences below it.
        readings: (generator, gen-PPL at the entropy of real text or why not, dominated area).
    """

    kind: str
    title: str
    svg: Markup
    lines: list[tuple[str, int]]
    notes: list[str] = field(default_factory=list)
    readings: list[tuple[str, str, str]] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------- axes


class Axis:
    """Data to pixels, with round ticks.

    Args:
        values: all that must fit, at least one.
        low, high: pixels of the ends.
        log: base 10 or 2 of a log axis; 0 = linear.
        ticks: exactly these, or None.
    """

    def __init__(
        self, values: Iterable[float], low: float, high: float, log: int = 0, ticks: Sequence[float] | None = None
    ) -> None:
        self.low, self.high, self.log = low, high, log
        numbers = [self._in(value) for value in values]
        first, last = min(numbers), max(numbers)
        room = 0.06 * (last - first) or (0.15 if log else 0.05 * abs(first) or 1.0)
        self.first, self.last = first - room, last + room
        self.ticks = [t for t in ticks or self._round() if self.first <= self._in(t) <= self.last]

    def _in(self, value: float) -> float:
        return math.log(value, self.log) if self.log else value

    def __call__(self, value: float) -> float:
        share = (self._in(value) - self.first) / (self.last - self.first)
        return self.low + share * (self.high - self.low)

    def _round(self) -> list[float]:
        if not self.log:
            span = self.last - self.first
            size = 10.0 ** math.floor(math.log10(span / 4))
            size *= next(k for k in (1, 2, 5, 10) if span / (k * size) <= 7)
            start = math.ceil(self.first / size)
            return [round(k * size, 12) for k in range(start, math.floor(self.last / size) + 1)]
        decades = range(math.floor(self.first), math.ceil(self.last) + 1)
        for parts in ((1,), (1, 3), (1, 2, 5), tuple(range(1, 10))):
            found = [k * 10.0**d for d in decades for k in parts]
            if sum(self.first <= self._in(t) <= self.last for t in found) >= 4:
                return found
        size = 10.0 ** math.floor(math.log10(10**self.last - 10**self.first))
        count = (10**self.last - 10**self.first) / size
        size *= 0.2 if count < 2 else 0.5 if count < 4 else 1.0
        return [k * size for k in range(1, math.floor(10**self.last / size) + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def _usable(point: Point) -> bool:
    return finite(point.entropy["value"]) and finite(point.perplexity["value"]) and point.perplexity["value"] > 0


def _ends(row: Mapping[str, object], positive: bool = False) -> tuple[float, float] | None:
    low, high = row["low"], row["high"]
    if not (finite(low) and finite(high)) or (positive and low <= 0):  # type: ignore[operator]
        return None
    return float(low), float(high)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- drawing


def _shape(marker: str, x: float, y: float, hollow: bool) -> str:
    style = ' class="hollow"' if hollow else ""
    r = 4.6
    if marker == "o":
        return f'<circle{style} cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>'
    polygons: dict[str, list[tuple[float, float]]] = {
        "s": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "^": [(0, -1.2), (1.15, 0.9), (-1.15, 0.9)],
        "v": [(0, 1.2), (1.15, -0.9), (-1.15, -0.9)],
        "D": [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
        "h": [(0.6, -1.1), (1.2, 0), (0.6, 1.1), (-0.6, 1.1), (-1.2, 0), (-0.6, -1.1)],
        "p": [(0, -1.2), (1.15, -0.3), (0.7, 1.05), (-0.7, 1.05), (-1.15, -0.3)],
    }
    if marker == "x":
        d = 4.2
        return (
            f'<path class="cross" d="M{x - d:.1f} {y - d:.1f}L{x + d:.1f} {y + d:.1f}'
            f'M{x - d:.1f} {y + d:.1f}L{x + d:.1f} {y - d:.1f}"/>'
        )
    if marker == "*":
        places = [
            (x + 7.5 * s * math.sin(k * math.pi / 5), y - 7.5 * s * math.cos(k * math.pi / 5))
            for k, s in enumerate((1.0, 0.42) * 5)
        ]
    else:
        places = [(x + 0.92 * r * dx, y + 0.92 * r * dy) for dx, dy in polygons.get(marker, polygons["s"])]
    return f'<polygon{style} points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in places)}"/>'


def draw(lines: Sequence[Line], x_title: str, y_title: str, about: str, x_log: int, x_ticks: Sequence[float]) -> Markup:
    """The SVG of some lines with at least one mark, perplexity on the log axis upwards.

    Args:
        lines: to be drawn, the first on top.
        x_title, y_title: of the axes, with units.
        about: accessible name.
        x_log: base of the horizontal axis, 0 = linear.
        x_ticks: of the horizontal axis; empty = round ones.
    """
    height = max(HEIGHT, round(TOP + BOTTOM + LABEL_PX * (len(lines) + 1)))
    marks = list(chain.from_iterable(line.marks for line in lines))
    placed = list(chain.from_iterable(line.marks for line in lines if not line.level)) or marks
    x = Axis([v for m in placed for v in (m.x, *(m.x_ends or ()))], LEFT, WIDTH - RIGHT, x_log, list(x_ticks) or None)
    y = Axis([v for m in marks for v in (m.y, *(m.y_ends or ()))], height - BOTTOM, TOP, 10)
    right, base = WIDTH - RIGHT, height - BOTTOM
    out = [
        f'<svg viewBox="0 0 {WIDTH} {height}" role="group" aria-label="{escape(visible(about))}" '
        f'class="chart" preserveAspectRatio="xMidYMid meet">',
        '<g class="grid" aria-hidden="true">',
    ]
    for tick in x.ticks:
        out.append(f'<path d="M{x(tick):.1f} {TOP}V{base}"/>')
        out.append(f'<text x="{x(tick):.1f}" y="{base + 17}" text-anchor="middle">{_number(tick)}</text>')
    for tick in y.ticks:
        out.append(f'<path d="M{LEFT} {y(tick):.1f}H{right}"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    out.append(f'<path class="axis" d="M{LEFT} {TOP}V{base}H{right}"/>')
    out.append(
        f'<text class="title" x="{(LEFT + right) / 2}" y="{height - 10}" text-anchor="middle">{escape(x_title)}</text>'
    )
    out.append(
        f'<text class="title" transform="translate(15 {(TOP + base) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(visible(y_title))}</text></g>"
    )
    out += _labels(lines, x, y, right, TOP, base)
    for k in range(len(lines) - 1, -1, -1):
        out += _line(lines[k], k, x, y, right)
    out.append("</svg>")
    return Markup("".join(out))


def _line(line: Line, k: int, x: Axis, y: Axis, right: float) -> list[str]:
    out = [f'<g class="line c{line.colour} {line.kind}" data-line="{k}">']
    dash = f' stroke-dasharray="{_DASH[line.dash]}"' if line.dash else ""
    if line.level:
        mark = line.marks[0]
        out.append(f'<path class="level" stroke-dasharray="5 4" d="M{LEFT} {y(mark.y):.1f}H{right}"/>')
    elif len(line.marks) > 1:
        places = "L".join(f"{x(m.x):.1f} {y(m.y):.1f}" for m in line.marks)
        out.append(f'<path class="curve"{dash} d="M{places}"/>')
    for mark in line.marks:
        place = (right, y(mark.y)) if line.level else (x(mark.x), y(mark.y))
        words = escape(visible(mark.words))
        out.append(f'<g class="point" role="img" data-row="{escape(mark.row)}" aria-label="{words}">')
        out.append(f"<title>{words}</title>")
        if mark.y_ends and not line.level:
            out.append(f'<path class="bar" d="M{place[0]:.1f} {y(mark.y_ends[0]):.1f}V{y(mark.y_ends[1]):.1f}"/>')
        if mark.x_ends and not line.level:
            out.append(f'<path class="bar" d="M{x(mark.x_ends[0]):.1f} {place[1]:.1f}H{x(mark.x_ends[1]):.1f}"/>')
        out.append(_shape("o" if line.level else line.marker, *place, line.hollow))
        out.append("</g>")
    out.append("</g>")
    return out


def _labels(lines: Sequence[Line], x: Axis, y: Axis, right: float, top: float, base: float) -> list[str]:
    """Names in the right margin, level with the ends of their lines as far as they do not overlap."""
    ends = [(right if line.level else x(line.marks[-1].x), y(line.marks[-1].y)) for line in lines]
    order = sorted(range(len(lines)), key=lambda k: ends[k][1])
    centres = spread([ends[k][1] for k in order], [LABEL_PX] * len(order), top - 4, base + 16)
    out = []
    for k, centre in zip(order, centres, strict=True):
        line, (end_x, end_y) = lines[k], ends[k]
        name = visible(line.name)
        name = name if len(name) <= MOST_LETTERS else name[: MOST_LETTERS - 1] + "…"
        out.append(
            f'<g class="label c{line.colour} {line.kind}" data-line="{k}" aria-hidden="true">'
            f'<path class="guide" d="M{end_x + 7:.1f} {end_y:.1f}L{right + 12} {centre:.1f}"/>'
            f'<text x="{right + 16}" y="{centre + 4:.1f}">{escape(name)}</text></g>'
        )
    return out


# ------------------------------------------------------------------------------------------------------ plots


def charts(summary: pd.DataFrame, replicates: Replicates, rows: Mapping[str, str]) -> list[Chart]:
    """Every plot that the rows allow: per scorer a frontier, steps and cost.

    Args:
        summary: see `tsdfm_bench.results.schema`.
        replicates: of the summary.
        rows: cell id -> id of its row on the page.
    """
    made = []
    for frontier in frontiers(summary):
        notes = _not_drawn(summary, frontier)
        for make in (_frontier, _steps, _cost):
            chart = make(frontier, replicates, rows)
            if chart is not None:
                made.append(replace(chart, notes=[*chart.notes, *notes]))
    return made


def _not_drawn(summary: pd.DataFrame, frontier: Frontier) -> list[str]:
    """A sentence about values that no log axis can show."""
    rows = summary[(summary["metric"] == frontier.metric) & (summary["scorer"] == frontier.scorer)]
    count = sum(1 for value in rows["value"] if not (finite(value) and value > 0))
    return [f"{count} rows are not drawn: their perplexity is not finite or not positive."] if count else []


def _words(name: str, point: Point, frontier: Frontier) -> str:
    ppl, entropy, first = point.perplexity, point.entropy, point.cell.first
    temperature = f", temperature {first['temperature']:g}" if finite(first["temperature"]) else ""
    nucleus = f", top-p {first['top_p']:g}" if finite(first["top_p"]) else ""
    steps = f", {int(first['steps']):,} steps" if finite(first["steps"]) and "steps" not in name else ""
    return (
        f"{name}{steps}{temperature}{nucleus}: gen-PPL {with_interval(ppl['value'], ppl['low'], ppl['high'])} "
        f"({frontier.scorer or 'no scorer'}), entropy "
        f"{with_interval(entropy['value'], entropy['low'], entropy['high'])} nats, n = {ppl['n']}"
    )


def _style(names: Sequence[str]) -> dict[str, tuple[int, int, str, bool]]:
    return {
        name: (
            PALETTE.index(look["color"]),
            DASHES.index(look["linestyle"]),
            look["marker"] if look["marker"] in MARKERS else "o",
            look["markerfacecolor"] == "white",
        )
        for name, look in looks(names).items()
    }


def _references(frontier: Frontier, rows: Mapping[str, str]) -> list[Line]:
    """Real text as a star and canaries as crosses, in the plane of entropy and perplexity."""
    lines = []
    if frontier.real is not None and _usable(frontier.real):
        lines.append(Line("real text", [_plane("real text", frontier.real, frontier, rows)], marker="*", kind="real"))
    for point in frontier.canaries:
        if _usable(point):
            name = str(point.cell.first["label"] or point.cell.first["method"])
            lines.append(Line(name, [_plane(name, point, frontier, rows)], marker="x", kind="canary"))
    return lines


def _plane(name: str, point: Point, frontier: Frontier, rows: Mapping[str, str]) -> Mark:
    return Mark(
        point.entropy["value"],
        point.perplexity["value"],
        rows.get(point.cell.id, ""),
        _words(name, point, frontier),
        _ends(point.entropy),
        _ends(point.perplexity, positive=True),
    )


def _frontier(frontier: Frontier, replicates: Replicates, rows: Mapping[str, str]) -> Chart | None:
    lines, notes, readings = [], [], []
    worst = corner(frontier)
    curves = {curve.name: list(curve.points) for curve in frontier.curves}
    if len(curves) > MOST_CURVES and all(len(points) == 1 for points in curves.values()):
        curves = by_steps(frontier)  # one temperature, many step counts: a line through them instead of a name for each
        notes.append("Lines join the step counts of one generator.")
    style = _style(list(curves))
    for name, members in curves.items():
        points = [point for point in members if _usable(point)]
        colour, dash, marker, hollow = style[name]
        if points:
            marks = [_plane(name, point, frontier, rows) for point in points]
            lines.append(Line(name, marks, colour, dash, marker, hollow))
    for curve in frontier.curves:
        if len(curve.points) > 1 and frontier.real is not None:
            try:
                read = at_entropy(curve, frontier.real, replicates)
                told = with_interval(read.value, read.low, read.high)
            except OutOfRange as error:
                told = f"not read: {str(error).removeprefix(curve.name).lstrip(': ')}"
            size = dominated_area(curve, worst, replicates)
            readings.append((curve.name, told, with_interval(size.value, size.low, size.high)))
    lines += _references(frontier, rows)
    if not lines:
        return None
    if readings:
        notes.append(about_area(worst))
    else:
        notes.append("One temperature each: --temperatures 0.7,0.85,1 would make curves, to be read at equal entropy.")
    return _chart("frontier", frontier, lines, notes, "entropy (nats)", "gen-PPL against entropy", readings=readings)


def _steps(frontier: Frontier, replicates: Replicates, rows: Mapping[str, str]) -> Chart | None:
    found = {name: [p for p in points if _usable(p)] for name, points in by_steps(frontier).items()}
    found = {name: points for name, points in found.items() if points}
    counts = sorted({int(p.cell.first["steps"]) for ps in found.values() for p in ps if finite(p.cell.first["steps"])})
    if len(counts) < 2:
        return None
    style = _style(list(found))
    lines = []
    for name, points in found.items():
        colour, dash, marker, hollow = style[name]
        level = not finite(points[0].cell.first["steps"])
        marks = [
            Mark(
                counts[-1] if level else float(p.cell.first["steps"]),
                p.perplexity["value"],
                rows.get(p.cell.id, ""),
                _words(name, p, frontier),
                None,
                _ends(p.perplexity, positive=True),
            )
            for p in points
        ]
        lines.append(Line(name, marks[:1] if level else marks, colour, dash, marker, hollow, level))
    lines += _real_level(frontier, rows, float(counts[-1]))
    ticks = [float(count) for count in thinned(counts, 9)]
    return _chart("steps", frontier, lines, [], "sampling steps", "gen-PPL against steps", 2, ticks)


def _real_level(frontier: Frontier, rows: Mapping[str, str], at: float) -> list[Line]:
    real = frontier.real
    if real is None or not _usable(real):
        return []
    mark = Mark(at, real.perplexity["value"], rows.get(real.cell.id, ""), _words("real text", real, frontier))
    return [Line("real text", [mark], level=True, kind="real")]


def _cost(frontier: Frontier, replicates: Replicates, rows: Mapping[str, str]) -> Chart | None:
    spent = expenses(frontier, "calls")
    style = _style([line.name for line in spent])
    lines = []
    for line in spent:
        colour, dash, marker, hollow = style[line.name]
        marks = [
            Mark(
                cost,
                p.perplexity["value"],
                rows.get(p.cell.id, ""),
                f"{_words(line.name, p, frontier)}, {plain(cost)} network calls per batch",
                None,
                _ends(p.perplexity, positive=True),
            )
            for cost, p in zip(line.costs, line.points, strict=True)
            if _usable(p)
        ]
        if marks:
            lines.append(Line(line.name, marks, colour, dash, marker, hollow))
    if not lines:
        return None
    lines += _real_level(frontier, rows, max(m.x for line in lines for m in line.marks))
    return _chart("cost", frontier, lines, [], "network calls per batch", "gen-PPL against network calls", 10)


def _chart(
    kind: str,
    frontier: Frontier,
    lines: list[Line],
    notes: list[str],
    x_title: str,
    what: str,
    x_log: int = 0,
    x_ticks: Sequence[float] = (),
    readings: Sequence[tuple[str, str, str]] = (),
) -> Chart:
    convention = frontier.metric.partition("/")[2]
    y_title = f"gen-PPL, {frontier.scorer or 'no scorer'}" + (
        f", as {convention}" if convention not in ("", "pooled") else ""
    )
    title = f"{frontier.title}: {what} ({frontier.scorer or 'no scorer'})"
    drawn = {mark.row for line in lines for mark in line.marks}
    points = [p for curve in frontier.curves for p in curve.points]
    counts = sorted({int(p.perplexity["n"]) for p in points if p.perplexity["n"] is not None})
    told = [f"{len(drawn)} rows drawn; bars are 95 % intervals over sequences"]
    told[0] += f"; n = {', '.join(map(str, counts))}." if counts else "."
    about = f"{title}. {len(lines)} series. The same numbers are in the table."
    svg = draw(lines, x_title, y_title, about, x_log, x_ticks)
    names = [(line.name, line.colour if line.kind == "method" else -1) for line in lines]
    return Chart(kind, title, svg, names, [*told, *notes], list(readings))
