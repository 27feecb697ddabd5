"""Intervals cover, tests keep their level, degenerate input is defined."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from scipy import stats as scipy_stats

import tsdfm_bench.results
from tsdfm_bench.results import stats
from tsdfm_bench.results.columns import terms
from tsdfm_bench.results.resampling import compare_terms


def mean(x: np.ndarray) -> np.ndarray:
    """Mean over sequences."""
    return x.mean(axis=-1)


def pooled(nll: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Pooled perplexity."""
    return np.exp(nll.sum(axis=-1) / units.sum(axis=-1))


def _text(rng: np.random.Generator, n: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """NLL sums and unit counts of n sequences; skewed, and counts depend on the sequence."""
    units = rng.integers(40, 65, n).astype(float)
    return units * (shift + rng.gamma(12, 0.3, n)), units


def test_agrees_with_scipy_on_one_column() -> None:
    x = np.random.default_rng(0).lognormal(size=80)
    mine = stats.bootstrap((x,), mean, seed=3)
    theirs = scipy_stats.bootstrap((x,), np.mean, n_resamples=2000, method="BCa", rng=np.random.default_rng(3))
    assert mine.method == "BCa"
    # Equal resamples; the last digits depend on the order of summation.
    assert mine.low == pytest.approx(theirs.confidence_interval.low, rel=1e-9)
    assert mine.high == pytest.approx(theirs.confidence_interval.high, rel=1e-9)
    assert mine.value == pytest.approx(x.mean())


@pytest.mark.parametrize("name", ["mean", "pooled"])
def test_coverage(name: str) -> None:
    """95 % intervals cover the truth in 92 to 98 % of 300 repetitions (2.4 standard errors of the simulation)."""
    rng = np.random.default_rng(20240 + len(name))
    hits = 0
    for repetition in range(300):
        nll, units = _text(rng, 64)
        if name == "mean":
            truth, interval = 3.6, stats.bootstrap((nll / units,), mean, seed=repetition)
        else:
            truth, interval = math.exp(3.6), stats.bootstrap((nll, units), pooled, seed=repetition)
        hits += interval.low <= truth <= interval.high
    assert 0.92 <= hits / 300 <= 0.98


def test_same_input_same_interval_and_the_seed_is_recorded() -> None:
    data = _text(np.random.default_rng(1), 64)
    one, two = stats.bootstrap(data, pooled, seed=5), stats.bootstrap(data, pooled, seed=5)
    assert one == two
    assert stats.bootstrap(data, pooled, seed=6) != one
    assert one.description == "95 % BCa bootstrap over 64 sequences, 2000 resamples, seed 5"


def test_memory_is_bounded_and_batching_does_not_change_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _text(np.random.default_rng(1), 2000)
    tracemalloc.start()
    whole = stats.bootstrap(data, pooled)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.75 * 2000 * 2000 * 8 * len(data)  # less than the resampled columns alone would take
    monkeypatch.setattr(stats, "_ELEMENTS", 40_000)
    again = stats.bootstrap(data, pooled)
    assert (again.low, again.high) == pytest.approx((whole.low, whole.high), rel=1e-12)


def test_many_sequences_fall_back_with_a_reason() -> None:
    x = np.random.default_rng(0).normal(size=stats.BCA_LIMIT + 1)
    interval = stats.bootstrap((x,), mean)
    assert interval.method == "percentile"
    assert str(stats.BCA_LIMIT) in interval.reason
    assert interval.reason in interval.description


def test_bca_undefined_falls_back_with_a_reason() -> None:
    """The median of tied data: leaving one value out never changes it, so BCa's acceleration is 0/0."""
    x = np.repeat([1.0, 2.0, 3.0], [14, 12, 14])
    interval = stats.bootstrap((x,), lambda v: np.median(v, axis=-1))
    assert interval.method == "percentile"
    assert interval.reason == "BCa is undefined here"
    assert interval.low <= interval.value == 2.0 <= interval.high


def test_a_statistic_that_resampling_biases_has_no_interval() -> None:
    """The number of distinct values: every resample repeats some, so every resample has fewer."""
    interval = stats.bootstrap(
        (np.arange(40.0),), lambda v: (np.diff(np.sort(v, axis=-1), axis=-1) > 0).sum(axis=-1) + 1
    )
    assert interval.value == 40
    assert interval.method == "none"
    assert "biases" in interval.reason


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ([], math.nan, "no sequences"),
        ([2.5], 2.5, "one sequence has no spread"),
        ([1.0, math.nan, 2.0], math.nan, "the value is nan"),
        ([1.0, math.inf, 2.0], math.inf, "the value is inf"),
    ],
)
def test_no_interval_without_spread_or_value(column: list[float], value: float, reason: str) -> None:
    interval = stats.bootstrap((np.array(column),), mean)
    assert interval.method == "none"
    assert interval.reason == reason
    assert interval.value == pytest.approx(value, nan_ok=True)
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    assert interval.description == f"no interval: {reason}"


def test_constant_columns_have_an_interval_without_width() -> None:
    interval = stats.bootstrap((np.full(30, 0.1), np.full(30, 0.3)), pooled)
    assert interval.method == "constant"
    assert interval.low == interval.value == interval.high
    assert interval.standard_error == 0.0


def test_resamples_that_are_not_finite_are_counted() -> None:
    x = np.array([1.0, 0.0, 0.0])
    interval = stats.bootstrap((x,), lambda v: 1 / v.sum(axis=-1))
    assert interval.value == 1.0
    assert interval.method == "none"
    assert "resamples are not finite" in interval.reason


def test_two_sequences() -> None:
    interval = stats.bootstrap((np.array([1.0, 3.0]),), mean)
    assert 1.0 <= interval.low <= 2.0 <= interval.high <= 3.0


def test_wrong_use_is_explained() -> None:
    x = np.arange(5.0)
    with pytest.raises(ValueError, match="reduce the last axis"):
        stats.bootstrap((x,), lambda v: v)
    with pytest.raises(ValueError, match="reduce the last axis"):
        stats.bootstrap((x,), np.mean)  # forgets the axis: one number for all resamples
    with pytest.raises(ValueError, match="one shape"):
        stats.bootstrap((x, x[:3]), pooled)
    with pytest.raises(ValueError, match="at least one column"):
        stats.bootstrap((), mean)
    with pytest.raises(ValueError, match="resamples"):
        stats.bootstrap((x,), mean, resamples=10)
    with pytest.raises(ValueError, match="equally many"):
        stats.ratio((x,), (x[:3],), mean, paired=True)


def test_pairing_narrows_a_ratio() -> None:
    rng = np.random.default_rng(2)
    nll, units = _text(rng, 128)
    other = nll * 1.02
    paired = stats.ratio((other, units), (nll, units), pooled, paired=True)
    apart = stats.ratio((other, units), (nll, units), pooled, paired=False)
    assert paired.value == apart.value > 1
    assert paired.low > 1 > apart.low
    assert paired.standard_error < 0.2 * apart.standard_error
    assert stats.ratio((nll, units), (nll, units), pooled, paired=True).method == "constant"
    nothing = np.zeros(10)
    assert stats.ratio((nothing + 1,), (nothing,), mean, paired=True).method == "none"


def test_ratio_of_rows_of_different_size_agrees_with_that_of_known_forms() -> None:
    rng = np.random.default_rng(3)
    a, b = _text(rng, 100), _text(rng, 140, shift=0.2)
    ratio = stats.ratio(a, b, pooled, paired=False)
    studentised = compare_terms(terms("exp-ratio", a), terms("exp-ratio", b), "ratio", paired=False)
    assert ratio.n == 100
    assert ratio.value == pytest.approx(studentised.value)
    width = studentised.high - studentised.low
    assert (ratio.low, ratio.high) == pytest.approx((studentised.low, studentised.high), abs=0.1 * width)


def test_two_rows_are_compared_by_one_arithmetic_only() -> None:
    """What a notebook imports gives the numbers of the commands."""
    assert {"compare_terms", "permutation_terms", "n_to_separate"} <= set(tsdfm_bench.results.__all__)
    gone = {"difference", "reduction_percent", "permutation_pvalue", "n_to_separate_rows", "compare"}
    assert not gone & set(tsdfm_bench.results.__all__)
    assert not any(hasattr(stats, name) for name in gone)


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(stats.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(stats.holm([0.5, 0.9]), [1.0, 1.0])
    np.testing.assert_allclose(stats.holm([0.01, math.nan, 0.02]), [0.02, math.nan, 0.02])
    assert stats.holm([]).shape == (0,)
    with pytest.raises(ValueError, match="lie in"):
        stats.holm([1.5])


def test_holm_controls_the_family() -> None:
    """Twenty true nulls: at least one claim at 5 % in about 5 % of the tables, not in 64 %."""
    rng = np.random.default_rng(5)
    tables = [stats.holm(rng.uniform(size=20)).min() <= 0.05 for _ in range(1000)]
    assert 0.03 <= np.mean(tables) <= 0.07


def test_n_to_separate_matches_the_textbook() -> None:
    """A difference of d with unit variance in both rows needs 2 (1.96 + 0.84)^2 / d^2 sequences each."""
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=4000), rng.normal(size=4000)
    a, b = (a - a.mean()) / a.std(), (b - b.mean()) / b.std() + 0.25
    textbook = 2 * (1.959964 + 0.841621) ** 2 / 0.25**2
    difference = compare_terms(terms("mean", (a,)), terms("mean", (b,)), paired=False)
    assert stats.n_to_separate(difference) == pytest.approx(textbook, rel=0.01)
    stricter = 2 * (2.575829 + 0.841621) ** 2 / 0.25**2
    assert stats.n_to_separate(difference, confidence=0.99) == pytest.approx(stricter, rel=0.01)


def test_n_to_separate_equal_rows_is_unknown() -> None:
    x = terms("mean", (np.random.default_rng(0).normal(size=20),))
    assert stats.n_to_separate(compare_terms(x, x, paired=True)) is None
    assert stats.n_to_separate(stats.bootstrap((x.a[:1],), mean)) is None
