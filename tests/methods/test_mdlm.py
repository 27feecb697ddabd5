"""MDLM: one-step law, whole-run law of every sampler, calls, the finaliser and the fp32 race."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from tsdfm_bench.errors import UsageError
from tsdfm_bench.methods import mdlm
from tsdfm_bench.methods.core import Cosine, DrawPolicy, Geometric, Grid, LogLinear, Posterior
from tsdfm_bench.methods.mdlm import MDLM, MaskedKernel, RaceKernel

MASK = 3
T, H = 0.4, 0.3


class Timeless:
    """Wraps a denoiser so that it does not see the time, as MDLM's network."""

    conditioning = "none"

    def __init__(self, inner):
        self.inner = inner
        self.vocab_size, self.outputs, self.kind = inner.vocab_size, inner.outputs, inner.kind

    def predict(self, tokens, condition, rows, positions):
        still = type(condition)(torch.zeros_like(condition.t), condition.t_next, condition.schedule)
        return self.inner.predict(tokens, still, rows, positions)

    def networks(self):
        return {}


def timeless(lab, vocab=3, seed=0):
    return Timeless(lab.TableDenoiser(vocab, vocab + 1, seed=seed))


def clean(p: np.ndarray) -> np.ndarray:
    """SUBS: no mass on the mask."""
    p = p.copy()
    p[..., MASK] = 0
    return p / p.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("schedule", [LogLinear(), Cosine()], ids=lambda s: s.name)
def test_one_step_law(lab, schedule):
    """q(x_s = y | m) = p(y) (move_t - move_s) / move_t and q(m | m) = move_s / move_t; revealed tokens are copied."""
    denoiser = lab.TableDenoiser(3, 4, seed=1)
    kernel = MaskedKernel(Posterior(denoiser, schedule, mask_id=MASK))
    nu, nu_s = 1 - T, 1 - T - H
    if schedule.name == "cosine":
        move, move_s = (1 - (1e-3 + (1 - 1e-3) * math.cos(math.pi * x / 2)) for x in (nu, nu_s))
    else:
        move, move_s = (1 - 1e-3) * nu, (1 - 1e-3) * nu_s
    grid = Grid.pairs([(T, T + H), (T + H, 1.0)])
    for z in lab.states(4, 2):
        p = clean(denoiser.probabilities(z, T))
        rows = []
        for i in range(2):
            row = np.zeros(4)
            if z[i] == MASK:
                row = p[i] * (move - move_s) / move
                row[MASK] = move_s / move
            else:
                row[z[i]] = 1
            rows.append(row)
        matrix = kernel.transition(torch.from_numpy(denoiser.probabilities(z, T)), torch.tensor(z), T, T + H)
        assert np.allclose(matrix.numpy(), rows, atol=1e-12)
    z = (MASK, MASK)
    p = clean(denoiser.probabilities(z, T))
    rows = [np.append(p[i][:3] * (move - move_s) / move, move_s / move) for i in range(2)]
    lab.agrees(lab.first_step(kernel, z, grid, 20000, seed=3), lab.product_law(rows, 4))


def reveal_order_law(lab, denoiser, together: float) -> dict[tuple[int, ...], float]:
    """Law of two tokens when both are revealed at once with probability `together`, else in a random order."""
    p_all = clean(denoiser.inner.probabilities((MASK, MASK), 0.0))
    law = dict.fromkeys(itertools.product(range(3), repeat=2), 0.0)
    for a, b in law:
        second_first = clean(denoiser.inner.probabilities((MASK, b), 0.0))[0][a]
        first_second = clean(denoiser.inner.probabilities((a, MASK), 0.0))[1][b]
        apart = 0.5 * p_all[0][a] * first_second + 0.5 * p_all[1][b] * second_first
        law[a, b] = together * p_all[0][a] * p_all[1][b] + (1 - together) * apart
    return law


@pytest.mark.parametrize("sampler", ["cached", "ancestral", "first-hitting"])
@pytest.mark.parametrize("steps", [1, 4])
def test_whole_run_law(lab, sampler, steps):
    """In N equal steps two positions are revealed in the same step with probability 1 / N; first hitting: never."""
    denoiser = timeless(lab, seed=2)
    batch = MDLM(denoiser, sampler=sampler).sample(lab.request(15000, 2, steps, source="mask"))
    together = 0.0 if sampler == "first-hitting" else 1 / steps
    lab.agrees(batch.tokens, reveal_order_law(lab, denoiser, together))


def test_cached_and_ancestral_draw_the_same_tokens(lab):
    for steps in (1, 7, 200):
        tokens = [
            MDLM(timeless(lab, 6), sampler=s).sample(lab.request(16, 10, steps, trace=True))
            for s in ("cached", "ancestral")
        ]
        assert torch.equal(tokens[0].tokens, tokens[1].tokens)
        assert torch.equal(tokens[0].trace, tokens[1].trace)


@pytest.mark.parametrize("draw", ["fp64", "legacy-fp32"])
@pytest.mark.parametrize("sampler", ["cached", "first-hitting"])
def test_at_most_length_plus_one_calls_per_sequence(lab, sampler, draw):
    for length, steps in ((6, 150), (20, 5), (1, 1)):
        denoiser = timeless(lab, 6)
        MDLM(denoiser, sampler=sampler).sample(lab.request(1, length, steps, draw=draw))
        assert denoiser.inner.calls <= min(length, steps if sampler == "cached" else length) + 1
        denoiser = timeless(lab, 6)
        MDLM(denoiser, sampler=sampler).sample(lab.request(16, length, steps, draw=draw))
        assert denoiser.inner.row_calls / 16 <= length + 1
        if draw == "fp64":  # the race walks the grid in step: its calls are those of the slowest sequence at each step
            assert denoiser.inner.calls <= length + 1


def test_ancestral_calls_in_every_step_until_finished(lab):
    steps, batch = 50, 8
    denoiser = timeless(lab, 6)
    trace = MDLM(denoiser, sampler="ancestral").sample(lab.request(batch, 3, steps, trace=True)).trace
    masked = (trace[:, :steps] == 6).any(dim=2).sum(dim=1)  # steps after which something is still masked
    left = (trace[:, steps - 1] == 6).any(dim=1)
    assert not left.any()
    assert denoiser.inner.row_calls == int((masked + 1).sum())
    assert denoiser.inner.calls == int(masked.max()) + 1


def test_finalisers_on_a_grid_that_ends_early(lab, monkeypatch):
    """With half of the positions still masked at the end, argmax and sample make one more call; none draws them all."""
    monkeypatch.setattr(mdlm, "NU_END", 0.5)
    for rule, recorded in (("argmax", 5), ("sample", 5), ("none", 4)):
        batch = MDLM(timeless(lab, 6), finaliser=rule).sample(lab.request(200, 6, 4, trace=True))
        assert batch.trace.shape == (200, recorded, 6)
        assert (batch.tokens < 6).all()
        assert torch.equal(batch.trace[:, -1], batch.tokens)
        left = (batch.trace[:, 3] == 6).double().mean().item()
        assert left == pytest.approx(0.0 if rule == "none" else 0.5, abs=0.05)


def test_first_hitting_times_are_sorted_uniforms_and_see_the_time(lab):
    """Noise levels at the n reveals are the order statistics of n uniforms; positions come in random order."""
    times, places = [], []

    class Recorder(lab.TableDenoiser):
        def predict(self, tokens, condition, rows, positions):
            times.append(condition.t)
            places.append(positions)
            return super().predict(tokens, condition, rows, positions)

    MDLM(Recorder(4, 5), sampler="first-hitting").sample(lab.request(2000, 3, 1))
    assert len(times) == 3
    for k in range(3):
        assert stats.kstest(times[k].numpy(), stats.beta(k + 1, 3 - k).cdf).pvalue > 1e-3
        assert stats.chisquare(torch.bincount(places[k], minlength=3).numpy()).pvalue > 1e-3


def test_race_has_the_law_where_fp32_is_good_enough(lab):
    denoiser = timeless(lab, seed=5)
    batch = MDLM(denoiser).sample(lab.request(6000, 2, 2, draw="legacy-fp32"))
    lab.agrees(batch.tokens, reveal_order_law(lab, denoiser, 1 / 2))
    again = MDLM(denoiser, sampler="ancestral").sample(lab.request(6000, 2, 2, draw="legacy-fp32"))
    assert torch.equal(batch.tokens, again.tokens)


def test_race_reveals_too_little_at_many_steps(lab):
    """V = 4096 equal tokens in one early step of 4e6: p (a - b) / b is 6e-11, far below what fp32 can tell."""
    vocab, rows = 4096, 256
    denoiser = lab.TableDenoiser(vocab, vocab + 1, spread=0.0)
    method = MDLM(denoiser)
    grid = Grid.pairs([(0.0, 2.5e-7), (2.5e-7, 5e-7)])
    kernel = RaceKernel(Posterior(denoiser, method.schedule, policy=DrawPolicy("legacy-fp32"), mask_id=vocab), False)
    assert (lab.first_step(kernel, (vocab,) * 2, grid, rows, seed=0) == vocab).all()
    # a step of the same kind that fp32 resolves reveals what the law says
    grid = Grid.pairs([(0.0, 0.3), (0.3, 0.6)])
    share = (lab.first_step(kernel, (vocab,) * 2, grid, rows, seed=0) != vocab).double().mean().item()
    assert share == pytest.approx(0.3, abs=0.08)


def test_options(lab):
    with pytest.raises(UsageError, match="did you mean 'ancestral'"):
        MDLM(timeless(lab), sampler="ancestra")
    with pytest.raises(UsageError, match="unknown finaliser of mdlm 'greedy'"):
        MDLM(timeless(lab), finaliser="greedy")
    with pytest.raises(UsageError, match="needs a denoiser of 5 outputs"):
        MDLM(lab.TableDenoiser(4, 4))
    assert "no source 'uniform'" in str(MDLM(timeless(lab)).refuse(lab.request(source="uniform")))


class Turning:
    """Says token 0 before t = 1/2 and token 1 after; sees the time."""

    vocab_size, outputs, kind = 2, 3, "x0_logits"
    conditioning = "sigma"

    def predict(self, tokens, condition, rows, positions):
        late = condition.t[rows] >= 0.5
        logits = torch.full((len(rows), 3), -50.0)
        logits[torch.arange(len(rows)), late.long()] = 50.0
        return logits

    def networks(self):
        return {}


@pytest.mark.parametrize("draw", ["fp64", "legacy-fp32"])
@pytest.mark.parametrize("sampler", ["cached", "ancestral"])
def test_what_a_network_that_sees_the_time_said_before_is_not_used_again(lab, sampler, draw):
    """Of four steps three begin before t = 1/2 by a hair (the grid ends at 1 - 1e-5): a quarter is revealed later."""
    tokens = MDLM(Turning(), sampler=sampler).sample(lab.request(8000, 1, 4, draw=draw)).tokens
    assert (tokens == 1).double().mean().item() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("schedule", [LogLinear(), Cosine(), Geometric()], ids=lambda s: s.name)
@pytest.mark.parametrize("sampler", ["cached", "ancestral", "first-hitting"])
def test_a_grid_that_ends_at_the_data_leaves_no_mask(lab, schedule, sampler):
    """Also where the schedule itself has some noise left there."""
    method = MDLM(timeless(lab), sampler=sampler, finaliser="none", schedule=schedule)
    assert (method.sample(lab.request(64, 64, 4)).tokens < MASK).all()
