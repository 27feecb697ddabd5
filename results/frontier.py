"""Frontiers: generative perplexity against entropy, instead of one perplexity at one temperature.

Lowering the temperature lowers perplexity and entropy together, so a single perplexity says little (arXiv 2604.02718).
A generator's curve over temperatures (or nucleus masses) says which perplexity it has at a given entropy, and one
number is read off it: gen-PPL at the entropy of real text.

Reading off. log perplexity is taken to be non-decreasing in entropy: the measured points are ordered by entropy, made
monotone by isotonic regression and joined by a monotone cubic (PCHIP). An entropy outside the measured points is
refused, with the range; nothing is extrapolated. The interval comes from replicates (see `replicates`): each redraws
every point of the curve and the reference text, and repeats the whole reading; where a replicate's own range falls
short of the entropy asked for, by sampling noise, its end point is held.

Dominated area: the area in the plane (entropy in nats, log perplexity in nats) of all points that are no better than
some point of the curve, up to a stated corner. Larger is better; it depends on the corner and is comparable only where
that is equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from tsdfm_bench.results.replicates import Replicates, interval
from tsdfm_bench.results.rows import CellRows, Row, cells_of, finite, pick
from tsdfm_bench.results.stats import Interval

if TYPE_CHECKING:
    import pandas as pd

SAME_GENERATOR = (
    "task",
    "data_hash",
    "length",
    "prefix",
    "method",
    "label",
    "weights",
    "source",
    "steps",
    "draw",
    "seed",
)
SAME_LINE = tuple(name for name in SAME_GENERATOR if name != "steps")


class OutOfRange(ValueError):
    """A value was asked for where nothing was measured.

    Args:
        message: says what was asked and what is measured.
        low, high: the measured range.
    """

    def __init__(self, message: str, low: float, high: float) -> None:
        super().__init__(message)
        self.low, self.high = low, high


@dataclass(frozen=True)
class Point:
    """One cell on a curve.

    Args:
        cell: its rows.
        entropy, perplexity: the two rows of the summary.
    """

    cell: CellRows
    entropy: Row
    perplexity: Row

    @property
    def temperature(self) -> float | None:
        """Temperature of the cell."""
        return self.cell.first["temperature"]

    @property
    def top_p(self) -> float | None:
        """Nucleus mass of the cell; None = no nucleus."""
        return self.cell.first["top_p"]


@dataclass(frozen=True)
class Curve:
    """One generator's points, by increasing entropy.

    Args:
        name: as shown: label, source, steps, and the nucleus if it is fixed.
        sweep: what varies: "temperature" or "nucleus".
        points: at least one.
        scorer, metric: of the perplexity.
        entropy_metric: of the entropy.
    """

    name: str
    sweep: str
    points: tuple[Point, ...]
    scorer: str
    metric: str
    entropy_metric: str

    @property
    def first(self) -> Row:
        """Fields that all points share (method, label, source, steps, ...)."""
        return self.points[0].cell.first

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest entropy measured, in nats."""
        return self.points[0].entropy["value"], self.points[-1].entropy["value"]

    def monotone(self) -> bool:
        """Whether perplexity rises with entropy along the measured points, as the reading assumes."""
        values = [point.perplexity["value"] for point in self.points]
        return all(a <= b for a, b in pairwise(values))

    def rows(self) -> list[Row]:
        """Every row of the summary behind the curve."""
        return [row for point in self.points for row in (point.entropy, point.perplexity)]


@dataclass(frozen=True)
class Frontier:
    """All curves that may be drawn in one plane, with real text.

    Args:
        title: task, length and prefix.
        scorer, metric: of the perplexity.
        curves: in the order of the summary.
        real: held-out text, or None.
        canaries: zero-parameter rows.
    """

    title: str
    scorer: str
    metric: str
    curves: tuple[Curve, ...]
    real: Point | None
    canaries: tuple[Point, ...] = field(default=())

    def rows(self) -> list[Row]:
        """Every row of the summary that takes part."""
        others = [point for point in (self.real, *self.canaries) if point is not None]
        return [row for c in self.curves for row in c.rows()] + [r for p in others for r in (p.entropy, p.perplexity)]


# ---------------------------------------------------------------------------------------------------- reading


def frontiers(summary: pd.DataFrame, scorer: str | None = None, metric: str | None = None) -> list[Frontier]:
    """The frontiers of a summary, one per text setting and scorer.

    Args:
        summary: see `tsdfm_bench.results.schema`.
        scorer: only this one; None = all.
        metric: the perplexity, for example "gen_ppl/sedd"; None = the pooled one.

    Returns:
        frontiers with at least one curve; an empty list if no row has both perplexity and entropy.
    """
    groups: dict[tuple[Any, ...], list[CellRows]] = {}
    for cell in cells_of(summary[summary["state"] == "done"]):
        key = tuple(cell.first[name] for name in ("task", "tokenizer", "data_hash", "length", "prefix"))
        groups.setdefault(key, []).append(cell)
    found = []
    for cells in groups.values():
        names = {name for cell in cells for name, _ in cell.rows}
        ppl, entropy = metric or pick(names, "perplexity"), pick(names, "entropy")
        if ppl is None or entropy is None:
            continue
        judges = dict.fromkeys(judge for cell in cells for judge in cell.judges(ppl))
        for judge in judges:
            if scorer is not None and judge != scorer:
                continue
            frontier = _frontier(cells, judge, ppl, entropy)
            if frontier.curves:
                found.append(frontier)
    return found


def _point(cell: CellRows, judge: str, ppl: str, entropy: str) -> Point | None:
    x, y = cell.of(entropy), cell.of(ppl, judge)
    return Point(cell, x, y) if x is not None and y is not None and y["value"] > 0 else None


def _frontier(cells: Sequence[CellRows], judge: str, ppl: str, entropy: str) -> Frontier:
    points = [point for cell in cells if (point := _point(cell, judge, ppl, entropy)) is not None]
    generators: dict[tuple[Any, ...], list[Point]] = {}
    for point in points:
        if point.cell.first["kind"] == "method":
            key = tuple(point.cell.first[name] for name in SAME_GENERATOR)
            generators.setdefault(key, []).append(point)
    curves: list[Curve] = []
    for members in generators.values():
        curves += _curves(members, judge, ppl, entropy)
    real = next((point for point in points if point.cell.is_real), None)
    canaries = tuple(p for p in points if p.cell.first["kind"] == "reference" and p is not real)
    first = cells[0].first
    title = f"{first['task']}, {first['length']} tokens" + (f", prefix {first['prefix']}" if first["prefix"] else "")
    names = told_apart([curve.name for curve in curves], [curve.first for curve in curves])
    curves = [replace(curve, name=name) for curve, name in zip(curves, names, strict=True)]
    return Frontier(title, judge, ppl, tuple(curves), real, canaries)


def _curves(members: list[Point], judge: str, ppl: str, entropy: str) -> list[Curve]:
    """A curve over temperatures per nucleus, and one over nuclei per temperature; single points stand alone."""
    first = members[0].cell.first
    name = generator(first)
    name += f", {int(first['steps'])} steps" if finite(first["steps"]) else ""

    def curve(sweep: str, points: list[Point], fixed: str) -> Curve:
        ordered = tuple(sorted(points, key=lambda p: (p.entropy["value"], p.perplexity["value"])))
        return Curve(name + fixed, sweep, ordered, judge, ppl, entropy)

    def by(key: str) -> dict[Any, list[Point]]:
        groups: dict[Any, list[Point]] = {}
        for point in members:
            groups.setdefault(
                (point.cell.first[key], point.cell.first["top_p_rule"] if key == "top_p" else ""), []
            ).append(point)
        return groups

    found = []
    for (mass, rule), points in by("top_p").items():
        if len({p.temperature for p in points}) > 1 or len(members) == 1:
            fixed = f", top-p {mass:g} {rule}".rstrip() if finite(mass) else ""
            found.append(curve("temperature", points, fixed))
    for (temperature, _), points in by("temperature").items():
        if len({p.top_p for p in points}) > 1:
            fixed = (
                f", nucleus at temp. {temperature:g}" if found and finite(temperature) else ", nucleus" if found else ""
            )
            found.append(curve("nucleus", points, fixed))
    covered = {id(point) for c in found for point in c.points}
    found += [curve("temperature", [point], "") for point in members if id(point) not in covered]
    return found


def generator(first: Row) -> str:
    """Label and source, as a line is called."""
    return " ".join([first["label"] or first["method"], first["source"] or ""]).strip()


def told_apart(names: Sequence[str], firsts: Sequence[Row]) -> list[str]:
    """Names of their own: to equal ones is added what tells their cells apart.

    Args:
        names: of generators.
        firsts: fields of a cell of each.
    """
    told = list(names)
    for key, text in (("draw", "{}"), ("checkpoint", "{}"), ("seed", "seed {}"), ("weights", "{:.14}")):
        alike: dict[str, list[int]] = {}
        for i, name in enumerate(told):
            alike.setdefault(name, []).append(i)
        for places in alike.values():
            values = [str(firsts[i][key]) for i in places]
            if len(set(values)) > 1:
                short = [value.rpartition("/")[2] for value in values]  # checkpoints without their folders
                shown = short if len(set(short)) == len(set(values)) else values
                for i, value in zip(places, shown, strict=True):
                    told[i] += f", {text.format(value)}"
    return told


def read_curve(entropy: np.ndarray, perplexity: np.ndarray, at: float | np.ndarray) -> np.ndarray:
    """Perplexity at given entropies by the monotone curve through measured points; ends are held beyond the range.

    Args:
        entropy: (k,) or, for many curves at once, (k, curves) nats, in any order.
        perplexity: of the same shape, positive.
        at: nats; () or (curves,) for many curves, any shape for one.

    Returns:
        of the shape of `at`, or (curves,).
    """
    x, y = np.asarray(entropy, dtype=np.float64), np.log(np.asarray(perplexity, dtype=np.float64))
    at = np.asarray(at, dtype=np.float64)
    if x.ndim == 1:
        count = max(at.size, 1)
        x, y = (np.broadcast_to(v[:, None], (len(v), count)) for v in (x, y))
        return _read_columns(x, y, at.ravel()).reshape(at.shape)
    return _read_columns(x, y, np.broadcast_to(at, x.shape[1:]))


def _read_columns(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """`read_curve` for (k, curves) points and (curves,) places, with log perplexities."""
    order = np.argsort(x, axis=0, kind="stable")
    x, y = np.take_along_axis(x, order, axis=0), isotonic(np.take_along_axis(y, order, axis=0))
    k = len(x)
    x = x + 1e-12 * np.arange(k)[:, None]  # points of equal entropy keep their order
    at = np.clip(at, x[0], x[-1])
    if k == 1:
        return np.exp(y[0])
    slope = _pchip_slopes(x, y)
    left = np.clip((x <= at).sum(axis=0) - 1, 0, k - 2)

    def pick_row(values: np.ndarray, row: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, row[None], axis=0)[0]

    x0, x1, y0, y1 = (pick_row(v, left + i) for v in (x, y) for i in (0, 1))
    d0, d1 = (pick_row(slope, left + i) for i in (0, 1))
    h = x1 - x0
    s = (at - x0) / h
    value = (
        y0 * (1 + 2 * s) * (1 - s) ** 2 + d0 * h * s * (1 - s) ** 2 + y1 * s**2 * (3 - 2 * s) + d1 * h * s**2 * (s - 1)
    )
    return np.exp(value)


def isotonic(y: np.ndarray) -> np.ndarray:
    """Non-decreasing least-squares fit of each column of (k, curves): max over starts of min over ends of means.

    The min-max formula of isotonic regression (Robertson, Wright and Dykstra 1988, theorem 1.4.4); for the few points
    of a sweep it is quicker on many columns than pooling each by itself.
    """
    k = len(y)
    total = np.concatenate([np.zeros((1, *y.shape[1:])), np.cumsum(y, axis=0)])
    fitted = np.full(y.shape, -np.inf)
    for start in range(k):
        means = [(total[end] - total[start]) / (end - start) for end in range(start + 1, k + 1)]
        lowest = np.minimum.accumulate(np.stack(means)[::-1], axis=0)[::-1]  # over all ends at or after a place
        fitted[start:] = np.maximum(fitted[start:], lowest)
    return fitted


def _pchip_slopes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Slopes of the monotone cubic at its points, as `scipy.interpolate.PchipInterpolator` has them, by column."""
    h = np.diff(x, axis=0)
    delta = np.diff(y, axis=0) / h
    if len(h) == 1:
        return np.repeat(delta, 2, axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        before, after = 2 * h[1:] + h[:-1], h[1:] + 2 * h[:-1]
        inner = (before + after) / (before / delta[:-1] + after / delta[1:])
    inner = np.where(delta[:-1] * delta[1:] > 0, inner, 0.0)

    def end(h0: np.ndarray, h1: np.ndarray, d0: np.ndarray, d1: np.ndarray) -> np.ndarray:
        d = ((2 * h0 + h1) * d0 - h0 * d1) / (h0 + h1)
        d = np.where(np.sign(d) != np.sign(d0), 0.0, d)
        return np.where((np.sign(d0) != np.sign(d1)) & (np.abs(d) > 3 * np.abs(d0)), 3 * d0, d)

    first, last = end(h[0], h[1], delta[0], delta[1]), end(h[-1], h[-2], delta[-1], delta[-2])
    return np.concatenate([first[None], inner, last[None]])


def at_entropy(curve: Curve, target: float | Point, replicates: Replicates) -> Interval:
    """Perplexity of a generator at an entropy, with its interval.

    Args:
        curve: from `frontiers`.
        target: nats, or the point of real text, whose own uncertainty then counts.
        replicates: of the summary that the curve comes from.

    Raises:
        OutOfRange: nothing was measured on one side of the target.
    """
    wanted = target.entropy["value"] if isinstance(target, Point) else float(target)
    low, high = curve.range
    if not low <= wanted <= high or len(curve.points) < 2:
        raise OutOfRange(
            f"{curve.name}: entropy {wanted:.3f} nats lies outside what was measured"
            + (f", {low:.3f} to {high:.3f}" if len(curve.points) > 1 else f", one point at {low:.3f}")
            + f"; add {'higher' if wanted > high else 'lower'} temperatures (--temperatures)",
            low,
            high,
        )
    x, y = _replicated(curve, replicates)
    value = float(read_curve(*_measured(curve), wanted))
    targets = np.full(replicates.resamples, wanted)
    sizes = [row["n"] for row in curve.rows() if row["n"] is not None]
    if isinstance(target, Point):
        redrawn = replicates.of(target.cell.id, curve.entropy_metric)
        targets = np.where(np.isfinite(redrawn), redrawn, wanted)
        sizes += [target.entropy["n"]] if target.entropy["n"] is not None else []
    usable = np.isfinite(x).all(axis=0) & np.isfinite(y).all(axis=0)
    values = np.full(replicates.resamples, np.nan)
    values[usable] = read_curve(x[:, usable], y[:, usable], targets[usable])
    return interval(value, values, n=min(sizes, default=0))


def _measured(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    x = np.array([point.entropy["value"] for point in curve.points])
    return x, np.array([point.perplexity["value"] for point in curve.points])


def _replicated(curve: Curve, replicates: Replicates) -> tuple[np.ndarray, np.ndarray]:
    """(points, resamples) replicates of entropy and perplexity."""
    x = [replicates.of(point.cell.id, curve.entropy_metric) for point in curve.points]
    return np.array(x), np.array([replicates.of(point.cell.id, curve.metric, curve.scorer) for point in curve.points])


# ------------------------------------------------------------------------------------------------------- area


def corner(frontier: Frontier) -> tuple[float, float]:
    """A corner (entropy in nats, perplexity) beyond the worst of all curves and real text, in round numbers.

    It lies at least 0.05 nats and a tenth of the perplexity outside: up to a curve's own worst point, an interval of
    its area would hold the truth too rarely (tests/benchmarks/coverage.py), since areas cannot be negative.
    """
    points = [point for curve in frontier.curves for point in curve.points]
    points += [frontier.real] if frontier.real is not None else []
    lowest, highest = min(p.entropy["value"] for p in points), max(p.perplexity["value"] for p in points)
    return rounded_corner(lowest, highest)


def rounded_corner(lowest: float, highest: float) -> tuple[float, float]:
    """See `corner`: entropy down to a tenth of a nat, perplexity up to two digits."""
    unit = 10.0 ** (math.floor(math.log10(1.1 * highest)) - 1)
    return round(math.floor(10 * (lowest - 0.05)) / 10, 1), math.ceil(1.1 * highest / unit) * unit


def area(entropy: np.ndarray, perplexity: np.ndarray, worst: tuple[float, float]) -> np.ndarray:
    """Area, in nats x nats, that measured points dominate up to a corner: the union of their rectangles.

    Args:
        entropy: (k,) or, for many curves at once, (k, curves) nats; more is better.
        perplexity: of the same shape; less is better.
        worst: the corner (entropy, perplexity).

    Returns:
        () or (curves,).
    """
    width = np.maximum(np.asarray(entropy, dtype=np.float64) - worst[0], 0.0)
    height = np.maximum(math.log(worst[1]) - np.log(perplexity), 0.0)
    order = np.argsort(-width, axis=0, kind="stable")
    width, height = (np.take_along_axis(values, order, axis=0) for values in (width, height))
    strips = -np.diff(width, axis=0, append=0.0)
    return np.asarray((strips * np.maximum.accumulate(height, axis=0)).sum(axis=0))


def dominated_area(curve: Curve, worst: tuple[float, float], replicates: Replicates) -> Interval:
    """The area a curve's measured points dominate, with its interval (the corner held fixed); see `corner`."""
    x, y = _replicated(curve, replicates)
    sizes = [row["n"] for row in curve.rows() if row["n"] is not None]
    return interval(float(area(*_measured(curve), worst)), area(x, y, worst), n=min(sizes, default=0))


# --------------------------------------------------------------------------------------------- equal expense


@dataclass(frozen=True)
class Expense:
    """Quality of one generator over its step counts, by what they cost.

    Args:
        name: label and source.
        cost: "calls" (network calls per batch) or "seconds" (per sequence).
        points: by cost, then by steps; several may have one cost, as first-hitting samplers do.
        scorer, metric: of the perplexity.
        costs: of the points.
    """

    name: str
    cost: str
    points: tuple[Point, ...]
    scorer: str
    metric: str
    costs: tuple[float, ...]

    def at(self, cost: float, replicates: Replicates) -> Interval:
        """Perplexity at a cost, see `read_cost`.

        Raises:
            OutOfRange: nothing was measured on one side.
        """
        low, high = self.costs[0], self.costs[-1]
        if not low <= cost <= high:
            raise OutOfRange(
                f"{self.name}: {cost:g} {self.cost} were not measured, only {low:g} to {high:g}", low, high
            )
        values = np.array([[p.perplexity["value"]] for p in self.points])
        redrawn = np.array([replicates.of(p.cell.id, self.metric, self.scorer) for p in self.points])
        both = np.concatenate([values, redrawn], axis=1)
        read = read_cost(np.array(self.costs), both, cost)
        sizes = [p.perplexity["n"] for p in self.points if p.perplexity["n"] is not None]
        return interval(float(read[0]), read[1:], n=min(sizes, default=0))


def read_cost(costs: np.ndarray, perplexity: np.ndarray, cost: float) -> np.ndarray:
    """Perplexity at a cost: a cubic, monotone between points, through log perplexity over log cost.

    Points of one cost count as one, with the mean of their log perplexities.

    Args:
        costs: (k,) in any order, positive.
        perplexity: (k, curves), positive.
        cost: within the costs.

    Returns:
        (curves,).
    """
    from scipy.interpolate import PchipInterpolator

    different = np.unique(costs)
    logs = np.stack([np.log(perplexity[costs == one]).mean(axis=0) for one in different])
    if len(different) == 1:
        return np.asarray(np.exp(logs[0]))
    return np.asarray(np.exp(PchipInterpolator(np.log(different), logs, axis=0)(math.log(cost))))


def expenses(frontier: Frontier, cost: str = "calls") -> list[Expense]:
    """Quality over cost of every generator of a frontier, at temperature 1 without a nucleus.

    Args:
        frontier: from `frontiers`.
        cost: "calls" or "seconds" (per sequence; compare only rows of one device).
    """
    groups: dict[tuple[Any, ...], dict[str, tuple[float, Point]]] = {}  # by cell: a point may be on two curves
    for curve in frontier.curves:
        for point in curve.points:
            first = point.cell.first
            if first["temperature"] not in (None, 1.0) or finite(first["top_p"]):
                continue
            spent = _spent(point, cost)
            key = tuple(first[name] for name in SAME_LINE)
            if spent is not None:
                groups.setdefault(key, {})[point.cell.id] = (spent, point)
    found = [sorted(members.values(), key=_by_cost) for members in groups.values()]
    firsts = [members[0][1].cell.first for members in found]
    names = told_apart([generator(first) for first in firsts], firsts)
    return [
        Expense(
            name,
            cost,
            tuple(point for _, point in members),
            frontier.scorer,
            frontier.metric,
            tuple(spent for spent, _ in members),
        )
        for name, members in zip(names, found, strict=True)
    ]


def _by_cost(member: tuple[float, Point]) -> tuple[float, int]:
    spent, point = member
    return spent, point.cell.first["steps"] or 0


def _spent(point: Point, cost: str) -> float | None:
    first = point.cell.first
    if cost == "calls":
        value = first["calls"]
    else:
        speed = point.cell.of(pick({name for name, _ in point.cell.rows}, "speed"))
        value = 1.0 / speed["value"] if speed is not None and speed["value"] > 0 else None
    return float(value) if finite(value) and value > 0 else None
