"""Schedules against their defining identities, grids against the published ones, sources against their laws."""

from __future__ import annotations

import math

import pytest
import torch

from tsdfm_bench.errors import UsageError
from tsdfm_bench.methods.core import (
    Cosine,
    Geometric,
    Grid,
    LogLinear,
    MaskSource,
    Polynomial,
    UniformSource,
    UnigramSource,
    make_schedule,
    make_source,
)
from tsdfm_bench.rng import Streams

SCHEDULES = [Polynomial(), Polynomial(2.0), LogLinear(), Geometric(), Geometric(1e-3, 1.0), Cosine()]
T = torch.linspace(0.01, 0.99, 25, dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_schedule_identities(schedule):
    assert torch.allclose(schedule.noise(T), 1 - schedule.kappa(T), atol=1e-12)
    assert torch.allclose(schedule.time_of_noise(schedule.noise(T)), T, atol=1e-9)
    assert torch.allclose(schedule.sigma(T), -schedule.kappa(T).log(), atol=1e-10)
    h = 1e-6
    slope = (schedule.kappa(T + h) - schedule.kappa(T - h)) / (2 * h)
    assert torch.allclose(schedule.kappa_rate(T), slope, rtol=1e-5, atol=1e-9)
    assert torch.allclose(schedule.rate(T), slope / schedule.noise(T), rtol=1e-5, atol=1e-9)
    # the weight of the masked NELBO, sigma' / (e^sigma - 1), is the same number as g
    assert torch.allclose(schedule.rate(T), schedule.sigma_rate(T) / torch.expm1(schedule.sigma(T)), rtol=1e-8)
    ratio = torch.log((1 - schedule.kappa(T + 0.005)) / (1 - schedule.kappa(T)))
    assert torch.allclose(schedule.log_survival(T, T + 0.005), ratio, rtol=1e-6, atol=1e-9)


def test_published_schedule_values():
    nu = torch.tensor([0.25], dtype=torch.float64)
    assert LogLinear().sigma(1 - nu).item() == pytest.approx(-math.log(1 - 0.999 * 0.25))
    assert LogLinear().rate(1 - nu).item() == pytest.approx(4.0)
    assert Geometric().sigma(1 - nu).item() == pytest.approx(1e-4**0.75 * 20**0.25)
    assert Geometric().sigma_rate(1 - nu).item() == pytest.approx(1e-4**0.75 * 20**0.25 * math.log(2e5))


def test_make_schedule():
    assert make_schedule(None, LogLinear()) == LogLinear()
    assert make_schedule("linear", LogLinear()) == Polynomial()
    assert make_schedule("log_linear", Polynomial()) == LogLinear()
    described = {"name": "geometric", "sigma_min": 1e-3, "sigma_max": 5}
    assert make_schedule(described, LogLinear()) == Geometric(1e-3, 5.0)
    with pytest.raises(UsageError, match="did you mean 'geometric'"):
        make_schedule("geometrik", LogLinear())
    with pytest.raises(UsageError, match="cannot be made"):
        make_schedule({"name": "cosine", "sigma": 1}, LogLinear())


def test_grids():
    assert list(Grid.uniform(4)) == [(0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0)]
    assert list(Grid.uniform(1)) == [(0.0, 1.0)]
    assert len(Grid.reference(1024, 1e-3)) == 1023
    assert len(Grid.reference(512, 1e-3)) == 512
    assert Grid.reference(512, 1e-3).end[-1].item() == pytest.approx(0.999)
    assert len(Grid.reference(1024)) == 1024
    assert list(Grid.reference(1, 1e-3)) == [(0.0, 0.999)]
    masked = Grid.masked(10)
    assert masked.start[0] == 0
    assert masked.end[-1].item() == pytest.approx(1 - 1e-5, abs=1e-15)
    assert torch.allclose(masked.end - masked.start, torch.full((10,), (1 - 1e-5) / 10, dtype=torch.float64))
    with pytest.raises(ValueError, match="at least one step"):
        Grid.uniform(0)


def test_loop_grid_holds_and_finishes():
    grid = Grid.loop(100)
    kinds = [grid.kind(i) for i in range(len(grid))]
    assert len(grid) == 100
    assert (kinds.count("walk"), kinds.count("hold"), kinds.count("finish")) == (45, 50, 5)
    assert torch.equal(grid.start[1:], grid.end[:-1])
    assert all(a == b == pytest.approx(0.9) for (a, b), k in zip(grid, kinds, strict=True) if k == "hold")
    assert grid.end[-1] == 1.0


@pytest.mark.parametrize(
    "source", [MaskSource(3), UniformSource(4), UnigramSource(torch.tensor([0.5, 0.0, 0.3, 0.2]))], ids=lambda s: s.name
)
def test_source_prior_and_forward_kernel(source):
    streams = Streams.of(1, "source", 4000)
    prior = source.prior(streams, 5)
    counts = torch.bincount(prior.flatten(), minlength=source.outputs).double() / prior.numel()
    assert torch.allclose(counts, source.law(), atol=0.015)
    assert (counts[source.law() == 0] == 0).all()
    # one forward step: kept with probability k, else a fresh draw from p_0
    start = torch.full((4000, 5), 2)
    noised = source.corrupt(start, 0.6, streams, step=3)
    counts = torch.bincount(noised.flatten(), minlength=source.outputs).double() / noised.numel()
    law = 0.4 * source.law()
    law[2] += 0.6
    assert torch.allclose(counts, law, atol=0.015)


def test_make_source():
    assert make_source("mask", 7).mask_id == 7
    assert make_source("mask", 7).outputs == 8
    assert make_source("uniform", 7).mask_id is None
    assert make_source("unigram", 2, torch.tensor([1.0, 3.0])).law().tolist() == [0.25, 0.75]
    with pytest.raises(UsageError, match="did you mean 'uniform'"):
        make_source("unifrom", 7)
    with pytest.raises(UsageError, match="needs token frequencies"):
        make_source("unigram", 7)
    with pytest.raises(UsageError, match="not all zero"):
        UnigramSource(torch.zeros(3))
