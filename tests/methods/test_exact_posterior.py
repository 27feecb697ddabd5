"""Every sampler, given the exact posterior of a small enumerated law instead of a network, approaches that law.

x_1 has a random law on all 27 sequences of three tokens over three symbols. Given x_t, in which each position is clean
with probability kappa and else a draw from the source, the posterior of each position follows by summing over all 27.
More steps must bring the sampled law closer; with many steps what is left is sampling noise.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tsdfm_bench.methods.ar import AR
from tsdfm_bench.methods.dfm import DFM
from tsdfm_bench.methods.fsdfm import FSDFM
from tsdfm_bench.methods.mdlm import MDLM
from tsdfm_bench.methods.score import implied_ratios
from tsdfm_bench.methods.sedd import SEDD

V, L, SAMPLES = 3, 3, 8000
SPACE = torch.tensor(list(itertools.product(range(V), repeat=L)))


def law() -> torch.Tensor:
    generator = np.random.default_rng(4)
    return torch.tensor(generator.dirichlet(np.full(V**L, 0.3)))


class Exact:
    """The exact posterior as a denoiser, of clean-token logits or log scores."""

    vocab_size = V

    def __init__(self, source: str, kind: str = "x0_logits") -> None:
        self.masked = source == "mask"
        self.outputs = V + self.masked
        self.kind = kind
        self.law = law()

    def predict(self, tokens, condition, rows, positions):
        kappa = condition.kappa[:, None, None]
        match = (tokens[:, None, :] == SPACE[None]).double()
        if self.masked:
            likelihood = torch.where(tokens[:, None, :] == V, 1 - kappa, kappa * match)
        else:
            likelihood = kappa * match + (1 - kappa) / V
        joint = likelihood.prod(dim=2) * self.law  # (rows, 27)
        one_hot = torch.nn.functional.one_hot(SPACE, V).double()
        p = torch.einsum("bs,slv->blv", joint, one_hot)[rows, positions]
        p = p / p.sum(dim=1, keepdim=True)
        if self.kind == "x0_logits":
            return torch.cat([p, torch.zeros(p.shape[0], self.masked)], dim=1).log()
        if self.masked:
            score = p / torch.expm1(condition.sigma)[rows, None]
            return torch.cat([score, torch.ones(p.shape[0], 1)], dim=1).log()
        return implied_ratios(p, tokens[rows, positions], condition.kappa[rows]).log()

    def networks(self):
        return {}


class ExactChain:
    """The exact conditional of the next token."""

    vocab_size = V

    def begin(self, batch, length):
        return {"tokens": torch.zeros(batch, 0, dtype=torch.int64)}

    def next_logits(self, memory, tokens):
        memory["tokens"] = torch.cat([memory["tokens"], tokens], dim=1)
        place = memory["tokens"].shape[1]
        joint = (memory["tokens"][:, None, :] == SPACE[None, :, :place]).all(dim=2) * law()
        return (joint @ torch.nn.functional.one_hot(SPACE[:, place], V).double()).log()

    def networks(self):
        return {}


def distance(method, lab, steps) -> float:
    """Total variation between sampled and true law."""
    tokens = method.sample(lab.request(SAMPLES, L, steps, seed=3)).tokens
    codes = (tokens * torch.tensor([V * V, V, 1])).sum(dim=1)
    counts = torch.bincount(codes, minlength=V**L).double() / SAMPLES
    return 0.5 * (counts - law()).abs().sum().item()


NOISE = 0.5 * (2 / np.pi * law() / SAMPLES).sqrt().sum().item()  # mean total variation of that many exact samples

CASES = {
    **{
        f"dfm-{s}-{k}": (lambda s=s, k=k: DFM(Exact(s), s, solver=k))
        for s in ("uniform", "mask")
        for k in ("euler", "exact", "cumulative")
    },
    "dfm-mask-never": lambda: DFM(Exact("mask"), "mask", solver="exact", unmask_change="never"),
    **{f"fsdfm-{s}": (lambda s=s: FSDFM(Exact(s), s)) for s in ("uniform", "mask")},
    **{f"mdlm-{s}": (lambda s=s: MDLM(Exact("mask"), sampler=s)) for s in ("cached", "ancestral")},
    **{
        f"sedd-{s}-{k}-{kind}": (lambda s=s, k=k, kind=kind: SEDD(Exact(s, kind), s, sampler=k))
        for s in ("uniform", "mask")
        for k in ("analytic", "euler")
        for kind in ("log_score", "x0_logits")
    },
}


@pytest.mark.parametrize("name", list(CASES))
def test_more_steps_come_closer(lab, name):
    few, many = distance(CASES[name](), lab, 2), distance(CASES[name](), lab, 64)
    assert few > 4 * NOISE
    assert many < 0.3 * few
    assert many < 2.5 * NOISE + 0.01


@pytest.mark.parametrize("build", [lambda: AR(ExactChain()), lambda: MDLM(Exact("mask"), sampler="first-hitting")])
def test_exact_samplers(lab, build):
    method = build()
    assert distance(method, lab, 1 if method.info.uses_steps else None) < 2 * NOISE
