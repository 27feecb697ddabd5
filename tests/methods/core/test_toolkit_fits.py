"""Samplers of other papers, assembled from the toolkit without changing it: ReMDM, DUO, EDLM, Di4C, LLaDA and BD3-LM.

Each is about a page; its one-step law is checked where it has a closed form, its defining behaviour otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tsdfm_bench.methods.core import (
    Finaliser,
    Grid,
    Kernel,
    MaskSource,
    Polynomial,
    Posterior,
    State,
    UniformSource,
    Visit,
    bernoulli_events,
    every_step,
    plan,
    run,
)
from tsdfm_bench.methods.core.visits import places_visit
from tsdfm_bench.rng import Streams

MASK = 3
T, H = 0.4, 0.2


class ReMDM(Kernel):
    """Masked diffusion with remasking (arXiv 2503.00307), alpha_t = kappa(t), rho = min(eta, rho_max) ("cap").

    masked      y: (alpha_s - (1 - rho) alpha_t) / (1 - alpha_t) p(y),    m: (1 - alpha_s - rho alpha_t) / (1 - alpha_t)
    unmasked    m: rho,    itself: 1 - rho
    """

    def __init__(self, posterior: Posterior, eta: float) -> None:
        self.posterior, self.eta = posterior, eta

    def step(self, state: State, visit: Visit) -> None:
        alpha_t, alpha_s = (self.posterior.schedule.kappa(t)[visit.at_rows] for t in (visit.t, visit.t_next))
        rho = (self.eta * torch.ones_like(alpha_t)).minimum(((1 - alpha_s) / alpha_t).clamp_max(1))
        reveal = (alpha_s - (1 - rho) * alpha_t) / (1 - alpha_t)
        rows, positions = visit.state_rows, visit.at_positions
        z = state.tokens[rows, positions]
        p = self.posterior.probabilities(self.posterior.logits(state, visit), True)
        token = self.posterior.policy.categorical(p, visit.uniform("token", state.streams))
        moves = visit.uniform("move", state.streams) < torch.where(z == MASK, reveal, rho)
        state.write(rows, positions, torch.where(moves, torch.where(z == MASK, token, MASK), z))
        confidence = torch.where(moves & (z == MASK), p.gather(1, token[:, None])[:, 0], 0.0)
        state.aux["confidence"][rows, positions] += confidence  # the memory its "conf" policy needs


def test_remdm(lab):
    denoiser = lab.TableDenoiser(3, 4, seed=1)
    kernel = ReMDM(Posterior(denoiser, Polynomial(), mask_id=MASK), eta=0.3)
    z = (MASK, 1)
    streams = Streams.of(0, "remdm", 8000)
    state = State(torch.tensor([z]).repeat(8000, 1), streams, aux={"confidence": torch.zeros(8000, 2).double()})
    run(kernel, state, Grid.pairs([(T, T + H)]))
    p = denoiser.probabilities(z, T)[0][:3]
    p = p / p.sum()
    rho = min(0.3, (1 - T - H) / T)
    first = np.append((T + H - (1 - rho) * T) / (1 - T) * p, (1 - T - H - rho * T) / (1 - T))
    lab.agrees(state.tokens, lab.product_law([first, np.array([0, 1 - rho, 0, rho])], 4))
    # the loop grid holds a noise level: rho alone acts there, and everything is revealed at the end
    state = State.start(MaskSource(3), Streams.of(0, "loop", 50), 6)
    state.aux["confidence"] = torch.zeros(50, 6, dtype=torch.float64)
    trace = run(kernel, state, Grid.loop(40), Finaliser("none"), kernel.posterior, trace=True)
    held = trace[:, 18:38]
    assert ((held[:, 1:] == MASK) & (held[:, :-1] != MASK)).any()
    assert (state.tokens < 3).all()


class Duo(Kernel):
    """Uniform-state diffusion (arXiv 2506.10892), i = x_t, V tokens, alpha_ts = alpha_t / alpha_s:

    q(y) ~ [alpha_t V p(y) + alpha_ts - alpha_t] 1[y = i] + (alpha_s - alpha_t) p(y) + (1 - alpha_ts)(1 - alpha_s) / V
    """

    def __init__(self, posterior: Posterior) -> None:
        self.posterior = posterior

    def visits(self, state: State, grid: Grid) -> Iterator[Visit]:
        yield from every_step(state, grid)
        closing = places_visit(state.free, len(grid), 1.0, 1.0)
        if closing is not None:
            yield closing

    def step(self, state: State, visit: Visit) -> None:
        rows, positions = visit.state_rows, visit.at_positions
        p = self.posterior.probabilities(self.posterior.logits(state, visit))
        if bool((visit.t == 1.0).all()):  # the greedy tail
            state.write(rows, positions, p.argmax(dim=1))
            return
        kappa = self.posterior.schedule.kappa
        alpha_t, alpha_s = (kappa(t)[visit.at_rows, None] for t in (visit.t, visit.t_next))
        ratio, size = alpha_t / alpha_s, p.shape[1]
        own = torch.nn.functional.one_hot(state.tokens[rows, positions], size)
        q = (alpha_t * size * p + ratio - alpha_t) * own + (alpha_s - alpha_t) * p
        q = q + (1 - ratio) * (1 - alpha_s) / size
        state.write(rows, positions, self.posterior.policy.categorical(q, visit.uniform("token", state.streams)))


def test_duo(lab):
    denoiser = lab.TableDenoiser(3, 3, seed=2)
    kernel = Duo(Posterior(denoiser, Polynomial()))
    z, size = (2, 0), 3
    rows = []
    for p, i in zip(denoiser.probabilities(z, T), z, strict=True):
        a, s = T, T + H
        q = (s - a) * p + (1 - a / s) * (1 - s) / size
        q[i] += a * size * p[i] + a / s - a
        assert q.sum() == pytest.approx(a * size * p[i] + 1 - a)  # the normaliser the paper states
        rows.append(q / q.sum())
    state = State(torch.tensor([z]).repeat(8000, 1), Streams.of(0, "duo", 8000))
    for visit in every_step(state, Grid.pairs([(T, T + H)])):
        kernel.step(state, visit)
    lab.agrees(state.tokens, lab.product_law(rows, 3))
    state = State.start(UniformSource(3), Streams.of(1, "duo", 4), 5)
    run(kernel, state, Grid.uniform(4))
    assert state.tokens.shape == (4, 5)


class Edlm(Kernel):
    """Energy-based resampling (arXiv 2410.21357): k clean candidates from p, one kept with weight e^(-E), then the
    masked bridge towards it."""

    def __init__(self, posterior: Posterior, energy, candidates: int) -> None:
        self.posterior, self.energy, self.candidates = posterior, energy, candidates

    def step(self, state: State, visit: Visit) -> None:
        logits = self.posterior.logits(state, visit)
        clean = state.tokens[visit.rows].repeat(self.candidates, 1, 1)
        masked = clean[0, visit.at_rows, visit.at_positions] == MASK
        for k in range(self.candidates):
            drawn = self.posterior.draw(logits, visit.uniform(f"candidate/{k}", state.streams), True)
            current = clean[k, visit.at_rows, visit.at_positions]
            clean[k, visit.at_rows, visit.at_positions] = torch.where(masked, drawn, current)
        energies = torch.stack([self.energy(x) for x in clean], dim=1)  # (rows, k)
        u = state.streams.select(visit.rows).uniform("pick", int(visit.index[0]), 1)[:, 0]
        best = self.posterior.policy.categorical(torch.softmax(-energies.double(), dim=1), u)
        chosen = clean[best, torch.arange(best.numel())]
        a = -torch.expm1(self.posterior.schedule.log_survival(visit.t, visit.t_next))[visit.at_rows]
        reveal = masked & (visit.uniform("reveal", state.streams) < a)
        now = state.tokens[visit.state_rows, visit.at_positions]
        target = chosen[visit.at_rows, visit.at_positions]
        state.write(visit.state_rows, visit.at_positions, torch.where(reveal, target, now))


def test_edlm(lab):
    """One position, one step to t = 1, k = 2: P(y) = sum over pairs of p p' e^(-E(y)) / (e^(-E(y)) + e^(-E(y')))."""
    denoiser = lab.TableDenoiser(3, 4, seed=3)
    cost = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    kernel = Edlm(Posterior(denoiser, Polynomial(), mask_id=MASK), lambda x: cost[x[:, 0]], candidates=2)
    state = State(torch.full((10000, 1), MASK), Streams.of(0, "edlm", 10000))
    run(kernel, state, Grid.pairs([(T, 1.0)]))
    p = denoiser.probabilities((MASK,), T)[0][:3]
    p, e = p / p.sum(), np.exp(-cost.numpy())
    law = {(y,): sum(2 * p[y] * p[o] * e[y] / (e[y] + e[o]) for o in range(3)) for y in range(3)}
    lab.agrees(state.tokens, law)


def test_di4c_latents_reach_the_denoiser(lab):
    """A fresh latent per sequence and call travels in `aux` to the denoiser, whatever the batch."""
    seen = []

    class Mixture(lab.TableDenoiser):
        def predict(self, tokens, condition, rows, positions):
            seen.append(condition.aux["zeta"].clone())
            return super().predict(tokens, condition, rows, positions)

    class Di4C(Kernel):
        def __init__(self, posterior: Posterior) -> None:
            self.posterior = posterior

        def step(self, state: State, visit: Visit) -> None:
            state.aux["zeta"] = state.streams.uniform("zeta", int(visit.index[0]), 1)[:, 0]
            logits = self.posterior.logits(state, visit)
            tokens = self.posterior.draw(logits, visit.uniform("token", state.streams), True)
            state.write(visit.state_rows, visit.at_positions, tokens)

    streams = Streams.of(0, "di4c", 5)
    state = State.start(MaskSource(4), streams, 3)
    run(Di4C(Posterior(Mixture(4, 5), Polynomial(), mask_id=4)), state, Grid.uniform(2))
    assert [s.tolist() for s in seen] == [streams.uniform("zeta", i, 1)[:, 0].tolist() for i in range(2)]


class Llada(Kernel):
    """Confidence decoding (arXiv 2502.09992): in every step a fixed number of the most confident masks is revealed,
    greedily; finished sequences are left out."""

    def __init__(self, posterior: Posterior, per_step: int) -> None:
        self.posterior, self.per_step = posterior, per_step

    def visits(self, state: State, grid: Grid) -> Iterator[Visit]:
        for visit in every_step(state, grid, active=True):
            yield visit
            state.done = (state.tokens != MASK).all(dim=1)

    def step(self, state: State, visit: Visit) -> None:
        p = self.posterior.probabilities(self.posterior.logits(state, visit), True)
        confidence, token = p.max(dim=1)
        masked = state.tokens[visit.state_rows, visit.at_positions] == MASK
        score = torch.full((visit.rows.numel(), state.length), -1.0, dtype=torch.float64)
        guess = torch.zeros_like(score, dtype=torch.int64)
        score[visit.at_rows, visit.at_positions] = torch.where(masked, confidence, -1.0)
        guess[visit.at_rows, visit.at_positions] = token
        best = score.topk(self.per_step, dim=1).indices
        rows = visit.rows[:, None].expand_as(best)
        keep = score.gather(1, best) >= 0
        state.write(rows[keep], best[keep], guess.gather(1, best)[keep])


def test_llada(lab):
    denoiser = lab.TableDenoiser(3, 4)
    kernel = Llada(Posterior(denoiser, Polynomial(), mask_id=MASK), per_step=2)
    prefix = torch.tensor([[0, 1, 2, 0, 1, 2], [2, 2, 2, 2, 2, 0]])
    pinned = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    state = State.start(MaskSource(3), Streams.of(0, "llada", 2), 6, prefix, pinned)
    trace = run(kernel, state, Grid.uniform(5), Finaliser("none"), kernel.posterior, trace=True)
    assert ((trace == MASK).sum(dim=2)).tolist() == [[0, 0, 0, 0, 0], [4, 2, 0, 0, 0]]
    assert denoiser.row_calls == 2 + 1 + 1


class Blocks(Kernel):
    """Block diffusion (arXiv 2503.09573): blocks from left to right, masked diffusion inside each."""

    def __init__(self, posterior: Posterior, block: int) -> None:
        self.posterior, self.block = posterior, block

    def visits(self, state: State, grid: Grid) -> Iterator[Visit]:
        probability = -torch.expm1(self.posterior.schedule.log_survival(grid.start, grid.end))
        for number, begin in enumerate(range(0, state.length, self.block)):
            inside = torch.zeros_like(state.free)
            inside[:, begin : begin + self.block] = True
            events = bernoulli_events(
                state.streams, state.free & inside, probability, once=True, site=f"block/{number}"
            )
            for visit in plan(events, grid.start, grid.end, state.streams):
                yield Visit(**{**vars(visit), "index": visit.index + number * len(grid)})

    def recorded_steps(self, state: State, grid: Grid) -> int:
        return len(grid) * -(-state.length // self.block)

    def step(self, state: State, visit: Visit) -> None:
        logits = self.posterior.logits(state, visit)
        tokens = self.posterior.draw(logits, visit.uniform("token", state.streams), True)
        state.write(visit.state_rows, visit.at_positions, tokens)


def test_block_diffusion(lab):
    denoiser = lab.TableDenoiser(3, 4)
    kernel = Blocks(Posterior(denoiser, Polynomial(), mask_id=MASK), block=2)
    state = State.start(MaskSource(3), Streams.of(0, "blocks", 20), 6)
    trace = run(kernel, state, Grid.uniform(4), Finaliser("none"), kernel.posterior, trace=True)
    assert trace.shape == (20, 12, 6)
    for number in range(3):
        after = trace[:, 4 * number + 3]
        assert (after[:, : 2 * number + 2] != MASK).all()
        assert (after[:, 2 * number + 2 :] == MASK).all()
