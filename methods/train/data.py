"""Training text as windows, and the random numbers of a training step.

A window is `length` consecutive tokens at a random offset of a split's token stream (documents joined, each followed by
the end-of-text id). All randomness of step i comes from counter-based streams addressed by (seed, recipe, i, row,
site), so a resumed training draws what an uninterrupted one would have drawn, and two recipes that differ in one
option share every other draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tsdfm_bench.errors import UsageError
from tsdfm_bench.rng import Streams, derive_key


class Draws:
    """Uniforms of one training step for a batch of rows.

    Args:
        seed: training seed.
        name: what separates the streams of different uses ("train", "validation", ...).
        step: training step.
        batch: rows.
        device: where the uniforms are made.
    """

    def __init__(self, seed: int, name: str, step: int, batch: int, device: str | torch.device = "cpu") -> None:
        self.streams = Streams(derive_key(seed, name), torch.arange(batch, device=device))
        self.step = step
        self.batch = batch

    def rows(self, rows: Tensor) -> Draws:
        """The same streams, restricted to some rows (n,)."""
        part = Draws.__new__(Draws)
        part.streams, part.step, part.batch = self.streams.select(rows), self.step, rows.numel()
        return part

    def uniform(self, site: str, size: int) -> Tensor:
        """(batch, size) fp64 uniforms."""
        return self.streams.uniform(site, self.step, size)

    def at(self, site: str, rows: Tensor, positions: Tensor) -> Tensor:
        """(n,) fp64 uniforms at (row, position) pairs."""
        return self.streams.uniform_at(site, self.step, rows, positions)

    def stratified(self, site: str) -> Tensor:
        """(batch,) fp64: one uniform per equal part of [0, 1), the parts in row order (MDLM's "antithetic" draw)."""
        parts = torch.arange(self.batch, device=self.streams.device) / self.batch
        return (self.uniform(site, 1)[:, 0] / self.batch + parts) % 1.0


@dataclass(frozen=True)
class TrainingText:
    """The token streams a training needs.

    Args:
        name: task name.
        streams: split name ("train", "validation") -> (n,) int64 tokens.
        vocab_size: V.
        length: window length.
        tokenizer: identifier of the vocabulary.
        data_hash: of the training split.
    """

    name: str
    streams: Mapping[str, np.ndarray]
    vocab_size: int
    length: int
    tokenizer: str
    data_hash: str

    def __post_init__(self) -> None:
        for split, stream in self.streams.items():
            if stream.size <= self.length:
                raise UsageError(
                    f"split '{split}' of task '{self.name}' has {stream.size} tokens: too few for length {self.length}"
                )

    def windows(self, split: str, draws: Draws) -> Tensor:
        """(batch, length) int64 windows at random offsets."""
        stream = self._tensor(split, draws.streams.device)
        offsets = (draws.uniform("window", 1) * (stream.numel() - self.length)).long()
        return stream[offsets + torch.arange(self.length, device=stream.device)]

    def unigram(self) -> Tensor:
        """(V,) fp32 log frequencies of the training split, every token counted half once more."""
        counts = torch.bincount(self._tensor("train", torch.device("cpu")), minlength=self.vocab_size) + 0.5
        return (counts / counts.sum()).log().float()

    def _tensor(self, split: str, device: torch.device) -> Tensor:
        cache: dict[tuple[str, torch.device], Tensor] = self.__dict__.setdefault("_cache", {})
        if (split, device) not in cache:
            cache[split, device] = torch.tensor(self.streams[split], device=device)
        return cache[split, device]
