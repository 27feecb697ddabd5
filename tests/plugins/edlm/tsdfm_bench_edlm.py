"""EDLM: masked diffusion whose proposals are whole sequences, re-weighted by an energy.

The denoiser's clean-token distribution is a product over positions, p(x | x_t) = prod_l p_l(x_l | x_t): it knows no
correlation between the tokens that are revealed together. EDLM corrects it by an energy of the whole clean sequence,

    p_EDLM(x | x_t) = p(x | x_t) e^{-E(x, x_t)} / Z(x_t),      low energy = like real text,

with the autoregressive energy  E = -log p_AR(x) + log p(x | x_t):  e^{-E} is the importance ratio between an
autoregressive model and the proposal, so nothing has to be trained. One step from t to t + h, while t lies in the
window [begin, end):

    x^1, ..., x^k ~ p(. | x_t) independently (revealed tokens are kept),
    x = x^j with probability e^{-E(x^j) / T} / sum_i e^{-E(x^i) / T},
    every masked position takes its token of x with probability (kappa(t + h) - kappa(t)) / (1 - kappa(t)).

Outside the window, and with k = 1, this is MDLM's step. As k grows the first step's x becomes a sample of p_AR.

Note the sign: the weights are e^{-E}, as the paper and its training loss have them; the published sampler uses e^{+E}.
The published code also mixes the candidates of different sequences when a batch holds more than one; here each
sequence chooses among its own. The default window is the one of the paper's scripts (from t = 0 to 0.6).

Who is revealed is drawn first, so a step that reveals nothing in a sequence calls neither network for it. p is the
distribution after temperature and nucleus: the one the candidates are drawn from. The weights are MDLM's and AR's;
`energy=FOLDER` names other autoregressive ones.

Reference: Xu et al., Energy-Based Diffusion Language Models for Text Generation, arXiv 2410.21357.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tsdfm_bench.api import Identity, MethodInfo, OracleSource, SampleRequest
from tsdfm_bench.errors import UsageError
from tsdfm_bench.methods.toolkit import (
    AR,
    MDLM,
    CausalDenoiser,
    Denoiser,
    DrawPolicy,
    Finaliser,
    Grid,
    Kernel,
    LogLinear,
    MaskSource,
    Posterior,
    Schedule,
    State,
    Visit,
    Walker,
    bernoulli_events,
    parse_options,
    pieces,
    plan,
    run,
    sequence_logits,
)

NU_END = 1e-5


class EnergyKernel(Kernel):
    """One step of EDLM.

    Args:
        posterior: the proposal p, its schedule and draw policy, with `mask_id`.
        energy: the autoregressive model of the energy.
        candidates: k.
        window: [begin, end) of the harness time t.
        temperature: T of the choice.
    """

    def __init__(
        self,
        posterior: Posterior,
        energy: CausalDenoiser,
        candidates: int = 2,
        window: tuple[float, float] = (0.0, 0.6),
        temperature: float = 1.0,
    ) -> None:
        self.posterior, self.energy = posterior, energy
        self.candidates, self.window, self.temperature = candidates, window, temperature
        self.policy = DrawPolicy("fp64")

    def visits(self, state: State, grid: Grid) -> Iterator[Visit]:
        """The reveals of the whole run, drawn first: they do not depend on what is revealed."""
        reveal = -torch.expm1(self.posterior.schedule.log_survival(grid.start, grid.end))
        events = bernoulli_events(state.streams, state.free, reveal, once=True)
        return plan(events, grid.start, grid.end, state.streams)

    def step(self, state: State, visit: Visit) -> None:
        """Reveal the places of the visit with the tokens of the chosen candidate."""
        begin, end = self.window
        chosen = (visit.t >= begin) & (visit.t < end) & (self.candidates > 1)
        for rows, count in ((chosen, self.candidates), (~chosen, 1)):
            part = visit.keep(rows[visit.at_rows])
            if part.rows.numel():
                x = self.propose(state, part, count)
                state.write(part.state_rows, part.at_positions, x[part.at_rows, part.at_positions])

    def propose(self, state: State, visit: Visit, count: int) -> Tensor:
        """Whole clean sequences for the rows of a visit, chosen among `count`: (rows, length) int64."""
        x_t = state.tokens[visit.rows]
        rows, positions = (x_t == self.posterior.mask_id).nonzero(as_tuple=True)
        everywhere = Visit(
            visit.rows,
            visit.index,
            visit.t,
            visit.t_next,
            rows,
            positions,
            torch.zeros_like(rows, dtype=torch.bool),
            False,
        )
        logits = self.posterior.logits(state, everywhere)
        candidates, weights = [], []
        for j in range(count):
            u = everywhere.uniform(f"candidate {j}", state.streams)
            token, log_p = self._draw(logits, u)
            x = x_t.clone()
            x[rows, positions] = token
            candidates.append(x)
            if count > 1:
                proposal = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device).index_add_(0, rows, log_p)
                minus_energy = self.log_likelihood(x) - proposal
                weights.append(minus_energy / self.temperature)
        if count == 1:
            return candidates[0]
        w = torch.softmax(torch.stack(weights, dim=1), dim=1)
        u = state.streams.uniform_at("choice", visit.index, visit.rows, torch.zeros_like(visit.rows))
        chosen = self.policy.categorical(w, u)
        return torch.stack(candidates, dim=1)[torch.arange(chosen.numel(), device=chosen.device), chosen]

    def _draw(self, logits: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and their log p, (n,) each."""
        tokens, log_p = [], []
        for s in pieces(*logits.shape, device=logits.device):
            p = self.posterior.probabilities(logits[s], no_mask=True)
            token = self.posterior.policy.categorical(p, u[s])
            tokens.append(token)
            log_p.append(p.gather(1, token[:, None])[:, 0].log())
        return torch.cat(tokens), torch.cat(log_p)

    def log_likelihood(self, x: Tensor) -> Tensor:
        """log p_AR(x), (batch,) fp64; one call of the energy's network."""
        logits = sequence_logits(self.energy, x).flatten(0, 1)
        tokens = x.flatten()
        nll = [
            F.cross_entropy(logits[s].double(), tokens[s], reduction="none")
            for s in pieces(*logits.shape, device=logits.device)
        ]
        return -torch.cat(nll).view(x.shape).sum(dim=1)


class EDLM(Walker):
    """Energy-based diffusion with an autoregressive energy.

    Args:
        denoiser: gives x0 logits, V + 1 outputs.
        energy: next-token predictions over the same V tokens.
        candidates: k >= 1.
        begin, end: window of t in which candidates are compared.
        energy_temperature: T > 0.
        schedule: kappa, default log-linear.
        device: where sampling runs.
    """

    info = MethodInfo(
        name="edlm",
        family="masked diffusion",
        sources=("mask",),
        citation="arXiv:2410.21357",
        options={
            "candidates": "sequences compared in a step, 1 or more (default 2)",
            "begin": "t from which they are compared (default 0)",
            "end": "t until which they are compared (default 0.6)",
            "energy_temperature": "divides the energy (default 1)",
            "energy": "folder of the autoregressive weights (default: those beside the denoiser's)",
        },
    )
    lender = MDLM

    def __init__(
        self,
        denoiser: Denoiser,
        energy: CausalDenoiser,
        candidates: str | int = 2,
        begin: str | float = 0.0,
        end: str | float = 0.6,
        energy_temperature: str | float = 1.0,
        schedule: Schedule | None = None,
        device: str = "cpu",
    ) -> None:
        super().__init__(denoiser, MaskSource(denoiser.vocab_size), schedule or LogLinear(), device)
        self.energy = energy
        try:
            self.candidates = int(candidates)
            self.window = float(begin), float(end)
            self.energy_temperature = float(energy_temperature)
        except ValueError as error:
            raise UsageError(f"edlm: candidates, begin, end and energy_temperature are numbers ({error})") from None
        if self.candidates < 1:
            raise UsageError(f"edlm compares 1 candidate or more, not {self.candidates}")
        if self.energy_temperature <= 0:
            raise UsageError(f"energy_temperature of edlm is above 0, not {self.energy_temperature:g}")

    @classmethod
    def load(cls, params: Mapping[str, object], device: str) -> Self:
        """Both networks, through the methods they belong to; see `tsdfm_bench.api.Method.load`."""
        options = parse_options(cls.info, params)
        options.pop("energy", None)
        proposal = MDLM.load(_of_denoiser(params), device)
        energy = AR.load(_of_energy(params), device)
        return cls(proposal.denoiser, energy.denoiser, schedule=proposal.schedule, device=device, **options)

    @classmethod
    def from_oracle(cls, oracle: OracleSource, params: Mapping[str, object], device: str) -> Self:
        """Both networks replaced by a task's exact predictions; see `tsdfm_bench.api.FromOracleHook`."""
        options = parse_options(cls.info, params)
        return cls(oracle("posterior", "mask"), oracle("causal", None), device=device, **options)

    @classmethod
    def identify(cls, params: Mapping[str, object]) -> Identity:
        """Two networks are one identity: the hash of both hashes."""
        proposal, energy = MDLM.identify(_of_denoiser(params)), AR.identify(_of_energy(params))
        digest = hashlib.sha256(f"{proposal.weights} {energy.weights}".encode()).hexdigest()
        return Identity(f"{proposal.checkpoint} + {energy.checkpoint}", f"sha256:{digest}")

    def networks(self) -> Mapping[str, nn.Module]:
        """Both are counted, each under its role."""
        return {**self.denoiser.networks(), "energy": next(iter(self.energy.networks().values()))}

    def refuse(self, request: SampleRequest) -> str | None:
        """A reason not to serve the request, or None."""
        if request.draw != "fp64":
            return (
                "edlm chooses who is revealed before the network is asked, so it cannot repeat the published fp32 race"
            )
        return super().refuse(request)

    def walk(self, state: State, request: SampleRequest) -> Tensor | None:
        """MDLM's grid and finaliser under this kernel."""
        assert request.steps is not None
        posterior = Posterior.of(request, self.denoiser, self.schedule, self.source.mask_id)
        kernel = EnergyKernel(posterior, self.energy, self.candidates, self.window, self.energy_temperature)
        trace = run(
            kernel, state, Grid.masked(request.steps, NU_END), Finaliser("argmax"), posterior, trace=request.trace
        )
        posterior.policy.check()
        return trace


def _shared(params: Mapping[str, object]) -> dict[str, object]:
    return {key: params.get(key) for key in ("task", "vocab_size", "checkpoint", "length")}


def _of_denoiser(params: Mapping[str, object]) -> dict[str, object]:
    return {**_shared(params), "source": "mask"}


def _of_energy(params: Mapping[str, object]) -> dict[str, object]:
    return {**_shared(params), "source": None, "checkpoint": params.get("energy", params.get("checkpoint"))}


METHODS = {"edlm": EDLM}  # for `--plugin tsdfm_bench_edlm.py`, without installing
