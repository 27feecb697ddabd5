"""The loop: walk a kernel's visits, keep pinned tokens, record the trace."""

from __future__ import annotations

import torch
from torch import Tensor

from tsdfm_bench.methods.core.finaliser import Finaliser
from tsdfm_bench.methods.core.grid import Grid
from tsdfm_bench.methods.core.kernel import Kernel, Posterior
from tsdfm_bench.methods.core.state import State
from tsdfm_bench.methods.core.visits import Visit


class Trace:
    """States after every step, assembled from the visits (rows may be visited at different steps).

    Args:
        state: the state before the first step.
        steps: number of states to keep.
    """

    def __init__(self, state: State, steps: int) -> None:
        self.initial = state.tokens.clone()
        self.steps = steps
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def record(self, state: State, visit: Visit) -> None:
        """Remember the rows of a visit as they are now."""
        self.seen.append((visit.rows, visit.index, state.tokens[visit.rows]))

    def assemble(self) -> Tensor:
        """(batch, steps, length) int64; a step without a visit repeats the state before it."""
        batch, length = self.initial.shape
        states = torch.zeros(batch, self.steps + 1, length, dtype=self.initial.dtype, device=self.initial.device)
        latest = torch.zeros(batch, self.steps + 1, dtype=torch.int64, device=self.initial.device)
        states[:, 0] = self.initial
        for rows, index, tokens in self.seen:
            states[rows, index + 1] = tokens
            latest[rows, index + 1] = index + 1
        latest = latest.cummax(dim=1).values
        return states.gather(1, latest[..., None].expand_as(states))[:, 1:]


def run(
    kernel: Kernel,
    state: State,
    grid: Grid,
    finaliser: Finaliser | None = None,
    posterior: Posterior | None = None,
    trace: bool = False,
) -> Tensor | None:
    """Take the state from noise to data, in place.

    Args:
        kernel: what a step does.
        state: at t = 0, pinned tokens in place.
        grid: the steps.
        finaliser: what to do with masks that are left; None for kernels that leave none. Needs `posterior`.
        posterior: the clean-token distribution the finaliser reads.
        trace: record the state after every step.

    Returns:
        the trace, (batch, recorded_steps, length) int64, or None.
    """
    extra = finaliser.recorded_steps if finaliser is not None else 0
    recorded = kernel.recorded_steps(state, grid)
    recorder = Trace(state, recorded + extra) if trace else None
    for visit in kernel.visits(state, grid):
        kernel.step(state, visit)
        state.pin()
        if recorder is not None:
            recorder.record(state, visit)
    if finaliser is not None:
        if posterior is None:
            raise ValueError("a finaliser needs the posterior it reads")
        closing = finaliser.finish(state, grid, posterior)
        state.pin()
        if recorder is not None and closing is not None:
            index = torch.full_like(closing.index, recorded)
            recorder.seen.append((closing.rows, index, state.tokens[closing.rows]))
    return recorder.assemble() if recorder is not None else None
