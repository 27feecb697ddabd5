"""Discrete flow matching: a posterior network sampled by re-drawing positions from p.

At time t the posterior p = p_{1|t}(. | x_t) is frozen for a step of size h. Each position is independent and is
re-drawn from p, the current token allowed, with a probability that does not depend on p:

    P(y | z) = a p(y) + (1 - a) 1[y = z]

    euler         a = 1 - exp(-h g(t)),   g(t) = kappa'(t) / (1 - kappa(t))      flow matching's mixture Euler solver
    exact         a = (kappa(t + h) - kappa(t)) / (1 - kappa(t))                 the exact bridge
    cumulative    FS-DFM's law, with the same network (see `methods.fsdfm`)

So the positions are chosen first, and the network's head, the softmax and the draw run on those alone. Euler is
the first-order approximation of the bridge: at t = 1/2, h = 1/4 (kappa = t) a is 0.393 instead of 0.5. The last
step re-draws every position (a draw, not an argmax).

Reference: Gat et al., Discrete Flow Matching, arXiv 2407.15595; the solver of arXiv 2412.06264 (flow matching
guide).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tsdfm_bench.api import MethodInfo
from tsdfm_bench.methods.builtin import one_of
from tsdfm_bench.methods.core.denoiser import Denoiser
from tsdfm_bench.methods.core.grid import Grid
from tsdfm_bench.methods.core.kernel import Kernel, Posterior
from tsdfm_bench.methods.core.schedule import Schedule
from tsdfm_bench.methods.core.source import Source
from tsdfm_bench.methods.core.state import State
from tsdfm_bench.methods.core.visits import Visit, bernoulli_events, plan
from tsdfm_bench.methods.flow import UNMASK_CHANGE, Flow
from tsdfm_bench.methods.fsdfm import CumulativeKernel

SOLVERS = ("euler", "cumulative", "exact")


class RedrawKernel(Kernel):
    """Each position is re-drawn from p with probability a(t, h), and from p alone in the last step.

    Args:
        posterior: p, its schedule and draw policy; `mask_id` set for the mask source.
        exact: the exact bridge's a instead of Euler's.
        unmask_change: as in `methods.flow`; without a mask id it has no meaning.
    """

    def __init__(self, posterior: Posterior, exact: bool, unmask_change: str = "reference") -> None:
        self.posterior = posterior
        self.exact = exact
        self.once = posterior.mask_id is not None and unmask_change == "never"

    def redraw_probability(self, t: Tensor, t_next: Tensor) -> Tensor:
        """a(t, h) of steps from t to t_next, fp64."""
        schedule: Schedule = self.posterior.schedule
        if self.exact:
            return -torch.expm1(schedule.log_survival(t, t_next))
        return -torch.expm1(-(t_next - t) * schedule.rate(t))

    def visits(self, state: State, grid: Grid) -> Iterator[Visit]:
        """All re-draws of the run, chosen first."""
        probability = self.redraw_probability(grid.start, grid.end)
        probability[-1] = 1.0
        events = bernoulli_events(state.streams, state.free, probability, once=self.once)
        return plan(events, grid.start, grid.end, state.streams, ("token",))

    def step(self, state: State, visit: Visit) -> None:
        """Re-draw the places of the visit."""
        logits = self.posterior.logits(state, visit)
        no_mask = True if self.once else visit.last if visit.any_last else False
        tokens = self.posterior.draw(logits, visit.uniform("token", state.streams), no_mask)
        state.write(visit.state_rows, visit.at_positions, tokens)

    def transition(self, p: Tensor, z: Tensor, t: float, t_next: float, last: bool = False) -> Tensor:
        """The law of one step as a matrix.

        Args:
            p: (n, outputs) fp64 clean-token distributions.
            z: (n,) int64 current tokens.
            t, t_next: the step.
            last: it is the grid's last.

        Returns:
            (n, outputs) fp64, row i the law of what follows z_i.
        """
        mask = self.posterior.mask_id
        if mask is not None and (last or self.once):
            p = p.index_fill(1, torch.tensor([mask]), 0.0)
            p = p / p.sum(dim=1, keepdim=True)
        here = torch.nn.functional.one_hot(z, p.shape[1]).to(p.dtype)
        times = torch.tensor([t, t_next], dtype=torch.float64)
        a = 1.0 if last else self.redraw_probability(times[:1], times[1:])
        law = a * p + (1 - a) * here
        frozen = z.ne(-1 if mask is None else mask) & self.once
        return torch.where(frozen[:, None], here, law)


class DFM(Flow):
    """Discrete flow matching.

    Args:
        denoiser: gives x0 logits.
        source: "uniform", "mask", or any Source.
        solver: "euler", "cumulative" or "exact".
        settings: the other arguments of `Flow`.
    """

    info = MethodInfo(
        name="dfm",
        family="flow matching",
        sources=("uniform", "mask"),
        citation="arXiv:2407.15595",
        options={"solver": SOLVERS, "unmask_change": UNMASK_CHANGE},
    )

    def __init__(
        self, denoiser: Denoiser, source: Source | str = "uniform", solver: str = "euler", **settings: Any
    ) -> None:
        super().__init__(denoiser, source, **settings)
        self.solver = one_of(self.info, "solver", solver)

    def kernel(self, posterior: Posterior) -> Kernel:
        """The law of the chosen solver."""
        if self.solver == "cumulative":
            return CumulativeKernel(posterior, self.unmask_change)
        return RedrawKernel(posterior, self.solver == "exact", self.unmask_change)
