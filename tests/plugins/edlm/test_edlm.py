"""EDLM: the law of one and more steps by enumeration of the candidates, the sign of the energy, and many candidates."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from tsdfm_bench_edlm import EDLM, EnergyKernel

from tsdfm_bench.errors import UsageError
from tsdfm_bench.methods.toolkit import Grid, LogLinear, MaskSource, Posterior, State, run
from tsdfm_bench.rng import Streams

V = MASK = 2
LENGTH, ROWS = 2, 10_000
SEQUENCES = list(itertools.product(range(V), repeat=LENGTH))
STATES = list(itertools.product(range(V + 1), repeat=LENGTH))


class TableCausal:
    """An autoregressive model of two tokens, given as a table; it has no network."""

    vocab_size = V

    def __init__(self, seed: int = 0) -> None:
        self.table = 2 * torch.randn(V + 1, V, generator=torch.Generator().manual_seed(seed))

    def begin(self, batch: int, length: int) -> dict[str, Tensor]:
        return {"last": torch.full((batch,), V)}

    def next_logits(self, memory: dict[str, Tensor], tokens: Tensor) -> Tensor:
        if tokens.shape[1]:
            memory["last"] = tokens[:, -1]
        return self.table[memory["last"]]

    def networks(self) -> dict[str, nn.Module]:
        return {}

    def law(self) -> dict[tuple[int, ...], float]:
        p = torch.softmax(self.table.double(), dim=1)
        return {(x, y): float(p[V, x] * p[x, y]) for x, y in SEQUENCES}


def chosen_law(p: np.ndarray, z: tuple[int, ...], energy: TableCausal, k: int, temperature: float) -> dict:
    """Law of the chosen clean sequence: k draws from the proposal, one taken with weight e^{-E / T}."""
    fits = [x for x in SEQUENCES if all(c in (MASK, y) for c, y in zip(z, x, strict=True))]
    proposal = {x: math.prod(p[i, x[i]] for i in range(LENGTH) if z[i] == MASK) for x in fits}
    minus_energy = {x: math.log(energy.law()[x]) - math.log(proposal[x]) for x in fits}
    law = dict.fromkeys(fits, 0.0)
    for group in itertools.product(fits, repeat=k):
        weights = [math.exp(minus_energy[x] / temperature) for x in group]
        mass = math.prod(proposal[x] for x in group)
        for x, weight in zip(group, weights, strict=True):
            law[x] += mass * weight / sum(weights)
    return law


def exact_law(denoiser, energy, times: list[float], k: int, window: tuple[float, float], temperature: float) -> dict:
    """Law of the state after the steps through `times`, from all masks."""
    schedule = LogLinear()
    law = {(MASK,) * LENGTH: 1.0}
    for t, t_next in itertools.pairwise(times):
        a, b = schedule.kappa(torch.tensor([t, t_next], dtype=torch.float64)).tolist()
        reveal = (b - a) / (1 - a)
        following = dict.fromkeys(STATES, 0.0)
        for z, mass in law.items():
            p = denoiser.probabilities(z, t)[:, :V]
            p = p / p.sum(axis=1, keepdims=True)
            inside = window[0] <= t < window[1]
            for x, chance in chosen_law(p, z, energy, k if inside else 1, temperature).items():
                places = [i for i in range(LENGTH) if z[i] == MASK]
                for shown in itertools.product((True, False), repeat=len(places)):
                    y = list(z)
                    for place, now in zip(places, shown, strict=True):
                        y[place] = x[place] if now else MASK
                    share = math.prod(reveal if now else 1 - reveal for now in shown)
                    following[tuple(y)] += mass * chance * share
        law = following
    return dict.fromkeys(STATES, 0.0) | law


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("times", [[0.0, 0.7], [0.0, 0.4, 0.9], [0.0, 0.3, 0.5, 0.9]], ids=["1", "2", "3"])
def test_the_law_of_the_walk(lab, times: list[float], k: int) -> None:
    """One step, two, and three of which the last lies outside the window."""
    denoiser, energy = lab.TableDenoiser(V, V + 1, seed=1), TableCausal()
    window, temperature = (0.0, 0.45), 0.7
    kernel = EnergyKernel(Posterior(denoiser, LogLinear(), mask_id=MASK), energy, k, window, temperature)
    state = State.start(MaskSource(V), Streams.of(3, f"{k} {len(times)}", ROWS), LENGTH)
    run(kernel, state, Grid.through(times))
    lab.agrees(state.tokens, exact_law(denoiser, energy, times, k, window, temperature))


def test_many_candidates_are_a_sample_of_the_autoregressive_model(lab) -> None:
    """Everything revealed in one step, chosen among 64: close to p_AR, far from the proposal."""
    denoiser, energy = lab.TableDenoiser(V, V + 1, seed=1), TableCausal()
    kernel = EnergyKernel(Posterior(denoiser, LogLinear(), mask_id=MASK), energy, 64, (0.0, 1.0))
    state = State.start(MaskSource(V), Streams.of(4, "many", 4000), LENGTH)
    run(kernel, state, Grid.through([0.0, 1.0]))
    p = denoiser.probabilities((MASK,) * LENGTH, 0.0)[:, :V]
    p = p / p.sum(axis=1, keepdims=True)
    proposal = {x: p[0, x[0]] * p[1, x[1]] for x in SEQUENCES}
    seen = {x: float((state.tokens == torch.tensor(x)).all(dim=1).double().mean()) for x in SEQUENCES}

    def far(law: dict) -> float:
        return 0.5 * sum(abs(law[x] - seen[x]) for x in SEQUENCES)

    assert far(energy.law()) < 0.04 < far(proposal)


def test_both_networks_are_needed_only_where_something_is_revealed(lab) -> None:
    denoiser = lab.TableDenoiser(4, 5)
    causal = TableCausal()
    causal.table = torch.zeros(5, 4)
    causal.vocab_size = 4
    method = EDLM(denoiser, causal)
    tokens = method.sample(lab.request(2, 6, 500)).tokens
    assert int(tokens.max()) < 4
    assert denoiser.row_calls <= 2 * 6 + 2


def test_pinned_tokens_stay(lab) -> None:
    method = EDLM(lab.TableDenoiser(V, V + 1), TableCausal())
    prefix = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0]])
    pinned = torch.tensor([[True, False, False, True], [False, True, False, False]])
    tokens = method.sample(lab.request(2, 4, 5, prefix=prefix, pinned=pinned)).tokens
    assert torch.equal(tokens[pinned], prefix[pinned])


@pytest.mark.parametrize(("option", "value"), [("candidates", "0"), ("candidates", "two"), ("energy_temperature", "0")])
def test_wrong_options_are_refused(lab, option: str, value: str) -> None:
    with pytest.raises(UsageError, match="edlm"):
        EDLM(lab.TableDenoiser(V, V + 1), TableCausal(), **{option: value})
