"""Arithmetic of score ratios S(y) = p_t(x with y here) / p_t(x) on the uniform graph, in fp64 at chosen places.

With alpha = kappa(t) and q(y | x_1) = alpha 1[y = x_1] + (1 - alpha) / V, a clean-token posterior p at a position whose
token is z implies

    S(y) = sum_x p(x) q(y | x) / q(z | x) = 1 - p(z) (1 - a) + p(y) (1 / a - 1),   y != z,
    a = ((1 - alpha) / V) / (alpha + (1 - alpha) / V)

and, the other way round, p is found from S by solving the sum over y for p(z) first.

Reference: arXiv 2310.16834 (the ratios and their reverse steps); the implied ratios are Bayes' rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tsdfm_bench.api import plain
from tsdfm_bench.methods.core.sharpen import LOG2_E

_SUM_ELEMENTS, _SUM_ELEMENTS_GPU = 1 << 17, 1 << 26
_ORDINARY = math.exp(-30.0), math.exp(30.0)  # sums far from where float32's exponential overflows or loses bits


def sum_exp(x: Tensor, without: Tensor | None = None) -> Tensor:
    """Sums of e^x over the last dimension, in pieces: on a CPU so small that they stay in the cache.

    On a CPU logits of ordinary size are summed without a shift and as powers of 2, which takes a third of the time; a
    term loses 1e-7 |x| of itself by it. To look whether they are of ordinary size would make an accelerator wait for
    its host, so there they never are.

    Args:
        x: (n, K) fp32.
        without: (n, 1) int64, one column per row to leave out, or None.

    Returns:
        (n,) fp64.
    """
    on_cpu = x.device.type == "cpu"
    rows = max(1, (_SUM_ELEMENTS if on_cpu else _SUM_ELEMENTS_GPU) // x.shape[1])

    def reduced(reduce: Callable[[Tensor], Tensor]) -> Tensor:
        if without is None and len(x) <= rows:
            return reduce(x)
        parts = list(x.split(rows))
        if without is not None:
            columns = without.split(rows)
            parts = [part.scatter(1, left, -torch.inf) for part, left in zip(parts, columns, strict=True)]
        sums = [reduce(part) for part in parts]
        return sums[0] if len(sums) == 1 else torch.cat(sums)

    if on_cpu and not plain():
        total = reduced(lambda part: (part * LOG2_E).exp2_().sum(dim=1))
        least, most = (float(x) for x in total.aminmax()) if len(total) else _ORDINARY
        if _ORDINARY[0] <= least and most <= _ORDINARY[1]:  # logits of ordinary size need no shift
            return total.double()
    return reduced(lambda part: torch.logsumexp(part, dim=1)).double().exp_()


def uniform_weights(ratios: Tensor, z: Tensor, scale: Tensor, analytic: bool) -> Tensor:
    """max(w, 0) of the uniform graph.

    Args:
        ratios: (n, V) fp64 S; the own entry must be 1.
        z: (n,) int64 current tokens.
        scale: (n,) fp64 c of the analytic law, f of the Euler law.
        analytic: which law.

    Returns:
        (n, V) fp64.
    """
    size, scale = ratios.shape[1], scale[:, None]
    total = ratios.sum(dim=1, keepdim=True)
    if analytic:
        spread = (1 - scale) / size
        weights = (ratios - spread * total) / scale * spread
        stay = (1 - spread * total) / scale * (scale + spread)
    else:
        weights = ratios * (scale / size)
        stay = 1 - scale * (total - 1) / size
    return weights.scatter_(1, z[:, None], stay).clamp_min_(0.0)


def floor_and_lift(kappa: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """a and 1 / a - 1, (n, 1) each, from kappa (n,) and V."""
    noise = (1 - kappa) / size
    return (noise / (kappa + noise))[:, None], (kappa / noise)[:, None]


def implied_ratios(p: Tensor, z: Tensor, kappa: Tensor) -> Tensor:
    """S of a clean-token posterior, own entry 1: (n, V), (n,), (n,) -> (n, V) fp64."""
    own = z[:, None]
    floor, lift = floor_and_lift(kappa, p.shape[1])
    return (1 - p.gather(1, own) * (1 - floor) + p * lift).scatter_(1, own, 1.0)


def implied_posterior(ratios: Tensor, z: Tensor, kappa: Tensor) -> Tensor:
    """The p whose ratios these are, negative entries of inconsistent ratios set to 0; not normalised. (n, V) fp64."""
    size, own = ratios.shape[1], z[:, None]
    floor, lift = floor_and_lift(kappa, size)
    others = ratios.sum(dim=1, keepdim=True) - 1
    # sum_{y != z} S = (V - 1)(1 - p(z)(1 - a)) + (1 - p(z)) lift, solved for p(z)
    p_own = ((size - 1 + lift - others) / ((size - 1) * (1 - floor) + lift)).clamp(0, 1)
    return ((ratios - 1 + p_own * (1 - floor)) / lift).clamp_min_(0).scatter_(1, own, p_own)


def most_ratios(kappa: Tensor, size: int) -> Tensor:
    """The largest sum of S over the other tokens that a clean-token posterior can imply: that of p(z) = 0."""
    return size - 1 + kappa * size / (1 - kappa)


def normalised(w: Tensor) -> Tensor:
    """Rows that sum to 1."""
    return w / w.sum(dim=1, keepdim=True)
