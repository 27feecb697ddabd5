"""The state of a batch while it is being sampled.

Everything a step may read or change: tokens, which positions are pinned by the user, which sequences are
finished, free per-position memory for methods that need it (`aux`: ReMDM's confidences, Di4C's latent, a cache),
and one random stream per sequence. t = 0 is noise and t = 1 is data.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tsdfm_bench.methods.core.source import Source
from tsdfm_bench.rng import Streams


@dataclass
class State:
    """A batch of sequences on their way from noise to data; steps change it in place.

    Args:
        tokens: (batch, length) int64, a mask id allowed until the end.
        streams: one random stream per sequence, on the device of `tokens`.
        pinned: (batch, length) bool, True where `prefix` is kept; None = nothing is pinned.
        prefix: (batch, length) int64 tokens of the pinned positions, or None.
        done: (batch,) bool, sequences that need no further step.
        aux: tensors of leading dimension batch that a method carries along.
    """

    tokens: Tensor
    streams: Streams
    pinned: Tensor | None = None
    prefix: Tensor | None = None
    done: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    aux: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.done.numel() != self.batch:
            self.done = torch.zeros(self.batch, dtype=torch.bool, device=self.tokens.device)

    @classmethod
    def start(
        cls,
        source: Source,
        streams: Streams,
        length: int,
        prefix: Tensor | None = None,
        pinned: Tensor | None = None,
    ) -> State:
        """The state at t = 0: a draw from the source, with the pinned tokens in place.

        Args:
            source: the noise distribution.
            streams: (batch,), on the device the sampling runs on.
            length: tokens per sequence.
            prefix, pinned: (batch, length) int64 and bool, or None.
        """
        state = cls(source.prior(streams, length), streams)
        if prefix is not None and pinned is not None:
            device = state.tokens.device
            state.pinned, state.prefix = pinned.to(device), prefix.to(device)
            state.pin()
        return state

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """Tokens per sequence."""
        return self.tokens.shape[1]

    @property
    def free(self) -> Tensor:
        """(batch, length) bool, positions a step may change."""
        return torch.ones_like(self.tokens, dtype=torch.bool) if self.pinned is None else ~self.pinned

    def pin(self) -> None:
        """Put the pinned tokens back; the loop calls it after every step, whatever the step did."""
        if self.pinned is not None and self.prefix is not None:
            self.tokens = torch.where(self.pinned, self.prefix, self.tokens)

    def write(self, rows: Tensor, positions: Tensor, tokens: Tensor) -> None:
        """Set tokens (n,) at n (row, position) pairs."""
        self.tokens[rows, positions] = tokens
