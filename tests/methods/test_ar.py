"""AR: the law of whole sequences, calls with and without a prefix, both nucleus rules, cache against no cache."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tsdfm_bench.errors import UsageError
from tsdfm_bench.methods.ar import AR
from tsdfm_bench.methods.core import CausalNetworkDenoiser


class TableChain:
    """Next-token logits from a table of (previous two tokens); counts calls and tokens fed."""

    def __init__(self, vocab_size: int = 3, seed: int = 0) -> None:
        self.vocab_size = vocab_size
        self.table = torch.randn((vocab_size + 1,) * 2 + (vocab_size,), generator=torch.Generator().manual_seed(seed))
        self.calls = 0
        self.fed: list[int] = []

    def begin(self, batch: int, length: int):
        return {"history": torch.full((batch, 2), self.vocab_size), "batch": batch}

    def next_logits(self, memory, tokens):
        self.calls += 1
        self.fed.append(tokens.shape[1])
        memory["history"] = torch.cat([memory["history"], tokens], dim=1)
        before = memory["history"][:, -2:]
        return self.table[before[:, 0], before[:, 1]]

    def networks(self):
        return {}

    def law(self, sequence, temper=lambda p: p) -> float:
        history, probability = [self.vocab_size] * 2, 1.0
        for token in sequence:
            p = temper(torch.softmax(self.table[history[-2], history[-1]].double(), 0).numpy())
            probability *= p[token]
            history.append(token)
        return float(probability)


def nucleus(p: np.ndarray, mass: float, inclusive: bool) -> np.ndarray:
    order = np.argsort(-p)
    kept, total = [], 0.0
    for token in order:
        if kept and (total >= mass if inclusive else total + p[token] > mass):
            break
        kept.append(token)
        total += p[token]
    result = np.zeros_like(p)
    result[kept] = p[kept]
    return result / result.sum()


TEMPERS = {
    "plain": ({}, lambda p: p),
    "temperature": ({"temperature": 0.5}, lambda p: p**2 / (p**2).sum()),
    "inclusive": ({"top_p": 0.7}, lambda p: nucleus(p, 0.7, True)),
    "exclusive": ({"top_p": 0.7, "top_p_rule": "exclusive"}, lambda p: nucleus(p, 0.7, False)),
    "argmax": ({"temperature": 0.0}, lambda p: (p == p.max()).astype(float)),
    "race": ({"draw": "legacy-fp32"}, lambda p: p),
}


@pytest.mark.parametrize("name", list(TEMPERS))
def test_law_of_sequences(lab, name):
    settings, temper = TEMPERS[name]
    chain = TableChain()
    batch = AR(chain).sample(lab.request(8000, 3, None, **settings))
    law = {y: chain.law(y, temper) for y in itertools.product(range(3), repeat=3)}
    lab.agrees(batch.tokens, law)
    assert batch.lengths.tolist() == [3] * 8000


def test_one_call_per_token_and_a_prefix_in_the_first(lab):
    chain = TableChain()
    AR(chain).sample(lab.request(4, 6, None))
    assert chain.fed == [0, 1, 1, 1, 1, 1]
    prefix = torch.tensor([[2, 1, 0, 0, 0, 0]]).repeat(4, 1)
    pinned = torch.tensor([[True, True, False, False, False, False]]).repeat(4, 1)
    chain = TableChain()
    batch = AR(chain).sample(lab.request(4, 6, None, prefix=prefix, pinned=pinned))
    assert chain.fed == [2, 1, 1, 1]
    assert (batch.tokens[:, :2] == torch.tensor([2, 1])).all()
    chain = TableChain()
    everything = torch.ones_like(pinned)
    batch = AR(chain).sample(lab.request(4, 6, None, prefix=prefix, pinned=everything))
    assert chain.calls == 0
    assert torch.equal(batch.tokens, prefix)


def test_prefixes_of_different_length(lab):
    """A row's tokens do not depend on how much of the other rows is pinned."""
    prefix = torch.tensor([[2, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    pinned = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    together = AR(TableChain()).sample(lab.request(3, 4, None, prefix=prefix, pinned=pinned)).tokens
    for row in range(3):
        alone = lab.request(1, 4, None, first=row, prefix=prefix[row, None], pinned=pinned[row, None])
        assert torch.equal(AR(TableChain()).sample(alone).tokens[0], together[row])
    assert together[0, :3].tolist() == [2, 1, 1]
    assert together[1, 0] == 1


def test_infilling_is_refused_with_the_reason(lab):
    prefix = torch.zeros(2, 4, dtype=torch.int64)
    pinned = torch.tensor([[True, False, True, False], [True, True, False, False]])
    request = lab.request(2, 4, None, prefix=prefix, pinned=pinned)
    assert "left end only" in str(AR(TableChain()).refuse(request))
    with pytest.raises(UsageError, match="left to right"):
        AR(TableChain()).sample(request)
    assert AR(TableChain()).refuse(lab.request(2, 4, None)) is None
    assert "no source distribution" in str(AR(TableChain()).refuse(lab.request(2, 4, None, source="mask")))


def test_trace_grows_by_one_token(lab):
    batch = AR(TableChain()).sample(lab.request(2, 4, None, trace=True))
    assert batch.trace is not None
    assert batch.trace.shape == (2, 4, 4)
    for step in range(4):
        assert torch.equal(batch.trace[:, step, : step + 1], batch.tokens[:, : step + 1])
        assert (batch.trace[:, step, step + 1 :] == 3).all()


def test_cached_network_equals_the_network_on_the_whole_prefix(lab):
    from tsdfm_bench.methods.nets.causal import CausalConfig, CausalTransformer

    torch.manual_seed(0)
    network = CausalTransformer(CausalConfig(11, 8, bos_id=3, width=16, blocks=2, heads=2)).eval()
    torch.nn.init.normal_(network.head.weight)
    denoiser = CausalNetworkDenoiser(network, 11, 3)
    calls = []
    handle = network.register_forward_hook(lambda *_: calls.append(1))
    tokens = AR(denoiser).sample(lab.request(3, 8, None, temperature=0.0)).tokens
    handle.remove()
    assert len(calls) == 8
    with torch.no_grad():
        whole = network(torch.cat([torch.full((3, 1), 3), tokens[:, :-1]], dim=1))
    assert torch.equal(whole.argmax(dim=-1), tokens)
    prefix = tokens.clone()
    pinned = torch.arange(8)[None].repeat(3, 1) < 3
    again = AR(denoiser).sample(lab.request(3, 8, None, temperature=0.0, prefix=prefix, pinned=pinned)).tokens
    assert torch.equal(again, tokens)
