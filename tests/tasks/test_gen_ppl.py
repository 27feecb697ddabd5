"""Every generative-perplexity convention against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tsdfm_bench.errors import UsageError
from tsdfm_bench.tasks.metrics.gen_ppl import CONVENTIONS, BitsPerByte, GenPPL, count_mdlm

# Two texts: four units with an end-of-text in third place and one in fourth, and two plain units.
NLL = [[1.0, 2.0, 3.0, 5.0], [0.5, 1.5]]
SPECIAL = [[False, False, True, True], [False, False]]

EXPECTED = {
    # all six units: sum 13
    "pooled": math.exp(13 / 6),
    "mean-of-sequences": (math.exp(11 / 4) + math.exp(2 / 2)) / 2,
    # text 1: units 2 and 3 (first end-of-text counts, second does not, first unit never); text 2: unit 2
    "mdlm": math.exp((2 + 3 + 1.5) / 3),
    "sedd": (math.exp(11 / 4) + math.exp(1)) / 2,
    "sdtt": math.exp((11 / 4 + 1) / 2),
    # text 1 without its two end-of-texts: 1 + 2 over 2
    "bd3": (math.exp(3 / 2) + math.exp(1)) / 2,
    "flow-matching": (math.exp(10 / 3) + math.exp(1.5)) / 2,
}


def value(measurement) -> float:
    return float(measurement.statistic(*measurement.columns))


@pytest.fixture
def cell(make):
    return make.cell(np.zeros((2, 4)), scores={"judge": make.scores(NLL, SPECIAL, size=[10, 3])})


@pytest.mark.parametrize("name", sorted(CONVENTIONS))
def test_convention_equals_the_hand_computed_value(cell, name):
    (measurement,) = GenPPL.load({"conventions": name}).compute(cell)
    assert value(measurement) == pytest.approx(EXPECTED[name], rel=1e-6)
    assert measurement.metric == ("gen_ppl" if name == "pooled" else f"gen_ppl/{name}")
    assert measurement.unit == "perplexity"
    assert measurement.better == "lower"


def test_all_conventions_are_measured_by_default_and_pooled_is_the_plain_name(cell):
    found = {m.metric: value(m) for m in GenPPL.load({}).compute(cell)}
    assert len(found) == len(EXPECTED)
    assert found["gen_ppl"] == pytest.approx(EXPECTED["pooled"], rel=1e-6)


def test_tsdfm_is_another_name_of_flow_matching(cell):
    (measurement,) = GenPPL.load({"conventions": "tsdfm"}).compute(cell)
    assert measurement.metric == "gen_ppl/flow-matching"


def test_unknown_convention_names_the_nearest():
    with pytest.raises(UsageError, match="'mdlm'"):
        GenPPL.load({"conventions": "mdml"})


def test_unknown_option_is_refused():
    with pytest.raises(UsageError, match="conventions"):
        GenPPL.load({"convention": "mdlm"})


@pytest.mark.parametrize("name", sorted(CONVENTIONS))
def test_statistics_are_vectorised_over_leading_axes(cell, name):
    """A bootstrap passes resampled columns (resamples, n) and wants one value for each."""
    (measurement,) = GenPPL.load({"conventions": name}).compute(cell)
    rows = np.asarray([[0, 1], [1, 1], [0, 0]])
    values = measurement.statistic(*(column[rows] for column in measurement.columns))
    one_by_one = [measurement.statistic(*(column[row] for column in measurement.columns)) for row in rows]
    assert values.shape == (3,)
    np.testing.assert_allclose(values, one_by_one)


@pytest.mark.parametrize(
    ("special", "counted"),
    [
        ([0, 0, 0], [0, 1, 1]),  # no end-of-text: all but the first
        ([0, 1, 1, 0], [0, 1, 0, 1]),  # text after the first end-of-text counts, further ends do not
        ([1, 0, 1, 1], [0, 1, 0, 0]),  # a row that begins with end-of-text: no later one counts
        ([1], [0]),
        ([], []),
    ],
)
def test_mdlm_counts_the_first_end_of_text_only(special, counted):
    np.testing.assert_array_equal(count_mdlm(np.asarray(special, dtype=bool)), np.asarray(counted, dtype=bool))


def test_sequences_without_a_counted_unit_are_left_out_of_means(make):
    cell = make.cell(np.zeros((2, 4)), scores={"s": make.scores([[2.0, 3.0], [7.0]], [[False, False], [True]])})
    found = {m.metric: value(m) for m in GenPPL.load({}).compute(cell)}
    assert found["gen_ppl/bd3"] == pytest.approx(math.exp(2.5))  # the second text is one end-of-text
    assert found["gen_ppl/flow-matching"] == pytest.approx(math.exp(3.0))  # and has no second unit


def test_texts_that_are_all_empty_have_no_value_and_warn_of_nothing(make, recwarn):
    cell = make.cell(np.zeros((2, 4)), scores={"s": make.scores([[], []], size=[0, 0])})
    for measurement in [*GenPPL.load({}).compute(cell), *BitsPerByte.load({}).compute(cell)]:
        assert math.isnan(value(measurement))
        assert "empty" in measurement.reason
    assert not recwarn.list


def test_mean_of_perplexities_exceeds_perplexity_of_the_mean(cell):
    """Jensen's inequality, between conventions that count the same units."""
    found = {m.metric: value(m) for m in GenPPL.load({}).compute(cell)}
    assert found["gen_ppl/mean-of-sequences"] > found["gen_ppl/sdtt"]


def test_bits_per_byte(cell):
    (measurement,) = BitsPerByte.load({}).compute(cell)
    assert value(measurement) == pytest.approx(13 / math.log(2) / 13)
    assert measurement.unit == "bits/byte"


def test_bits_per_byte_of_a_uniform_byte_model_is_eight(make):
    nll = [[math.log(256)] * 5, [math.log(256)] * 9]
    cell = make.cell(np.zeros((2, 4)), scores={"s": make.scores(nll, size=[5, 9])})
    assert value(BitsPerByte.load({}).compute(cell)[0]) == pytest.approx(8.0)


def test_definitions_say_what_was_done(cell):
    for measurement in [*GenPPL.load({}).compute(cell), *BitsPerByte.load({}).compute(cell)]:
        for part in ("Title of judge", "float32", "window 8 stride 4", "<s> before the text", "interval"):
            assert part in measurement.definition


def test_one_measurement_per_scorer(make):
    scores = {"a": make.scores([[1.0]]), "b": make.scores([[2.0]])}
    cell = make.cell(np.zeros((1, 4)), scores=scores)
    found = GenPPL.load({"conventions": "pooled"}).compute(cell)
    assert {m.scorer: value(m) for m in found} == pytest.approx({"a": math.e, "b": math.e**2})
