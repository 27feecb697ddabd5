"""Counter-based random numbers: one stream per sequence, addressed by step, site and position.

A uniform is a pure function of (key, sequence index, step, site, position): nothing is drawn "in order", so what a
sequence sees does not depend on batch size, shard, order of batches or resume, and uniforms are made only for the
positions that need them. The generator is Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as
easy as 1, 2, 3", SC 2011), in integer arithmetic with equal bits everywhere: torch's on an accelerator, and on a CPU
NumPy's, whose operations on the few numbers of one step cost a fraction of torch's.

The 128-bit counter holds (position, step, sequence, site); the 64-bit key is a hash of the root seed and the cell.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10.

    Args:
        counter: four int64 tensors of broadcastable shape holding 32-bit words.
        key: 64-bit integer; its low word is the first key word.

    Returns:
        four int64 tensors of 32-bit words, of the broadcast shape.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    # words 0 and 2 are multiplied, then change places: both halves of a round are one operation
    halves = torch.stack([c0, c2]), torch.stack([c3, c1])
    if c0.device.type == "cpu":
        arrays = _rounds(halves[0].numpy(), halves[1].numpy(), *_round_constants(key, c0.dim(), None))
        c02, c13 = (torch.from_numpy(array) for array in arrays)
    else:
        c02, c13 = _rounds(*halves, *_round_constants(key, c0.dim(), c0.device))
    return c02[0], c13[0], c02[1], c13[1]


def _rounds(multiplied: Any, other: Any, factors: Sequence[Any], keys: Sequence[Any]) -> tuple[Any, Any]:
    """All rounds, of NumPy's arrays or torch's, (2, ...) int64: words (0, 2) and (3, 1) become (0, 2) and (1, 3)."""
    low = other
    for i in range(_ROUNDS):
        product = multiplied * factors[i % 2]  # 64-bit products; int64 wraps, the bits are the same
        low = product & _MASK32
        product >>= 32
        product &= _MASK32
        product ^= other
        product ^= keys[i]
        multiplied, other = product, low[::-1] if isinstance(low, np.ndarray) else low.flip(0)
    return multiplied, low


@lru_cache(maxsize=64)
def _round_constants(key: int, dimensions: int, device: torch.device | None) -> tuple[list[Any], list[Any]]:
    """Factors of even and odd rounds, and the keys of every round, each (2, 1, ...) int64; NumPy's without a device."""
    pairs = []
    k0, k1 = key & _MASK32, (key >> 32) & _MASK32
    for i in range(_ROUNDS):
        pairs.append((k1, k0) if i % 2 == 0 else (k0, k1))
        k0, k1 = (k0 + _W0) & _MASK32, (k1 + _W1) & _MASK32
    shape = (2, *(1 for _ in range(dimensions)))
    arrays: list[Any] = [np.array(pair, dtype=np.int64).reshape(shape) for pair in [(_M0, _M1), (_M1, _M0), *pairs]]
    if device is not None:
        arrays = [torch.from_numpy(array).to(device) for array in arrays]
    return arrays[:2], arrays[2:]


@lru_cache(maxsize=4096)
def _site(name: str, device: torch.device) -> Tensor:
    """The word of a site, kept where it is needed: copying it there would make an accelerator wait each time."""
    return torch.tensor(zlib.crc32(name.encode()), dtype=torch.int64, device=device)


def derive_key(root_seed: int, *parts: str) -> int:
    """A 63-bit key from a root seed and any number of names (for example a cell id)."""
    digest = hashlib.sha256("\x1f".join([str(root_seed), *parts]).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Streams:
    """One random stream per sequence.

    Args:
        key: from `derive_key`.
        sequences: (batch,) int64 indices of the sequences within the cell.

    Every method returns fp64 in the open interval (0, 1) with 52 random bits.
    """

    def __init__(self, key: int, sequences: Tensor) -> None:
        if sequences.dim() != 1 or sequences.dtype != torch.int64:
            raise ValueError("sequences must be a (batch,) int64 tensor")
        self.key = key
        self.sequences = sequences

    @classmethod
    def of(cls, root_seed: int, name: str, batch: int, first: int = 0, device: str | torch.device = "cpu") -> Streams:
        """Streams of the sequences first .. first + batch - 1 of a cell called `name`."""
        return cls(derive_key(root_seed, name), torch.arange(first, first + batch, device=device))

    def __len__(self) -> int:
        return self.sequences.numel()

    @property
    def device(self) -> torch.device:
        """Where the uniforms are made."""
        return self.sequences.device

    def to(self, device: str | torch.device) -> Streams:
        """The same streams on another device."""
        return Streams(self.key, self.sequences.to(device))

    def select(self, rows: Tensor) -> Streams:
        """The streams of some rows, (k,) int64 or a (batch,) bool mask."""
        return Streams(self.key, self.sequences[rows])

    def uniform(self, site: str, step: int, size: int) -> Tensor:
        """(batch, size) uniforms of one step, one per position 0 .. size - 1."""
        return self.uniform_steps(site, step, 1, size)[0]

    def uniform_steps(self, site: str, first: int, count: int, size: int) -> Tensor:
        """(count, batch, size) uniforms of the steps first .. first + count - 1, one per position."""
        positions = torch.arange(size, device=self.device)
        steps = torch.arange(first, first + count, device=self.device)
        return self._draw(positions, steps[:, None, None], self.sequences[:, None], site)

    def uniform_at(self, site: str, step: int | Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """(n,) uniforms for n (row, position) pairs; equal to `uniform(...)[rows, positions]`.

        Args:
            site: name of the decision.
            step: one step for all, or (n,) int64.
            rows, positions: (n,) int64.
        """
        return self._draw(positions, step, self.sequences[rows], site)

    def _draw(self, position: Tensor, step: int | Tensor, sequence: Tensor, site: str) -> Tensor:
        step_word = torch.as_tensor(step, dtype=torch.int64, device=self.device)
        a, b, _, _ = philox4x32((position, step_word, sequence, _site(site, self.device)), self.key)
        bits = ((a >> 6) << 26) | (b >> 6)  # 26 + 26 = 52 bits: adding one half is exact, so 0 and 1 cannot occur
        return (bits.to(torch.float64) + 0.5) * 2.0**-52
