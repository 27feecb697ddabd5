"""What dfm, fsdfm and tsdfm share: sources, schedule, grid, and which positions a mask-source sampler may move.

All three walk the grid t_i = i / N with the clean-token distribution p = p_{1|t}(. | x_t) frozen in each step,
every position independent, and end with a full draw from p in the last step. They differ in the law of the other
steps.

With the mask source the published samplers treat revealed positions in their own ways, so this is an option,
`unmask_change`:

    reference   as published. Before the last step any position may move, revealed ones too, and the mask id is a legal
                destination. Last step: flow matching's solver (dfm) re-draws every position; FS-DFM's (cumulative law)
                draws only those still masked.
    always      any position may move in every step, the last one included.
    never       a revealed position stays, and the mask id is never a destination: masked diffusion's behaviour, which
                is also what the exact posterior would do.

In the last step the mask id always has probability 0, so none is left. With the uniform source every position may
move in every step and the option does not apply.

References: Gat et al., arXiv 2407.15595; FS-DFM, arXiv 2509.20624.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn

from tsdfm_bench.api import SampleRequest
from tsdfm_bench.methods.builtin import Diffusion, one_of, schedule_of
from tsdfm_bench.methods.core.denoiser import Denoiser, NetworkDenoiser
from tsdfm_bench.methods.core.grid import Grid
from tsdfm_bench.methods.core.kernel import Kernel, Posterior
from tsdfm_bench.methods.core.loop import run
from tsdfm_bench.methods.core.schedule import Polynomial, Schedule
from tsdfm_bench.methods.core.source import Source
from tsdfm_bench.methods.core.state import State

UNMASK_CHANGE = ("reference", "always", "never")


class Flow(Diffusion):
    """A flow-matching sampler.

    Args:
        denoiser: gives x0 logits.
        source: "uniform", "mask", or any Source.
        unmask_change: see above.
        schedule: kappa, default kappa(t) = t.
        time_eps: eps_t of the checkpoint's loss; the reference grid ends at 1 - eps_t.
        device: where sampling runs.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        source: Source | str = "uniform",
        unmask_change: str = "reference",
        schedule: Schedule | None = None,
        time_eps: float = 0.0,
        device: str = "cpu",
    ) -> None:
        super().__init__(denoiser, source, schedule or Polynomial(), device)
        self.unmask_change = one_of(self.info, "unmask_change", unmask_change)
        self.time_eps = time_eps

    @classmethod
    def from_network(
        cls,
        network: nn.Module,
        config: Mapping[str, Any],
        source: str | None,
        device: str,
        options: Mapping[str, str],
    ) -> Self:
        """Around a DiT: conditioned on t, and on h if it is step-aware."""
        geometry = config["network"]
        denoiser = NetworkDenoiser(
            network,
            geometry["vocab_size"],
            geometry["outputs"],
            conditioning="t",
            step_aware=bool(geometry.get("step_aware", False)),
        )
        return cls(
            denoiser,
            source=source or "uniform",
            schedule=schedule_of(config, Polynomial()),
            time_eps=float(config.get("time_eps", 0.0)),
            device=device,
            **options,
        )

    def refuse(self, request: SampleRequest) -> str | None:
        """A reason not to serve the request, or None."""
        if self.unmask_change != "reference" and self.source.mask_id is None:
            return f"unmask_change={self.unmask_change} concerns the mask source; this is source '{self.source.name}'"
        return super().refuse(request)

    @abstractmethod
    def kernel(self, posterior: Posterior) -> Kernel:
        """The step law."""

    def walk(self, state: State, request: SampleRequest) -> Tensor | None:
        """The reference grid under this method's kernel."""
        assert request.steps is not None
        posterior = Posterior.of(request, self.denoiser, self.schedule, self.source.mask_id)
        grid = Grid.reference(request.steps, self.time_eps)
        trace = run(self.kernel(posterior), state, grid, trace=request.trace)
        posterior.policy.check()
        return trace
