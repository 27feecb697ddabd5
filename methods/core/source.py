"""Source distributions: what a sequence looks like at t = 0, and one step of their forward noising.

Every source is a product over positions of one law p_0 on the network's Vn tokens:

    mask      p_0 = 1[y = m],  m = V, Vn = V + 1
    uniform   p_0 = 1 / V,     Vn = V
    unigram   p_0 = given token frequencies, Vn = V

The forward kernel that keeps a token with probability k is  q(y | z) = k 1[y = z] + (1 - k) p_0(y);  correctors
(ReMDM, DUO's psi-samplers, the flow-matching corrector) re-noise with it. References: arXiv 2407.15595 (mask and
uniform sources), 2107.03006 (absorbing and uniform kernels).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from tsdfm_bench.errors import UsageError, unknown_name
from tsdfm_bench.rng import Streams

SOURCES = ("mask", "uniform", "unigram")


class Source(ABC):
    """A product law over positions.

    Args:
        vocab_size: number of real tokens V.
    """

    name: str

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, not {vocab_size}")
        self.vocab_size = vocab_size

    @property
    def outputs(self) -> int:
        """Tokens a network of this source knows, Vn."""
        return self.vocab_size

    @property
    def mask_id(self) -> int | None:
        """The mask id, or None."""
        return None

    @abstractmethod
    def law(self) -> Tensor:
        """p_0, (Vn,) fp64."""

    @abstractmethod
    def tokens(self, uniforms: Tensor) -> Tensor:
        """Draws from p_0, one per uniform: fp64 of any shape -> int64 of the same shape."""

    def prior(self, streams: Streams, length: int) -> Tensor:
        """The state at t = 0, (batch, length) int64."""
        return self.tokens(streams.uniform("prior", 0, length))

    def corrupt(
        self, tokens: Tensor, keep: Tensor | float, streams: Streams, step: int, site: str = "corrupt"
    ) -> Tensor:
        """One forward step: keep each token with probability `keep`, else draw from p_0.

        Args:
            tokens: (batch, length) int64.
            keep: scalar, (batch, 1) or (batch, length).
            streams: (batch,).
            step: addresses the draws, together with `site`.

        Returns:
            (batch, length) int64.
        """
        length = tokens.shape[1]
        kept = streams.uniform(f"{site}/keep", step, length) < keep
        return torch.where(kept, tokens, self.tokens(streams.uniform(f"{site}/token", step, length)))


class MaskSource(Source):
    """Every position holds the mask id m = V."""

    name = "mask"

    @property
    def outputs(self) -> int:
        """V + 1."""
        return self.vocab_size + 1

    @property
    def mask_id(self) -> int:
        """V."""
        return self.vocab_size

    def law(self) -> Tensor:
        """One-hot at the mask id."""
        p = torch.zeros(self.outputs, dtype=torch.float64)
        p[self.mask_id] = 1.0
        return p

    def tokens(self, uniforms: Tensor) -> Tensor:
        """The mask id everywhere."""
        return torch.full(uniforms.shape, self.mask_id, dtype=torch.int64, device=uniforms.device)

    def prior(self, streams: Streams, length: int) -> Tensor:
        """All mask; no random number is needed."""
        return torch.full((len(streams), length), self.mask_id, dtype=torch.int64, device=streams.device)


class UniformSource(Source):
    """Independent uniform tokens."""

    name = "uniform"

    def law(self) -> Tensor:
        """1 / V."""
        return torch.full((self.vocab_size,), 1.0 / self.vocab_size, dtype=torch.float64)

    def tokens(self, uniforms: Tensor) -> Tensor:
        """floor(u V)."""
        return (uniforms * self.vocab_size).long().clamp_max(self.vocab_size - 1)


class UnigramSource(Source):
    """Independent tokens with given frequencies.

    Args:
        probabilities: (V,) non-negative, not all zero; normalised here.
    """

    name = "unigram"

    def __init__(self, probabilities: Tensor) -> None:
        super().__init__(probabilities.numel())
        p = probabilities.detach().double().cpu()
        if not bool((p >= 0).all()) or not bool(torch.isfinite(p).all()) or float(p.sum()) <= 0:
            raise UsageError("the unigram source needs non-negative finite frequencies that are not all zero")
        self._law = p / p.sum()
        self._cdf = self._law.cumsum(0)
        # levels stay below the last entry, so a token of frequency zero cannot be drawn
        self._top = math.nextafter(float(self._cdf[-1]), 0.0)

    def law(self) -> Tensor:
        """The frequencies."""
        return self._law.clone()

    def tokens(self, uniforms: Tensor) -> Tensor:
        """Inverse-CDF draws."""
        cdf = self._cdf.to(uniforms.device)
        return torch.searchsorted(cdf, (uniforms * cdf[-1]).clamp_max(self._top), right=True)


def make_source(name: str, vocab_size: int, unigram: Tensor | None = None) -> Source:
    """The source called "mask", "uniform" or "unigram"; raises UsageError for another name."""
    if name == "mask":
        return MaskSource(vocab_size)
    if name == "uniform":
        return UniformSource(vocab_size)
    if name == "unigram":
        if unigram is None:
            raise UsageError("the unigram source needs token frequencies: give a (V,) tensor")
        if unigram.numel() != vocab_size:
            raise UsageError(f"the unigram source has {unigram.numel()} frequencies for {vocab_size} tokens")
        return UnigramSource(unigram)
    raise unknown_name("source", name, SOURCES)
