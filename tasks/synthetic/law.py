"""What an exact law offers, and how noised tokens enter it.

Independent noise leaves at each place i a likelihood of the clean token v that is one number for the token seen and
another for all others:

    lambda_i(v) = miss_i + hit_i 1[v = z_i]
        mask noise        z = m: hit 0, miss 1 (nothing is known);   z real: hit 1, miss 0 (it is clean)
        uniform noise     hit = kappa, miss = (1 - kappa) / V

A law answers with its cavity distributions c_i(v) = P(x_i = v | what is seen at all other places). Everything a sampler
asks for follows from them at that place alone, by Bayes' rule, with f(y) = the probability of seeing y there:

    posterior     P(x_i = v | x_t)                = c_i(v) lambda_i(v) / sum
    score         p_t(x with y at i) / p_t(x)     = f(y) / f(z),
                  f(y) = kappa c_i(y) + (1 - kappa) p_0(y),     p_0 = the noise (mask or uniform)
    next token    the posterior at the first place of which nothing is known, with nothing seen after it

Everything is fp64. A parallel sampler can reach states of probability 0 under a law without full support (two brackets
that do not match, revealed in the same step). No posterior is defined there; the tokens are then read as if each could
be wrong with probability `DOUBT`, which gives the law of the sequences with the fewest disagreements.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tsdfm_bench.errors import UsageError

if TYPE_CHECKING:
    from tsdfm_bench.rng import Streams

DOUBT = 1e-6


@dataclass(frozen=True)
class Evidence:
    """What is seen of b sequences.

    Args:
        tokens: (b, length) int64 in [0, V): the token z of each place (any, where hit is 0).
        hit, miss: (b, length) fp64, see the module.
    """

    tokens: Tensor
    hit: Tensor
    miss: Tensor

    @classmethod
    def masked(cls, tokens: Tensor, vocab_size: int) -> Evidence:
        """Of (b, length) tokens under mask noise; ids from V on are masks."""
        known = tokens < vocab_size
        hit = known.double()
        return cls(torch.where(known, tokens, 0), hit, 1 - hit)

    @classmethod
    def uniform(cls, tokens: Tensor, kappa: Tensor, vocab_size: int) -> Evidence:
        """Of (b, length) tokens under uniform noise with clean shares kappa (b,)."""
        hit = kappa.double()[:, None].expand(tokens.shape)
        return cls(tokens, hit, (1 - hit) / vocab_size)

    def doubted(self, rows: Tensor) -> Evidence:
        """Some rows, each token wrong with probability `DOUBT`."""
        hit, miss = self.hit[rows], self.miss[rows]
        return Evidence(self.tokens[rows], hit * (1 - DOUBT), miss + hit * DOUBT)

    def likelihood(self, vocab_size: int) -> Tensor:
        """lambda, (b, length, V)."""
        full = self.miss[..., None].expand(*self.miss.shape, vocab_size).clone()
        return full.scatter_add_(2, self.tokens[..., None], self.hit[..., None])


class Law(ABC):
    """A law of sequences of every length, or of each length separately.

    Args:
        name: what it is called.
        vocab_size: V.
    """

    def __init__(self, name: str, vocab_size: int) -> None:
        self.name = name
        self.vocab_size = vocab_size

    @abstractmethod
    def parameters(self) -> Mapping[str, object]:
        """Everything that defines it, as JSON values."""

    @cached_property
    def identity(self) -> str:
        """ "sha256:..." over name and parameters."""
        content = json.dumps({"law": self.name, **self.parameters()}, sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(content.encode()).hexdigest()

    @abstractmethod
    def sample(self, streams: Streams, length: int, site: str) -> Tensor:
        """Exact draws, (batch, length) int64; sequence i depends on its own stream only."""

    @abstractmethod
    def entropy_nats(self, length: int) -> float:
        """Exact entropy of a sequence of this length in nats."""

    @abstractmethod
    def token_nll(self, tokens: np.ndarray) -> np.ndarray:
        """-log p(x_i | x_1 .. x_{i-1}) in nats, (n, length) -> (n, length) float64; inf where impossible."""

    @abstractmethod
    def ngrams(self, n: int, length: int) -> np.ndarray:
        """Exact law of n consecutive tokens, n = 1 or 2, averaged over the places: (V,) * n float64."""

    @abstractmethod
    def weigh(self, evidence: Evidence, rows: Tensor, positions: Tensor) -> Tensor:
        """Cavity distributions at n places up to a positive factor; a row is zero where the evidence is impossible.

        Args:
            evidence: b sequences.
            rows, positions: (n,) int64.

        Returns:
            (n, V), the caller's to change.
        """

    def cavity(self, evidence: Evidence, rows: Tensor, positions: Tensor) -> Tensor:
        """P(x_i = v | what is seen elsewhere) at n places, (n, V); see the module for impossible evidence."""
        weights, total = self._possible(evidence, rows, positions)
        return weights.div_(total[:, None])

    def posterior(self, evidence: Evidence, rows: Tensor, positions: Tensor) -> Tensor:
        """P(x_i = v | x_t) at n places, (n, V); a token seen clean stays what it is."""
        weights, _ = self._possible(evidence, rows, positions)
        z, hit, miss = (x[rows, positions][:, None] for x in (evidence.tokens, evidence.hit, evidence.miss))
        own = weights.gather(1, z)
        weights.mul_(miss).scatter_add_(1, z, own * hit)
        total = weights.sum(dim=1, keepdim=True)
        weights.div_(total.clamp_min(1e-300))
        lost = total <= 0
        return weights.scatter_(1, z, torch.where(lost, 1.0, weights.gather(1, z))) if bool(lost.any()) else weights

    def _possible(self, evidence: Evidence, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`weigh` and its row sums (n,), all positive."""
        weights = self.weigh(evidence, rows, positions)
        total = weights.sum(dim=1)
        if not bool((total > 0).all()):
            lost = (total <= 0).nonzero().squeeze(1)
            used, local = rows[lost].unique(return_inverse=True)
            weights[lost] = self.weigh(evidence.doubted(used), local, positions[lost])
            total = weights.sum(dim=1)
        return weights, total

    def surprise(self, evidence: Evidence) -> Tensor:
        """-log P(what is seen at i | what is seen before i), (b, length) nats; the sum is the state's exact NLL.

        Raises:
            UsageError: this law does not offer it.
        """
        raise UsageError(
            f"the law '{self.name}' gives no energy of noised states; the tasks product, markov and hmm do"
        )

    def begin(self, batch: int, length: int) -> dict[str, Any]:
        """Memory for writing `batch` sequences of `length` tokens from left to right."""
        return {"tokens": torch.zeros(batch, 0, dtype=torch.int64), "length": length}

    def advance(self, memory: dict[str, Any], tokens: Tensor) -> Tensor:
        """Append tokens (b, l), l >= 0, to a memory; the law of the next token, (b, V)."""
        memory["tokens"] = torch.cat([memory["tokens"], tokens], dim=1)
        batch, place = memory["tokens"].shape
        unknown = torch.full((batch, memory["length"] - place), self.vocab_size, dtype=torch.int64)
        evidence = Evidence.masked(torch.cat([memory["tokens"], unknown], dim=1), self.vocab_size)
        return self.cavity(evidence, torch.arange(batch), torch.full((batch,), place, dtype=torch.int64))


def categorical(cdf: Tensor, u: Tensor) -> Tensor:
    """Draws by inverse CDF: rows of cumulative probabilities (n, K) and uniforms (n,) -> (n,) int64."""
    below = torch.nextafter(cdf[:, -1], torch.zeros((), dtype=cdf.dtype))
    return torch.searchsorted(cdf.contiguous(), torch.minimum(u * cdf[:, -1], below)[:, None], right=True).squeeze(1)


def entropy_of(p: np.ndarray) -> np.ndarray:
    """Entropy in nats over the last axis; 0 log 0 = 0."""
    return -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0), axis=-1)
