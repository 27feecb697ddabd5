"""Frontiers: curves found, read as SciPy reads them, refused outside what was measured, intervals from replicates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.interpolate import PchipInterpolator
from scipy.optimize import isotonic_regression

from tsdfm_bench.results import schema
from tsdfm_bench.results.arrays import write_scores
from tsdfm_bench.results.columns import columns_path, terms, write_columns
from tsdfm_bench.results.frontier import (
    OutOfRange,
    area,
    at_entropy,
    corner,
    dominated_area,
    expenses,
    frontiers,
    isotonic,
    read_curve,
)
from tsdfm_bench.results.replicates import Replicates, interval
from tsdfm_bench.results.store import RunFolder

Make = Callable[..., list[dict[str, Any]]]


def sweep(cell: Make) -> list[dict[str, Any]]:
    """Two generators over temperatures, one alone, real text and a canary."""
    rows: list[dict[str, Any]] = []
    for k, temperature in enumerate((0.7, 0.85, 1.0, 1.2)):
        settings: dict[str, Any] = {"source": "mask", "steps": 8, "temperature": temperature, "calls": 8}
        rows += cell("mdlm", {"s": 40.0 * 1.3**k}, 3.6 + 0.1 * k, cell=f"m{k}", **settings)
        rows += cell("dfm", {"s": 30.0 * 1.3**k}, 3.6 + 0.1 * k, cell=f"d{k}", **(settings | {"source": "uniform"}))
    rows += cell("ar", {"s": 20.0}, 3.7, steps=None, calls=64)
    rows += cell("real", {"s": 25.0}, 3.75, kind="reference")
    return rows + cell("unigram", {"s": 300.0}, 3.95, kind="reference")


def test_curves_of_a_summary(cell: Make) -> None:
    (found,) = frontiers(schema.from_rows(sweep(cell)))
    assert [(c.name, len(c.points)) for c in found.curves] == [
        ("mdlm mask, 8 steps", 4),
        ("dfm uniform, 8 steps", 4),
        ("ar", 1),
    ]
    assert found.real is not None
    assert found.real.entropy["value"] == 3.75
    assert [p.cell.first["method"] for p in found.canaries] == ["unigram"]
    assert found.curves[0].range == (3.6, pytest.approx(3.9))
    assert frontiers(schema.from_rows(sweep(cell)), scorer="other") == []


def test_nucleus_sweeps_and_seeds_are_curves_of_their_own(cell: Make) -> None:
    rows: list[dict[str, Any]] = []
    for seed in (0, 1):
        for k, mass in enumerate((0.8, 0.9, None)):
            rule = {"top_p_rule": "inclusive"} if mass else {}
            rows += cell(
                "mdlm", {"s": 40.0 + k}, 3.6 + k / 10, cell=f"{seed}{k}", seed=seed, top_p=mass, steps=8, **rule
            )
    (found,) = frontiers(schema.from_rows(rows))
    assert [(c.sweep, c.name, len(c.points)) for c in found.curves] == [
        ("nucleus", "mdlm, 8 steps, seed 0", 3),
        ("nucleus", "mdlm, 8 steps, seed 1", 3),
    ]


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_reading_is_scipys(k: int) -> None:
    rng = np.random.default_rng(k)
    for _ in range(50):
        x, y = rng.normal(size=k), rng.normal(size=k)
        order = np.argsort(x)
        fit = isotonic_regression(y[order]).x
        assert isotonic(y[order][:, None])[:, 0] == pytest.approx(fit)
        at = rng.uniform(x.min(), x.max(), 4)
        expected = PchipInterpolator(x[order], fit)(at) if k > 1 else np.repeat(fit, 4)
        assert read_curve(x, np.exp(y), at) == pytest.approx(np.exp(expected), rel=1e-6)
    many = rng.normal(size=(2, k, 7))
    one_by_one = [read_curve(many[0][:, i], np.exp(many[1][:, i]), 0.1) for i in range(7)]
    assert read_curve(many[0], np.exp(many[1]), 0.1) == pytest.approx(np.array(one_by_one))


def test_reading_passes_through_monotone_points_and_never_falls() -> None:
    x, y = np.array([3.6, 3.7, 3.8]), np.array([30.0, 50.0, 40.0])
    read = read_curve(x, y, np.linspace(3.6, 3.8, 50))
    assert read[0] == pytest.approx(30.0)
    assert read[-1] == pytest.approx(math.sqrt(50 * 40))
    assert (np.diff(read) >= -1e-9).all()
    assert float(read_curve(np.array([3.6, 3.6, 3.8]), np.array([30.0, 32.0, 40.0]), 3.8)) == pytest.approx(40.0)


def test_value_at_real_entropy_with_its_interval(cell: Make) -> None:
    summary = schema.from_rows(sweep(cell))
    (found,) = frontiers(summary)
    assert found.real is not None
    replicates = Replicates(summary)
    exact = at_entropy(found.curves[0], 3.7, replicates)
    assert exact.value == pytest.approx(52.0)
    assert exact.low < 52.0 < exact.high
    at_real = at_entropy(found.curves[0], found.real, replicates)
    assert at_real.high - at_real.low > exact.high - exact.low  # real text is only known so well
    assert at_entropy(found.curves[0], 3.7, Replicates(summary)) == exact
    assert exact.method == "bias-corrected"


@pytest.mark.parametrize(("target", "word"), [(3.5, "lower temperatures"), (4.0, "higher temperatures")])
def test_nothing_is_extrapolated(cell: Make, target: float, word: str) -> None:
    summary = schema.from_rows(sweep(cell))
    (found,) = frontiers(summary)
    with pytest.raises(OutOfRange, match=rf"outside what was measured, 3\.600 to 3\.900.*{word}") as caught:
        at_entropy(found.curves[0], target, Replicates(summary))
    assert (caught.value.low, caught.value.high) == (3.6, pytest.approx(3.9))
    with pytest.raises(OutOfRange, match=r"one point at 3\.700"):
        at_entropy(found.curves[2], target, Replicates(summary))


def test_area_is_the_union_of_rectangles() -> None:
    worst = (3.0, math.exp(2.0))
    x, y = np.array([3.5, 3.2, 2.9, 3.4]), np.exp(np.array([1.0, 0.5, 0.0, 3.0]))
    assert area(x, y, worst) == pytest.approx(0.2 * 1.5 + 0.3 * 1.0)
    assert area(x[:1], y[:1], worst) == pytest.approx(0.5)
    assert area(x[2:], y[2:], worst) == 0.0


def test_the_better_generator_dominates_more(cell: Make) -> None:
    summary = schema.from_rows(sweep(cell))
    (found,) = frontiers(summary)
    worst, replicates = corner(found), Replicates(summary)
    assert worst == (3.5, 97.0)  # 3.6 nats and 87.9, a step outside, in round numbers
    mdlm, dfm = (dominated_area(curve, worst, replicates) for curve in found.curves[:2])
    assert dfm.low > mdlm.value


def test_equal_calls_and_seconds(cell: Make) -> None:
    rows = [
        row
        for k, steps in enumerate((8, 32, 128))
        for row in cell("mdlm", {"s": 90.0 / 1.5**k}, 3.8, cell=str(k), steps=steps, calls=steps)
    ]
    summary = schema.from_rows(rows)
    (found,) = frontiers(summary)
    (line,) = expenses(found)
    assert line.costs == (8, 32, 128)
    assert line.at(32, Replicates(summary)).value == pytest.approx(60.0)
    assert 60 < line.at(16, Replicates(summary)).value < 90
    with pytest.raises(OutOfRange, match="8 to 128"):
        line.at(4, Replicates(summary))
    (line,) = expenses(found, "seconds")
    assert line.costs[0] == pytest.approx(1 / 41.3)


def test_step_counts_of_equal_calls_are_all_there_and_read_as_their_mean(cell: Make) -> None:
    """First-hitting samplers make one call per token, whatever the steps; a point on two curves counts once."""
    rows: list[dict[str, Any]] = []
    for steps, calls, ppl in ((1024, 64, 60.0), (8, 64, 90.0), (64, 64, 50.0), (4, 4, 120.0)):
        rows += cell("mdlm", {"s": ppl}, 3.8, cell=str(steps), steps=steps, calls=calls)
    rows += cell("mdlm", {"s": 40.0}, 3.6, cell="cool", steps=8, calls=64, temperature=0.7)
    rows += cell("mdlm", {"s": 40.0}, 3.6, cell="cut", steps=8, calls=64, top_p=0.9, top_p_rule="inclusive")
    summary = schema.from_rows(rows)
    (found,) = frontiers(summary)
    (line,) = expenses(found)
    assert line.costs == (4, 64, 64, 64)
    assert [point.cell.first["steps"] for point in line.points] == [4, 8, 64, 1024]
    replicates = Replicates(summary)
    assert line.at(64, replicates).value == pytest.approx((90 * 50 * 60) ** (1 / 3))
    assert line.at(4, replicates).value == pytest.approx(120.0)
    (one_cost,) = expenses(frontiers(summary[summary["steps"] != 4])[0])
    assert one_cost.at(64, replicates).value == pytest.approx((90 * 50 * 60) ** (1 / 3))


def test_replicates_come_from_columns_where_they_are_the_value(cell: Make, tmp_path) -> None:
    rng = np.random.default_rng(0)
    loss = rng.gamma(4.0, 1.0, 256)
    stored = terms("exp-ratio", (loss, np.ones(256)))
    rows = cell("mdlm", {"s": float(stored.value())}, 3.8, cell="a", steps=8)
    rows += cell("dfm", {"s": 50.0}, 3.8, cell="b", steps=8)
    summary = schema.from_rows(rows)
    write_columns(columns_path(tmp_path, "gen-ppl", "a"), [("gen_ppl/pooled", "s", stored)])
    write_columns(columns_path(tmp_path, "gen-ppl", "b"), [("gen_ppl/pooled", "s", stored)])
    replicates = Replicates(summary, tmp_path)
    assert replicates.how("a", "gen_ppl/pooled", "s") == "sequences"
    assert replicates.how("b", "gen_ppl/pooled", "s") == "interval"  # stored columns of another value are not believed
    assert replicates.how("a", "sequences_per_second") in ("interval", "constant")
    redrawn = replicates.of("a", "gen_ppl/pooled", "s")
    expected = float(stored.value()) * loss.std() / 16
    assert redrawn.std() == pytest.approx(expected, rel=0.1)
    assert np.array_equal(redrawn, Replicates(summary, tmp_path).of("a", "gen_ppl/pooled", "s"))


@pytest.mark.parametrize("older", [False, True])
def test_replicates_come_from_scores_where_there_are_no_columns(cell: Make, tmp_path, older: bool) -> None:
    """Also in folders of an older version, where cells lie side by side."""
    rng = np.random.default_rng(0)
    nll = [rng.gamma(4.0, 1.0, 20) for _ in range(64)]
    rows = cell("mdlm", {"hf:org/s": float(np.exp(np.concatenate(nll).mean()))}, 3.8, cell="abc", steps=8, n=64)
    (tmp_path / "cells" / ("abc" if older else "ab")).mkdir(parents=True)
    path = RunFolder(tmp_path).scores_path("hf:org/s", "abc")
    assert (path.parent.name == "ab") is not older
    units = [np.arange(20)] * 64
    write_scores(path, nll, units, [np.zeros(20, dtype=bool)] * 64, [80] * 64)
    assert Replicates(schema.from_rows(rows), tmp_path).how("abc", "gen_ppl/pooled", "hf:org/s") == "sequences"


def test_cells_with_the_same_prompts_are_resampled_together(cell: Make, tmp_path) -> None:
    rng = np.random.default_rng(0)
    loss = rng.gamma(4.0, 1.0, 256)
    stored = terms("exp-ratio", (loss, np.ones(256)))
    summary = schema.from_rows(
        [
            row
            for name in "ab"
            for row in cell("mdlm", {"s": float(stored.value())}, 3.8, cell=name, prefix="held-out 8")
        ]
    )
    for name in "ab":
        write_columns(columns_path(tmp_path, "gen-ppl", name), [("gen_ppl/pooled", "s", stored)])
    replicates = Replicates(summary, tmp_path)
    a, b = (replicates.of(name, "gen_ppl/pooled", "s") for name in "ab")
    assert np.array_equal(a, b)


def test_interval_of_replicates() -> None:
    rng = np.random.default_rng(0)
    found = interval(0.0, rng.normal(size=20_000))
    assert (found.low, found.high) == pytest.approx((-1.96, 1.96), abs=0.05)
    assert interval(0.0, rng.normal(size=2000), n=5).high > 2.5  # few sequences: wider
    assert interval(math.nan, np.zeros(200)).reason == "the value is nan"
    assert "has no interval" in interval(1.0, np.full(200, np.nan)).reason
    assert "100 of 200 resamples are not finite" in interval(1.0, np.repeat([np.nan, 1.0], 100)).reason
    assert "same side" in interval(5.0, rng.normal(size=2000)).reason
    assert interval(2.0, np.full(200, 2.0)).method == "constant"
