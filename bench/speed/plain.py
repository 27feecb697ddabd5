"""Plain sampling loops, as the papers write them down: the yardstick of `ratio_plain`.

Each calls the network at every step on the whole batch, takes a softmax (or the score) over the full vocabulary at
every position and draws a token at every position. They share nothing with the samplers they are compared with but
the network, and keep to torch's own generator. Times run as in the papers: t from 0 to 1 for the flow methods, nu from
1 down to 1e-5 for the diffusions, with the log-linear noise sigma(nu) = -log(1 - (1 - 1e-3) nu).

With `dtype` fp64 the laws are those of our samplers. With fp32 the masked and score loops are the published ones, whose
race is quicker and has another law (arXiv 2409.02908).

`limit` ends a loop after so many of its steps: on average every step costs the same (in `mdlm_cache` too: masks are
revealed at a constant rate).

References: arXiv 2407.15595 (dfm), 2509.20624 (fsdfm), 2406.07524 (mdlm), 2310.16834 (sedd).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Network = Callable[..., Tensor]
NU_END, NOISE_EPS = 1e-5, 1e-3


@dataclass(frozen=True)
class Problem:
    """What a plain loop samples.

    Args:
        network: (tokens (batch, length), time (batch,)[, step size (batch,)]) -> (batch, length, outputs).
        batch, length, steps: of the run.
        vocab_size: V; the mask, if there is one, is id V.
        masked: the source is the mask, else uniform.
        device: where it runs.
        dtype: of probabilities and draws.
        limit: stop after so many steps; None = all.
    """

    network: Network
    batch: int
    length: int
    steps: int
    vocab_size: int
    masked: bool
    device: str = "cpu"
    dtype: torch.dtype = torch.float64
    limit: int | None = None

    def noise(self) -> Tensor:
        """(batch, length) int64 draw from the source."""
        shape = (self.batch, self.length)
        if self.masked:
            return torch.full(shape, self.vocab_size, dtype=torch.int64, device=self.device)
        return torch.randint(self.vocab_size, shape, device=self.device)

    def scalar(self, value: float) -> Tensor:
        """(batch,) fp32, a time as the network is given it."""
        return torch.full((self.batch,), value, device=self.device)

    def walked(self, step: int) -> bool:
        """Whether the loop ends before this step."""
        return self.limit is not None and step >= self.limit


def race(weights: Tensor) -> Tensor:
    """One index of the last dimension with probability in proportion to the positive weights."""
    return (weights / (1e-10 - (torch.rand_like(weights) + 1e-10).log())).argmax(dim=-1)


def multinomial(p: Tensor) -> Tensor:
    """The same from probabilities (..., K), by torch.multinomial."""
    return torch.multinomial(p.reshape(-1, p.shape[-1]), 1).view(p.shape[:-1])


def dfm(problem: Problem) -> Tensor:
    """Flow matching's Euler solver, kappa(t) = t: x_1 ~ p everywhere, then a jump to it with 1 - exp(-h / (1 - t))."""
    x, h = problem.noise(), 1 / problem.steps
    for i in range(problem.steps):
        if problem.walked(i):
            break
        t = i * h
        p = problem.network(x, problem.scalar(t)).float().softmax(dim=-1).to(problem.dtype)
        last = i == problem.steps - 1
        if last and problem.masked:
            p[..., problem.vocab_size] = 0
        target = multinomial(p)
        rate = torch.full(x.shape, h / (1 - t), dtype=problem.dtype, device=x.device)
        jump = torch.rand_like(rate) < -torch.expm1(-rate.where(target != x, 0.0))
        x = target if last else torch.where(jump, target, x)
    return x


def fsdfm(problem: Problem) -> Tensor:
    """FS-DFM's step with the cumulative scalar: rates -log(1 - h / (1 - t)) p(y), y != x, in a step of size h."""
    x, h = problem.noise(), 1 / problem.steps
    for i in range(problem.steps):
        if problem.walked(i):
            break
        t = i * h
        logits = problem.network(x, problem.scalar(t), problem.scalar(h))
        p = logits.float().softmax(dim=-1).to(problem.dtype)
        if i == problem.steps - 1:
            if problem.masked:
                p[..., problem.vocab_size] = 0
                return torch.where(x == problem.vocab_size, multinomial(p), x)
            return multinomial(p)
        p.scatter_(-1, x[..., None], 0.0)
        leaving = p.sum(dim=-1)
        hazard = -torch.log1p(-torch.tensor(h / (1 - t), dtype=problem.dtype)) * leaving
        jump = torch.rand_like(leaving) < -torch.expm1(-hazard)
        x = torch.where(jump, multinomial(p / leaving.clamp_min(1e-30)[..., None] + 1e-30), x)
    return x


def mdlm(problem: Problem) -> Tensor:
    """Ancestral sampling of masked diffusion: a call, and a race of all tokens with the mask, in every step."""
    x, mask = problem.noise(), problem.vocab_size
    nu = torch.linspace(1, NU_END, problem.steps + 1, dtype=torch.float64).tolist()
    for i in range(problem.steps):
        if problem.walked(i):
            return x
        x = _reveal(x, _subs(problem, x), nu[i], nu[i + 1], mask, 1 - NOISE_EPS)
    return torch.where(x == mask, _subs(problem, x).argmax(dim=-1), x)


def mdlm_cache(problem: Problem) -> Tensor:
    """The same, where probabilities are kept until some token of the batch changes (MDLM's default sampler)."""
    x, mask = problem.noise(), problem.vocab_size
    nu = torch.linspace(1, NU_END, problem.steps + 1, dtype=torch.float64).tolist()
    kept: Tensor | None = None
    for i in range(problem.steps):
        if problem.walked(i):
            return x
        if kept is None:
            kept = _subs(problem, x)
        following = _reveal(x, kept, nu[i], nu[i + 1], mask, 1.0)
        if not torch.equal(following, x):
            kept = None
        x = following
    return torch.where(x == mask, _subs(problem, x).argmax(dim=-1), x)


def _subs(problem: Problem, x: Tensor) -> Tensor:
    """Clean-token distribution without the mask, (batch, length, V + 1)."""
    logits = problem.network(x, problem.scalar(0.0)).to(problem.dtype)
    logits[..., problem.vocab_size] = -torch.inf
    return logits.softmax(dim=-1)


def _reveal(x: Tensor, p: Tensor, nu: float, nu_next: float, mask: int, scale: float) -> Tensor:
    weights = p * (scale * (nu - nu_next))
    weights[..., mask] = scale * nu_next
    return torch.where(x == mask, race(weights), x)


def _sigma(nu: float) -> float:
    return -float(torch.log1p(torch.tensor(-(1 - NOISE_EPS) * nu, dtype=torch.float64)))


def sedd(problem: Problem) -> Tensor:
    """SEDD's analytic sampler on the absorbing graph: weights from the score in every step, then a denoising draw."""
    x, mask = problem.noise(), problem.vocab_size
    nu = torch.linspace(1, NU_END, problem.steps + 1, dtype=torch.float64).tolist()
    for i in range(problem.steps + 1):
        if problem.walked(i):
            return x
        sigma = _sigma(nu[i])
        step = sigma if i == problem.steps else sigma - _sigma(nu[i + 1])
        score = problem.network(x, problem.scalar(sigma)).to(problem.dtype)
        score = score - torch.tensor(sigma, dtype=problem.dtype).expm1().log() - torch.log(torch.tensor(float(mask)))
        score = score.scatter(-1, x[..., None], 0.0).exp()
        growth = torch.tensor(step, dtype=problem.dtype).exp()
        total = score.sum(dim=-1)
        weights = score * growth
        weights[..., mask] += (1 - growth) * total
        forward = (1 - 1 / growth) * (x == mask).to(problem.dtype)[..., None]
        weights = weights * forward.expand_as(weights).scatter_add(
            -1, x[..., None], (1 / growth).expand(*x.shape, 1).to(problem.dtype)
        )
        if i == problem.steps:
            weights[..., mask] = 0
        x = race(weights)
    return x
