"""TSDFM_BENCH_PLAIN=1 leaves every optimisation of the samplers out: the same laws, and where nothing but the work
differs, the same tokens."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tsdfm_bench import api
from tsdfm_bench.conformance.orders import SAMPLERS, output_law
from tsdfm_bench.methods.ar import AR
from tsdfm_bench.methods.core import DrawPolicy, NetworkDenoiser, Sharpen
from tsdfm_bench.methods.core.draw import inverse_cdf
from tsdfm_bench.methods.dfm import DFM
from tsdfm_bench.methods.fsdfm import FSDFM
from tsdfm_bench.methods.mdlm import MDLM
from tsdfm_bench.methods.score import sum_exp
from tsdfm_bench.methods.sedd import SEDD
from tsdfm_bench.rng import Streams
from tsdfm_bench.tasks.synthetic.oracle import make_oracle
from tsdfm_bench.tasks.synthetic.recipe import markov_chain

METHODS = {"dfm": DFM, "fsdfm": FSDFM, "mdlm": MDLM, "sedd": SEDD, "ar": AR}
V, L, STEPS = 3, 3, 4
SPACE = list(itertools.product(range(V), repeat=L))


@pytest.fixture
def switch(monkeypatch):
    """Turn the optimisations off ("1") or on ("0")."""
    return lambda value: monkeypatch.setenv(api.PLAIN_VARIABLE, value)


@pytest.mark.parametrize(("value", "plain"), [("1", True), ("yes", True), ("0", False), ("", False), (None, False)])
def test_the_switch(monkeypatch, value, plain):
    monkeypatch.delenv(api.PLAIN_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(api.PLAIN_VARIABLE, value)
    assert api.plain() == plain


@pytest.fixture(scope="module")
def chain():
    return markov_chain(V)


def built(chain, sampler):
    options = dict(part.split("=") for part in sampler.option.split(",") if part)
    params = {**options, "source": sampler.source or None, "vocab_size": V, "length": L}
    return METHODS[sampler.method].from_oracle(lambda form, source: make_oracle(chain, form, source), params, "cpu")


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: f"{s.label}-{s.source}")
def test_every_sampler_has_its_law_without_optimisations(lab, chain, switch, sampler):
    """The product of the published transition matrices, as with them (`laws/test_laws.py`)."""
    switch("1")
    method = built(chain, sampler)
    true_law = np.exp(-chain.token_nll(np.array(SPACE)).sum(axis=1))
    law = output_law(sampler, STEPS, true_law, V, L)
    tokens = method.sample(lab.request(6000, L, STEPS if method.info.uses_steps else None, seed=31)).tokens
    lab.agrees(tokens, dict(zip(SPACE, (law / law.sum()).tolist(), strict=True)))


@pytest.mark.parametrize(
    "build",
    [
        lambda d: DFM(d(V, V), solver="euler"),
        lambda d: DFM(d(V, V), solver="exact"),
        lambda d: DFM(d(V, V + 1), "mask", solver="exact"),
        lambda d: FSDFM(d(V, V + 1), "mask", unmask_change="never"),
        lambda d: MDLM(d(V, V + 1), sampler="cached"),
        lambda d: MDLM(d(V, V + 1), sampler="ancestral"),
        lambda d: MDLM(d(V, V + 1), sampler="first-hitting"),
        lambda d: SEDD(d(V, V + 1, "log_score"), "mask"),
        lambda d: SEDD(d(V, V, "log_score"), "uniform"),
    ],
)
def test_the_tokens_are_the_same_where_only_the_work_differs(lab, switch, build):
    """Fewer calls, fewer places, other sums: nothing that a draw depends on, beyond rounding."""
    tokens, calls = [], []
    for value in ("0", "1"):
        switch(value)
        method = build(lab.TableDenoiser)
        tokens.append(method.sample(lab.request(20, 12, 40)).tokens)
        calls.append(method.denoiser.row_calls)
    assert torch.equal(*tokens)
    assert calls[0] <= calls[1]


def test_the_steps_that_are_spared_are_made(lab, switch):
    """The calls of every row: one in each step, where the optimised walk makes none in a step without a change."""
    rows = []
    for value in ("0", "1"):
        switch(value)
        method = DFM(lab.TableDenoiser(V, V))
        method.sample(lab.request(5, 6, 64))
        rows.append(method.denoiser.row_calls)
    assert rows[0] < rows[1] == 5 * 64


def test_thinning_is_left_out(lab, switch):
    """Of the cumulative law every place is looked at in every step; with it, only candidates are."""
    places = []
    for value in ("0", "1"):
        switch(value)
        method = FSDFM(lab.TableDenoiser(V, V))
        method.sample(lab.request(5, 6, 32))
        places.append(method.denoiser.places)
    assert places[0] < places[1] == 5 * 6 * 32


def test_the_head_runs_everywhere(switch):
    """The network is asked for all logits; those at the places are the same."""
    asked = []

    class Net(torch.nn.Module):
        def forward(self, tokens, time, at=None):
            asked.append(at is not None)
            logits = torch.arange(24.0).view(2, 3, 4)
            return logits if at is None else logits[at]

    rows, positions = torch.tensor([1, 0]), torch.tensor([2, 0])
    found = []
    for value in ("0", "1"):
        switch(value)
        denoiser = NetworkDenoiser(Net(), 4, 4, conditioning="none")
        found.append(denoiser.predict(torch.zeros(2, 3, dtype=torch.int64), None, rows, positions))  # type: ignore[arg-type]
    assert asked == [True, False]
    assert torch.equal(*found)


def test_the_arithmetic_is_the_plain_one(switch):
    """One cumulative sum for two levels of them, fp64 weights for a softmax, log-sum-exp with its shift."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(12, 3000, generator=generator)
    u = Streams.of(3, "plain", 12).uniform("draw", 0, 1)[:, 0]
    weights = logits.double().exp()
    found = []
    for value in ("0", "1"):
        switch(value)
        policy = DrawPolicy()
        found.append((inverse_cdf(weights, u), policy.from_logits(logits, Sharpen(), u[:, None]), sum_exp(logits)))
        policy.check()
    (fast, fast_drawn, fast_total), (slow, slow_drawn, slow_total) = found
    assert torch.equal(fast[0], slow[0])
    torch.testing.assert_close(fast[1], slow[1])
    assert torch.equal(fast_drawn, slow_drawn)
    torch.testing.assert_close(fast_total, slow_total, rtol=1e-5, atol=0)
    torch.testing.assert_close(slow_total, weights.sum(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shift", [-200.0, -50.0, -20.0, 0.0, 20.0, 50.0, 80.0])
@pytest.mark.parametrize("leave_out", [False, True])
def test_sums_of_exponentials_hold_at_any_size_of_logits(shift: float, leave_out: bool) -> None:
    """In one piece and in several; where e^x leaves float32's range, through log-sum-exp."""
    for rows in (0, 3, 200):
        x = torch.randn(rows, 1000, generator=torch.Generator().manual_seed(rows)) + shift
        without = torch.arange(rows)[:, None] if leave_out else None
        exact = x.double().exp()
        if without is not None:
            exact = exact.scatter(1, without, 0.0)
        found = sum_exp(x, without)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, exact.sum(dim=1), rtol=3e-6 if abs(shift) < 30 else 1e-4, atol=0)


def test_a_sum_of_exponentials_of_no_number_is_no_number() -> None:
    assert sum_exp(torch.tensor([[0.0, float("nan")], [1.0, 2.0]])).isnan().tolist() == [True, False]
