"""ReMDM: masked diffusion that takes revealed tokens back.

With a = kappa(t), b = kappa(t + h) and a remasking probability rho <= rho_max = min(1, (1 - b) / a), every position is
independent:

    P(y | m) = (b - (1 - rho) a) / (1 - a) p(y)  (y != m),      P(m | m) = (1 - b - rho a) / (1 - a)
    P(m | z) = rho,                                             P(z | z) = 1 - rho

p = p_theta(. | x_t) is a masked-diffusion posterior; rho = 0 is MDLM, and any rho leaves the marginals of the noising
process as they are. What rho is:

    cap        min(eta, rho_max)
    rescale    eta rho_max
    conf       rho_max softmax(-c) over the revealed positions of the sequence, c = p(token) when it was revealed; the
               masked ones are stepped with rho = 0
    loop       0 until t = 0.45, where kappa reaches 0.9 early; then kappa is held and rho = min(eta, rho_max) until
               t = 0.95; then 0 to the end

Neither who is taken back nor who is revealed depends on p, so the network is called for the sequences that reveal
something in a step, and its head, softmax and draws run on those positions alone. Masks that are left after the last
step go to the finaliser (argmax), as in MDLM. The weights are MDLM's. The reference code takes rho from the first
sequence of a batch; here every sequence has its own.

Reference: Wang et al., Remasking Discrete Diffusion Models with Inference-Time Scaling, arXiv 2503.00307.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from tsdfm_bench.api import MethodInfo, SampleRequest
from tsdfm_bench.errors import UsageError
from tsdfm_bench.methods.toolkit import (
    MDLM,
    Denoiser,
    Diffusion,
    Finaliser,
    Grid,
    Kernel,
    LogLinear,
    MaskSource,
    NetworkDenoiser,
    Posterior,
    Schedule,
    State,
    Visit,
    one_of,
    pieces,
    places_visit,
    run,
    schedule_of,
)

STRATEGIES = ("cap", "rescale", "conf", "loop")
CONFIDENCE = "confidence"
HELD = "hold"
NU_END = 1e-5


class RemaskingKernel(Kernel):
    """One step of ReMDM.

    Args:
        posterior: p, its schedule and draw policy, with `mask_id`.
        strategy: "cap", "rescale", "conf" or "loop".
        eta: its strength; `conf` has none.
    """

    def __init__(self, posterior: Posterior, strategy: str, eta: float) -> None:
        self.posterior, self.strategy, self.eta = posterior, strategy, eta

    def remask_probability(self, state: State, t: float, t_next: float, kind: str = "") -> Tensor:
        """rho of every position, (batch, length) fp64."""
        times = torch.tensor([t, t_next], dtype=torch.float64)
        a, b = self.posterior.schedule.kappa(times).tolist()
        rho_max = min(1.0, (1.0 - b) / a) if a > 0 else 1.0
        if self.strategy == "conf":
            revealed = (state.tokens != self.posterior.mask_id) & state.free
            share = torch.softmax(torch.where(revealed, -state.aux[CONFIDENCE], -torch.inf), dim=1)
            return rho_max * torch.where(revealed, share, 0.0)
        if self.strategy == "rescale":
            rho = self.eta * rho_max
        elif self.strategy == "cap" or kind == HELD:
            rho = min(self.eta, rho_max)
        else:
            rho = 0.0
        return torch.full(state.tokens.shape, rho, dtype=torch.float64, device=state.tokens.device)

    def move_probability(self, state: State, t: float, t_next: float, kind: str = "") -> Tensor:
        """Probability that a position moves: to a token if it is masked, to the mask if not; (batch, length) fp64."""
        rho = self.remask_probability(state, t, t_next, kind)
        a, b = self.posterior.schedule.kappa(torch.tensor([t, t_next], dtype=torch.float64)).tolist()
        reveal = (b - (1 - rho) * a) / (1 - a)
        return torch.where(state.tokens == self.posterior.mask_id, reveal, rho)

    def visits(self, state: State, grid: Grid) -> Iterator[Visit]:
        """The positions that move, step by step; they depend on the state, so they are chosen as the walk goes."""
        if CONFIDENCE not in state.aux:
            state.aux[CONFIDENCE] = torch.zeros(state.tokens.shape, dtype=torch.float64, device=state.tokens.device)
        for i, (t, t_next) in enumerate(grid):
            u = state.streams.uniform("move", i, state.length)
            moves = (u < self.move_probability(state, t, t_next, grid.kind(i))) & state.free
            visit = places_visit(moves, i, t, t_next)
            if visit is not None:
                yield visit

    def step(self, state: State, visit: Visit) -> None:
        """Take back what is revealed, reveal what is masked."""
        mask = self.posterior.mask_id
        assert mask is not None
        masked = state.tokens[visit.state_rows, visit.at_positions] == mask
        reveal = visit.keep(masked)
        logits = self.posterior.logits(state, reveal) if reveal.rows.numel() else None  # of the state before the step
        taken_back = visit.state_rows[~masked], visit.at_positions[~masked]
        state.tokens[taken_back] = mask
        if logits is None:
            return
        u = reveal.uniform("token", state.streams)
        for s in pieces(*logits.shape, device=logits.device):
            p = self.posterior.probabilities(logits[s], no_mask=True)
            token = self.posterior.policy.categorical(p, u[s])
            rows, positions = reveal.state_rows[s], reveal.at_positions[s]
            state.write(rows, positions, token)
            state.aux[CONFIDENCE][rows, positions] = p.gather(1, token[:, None])[:, 0]


class ReMDM(Diffusion):
    """Remasking diffusion.

    Args:
        denoiser: gives x0 logits, V + 1 outputs.
        strategy: "cap", "rescale", "conf" or "loop".
        eta: strength of the remasking, in [0, 1].
        schedule: kappa, default log-linear.
        device: where sampling runs.
    """

    info = MethodInfo(
        name="remdm",
        family="masked diffusion",
        sources=("mask",),
        citation="arXiv:2503.00307",
        options={"strategy": STRATEGIES, "eta": "strength of cap, rescale and loop, 0 to 1 (default 0.02)"},
    )
    lender = MDLM

    def __init__(
        self,
        denoiser: Denoiser,
        strategy: str = "cap",
        eta: str | float = 0.02,
        schedule: Schedule | None = None,
        device: str = "cpu",
    ) -> None:
        super().__init__(denoiser, MaskSource(denoiser.vocab_size), schedule or LogLinear(), device)
        self.strategy = one_of(self.info, "strategy", strategy)
        try:
            self.eta = float(eta)
        except ValueError:
            raise UsageError(f"eta of remdm is a number from 0 to 1, not '{eta}'") from None
        if not 0 <= self.eta <= 1:
            raise UsageError(f"eta of remdm lies between 0 and 1, not {self.eta:g}")

    @classmethod
    def from_network(
        cls,
        network: nn.Module,
        config: Mapping[str, Any],
        source: str | None,
        device: str,
        options: Mapping[str, str],
    ) -> Self:
        """Around the network of an MDLM checkpoint."""
        geometry = config["network"]
        conditioning = "sigma" if config.get("time_conditioning") else "none"
        denoiser = NetworkDenoiser(network, geometry["vocab_size"], geometry["outputs"], conditioning=conditioning)
        return cls(denoiser, schedule=schedule_of(config, LogLinear()), device=device, **options)

    def refuse(self, request: SampleRequest) -> str | None:
        """A reason not to serve the request, or None."""
        if request.draw != "fp64":
            return "remdm chooses who moves before the network is asked, so it cannot repeat the published fp32 race"
        if self.strategy == "loop" and request.steps is not None and request.steps < 3:
            return f"strategy=loop walks, holds and finishes: it needs at least 3 steps, not {request.steps}"
        return super().refuse(request)

    def walk(self, state: State, request: SampleRequest) -> Tensor | None:
        """The grid of the strategy, then the finaliser."""
        assert request.steps is not None
        posterior = Posterior.of(request, self.denoiser, self.schedule, self.source.mask_id)
        grid = Grid.loop(request.steps) if self.strategy == "loop" else Grid.masked(request.steps, NU_END)
        kernel = RemaskingKernel(posterior, self.strategy, self.eta)
        trace = run(kernel, state, grid, Finaliser("argmax"), posterior, trace=request.trace)
        posterior.policy.check()
        return trace


METHODS = {"remdm": ReMDM}  # for `--plugin tsdfm_bench_remdm.py`, without installing
