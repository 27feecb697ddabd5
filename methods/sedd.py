"""SEDD: score entropy discrete diffusion, absorbing ("mask") and uniform graphs.

The network gives ratios S(y) = p_t(x with y here) / p_t(x), S(z) = 1 at the current token z. Every position is
independent. With nu = 1 - t, sigma = -log kappa(t) and D = sigma(t) - sigma(t + h), a masked position of the
absorbing graph is drawn from max(w, 0) / sum,

    w(y) = F S(y)  (y != m),    w(m) = 1 - F sum_{y != m} S(y),    F = e^D - 1          analytic (Tweedie)
                                                                   F = h sigma'(nu)     Euler

and revealed tokens stay. The uniform graph's laws are in `methods.sedd_uniform`. The analytic step multiplies the
score by exp(-D Q) and by the forward kernel; with an exact score it is the exact bridge. The grid is nu from 1 to
1e-5; then one more call denoises: the analytic law with D = sigma(nu), the mask left out, drawn and not
maximised.

Unlike in masked diffusion, whether a position is revealed depends on the network (the sum of S), so it is called
in every step until the sequence has no mask. The sum is one fp32 reduction; tokens are drawn in fp64 where a
position is revealed.

A denoiser of clean-token logits p stands for the score S(y) = p(y) / (e^sigma - 1). Temperature and nucleus act on
the clean-token distribution, which on this graph is S normalised: they change what is revealed, not when.

Reference: Lou et al., arXiv 2310.16834, eq. 19 (Tweedie), 16 (Euler); the released sampler.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
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
from tsdfm_bench.methods.core.visits import Visit, places_visit, uniforms_of_steps
from tsdfm_bench.methods.score import sum_exp
from tsdfm_bench.methods.sedd_uniform import UniformKernel

SAMPLERS = ("analytic", "euler")
PARAMETERISATIONS: dict[str, Kind] = {"score": "log_score", "posterior": "x0_logits"}
NU_END = 1e-5


class ScaledScoreDenoiser(NetworkDenoiser):
    """The published absorb parameterisation: log score = output - log(e^sigma - 1) - log V."""

    def predict(self, tokens: Tensor, condition: Condition, rows: Tensor, positions: Tensor) -> Tensor:
        """See `Denoiser.predict`."""
        output = super().predict(tokens, condition, rows, positions)
        scale = (torch.expm1(condition.sigma).log() + math.log(self.vocab_size)).to(output.dtype)
        # in place: the output is ours, and large
        return output.sub_(scale[:, None] if len(scale) == 1 else scale[rows, None])


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
        factors = self.factor(grid.start, grid.end).to(state.tokens.device)
        sites = ("token",) if self.posterior.policy.legacy else ("leave", "token")
        drawn = zip(*(uniforms_of_steps(site, state, len(grid)) for site in sites), strict=True)
        for i, ((t, t_next), uniforms) in enumerate(zip(grid, drawn, strict=True)):
            masked = (state.tokens == self.mask) & state.free
            visit = places_visit(masked, i, t, t_next, **dict(zip(sites, uniforms, strict=True)))
            if visit is None:
                return
            visit.of_steps["factor"] = factors[i].expand_as(visit.at_rows)
            yield visit

    def factor(self, t: Tensor, t_next: Tensor) -> Tensor:
        """What S(y) is multiplied with: e^D - 1 or f."""
        schedule = self.posterior.schedule
        if self.euler:
            return (t_next - t) * schedule.sigma_rate(t)
        return torch.expm1(schedule.sigma(t) - schedule.sigma(t_next))

    def total(self, logits: Tensor, visit: Visit) -> Tensor:
        """The sum of S over the real tokens at n masked places, (n,) fp64."""
        if self.posterior.denoiser.kind == "x0_logits":
            return torch.expm1(self.posterior.schedule.sigma(visit.t)).reciprocal()[visit.at_rows]
        return sum_exp(logits)

    def step(self, state: State, visit: Visit) -> None:
        """Reveal, or not, every masked position of the visit."""
        logits = self.posterior.logits(state, visit)
        logits = logits[:, : self.mask]  # the mask is the last output
        factor = visit.of_steps.get("factor")
        if factor is None:
            factor = self.factor(visit.t, visit.t_next)[visit.at_rows]
        reveal = (factor * self.total(logits, visit)).clamp_max_(1.0)
        self.posterior.policy.watch(reveal)
        if self.posterior.policy.legacy:
            self._race(state, visit, logits, reveal)
            return
        revealed = (visit.uniform("leave", state.streams) < reveal).nonzero().squeeze(1)
        if revealed.numel():
            tokens = self.posterior.draw(logits[revealed], visit.uniform("token", state.streams)[revealed])
            state.write(visit.state_rows[revealed], visit.at_positions[revealed], tokens)

    def _race(self, state: State, visit: Visit, logits: Tensor, reveal: Tensor) -> None:
        u = visit.uniform("token", state.streams)
        tokens = torch.empty_like(visit.at_rows)
        for s in pieces(*logits.shape, device=logits.device):
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
    oracle_form = "score"

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
