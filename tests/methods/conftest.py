"""Tools of the sampler tests: denoisers without a network, one-step frequencies, and a chi-square verdict."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from tsdfm_bench.api import SampleRequest
from tsdfm_bench.methods.core import Condition, Grid, Kernel, State, run
from tsdfm_bench.rng import Streams


class TableDenoiser:
    """Logits looked up in a fixed random table by (all tokens of the row, position, time): exact on any batch."""

    def __init__(self, vocab_size: int, outputs: int, kind: str = "x0_logits", seed: int = 0, spread: float = 1.0):
        self.vocab_size, self.outputs, self.kind = vocab_size, outputs, kind
        self.calls = 0
        self.row_calls = 0
        self.places = 0
        generator = torch.Generator().manual_seed(seed)
        self.table = spread * torch.randn(4093, outputs, generator=generator)

    def predict(self, tokens: Tensor, condition: Condition, rows: Tensor, positions: Tensor) -> Tensor:
        self.calls += 1
        self.row_calls += tokens.shape[0]
        self.places += rows.numel()
        return self.table[self.key(tokens, condition.t)[rows] * 31 % 4093 + positions * 7 - 4093].clone()

    def key(self, tokens: Tensor, t: Tensor) -> Tensor:
        weights = 1 + torch.arange(tokens.shape[1]) ** 2
        return ((tokens + 1) * weights).sum(dim=1) * 17 + (t * 1e6).long() % 997

    def probabilities(self, tokens: tuple[int, ...], t: float) -> np.ndarray:
        """(length, outputs) softmax at every position, for formulas written out in a test."""
        x = torch.tensor([tokens])
        length = len(tokens)
        rows, positions = torch.zeros(length, dtype=torch.int64), torch.arange(length)
        times = torch.tensor([t], dtype=torch.float64)
        logits = self.predict(x, SimpleNamespace(t=times), rows, positions)  # type: ignore[arg-type]
        return torch.softmax(logits.double(), dim=-1).numpy()

    def networks(self) -> dict[str, nn.Module]:
        return {}


def states(outputs: int, length: int) -> list[tuple[int, ...]]:
    """All sequences of a tiny state space."""
    return list(itertools.product(range(outputs), repeat=length))


def first_step(kernel: Kernel, z: tuple[int, ...], grid: Grid, rows: int, seed: int, step: int = 0) -> Tensor:
    """(rows, length) states after step number `step` of a grid, all started from z just before it."""
    streams = Streams.of(seed, str(z), rows)
    state = State(torch.tensor([z]).repeat(rows, 1), streams)
    trace = run(kernel, state, grid, trace=True)
    assert trace is not None
    return trace[:, step]


def product_law(per_position: list[np.ndarray], outputs: int) -> dict[tuple[int, ...], float]:
    """Law of independent positions over all sequences."""
    law = {}
    for y in states(outputs, len(per_position)):
        law[y] = float(np.prod([p[token] for p, token in zip(per_position, y, strict=True)]))
    return law


def agrees(samples: Tensor, law: dict[tuple[int, ...], float], level: float = 1e-4) -> None:
    """Chi-square of sampled sequences against a law; outcomes of probability 0 must not occur."""
    names = list(law)
    index = {name: i for i, name in enumerate(names)}
    counts = np.zeros(len(names))
    for row, count in zip(*np.unique(samples.numpy(), axis=0, return_counts=True), strict=True):
        counts[index[tuple(int(v) for v in row)]] = count
    expected = np.array([law[name] for name in names]) * counts.sum()
    assert expected.sum() == pytest.approx(counts.sum(), rel=1e-9)
    impossible = expected < 1e-9
    assert counts[impossible].sum() == 0
    order = np.argsort(expected)
    counts, expected = counts[order], expected[order]
    small = np.cumsum(expected) < 10  # pool the rarest outcomes until every cell is large enough
    split = int(small.sum()) + 1
    counts = np.concatenate([[counts[:split].sum()], counts[split:]])
    expected = np.concatenate([[expected[:split].sum()], expected[split:]])
    if len(counts) == 1:
        return
    assert stats.chisquare(counts, expected).pvalue > level


def request(batch: int = 4, length: int = 8, steps: int | None = 8, **settings: object) -> SampleRequest:
    """A sampling request with fixed streams."""
    seed = int(settings.pop("seed", 0))  # type: ignore[call-overload]
    first = int(settings.pop("first", 0))  # type: ignore[call-overload]
    return SampleRequest(Streams.of(seed, "cell", batch, first), length, steps, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def lab() -> SimpleNamespace:
    """The tools above under one name."""
    tools: dict[str, Callable[..., object]] = {
        "TableDenoiser": TableDenoiser,
        "states": states,
        "first_step": first_step,
        "product_law": product_law,
        "agrees": agrees,
        "request": request,
    }
    return SimpleNamespace(**tools)
