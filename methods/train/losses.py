"""Training losses, each for one batch, in fp32 or better, in nats.

t = 0 is noise and t = 1 is data; `x_1` is the clean sequence and `x_t` the noised one, both (batch, length) int64;
logits are (batch, length, outputs). Schedules: kappa(t) is the probability that a position is clean,
g(t) = kappa'(t) / (1 - kappa(t)); on the linear schedule g = 1 / (1 - t).

References: cross entropy and generalised KL, arXiv 2412.03487 (flow matching guide) and 2407.15595; masked NELBO, arXiv
2406.07524 eq. 10; score entropy, arXiv 2310.16834 eq. 5; noise contrastive estimation as in arXiv 2410.21357.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, x_1: Tensor) -> Tensor:
    """Mean of -log p(x_1) over every position, clean ones included; a scalar."""
    return F.cross_entropy(logits.float().flatten(0, 1), x_1.flatten())


def generalised_kl(logits: Tensor, x_1: Tensor, x_t: Tensor, rate: Tensor) -> Tensor:
    """Generalised KL of the mixture path, per position.

        l = g (1 - p(x_t))                   where x_t = x_1
        l = g (-log p(x_1) - p(x_t))         elsewhere

    Args:
        logits: (batch, length, outputs).
        x_1, x_t: (batch, length) int64.
        rate: g(t), (batch,).

    Returns:
        (batch, length), nats.
    """
    log_p = torch.log_softmax(logits.float(), dim=-1)
    stay = log_p.gather(-1, x_t[..., None]).squeeze(-1).exp()
    target = log_p.gather(-1, x_1[..., None]).squeeze(-1)
    return rate[:, None] * torch.where(x_t == x_1, 1 - stay, -target - stay)


def masked_nelbo(logits: Tensor, x_1: Tensor, x_t: Tensor, rate: Tensor, mask_id: int) -> Tensor:
    """Continuous-time NELBO of masked diffusion with the SUBS parameterisation, per position.

        l = -g(t) log p(x_1 | x_t)  where x_t is masked (the mask id has probability 0), 0 elsewhere

    Returns:
        (batch, length), nats.
    """
    rows, positions = (x_t == mask_id).nonzero(as_tuple=True)
    return scatter_loss(
        x_t.shape,
        rows,
        positions,
        masked_nelbo_at(logits[rows, positions], x_1, rate, rows, positions, mask_id),
    )


def masked_nelbo_at(logits: Tensor, x_1: Tensor, rate: Tensor, rows: Tensor, positions: Tensor, mask_id: int) -> Tensor:
    """The same at n masked positions only: logits (n, outputs) -> (n,) nats."""
    logits = logits.float().index_fill(-1, torch.tensor([mask_id], device=logits.device), -math.inf)
    return rate[rows] * F.cross_entropy(logits, x_1[rows, positions], reduction="none")


def scatter_loss(shape: torch.Size, rows: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """Zeros of `shape` (batch, length) with `values` (n,) put at (rows, positions)."""
    return torch.zeros(shape, dtype=values.dtype, device=values.device).index_put((rows, positions), values)


def score_entropy_absorb(log_score: Tensor, x_1: Tensor, sigma: Tensor, sigma_rate: Tensor) -> Tensor:
    """Denoising score entropy of the absorbing graph at n masked positions.

    With ratio r = 1 / (e^sigma - 1) at y = x_1 and 0 elsewhere:
    sum_{y != mask} e^{s_y} - r s_{x_1} + r (log r - 1), times sigma'(nu).

    Args:
        log_score: (n, V) log scores of the real tokens (mask column dropped), scaling by sigma already applied.
        x_1: (n,) clean tokens.
        sigma, sigma_rate: (n,) total noise and its derivative in nu = 1 - t.

    Returns:
        (n,) nats, >= 0, zero at the true score.
    """
    ratio = 1 / torch.expm1(sigma)
    target = log_score.gather(-1, x_1[:, None]).squeeze(-1)
    entropy = log_score.exp().sum(dim=-1) - ratio * target + ratio * (ratio.log() - 1)
    return sigma_rate * entropy


def score_entropy_uniform(log_score: Tensor, x_1: Tensor, x_t: Tensor, alpha: Tensor, sigma_rate: Tensor) -> Tensor:
    """Denoising score entropy of the uniform graph, per position.

    With q(y | x_1) = alpha 1[y = x_1] + (1 - alpha) / V and r_y = q(y | x_1) / q(x_t | x_1):
    (1 / V) sum_{y != x_t} e^{s_y} - r_y s_y + r_y (log r_y - 1), times sigma'(nu).

    Args:
        log_score: (batch, length, V); the own-token entry is ignored.
        x_1, x_t: (batch, length) int64.
        alpha, sigma_rate: (batch,) e^{-sigma} and sigma'(nu).

    Returns:
        (batch, length) nats, >= 0, zero at the true score.
    """
    size = log_score.shape[-1]
    floor = ((1 - alpha) / size)[:, None]
    moved = x_t != x_1
    at_current = torch.where(moved, floor, alpha[:, None] + floor)  # q(x_t | x_1)
    plain = floor / at_current  # r_y of a token that is neither x_1 nor x_t
    hit = (alpha[:, None] + floor) / at_current  # r_y at y = x_1, used only where x_1 != x_t
    s = log_score.scatter(-1, x_t[..., None], 0.0)
    target = s.gather(-1, x_1[..., None]).squeeze(-1)
    positive = s.exp().sum(dim=-1) - 1  # the own-token entry contributed e^0
    others = s.sum(dim=-1) - target
    negative = plain * others + torch.where(moved, hit, torch.zeros_like(hit)) * target
    count = size - 1 - moved.to(s.dtype)
    constant = count * plain * (plain.log() - 1) + torch.where(moved, hit * (hit.log() - 1), torch.zeros_like(hit))
    return sigma_rate[:, None] * (positive - negative + constant) / size


def forward_kl(target: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(target / T) || softmax(student / T)), per position; the target carries no gradient.

    Args:
        target, student: (..., outputs) logits.

    Returns:
        (...) nats.
    """
    log_q = torch.log_softmax(target.detach().float() / temperature, dim=-1)
    log_p = torch.log_softmax(student.float() / temperature, dim=-1)
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(dim=-1)


def nce(energy_positive: Tensor, energy_negative: Tensor) -> Tensor:
    """Binary noise contrastive estimation, (batch,) energies each -> (batch,) nats.

    -log sigmoid(-E(x+)) - log sigmoid(E(x-)): at the optimum E = -log(p_positive / p_negative), so low energy is
    coherent.
    """
    return F.softplus(energy_positive) + F.softplus(-energy_negative)
