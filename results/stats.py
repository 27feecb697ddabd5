"""Intervals and tests over sequences.

A metric is a statistic T of per-sequence columns (for pooled perplexity: NLL sums and token counts); sequences are the
independent units, tokens are not. Nearly all have one of the forms of `columns` and the studentised intervals of
`resampling`. Here is what a statistic without such a form gets (the median of step times, a plug-in's own): the BCa
bootstrap over sequences (Efron 1987, through `scipy.stats.bootstrap`), second-order correct for skewed statistics. It
falls back, with the reason recorded, to the percentile interval where BCa is undefined, and above `BCA_LIMIT`
sequences, where its correction (skewness z^2 / 6 sqrt(n), under 0.03 standard errors for a skewness of 2) is below the
Monte-Carlo error of 2,000 resamples (0.06 standard errors) and its jackknife, quadratic in n, would cost the most.

All columns of a sequence are resampled together, by index; two rows that share seeds are resampled together as well
(`paired`). Resamples are made in batches of bounded size, so memory does not grow with resamples x n. What follows from
intervals and p-values of either kind is here too: Holm's correction and the sequences that would separate two rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Statistic = Callable[..., np.ndarray]

RESAMPLES = 2000
CONFIDENCE = 0.95
BCA_LIMIT = 2048
_ELEMENTS = 1 << 20  # of one resampled column held at a time: 8 MiB


@dataclass(frozen=True)
class Interval:
    """A value with its interval.

    Args:
        value: the statistic of the data.
        low, high: ends of the interval; NaN if there is none.
        n: sequences behind it (of the smaller sample, if two unpaired samples are compared).
        method: of a bootstrap "BCa", "percentile", "studentised", "Student t", "bias-corrected" (of replicates) or
            "constant" (every resample gives the value); by formula "t" (over training seeds), "normal" (from two rows'
            own intervals) or "constant" (all units are alike); "none".
        reason: why it is not BCa, or why there is none; else "".
        standard_error: standard deviation over the resamples; NaN if there is none.
        confidence, resamples, seed: how it was made; no resamples: by formula.
        over: what was resampled: "sequences", "prompts", "training seeds".
        units: number of these, if they are not sequences.
    """

    value: float
    low: float
    high: float
    n: int
    method: str
    reason: str = ""
    standard_error: float = math.nan
    confidence: float = CONFIDENCE
    resamples: int = RESAMPLES
    seed: int = 0
    over: str = "sequences"
    units: int | None = None

    def __str__(self) -> str:
        return f"{self.value:.6g} [{self.low:.6g}, {self.high:.6g}]"

    @property
    def description(self) -> str:
        """One line for the summary's `interval` column."""
        if self.method == "none":
            return f"no interval: {self.reason}"
        kind = f"{self.method} bootstrap" if self.resamples else self.method
        many = f"{self.n} sequences" if self.units is None else f"{self.units} {self.over} ({self.n} sequences)"
        text = f"{100 * self.confidence:g} % {kind} over {many}"
        text += f", {self.resamples} resamples, seed {self.seed}" if self.resamples else ""
        return f"{text} ({self.reason})" if self.reason else text


# -------------------------------------------------------------------------------------------------- bootstrap


def _columns(columns: Sequence[np.ndarray]) -> tuple[tuple[np.ndarray, ...], int]:
    arrays = tuple(np.asarray(column) for column in columns)
    if not arrays:
        raise ValueError("a statistic needs at least one column")
    shapes = {array.shape for array in arrays}
    if len(shapes) != 1 or arrays[0].ndim != 1:
        raise ValueError(f"columns must all have one shape (n,), not {', '.join(map(str, sorted(shapes)))}")
    return arrays, len(arrays[0])


def _apply(statistic: Statistic, columns: tuple[np.ndarray, ...], index: np.ndarray) -> np.ndarray:
    """The statistic of resampled columns; `index` is (..., n), the result (...)."""
    index = index.astype(np.intp, copy=False)
    with np.errstate(all="ignore"):  # a resample may divide by zero: non-finite results are handled by the caller
        result = np.asarray(statistic(*(column[index] for column in columns)), dtype=np.float64)
    if result.shape != index.shape[:-1]:
        raise ValueError(
            f"the statistic must reduce the last axis of its columns: {index.shape} gave {result.shape}, "
            f"not {index.shape[:-1]} (use axis=-1)"
        )
    return result


def _interval(
    sizes: Sequence[int],
    function: Callable[..., np.ndarray],
    columns: int,
    *,
    seed: int,
    resamples: int,
    confidence: float,
) -> Interval:
    """Bootstrap of a function of one index array per independent sample."""
    from scipy import stats

    if not 0 < confidence < 1 or resamples < 100:
        raise ValueError(f"confidence must lie in (0, 1) and resamples be at least 100: {confidence}, {resamples}")
    n = min(sizes)

    def none(reason: str, value: float = math.nan) -> Interval:
        return Interval(value, math.nan, math.nan, n, "none", reason, math.nan, confidence, 0, seed)

    if n == 0:
        return none("no sequences")
    index = tuple(np.arange(size) for size in sizes)
    value = float(function(*index))
    if not math.isfinite(value):
        return none(f"the value is {value}", value)
    if n == 1:
        return none("one sequence has no spread", value)

    # SciPy calls the statistic with one array per sample and axis=-1.
    def statistic(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
        return function(*samples)

    options: dict[str, Any] = {
        "n_resamples": resamples,
        "batch": max(1, _ELEMENTS // (max(sizes) * max(columns, 1))),
        "vectorized": True,
        "axis": -1,
        "confidence_level": confidence,
    }
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # degenerate cases are found by their NaN below
        result = stats.bootstrap(index, statistic, method="percentile", rng=np.random.default_rng(seed), **options)
        spread = result.bootstrap_distribution
        if bad := int(np.sum(~np.isfinite(spread))):
            return none(f"{bad} of {resamples} resamples are not finite", value)
        error = float(np.std(spread, ddof=1))
        if np.ptp(spread) <= 1e-12 * abs(value):  # equal up to the rounding of sums in another order
            return Interval(
                value, value, value, n, "constant", "all sequences are alike", 0.0, confidence, resamples, seed
            )
        if not spread.min() <= value <= spread.max():
            return none("every resample lies on the same side of the value: resampling biases this statistic", value)
        method, reason = "percentile", f"more than {BCA_LIMIT} sequences"
        if max(sizes) <= BCA_LIMIT:
            method, reason = "percentile", "BCa is undefined here"
            again = {**options, "n_resamples": 0}
            corrected = stats.bootstrap(index, statistic, method="BCa", bootstrap_result=result, **again)
            if np.isfinite(corrected.confidence_interval).all():
                method, reason, result = "BCa", "", corrected
    low, high = (float(end) for end in result.confidence_interval)
    return Interval(value, low, high, n, method, reason, error, confidence, resamples, seed)


def bootstrap(
    columns: Sequence[np.ndarray],
    statistic: Statistic,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Value and interval of a statistic.

    Args:
        columns: per-sequence arrays, each (n,).
        statistic: maps columns (..., n) to values (...), reducing the last axis.
        seed: of the resamples; equal input and seed give equal output.
        resamples: at least 100; 2,000 or more for numbers that are reported.
        confidence: coverage asked for.

    Returns:
        the interval. No interval (NaN ends, with the reason) for n = 0, n = 1, a value that is not finite, resamples
        that are not or that all miss the value on one side (counts of distinct things); zero width for constant
        columns.
    """
    arrays, n = _columns(columns)
    return _interval(
        [n],
        lambda index: _apply(statistic, arrays, index),
        len(arrays),
        seed=seed,
        resamples=resamples,
        confidence=confidence,
    )


def ratio(
    a: Sequence[np.ndarray],
    b: Sequence[np.ndarray],
    statistic: Statistic,
    *,
    paired: bool,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """T(a) / T(b) with its interval (not the ratio of interval ends).

    Args:
        a, b: columns of the two rows.
        statistic: T, see `bootstrap`; one that has a form is compared by `resampling.compare_terms`.
        paired: sequence i of both rows belongs together (same seed, same prompt): resample them together.
        seed, resamples, confidence: see `bootstrap`.

    Raises:
        ValueError: paired samples of different size.
    """
    (a_columns, n_a), (b_columns, n_b) = _columns(a), _columns(b)
    options: dict[str, Any] = {"seed": seed, "resamples": resamples, "confidence": confidence}
    width = len(a_columns) + len(b_columns)

    def apart(index_a: np.ndarray, index_b: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return np.divide(_apply(statistic, a_columns, index_a), _apply(statistic, b_columns, index_b))

    if not paired:
        return _interval([n_a, n_b], apart, width, **options)
    if n_a != n_b:
        raise ValueError(f"paired rows need equally many sequences: {n_a} and {n_b}")
    return _interval([n_a], lambda index: apart(index, index), width, **options)


# ------------------------------------------------------------------------------------------------------ tests


def holm(pvalues: Sequence[float] | np.ndarray) -> np.ndarray:
    """Holm's step-down adjusted p-values, in the order given: the chance of one false claim among all is bounded.

    A NaN (a comparison that could not be made) stays NaN and does not count.
    """
    p = np.asarray(pvalues, dtype=np.float64)
    adjusted = np.full(p.shape, np.nan)
    known = np.flatnonzero(~np.isnan(p))
    if np.any((p[known] < 0) | (p[known] > 1)):
        raise ValueError("p-values lie in [0, 1]")
    order = known[np.argsort(p[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * factors)) if len(order) else adjusted[order]
    return adjusted


# ------------------------------------------------------------------------------------------------ sample size


def n_to_separate(difference: Interval, *, confidence: float = CONFIDENCE, power: float = 0.8) -> int | None:
    """Sequences per row needed to find a difference of the observed size.

    Normal approximation: n = n_0 ((z_{1-alpha/2} + z_power) SE_0 / difference)^2, from the difference's own interval,
    so it is right for paired rows too. None if the difference is zero or has no standard error.

    Args:
        difference: from `resampling.compare_terms`, or of any quantity from zero.
        confidence: 1 - alpha of the two-sided test.
        power: chance of finding it.
    """
    from scipy import stats

    gap, variance = difference.value, difference.n * difference.standard_error**2  # of a single sequence
    if not (math.isfinite(gap) and math.isfinite(variance)) or gap == 0:
        return None
    z = float(stats.norm.ppf(0.5 + confidence / 2) + stats.norm.ppf(power))
    return max(2, math.ceil(variance * (z / gap) ** 2))
