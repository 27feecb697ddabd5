"""Whole-run laws: what every sampler draws with the oracle against the product of published transition matrices.

The matrices come from `bench.conformance.orders`, written from the papers' formulas without the samplers' code; the
posterior there is a sum over all sequences, while the samplers are given the forward-backward oracle of a Markov chain,
so a fault in either shows. Chi-square at level 1e-4 with seeds fixed in advance.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tsdfm_bench.conformance.orders import SAMPLERS, convergence_orders, output_law
from tsdfm_bench.methods.ar import AR
from tsdfm_bench.methods.dfm import DFM
from tsdfm_bench.methods.fsdfm import FSDFM
from tsdfm_bench.methods.mdlm import MDLM
from tsdfm_bench.methods.sedd import SEDD
from tsdfm_bench.methods.tsdfm import TSDFM
from tsdfm_bench.tasks.synthetic.oracle import make_oracle
from tsdfm_bench.tasks.synthetic.recipe import markov_chain

METHODS = {"dfm": DFM, "fsdfm": FSDFM, "mdlm": MDLM, "sedd": SEDD, "ar": AR}
V, L, SAMPLES = 3, 3, 12000
SPACE = list(itertools.product(range(V), repeat=L))


@pytest.fixture(scope="module")
def chain():
    return markov_chain(V)


@pytest.fixture(scope="module")
def true_law(chain):
    return np.exp(-chain.token_nll(np.array(SPACE)).sum(axis=1))


def built(cls, chain, source, option):
    options = dict(part.split("=") for part in option.split(",") if part)
    params = {**options, "source": source or None, "vocab_size": V, "length": L}
    return cls.from_oracle(lambda form, source: make_oracle(chain, form, source), params, "cpu")


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: f"{s.label}-{s.source}")
def test_samples_have_the_law_of_multiplied_matrices(lab, chain, true_law, sampler, steps):
    method = built(METHODS[sampler.method], chain, sampler.source, sampler.option)
    law = output_law(sampler, steps, true_law, V, L)
    assert law.sum() == pytest.approx(1.0)
    asked = steps if method.info.uses_steps else None
    tokens = method.sample(lab.request(SAMPLES, L, asked, seed=20 + steps)).tokens
    # events that a walk of so few sequences cannot show are pooled by the test; the mask's share at nu = 1e-5 is one
    lab.agrees(tokens, dict(zip(SPACE, (law / law.sum()).tolist(), strict=True)))


def test_a_wrong_law_is_noticed(lab, chain, true_law):
    """The comparison has power: the laws of two solvers are told apart at the number of samples used above."""
    method = built(DFM, chain, "uniform", "solver=euler")
    tokens = method.sample(lab.request(SAMPLES, L, 5, seed=25)).tokens
    exact = next(s for s in SAMPLERS if (s.label, s.source) == ("dfm[solver=exact]", "uniform"))
    with pytest.raises(AssertionError):
        lab.agrees(tokens, dict(zip(SPACE, output_law(exact, 5, true_law, V, L).tolist(), strict=True)))


def test_tsdfm_draws_what_fsdfm_draws(lab, chain):
    tokens = [built(cls, chain, "uniform", "").sample(lab.request(50, L, 4)).tokens for cls in (FSDFM, TSDFM)]
    assert (tokens[0] == tokens[1]).all()


@pytest.fixture(scope="module")
def orders():
    return {(row.label, row.source): row for row in convergence_orders()}


def test_every_sampler_is_of_first_order_or_exact(orders):
    """Euler from the uniform source: N TV grows by about a constant per doubling, TV ~ log N / N."""
    for (label, source), row in orders.items():
        if label in ("ar", "mdlm[sampler=first-hitting]"):
            assert row.order is None
            assert max(row.total_variation) < 1e-12
        elif (label, source) == ("dfm[solver=euler]", "uniform"):
            scaled = np.array(row.total_variation[-4:]) * row.steps[-4:]
            growth = np.diff(scaled)
            assert (growth > 0).all()
            assert growth.max() < 1.5 * growth.min()
        else:
            assert row.order == pytest.approx(1.0, abs=0.05), label
        assert list(row.total_variation) == sorted(row.total_variation, reverse=True) or row.order is None


def test_the_analytic_absorbing_step_is_the_ancestral_one(orders):
    """Exact in theory; the closing call differs (argmax or draw) at the 1e-5 of positions still masked."""
    sedd, mdlm = (
        orders[key].total_variation for key in (("sedd[sampler=analytic]", "mask"), ("mdlm[sampler=cached]", "mask"))
    )
    assert np.allclose(sedd, mdlm, atol=1e-4)
    assert orders["fsdfm", "uniform"].total_variation == orders["dfm[solver=cumulative]", "uniform"].total_variation
