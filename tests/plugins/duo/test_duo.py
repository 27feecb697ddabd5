"""DUO: the law of one, two and three steps, and of the tails, by multiplying transition matrices."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from tsdfm_bench_duo import DUO, UniformPosteriorKernel

from tsdfm_bench.methods.toolkit import Grid, Polynomial, Posterior, State, UniformSource, run
from tsdfm_bench.rng import Streams

V, LENGTH, ROWS = 3, 2, 10_000
STATES = list(itertools.product(range(V), repeat=LENGTH))


def posterior_row(f: np.ndarray, i: int, a: float, b: float) -> np.ndarray:
    """q(y) as the paper has it, with its own normaliser, of p = f without the evidence of the token itself."""
    r = a / b
    p = f / np.where(np.arange(V) == i, a + (1 - a) / V, (1 - a) / V)
    p = p / p.sum()
    q = (b - a) * p + (1 - r) * (1 - b) / V
    q[i] += a * V * p[i] + r - a
    q /= a * V * p[i] + 1 - a
    assert q.sum() == pytest.approx(1.0)
    return q


def exact_law(denoiser, times: list[float], tail: str) -> dict[tuple[int, ...], float]:
    """Law after the steps through `times` and the tail, from the uniform prior."""
    law = dict.fromkeys(STATES, 1 / len(STATES))
    pairs = [(a, b, "step") for a, b in itertools.pairwise(times)]
    if tail != "none":
        pairs.append((times[-1], 1.0, tail))
    for a, b, kind in pairs:
        following = dict.fromkeys(STATES, 0.0)
        for z, mass in law.items():
            p = denoiser.probabilities(z, a)
            if kind == "greedy":
                following[tuple(int(row.argmax()) for row in p)] += mass
                continue
            rows = [posterior_row(p[place], z[place], a, b) for place in range(LENGTH)]
            for y in STATES:
                following[y] += mass * math.prod(row[token] for row, token in zip(rows, y, strict=True))
        law = following
    return law


@pytest.mark.parametrize("tail", ["none", "ancestral", "greedy"])
@pytest.mark.parametrize("times", [[0.0, 0.4], [0.0, 0.3, 0.8], [0.0, 0.2, 0.5, 0.9]], ids=["1", "2", "3"])
def test_the_law_of_the_walk(lab, times: list[float], tail: str) -> None:
    denoiser = lab.TableDenoiser(V, V, seed=1)
    kernel = UniformPosteriorKernel(Posterior(denoiser, Polynomial()), tail)
    state = State.start(UniformSource(V), Streams.of(2, f"{tail} {len(times)}", ROWS), LENGTH)
    run(kernel, state, Grid.through(times))
    lab.agrees(state.tokens, exact_law(denoiser, times, tail))


def test_it_is_the_reverse_of_the_noising_process() -> None:
    """One token of law pi, exact f: q(y | i) is P(x_s = y | x_t = i) by Bayes' rule; with f for p it is not."""
    pi, a, b = np.array([0.7, 0.25, 0.05]), 0.4, 0.7
    noised = [c * pi + (1 - c) / V for c in (a, b)]
    for i in range(V):
        likelihood = np.where(np.arange(V) == i, a + (1 - a) / V, (1 - a) / V)
        f = pi * likelihood / noised[0][i]
        step = np.where(np.arange(V) == i, a / b + (1 - a / b) / V, (1 - a / b) / V)  # P(x_t = i | x_s = y)
        exact = noised[1] * step / noised[0][i]
        assert np.allclose(posterior_row(f, i, a, b), exact)
        twice = f * likelihood / (f * likelihood).sum()  # makes the function put f itself in place of p
        assert not np.allclose(posterior_row(twice, i, a, b), exact, atol=0.01)


@pytest.mark.parametrize("z", [(0, 0), (2, 1)])
def test_one_step_from_a_state(lab, z: tuple[int, int]) -> None:
    denoiser = lab.TableDenoiser(V, V, seed=3, spread=2.0)
    kernel = UniformPosteriorKernel(Posterior(denoiser, Polynomial()), "none")
    p = denoiser.probabilities(z, 0.4)
    rows = [posterior_row(p[place], z[place], 0.4, 0.7) for place in range(LENGTH)]
    samples = lab.first_step(kernel, z, Grid.pairs([(0.4, 0.7), (0.7, 0.8)]), ROWS, seed=5)
    lab.agrees(samples, lab.product_law(rows, V))


def test_published_weights_are_p_itself(lab) -> None:
    """Nothing is divided out of what they predict, and they are told sigma on the log-linear schedule."""
    denoiser, z = lab.TableDenoiser(V, V, seed=3, spread=2.0), (2, 1)
    kernel = UniformPosteriorKernel(Posterior(denoiser, Polynomial()), "none", evidence=False)
    p = denoiser.probabilities(z, 0.4)
    likelihood = np.where(np.eye(V)[list(z)] == 1, 0.4 + 0.6 / V, 0.6 / V)
    rows = [posterior_row(p[place] * likelihood[place], z[place], 0.4, 0.7) for place in range(LENGTH)]
    samples = lab.first_step(kernel, z, Grid.pairs([(0.4, 0.7), (0.7, 0.8)]), ROWS, seed=5)
    lab.agrees(samples, lab.product_law(rows, V))
    config = {"network": {"vocab_size": V, "outputs": V}, "published": "duo", "schedule": "log-linear"}
    method = DUO.from_network(torch.nn.Identity(), config, "uniform", "cpu", {})
    assert (method.denoiser.conditioning, method.evidence) == ("sigma", False)
    assert type(method.schedule).__name__ == "LogLinear"


def test_calls_are_made_only_where_something_may_change(lab) -> None:
    denoiser = lab.TableDenoiser(V, V)
    method = DUO(denoiser)
    method.sample(lab.request(2, 4, 1000))
    assert denoiser.calls < 300  # of 1,001 steps


def test_pinned_tokens_stay(lab) -> None:
    method = DUO(lab.TableDenoiser(5, 5))
    prefix = torch.arange(40).reshape(4, 10) % 5
    pinned = torch.rand(4, 10, generator=torch.Generator().manual_seed(0)) < 0.4
    tokens = method.sample(lab.request(4, 10, 9, prefix=prefix, pinned=pinned)).tokens
    assert torch.equal(tokens[pinned], prefix[pinned])


def test_it_refuses_the_race(lab) -> None:
    assert "fp32 race" in str(DUO(lab.TableDenoiser(V, V)).refuse(lab.request(2, 4, 8, draw="legacy-fp32")))
