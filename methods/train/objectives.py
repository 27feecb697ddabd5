"""What each network is trained to do: one class per method, a training loss and a validation number.

Every objective is a pure function of (network, windows, draws). Validation numbers are nats per token on held-out
windows: exact for AR, upper bounds for the others, all at stratified times, so that they can be compared within a
family.

t = 0 is noise, t = 1 is data. Flow matching uses kappa(t) = t, g(t) = 1 / (1 - t). MDLM and SEDD use the log-linear
schedule kappa(t) = 1 - (1 - eps)(1 - t), for which sigma = -log kappa, sigma' = (1 - eps) / kappa and again
g = sigma' / (e^sigma - 1) = 1 / (1 - t).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tsdfm_bench.errors import UsageError
from tsdfm_bench.methods.train import losses
from tsdfm_bench.methods.train.data import Draws, TrainingText

TIME_EPS = 1e-3
LOSSES = ("cross_entropy", "generalised_kl")
PARAMETERISATIONS = ("score", "posterior")


@dataclass
class StepResult:
    """Loss of one step (a scalar with gradient) and numbers worth showing."""

    loss: Tensor
    shown: dict[str, float]


class Objective(Protocol):
    """A loss and a validation number."""

    def loss(self, network: nn.Module, x_1: Tensor, draws: Draws) -> StepResult:
        """Training loss of windows x_1 (batch, length)."""
        ...

    def bound(self, network: nn.Module, x_1: Tensor, draws: Draws) -> Tensor:
        """(batch,) nats per token of held-out windows: exact NLL or an unbiased estimate of an upper bound."""
        ...


def noise(x_1: Tensor, kappa: Tensor, draws: Draws, outputs: int, vocab_size: int, site: str = "x_0") -> Tensor:
    """x_t of the mixture path: each position keeps x_0 with probability 1 - kappa.

    Args:
        x_1: (batch, length) clean tokens.
        kappa: (batch,) fp64.
        outputs: V for the uniform source, V + 1 for the mask source (x_0 = mask id V).

    Returns:
        (batch, length) int64.
    """
    length = x_1.shape[1]
    noised = draws.uniform("corrupt", length) < (1 - kappa)[:, None]
    if outputs > vocab_size:
        x_0 = torch.full_like(x_1, vocab_size)
    else:
        x_0 = (draws.uniform(site, length) * vocab_size).long()
    return torch.where(noised, x_0, x_1)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{name} '{value}' is not one of {', '.join(known)}")


@dataclass(frozen=True)
class ARObjective:
    """Exact next-token NLL; the end-of-text id stands before the first token."""

    vocab_size: int
    bos_id: int = 0

    def nll(self, network: nn.Module, x_1: Tensor) -> Tensor:
        """(batch, length) NLL of every token in nats."""
        inputs = torch.cat([torch.full_like(x_1[:, :1], self.bos_id), x_1[:, :-1]], dim=1)
        return F.cross_entropy(network(inputs).flatten(0, 1), x_1.flatten(), reduction="none").view(x_1.shape)

    def loss(self, network: nn.Module, x_1: Tensor, draws: Draws) -> StepResult:
        """Mean NLL over all tokens."""
        value = self.nll(network, x_1).mean()
        return StepResult(value, {})

    def bound(self, network: nn.Module, x_1: Tensor, draws: Draws) -> Tensor:
        """(batch,) exact NLL per token."""
        return self.nll(network, x_1).mean(dim=1)


@dataclass(frozen=True)
class MDLMObjective:
    """Masked NELBO with SUBS; the network sees time 0 always (time conditioning off, the published default)."""

    vocab_size: int

    def _per_token(self, network: nn.Module, x_1: Tensor, draws: Draws) -> Tensor:
        # spec: nu = (1 - eps) u + eps; move(nu) = (1 - 1e-3) nu
        nu = (1 - TIME_EPS) * draws.stratified("time") + TIME_EPS
        x_t = noise(x_1, 1 - (1 - TIME_EPS) * nu, draws, self.vocab_size + 1, self.vocab_size)
        rows, positions = (x_t == self.vocab_size).nonzero(as_tuple=True)
        logits = network(x_t, torch.zeros_like(nu, dtype=torch.float32), at=(rows, positions))
        values = losses.masked_nelbo_at(logits, x_1, (1 / nu).float(), rows, positions, self.vocab_size)
        return losses.scatter_loss(x_t.shape, rows, positions, values)

    def loss(self, network: nn.Module, x_1: Tensor, draws: Draws) -> StepResult:
        """Mean over all tokens of the batch."""
        return StepResult(self._per_token(network, x_1, draws).mean(), {})

    def bound(self, network: nn.Module, x_1: Tensor, draws: Draws) -> Tensor:
        """(batch,) NELBO estimates per token, one time per window."""
        return self._per_token(network, x_1, draws).mean(dim=1)


@dataclass(frozen=True)
class SEDDObjective:
    """Denoising score entropy, absorbing or uniform graph, log-linear noise, conditioned on sigma.

    Args:
        vocab_size: V.
        outputs: V + 1 (absorb) or V (uniform).
        parameterisation: "score", the network's output is the log score (absorb: scaled by sigma, as published), or
            "posterior", the output is clean-token logits turned into the score they imply (uniform only).
    """

    vocab_size: int
    outputs: int
    parameterisation: str = "score"

    def __post_init__(self) -> None:
        _one_of("parameterisation", self.parameterisation, PARAMETERISATIONS)

    def _per_token(self, network: nn.Module, x_1: Tensor, draws: Draws) -> Tensor:
        nu = (1 - TIME_EPS) * draws.stratified("time") + TIME_EPS
        kappa = 1 - (1 - TIME_EPS) * nu
        sigma, rate = -kappa.log().float(), ((1 - TIME_EPS) / kappa).float()
        x_t = noise(x_1, kappa, draws, self.outputs, self.vocab_size)
        if self.outputs == self.vocab_size:
            log_score = network(x_t, sigma)
            if self.parameterisation == "posterior":
                log_score = uniform_log_score(log_score, x_t, kappa.float())
            return losses.score_entropy_uniform(log_score, x_1, x_t, kappa.float(), rate)
        rows, positions = (x_t == self.vocab_size).nonzero(as_tuple=True)
        raw = network(x_t, sigma, at=(rows, positions))[:, : self.vocab_size]
        scale = torch.expm1(sigma).log() + math.log(self.outputs - 1)
        values = losses.score_entropy_absorb(raw - scale[rows, None], x_1[rows, positions], sigma[rows], rate[rows])
        return losses.scatter_loss(x_t.shape, rows, positions, values)

    def loss(self, network: nn.Module, x_1: Tensor, draws: Draws) -> StepResult:
        """Mean over all tokens of the batch."""
        return StepResult(self._per_token(network, x_1, draws).mean(), {})

    def bound(self, network: nn.Module, x_1: Tensor, draws: Draws) -> Tensor:
        """(batch,) bound estimates per token, one time per window."""
        return self._per_token(network, x_1, draws).mean(dim=1)


def uniform_log_score(logits: Tensor, x_t: Tensor, alpha: Tensor) -> Tensor:
    """Log score of the uniform graph implied by clean-token logits.

        s(y) = log sum_{x_1} p(x_1) q(y | x_1) / q(x_t | x_1)
             = log [ 1 - p(x_t) - p(y) + p(x_t) a + p(y) b ],   y != x_t,
        a = ((1 - alpha) / V) / (alpha + (1 - alpha) / V),   b = 1 / a,

    Args:
        logits: (batch, length, V).
        x_t: (batch, length) int64.
        alpha: (batch,) probability that a position is clean.

    Returns:
        (batch, length, V) fp32, own-token entry 0.
    """
    floor = (1 - alpha) / logits.shape[-1]
    a = (floor / (alpha + floor))[:, None, None]
    p = torch.softmax(logits.float(), dim=-1)
    own = p.gather(-1, x_t[..., None])
    # 1 - p(x_t) - p(y) + p(x_t) a + p(y) / a, written so that nothing cancels
    score = (1 - own).clamp_min(0) + own * a + p * (1 / a - 1)
    return score.clamp_min(1e-30).log().scatter(-1, x_t[..., None], 0.0)


@dataclass(frozen=True)
class DFMObjective:
    """Discrete flow matching: cross entropy (default) or generalised KL on the mixture path kappa(t) = t."""

    vocab_size: int
    outputs: int
    loss_name: str = "cross_entropy"

    def __post_init__(self) -> None:
        _one_of("loss_name", self.loss_name, LOSSES)

    def loss(self, network: nn.Module, x_1: Tensor, draws: Draws) -> StepResult:
        """Cross entropy over all positions (t in [0, 1]), or generalised KL (t in [0, 1 - 1e-3])."""
        if self.loss_name == "generalised_kl":
            return StepResult(self._per_token(network, x_1, draws).mean(), {})
        t = draws.stratified("time")
        x_t = noise(x_1, t, draws, self.outputs, self.vocab_size)
        return StepResult(losses.cross_entropy(network(x_t, t.float()), x_1), {})

    def _per_token(self, network: nn.Module, x_1: Tensor, draws: Draws) -> Tensor:
        t = draws.stratified("time") * (1 - TIME_EPS)
        x_t = noise(x_1, t, draws, self.outputs, self.vocab_size)
        return losses.generalised_kl(network(x_t, t.float()), x_1, x_t, (1 / (1 - t)).float())

    def bound(self, network: nn.Module, x_1: Tensor, draws: Draws) -> Tensor:
        """(batch,) ELBO estimates per token: generalised KL at one stratified time per window."""
        return self._per_token(network, x_1, draws).mean(dim=1)


@torch.inference_mode()
def validate(
    objective: Objective, network: nn.Module, text: TrainingText, windows: int = 512, batch: int = 64, at_once: int = 0
) -> tuple[float, float]:
    """Mean and standard error of `objective.bound` over held-out windows (fixed windows, times and noise).

    Args:
        objective, network, text: what is validated, and on which text.
        windows, batch: how many, and in batches of how many they are drawn.
        at_once: windows of one pass, for what does not fit into memory; 0 = a batch. Up to rounding the same result.
    """
    was_training = network.training
    network.eval()
    device = next(network.parameters()).device
    values = []
    for index in range(windows // batch):
        for first in range(0, batch, at_once or batch):
            draws = Draws(0, "validation", index, min(at_once or batch, batch - first), device, first, batch)
            values.append(objective.bound(network, text.windows("validation", draws), draws).double())
    network.train(was_training)
    joined = torch.cat(values)
    return joined.mean().item(), (joined.std() / math.sqrt(joined.numel())).item()
