"""DUO: diffusion over plain tokens with a uniform prior, sampled by its posterior, with an optional greedy tail.

With a = kappa(t), b = kappa(t + h), r = a / b and the prediction p, a position that holds i is drawn, independently of
the others, from

    q(y) = [ (b - a) p(y) + (1 - r)(1 - b) / V + 1[y = i] (a V p(i) + r - a) ] / Z,      Z = a V p(i) + 1 - a

Any token may change at any time. The first two terms do not look at i: they are a re-draw, from p or from the uniform
law, of total weight c = (b - a) + (1 - r)(1 - b). As Z >= 1 - a, a position is re-drawn with probability at most
c / (1 - a), whatever the network says. So candidates are drawn with that probability before the network is called, a
candidate is accepted with (1 - a) / Z, and takes its token from p with (b - a) / c, else from the uniform law: exactly
q. Steps in which a sequence has no candidate need no call.

What p is. q is the reverse of the noising process if p is the law of the clean token given the OTHER tokens: then
a V p + 1 - a is in proportion to the noised marginal, and its ratios are the score. That is what DUO's loss trains.
DFM's network gives the law f of the clean token given all of x_t, the token i at the position itself included, so its
likelihood a 1[y = i] + (1 - a) / V is divided out:

    p(i) proportional to f(i) (1 - a) / (1 - a + a V),      p(y) proportional to f(y)   (y != i)

(f put into q as it is counts the evidence of i twice: the sampler then does not approach the law of its denoiser.)
Published weights of DUO (`--checkpoint hf:s-sahoo/duo`) are p already, and are told the noise sigma = -log kappa(t).

The grid is t = linspace(0, 1 - 1e-5, N + 1). What follows it:

    ancestral    one more step with b = 1 (default)
    greedy       every position becomes the most likely clean token, argmax f: the paper's greedy tail
    none         nothing

Temperature and nucleus act on p. The weights are DFM's for the uniform source: a clean-token denoiser of the same
noising process with kappa(t) = t. Published weights have the log-linear schedule and a pad token, which is sampled.

Reference: Sahoo et al., The Diffusion Duality, arXiv 2506.10892.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from tsdfm_bench.api import MethodInfo, SampleRequest
from tsdfm_bench.methods.toolkit import (
    DFM,
    Denoiser,
    Diffusion,
    Grid,
    Kernel,
    NetworkDenoiser,
    Polynomial,
    Posterior,
    Schedule,
    State,
    UniformSource,
    Visit,
    bernoulli_events,
    one_of,
    pieces,
    plan,
    run,
    schedule_of,
)

TAILS = ("ancestral", "greedy", "none")
NU_END = 1e-5


class UniformPosteriorKernel(Kernel):
    """One step of DUO, and its tail.

    Args:
        posterior: f, its schedule and draw policy; temperature and nucleus act on p.
        tail: "ancestral", "greedy" or "none".
        evidence: the denoiser looks at the token itself (f above); False if it gives p.
    """

    def __init__(self, posterior: Posterior, tail: str = "ancestral", evidence: bool = True) -> None:
        self.posterior, self.tail, self.evidence = posterior, tail, evidence
        self.vocab_size = posterior.denoiser.vocab_size

    def weights(self, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """a, b - a and (1 - r)(1 - b), fp64, of any shape."""
        schedule = self.posterior.schedule
        a, b = schedule.kappa(t), schedule.kappa(t_next)
        return a, b - a, (1 - a / b) * schedule.noise(t_next)

    def most_redrawn(self, t: Tensor, t_next: Tensor) -> Tensor:
        """c / (1 - a), the probability of a re-draw if p(i) = 0."""
        _, from_p, from_uniform = self.weights(t, t_next)
        return ((from_p + from_uniform) / self.posterior.schedule.noise(t)).clamp(0.0, 1.0)

    def visits(self, state: State, grid: Grid) -> Iterator[Visit]:
        """Candidates of all steps, drawn first; in a greedy tail everything is one."""
        start, end = grid.start, grid.end
        if self.tail != "none":
            start, end = torch.cat([start, end[-1:]]), torch.cat([end, end.new_ones(1)])
        probability = self.most_redrawn(start, end)
        if self.tail == "greedy":
            probability[-1] = 1.0
        events = bernoulli_events(state.streams, state.free, probability)
        return plan(events, start, end, state.streams, ("accept", "kind", "token"))

    def recorded_steps(self, state: State, grid: Grid) -> int:
        """The grid's steps and the tail."""
        return len(grid) + (self.tail != "none")

    def step(self, state: State, visit: Visit) -> None:
        """Re-draw the candidates that are accepted."""
        rows, positions = visit.state_rows, visit.at_positions
        logits = self.posterior.logits(state, visit)
        z = state.tokens[rows, positions]
        u_accept, u_kind, u_token = (visit.uniform(site, state.streams) for site in ("accept", "kind", "token"))
        a, from_p, from_uniform = self.weights(visit.t[visit.at_rows], visit.t_next[visit.at_rows])
        greedy = visit.last if self.tail == "greedy" else torch.zeros_like(visit.last)
        # the token's own evidence is divided out of the logits: (1 - a) / (1 - a + a V)
        evidence = -torch.log1p(a * self.vocab_size / self.posterior.schedule.noise(visit.t[visit.at_rows]))
        if not self.evidence:
            evidence = torch.zeros_like(evidence)
        for s in pieces(*logits.shape, device=logits.device):
            best = logits[s].argmax(dim=-1)
            p = self.posterior.probabilities(logits[s].double().scatter_add(1, z[s, None], evidence[s, None]))
            own = p.gather(1, z[s, None])[:, 0]
            accepted = u_accept[s] < (1 - a[s]) / (a[s] * self.vocab_size * own + 1 - a[s])
            uniform = UniformSource(self.vocab_size).tokens(u_token[s])
            drawn = self.posterior.policy.categorical(p, u_token[s])
            token = torch.where(u_kind[s] < from_p[s] / (from_p[s] + from_uniform[s]), drawn, uniform)
            token = torch.where(accepted, token, z[s])
            state.write(rows[s], positions[s], torch.where(greedy[s], best, token))


class DUO(Diffusion):
    """Uniform-state diffusion.

    Args:
        denoiser: gives x0 logits, V outputs.
        tail: "ancestral", "greedy" or "none".
        schedule: kappa, default kappa(t) = t.
        device: where sampling runs.
        evidence: as in `UniformPosteriorKernel`.
    """

    info = MethodInfo(
        name="duo",
        family="uniform diffusion",
        sources=("uniform",),
        citation="arXiv:2506.10892",
        options={"tail": TAILS},
    )
    lender = DFM

    def __init__(
        self,
        denoiser: Denoiser,
        tail: str = "ancestral",
        schedule: Schedule | None = None,
        device: str = "cpu",
        evidence: bool = True,
    ) -> None:
        super().__init__(denoiser, UniformSource(denoiser.vocab_size), schedule or Polynomial(), device)
        self.tail = one_of(self.info, "tail", tail)
        self.evidence = evidence

    @classmethod
    def from_network(
        cls,
        network: nn.Module,
        config: Mapping[str, Any],
        source: str | None,
        device: str,
        options: Mapping[str, str],
    ) -> Self:
        """Around the network of a DFM checkpoint, or of a published one of DUO."""
        geometry = config["network"]
        own = config.get("published") == "duo"
        denoiser = NetworkDenoiser(
            network, geometry["vocab_size"], geometry["outputs"], conditioning="sigma" if own else "t"
        )
        return cls(denoiser, schedule=schedule_of(config, Polynomial()), device=device, evidence=not own, **options)

    def refuse(self, request: SampleRequest) -> str | None:
        """A reason not to serve the request, or None."""
        if request.draw != "fp64":
            return "duo chooses who moves before the network is asked, so it cannot repeat the published fp32 race"
        return super().refuse(request)

    def walk(self, state: State, request: SampleRequest) -> Tensor | None:
        """The grid and its tail."""
        assert request.steps is not None
        posterior = Posterior.of(request, self.denoiser, self.schedule)
        kernel = UniformPosteriorKernel(posterior, self.tail, self.evidence)
        trace = run(kernel, state, Grid.masked(request.steps, NU_END), trace=request.trace)
        posterior.policy.check()
        return trace


METHODS = {"duo": DUO}  # for `--plugin tsdfm_bench_duo.py`, without installing
