"""MDLM: masked diffusion language modelling with the SUBS parameterisation.

All positions start masked. p = p_theta(. | x_t) never predicts the mask, and revealed tokens are carried over
(SUBS). With the masked share move(t) = 1 - kappa(t), a masked position takes the exact bridge of the absorbing
process in each step, independently of the others:

    P(y | m) = a p(y)  (y != m),    P(m | m) = 1 - a,    P(z | z) = 1,
    a = (kappa(t + h) - kappa(t)) / (1 - kappa(t))

Whether a position is revealed does not depend on p, so all reveal steps are drawn before the first call.

    cached          calls the network for a sequence only in steps that reveal something in it. A network that does not
                    see the time would return what it returned before, so nothing is lost: at most length calls (and one
                    for the finaliser) at any number of steps, whatever the batch.
    ancestral       the same law (and the same tokens), with a call in every step until the sequence is finished. The
                    published sampler goes on to the last step, and always makes one call more to clean up: N + 1.
    first-hitting   exact in time, no grid: the next reveal happens at noise level move <- move u^(1/n) with n masks
                    left, and concerns one of them. One call per token; the number of steps plays no role.

Grid: nu = 1 - t from 1 to 1e-5 in N steps, kappa log-linear; about one position in 1e5 is then still masked and
goes to the finaliser (argmax by default, as published). With finaliser `none` the grid ends at nu = 0, where the
last step reveals everything that is left.

With draw `legacy-fp32` the published fp32 race decides between all tokens and the mask at once, with weights
p(y) (move(t) - move(t + h)) and move(t + h), in every masked position and every step; there the arithmetic, not the
law above, says how often a position is revealed.

References: Sahoo et al., arXiv 2406.07524; first-hitting sampling and the arithmetic of the draw: Zheng et al.,
arXiv 2409.02908.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from tsdfm_bench.api import MethodInfo, SampleRequest, plain
from tsdfm_bench.methods.builtin import Diffusion, one_of, schedule_of
from tsdfm_bench.methods.core.denoiser import Denoiser, NetworkDenoiser
from tsdfm_bench.methods.core.finaliser import FINALISERS, Finaliser, Rule
from tsdfm_bench.methods.core.grid import Grid
from tsdfm_bench.methods.core.kernel import Kernel, Posterior, pieces
from tsdfm_bench.methods.core.loop import run
from tsdfm_bench.methods.core.schedule import LogLinear, Schedule
from tsdfm_bench.methods.core.source import MaskSource
from tsdfm_bench.methods.core.state import State
from tsdfm_bench.methods.core.visits import Events, Visit, bernoulli_events, places_visit, plan

SAMPLERS = ("cached", "ancestral", "first-hitting")
NU_END = 1e-5


class MaskedKernel(Kernel):
    """Reveal masked positions with the exact bridge's probability.

    Args:
        posterior: p, its schedule and draw policy, `mask_id` set.
        every_step: call the network in every step of an unfinished sequence, not only where something is revealed.
    """

    def __init__(self, posterior: Posterior, every_step: bool = False) -> None:
        self.posterior = posterior
        self.every_step = every_step

    def reveal_probability(self, t: Tensor, t_next: Tensor) -> Tensor:
        """a of steps from t to t_next, fp64; 1 where a step ends at t = 1, whatever noise a schedule leaves there."""
        return torch.where(t_next < 1, -torch.expm1(self.posterior.schedule.log_survival(t, t_next)), 1.0)

    def visits(self, state: State, grid: Grid) -> Iterator[Visit]:
        """The reveals of the whole run, drawn first."""
        free = state.free.cpu()
        reveal = self.reveal_probability(grid.start, grid.end)
        events = bernoulli_events(state.streams, free, reveal, once=True)
        also = _until_finished(events, free, len(grid)) if self.every_step or plain() else None
        return plan(events, grid.start, grid.end, state.streams, ("token",), also)

    def step(self, state: State, visit: Visit) -> None:
        """Draw the tokens of the positions that are revealed."""
        logits = self.posterior.logits(state, visit)
        tokens = self.posterior.draw(logits, visit.uniform("token", state.streams), no_mask=True)
        state.write(visit.state_rows, visit.at_positions, tokens)

    def transition(self, p: Tensor, z: Tensor, t: float, t_next: float, last: bool = False) -> Tensor:
        """The law of one step as a matrix.

        Args:
            p: (n, V + 1) fp64 clean-token distributions; the mask's share is dropped.
            z: (n,) int64 current tokens.
            t, t_next: the step.
            last: no step is special here.

        Returns:
            (n, V + 1) fp64, row i the law of what follows z_i.
        """
        mask = cast(int, self.posterior.mask_id)
        p = p.index_fill(1, torch.tensor([mask]), 0.0)
        p = p / p.sum(dim=1, keepdim=True)
        here = torch.nn.functional.one_hot(z, p.shape[1]).to(p.dtype)
        times = torch.tensor([t, t_next], dtype=torch.float64)
        a = self.reveal_probability(times[:1], times[1:])
        return torch.where(z.eq(mask)[:, None], a * p + (1 - a) * here, here)


def _until_finished(events: Events, free: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """(rows, steps) of every step up to each row's last reveal, or all of them if some position stays masked."""
    batch = free.shape[0]
    busy = torch.zeros(batch, dtype=torch.int64).scatter_reduce_(0, events.rows, events.steps + 1, "amax")
    revealed = events.rows.bincount(minlength=batch)
    busy[revealed < free.sum(dim=1)] = steps
    rows, index = (torch.arange(steps) < busy[:, None]).nonzero(as_tuple=True)
    return rows, index


class FirstHittingKernel(MaskedKernel):
    """One reveal per visit, at its exact time."""

    def visits(self, state: State, grid: Grid) -> Iterator[Visit]:
        """Independent hitting times of all positions, in order; the grid's times are not used.

        A position is still masked at time t with probability move(t) / move(0), so its hitting time is where that
        equals a uniform: the sorted times have the law of move <- move u^(1/n), in a random order of positions.
        """
        streams = state.streams.to("cpu")
        free = state.free.cpu()
        schedule = self.posterior.schedule
        level = streams.uniform("hit", 0, state.length) * schedule.noise(torch.zeros((), dtype=torch.float64))
        time = torch.where(free, schedule.time_of_noise(level).clamp_max(1.0), torch.inf)
        ordered, order = time.sort(dim=1, stable=True)
        rows, rank = torch.isfinite(ordered).nonzero(as_tuple=True)
        end = torch.cat([ordered[:, 1:], torch.ones_like(ordered[:, :1])], dim=1).clamp_max(1.0)
        return plan(Events(rows, order[rows, rank], rank), ordered, end, state.streams, ("token",))

    def recorded_steps(self, state: State, grid: Grid) -> int:
        """One state per token."""
        return state.length


class RaceKernel(Kernel):
    """The published fp32 race over all tokens and the mask, in every masked position and step.

    Args:
        posterior: with the legacy draw policy.
        reuse: keep a sequence's probabilities until its own tokens change: for a network that does not see the time.
    """

    def __init__(self, posterior: Posterior, reuse: bool) -> None:
        self.posterior = posterior
        self.reuse = reuse
        self.kept: Tensor | None = None  # (batch, length, V + 1) fp32, as the published sampler keeps it
        self.stale: Tensor | None = None  # (batch,) bool

    def visits(self, state: State, grid: Grid) -> Iterator[Visit]:
        """All positions masked at the time, step by step, until none is left."""
        for i, (t, t_next) in enumerate(grid):
            masked = (state.tokens == self.posterior.mask_id) & state.free
            visit = places_visit(masked, i, t, t_next)
            if visit is None:
                return
            yield visit

    def step(self, state: State, visit: Visit) -> None:
        """Race at every place of the visit."""
        rows, positions = visit.state_rows, visit.at_positions
        mask = cast(int, self.posterior.mask_id)
        noise = self.posterior.schedule.noise
        before, after = noise(visit.t)[visit.at_rows], noise(visit.t_next)[visit.at_rows]
        probabilities = self._probabilities(state, visit)
        u = visit.uniform("token", state.streams)
        tokens = torch.full_like(rows, mask)
        for s in pieces(*probabilities.shape, device=probabilities.device):
            weights = probabilities[s] * (before - after)[s, None].float()
            weights[:, mask] = after[s].float()
            tokens[s] = self.posterior.policy.categorical(weights, u[s])
        state.write(rows, positions, tokens)
        if self.stale is not None:
            self.stale[rows[tokens != mask]] = True

    def _probabilities(self, state: State, visit: Visit) -> Tensor:
        """p at the places of the visit, (n, V + 1) fp32."""
        if not self.reuse:
            return self._fresh(state, visit)
        if self.kept is None or self.stale is None:
            self.stale = torch.ones(state.batch, dtype=torch.bool, device=state.tokens.device)
            outputs = self.posterior.denoiser.outputs
            self.kept = torch.zeros(*state.tokens.shape, outputs, device=state.tokens.device)
        changed = visit.keep(self.stale[visit.state_rows])
        if changed.at_rows.numel():
            self.kept[changed.state_rows, changed.at_positions] = self._fresh(state, changed)
            self.stale[changed.rows] = False
        return self.kept[visit.state_rows, visit.at_positions]

    def _fresh(self, state: State, visit: Visit) -> Tensor:
        logits = self.posterior.logits(state, visit)
        return torch.cat(
            [self.posterior.probabilities(logits[s], True).float() for s in pieces(*logits.shape, device=logits.device)]
        )


class MDLM(Diffusion):
    """Masked diffusion.

    Args:
        denoiser: gives x0 logits, V + 1 outputs.
        sampler: "cached", "ancestral" or "first-hitting".
        finaliser: "argmax", "sample" or "none", for masks left by the grid samplers.
        schedule: kappa, default log-linear with eps = 1e-3.
        device: where sampling runs.
    """

    info = MethodInfo(
        name="mdlm",
        family="masked diffusion",
        sources=("mask",),
        citation="arXiv:2406.07524",
        options={"sampler": SAMPLERS, "finaliser": FINALISERS},
    )

    def __init__(
        self,
        denoiser: Denoiser,
        sampler: str = "cached",
        finaliser: str = "argmax",
        schedule: Schedule | None = None,
        device: str = "cpu",
    ) -> None:
        super().__init__(denoiser, MaskSource(denoiser.vocab_size), schedule or LogLinear(), device)
        self.sampler = one_of(self.info, "sampler", sampler)
        self.finaliser = cast(Rule, one_of(self.info, "finaliser", finaliser))

    @classmethod
    def from_network(
        cls,
        network: nn.Module,
        config: Mapping[str, Any],
        source: str | None,
        device: str,
        options: Mapping[str, str],
    ) -> Self:
        """Around a DiT; it is given sigma if its configuration says `time_conditioning`, else a constant 0."""
        geometry = config["network"]
        denoiser = NetworkDenoiser(
            network,
            geometry["vocab_size"],
            geometry["outputs"],
            conditioning="sigma" if config.get("time_conditioning") else "none",
        )
        return cls(denoiser, schedule=schedule_of(config, LogLinear()), device=device, **options)

    def walk(self, state: State, request: SampleRequest) -> Tensor | None:
        """The chosen sampler."""
        assert request.steps is not None
        posterior = Posterior.of(request, self.denoiser, self.schedule, self.source.mask_id)
        grid = Grid.masked(request.steps, 0.0 if self.finaliser == "none" else NU_END)
        finaliser: Finaliser | None = Finaliser(self.finaliser)
        kernel: Kernel
        if self.sampler == "first-hitting":
            kernel, finaliser = FirstHittingKernel(posterior), None
        elif posterior.policy.legacy:
            timeless = getattr(self.denoiser, "conditioning", "") == "none"  # only then is what it returned still true
            kernel = RaceKernel(posterior, reuse=self.sampler == "cached" and timeless)
        else:
            kernel = MaskedKernel(posterior, every_step=self.sampler == "ancestral")
        trace = run(kernel, state, grid, finaliser, posterior, trace=request.trace)
        posterior.policy.check()
        return trace
