"""The uniform graph of SEDD: one step of its reverse process.

With ratios S, S(z) = 1 at the current token z, D = sigma(t) - sigma(t + h), c = e^(-D) and f = h sigma'(nu), every
position is independent and drawn from max(w, 0) / sum:

    analytic (Tweedie)    w(y) = [ S(y) - d ] / c * ( c 1[y = z] + (1 - c) / V ),    d = (1 - c) / V * sum_y S(y)
    Euler                 w(y) = f S(y) / V  (y != z),    w(z) = 1 - f (sum_y S(y) - 1) / V

The closing step is analytic with D = sigma(nu).

A score network is called in every step for every position. The probability of moving is bounded by a function of
sum S, one fp32 reduction over the vocabulary; only positions that the bound selects are evaluated in fp64 (few at
many steps), and there the exact weights decide.

A denoiser of clean-token logits stands for the score it implies (`methods.score`). Such a score never gives a
position more than the probability of moving that p(z) = 0 gives, so the law is thinned: candidates are chosen
with that probability, before and without the network, and a candidate moves with the ratio of the two. Steps in
which a sequence has no candidate need no call.

Temperature and nucleus act on the clean-token distribution; of a score network, on the one its ratios imply.

Reference: Lou et al., arXiv 2310.16834, eq. 19 (Tweedie), 16 (Euler).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tsdfm_bench.api import plain
from tsdfm_bench.methods.core.grid import Grid
from tsdfm_bench.methods.core.kernel import Kernel, Posterior, pieces
from tsdfm_bench.methods.core.state import State
from tsdfm_bench.methods.core.visits import Visit, bernoulli_events, every_step, plan
from tsdfm_bench.methods.score import (
    implied_posterior,
    implied_ratios,
    most_ratios,
    normalised,
    sum_exp,
    uniform_weights,
)

_MARGIN = 1e-3  # an fp32 sum of exponentials errs by far less than this


class UniformKernel(Kernel):
    """One step of the uniform graph.

    Args:
        posterior: denoiser of log scores or clean-token logits.
        euler: the Euler instead of the analytic law (the closing step is analytic in both).
    """

    def __init__(self, posterior: Posterior, euler: bool) -> None:
        self.posterior = posterior
        self.euler = euler
        self.implied = posterior.denoiser.kind == "x0_logits"

    def visits(self, state: State, grid: Grid) -> Iterator[Visit]:
        """The grid and the closing step: everything in every step, or candidates drawn first (see the module)."""
        end = grid.end[-1:]
        walk = Grid(torch.cat([grid.start, end]), torch.cat([grid.end, torch.ones_like(end)]))
        if not self.implied or self.posterior.policy.legacy or plain():
            return every_step(state, walk, sites=("token",) if self.posterior.policy.legacy else ("leave",))
        bound = self.most_leaving(walk.start, walk.end, torch.arange(len(walk)) == len(walk) - 1)
        events = bernoulli_events(state.streams, state.free, bound)
        return plan(events, walk.start, walk.end, state.streams, ("leave", "token"))

    def recorded_steps(self, state: State, grid: Grid) -> int:
        """The grid's steps and the closing one."""
        return len(grid) + 1

    def scale(self, t: Tensor, t_next: Tensor, closing: Tensor) -> Tensor:
        """c = e^(-D) of analytic and closing steps, f of Euler steps; (n,) fp64."""
        schedule = self.posterior.schedule
        sigma = schedule.sigma(t)
        if not self.euler:
            return torch.exp(torch.where(closing, 0.0, schedule.sigma(t_next)) - sigma)
        return torch.where(closing, torch.exp(-sigma), (t_next - t) * schedule.sigma_rate(t))

    def analytic(self, closing: Tensor) -> Tensor:
        """Which steps follow the analytic law, (n,) bool."""
        return closing if self.euler else torch.ones_like(closing)

    def most_leaving(self, t: Tensor, t_next: Tensor, closing: Tensor) -> Tensor:
        """The largest probability of moving that a clean-token posterior can give, (n,) fp64 in [0, 1]."""
        size = self.posterior.denoiser.vocab_size
        scale, others = self.scale(t, t_next, closing), most_ratios(self.posterior.schedule.kappa(t), size)
        spread = (1 - scale) / size
        # the weights of a consistent score are non-negative and sum to 1
        analytic = spread / scale * (others - (size - 1) * spread * (others + 1))
        return torch.where(self.analytic(closing), analytic, scale * others / size).clamp(0.0, 1.0)

    def step(self, state: State, visit: Visit) -> None:
        """Move, or not, every place of the visit."""
        posterior = self.posterior
        logits = posterior.logits(state, visit)
        z = state.tokens[visit.state_rows, visit.at_positions]
        t, t_next, closing = visit.t[visit.at_rows], visit.t_next[visit.at_rows], visit.last
        kappa, scale, u_leave = posterior.schedule.kappa(t), self.scale(t, t_next, closing), None
        if not posterior.policy.legacy:
            u_leave = visit.uniform("leave", state.streams)
            if self.implied and not plain():  # the candidates were drawn with this probability
                u_leave = u_leave * self.most_leaving(t, t_next, closing)
            elif not plain():
                bound = self._leave_bound(logits, z, scale, self.analytic(closing))
                posterior.policy.watch(bound)  # a bound that is not a number would select nothing, silently
                candidate = u_leave < bound * (1 + _MARGIN) + _MARGIN**2
                visit = visit.keep(candidate)
                logits, z, kappa, scale, closing, u_leave = (
                    x[candidate] for x in (logits, z, kappa, scale, closing, u_leave)
                )
        u_token = visit.uniform("token", state.streams)
        for s in pieces(*logits.shape, device=logits.device):
            weights = self.weights(logits[s], z[s], kappa[s], scale[s], closing[s], visit.any_last)
            if u_leave is None:
                z[s] = posterior.policy.categorical(weights, u_token[s])
                continue
            stay = weights.gather(1, z[s, None])[:, 0]
            weights.scatter_(1, z[s, None], 0.0)
            moving = weights.sum(dim=1)
            drawn = posterior.policy.categorical(weights, u_token[s])
            z[s] = torch.where(u_leave[s] * (moving + stay) < moving, drawn, z[s])
        state.write(visit.state_rows, visit.at_positions, z)

    def weights(
        self, logits: Tensor, z: Tensor, kappa: Tensor, scale: Tensor, closing: Tensor, any_closing: bool = True
    ) -> Tensor:
        """max(w, 0) at n places, (n, V) fp64."""
        ratios = self.ratios(logits, z, kappa)
        if not self.euler or not any_closing:
            return uniform_weights(ratios, z, scale, analytic=not self.euler)
        euler, analytic = (uniform_weights(ratios, z, scale, law) for law in (False, True))
        return torch.where(closing[:, None], analytic, euler)

    def ratios(self, logits: Tensor, z: Tensor, kappa: Tensor) -> Tensor:
        """S at n places with temperature and nucleus, (n, V) fp64, own entry 1."""
        posterior = self.posterior
        if self.implied:
            return implied_ratios(posterior.probabilities(logits), z, kappa)
        ratios = logits.double().scatter(1, z[:, None], 0.0).exp_()
        if posterior.sharpen.neutral:
            return ratios
        p = implied_posterior(ratios, z, kappa)
        return implied_ratios(normalised(posterior.sharpen.weights(p.log())), z, kappa)

    def _leave_bound(self, logits: Tensor, z: Tensor, scale: Tensor, analytic: Tensor) -> Tensor:
        """An upper bound of the probability of moving, from the sum of the ratios alone; (n,) fp64."""
        if not self.posterior.sharpen.neutral:
            return torch.ones_like(scale)  # the ratios after temperature are not known without the whole row
        size = logits.shape[1]
        others = sum_exp(logits, z[:, None])
        spread = (1 - scale) / size
        leaving = spread / scale * others
        staying = ((1 - spread * (others + 1)) / scale * (scale + spread)).clamp_min(0.0)
        bound = leaving / (leaving + staying).clamp_min(1e-300)
        return torch.where(analytic, bound, (scale * others / size).clamp_max(1.0))

    def transition(self, ratios: Tensor, z: Tensor, t: float, t_next: float, last: bool = False) -> Tensor:
        """The law of one step as a matrix.

        Args:
            ratios: (n, V) fp64 S; the own entry is not read.
            z: (n,) int64 current tokens.
            t, t_next: the step.
            last: the closing denoising step.

        Returns:
            (n, V) fp64.
        """
        times = torch.tensor([t, t_next], dtype=torch.float64).expand(z.numel(), 2)
        scale = self.scale(times[:, 0], times[:, 1], torch.full_like(z, last, dtype=torch.bool))
        own = ratios.scatter(1, z[:, None], 1.0)
        return normalised(uniform_weights(own, z, scale, analytic=last or not self.euler))
