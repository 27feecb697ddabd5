"""Entropy, repetition and cost against closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from tsdfm_bench.api import CostRecord
from tsdfm_bench.errors import UsageError
from tsdfm_bench.tasks.metrics.cost import Cost
from tsdfm_bench.tasks.metrics.entropy import Entropy, sequence_entropy
from tsdfm_bench.tasks.metrics.repetition import Repetition, distinct_n, longest_repeat


def values(found) -> dict[str, float]:
    return {m.metric: float(m.statistic(*m.columns)) if m.statistic else m.value for m in found}


def test_entropy_of_equal_tokens_is_zero_and_of_different_ones_the_log_of_the_length():
    tokens = np.stack([np.zeros(16), np.arange(16)]).astype(int)
    np.testing.assert_allclose(sequence_entropy(tokens, np.asarray([16, 16])), [0.0, math.log(16)], atol=1e-12)


def test_entropy_of_unequal_counts():
    tokens = np.asarray([[5, 5, 5, 9]])
    assert sequence_entropy(tokens, np.asarray([4]))[0] == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_entropy_ignores_what_comes_after_the_end():
    tokens = np.asarray([[1, 2, 7, 7], [1, 1, 1, 1]])
    np.testing.assert_allclose(sequence_entropy(tokens, np.asarray([2, 0])), [math.log(2), 0.0], atol=1e-12)


def test_entropy_in_nats_and_bits(make):
    found = Entropy.load({}).compute(make.cell(np.stack([np.arange(8), np.zeros(8)])))
    assert values(found) == pytest.approx({"entropy_nats": math.log(8) / 2, "entropy_bits": 1.5})
    assert [m.unit for m in found] == ["nats", "bits"]


def test_distinct_n():
    tokens = np.asarray([1, 2, 1, 2, 1])
    assert distinct_n([tokens], 1) == pytest.approx(2 / 5)
    assert distinct_n([tokens], 2) == pytest.approx(2 / 4)
    assert distinct_n([tokens], 4) == pytest.approx(2 / 2)
    assert distinct_n([tokens[:3]], 4) == 1.0  # no 4-gram: nothing is repeated


def test_longest_repeat_equals_the_definition_on_every_short_sequence():
    """Against a direct search, over all 3-symbol sequences of length 7."""
    for sequence in itertools.product(range(3), repeat=7):
        direct = 0
        for n in range(1, 7):
            grams = [sequence[i : i + n] for i in range(7 - n + 1)]
            if len(set(grams)) < len(grams):
                direct = n
        assert longest_repeat([np.asarray(sequence)]) == direct


@pytest.mark.parametrize(
    ("sequence", "longest"), [([], 0), ([3], 0), ([1, 2, 3], 0), ([4, 4], 1), ([1, 2, 3, 1, 2, 3], 3), ([7] * 6, 5)]
)
def test_longest_repeat(sequence, longest):
    assert longest_repeat([np.asarray(sequence, dtype=int)]) == longest


def test_repetition_measures_the_counted_tokens_only(make):
    tokens = np.asarray([[1, 2, 3, 4, 4, 4, 4, 4], [0, 1, 0, 1, 0, 1, 0, 1]])
    found = values(Repetition.load({}).compute(make.cell(tokens, lengths=[4, 8])))
    assert found["distinct_1"] == pytest.approx((1 + 2 / 8) / 2)
    assert found["distinct_4"] == pytest.approx((1 + 2 / 5) / 2)
    assert found["repetition_4"] == pytest.approx(1 - found["distinct_4"])
    assert found["longest_repeat"] == pytest.approx((0 + 6) / 2)
    assert found["mean_length"] == pytest.approx(6.0)


def test_cost(make):
    cost = CostRecord(64, {"denoiser": 8.0, "energy": 2.0}, {"denoiser": 7.5, "energy": 0.5}, 4.0, 10**9, 32, "cpu", 2)
    found = Cost.load({}).compute(make.cell(np.zeros((64, 4)), cost=cost))
    assert values(found) == {
        "calls/denoiser": 8.0,
        "calls/energy": 2.0,
        "sequence_calls/denoiser": 7.5,
        "sequence_calls/energy": 0.5,
        "seconds": 4.0,
        "sequences_per_second": 16.0,
        "peak_memory_bytes": 1e9,
    }
    assert all(m.n == 64 for m in found)


def test_a_reference_row_has_no_cost(make):
    assert Cost.load({}).compute(make.cell(np.zeros((4, 4)))) == []


@pytest.mark.parametrize("metric", [Entropy, Repetition, Cost])
def test_metrics_without_options_refuse_them(metric):
    with pytest.raises(UsageError, match="option"):
        metric.load({"n": 3})
