"""How a token is drawn from weights: the arithmetic is part of a result, so it is a named policy.

`fp64` (default): inverse CDF in double precision. With weights w and a uniform u the token is the first y with

    w_0 + ... + w_y >= u (w_0 + ... + w_{K-1})

so every token of positive weight can be drawn, however small its probability.

`legacy-fp32`: the exponential race of the published masked-diffusion and score code,

    argmax_y  w_y / (1e-10 - log(u_y + 1e-10)),     u_y fp32 multiples of 2^-24, all arithmetic fp32.

Because -log u_y >= 2^-24 (or the 1e-10 floors), a token cannot win against a competitor of 2e7 times its weight: a
hidden, step-dependent temperature (Zheng et al., arXiv 2409.02908). It exists to reproduce published numbers.

Of many fp32 logits on a CPU the weights are made in fp32 first: where that cannot have changed the token, and so in
nearly every row, it is the token of fp64 (`rough_search`).

A draw costs one uniform. The race needs K of them: they are the outputs of a SplitMix64 generator (Steele, Lea and
Flood, OOPSLA 2014) seeded with the bits of that one uniform, in integer arithmetic that is equal on every device.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from tsdfm_bench.api import Draw, plain
from tsdfm_bench.errors import PluginError, unknown_name
from tsdfm_bench.methods.core.sharpen import FEW_ELEMENTS, LOG2_E, Sharpen

DRAWS: tuple[Draw, ...] = ("fp64", "legacy-fp32")

_BLOCK = 64
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)  # the constants of SplitMix64 as signed 64-bit integers
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)
_RACE_ELEMENTS, _RACE_ELEMENTS_GPU = 1 << 19, 1 << 25
_SEARCHED_AT_ONCE = 1 << 16  # the same of `from_logits`
_LEAST = 5e-324  # the smallest positive level
_KEPT = 64  # totals of small draws
MARGIN = 2.0**-16  # of a total: more than cumulative sums of `rough_weights` can be wrong


def inverse_cdf(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The first y whose cumulative weight reaches u times the total; a token of weight 0 is never returned.

    Two levels (sums of 64 entries, then within the chosen 64), or one cumulative sum where there are few entries.

    Args:
        weights: (n, K) fp64, non-negative. A row of zeros returns some valid index.
        u: (n,) fp64 in (0, 1).

    Returns:
        (n,) int64 tokens and (n,) fp64 totals.
    """
    if plain() or (weights.numel() <= FEW_ELEMENTS and weights.device.type == "cpu"):
        cdf = weights.cumsum(dim=1)
        return _reached(cdf, u[:, None] * cdf[:, -1:]).squeeze(1), cdf[:, -1]
    chosen, _, total = _block_search(weights, u[:, None])
    return chosen.squeeze(1), total.squeeze(1)


def _reached(cdf: Tensor, level: Tensor) -> Tensor:
    """The first entry of cumulative sums (n, K) that reaches a level (n, 1) > 0, here raised to it; (n, 1) int64.

    Where a sum reaches a level for the first time it has grown, so an entry of weight 0 is never found as long as the
    level is not above the last sum. Where the level is not a number it is the last entry.
    """
    return torch.searchsorted(cdf, level.clamp_min_(_LEAST)).clamp_max_(cdf.shape[1] - 1)


def _block_search(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`inverse_cdf` in two levels: sums of 64 entries, in the precision of the weights, then within the chosen 64.

    The chance of a block is as exact as a weight. What of the level is left inside the block is scaled to the fp64 sum
    of its entries: each of them can be drawn.

    Args:
        weights: (n, K).
        u: (n, 1) fp64 in (0, 1).

    Returns:
        (n, 1) int64 tokens; the levels and the totals, (n, 1) fp64: not finite where a weight is not.
    """
    sums = _block_sums(weights)
    cdf = sums.cumsum(dim=1, dtype=torch.float64)
    total = cdf[:, -1:]
    level = u * total
    block = _reached(cdf, level)
    inside = _inside(weights, block).cumsum(dim=1, dtype=torch.float64)
    share = 1 - (cdf.gather(1, block) - level) / sums.gather(1, block)  # at most 1, since the level is reached
    offset = _reached(inside, share.mul_(inside[:, -1:]))
    return offset.add_(block, alpha=_BLOCK).clamp_max_(weights.shape[1] - 1), level, total


def _block_sums(weights: Tensor) -> Tensor:
    """Sums of 64 columns, and of those that are left over: (n, K) -> (n, ceil(K / 64)), in the weights' precision."""
    n, size = weights.shape
    whole = size - size % _BLOCK
    if whole == size:
        return (weights.reshape(-1, _BLOCK) @ _ones(weights.dtype, weights.device)).view(n, size // _BLOCK)
    blocks = weights[:, :whole].unflatten(1, (whole // _BLOCK, _BLOCK))
    return torch.cat([blocks.sum(dim=-1), weights[:, whole:].sum(dim=-1, keepdim=True)], dim=1)


def _inside(weights: Tensor, block: Tensor) -> Tensor:
    """The 64 columns of one block per row, zeros beyond the last column: (n, K), (n, 1) -> (n, 64)."""
    n, size = weights.shape
    if size % _BLOCK == 0:
        row = (block + _starts(n, size // _BLOCK, weights.device)).view(-1)
        return weights.reshape(-1, _BLOCK).index_select(0, row)
    columns = torch.add(torch.arange(_BLOCK, device=weights.device), block, alpha=_BLOCK)
    return weights.gather(1, columns.clamp_max(size - 1)).masked_fill_(columns >= size, 0.0)


def rough_weights(logits: Tensor) -> Tensor:
    """exp(logit - largest) in fp32, and zeros up to a multiple of 64 columns: (n, K) fp32 -> (n, 64 ceil(K / 64))."""
    n, size = logits.shape
    weights = logits.new_empty(n, size + -size % _BLOCK)
    weights[:, size:] = 0
    real = weights[:, :size]
    torch.sub(logits, logits.amax(dim=-1, keepdim=True), out=real)
    real.mul_(LOG2_E).exp2_()
    return weights


def rough_search(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`inverse_cdf` of `rough_weights`, and where it may differ from that of exact ones.

    With d = logit - largest, a rough weight is wrong by at most (2.3 |d| + 4) 2^-24 of itself. The mean of |d| under
    the distribution is at most its entropy, so at most log K < 12: cumulative sums are wrong by 2e-6 of the total.
    Summing 64 entries in fp32 adds 64 x 2^-24. Both, in a sum and in the total, are less than `MARGIN`, so a level that
    is further than that from both ends of its token's interval lies in the same interval of the exact sums.

    Args:
        weights: (n, K) fp32, K a multiple of 64; some may have been set to 0.
        u: (n,) fp64 in (0, 1).

    Returns:
        (n,) int64 tokens; (n,) fp64 totals, not finite where a weight is not; (n,) bool, the token is not certain.
    """
    cdf = _block_sums(weights).cumsum(dim=1, dtype=torch.float64)
    total = cdf[:, -1:]
    level = u[:, None] * total
    block = _reached(cdf, level)
    inside = _inside(weights, block).cumsum(dim=1, dtype=torch.float64)
    inside += cdf.gather(1, block) - inside[:, -1:]  # both ends of the block are right, up to the margin
    offset = _reached(inside, level)
    chosen = offset.add(block, alpha=_BLOCK)
    above = inside.gather(1, offset) - level
    below = weights.gather(1, chosen) - above
    return chosen.squeeze(1), total.squeeze(1), (torch.minimum(above, below) < MARGIN * total).squeeze(1)


@lru_cache(maxsize=8)
def _ones(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones(_BLOCK, dtype=dtype, device=device)


@lru_cache(maxsize=8)
def _starts(rows: int, blocks: int, device: torch.device) -> Tensor:
    return torch.arange(0, rows * blocks, blocks, device=device)[:, None]


def race_uniforms(seed: Tensor, size: int) -> Tensor:
    """fp32 multiples of 2^-24 in [0, 1): `size` outputs of SplitMix64 for every seed, (n,) int64 -> (n, size)."""
    z = seed[:, None] + torch.arange(1, size + 1, device=seed.device) * _GAMMA
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _MIX1
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _MIX2
    z = z ^ ((z >> 31) & ((1 << 33) - 1))
    return ((z >> 40) & 0xFFFFFF).float() * 2.0**-24


def race(weights: Tensor, u: Tensor) -> Tensor:
    """The published fp32 race.

    Args:
        weights: (n, K) fp32; entries <= 0 never win against a positive one.
        u: (n,) fp64 in (0, 1) with 52 random bits, the seed of each race.

    Returns:
        (n,) int64.
    """
    seed = (u * 2.0**52).long()
    winners = []
    most = _RACE_ELEMENTS if weights.device.type == "cpu" else _RACE_ELEMENTS_GPU
    rows = max(1, most // weights.shape[1])
    for w, s in zip(weights.split(rows), seed.split(rows), strict=True):
        noise = 1e-10 - (race_uniforms(s, w.shape[1]) + 1e-10).log()
        winners.append((w / noise).argmax(dim=-1))
    return torch.cat(winners) if winners else seed


class DrawPolicy:
    """A named way to draw.

    Args:
        name: "fp64" or "legacy-fp32".
    """

    def __init__(self, name: Draw = "fp64") -> None:
        if name not in DRAWS:
            raise unknown_name("draw", name, DRAWS)
        self.name = name
        self._sum = torch.zeros((), dtype=torch.float64)  # of all that was watched
        self._few: list[Tensor] = []  # watched, one number a draw, and not in the sum yet

    @property
    def legacy(self) -> bool:
        """True for the published fp32 race."""
        return self.name == "legacy-fp32"

    def categorical(self, weights: Tensor, u: Tensor) -> Tensor:
        """One token per row.

        Args:
            weights: (n, K) non-negative, need not be normalised.
            u: (n,) fp64 in (0, 1), one uniform per draw.

        Returns:
            (n,) int64 in [0, K).
        """
        return self.categorical_and_total(weights, u)[0]

    def categorical_and_total(self, weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """`categorical`, and the sums of the weights that it needs anyway: (n,) int64 and (n,) fp64."""
        if self.legacy:
            self.watch(weights)
            return race(weights.float(), u), weights.sum(dim=1, dtype=torch.float64)
        chosen, total = inverse_cdf(weights.double(), u)
        if weights.numel() <= FEW_ELEMENTS:
            self._watch_later(total.clone())  # the sums that it is the last column of are not kept
        else:
            self.watch(total)
        return chosen, total

    def roughly(self, logits: Tensor, sharpen: Sharpen) -> bool:
        """Whether it pays to draw from rough weights of these (n, K) logits first."""
        fast = logits.dtype == torch.float32 and logits.device.type == "cpu" and logits.numel() > FEW_ELEMENTS
        return fast and sharpen.neutral and not (self.legacy or logits.requires_grad or plain())

    def exactly(self, logits: Tensor, sharpen: Sharpen, u: Tensor) -> Tensor:
        """One token per row, `categorical` of what temperature and nucleus make of logits.

        Args:
            logits: (n, K) floating point; not changed.
            sharpen: temperature and nucleus.
            u: (n,) fp64 in (0, 1), one uniform per draw.

        Returns:
            (n,) int64 in [0, K).
        """
        if not self.roughly(logits, sharpen):
            return self.categorical(sharpen.weights(logits), u)
        chosen, total, unsure = rough_search(rough_weights(logits), u)
        self.watch(total)
        again = unsure.nonzero().squeeze(1)
        if again.numel():
            chosen[again], _ = inverse_cdf(sharpen.weights(logits[again]), u[again])
        return chosen.clamp_max_(logits.shape[1] - 1)

    def from_logits(self, logits: Tensor, sharpen: Sharpen, u: Tensor, spare: bool = False) -> Tensor:
        """One token per row from logits, for few rows at a time, again and again: as few operations as there can be.

        Without a nucleus the weights are exponentials in the logits' precision, fp32 at least, and their sums fp64. Of
        many entries on a CPU only the sums of 64 are accumulated, which saves memory traffic (`_block_search`).

        Args:
            logits: (n, K) floating point.
            sharpen: temperature and nucleus.
            u: (n, 1) fp64 in (0, 1), one uniform per draw.
            spare: the logits are not needed any more and may be written over; else they are not changed.

        Returns:
            (n, 1) int64 in [0, K).
        """
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits, spare = logits.float(), True
        if self.legacy or not sharpen.smooth or plain():
            return self.categorical(sharpen.weights(logits), u.squeeze(1))[:, None]
        if sharpen.temperature != 1:
            logits, spare = logits / sharpen.temperature, True
        if logits.numel() > _SEARCHED_AT_ONCE and logits.shape[1] % _BLOCK == 0 and logits.device.type == "cpu":
            top = logits.amax(dim=-1, keepdim=True)
            chosen, level, _ = _block_search((logits.sub_(top) if spare else logits - top).exp_(), u)
        else:
            cdf = torch.softmax(logits, dim=-1).cumsum(dim=-1, dtype=torch.float64)
            level = u * cdf[:, -1:]
            chosen = _reached(cdf, level)
        self._watch_later(level)
        return chosen

    def watch(self, values: Tensor) -> None:
        """Remember whether all of these were finite; the answer stays on the device until `check`.

        Their sum is remembered, which no later number makes finite again. A tensor kept for each call would lie between
        the large ones that come and go, and keep the memory of these from being used again: of small draws, whose time
        is that of their operations, some are kept until they are many.
        """
        if self._sum.device != values.device:
            self._sum = self._sum.to(values.device)
        self._sum += values.sum(dtype=torch.float64)

    def _watch_later(self, values: Tensor) -> None:
        if self._few and (len(self._few) >= _KEPT or self._few[0].device != values.device):
            self._watch_now()
        self._few.append(values)

    def _watch_now(self) -> None:
        if self._few:
            self.watch(torch.cat([values.flatten() for values in self._few]))
            self._few = []

    def check(self) -> None:
        """Raise PluginError if anything drawn from or watched so far was not finite."""
        self._watch_now()
        if not math.isfinite(self._sum.item()):
            raise PluginError(
                "the network returned logits that are not finite (nan or inf): its weights are damaged or overflow in"
                " this precision; check the checkpoint, or run it in fp32"
            )
