"""A law in the place of a network: the exact predictions that `--checkpoint oracle` hands to samplers.

`OracleDenoiser` and `OracleCausal` follow the protocols of `methods.core` (Denoiser, CausalDenoiser) without importing
them. The computation sits in the forward of a module without parameters, so the harness counts an oracle's calls as it
counts a network's. What a prediction means is in `law`: clean-token log probabilities ("posterior") or log scores
log p_t(x with y here) / p_t(x) ("score"), for mask and uniform noise at any time; a step size plays no role.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tsdfm_bench.api import OracleForm
from tsdfm_bench.errors import UsageError, unknown_name
from tsdfm_bench.tasks.synthetic.law import Evidence, Law

FORMS: tuple[OracleForm, ...] = ("posterior", "score", "causal", "energy")
SOURCES = ("mask", "uniform")


class PosteriorModule(nn.Module):
    """Exact predictions at places of noised sequences.

    Args:
        law: of the clean sequences.
        masked: mask noise, else uniform.
        score: log scores instead of log probabilities.
    """

    def __init__(self, law: Law, masked: bool, score: bool) -> None:
        super().__init__()
        self.law, self.masked, self.score = law, masked, score

    def forward(self, tokens: Tensor, kappa: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """(b, length), (b,), (n,), (n,) -> (n, outputs) fp64, on the CPU."""
        size = self.law.vocab_size
        evidence = Evidence.masked(tokens, size) if self.masked else Evidence.uniform(tokens, kappa, size)
        if not self.score:
            p = self.law.posterior(evidence, rows, positions).log_()
            return torch.cat([p, p.new_full((len(p), 1), -torch.inf)], dim=1) if self.masked else p
        kept = kappa.double()[rows, None]
        seen = self.law.cavity(evidence, rows, positions) * kept
        noise = 1 - kept
        seen = torch.cat([seen, noise], dim=1) if self.masked else seen + noise / size
        seen = seen.log_()
        return seen - seen.gather(1, tokens[rows, positions, None])


class OracleDenoiser:
    """The exact posterior, or the exact score, as a denoiser.

    Args:
        law: of the clean sequences.
        source: "mask" or "uniform".
        form: "posterior" or "score".
    """

    def __init__(self, law: Law, source: str, form: Literal["posterior", "score"] = "posterior") -> None:
        self.vocab_size = law.vocab_size
        self.outputs = law.vocab_size + (source == "mask")
        self.kind: Literal["x0_logits", "log_score"] = "x0_logits" if form == "posterior" else "log_score"
        self.module = PosteriorModule(law, source == "mask", form == "score")

    def predict(self, tokens: Tensor, condition: Any, rows: Tensor, positions: Tensor) -> Tensor:
        """Predictions at n places; see `methods.core.denoiser.Denoiser.predict`. `condition.kappa` is all it reads."""
        inputs = (x.cpu() for x in (tokens, condition.kappa, rows, positions))
        predicted: Tensor = self.module(*inputs)
        return predicted.to(tokens.device)

    def networks(self) -> Mapping[str, nn.Module]:
        """The oracle, counted as the denoiser."""
        return {"denoiser": self.module}


class NextModule(nn.Module):
    """The exact law of the next token."""

    def __init__(self, law: Law) -> None:
        super().__init__()
        self.law = law

    def forward(self, tokens: Tensor, memory: dict[str, Any]) -> Tensor:
        """(b, l) and the memory -> (b, V) fp64 log probabilities."""
        return self.law.advance(memory, tokens).log()


class OracleCausal:
    """The exact next-token law as a causal denoiser; see `methods.core.denoiser.CausalDenoiser`."""

    def __init__(self, law: Law) -> None:
        self.vocab_size = law.vocab_size
        self.module = NextModule(law)

    def begin(self, batch: int, length: int) -> dict[str, Any]:
        """Memory before the first token."""
        return self.module.law.begin(batch, length)

    def next_logits(self, memory: dict[str, Any], tokens: Tensor) -> Tensor:
        """Append tokens (b, l); log law of the next one, (b, V)."""
        predicted: Tensor = self.module(tokens.cpu(), memory)
        return predicted.to(tokens.device)

    def networks(self) -> Mapping[str, nn.Module]:
        """The oracle, counted as the denoiser."""
        return {"denoiser": self.module}


class OracleEnergy(nn.Module):
    """The exact NLL of noised states in the place of an energy compass (TS-DFM's upper bound, arXiv 2605.07924).

    E(x, t) = -log p_t(x) / length, the mean of the token energies -log p_t(x_i | x_1 .. x_{i-1}), kappa(t) = t.

    Args:
        law: of the clean sequences.
        source: "mask" or "uniform".
    """

    def __init__(self, law: Law, source: str) -> None:
        super().__init__()
        self.law, self.masked = law, source == "mask"

    def forward(self, tokens: Tensor, time: Tensor, origin: Tensor | None = None) -> Tensor:
        """(b, length) states at times (b,) -> (b, length) fp32 token energies; `origin` plays no role."""
        size, kappa = self.law.vocab_size, time.double().cpu()
        if self.masked:  # a mask is seen with probability 1 - kappa whatever is under it, a token with kappa
            known = tokens.cpu() < size
            chance = torch.where(known, kappa[:, None], 1 - kappa[:, None]).clamp_min(1e-300)
            energy = self.law.surprise(Evidence.masked(tokens.cpu(), size)) - chance.log()
        else:
            energy = self.law.surprise(Evidence.uniform(tokens.cpu(), kappa, size))
        return energy.float().to(tokens.device)


def make_oracle(law: Law, form: OracleForm, source: str | None) -> OracleDenoiser | OracleCausal | OracleEnergy:
    """The oracle of a form; raises UsageError for a form or source there is none for."""
    if form not in FORMS:
        raise unknown_name("form of an oracle", form, FORMS)
    if form == "causal":
        return OracleCausal(law)
    if source not in SOURCES:
        raise UsageError(f"the oracle knows the sources {' and '.join(SOURCES)}, not '{source}'")
    return OracleEnergy(law, source) if form == "energy" else OracleDenoiser(law, source, form)
