"""A small method that keeps the contract, and one plug-in for every way of breaking it.

`good` reveals masked tokens of independent places in a random order; a tiny network gives their logits. It is written
with the contract alone, and takes exact predictions in place of the network. Each class below it spoils one thing.
"""

from __future__ import annotations

import os
import pickle
import random
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from tsdfm_bench.api import MethodInfo, SampleBatch, SampleRequest
from tsdfm_bench.errors import UsageError

VOCAB = 32
RESERVED = {"task", "vocab_size", "checkpoint", "source", "length"}


class Net(nn.Module):
    """Logits of a place from the sum of all others."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Embedding.from_pretrained(torch.randn(VOCAB + 1, 8, generator=generator))
        self.head = nn.Linear(8, VOCAB)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(VOCAB, 8, generator=generator))
            self.head.bias.copy_(torch.randn(VOCAB, generator=generator))

    def forward(self, tokens: Tensor) -> Tensor:
        context = self.embedding(tokens)
        return self.head((context.cumsum(dim=1) / tokens.shape[1]).double().float())


class Good:
    """Masked sampling in `steps` blocks of a random order of places; each place draws from p given the others."""

    info = MethodInfo(name="good", family="fake", tokenizer="fake", vocab_size=VOCAB, sources=("mask",))

    def __init__(self, denoiser: object = None, vocab_size: int = VOCAB) -> None:
        self.net = Net(7)
        self.denoiser, self.mask = denoiser, vocab_size

    @classmethod
    def load(cls, params: Mapping[str, object], device: str) -> Good:
        if unknown := set(params) - RESERVED:
            raise UsageError(f"unknown options: {unknown}")
        return cls()

    @classmethod
    def from_oracle(cls, oracle, params: Mapping[str, object], device: str) -> Good:
        return cls(oracle("posterior", "mask"), int(str(params["vocab_size"])))

    def networks(self) -> Mapping[str, nn.Module]:
        return {"denoiser": self.net}

    def refuse(self, request: SampleRequest) -> str | None:
        if request.draw != "fp64":
            return "it draws in fp64"
        if request.source not in (None, "mask") or not request.steps:
            return "it starts from masks and needs steps"
        return None

    def sample(self, request: SampleRequest) -> SampleBatch:
        length, steps = request.length, request.steps or 1
        tokens = torch.full((request.batch, length), self.mask)
        order = request.streams.uniform("order", 0, length)
        if request.prefix is not None and request.pinned is not None:
            tokens = torch.where(request.pinned, request.prefix, tokens)
        when = (order * steps).floor().long()
        for step in range(steps):
            logits = self.logits(tokens, step / steps)
            u = request.streams.uniform("token", step, length)
            drawn = self.draw(logits, u, request)
            tokens = torch.where((when == step) & (tokens == self.mask), drawn, tokens)
        return SampleBatch(tokens, torch.full((request.batch,), length))

    def logits(self, tokens: Tensor, t: float) -> Tensor:
        """(batch, length, V)."""
        if self.denoiser is None:
            return self.net(tokens)
        rows, places = torch.ones_like(tokens).nonzero(as_tuple=True)
        kappa = torch.full((len(tokens),), max(t, 1e-9), dtype=torch.float64)
        p = self.denoiser.predict(tokens, SimpleNamespace(kappa=kappa), rows, places)
        return p.reshape(*tokens.shape, -1)[..., : self.mask]

    def draw(self, logits: Tensor, u: Tensor, request: SampleRequest) -> Tensor:
        if request.temperature == 0:
            return logits.argmax(dim=-1)
        p = (logits.double() / request.temperature).softmax(dim=-1)
        if request.top_p is not None and request.top_p < 1:
            ranked, places = p.sort(dim=-1, descending=True)
            mass = ranked.cumsum(dim=-1)
            kept = mass - ranked < request.top_p if request.top_p_rule == "inclusive" else mass <= request.top_p
            kept[..., 0] = True
            p = p * torch.zeros_like(kept).scatter(-1, places, kept)
        cdf = p.cumsum(dim=-1)
        return torch.searchsorted(cdf, u[..., None] * cdf[..., -1:], right=True).squeeze(-1).clamp_max(p.shape[-1] - 1)


def spoil(name: str):
    """Register a class under the name of the fault; the check meant for it is what stands before the dash."""

    def register(cls):
        cls.info = replace(Good.info, **vars(cls).get("changed", {}), name=name)
        METHODS[name] = cls
        return cls

    return register


METHODS: dict[str, type] = {"good": Good}


@spoil("contract-options")
class AnyOption(Good):
    @classmethod
    def load(cls, params, device):
        return cls()


@spoil("contract-networks")
class NoModules(Good):
    def networks(self):
        return [self.net]


@spoil("runs-raises")
class Raises(Good):
    def sample(self, request):
        raise RuntimeError("boom")


@spoil("runs-exits")
class Exits(Good):
    def sample(self, request):
        raise SystemExit(3)


@spoil("runs-dies")
class Dies(Good):
    def sample(self, request):
        os._exit(3)


@spoil("runs-hangs")
class Hangs(Good):
    def sample(self, request):
        while True:
            time.sleep(1)


@spoil("shapes-dtype")
class Narrow(Good):
    def sample(self, request):
        batch = super().sample(request)
        return replace(batch, tokens=batch.tokens.int())


@spoil("shapes-short")
class Short(Good):
    def sample(self, request):
        batch = super().sample(request)
        return replace(batch, tokens=batch.tokens[:, :-1])


@spoil("ids-mask")
class Leaks(Good):
    """One place in thirty stays masked, in requests without anything pinned."""

    def sample(self, request):
        batch = super().sample(request)
        left = request.streams.uniform("left", 0, request.length) < 1 / 30
        if self.denoiser is None and request.pinned is None:
            batch.tokens[left] = VOCAB
        return batch


@spoil("lengths-one")
class NeedsTwo(Good):
    def sample(self, request):
        if request.length == 1 and self.denoiser is None:
            raise IndexError("index 1 is out of bounds")
        return super().sample(request)


@spoil("repeatable-batch")
class RowNumber(Good):
    """What stands in a row depends on how many rows there are."""

    def draw(self, logits, u, request):
        return super().draw(logits, (u + 0.01 * request.batch) % 1.0, request)


@spoil("repeatable-one")
class OneInEight(Good):
    """One sequence of every eight has another fate in a large batch: as few as a network's rounding may change."""

    def sample(self, request):
        odd = (request.streams.sequences % 8 == 3)[:, None] & (request.batch > 4)
        self.shift = 0.3 * odd
        return super().sample(request)

    def draw(self, logits, u, request):
        return super().draw(logits, (u + self.shift) % 1.0, request)


@spoil("repeatable-clock")
class Elsewhere(Good):
    """Draws from a generator of its own that nobody seeds."""

    def draw(self, logits, u, request):
        own = random.SystemRandom()
        return super().draw(logits, (u + own.random()) % 1.0, request)


@spoil("repeatable-load")
class Rerolls(Good):
    """Every instance has a whim of its own, so a run that was stopped goes on with another one."""

    def __init__(self, denoiser=None, vocab_size=VOCAB):
        super().__init__(denoiser, vocab_size)
        self.whim = random.SystemRandom().random()

    def draw(self, logits, u, request):
        return super().draw(logits, (u + self.whim) % 1.0, request)


@spoil("independent-seed")
class OneSeed(Good):
    """The root seed is not read: every run gives the same samples."""

    def sample(self, request):
        streams = type(request.streams)(type(request.streams).of(0, "mine", 1).key, request.streams.sequences)
        return super().sample(replace(request, streams=streams))


@spoil("independent-rows")
class OneStream(Good):
    """All sequences follow the first number of the key."""

    def sample(self, request):
        streams = type(request.streams)(request.streams.key, torch.zeros_like(request.streams.sequences))
        return super().sample(replace(request, streams=streams))


@spoil("pinned-changed")
class Forgets(Good):
    def sample(self, request):
        return super().sample(replace(request, prefix=None, pinned=None))


@spoil("pinned-rewritten")
class Rewrites(Good):
    """Writes other tokens into its own request, and keeps those."""

    def sample(self, request):
        if request.prefix is not None and self.denoiser is None:
            request.prefix.zero_()
        return super().sample(request)


@spoil("pinned-peeks")
class Peeks(Good):
    """Copies the held-out token beside the pinned ones."""

    def sample(self, request):
        batch = super().sample(request)
        if request.prefix is not None:
            batch.tokens[:, 3] = request.prefix[:, 3]
        return batch


@spoil("pinned-infill")
class KeepsPrefixesOnly(Good):
    """Tokens pinned at the beginning are kept, others are drawn anew."""

    def sample(self, request):
        if request.pinned is not None:
            prefix = request.pinned.long().cumprod(dim=1).bool()
            request = replace(request, pinned=prefix)
        return super().sample(request)


@spoil("refusals-raise")
class Strict(Good):
    def refuse(self, request):
        if request.top_p is not None and request.top_p <= 0:
            raise ValueError("top_p")
        return super().refuse(request)


@spoil("refusals-lets-through")
class LetsThrough(Good):
    def sample(self, request):
        if request.trace:
            raise NotImplementedError("no trace")
        return super().sample(request)


@spoil("temperature-ignored")
class Lukewarm(Good):
    def draw(self, logits, u, request):
        return super().draw(logits, u, replace(request, temperature=1.0))


@spoil("temperature-nucleus")
class WholeNucleus(Good):
    def draw(self, logits, u, request):
        return super().draw(logits, u, replace(request, top_p=None))


@spoil("calls-hidden")
class Hidden(Good):
    """Calls a second network that it does not show."""

    def __init__(self, denoiser=None, vocab_size=VOCAB):
        super().__init__(denoiser, vocab_size)
        self.judge = Net(8)

    def logits(self, tokens, t):
        if self.denoiser is None:
            return super().logits(tokens, t) + 0.1 * self.judge(tokens)
        return super().logits(tokens, t)


@spoil("calls-parts")
class Parts(Good):
    """Calls the network's forward, past the hooks."""

    def logits(self, tokens, t):
        return self.net.forward(tokens) if self.denoiser is None else super().logits(tokens, t)


@spoil("law-frozen")
class Frozen(Good):
    """All places are drawn from the first prediction: never conditions on what is already there."""

    def sample(self, request):
        return super().sample(replace(request, steps=1)) if self.denoiser is not None else super().sample(request)


@spoil("draw-race")
class Race(Good):
    """The fp32 exponential race under the name fp64."""

    def draw(self, logits, u, request):
        if self.denoiser is None or logits.shape[-1] < 100:
            return super().draw(logits, u, request)
        generator = torch.Generator().manual_seed(int(u[0, 0] * 2**52))  # as if one stream served the batch
        noise = -torch.rand(logits.shape, generator=generator).clamp_min_(1e-10).log_().clamp_max_(-(2.0**-24))
        return (logits.float().exp() / noise).argmax(dim=-1)


@spoil("state-seed")
class Seeds(Good):
    def sample(self, request):
        torch.manual_seed(0)
        return super().sample(request)


@spoil("state-numpy")
class SeedsNumpy(Good):
    def sample(self, request):
        np.random.seed(0)
        return super().sample(request)


@spoil("state-python")
class SeedsPython(Good):
    def sample(self, request):
        random.seed(0)
        return super().sample(request)


@spoil("state-precision")
class Halves(Good):
    @classmethod
    def load(cls, params, device):
        loaded = super().load(params, device)
        torch.set_float32_matmul_precision("medium")
        return loaded


@spoil("files-home")
class Writes(Good):
    def sample(self, request):
        path = Path(os.environ["BROKEN_FOLDER"]) / "log.txt"
        path.write_text("I was here")
        return super().sample(request)


@spoil("process-prints")
class Prints(Good):
    def sample(self, request):
        print("step 1 of 4")
        return super().sample(request)


@spoil("process-chdir")
class Moves(Good):
    def sample(self, request):
        os.chdir(Path.cwd().parent)
        return super().sample(request)


@spoil("pickle-load")
class Pickled(Good):
    @classmethod
    def load(cls, params, device):
        with tempfile.TemporaryFile() as file:
            pickle.dump(SimpleNamespace(weight=1), file)
            file.seek(0)
            pickle.load(file)
        return super().load(params, device)


@spoil("cost-cubic")
class Cubic(Good):
    def sample(self, request):
        until = time.perf_counter() + 3e-5 * request.batch**3
        while self.denoiser is None and time.perf_counter() < until:
            pass
        return super().sample(request)
