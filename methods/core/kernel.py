"""Kernels: one step of a sampler as a transition law, and the clean-token distribution they read.

A kernel says which rows and positions a run visits (by default all of them in every step of the grid) and what a
visit does to the state. It gets its clean-token distribution from a `Posterior`: denoiser, temperature and
nucleus, mask exclusion and draw policy in one place, evaluated in fp64 and in pieces, so that no (batch, length,
vocab) fp64 tensor ever exists.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from tsdfm_bench.api import SampleRequest
from tsdfm_bench.methods.core.denoiser import Condition, Denoiser
from tsdfm_bench.methods.core.draw import DrawPolicy
from tsdfm_bench.methods.core.grid import Grid
from tsdfm_bench.methods.core.schedule import Schedule
from tsdfm_bench.methods.core.sharpen import Sharpen
from tsdfm_bench.methods.core.state import State
from tsdfm_bench.methods.core.visits import Visit, every_step

_PIECE = 1 << 20  # fp64 elements worked on at a time: 8 MB stay in a processor's cache
_PIECE_GPU = 1 << 25  # an accelerator waits for its host if it gets too little to do: 256 MB


def pieces(count: int, width: int, *, device: torch.device | None = None) -> Iterator[slice]:
    """Slices that cover `count` rows of `width` numbers, each small enough to be worked on in fp64.

    Args:
        count, width: shape of the numbers.
        device: where they are; None = on a CPU.
    """
    most = _PIECE if device is None or device.type == "cpu" else _PIECE_GPU
    rows = max(1, most // max(1, width))
    for begin in range(0, count, rows):
        yield slice(begin, min(begin + rows, count))


class Posterior:
    """The clean-token distribution a sampler acts on, at chosen places.

    Args:
        denoiser: gives x0 logits.
        schedule: kappa, shown to the denoiser.
        sharpen: temperature and nucleus.
        policy: how tokens are drawn.
        mask_id: the token that must not be in the result where `no_mask` is asked for, or None.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        sharpen: Sharpen | None = None,
        policy: DrawPolicy | None = None,
        mask_id: int | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.schedule = schedule
        self.sharpen = sharpen or Sharpen()
        self.policy = policy or DrawPolicy()
        self.mask_id = mask_id

    @classmethod
    def of(
        cls, request: SampleRequest, denoiser: Denoiser, schedule: Schedule, mask_id: int | None = None
    ) -> Posterior:
        """With the temperature, nucleus and draw of a request."""
        sharpen = Sharpen(request.temperature, request.top_p, request.top_p_rule)
        return cls(denoiser, schedule, sharpen, DrawPolicy(request.draw), mask_id)

    def logits(self, state: State, visit: Visit) -> Tensor:
        """The denoiser's numbers at the places of a visit, (n, outputs); one call."""
        aux = {name: value[visit.rows] for name, value in state.aux.items()}
        condition = Condition(visit.t, visit.t_next, self.schedule, aux)
        return self.denoiser.predict(state.tokens[visit.rows], condition, visit.at_rows, visit.at_positions)

    def weights(self, logits: Tensor, no_mask: bool | Tensor = False) -> Tensor:
        """Probabilities after temperature and nucleus, not always normalised.

        Args:
            logits: (n, outputs); a piece of what `logits` returned.
            no_mask: exclude the mask id, everywhere or in the rows where (n,) is True.

        Returns:
            (n, outputs) fp64.
        """
        return self.sharpen.weights(self.allowed(logits, no_mask))

    def allowed(self, logits: Tensor, no_mask: bool | Tensor) -> Tensor:
        """The logits, -inf for the mask id where it is excluded; arguments as of `weights`."""
        if self.mask_id is None or no_mask is False:
            return logits
        logits = logits.clone()
        excluded = logits.new_full((), -torch.inf)
        if no_mask is not True:
            excluded = torch.where(no_mask, excluded, logits[:, self.mask_id])
        logits[:, self.mask_id] = excluded
        return logits

    def probabilities(self, logits: Tensor, no_mask: bool | Tensor = False) -> Tensor:
        """`weights`, normalised."""
        w = self.weights(logits, no_mask)
        return w / w.sum(dim=-1, keepdim=True)

    def draw(self, logits: Tensor, u: Tensor, no_mask: bool | Tensor = False) -> Tensor:
        """One token per place, (n,) int64.

        Args:
            logits: (n, outputs).
            u: (n,) fp64 uniforms.
            no_mask: as in `weights`.
        """
        if no_mask is True and self.mask_id == logits.shape[1] - 1:
            logits, no_mask = logits[:, : self.mask_id], False
        drawn = []
        for s in pieces(*logits.shape, device=logits.device):
            excluded = no_mask if isinstance(no_mask, bool) else no_mask[s]
            drawn.append(self.policy.exactly(self.allowed(logits[s], excluded), self.sharpen, u[s]))
        if len(drawn) == 1:
            return drawn[0]
        return torch.cat(drawn) if drawn else torch.empty(0, dtype=torch.int64, device=logits.device)


class Kernel(ABC):
    """One step of a sampler. Subclasses state their transition law in mathematics."""

    def visits(self, state: State, grid: Grid) -> Iterator[Visit]:
        """What has to be done, in order; may be lazy and look at the state. Default: everything in every step."""
        return every_step(state, grid)

    @abstractmethod
    def step(self, state: State, visit: Visit) -> None:
        """Advance the rows of the visit, in place; the loop puts pinned tokens back afterwards."""

    def recorded_steps(self, state: State, grid: Grid) -> int:
        """How many states a trace holds: one more than the largest step number of a visit."""
        return len(grid)
