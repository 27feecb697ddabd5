"""Training text as windows, and the random numbers of a training step.

A window is `length` consecutive tokens at a random offset of a split's token stream (documents joined, each followed by
the end-of-text id). All randomness of step i comes from counter-based streams addressed by (seed, recipe, i, row,
site), so a resumed training draws what an uninterrupted one would have drawn, and two recipes that differ in one
option share every other draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsdfm_bench.errors import UsageError
from tsdfm_bench.rng import Streams, derive_key

ON_DEVICE_TOKENS = 1 << 28  # larger streams are read from disk
UNIGRAM_TOKENS = 1 << 26


class Draws:
    """Uniforms of one training step for a batch of rows.

    Args:
        seed: training seed.
        name: what separates the streams of different uses ("train", "validation", ...).
        step: training step.
        batch: rows.
        device: where the uniforms are made.
        first, total: these are rows first .. first + batch - 1 of a step of `total` (0 = batch) rows. What a row draws
            does not depend on how the step is split over processes and passes.
    """

    def __init__(
        self,
        seed: int,
        name: str,
        step: int,
        batch: int,
        device: str | torch.device = "cpu",
        first: int = 0,
        total: int = 0,
    ) -> None:
        self.streams = Streams(derive_key(seed, name), torch.arange(first, first + batch, device=device))
        self.step = step
        self.batch = batch
        self.total = total or batch

    def rows(self, rows: Tensor) -> Draws:
        """The same streams, restricted to some rows (n,)."""
        part = Draws.__new__(Draws)
        part.streams, part.step, part.batch = self.streams.select(rows), self.step, rows.numel()
        part.total = self.total
        return part

    def describe(self, rows: Tensor) -> str:
        """Which windows of the step some rows are, (batch,) bool, for a message."""
        numbers = self.streams.sequences[rows].tolist()
        shown = ", ".join(str(number) for number in numbers[:8]) + (", ..." if len(numbers) > 8 else "")
        return f"{len(numbers)} of {rows.numel()} windows (numbers {shown} of the step's {self.total})"

    def uniform(self, site: str, size: int) -> Tensor:
        """(batch, size) fp64 uniforms."""
        return self.streams.uniform(site, self.step, size)

    def at(self, site: str, rows: Tensor, positions: Tensor) -> Tensor:
        """(n,) fp64 uniforms at (row, position) pairs."""
        return self.streams.uniform_at(site, self.step, rows, positions)

    def stratified(self, site: str) -> Tensor:
        """(batch,) fp64: one uniform per equal part of [0, 1), the parts in row order (MDLM's "antithetic" draw)."""
        parts = self.streams.sequences / self.total
        return (self.uniform(site, 1)[:, 0] / self.total + parts) % 1.0


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
        end_of_text: id that ends a document.
        block: windows start at multiples of this (packed blocks of that length); 0 = anywhere.
        energy: source -> exact energy of noised states, for tasks whose law is known (see `ExactHook.oracle`).
        judges: spec of a scorer -> judge, (n, length) int64 finished sequences -> (n,) nats per unit; None: no scorers.
        citation: source and licence of the text, as its task gives them.
    """

    name: str
    streams: Mapping[str, np.ndarray]
    vocab_size: int
    length: int
    tokenizer: str
    data_hash: str
    energy: Callable[[str], Any] | None = None
    judges: Callable[[str], Callable[[np.ndarray], np.ndarray]] | None = None
    end_of_text: int = 0
    block: int = 0
    citation: str = ""

    def __post_init__(self) -> None:
        for split, stream in self.streams.items():
            if stream.size <= self.length:
                raise UsageError(
                    f"split '{split}' of task '{self.name}' has {stream.size} tokens: too few for length {self.length}"
                )
        if self.block and self.block != self.length:
            raise UsageError(f"task '{self.name}' is packed in blocks of {self.block} tokens, not of {self.length}")

    def windows(self, split: str, draws: Draws) -> Tensor:
        """(batch, length) int64 windows at random offsets."""
        source, device = self.streams[split], draws.streams.device
        if self.block:
            offsets = (draws.uniform("window", 1) * (source.size // self.block)).long() * self.block
        else:
            offsets = (draws.uniform("window", 1) * (source.size - self.length)).long()
        if source.size > ON_DEVICE_TOKENS:  # stays on disk; only the windows are read
            rows = [np.asarray(source[start : start + self.length], dtype=np.int64) for start in offsets[:, 0].tolist()]
            return torch.from_numpy(np.stack(rows)).to(device)
        stream = self._tensor(split, device)
        return stream[offsets + torch.arange(self.length, device=device)]

    def unigram(self) -> Tensor:
        """(V,) fp32 log frequencies of (the beginning of) the training split, every token counted half once more."""
        tokens = torch.from_numpy(np.asarray(self.streams["train"][:UNIGRAM_TOKENS], dtype=np.int64))
        counts = torch.bincount(tokens, minlength=self.vocab_size) + 0.5
        return (counts / counts.sum()).log().float()

    def _tensor(self, split: str, device: torch.device) -> Tensor:
        cache: dict[tuple[str, torch.device], Tensor] = self.__dict__.setdefault("_cache", {})
        if (split, device) not in cache:
            stream = np.asarray(self.streams[split], dtype=np.int64)
            cache[split, device] = torch.tensor(stream, device=device)
        return cache[split, device]
