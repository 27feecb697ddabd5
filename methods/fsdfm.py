"""FS-DFM: few-step discrete flow matching, a network conditioned on the step size and the cumulative scalar.

With p = p_{1|t}(. | x_t; h) the posterior of a step from t to t + h, rates r(y) = gbar(t, h) p(y), r(z) = 0, where

    gbar(t, h) = (1 / h) log[ (1 - kappa(t)) / (1 - kappa(t + h)) ]

is the mean of the instantaneous rate over the step. Each position is independent:

    P(leave z) = 1 - exp(-h gbar (1 - p(z))) = 1 - R^(1 - p(z)),    R = (1 - kappa(t + h)) / (1 - kappa(t))
    P(y | z, leave) = p(y) / (1 - p(z)),   y != z

A position never leaves with more than 1 - R, so the law is thinned: candidates are chosen with probability 1 - R,
before and without the network, and a candidate leaves with probability (1 - R^(1 - p(z))) / (1 - R). Steps in
which a sequence has no candidate need no call. The last step draws from p itself, the current token allowed (with
the mask source: see `methods.flow`).

Reference: arXiv 2509.20624, eq. 4.3 and the released sampler "mixture_euler_with_cumulative_scalar".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from tsdfm_bench.api import Identity, MethodInfo, OracleSource, plain
from tsdfm_bench.errors import UsageError
from tsdfm_bench.methods.core.denoiser import Denoiser
from tsdfm_bench.methods.core.draw import MARGIN, rough_search, rough_weights
from tsdfm_bench.methods.core.grid import Grid
from tsdfm_bench.methods.core.kernel import Kernel, Posterior, pieces
from tsdfm_bench.methods.core.source import Source
from tsdfm_bench.methods.core.state import State
from tsdfm_bench.methods.core.visits import Visit, bernoulli_events, plan
from tsdfm_bench.methods.flow import UNMASK_CHANGE, Flow

RERANK = ("none", "compass")
MOST_CANDIDATES = 64


class CumulativeKernel(Kernel):
    """One step with the cumulative scalar.

    Args:
        posterior: p, its schedule and draw policy; `mask_id` set for the mask source.
        unmask_change: as in `methods.flow`; without a mask id it has no meaning.
    """

    def __init__(self, posterior: Posterior, unmask_change: str = "reference") -> None:
        self.posterior = posterior
        masked = posterior.mask_id is not None
        self.once = masked and unmask_change == "never"
        self.close_masked_only = masked and unmask_change == "reference"

    def candidate_probability(self, grid: Grid) -> Tensor:
        """1 - R of every step, 1 in the last; (steps,) fp64."""
        probability = -torch.expm1(self.posterior.schedule.log_survival(grid.start, grid.end))
        probability[-1] = 1.0
        return probability

    def visits(self, state: State, grid: Grid) -> Iterator[Visit]:
        """The candidates of the whole run, drawn first."""
        candidate = self.candidate_probability(grid)
        if plain() and not self.once:  # no thinning: everything in every step
            candidate = torch.ones_like(candidate)
        events = bernoulli_events(state.streams, state.free, candidate, once=self.once)
        tables = {"candidate": candidate, "log_ratio": self.posterior.schedule.log_survival(grid.start, grid.end)}
        for visit in plan(events, grid.start, grid.end, state.streams, ("token", "leave"), tables=tables):
            if visit.any_last and self.close_masked_only:
                masked = state.tokens[visit.state_rows, visit.at_positions] == self.posterior.mask_id
                visit = visit.keep(masked | ~visit.last)
                if visit.at_rows.numel() == 0:
                    continue
            yield visit

    def step(self, state: State, visit: Visit) -> None:
        """Let the candidates leave, or not."""
        rows, positions = visit.state_rows, visit.at_positions
        current = state.tokens[rows, positions]
        logits = self.posterior.logits(state, visit)
        u_leave, u_token = (visit.uniform(site, state.streams) for site in ("leave", "token"))
        if "log_ratio" in visit.of_steps:
            log_ratio, candidate = visit.of_steps["log_ratio"], visit.of_steps["candidate"]
        else:
            log_ratio = self.posterior.schedule.log_survival(visit.t, visit.t_next)[visit.at_rows]
            candidate = -torch.expm1(log_ratio)
        given = (logits, current, log_ratio, u_leave * candidate, u_token, visit.last)
        parts = list(pieces(*logits.shape, device=logits.device))
        if len(parts) > 1:
            drawn = torch.cat([self._drawn(*(x[s] for x in given), any_last=visit.any_last) for s in parts])
        else:
            drawn = self._drawn(*given, any_last=visit.any_last)
        state.write(rows, positions, drawn)

    def _drawn(
        self,
        logits: Tensor,
        current: Tensor,
        log_ratio: Tensor,
        u_leave: Tensor,
        u_token: Tensor,
        last: Tensor,
        *,
        any_last: bool,
        exact: bool = False,
    ) -> Tensor:
        """Where n candidates go, (n,) int64; everything else is (n,), the logits (n, outputs).

        With rough weights a token is not certain either where the others have less than e^-15 of the weight. Whoever
        leaves there has `u_leave` within the margin of `leave`, and is drawn again.
        """
        posterior, z = self.posterior, current[:, None]
        logits = posterior.allowed(logits, True if self.once else last if any_last else False)
        rough = not exact and posterior.policy.roughly(logits, posterior.sharpen)
        weights = rough_weights(logits) if rough else posterior.sharpen.weights(logits)
        stay = weights.gather(1, z)
        weights.scatter_(1, z, torch.where(last[:, None], stay, 0.0) if any_last else 0.0)
        if rough:
            token, others, unsure = rough_search(weights, u_token)
            posterior.policy.watch(others)
        else:
            token, others = posterior.policy.categorical_and_total(weights, u_token)
        leave = -torch.expm1(log_ratio * (others / (others + stay.squeeze(1))))
        goes = u_leave < leave
        drawn = torch.where(goes | last if any_last else goes, token, current)
        if not rough:
            return drawn
        near = (u_leave - leave).abs() < MARGIN * (1 - log_ratio)
        again = (unsure & (goes | last) | near & ~last).nonzero().squeeze(1)
        if again.numel():
            given = (logits, current, log_ratio, u_leave, u_token, last)
            drawn[again] = self._drawn(*(x[again] for x in given), any_last=any_last, exact=True)
        return drawn

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
        frozen = z.ne(-1 if mask is None else mask) & (self.once or (last and self.close_masked_only))
        if last:
            law = p
        else:
            times = torch.tensor([t, t_next], dtype=torch.float64)
            log_ratio = self.posterior.schedule.log_survival(times[:1], times[1:])
            others = p * (1 - here)
            total = others.sum(dim=1, keepdim=True)
            leave = -torch.expm1(log_ratio * total)
            law = (1 - leave) * here + leave * others / total.clamp_min(1e-300)
        return torch.where(frozen[:, None], here, law)


class FSDFM(Flow):
    """FS-DFM, and with `rerank="compass"` the control described in `methods.rerank`.

    Args:
        denoiser: gives x0 logits.
        source: "uniform", "mask", or any Source.
        rerank: "none", or "compass": each step is the best of K by the energy compass that lies beside the weights.
        K, tau: of rerank.
        energy: the compass; None = it is read from beside the weights.
        settings: the other arguments of `Flow`.
    """

    info = MethodInfo(
        name="fsdfm",
        family="flow matching",
        sources=("uniform", "mask"),
        citation="arXiv:2509.20624",
        options={
            "unmask_change": UNMASK_CHANGE,
            "rerank": RERANK,
            "K": "candidates of rerank=compass, 1 to 64 (default 4)",
            "tau": "time in [0, 1] from which rerank=compass chooses (default 0.5)",
        },
    )

    def __init__(
        self,
        denoiser: Denoiser,
        source: Source | str = "uniform",
        rerank: str = "none",
        K: str | int = 4,
        tau: str | float = 0.5,
        energy: nn.Module | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(denoiser, source, **settings)
        self.rerank = rerank
        self.candidates, self.tau = _candidates(K), _tau(tau)
        self.energy = energy

    @classmethod
    def load(cls, params: Mapping[str, object], device: str) -> Self:
        """See `Weighted.load`; with `rerank=compass` the compass is read too."""
        method = super().load(params, device)
        if method.rerank == "compass":
            from tsdfm_bench.methods.rerank import load_compass

            method.energy = load_compass(cls._checkpoint(params), method.denoiser.outputs, device)
        return method

    @classmethod
    def from_oracle(cls, oracle: OracleSource, params: Mapping[str, object], device: str) -> Self:
        """See `Walker.from_oracle`; the compass is the exact NLL of a state."""
        method = super().from_oracle(oracle, params, device)
        if method.rerank == "compass":
            method.energy = cast("nn.Module", oracle("energy", method.source.name))
        return method

    @classmethod
    def identify(cls, params: Mapping[str, object]) -> Identity:
        """See `Weighted.identify`; with `rerank=compass` the compass belongs to it."""
        if params.get("rerank") != "compass":
            if {"K", "tau"} & set(params):
                raise UsageError(f"options K and tau of {cls.info.name} belong to rerank=compass")
            return super().identify(params)
        from tsdfm_bench.methods.rerank import compass_beside, identity_with

        _candidates(params.get("K", 4))
        _tau(params.get("tau", 0.5))
        checkpoint = cls._checkpoint(params)
        return identity_with(super().identify(params), compass_beside(checkpoint.folder, checkpoint.source))

    def networks(self) -> Mapping[str, nn.Module]:
        """The network, and the compass if there is one."""
        return {**super().networks(), **({"energy": self.energy} if self.energy is not None else {})}

    def kernel(self, posterior: Posterior) -> Kernel:
        """The cumulative law, or the best of K such steps."""
        if self.rerank == "compass":
            from tsdfm_bench.methods.rerank import RerankedKernel

            assert self.energy is not None
            return RerankedKernel(posterior, self.unmask_change, self.energy, self.candidates, self.tau)
        return CumulativeKernel(posterior, self.unmask_change)


def _candidates(given: object) -> int:
    """K from a number or text; UsageError if it is none of 1 to 64."""
    text = str(given)
    if not text.isdecimal() or not 1 <= int(text) <= MOST_CANDIDATES:
        raise UsageError(f"K of fsdfm is a whole number from 1 to {MOST_CANDIDATES}, not '{given}'")
    return int(text)


def _tau(given: object) -> float:
    """tau from a number or text; UsageError if it is not in [0, 1]."""
    try:
        tau = float(str(given))
    except ValueError:
        tau = float("nan")
    if not 0 <= tau <= 1:
        raise UsageError(f"tau of fsdfm is a time from 0 to 1, not '{given}'")
    return tau
