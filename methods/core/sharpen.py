"""Temperature and nucleus, applied to the clean-token distribution of the network.

    p_T(y) proportional to exp(logit_y / T);   T = 0 means all mass on the first largest logit

then, for a nucleus of mass q, tokens are ranked by p_T and only the head of the ranking is kept and renormalised:

    inclusive    keep a token while the mass strictly before it is < q   (the token that crosses q is kept: SDTT, DUO,
                                                                          transformers)
    exclusive    keep a token while the mass up to and with it is <= q, and always the first   (ReMDM, BD3-LM)

At q = 0.9 the two differ by several percent of perplexity, so the rule is named in every row. Temperature comes
first, the nucleus second. In samplers whose step mixes the clean-token distribution with the current token, the
nucleus acts on the clean-token distribution, never on the mixture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tsdfm_bench.api import TopPRule, plain

LOG2_E = math.log2(math.e)
FEW_ELEMENTS = 1 << 15  # up to so many, the number of operations is what a draw costs, not their size


@dataclass(frozen=True)
class Sharpen:
    """What temperature and nucleus make of logits.

    Args:
        temperature: T >= 0.
        top_p: q in (0, 1], or None.
        rule: "inclusive" or "exclusive".
    """

    temperature: float = 1.0
    top_p: float | None = None
    rule: TopPRule = "inclusive"

    @property
    def neutral(self) -> bool:
        """True if the distribution is left as it is."""
        return self.temperature == 1.0 and (self.top_p is None or self.top_p >= 1.0)

    @property
    def smooth(self) -> bool:
        """True if every token keeps a positive probability: T > 0 and no nucleus."""
        return self.temperature > 0 and (self.top_p is None or self.top_p >= 1.0)

    def weights(self, logits: Tensor) -> Tensor:
        """Probabilities, not always normalised: the sum of a row lies between 1 and K.

        Args:
            logits: (n, K) floating point, -inf allowed (not in all entries of a row); not changed.

        Returns:
            (n, K) fp64, the caller's own.
        """
        if self.neutral and logits.numel() <= FEW_ELEMENTS and not plain():
            return torch.softmax(logits, dim=-1, dtype=torch.float64)
        top = logits.amax(dim=-1, keepdim=True)
        # from here on in place: memory traffic is much of what a draw costs
        w = logits.to(torch.float64, copy=True)
        if self.temperature == 0:
            best = w.argmax(dim=-1, keepdim=True)
            one = torch.where(top.isfinite(), 1.0, torch.nan).to(torch.float64)  # a maximum that is none stays visible
            return w.zero_().scatter_(-1, best, one)
        w -= top
        if self.temperature != 1:
            w.div_(self.temperature)
        if self.smooth and not plain():
            return w.mul_(LOG2_E).exp2_()  # on a CPU in half the time, and its last bits depend on where an entry lies
        w.exp_()
        return w if self.smooth else w.mul_(self._kept(w))  # a nucleus ranks ties by their number: equal bits

    def _kept(self, w: Tensor) -> Tensor:
        """(n, K) bool, True in the nucleus."""
        assert self.top_p is not None
        ranked, order = (w / w.sum(dim=-1, keepdim=True)).sort(dim=-1, descending=True, stable=True)
        mass = ranked.cumsum(dim=-1)
        kept = mass <= self.top_p
        if self.rule == "inclusive":
            kept = (mass < self.top_p).roll(1, dims=-1)  # the mass strictly before a token
        kept[:, 0] = True
        return torch.zeros_like(kept).scatter_(-1, order, kept)
