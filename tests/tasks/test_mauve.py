"""MAUVE through the package on features of ours: its ends, its conditions, and what is said about it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tsdfm_bench.errors import UsageError
from tsdfm_bench.tasks.metrics.mauve import Mauve


def features(n: int, shift: float = 0.0, seed: int = 0, width: int = 8) -> np.ndarray:
    points = np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)
    points[:, 0] += shift
    return points


@pytest.fixture
def side(make):
    """A cell with features, and token rows that differ by `seed`."""

    def build(values: np.ndarray, seed: int = 0, length: int = 6, names: tuple[str, ...] = ("judge",), **others):
        n = len(values)
        tokens = np.random.default_rng(seed).integers(0, 50, (n, length))
        scores = {name: make.scores([[1.0]] * n, features=values) for name in names}
        infos = {name: make.info(name, features="mean of states") for name in names}
        return make.cell(tokens, scores=scores, infos=infos, **others)

    return build


@pytest.fixture(scope="module")
def metric() -> Mauve:
    return Mauve.load({"redo": 1, "iterations": 50, "seeds": 3})


def test_equal_distributions_are_near_one_and_disjoint_ones_near_zero(side, metric, capfd):
    real = side(features(200, seed=1), seed=1)
    same = metric.compute(side(features(200, seed=2), seed=2, reference=real))[0]
    far = metric.compute(side(features(200, shift=40.0, seed=3), seed=3, reference=real))[0]
    identical = metric.compute(side(features(200, seed=1), seed=4, reference=real))[0]
    assert identical.value == pytest.approx(1.0, abs=1e-3)
    assert same.value > 0.85
    assert far.value < 0.05
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "WARNING" not in shown.err


def test_low_and_high_are_the_range_over_seeds(side, metric):
    real = side(features(100, seed=1), seed=1)
    found = metric.compute(side(features(100, shift=1.5, seed=2), seed=2, reference=real))[0]
    values = metric.values(features(100, shift=1.5, seed=2), features(100, seed=1))
    assert len(values) == 3
    assert found.value == pytest.approx(np.mean(values))
    assert (found.low, found.high) == (min(values), max(values))
    assert found.low < found.high  # k-means seeds matter at this n: why several are needed
    for part in ("3 k-means seeds", "minimum and maximum", "n = 100", "Title of judge", "mean of states", "settings "):
        assert part in found.definition


def test_the_settings_hash_follows_the_settings(side, metric):
    cell = side(features(60, seed=2), seed=2, reference=side(features(60, seed=1), seed=1))

    def digest(other: Mauve) -> str:
        return other.compute(cell)[0].definition.rpartition(" ")[2]

    assert digest(metric) == digest(metric)
    assert digest(metric) != digest(Mauve.load({"redo": 1, "iterations": 50, "seeds": 3, "scaling": 2}))


def test_the_row_of_real_text_is_compared_with_other_real_text(side, metric):
    real = side(features(100, seed=1), seed=1)
    other = side(features(100, seed=5), seed=5)
    row = side(features(100, seed=1), seed=1, reference=real, other=other)
    found = metric.compute(row)[0]
    assert found.value == pytest.approx(np.mean(metric.values(features(100, seed=1), features(100, seed=5))))
    assert "other held-out real text" in found.definition


def test_the_largest_scorer_with_features_is_used(make, side, metric):
    names = ("small", "large")
    real = side(features(60, seed=1), seed=1, names=names)
    cell = side(features(60, seed=2), seed=2, names=names, reference=real)
    cell.scorer_info["large"] = make.info("large", parameters=7, features="f")
    cell.scores["characters"] = make.scores([[1.0]] * 60)
    cell.scorer_info["characters"] = make.info("characters", parameters=99)
    assert [m.scorer for m in metric.compute(cell)] == ["large"]


@pytest.mark.parametrize(
    ("n", "m", "length", "reason"),
    [(60, 80, 6, "equal numbers"), (60, 60, 7, "of 7 tokens against real text of 6"), (20, 20, 6, "too few")],
)
def test_unequal_or_too_few_samples_are_a_reason(side, metric, n, m, length, reason):
    real = side(features(m, seed=1), seed=1)
    (found,) = metric.compute(side(features(n, seed=2), seed=2, length=length, reference=real))
    assert math.isnan(found.value)
    assert reason in found.reason


def test_what_was_given_is_no_merit(side, metric):
    """Features are of the whole text, whose beginning generated and real text share after a prompt."""
    real = side(features(200, seed=1), seed=1)
    given = replace(side(features(200, seed=2), seed=2, reference=real), prompt=np.zeros((200, 3), dtype=int))
    (found,) = metric.compute(given)
    assert np.isnan(found.value)
    assert "what was given" in found.reason


def test_a_failure_of_the_package_is_a_reason(side, metric, monkeypatch):
    def fail(*_args):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(metric, "values", fail, raising=False)
    real = side(features(60, seed=1), seed=1)
    (found,) = metric.compute(side(features(60, seed=2), seed=2, reference=real))
    assert math.isnan(found.value)
    assert "out of luck" in found.reason


def test_without_features_or_reference_there_is_no_row(make, side, metric):
    plain = make.cell(np.zeros((60, 6)), scores={"s": make.scores([[1.0]] * 60)})
    real = side(features(60, seed=1), seed=1)
    assert metric.compute(side(features(60, seed=2), seed=2)) == []
    assert metric.compute(make.cell(np.ones((60, 6)), scores=plain.scores, reference=real)) == []


def test_fewer_than_three_seeds_are_refused():
    with pytest.raises(UsageError, match="at least 3"):
        Mauve.load({"seeds": 2})
