"""Intervals by matrix products: the definitions written out, limits, pairs, clusters, permutations."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from scipy import stats as scipy_stats

from tsdfm_bench.results import resampling
from tsdfm_bench.results.columns import FORMS, Terms, cell_columns, columns_path, read_columns, terms, write_columns
from tsdfm_bench.results.files import CorruptFile
from tsdfm_bench.results.resampling import (
    compare_many,
    compare_terms,
    intervals,
    multiplicities,
    permutation_terms,
    separation,
)

RNG = np.random.default_rng(0)
LOSS, UNITS = RNG.gamma(4.0, 1.0, 40) * 50, RNG.integers(40, 60, 40).astype(float)


def by_hand(a: np.ndarray, b: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The studentised interval of sum a / sum b, resample by resample."""
    counts = multiplicities(len(a), 2000, seed)

    def ratio_and_error(weights: np.ndarray) -> tuple[float, float]:
        r = (weights * a).sum() / (weights * b).sum()
        error = math.sqrt((weights * (a - r * b) ** 2).sum() * len(a) / (len(a) - 1)) / (weights * b).sum()
        return r, error

    r, error = ratio_and_error(np.ones(len(a)))
    t = [(x - r) / e for x, e in (ratio_and_error(w.astype(float)) for w in counts)]
    low, high = np.quantile(t, [0.025, 0.975])
    return r - high * error, r - low * error


def test_interval_is_its_definition() -> None:
    low, high = by_hand(LOSS, UNITS)
    (found,) = intervals([terms("ratio", (LOSS, UNITS))])
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-5)
    (exp,) = intervals([terms("exp-ratio", (LOSS, UNITS))])
    assert (exp.low, exp.high) == pytest.approx((math.exp(low), math.exp(high)), rel=1e-5)
    assert exp.value == pytest.approx(math.exp(LOSS.sum() / UNITS.sum()))
    low, high = by_hand(LOSS, np.ones(40))
    (mean,) = intervals([terms("mean", (LOSS,))])
    assert (mean.low, mean.high) == pytest.approx((low, high), rel=1e-5)
    assert "95 % studentised bootstrap over 40 sequences, 2000 resamples, seed 0" in mean.description


def test_equal_input_gives_equal_output_whatever_stands_beside_it() -> None:
    one, other = terms("mean", (LOSS,)), terms("exp-ratio", (LOSS, UNITS))
    alone, beside = intervals([one])[0], intervals([other, one, other])[1]
    assert (alone.value, alone.n, alone.method) == (beside.value, beside.n, beside.method)
    assert (alone.low, alone.high) == pytest.approx((beside.low, beside.high), rel=1e-6)
    assert intervals([one], seed=1)[0] != intervals([one])[0]
    scaled = intervals([terms("mean", (1e6 * LOSS,))])[0]
    assert scaled.low == pytest.approx(1e6 * intervals([one])[0].low, rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_forms_are_their_formulas(form: str) -> None:
    count = UNITS.copy()
    count[3] = 0
    loss = np.where(count > 0, LOSS, 0)
    each = loss[count > 0] / count[count > 0]
    expected = {
        "mean": loss.mean(),
        "ratio": loss.sum() / count.sum(),
        "exp-ratio": np.exp(loss.sum() / count.sum()),
        "mean-exp-ratio": np.exp(each).mean(),
        "exp-mean-ratio": np.exp(each.mean()),
    }[form]
    columns = (loss,) if form == "mean" else (loss, count)
    assert float(terms(form, columns).value()) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="takes"):
        terms(form, (loss, count, count))
    with pytest.raises(ValueError, match="unknown form"):
        terms("median", columns)


def test_what_has_no_interval_says_why() -> None:
    cases = [
        (terms("mean", (np.array([]),)), "none", "no sequences"),
        (terms("mean", (np.array([1.0]),)), "none", "one sequence has no spread"),
        (terms("mean", (np.array([1.0, math.nan]),)), "none", "the value is nan"),
        (terms("mean", (np.array([1.0, math.inf]),)), "none", "the value is inf"),
        (terms("ratio", (LOSS, 0 * UNITS)), "none", "the value is"),
        (terms("mean", (np.full(20, 3.0),)), "constant", "alike"),
    ]
    for case, method, reason in cases:
        (found,) = intervals([case])
        assert found.method == method
        assert reason in found.reason
        assert (found.low == found.high == 3.0) if method == "constant" else math.isnan(found.low)


def test_a_bad_value_does_not_spoil_its_neighbours() -> None:
    good, bad = terms("mean", (LOSS,)), terms("mean", (np.append(LOSS[1:], np.inf),))
    first, second = intervals([bad, good])
    assert first.method == "none"
    assert (second.low, second.high) == pytest.approx((intervals([good])[0].low, intervals([good])[0].high), rel=1e-6)
    huge = terms("mean-exp-ratio", (np.full(40, 1e4), np.ones(40)))
    assert intervals([huge])[0].method == "none"


def test_few_units_get_students_t() -> None:
    values = RNG.normal(3.0, 1.0, 6)
    (found,) = intervals([terms("mean", (values,))])
    low, high = scipy_stats.t.interval(0.95, 5, values.mean(), scipy_stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.description == "95 % Student t over 6 sequences"


def test_clusters_are_their_sums() -> None:
    clusters = np.repeat(np.arange(20), 2)
    (found,) = intervals([terms("ratio", (LOSS, UNITS))], clusters=clusters, over="prompts")
    summed = terms("ratio", (LOSS.reshape(20, 2).sum(1), UNITS.reshape(20, 2).sum(1)))
    (direct,) = intervals([summed])
    assert (found.low, found.high) == pytest.approx((direct.low, direct.high))
    assert "over 20 prompts (40 sequences)" in found.description


def test_paired_difference_is_the_interval_of_differences() -> None:
    other = LOSS + RNG.normal(1.0, 0.5, 40)
    a, b = terms("mean", (other,)), terms("mean", (LOSS,))
    paired = compare_terms(a, b, paired=True)
    (direct,) = intervals([terms("mean", (other - LOSS,))])
    assert (paired.low, paired.high) == pytest.approx((direct.low, direct.high), rel=1e-4)
    assert paired.value == pytest.approx(np.mean(other - LOSS))


def test_scales_agree() -> None:
    a, b = terms("exp-ratio", (LOSS, UNITS)), terms("exp-ratio", (LOSS[::-1] * 1.1, UNITS))
    for paired in (True, False):
        ratio, reduction = (compare_terms(a, b, s, paired=paired) for s in ("ratio", "reduction"))
        assert reduction.value == pytest.approx(100 * (1 - ratio.value))
        assert (reduction.low, reduction.high) == pytest.approx((100 * (1 - ratio.high), 100 * (1 - ratio.low)))
    many = compare_many([(a, b), (b, a)], "ratio", paired=False)
    assert many[0].low == pytest.approx(compare_terms(a, b, "ratio", paired=False).low)
    assert many[1].value == pytest.approx(1 / many[0].value)
    with pytest.raises(ValueError, match="equally many"):
        compare_terms(a, b.head(10), paired=True)


def test_permutations_are_exact_where_all_are_drawn() -> None:
    """Seven pairs: the share of all 128 swaps whose studentised difference is at least as large."""
    x, y = RNG.normal(0.0, 1.0, 7), RNG.normal(0.8, 1.0, 7)

    def t(d: np.ndarray) -> float:
        return abs(d.mean() / (d.std(ddof=1) / math.sqrt(7)))

    signs = np.array(list(itertools.product((1, -1), repeat=7)))
    exact = np.mean([t(s * (x - y)) >= t(x - y) - 1e-12 for s in signs])
    found = permutation_terms(terms("mean", (x,)), terms("mean", (y,)), paired=True, resamples=20_000)
    assert found == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize("paired", [True, False])
def test_permutations_are_made_in_blocks_and_are_the_same_ones(paired: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    a, b = (terms("mean", (rng.gamma(4.0, scale, 1500),)) for scale in (1.0, 1.02))
    tracemalloc.start()
    found = permutation_terms(a, b, paired=paired, resamples=3000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 3000 * a.n * 1.2  # all swaps at once, or half a split, take that much in a single array
    monkeypatch.setattr(resampling, "_ELEMENTS", 10_000)
    assert permutation_terms(a, b, paired=paired, resamples=3000) == found
    monkeypatch.setattr(resampling, "_ELEMENTS", 1 << 30)
    assert permutation_terms(a, b, paired=paired, resamples=3000) == found


def test_permutation_of_what_cannot_differ() -> None:
    same = terms("mean", (np.full(12, 2.0),))
    assert permutation_terms(same, same, paired=True) == 1.0
    assert permutation_terms(same, same, paired=False) == 1.0
    assert math.isnan(permutation_terms(same.head(1), same.head(1), paired=True))
    with pytest.raises(ValueError, match="form"):
        permutation_terms(same, terms("exp-ratio", (LOSS, UNITS)), paired=False)


def test_separation_is_welchs_test() -> None:
    x, y = RNG.normal(0.0, 1.0, 30), RNG.normal(0.5, 2.0, 50)
    expected = scipy_stats.ttest_ind(x, y, equal_var=False).pvalue
    assert separation(terms("mean", (x,)), terms("mean", (y,)), paired=False) == pytest.approx(expected, rel=1e-9)
    expected = scipy_stats.ttest_rel(x, y[:30]).pvalue
    assert separation(terms("mean", (x,)), terms("mean", (y[:30],)), paired=True) == pytest.approx(expected, rel=1e-9)


def test_columns_come_back(tmp_path) -> None:
    path = columns_path(tmp_path, "gen-ppl", "abc")
    stored = terms("exp-ratio", (LOSS, UNITS))
    clusters = np.repeat(np.arange(20), 2)
    write_columns(path, [("gen_ppl", "x", stored), ("gen_ppl/sedd", "x", Terms(stored.a, np.ones(40)))], clusters)
    read = cell_columns(tmp_path, "abc")
    assert np.array_equal(read.terms["gen_ppl", "x"].a, LOSS)
    assert read.terms["gen_ppl", "x"].exp
    assert read.terms["gen_ppl", "x"].a is read.terms["gen_ppl/sedd", "x"].a
    assert np.array_equal(read.clusters, clusters)
    assert cell_columns(tmp_path, "other").terms == {}
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CorruptFile):
        read_columns(path)
