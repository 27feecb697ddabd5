"""ReMDM: the law of one, two and three steps by enumeration, for every strategy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from tsdfm_bench_remdm import CONFIDENCE, RemaskingKernel, ReMDM

from tsdfm_bench.errors import UsageError
from tsdfm_bench.methods.toolkit import Grid, LogLinear, MaskSource, Polynomial, Posterior, State, run
from tsdfm_bench.rng import Streams

V = MASK = 2
LENGTH = 2
ROWS = 10_000


def rho_of(strategy: str, eta: float, a: float, b: float, confidence: list[float | None], kind: str) -> list[float]:
    """rho of every position as the paper has it; the confidence of a masked position is None."""
    rho_max = min(1.0, (1 - b) / a) if a > 0 else 1.0
    if strategy == "conf":
        weights = [0.0 if c is None else math.exp(-c) for c in confidence]
        return [rho_max * w / sum(weights) if w else 0.0 for w in weights]
    if strategy == "rescale":
        return [eta * rho_max] * len(confidence)
    if strategy == "cap" or kind == "hold":
        return [min(eta, rho_max)] * len(confidence)
    return [0.0] * len(confidence)


def exact_law(denoiser, grid, strategy, eta, schedule, start):
    """Law of the state after the grid, by enumeration over tokens and confidences."""
    law = {(start, (None,) * LENGTH): 1.0}
    for i, (t, t_next) in enumerate(grid):
        a, b = schedule.kappa(torch.tensor([t, t_next], dtype=torch.float64)).tolist()
        following: dict = {}
        for (z, confidence), mass in law.items():
            p = denoiser.probabilities(z, t)[:, :V]
            p = p / p.sum(axis=1, keepdims=True)
            rho = rho_of(strategy, eta, a, b, list(confidence), grid.kind(i))
            choices = []
            for place in range(LENGTH):
                if z[place] == MASK:
                    reveal = (b - (1 - rho[place]) * a) / (1 - a)
                    options = [(y, float(p[place, y]), reveal * float(p[place, y])) for y in range(V)]
                    options.append((MASK, None, (1 - b - rho[place] * a) / (1 - a)))
                else:
                    options = [(MASK, None, rho[place]), (z[place], confidence[place], 1 - rho[place])]
                choices.append(options)
            for combination in itertools.product(*choices):
                key = (tuple(y for y, _, _ in combination), tuple(c for _, c, _ in combination))
                weight = mass * math.prod(w for _, _, w in combination)
                following[key] = following.get(key, 0.0) + weight
        law = following
    tokens = dict.fromkeys(itertools.product(range(V + 1), repeat=LENGTH), 0.0)
    for (z, _), mass in law.items():
        tokens[z] += mass
    return tokens


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize(("strategy", "eta"), [("cap", 0.2), ("rescale", 0.6), ("conf", 0.0), ("loop", 0.3)])
def test_the_law_of_the_walk(lab, strategy: str, eta: float, steps: int) -> None:
    """Sampled states against the exact law of the state, confidences included."""
    denoiser = lab.TableDenoiser(V, V + 1, seed=1)
    schedule = LogLinear()
    grid = Grid.loop(max(3, steps)) if strategy == "loop" else Grid.through(torch.linspace(0.1, 0.9, steps + 1))
    kernel = RemaskingKernel(Posterior(denoiser, schedule, mask_id=MASK), strategy, eta)
    streams = Streams.of(5, f"{strategy} {steps}", ROWS)
    state = State.start(MaskSource(V), streams, LENGTH)
    run(kernel, state, grid)
    lab.agrees(state.tokens, exact_law(denoiser, grid, strategy, eta, schedule, (MASK,) * LENGTH))


def test_one_step_from_a_mixed_state(lab) -> None:
    """P(y | m) = (b - (1 - rho) a) / (1 - a) p(y), P(m | z) = rho, with kappa(t) = t."""
    denoiser = lab.TableDenoiser(V, V + 1, seed=2)
    kernel = RemaskingKernel(Posterior(denoiser, Polynomial(), mask_id=MASK), "cap", 0.3)
    a, b, rho = 0.4, 0.6, 0.3
    p = denoiser.probabilities((MASK, 1), a)[0, :V]
    masked = np.append((b - (1 - rho) * a) / (1 - a) * p / p.sum(), (1 - b - rho * a) / (1 - a))
    revealed = np.array([0, 1 - rho, rho])
    samples = lab.first_step(kernel, (MASK, 1), Grid.pairs([(a, b)]), ROWS, seed=4)
    lab.agrees(samples, lab.product_law([masked, revealed], V + 1))


def test_without_remasking_the_marginals_are_those_of_mdlm(lab) -> None:
    """Whatever rho is, the share of masks after a step to time s is 1 - kappa(s) (theorem 3.1 of the paper)."""
    denoiser = lab.TableDenoiser(V, V + 1, seed=3)
    for eta in (0.0, 0.4, 1.0):
        kernel = RemaskingKernel(Posterior(denoiser, Polynomial(), mask_id=MASK), "rescale", eta)
        state = State.start(MaskSource(V), Streams.of(7, str(eta), ROWS), LENGTH)
        run(kernel, state, Grid.through([0.0, 0.3, 0.5, 0.8]))
        share = (state.tokens == MASK).double().mean().item()
        assert share == pytest.approx(0.2, abs=4 * math.sqrt(0.2 * 0.8 / (ROWS * LENGTH)))


def test_the_confidence_is_the_probability_at_the_time_of_the_reveal(lab) -> None:
    denoiser = lab.TableDenoiser(V, V + 1, seed=1)
    kernel = RemaskingKernel(Posterior(denoiser, LogLinear(), mask_id=MASK), "conf", 0.0)
    state = State.start(MaskSource(V), Streams.of(0, "confidence", 50), LENGTH)
    run(kernel, state, Grid.through([0.1, 0.6]))
    p = denoiser.probabilities((MASK,) * LENGTH, 0.1)[:, :V]
    p = p / p.sum(axis=1, keepdims=True)
    for row, position in (state.tokens != MASK).nonzero().tolist():
        expected = p[position, int(state.tokens[row, position])]
        assert float(state.aux[CONFIDENCE][row, position]) == pytest.approx(expected)


@pytest.mark.parametrize("strategy", ["cap", "rescale", "conf", "loop"])
def test_pinned_tokens_stay_and_no_mask_is_left(lab, strategy: str) -> None:
    method = ReMDM(lab.TableDenoiser(5, 6), strategy, 0.5)
    prefix = torch.arange(40).reshape(4, 10) % 5
    pinned = torch.rand(4, 10, generator=torch.Generator().manual_seed(0)) < 0.4
    tokens = method.sample(lab.request(4, 10, 9, prefix=prefix, pinned=pinned)).tokens
    assert torch.equal(tokens[pinned], prefix[pinned])
    assert int(tokens.max()) < 5


def test_what_it_refuses(lab) -> None:
    method = ReMDM(lab.TableDenoiser(3, 4), "loop")
    assert "at least 3 steps" in str(method.refuse(lab.request(2, 4, 2)))
    assert "fp32 race" in str(method.refuse(lab.request(2, 4, 8, draw="legacy-fp32")))
    assert method.refuse(lab.request(2, 4, 8)) is None
    for eta in ("much", "1.5"):
        with pytest.raises(UsageError, match="eta"):
            ReMDM(lab.TableDenoiser(3, 4), "cap", eta)
