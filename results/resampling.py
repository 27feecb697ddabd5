"""Intervals and tests for values of the form f(sum a / sum b), all at once by matrix products.

Resampling n units is a row of multiplicities; B resamples of k columns are one product of a (B, n) matrix with an
(n, k) one. Every interval here is studentised (bootstrap-t, Efron 1982; Davison and Hinkley 1997, section 5.2):

    T* = (r* - r) / se*,      interval [r - T*_(1-alpha/2) se, r - T*_(alpha/2) se],      then f of both ends

with r = sum a / sum b, f the identity or exp, and se the linearised standard error of a ratio,
se^2 = m/(m-1) sum_i (a_i - r b_i)^2 / (sum b)^2, computed anew in each resample. It is second-order correct at both
ends, like BCa, and does not share the narrowness of percentiles at small n; tests/results/test_coverage.py measures
both. What is resampled are the independent units: sequences, or whole clusters of them (a prompt with all its
continuations; a training seed with all its samples: the top level alone, since a resampled seed brings its own
sampling noise along). Fewer than `FEW_UNITS` units get Student's t on the same linearised errors.

Two values are compared on one scale: their difference, or the difference of their logarithms for ratios and percentage
reductions; paired if their units belong together. The permutation test uses the studentised statistic as well, so that
it also holds for rows of different spread (Janssen 1997).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from tsdfm_bench.results.columns import Terms
from tsdfm_bench.results.stats import CONFIDENCE, RESAMPLES, Interval

Scale = Literal["difference", "ratio", "reduction"]

FEW_UNITS = 10
_ELEMENTS = 1 << 20  # of permutations held at a time: 8 MiB
_ROUNDING = 1e-5  # a resampled variance below this share of its sum of squares is zero: what single precision leaves
_CACHE_BYTES = 256 << 20
_CHUNK = 64
_weights: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()


def multiplicities(units: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """(resamples, units) float32: how often each unit occurs in each resample; the last few are kept."""
    key = (units, resamples, seed)
    if key not in _weights:
        index = np.random.default_rng(seed).integers(0, units, (resamples, units), dtype=np.int64)
        index += np.arange(resamples)[:, None] * units
        counts = np.bincount(index.ravel(), minlength=resamples * units)
        _weights[key] = counts.reshape(resamples, units).astype(np.float32)
        while len(_weights) > 1 and sum(array.nbytes for array in _weights.values()) > _CACHE_BYTES:
            _weights.popitem(last=False)
    _weights.move_to_end(key)
    return _weights[key]


# -------------------------------------------------------------------------------------------------- one value


def intervals(
    terms: Sequence[Terms],
    *,
    clusters: np.ndarray | None = None,
    over: str = "sequences",
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> list[Interval]:
    """The interval of each of several values of the same n sequences.

    Args:
        terms: (n,) each.
        clusters: (n,) equal numbers for sequences that are resampled together; None = each by itself.
        over: what a unit is called in descriptions: "sequences", "prompts", "training seeds".
        seed, resamples: of the bootstrap; recorded in the result.
        confidence: coverage asked for.

    Returns:
        one per value. No interval (NaN ends, with the reason) for fewer than two units or a value that is not finite;
        zero width for constant columns.
    """
    if not terms:
        return []
    n = terms[0].n
    if any(t.n != n for t in terms) or (clusters is not None and len(clusters) != n):
        raise ValueError(f"all terms and clusters need the same number of sequences: {sorted({t.n for t in terms})}")
    units = None if clusters is None else len(np.unique(clusters))
    unique: dict[tuple[int, int, bool], Terms] = {(id(t.a), id(t.b), t.exp): t for t in terms}
    groups: dict[bool, list[tuple[int, int, bool]]] = {}
    for key, t in unique.items():  # one matrix product for all of one kind
        groups.setdefault(bool((t.b == t.b[:1]).all()), []).append(key)
    found: dict[tuple[int, int, bool], Interval] = {}
    for keys in groups.values():
        members = [unique[key] if clusters is None else unique[key].summed(clusters) for key in keys]
        made = _studentised([[[t]] for t in members], None, seed, resamples, confidence)
        found.update(zip(keys, made, strict=True))
    return [replace(found[id(t.a), id(t.b), t.exp], n=n, over=over, units=units) for t in terms]


# ------------------------------------------------------------------------------------------------- two values


def compare_terms(
    a: Terms,
    b: Terms,
    scale: Scale = "difference",
    *,
    paired: bool,
    clusters: np.ndarray | None = None,
    clusters_b: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """a - b, a / b, or 100 (1 - a / b), with its interval.

    Args:
        a, b: of the two rows.
        scale: "difference", "ratio" or "reduction" (by how many percent a lies below b).
        paired: sequence i of both rows belongs together (same prompt, same stream).
        clusters, clusters_b: (n,) prompt numbers of the rows' sequences; paired rows share the first.
        seed, resamples, confidence: see `intervals`.

    Raises:
        ValueError: paired rows of different size.
    """
    return compare_many(
        [(a, b)],
        scale,
        paired=paired,
        clusters=clusters,
        clusters_b=clusters_b,
        seed=seed,
        resamples=resamples,
        confidence=confidence,
    )[0]


def compare_many(
    pairs: Sequence[tuple[Terms, Terms]],
    scale: Scale = "difference",
    *,
    paired: bool,
    clusters: np.ndarray | None = None,
    clusters_b: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> list[Interval]:
    """`compare_terms` of many pairs that share sizes and clusters, at once."""
    made = [_units(a, b, paired, clusters, clusters_b) for a, b in pairs]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, (a, b) in enumerate(made):
        groups.setdefault((a.n, b.n, a.exp, b.exp), []).append(i)
    found: dict[int, Interval] = {}
    for members in groups.values():
        problems = [[[made[i][0], made[i][1]]] if paired else [[made[i][0]], [made[i][1]]] for i in members]
        chart = _two(*made[members[0]], scale)
        results = _studentised(problems, chart, seed, resamples, confidence)
        for i, result in zip(members, results, strict=True):
            n = min(pairs[i][0].n, pairs[i][1].n)
            units = min(made[i][0].n, made[i][1].n) if clusters is not None else None
            found[i] = replace(result, n=n, units=units, over="prompts" if units is not None else "sequences")
    return [found[i] for i in range(len(pairs))]


def permutation_terms(
    a: Terms,
    b: Terms,
    *,
    paired: bool,
    clusters: np.ndarray | None = None,
    clusters_b: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = 4999,
) -> float:
    """Two-sided p-value of "both rows have the same value", by permutation of the studentised difference.

    Paired rows swap within pairs (of sequences or clusters), unpaired ones exchange units freely. (1 + hits) /
    (1 + resamples); NaN for fewer than two units or values that are not finite. Permutations are made in blocks of
    bounded size, so memory does not grow with resamples x n.
    """
    if a.exp != b.exp:
        raise ValueError("values of different form cannot be compared")
    a, b = _units(a, b, paired, clusters, clusters_b)
    if min(a.n, b.n) < 2:
        return math.nan
    if paired:
        z = _moments(np.stack([a.a, a.b, b.a, b.b], axis=1))
        moved = _moments(np.stack([b.a, b.b, a.a, a.b], axis=1)) - z
        unmoved = np.zeros(a.n)
    else:
        z = moved = _moments(np.stack([np.concatenate([a.a, b.a]), np.concatenate([a.b, b.b])], axis=1))
        unmoved = np.repeat([1.0, 0.0], [a.n, b.n])
    rng, total = np.random.default_rng(seed), z.sum(axis=0)
    rows = max(1, _ELEMENTS // len(unmoved))
    parts = []
    for start in range(0, resamples, rows):
        chosen = _drawn(rng, min(rows, resamples - start), len(unmoved), None if paired else a.n)
        if start == 0:  # what was observed is summed in the same product, so that ties are rounded alike
            chosen = np.concatenate([unmoved[None], chosen])
        sums = chosen @ moved
        parts.append(_paired_t(total + sums, a.n) if paired else _welch_t(sums, total - sums, a.n, b.n))
    statistic = np.concatenate(parts)
    observed = abs(statistic[0])
    if not np.isfinite(observed):
        same = float(a.value()) == float(b.value())
        return 1.0 if same else math.nan
    hits = np.sum(~(np.abs(statistic[1:]) < observed * (1 - 1e-12)))
    return float((1 + hits) / (1 + resamples))


def separation(a: Terms, b: Terms, *, paired: bool, clusters: np.ndarray | None = None) -> float:
    """Two-sided p-value of "same value" from linearised errors and Student's t: quick, for marking whole tables.

    On the scale of r = sum a / sum b (log perplexity for perplexities); Welch's degrees of freedom if unpaired.
    """
    from scipy import stats

    if paired:
        a, b = _units(a, b, paired, clusters, None)
        gap = _influence(a) - _influence(b)
        variance, freedom = float(np.sum(gap**2)) * a.n / max(a.n - 1, 1), float(a.n - 1)
    else:
        parts = [(float(np.sum(_influence(t) ** 2)) * t.n / max(t.n - 1, 1), float(t.n - 1)) for t in (a, b)]
        variance = sum(v for v, _ in parts)
        freedom = min(d for _, d in parts)
        if variance > 0 and freedom > 0:
            freedom = variance**2 / sum(v**2 / d for v, d in parts)
    difference = abs(float(a.a.sum() / a.b.sum() - b.a.sum() / b.b.sum()))
    if freedom < 1 or not math.isfinite(difference):
        return math.nan
    if variance <= 0:
        return 1.0 if difference == 0 else 0.0
    return float(2 * stats.t.sf(difference / math.sqrt(variance), freedom))


# ------------------------------------------------------------------------------------------------- the engine


def _units(
    a: Terms, b: Terms, paired: bool, clusters: np.ndarray | None, clusters_b: np.ndarray | None
) -> tuple[Terms, Terms]:
    if paired:
        if a.n != b.n:
            raise ValueError(f"paired rows need equally many sequences: {a.n} and {b.n}")
        return (a.summed(clusters), b.summed(clusters)) if clusters is not None else (a, b)
    return (
        a.summed(clusters) if clusters is not None else a,
        b.summed(clusters_b) if clusters_b is not None else b,
    )


def _influence(t: Terms) -> np.ndarray:
    """(n,) how much each unit moves r = sum a / sum b."""
    with np.errstate(all="ignore"):
        return (t.a - t.a.sum() / t.b.sum() * t.b) / t.b.sum()


@dataclass(frozen=True)
class _Map:
    """A scale on which statistics are studentised, and the way to what is reported.

    Args:
        kind: "r" (one ratio), "difference" of values, "log" difference of logarithms.
        exp: whether each of the values is exp(r); for "r" one entry per problem.
        report: "identity", "exp", "reduction": from the scale to the reported number; "own": as `exp` says.
    """

    kind: Literal["r", "difference", "log"]
    exp: tuple[bool, ...]
    report: Literal["identity", "exp", "reduction", "own"]

    def forward(self, r: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Statistic and its derivative by each ratio."""
        with np.errstate(all="ignore"):
            if self.kind == "r":
                return r[0], [np.ones_like(r[0])]
            if self.kind == "difference":
                values = [np.exp(x) if exp else x for x, exp in zip(r, self.exp, strict=True)]
                slopes = [v if exp else np.ones_like(v) for v, exp in zip(values, self.exp, strict=True)]
            else:
                values = [x if exp else np.log(x) for x, exp in zip(r, self.exp, strict=True)]
                slopes = [np.ones_like(x) if exp else 1.0 / x for x, exp in zip(r, self.exp, strict=True)]
            return values[0] - values[1], [slopes[0], -slopes[1]]

    def back(self, x: np.ndarray) -> np.ndarray:
        """From the scale to the reported number."""
        if self.report == "identity":
            return x
        with np.errstate(over="ignore"):
            if self.report == "own":
                return np.where(self.exp, np.exp(x), x)
            return np.exp(x) if self.report == "exp" else 100.0 * (1.0 - np.exp(x))

    def slope(self, x: np.ndarray) -> np.ndarray:
        """Absolute derivative of `back`."""
        if self.report == "identity":
            return np.ones_like(x)
        with np.errstate(over="ignore"):
            if self.report == "own":
                return np.where(self.exp, np.exp(x), 1.0)
            return np.exp(x) * (1.0 if self.report == "exp" else 100.0)


def _two(a: Terms, b: Terms, scale: Scale) -> _Map:
    if scale == "difference":
        return _Map("difference", (a.exp, b.exp), "identity")
    return _Map("log", (a.exp, b.exp), "exp" if scale == "ratio" else "reduction")


class _Sample:
    """The columns of K problems over one independent set of n units: per problem one value, or two paired ones.

    Args:
        terms: K lists of k values.
    """

    def __init__(self, terms: Sequence[Sequence[Terms]]) -> None:
        self.n = terms[0][0].n
        self.k = len(terms[0])
        a = [np.stack([row[j].a for row in terms], axis=1) for j in range(self.k)]  # (n, K) each
        self.b = [np.stack([row[j].b for row in terms], axis=1) for j in range(self.k)]
        self.total = [np.array([row[j].b.sum() for row in terms]) for j in range(self.k)]
        with np.errstate(all="ignore"):
            self.r = [np.array([row[j].a.sum() for row in terms]) / self.total[j] for j in range(self.k)]
            # e = a - r b sums to zero, so its resampled sums and squares lose no digits to cancellation.
            self.e = [x - r * b for x, r, b in zip(a, self.r, self.b, strict=True)]
            # In units of their own spread, single precision is enough for the sums of one value; the variance of a
            # difference of two that go together is a small remainder, which it would lose.
            dtype: type[np.floating[Any]] = np.float32 if self.k == 1 else np.float64
            spread = [np.sqrt((e**2).sum(axis=0) / max(self.n, 1)) for e in self.e]
            level = [total / self.n for total in self.total]
            safe = [np.where((size > 0) & np.isfinite(size), size, 1.0) for size in spread]
            self.unit = [size / mean for size, mean in zip(safe, level, strict=True)]
            self._e = [(e / size).astype(dtype) for e, size in zip(self.e, safe, strict=True)]
            self._b = [(b / mean).astype(dtype) for b, mean in zip(self.b, level, strict=True)]
        self.positive = np.all([(x >= 0).all(axis=0) for x in a], axis=0)
        with np.errstate(all="ignore"):
            own = np.where(self.b[0] > 0, a[0] / self.b[0], self.r[0])
        self.most = own.max(axis=0, initial=-math.inf)  # of the units' own ratios (of the first value)
        self.even = all(bool((b == b[:1]).all()) for b in self.b)  # every unit counts alike: sums of b are no news
        self.pairs = [(i, j) for i in range(self.k) for j in range(i, self.k)]

    def covariance(self) -> dict[tuple[int, int], np.ndarray]:
        """Linearised covariances (K,) of the ratios of the data themselves."""
        with np.errstate(all="ignore"):
            scaled = [e / total for e, total in zip(self.e, self.total, strict=True)]
            return {(i, j): (scaled[i] * scaled[j]).sum(axis=0) * self.n / max(self.n - 1, 1) for i, j in self.pairs}

    def resampled(self, counts: np.ndarray) -> tuple[list[np.ndarray], dict[tuple[int, int], np.ndarray]]:
        """Ratios and their linearised covariances, (B, K) each, for (B, n) multiplicities."""
        k, pairs = range(self.k), self.pairs
        columns = [*self._e, *(self._e[i] * self._e[j] for i, j in pairs)]
        if not self.even:
            columns += [*self._b, *(self._e[i] * self._b[j] for i in k for j in k)]
            columns += [self._b[i] * self._b[j] for i, j in pairs]
        width = columns[0].shape[1]
        with np.errstate(all="ignore"):
            sums = counts @ np.concatenate(columns, axis=1)
        parts = iter([sums[:, at * width : (at + 1) * width].astype(np.float64) for at in range(len(columns))])
        e = [next(parts) for _ in k]
        ee = {pair: next(parts) for pair in pairs}
        with np.errstate(all="ignore"):
            if self.even:
                b = [np.full_like(x, self.n) for x in e]
                shift = [x / self.n for x in e]
                cov = {(i, j): ee[i, j] - e[i] * e[j] / self.n for i, j in pairs}
            else:
                b = [next(parts) for _ in k]
                eb = {(i, j): next(parts) for i in k for j in k}
                bb = {pair: next(parts) for pair in pairs}
                shift = [x / y for x, y in zip(e, b, strict=True)]
                cov = {
                    (i, j): ee[i, j] - shift[j] * eb[i, j] - shift[i] * eb[j, i] + shift[i] * shift[j] * bb[i, j]
                    for i, j in pairs
                }
            for i in k:  # resamples of equal units have no spread, whatever rounding says
                cov[i, i] = np.where(cov[i, i] > _ROUNDING * ee[i, i], cov[i, i], 0.0)
            factor = self.n / (self.n - 1)
            unit = self.unit
            ratios = [r + u * s for r, u, s in zip(self.r, unit, shift, strict=True)]
            return ratios, {(i, j): c * (factor * unit[i] * unit[j]) / (b[i] * b[j]) for (i, j), c in cov.items()}


def _variance(slopes: Sequence[np.ndarray], covariances: Sequence[dict[tuple[int, int], np.ndarray]]) -> np.ndarray:
    """Variance of a statistic from its derivatives and the covariances of each independent sample's ratios."""
    at = 0
    total = np.zeros_like(slopes[0])
    for cov in covariances:
        for (i, j), value in cov.items():
            total = total + (1 if i == j else 2) * slopes[at + i] * slopes[at + j] * value
        at += 1 + max(j for _, j in cov)
    return np.maximum(total, 0.0)


def _studentised(
    problems: Sequence[Sequence[Sequence[Terms]]], chart: _Map | None, seed: int, resamples: int, confidence: float
) -> list[Interval]:
    """Intervals of problems of one kind.

    Args:
        problems: per problem its independent samples (one or two), per sample its values (one, or two paired ones);
            all problems have samples of the same sizes.
        chart: the scale of all; None: problems of one value each, on the scale of their ratios.
        seed, resamples, confidence: see `intervals`.
    """
    if not 0 < confidence < 1 or resamples < 100:
        raise ValueError(f"confidence must lie in (0, 1) and resamples be at least 100: {confidence}, {resamples}")
    found: list[Interval] = []
    for start in range(0, len(problems), _CHUNK):
        part = problems[start : start + _CHUNK]
        samples = [_Sample([problem[place] for problem in part]) for place in range(len(part[0]))]
        scale = chart or _Map("r", tuple(problem[0][0].exp for problem in part), "own")
        found += _chunk(samples, scale, seed, resamples, confidence)
    return found


def _chunk(samples: Sequence[_Sample], chart: _Map, seed: int, resamples: int, confidence: float) -> list[Interval]:
    from scipy import stats

    n = min(s.n for s in samples)
    centre, slopes = chart.forward([r for s in samples for r in s.r])
    value = chart.back(centre)
    count = len(centre)

    def none(i: int, reason: str) -> Interval:
        return Interval(float(value[i]), math.nan, math.nan, n, "none", reason, math.nan, confidence, 0, seed)

    if n < 2:
        return [none(i, "no sequences" if n == 0 else "one sequence has no spread") for i in range(count)]
    with np.errstate(all="ignore"):
        error = np.sqrt(_variance(slopes, [s.covariance() for s in samples]))
        spread = error * chart.slope(centre)
    usable = np.isfinite(value) & np.isfinite(error)
    constant = usable & (error <= 1e-12 * np.maximum(1.0, np.abs(centre)))
    tail = (1 - confidence) / 2
    quantile = float(stats.t.ppf(1 - tail, n - 1))
    method, reason = ["Student t"] * count, [""] * count
    low, high, drawn = centre - quantile * error, centre + quantile * error, 0
    if n >= FEW_UNITS:
        drawn = resamples
        made = [s.resampled(multiplicities(s.n, resamples, seed + 7919 * i)) for i, s in enumerate(samples)]
        with np.errstate(all="ignore"):
            moved, slopes = chart.forward([r for ratios, _ in made for r in ratios])
            t = (moved - centre) / np.sqrt(_variance(slopes, [cov for _, cov in made]))
        t[np.isnan(t)] = 0.0  # a resample without spread at the value itself
        lowest, highest = _quantiles(t, tail)
        method = ["studentised"] * count
        with np.errstate(all="ignore"):
            low, high = centre - highest * error, centre - lowest * error
        absurd = ~(np.isfinite(low) & np.isfinite(high))
        if chart.kind == "r":
            absurd |= high > samples[0].most
        for at in np.flatnonzero(usable & ~constant & absurd):
            # Resamples without spread (rare events) have errors near zero, and the end lies beyond every sequence;
            # percentiles keep to what can occur.
            z = quantile * math.sqrt(n / (n - 1))
            low[at], high[at] = np.quantile(moved[:, at], stats.norm.cdf([-z, z]))
            method[at], reason[at] = "percentile", "too few different sequences to studentise"
    if chart.kind == "r":
        low = np.where(samples[0].positive & ~np.array(chart.exp), np.maximum(low, 0.0), low)
    ends = np.sort(np.stack([chart.back(low), chart.back(high)]), axis=0)
    found = []
    for i in range(count):
        if not usable[i]:
            found.append(none(i, f"the value is {value[i]}" if not math.isfinite(value[i]) else "no finite error"))
        elif constant[i]:
            same = float(value[i])
            text = "all sequences are alike"
            found.append(Interval(same, same, same, n, "constant", text, 0.0, confidence, resamples, seed))
        else:
            numbers = (float(value[i]), float(ends[0, i]), float(ends[1, i]))
            found.append(Interval(*numbers, n, method[i], reason[i], float(spread[i]), confidence, drawn, seed))
    return found


def _quantiles(t: np.ndarray, tail: float) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper quantile of each column (linear between order statistics), by selection instead of sorting."""
    rows = len(t)
    places = []
    for share in (tail, 1 - tail):
        at = share * (rows - 1)
        places += [math.floor(at), min(math.floor(at) + 1, rows - 1)]
    ordered = np.partition(t.T.copy(), sorted(set(places)), axis=1)
    ends = []
    for share, (below, above) in zip((tail, 1 - tail), (places[:2], places[2:]), strict=True):
        part = share * (rows - 1) - below
        with np.errstate(all="ignore"):
            ends.append(ordered[:, below] * (1 - part) + ordered[:, above] * part)
    return ends[0], ends[1]


# --------------------------------------------------------------------------------------------- permutations


def _drawn(rng: np.random.Generator, count: int, units: int, first: int | None) -> np.ndarray:
    """(count, units): 1 where a unit is in the first row (`first` units are), or, if None, where a pair is swapped."""
    if first is None:
        return rng.integers(0, 2, (count, units)).astype(np.float64)
    chosen = np.zeros((count, units))
    order = np.argpartition(rng.random((count, units)), first - 1, axis=1)[:, :first]
    np.put_along_axis(chosen, order, 1.0, axis=1)
    return chosen


def _moments(z: np.ndarray) -> np.ndarray:
    """(n, k + k (k + 1) / 2): the columns and all their products."""
    k = z.shape[1]
    return np.concatenate([z, np.stack([z[:, i] * z[:, j] for i in range(k) for j in range(i, k)], axis=1)], axis=1)


def _welch_t(first: np.ndarray, second: np.ndarray, n: int, m: int) -> np.ndarray:
    """Studentised difference of two ratios from sums of (a, b, aa, ab, bb) of both halves."""
    with np.errstate(all="ignore"):
        parts = []
        for sums, size in ((first, n), (second, m)):
            a, b, aa, ab, bb = sums.T
            r = a / b
            parts.append((r, np.maximum(aa - 2 * r * ab + r * r * bb, 0) / b**2 * size / max(size - 1, 1)))
        return (parts[0][0] - parts[1][0]) / np.sqrt(parts[0][1] + parts[1][1])


def _paired_t(sums: np.ndarray, n: int) -> np.ndarray:
    """Studentised difference of paired ratios from sums of (a, b, c, d) and their ten products."""
    a, b, c, d, aa, ab, ac, ad, bb, bc, bd, cc, cd, dd = sums.T
    with np.errstate(all="ignore"):
        r, s = a / b, c / d
        own = (aa - 2 * r * ab + r * r * bb) / b**2 + (cc - 2 * s * cd + s * s * dd) / d**2
        cross = (ac - s * ad - r * bc + r * s * bd) / (b * d)
        return (r - s) / np.sqrt(np.maximum(own - 2 * cross, 0) * n / max(n - 1, 1))
