"""SEDD: score entropy discrete diffusion, absorbing ("mask") and uniform graphs.

The network gives ratios S(y) = p_t(x with y here) / p_t(x), S(z) = 1 at the current token z. With nu = 1 - t,
D = sigma(t) - sigma(t + h), c = e^(-D), f = h sigma'(nu), every position independent and drawn from max(w, 0) / sum:

    analytic, absorb     w(y) = (e^D - 1) S(y),  w(m) = 1 - (e^D - 1) A,           A = sum_{y != m} S(y),  z = m only
    analytic, uniform    w(y) = [ S(y) - d ] / c * ( c 1[y = z] + (1 - c) / V ),   d = (1 - c) / V * sum_y S(y)
    euler, absorb        w(y) = f S(y),          w(m) = 1 - f A,                   z = m only
    euler, uniform       w(y) = f S(y) / V,      w(z) = 1 - f (sum_y S(y) - 1) / V

The analytic (Tweedie) step multiplies the score by exp(-D Q) and by the forward kernel; with an exact score it is the
exact bridge. The grid is nu from 1 to 1e-5; then one more call denoises: the analytic law with D = sigma(nu), the mask
left out, drawn and not maximised. Unlike in masked diffusion, whether a position moves depends on the network, so the
network is called in every step; a sequence without masks is finished.

The probability of moving needs only sum S, which is one fp32 reduction over the vocabulary; a bound computed from it
selects the positions whose weights are then evaluated in fp64 (few at many steps), where exact weights decide.

A denoiser of clean-token logits p is used through the score it implies, with alpha = kappa(t):

    absorb     S(y) = p(y) / (e^sigma - 1)
    uniform    S(y) = 1 - p(z) (1 - a) + p(y) (1 / a - 1),    a = ((1 - alpha) / V) / (alpha + (1 - alpha) / V)

Temperature and nucleus act on the clean-token distribution (of a score: the p that solves these equations).

Reference: Lou et al., arXiv 2310.16834, eq. 19 (Tweedie), 16 (Euler); the released sampler.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from tsdfm_bench.api import MethodInfo, SampleRequest
from tsdfm_bench.errors import UsageError
from tsdfm_bench.methods.builtin import Diffusion, one_of, schedule_of
from tsdfm_bench.methods.core.denoiser import Condition, Denoiser, Kind, NetworkDenoiser
from tsdfm_bench.methods.core.finaliser import Finaliser
from tsdfm_bench.methods.core.grid import Grid
from tsdfm_bench.methods.core.kernel import Kernel, Posterior, pieces
from tsdfm_bench.methods.core.loop import run
from tsdfm_bench.methods.core.schedule import LogLinear, Schedule
from tsdfm_bench.methods.core.source import Source
from tsdfm_bench.methods.core.state import State
from tsdfm_bench.methods.core.visits import Visit, every_step, places_visit
from tsdfm_bench.methods.score import (
    floor_and_lift,
    implied_posterior,
    implied_ratios,
    log_sum_exp,
    normalised,
    uniform_weights,
)

SAMPLERS = ("analytic", "euler")
PARAMETERISATIONS: dict[str, Kind] = {"score": "log_score", "posterior": "x0_logits"}
NU_END = 1e-5
_MARGIN = 1e-3  # relative, far above the rounding of an fp32 sum of exponentials


class ScaledScoreDenoiser(NetworkDenoiser):
    """The published absorb parameterisation: log score = output - log(e^sigma - 1) - log V."""

    def predict(self, tokens: Tensor, condition: Condition, rows: Tensor, positions: Tensor) -> Tensor:
        """See `Denoiser.predict`."""
        output = super().predict(tokens, condition, rows, positions)
        scale = torch.expm1(condition.sigma).log() + math.log(self.vocab_size)
        return output - scale.to(output.dtype)[rows, None]


class AbsorbKernel(Kernel):
    """One step of the absorbing graph.

    Args:
        posterior: denoiser of log scores or clean-token logits; `mask_id` set.
        euler: the Euler instead of the analytic law.
    """

    def __init__(self, posterior: Posterior, euler: bool) -> None:
        self.posterior = posterior
        self.euler = euler
        self.mask = cast(int, posterior.mask_id)

    def visits(self, state: State, grid: Grid) -> Iterator[Visit]:
        """All positions masked at the time, until none is left."""
        for i, (t, t_next) in enumerate(grid):
            visit = places_visit((state.tokens == self.mask) & state.free, i, t, t_next)
            if visit is None:
                return
            yield visit

    def factor(self, t: Tensor, t_next: Tensor) -> Tensor:
        """What S(y) is multiplied with: e^D - 1 or f."""
        schedule = self.posterior.schedule
        if self.euler:
            return (t_next - t) * schedule.sigma_rate(t)
        return torch.expm1(schedule.sigma(t) - schedule.sigma(t_next))

    def log_total(self, logits: Tensor, sigma: Tensor) -> Tensor:
        """log A at n masked places, (n,) fp64; real tokens only."""
        if self.posterior.denoiser.kind == "x0_logits":
            return -torch.expm1(sigma).log()
        return log_sum_exp(logits)

    def step(self, state: State, visit: Visit) -> None:
        """Reveal, or not, every masked position of the visit."""
        logits = self.posterior.logits(state, visit)
        logits = logits[:, : self.mask]  # the mask is the last output
        sigma = self.posterior.schedule.sigma(visit.t)[visit.at_rows]
        factor = self.factor(visit.t, visit.t_next)[visit.at_rows]
        reveal = (factor * self.log_total(logits, sigma).exp()).clamp_max(1.0)
        self.posterior.policy.watch(reveal)
        if self.posterior.policy.legacy:
            self._race(state, visit, logits, reveal)
            return
        revealed = visit.uniform("leave", state.streams) < reveal
        chosen = visit.keep(revealed)
        if chosen.at_rows.numel() == 0:
            return
        tokens = self.posterior.draw(logits[revealed], chosen.uniform("token", state.streams))
        state.write(chosen.state_rows, chosen.at_positions, tokens)

    def _race(self, state: State, visit: Visit, logits: Tensor, reveal: Tensor) -> None:
        u = visit.uniform("token", state.streams)
        tokens = torch.empty_like(visit.at_rows)
        for s in pieces(*logits.shape):
            real = self.posterior.probabilities(logits[s]) * reveal[s, None]
            weights = torch.cat([real, 1 - reveal[s, None]], dim=1)
            tokens[s] = self.posterior.policy.categorical(weights, u[s])
        state.write(visit.state_rows, visit.at_positions, tokens)

    def transition(self, ratios: Tensor, z: Tensor, t: float, t_next: float, last: bool = False) -> Tensor:
        """The law of one step as a matrix.

        Args:
            ratios: (n, V + 1) fp64 S; the mask's column is not read.
            z: (n,) int64 current tokens.
            t, t_next: the step.
            last: the closing denoising draw.

        Returns:
            (n, V + 1) fp64.
        """
        times = torch.tensor([t, t_next], dtype=torch.float64)
        real = ratios.index_fill(1, torch.tensor([self.mask]), 0.0)
        total = real.sum(dim=1, keepdim=True)
        reveal = 1.0 if last else (self.factor(times[:1], times[1:]) * total).clamp_max(1.0)
        here = nn.functional.one_hot(z, ratios.shape[1]).to(real.dtype)
        return torch.where(z.eq(self.mask)[:, None], reveal * real / total + (1 - reveal) * here, here)


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
        """Everything in every step, and the closing step."""
        yield from (replace(v, any_last=False) for v in every_step(state, grid))
        end = float(grid.end[-1])
        closing = places_visit(state.free, len(grid), end, 1.0)
        if closing is not None:
            yield replace(closing, any_last=True)

    def recorded_steps(self, state: State, grid: Grid) -> int:
        """The grid's steps and the closing one."""
        return len(grid) + 1

    def step(self, state: State, visit: Visit) -> None:
        """Move, or not, every free position of the visit."""
        posterior = self.posterior
        logits = posterior.logits(state, visit)
        rows, positions = visit.state_rows, visit.at_positions
        z = state.tokens[rows, positions]
        kappa, scale = (x[visit.at_rows] for x in self._scalars(visit.t, visit.t_next, visit.any_last))
        analytic = visit.any_last or not self.euler
        if posterior.policy.legacy:
            moved = [
                posterior.policy.categorical(self._weights(logits[s], z[s], kappa[s], scale[s], analytic), u)
                for s, u in _with(visit.uniform("token", state.streams), logits)
            ]
            state.write(rows, positions, torch.cat(moved))
            return
        u_leave = visit.uniform("leave", state.streams)
        bound = self._leave_bound(logits, z, kappa, scale, analytic)
        posterior.policy.watch(bound)  # a bound that is not a number selects nothing, silently
        candidate = u_leave < bound * (1 + _MARGIN) + 1e-6
        chosen = visit.keep(candidate)
        if chosen.at_rows.numel() == 0:
            return
        logits, z, kappa, scale, u_leave = (x[candidate] for x in (logits, z, kappa, scale, u_leave))
        u_token = chosen.uniform("token", state.streams)
        tokens = z.clone()
        for s in pieces(*logits.shape):
            own = z[s, None]
            weights = self._weights(logits[s], z[s], kappa[s], scale[s], analytic)
            stay = weights.gather(1, own)[:, 0]
            weights.scatter_(1, own, 0.0)
            moving = weights.sum(dim=1)
            drawn = posterior.policy.categorical(weights, u_token[s])
            tokens[s] = torch.where(u_leave[s] * (moving + stay) < moving, drawn, z[s])
        state.write(chosen.state_rows, chosen.at_positions, tokens)

    def _scalars(self, t: Tensor, t_next: Tensor, closing: bool) -> tuple[Tensor, Tensor]:
        """kappa(t), and c = e^(-D) of the analytic or f of the Euler law."""
        schedule = self.posterior.schedule
        sigma = schedule.sigma(t)
        if closing:
            return schedule.kappa(t), torch.exp(-sigma)
        if self.euler:
            return schedule.kappa(t), (t_next - t) * schedule.sigma_rate(t)
        return schedule.kappa(t), torch.exp(schedule.sigma(t_next) - sigma)

    def _weights(self, logits: Tensor, z: Tensor, kappa: Tensor, scale: Tensor, analytic: bool) -> Tensor:
        return uniform_weights(self.ratios(logits, z, kappa), z, scale, analytic)

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

    def _leave_bound(self, logits: Tensor, z: Tensor, kappa: Tensor, scale: Tensor, analytic: bool) -> Tensor:
        """An upper bound of the probability of moving, from the sum of the ratios alone; (n,) fp64."""
        sharpen = self.posterior.sharpen
        if sharpen.temperature == 0 or (not sharpen.neutral and (sharpen.top_p is not None or not self.implied)):
            return torch.ones_like(scale)  # the sum is not known without the full distribution
        size, own = logits.shape[1], z[:, None]
        if self.implied:
            scaled = logits if sharpen.neutral else logits / sharpen.temperature
            odds = (log_sum_exp(scaled, own) - scaled.gather(1, own)[:, 0].double()).exp()
            p_own, p_others = 1 / (1 + odds), 1 / (1 + 1 / odds)  # near 1 it is the rest that matters
            floor, lift = (x[:, 0] for x in floor_and_lift(kappa, size))
            others = (size - 1) * (p_others + p_own * floor) + p_others * lift
        else:
            others = log_sum_exp(logits, own).exp()
        if not analytic:
            return (scale * others / size).clamp_max(1.0)
        leaving = (1 - scale) / size / scale * others
        drift = (1 - scale) / size * (others + 1)
        if self.implied:  # consistent scores: no weight is negative, the weights sum to 1
            leaving = leaving - (1 - scale) / size / scale * (size - 1) * drift
            return leaving.clamp(0.0, 1.0)
        staying = ((1 - drift) / scale * (scale + (1 - scale) / size)).clamp_min(0.0)
        return leaving / (leaving + staying).clamp_min(1e-300)

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
        times = torch.tensor([t, t_next], dtype=torch.float64)
        _, scale = self._scalars(times[:1], times[1:], last)
        own = ratios.scatter(1, z[:, None], 1.0)
        return normalised(uniform_weights(own, z, scale.expand(z.numel()), last or not self.euler))


def _with(u: Tensor, logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for s in pieces(*logits.shape):
        yield s, u[s]


class SEDD(Diffusion):
    """Score entropy discrete diffusion.

    Args:
        denoiser: log scores or clean-token logits, as its `kind` says.
        source: "mask" (absorbing graph) or "uniform".
        sampler: "analytic" or "euler".
        schedule: kappa; default log-linear with eps = 1e-3. Published uniform checkpoints are geometric (1e-4, 20).
        device: where sampling runs.
    """

    info = MethodInfo(
        name="sedd",
        family="score entropy",
        sources=("mask", "uniform"),
        citation="arXiv:2310.16834",
        options={"sampler": SAMPLERS},
    )

    def __init__(
        self,
        denoiser: Denoiser,
        source: Source | str = "mask",
        sampler: str = "analytic",
        schedule: Schedule | None = None,
        device: str = "cpu",
    ) -> None:
        super().__init__(denoiser, source, schedule or LogLinear(), device)
        if self.source.name not in self.info.sources:
            raise UsageError(f"sedd has the graphs {', '.join(self.info.sources)}, not '{self.source.name}'")
        self.sampler = one_of(self.info, "sampler", sampler)

    @classmethod
    def from_network(
        cls,
        network: nn.Module,
        config: Mapping[str, Any],
        source: str | None,
        device: str,
        options: Mapping[str, str],
    ) -> Self:
        """Around a DiT conditioned on sigma.

        `parameterisation` in the configuration says what the network outputs: "score" (default; with the mask source
        scaled by sigma, as published, unless `scale_by_sigma` is false) or "posterior", clean-token logits.
        """
        geometry = config["network"]
        written = str(config.get("parameterisation", "score"))
        if written not in PARAMETERISATIONS:
            raise UsageError(f"unknown parameterisation '{written}'; known: {', '.join(PARAMETERISATIONS)}")
        scaled = written == "score" and source != "uniform" and bool(config.get("scale_by_sigma", True))
        denoiser = (ScaledScoreDenoiser if scaled else NetworkDenoiser)(
            network,
            geometry["vocab_size"],
            geometry["outputs"],
            kind=PARAMETERISATIONS[written],
            conditioning="sigma",
        )
        return cls(denoiser, source or "mask", schedule=schedule_of(config, LogLinear()), device=device, **options)

    def walk(self, state: State, request: SampleRequest) -> Tensor | None:
        """The chosen law over the published grid, and the closing draw."""
        assert request.steps is not None
        posterior = Posterior.of(request, self.denoiser, self.schedule, self.source.mask_id)
        grid = Grid.masked(request.steps, NU_END)
        euler = self.sampler == "euler"
        if self.source.mask_id is None:
            trace = run(UniformKernel(posterior, euler), state, grid, trace=request.trace)
        else:
            kernel = AbsorbKernel(posterior, euler)
            trace = run(kernel, state, grid, Finaliser("sample"), posterior, trace=request.trace)
        posterior.policy.check()
        return trace
