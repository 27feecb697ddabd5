"""Every kind of interval covers the truth as often as it says, on laws whose truth is known.

2,000 data sets per law; a 95 % interval must cover in 93 to 97 % of them (the Monte-Carlo error of that share is 0.5
points). The laws are those of generated text: sums of skewed token losses, heavy-tailed perplexities of single
sequences, rare repetitions, prompts with several continuations, rows that share prompts, training seeds.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from tsdfm_bench.results.columns import Terms, terms
from tsdfm_bench.results.resampling import compare_many, intervals, permutation_terms
from tsdfm_bench.results.stats import Interval, bootstrap

REPEATS = 2000
LOW, HIGH = 0.93, 0.97

Law = Callable[[np.random.Generator, int], tuple[list[Terms], float]]


def covered(found: Sequence[Interval], truth: float) -> float:
    """Share of intervals that hold the truth."""
    return float(np.mean([interval.low <= truth <= interval.high for interval in found]))


def skewed_losses(rng: np.random.Generator, n: int) -> tuple[list[Terms], float]:
    """Pooled perplexity: gamma losses per token, sequences of 40 to 64 units."""
    rate = rng.gamma(6.0, 4.5 / 6, (REPEATS, n))
    units = rng.integers(40, 65, (REPEATS, n)).astype(float)
    return [terms("exp-ratio", (r * u, u)) for r, u in zip(rate, units, strict=True)], float(np.exp(4.5))


def heavy_perplexities(rng: np.random.Generator, n: int) -> tuple[list[Terms], float]:
    """Mean of per-sequence perplexities, log-normal with a coefficient of variation of 0.53."""
    loss = rng.normal(4.5, 0.5, (REPEATS, n))
    units = np.full(n, 64.0)
    return [terms("mean-exp-ratio", (x * units, units)) for x in loss], float(np.exp(4.5 + 0.125))


def mean_losses(rng: np.random.Generator, n: int) -> tuple[list[Terms], float]:
    """exp of the mean loss: gamma losses."""
    loss = rng.gamma(6.0, 0.75, (REPEATS, n))
    return [terms("exp-mean-ratio", (64 * x, np.full(n, 64.0))) for x in loss], float(np.exp(4.5))


def entropies(rng: np.random.Generator, n: int) -> tuple[list[Terms], float]:
    """Mean entropy: bounded above, skewed to the left."""
    values = 4.1 - rng.gamma(2.0, 0.1, (REPEATS, n))
    return [terms("mean", (x,)) for x in values], 3.9


def bits_per_byte(rng: np.random.Generator, n: int) -> tuple[list[Terms], float]:
    """Ratio of two sums that go together."""
    size = rng.gamma(20.0, 12.0, (REPEATS, n))
    bits = size * rng.gamma(8.0, 2.0 / 8, (REPEATS, n))
    return [terms("ratio", pair) for pair in zip(bits, size, strict=True)], 2.0


@pytest.mark.parametrize("law", [skewed_losses, heavy_perplexities, mean_losses, entropies, bits_per_byte])
@pytest.mark.parametrize("n", [32, 128, 512])
def test_one_value(law: Law, n: int) -> None:
    data, truth = law(np.random.default_rng(n), n)
    assert LOW <= covered(intervals(data), truth) <= HIGH


@pytest.mark.parametrize(("n", "share"), [(64, 0.2), (256, 0.05)])
def test_rare_events(n: int, share: float) -> None:
    rng = np.random.default_rng(5)
    values = (rng.random((REPEATS, n)) < share) * rng.exponential(0.1, (REPEATS, n))
    found = intervals([terms("mean", (x,)) for x in values])
    assert 0.92 <= covered(found, 0.1 * share) <= 0.98  # thirteen events on average: no interval does better
    assert all(interval.low >= 0 for interval in found)


@pytest.mark.parametrize("events", [1, 2, 3])
def test_a_few_events_have_no_absurd_ends(events: int) -> None:
    """Resamples without any event have no spread; what rounding leaves of it must not be divided by."""
    values = np.zeros(128)
    values[:events] = 6.0
    (found,) = intervals([terms("mean", (values,))])
    assert 0 <= found.low < found.value < found.high < 1.0


def test_few_sequences() -> None:
    rng = np.random.default_rng(6)
    values = rng.normal(3.9, 0.1, (REPEATS, 6))
    assert LOW <= covered(intervals([terms("mean", (x,)) for x in values]), 3.9) <= HIGH


def pairs(n: int, shared: float) -> list[tuple[Terms, Terms]]:
    """Rows with mean losses 4 and 4.5, whose sequences share a part of their difficulty."""
    rng = np.random.default_rng(n)
    made = []
    for _ in range(REPEATS):
        common = shared * rng.gamma(4.0, 0.15, n)
        units = rng.integers(40, 65, (2, n)).astype(float)
        losses = [4.0 + common + rng.gamma(4.0, 0.15, n), 4.5 + common + rng.gamma(4.0, 0.15, n)]
        made.append((Terms(losses[0] * units[0], units[0], True), Terms(losses[1] * units[1], units[1], True)))
    return made


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("n", [32, 128])
def test_two_values(n: int, paired: bool) -> None:
    rows = pairs(n, shared=1.0 if paired else 0.0)
    low, high = np.exp(4.6 + 0.6 * paired), np.exp(5.1 + 0.6 * paired)
    assert LOW <= covered(compare_many(rows, "difference", paired=paired), low - high) <= HIGH
    assert LOW <= covered(compare_many(rows, "ratio", paired=paired), low / high) <= HIGH
    found = compare_many(rows, "reduction", paired=paired)
    assert LOW <= covered(found, 100 * (1 - low / high)) <= HIGH


def test_pairing_narrows_and_ignoring_it_overcovers() -> None:
    rows = pairs(64, shared=1.0)
    width = [np.mean([i.high - i.low for i in compare_many(rows[:200], paired=p)]) for p in (True, False)]
    assert width[0] < 0.9 * width[1]
    assert covered(compare_many(rows, "ratio", paired=False), np.exp(-0.5)) > HIGH


@pytest.mark.parametrize("prompts", [24, 96])
def test_prompts_with_several_continuations(prompts: int) -> None:
    rng = np.random.default_rng(prompts)
    clusters = np.repeat(np.arange(prompts), 4)
    data = []
    for _ in range(REPEATS):
        units = rng.integers(40, 65, 4 * prompts).astype(float)
        loss = np.repeat(rng.gamma(8.0, 0.45, prompts), 4) + rng.gamma(4.0, 0.1, 4 * prompts)
        data.append(terms("exp-ratio", (loss * units, units)))
    assert LOW <= covered(intervals(data, clusters=clusters, over="prompts"), np.exp(4.0)) <= HIGH
    assert covered(intervals(data), np.exp(4.0)) < 0.8  # sequences are not independent: this is what clusters repair


@pytest.mark.parametrize("between", [0.0, 0.1])
def test_training_seeds_as_second_level(between: float) -> None:
    rng = np.random.default_rng(3)
    seeds, n = 4, 64
    clusters = np.repeat(np.arange(seeds), n)
    data = []
    for _ in range(REPEATS):
        loss = np.repeat(rng.normal(4.0, between, seeds), n) + rng.gamma(4.0, 0.1, seeds * n) - 0.4
        data.append(terms("exp-ratio", (loss, np.ones(seeds * n))))
    assert LOW <= covered(intervals(data, clusters=clusters, over="training seeds"), np.exp(4.0)) <= HIGH


def test_any_other_statistic() -> None:
    """BCa with levels widened for small n, through SciPy: a ratio of means as an unknown function."""
    rng = np.random.default_rng(8)
    found = []
    for _ in range(400):
        a, b = rng.gamma(4.0, 0.5, 48), rng.gamma(9.0, 0.2, 48)
        found.append(bootstrap((a, b), lambda x, y: x.mean(-1) / y.mean(-1)))
    assert 0.925 <= covered(found, 2.0 / 1.8) <= 0.975  # 400 data sets: a standard error of 1.1 points


LAWS = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "coverage.py"))["LAWS"]
SLOW_OR_TIED = ("BCa", "three, equal", "given corner", "n = 32")


@pytest.mark.parametrize("name", [name for name in LAWS if not any(part in name for part in SLOW_OR_TIED)])
def test_what_is_read_off_replicates(name: str) -> None:
    """Curves at an entropy or a cost, dominated areas, reductions: laws of the benchmark, with fewer resamples."""
    rng = np.random.default_rng(9)
    hits = [found.low <= truth <= found.high for found, truth in LAWS[name](rng, REPEATS, 200)]
    assert LOW <= np.mean(hits) <= HIGH


@pytest.mark.parametrize("paired", [True, False])
def test_permutation_test_keeps_its_level(paired: bool) -> None:
    """Equal perplexities, unequal spreads and sizes: 5 % false alarms."""
    rng = np.random.default_rng(10)
    hits = 0
    for k in range(REPEATS):
        common = rng.normal(0, 0.3, 40) if paired else np.zeros(40)
        a = 4.0 + common + rng.normal(0, 0.2, 40)
        b = (4.0 + common + rng.normal(0, 0.4, 40)) if paired else 4.0 + rng.normal(0, 0.5, 80)
        one, two = (Terms(x * 50, np.full(len(x), 50.0), True) for x in (a, b))
        hits += permutation_terms(one, two, paired=paired, seed=k, resamples=199) <= 0.05
    assert 0.035 <= hits / REPEATS <= 0.065
