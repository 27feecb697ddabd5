"""A tiny task, method, scorer and metric, registered as a local plug-in file: everything the harness needs, in no time.

The method is deterministic and exact: token = floor(u V) with u from each sequence's own stream at site "token", so the
expected samples of any cell can be computed in a test without running it.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tsdfm_bench.api import (
    CellData,
    Identity,
    Measurement,
    MethodInfo,
    MetricInfo,
    SampleBatch,
    SampleRequest,
    ScoreBatch,
    ScorerInfo,
    TaskInfo,
)
from tsdfm_bench.errors import AssetError, CheckpointError, UsageError
from tsdfm_bench.rng import Streams

VOCAB, LENGTH = 16, 12
LETTERS = "etaoinshrdlucm ."


def log(event: str) -> None:
    """Append an event to the file named by FAKES_LOG, if any: what was really loaded and called."""
    if path := os.environ.get("FAKES_LOG"):
        with Path(path).open("a") as file:
            file.write(event + "\n")


class TinyTask:
    """Random letters; real text prefers the first half of the alphabet."""

    def __init__(self) -> None:
        self.info = TaskInfo(
            name="tiny",
            tokenizer="tiny-16@00000000",
            vocab_size=VOCAB,
            length=LENGTH,
            data_hash="sha256:" + hashlib.sha256(b"tiny").hexdigest(),
            references=("real", "unigram", "loop"),
            description="letters",
        )

    @classmethod
    def load(cls, params: Mapping[str, object]) -> TinyTask:
        if params:
            raise UsageError(f"task 'tiny' has no options: {params}")
        return cls()

    def decode(self, tokens: np.ndarray, lengths: np.ndarray) -> list[str]:
        return ["".join(LETTERS[t] for t in row[:n]) for row, n in zip(tokens, lengths, strict=True)]

    def encode(self, text: str) -> list[int]:
        return [LETTERS.index(c) for c in text.lower() if c in LETTERS]

    def reference(self, name: str, streams: Streams, length: int) -> SampleBatch:
        u = streams.uniform(name, 0, length)
        if name == "real":
            u = u**2
        elif name == "loop":
            u = u[:, :2].repeat(1, length)[:, :length]
        tokens = (u * VOCAB).floor().to(torch.int64)
        return SampleBatch(tokens, torch.full((len(streams),), length))

    def prompts(self, streams: Streams, length: int) -> Tensor:
        return self.reference("real", streams, length).tokens


class Net(nn.Module):
    """One parameter, so that it can be hooked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.weight


class Counter:
    """Calls its network once per step (on half the batch in every second step), then reads tokens from the streams."""

    info = MethodInfo(
        name="counter",
        family="fake",
        sources=("uniform", "mask"),
        citation="arXiv:0000.00000",
        options={"flavour": ("plain", "loud"), "slow_s": "seconds a batch takes", "spoil": "what goes wrong"},
    )

    def __init__(self, params: Mapping[str, object]) -> None:
        self.net = Net()
        self.params = dict(params)
        self.spoil = str(params.get("spoil", ""))

    @classmethod
    def identify(cls, params: Mapping[str, object]) -> Identity:
        checkpoint = params.get("checkpoint")
        if checkpoint is None:
            return Identity("tiny/counter", "sha256:" + "0" * 64)
        path = Path(str(checkpoint))
        if not path.is_file():
            raise CheckpointError(f"no such checkpoint: {path}; leave --checkpoint out")
        return Identity(path.name, f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}")

    @classmethod
    def load(cls, params: Mapping[str, object], device: str) -> Counter:
        log(f"load {params.get('source')}")
        if params.get("spoil") == "load":
            raise CheckpointError("the weights do not fit: missing keys blocks.0.weight")
        return cls(params)

    def networks(self) -> Mapping[str, nn.Module]:
        return {"denoiser": self.net}

    def refuse(self, request: SampleRequest) -> str | None:
        return "counter cannot count to 13" if request.steps == 13 else None

    def sample(self, request: SampleRequest) -> SampleBatch:
        log(f"sample {int(request.streams.sequences[0])} x{request.batch} steps {request.steps}")
        if slow := float(str(self.params.get("slow_s", os.environ.get("FAKES_SLOW_S", 0)))):
            time.sleep(slow)
        state = torch.zeros(request.batch, 1)
        for step in range(request.steps or 1):
            self.net(state if step % 2 == 0 else state[: request.batch // 2])
        u = request.streams.uniform("token", 0, request.length) ** (1.0 if request.temperature else 2.0)
        tokens = (u * VOCAB).floor().to(torch.int64)
        if request.prefix is not None and request.pinned is not None and self.spoil != "pinned":
            tokens = torch.where(request.pinned, request.prefix, tokens)
        lengths = torch.full((request.batch,), request.length, dtype=torch.int64)
        return spoiled(self.spoil, SampleBatch(tokens, lengths), request)


def spoiled(how: str, batch: SampleBatch, request: SampleRequest) -> SampleBatch:
    """The batch with one fault; batches of sequence 0 are fine if the fault starts with "late "."""
    if how.startswith("late "):
        if int(request.streams.sequences[0]) == 0:
            return batch
        how = how.removeprefix("late ")
    match how:
        case "raise":
            raise RuntimeError("boom in sample")
        case "memory":
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        case "shape":
            return replace(batch, tokens=batch.tokens[:, :-1])
        case "dtype":
            return replace(batch, tokens=batch.tokens.int())
        case "mask":
            return replace(batch, tokens=batch.tokens.fill_(VOCAB))
        case "negative":
            return replace(batch, tokens=batch.tokens - 1)
        case "lengths":
            return replace(batch, lengths=batch.lengths + 1)
        case "nothing":
            return None  # type: ignore[return-value]
        case "exit":
            raise SystemExit(3)
    return batch


class Stepless(Counter):
    """A method without steps and sources."""

    info = MethodInfo(name="stepless", family="fake", uses_steps=False)

    @classmethod
    def identify(cls, params: Mapping[str, object]) -> Identity:
        return Identity("none", "none")


class Foreign(Counter):
    """A method of another vocabulary."""

    info = MethodInfo(name="foreign", family="fake", tokenizer="gpt2", sources=("mask",))


class Toy:
    """NLL of a letter = its rank; the text's own length in letters is its number of units."""

    def __init__(self, revision: str) -> None:
        self.info = self.describe({"revision": revision})
        self.net = Net()

    @classmethod
    def describe(cls, params: Mapping[str, object]) -> ScorerInfo:
        return ScorerInfo(
            name="toy",
            title="Toy scorer",
            revision=str(params.get("revision", "1")),
            unit="character",
            dtype="float32",
            window=LENGTH,
            stride=LENGTH,
        )

    @classmethod
    def load(cls, params: Mapping[str, object], device: str) -> Toy:
        log("load toy")
        return cls(str(params.get("revision", "1")))

    def networks(self) -> Mapping[str, nn.Module]:
        return {"scorer": self.net}

    def score(self, texts: Sequence[str]) -> ScoreBatch:
        log(f"score {len(texts)}")
        units = [np.asarray([LETTERS.index(c) for c in text], dtype=np.int64) for text in texts]
        return ScoreBatch(
            nll=[1.0 + u.astype(np.float32) / 8 for u in units],
            units=units,
            special=[np.zeros(len(u), dtype=bool) for u in units],
            bytes=np.asarray([len(text) for text in texts], dtype=np.int64),
            spans=[np.arange(len(u))[:, None] + [0, 1] for u in units],
        )


class Blind(Toy):
    """A scorer that does not say where its units lie."""

    def score(self, texts: Sequence[str]) -> ScoreBatch:
        return replace(super().score(texts), spans=None)


class Absent(Toy):
    """A scorer whose files cannot be had."""

    @classmethod
    def fetch(cls, params: Mapping[str, object]) -> None:
        raise AssetError("could not obtain Absent (1 MB). Tried:\n  hub: no network\nWhat to type: nothing helps")


class Unfit(Toy):
    """A scorer whose files say that it cannot judge."""

    @classmethod
    def check(cls, params: Mapping[str, object]) -> None:
        raise UsageError("the tokenizer of Unfit does not give a text back")


class Late(Toy):
    """A scorer of which it is only seen when it is loaded that it cannot judge."""

    @classmethod
    def load(cls, params: Mapping[str, object], device: str) -> Toy:
        raise UsageError("Late is not causal")


class Broken(Toy):
    """A scorer that raises."""

    def score(self, texts: Sequence[str]) -> ScoreBatch:
        raise ValueError("no opinion")


class MeanToken:
    """Entropy of tokens and, if there are scores, perplexity."""

    info = MetricInfo(name="letters", description="entropy and perplexity of letters", needs=frozenset({"scores"}))

    @classmethod
    def load(cls, params: Mapping[str, object]) -> MeanToken:
        return cls()

    def compute(self, cell: CellData) -> list[Measurement]:
        log("compute letters")
        counts = np.stack([np.bincount(row, minlength=cell.vocab_size) for row in cell.tokens])
        p = counts / counts.sum(axis=1, keepdims=True)
        entropy = -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), axis=1)
        found = [
            Measurement(
                "entropy_nats",
                "nats",
                "entropy of a sequence's own letters, mean",
                columns=(entropy,),
                statistic=lambda e: e.mean(axis=-1),
            )
        ]
        for name, scores in cell.scores.items():
            sums = np.asarray([float(nll.sum()) for nll in scores.nll])
            units = np.asarray([len(nll) for nll in scores.nll], dtype=float)
            found.append(
                Measurement(
                    "gen_ppl/pooled",
                    "perplexity",
                    f"exp of the mean NLL of all letters under {name}",
                    scorer=name,
                    columns=(sums, units),
                    statistic=lambda s, n: np.exp(s.sum(axis=-1) / n.sum(axis=-1)),
                    better="lower",
                )
            )
        return found


class Distance:
    """How far the mean token is from real text; the other half of real text gives the floor."""

    info = MetricInfo(name="distance", description="difference of mean tokens", needs=frozenset({"reference"}))

    @classmethod
    def load(cls, params: Mapping[str, object]) -> Distance:
        return cls()

    def compute(self, cell: CellData) -> list[Measurement]:
        if cell.reference is None:
            return []
        reference = cell.reference
        if np.array_equal(cell.tokens, reference.tokens):
            assert cell.reference_other is not None
            reference = cell.reference_other
        gap = abs(float(cell.tokens.mean()) - float(reference.tokens.mean()))
        return [Measurement("distance", "1", "distance of mean tokens from real text", value=gap)]


class Speed:
    """Sequences per second."""

    info = MetricInfo(name="speed", description="sequences per second", needs=frozenset({"cost"}))

    @classmethod
    def load(cls, params: Mapping[str, object]) -> Speed:
        return cls()

    def compute(self, cell: CellData) -> list[Measurement]:
        if cell.cost is None:
            return []
        value = cell.cost.sequences / cell.cost.seconds
        return [Measurement("sequences_per_second", "1/s", "warm-up excluded", value=value)]


class Failing(Speed):
    """A metric that raises."""

    info = MetricInfo(name="failing", description="fails")

    def compute(self, cell: CellData) -> list[Measurement]:
        raise ZeroDivisionError("division by zero")


METHODS = {"counter": Counter, "stepless": Stepless, "foreign": Foreign}
TASKS = {"tiny": TinyTask}
SCORERS = {"toy": Toy, "blind": Blind, "absent": Absent, "unfit": Unfit, "late": Late, "broken": Broken}
METRICS = {"letters": MeanToken, "distance": Distance, "speed": Speed, "failing": Failing}
