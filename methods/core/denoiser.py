"""Denoisers: what predicts the clean sequence, a network or anything that behaves like one.

A sampler asks for predictions at chosen (row, position) pairs only. The answer is one of

    x0_logits    logits of the clean-token distribution p(x_1 = y | x_t); "x0" is the masked-diffusion papers' name
    log_score    log p_t(x with y at this position) / p_t(x), the score-entropy papers' output

An autoregressive model answers another question and has its own small protocol, `CausalDenoiser`. Everything that
samples takes a denoiser, so an exact posterior (an oracle) can stand where a network stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tsdfm_bench.api import plain
from tsdfm_bench.methods.core.schedule import Schedule

Kind = Literal["x0_logits", "log_score"]
Conditioning = Literal["t", "sigma", "none"]


@dataclass(frozen=True)
class Condition:
    """What a prediction may depend on besides the tokens; every tensor has one entry per row, fp64.

    Args:
        t, t_next: (rows,) the step that is being taken.
        schedule: kappa.
        aux: the state's `aux` tensors, restricted to these rows.
    """

    t: Tensor
    t_next: Tensor
    schedule: Schedule
    aux: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def kappa(self) -> Tensor:
        """Probability that a position is clean, (rows,)."""
        return self.schedule.kappa(self.t)

    @cached_property
    def sigma(self) -> Tensor:
        """Total noise -log kappa, (rows,)."""
        return self.schedule.sigma(self.t)

    @cached_property
    def step_size(self) -> Tensor:
        """h = t_next - t, (rows,)."""
        return self.t_next - self.t


@runtime_checkable
class Denoiser(Protocol):
    """Predictions about the clean sequence.

    `vocab_size` is V, `outputs` is Vn (V, or V + 1 with the mask id V), `kind` says what the numbers are.
    """

    vocab_size: int
    outputs: int
    kind: Kind

    def predict(self, tokens: Tensor, condition: Condition, rows: Tensor, positions: Tensor) -> Tensor:
        """Predictions at n places.

        Args:
            tokens: (b, length) int64 current states; b is any subset of the batch.
            condition: b entries.
            rows, positions: (n,) int64, rows index `tokens`.

        Returns:
            (n, outputs) fp32 or fp64; each row depends on its own sequence only.
        """
        ...

    def networks(self) -> Mapping[str, nn.Module]:
        """The networks behind it, by role; empty for an oracle."""
        ...


@runtime_checkable
class CausalDenoiser(Protocol):
    """Next-token predictions. `vocab_size` is V."""

    vocab_size: int

    def begin(self, batch: int, length: int) -> Any:
        """Memory for `batch` sequences of `length` tokens, before the first token."""
        ...

    def next_logits(self, memory: Any, tokens: Tensor) -> Tensor:
        """Append tokens and predict the next one.

        Args:
            memory: from `begin`, extended in place.
            tokens: (batch, l) int64, l >= 0, what follows the tokens appended so far. The first call may be empty.

        Returns:
            (batch, vocab_size) logits of the token after the last one appended.
        """
        ...

    def networks(self) -> Mapping[str, nn.Module]:
        """The networks behind it, by role."""
        ...


class NetworkDenoiser:
    """A network of the agreed signature as a denoiser.

    Args:
        network: called as network(tokens, time[, step_size], at=(rows, positions)) -> (n, outputs) logits; with
            `heads_at` False as network(tokens, time[, step_size]) -> (b, length, outputs).
        vocab_size, outputs: V and Vn.
        kind: what its output means.
        conditioning: the scalar it is given: "t", "sigma", or "none" (a constant 0, MDLM's default).
        step_aware: give it the step size h too.
        heads_at: the network accepts `at`.
    """

    def __init__(
        self,
        network: nn.Module,
        vocab_size: int,
        outputs: int,
        kind: Kind = "x0_logits",
        conditioning: Conditioning = "t",
        step_aware: bool = False,
        heads_at: bool = True,
    ) -> None:
        self.network = network
        self.vocab_size = vocab_size
        self.outputs = outputs
        self.kind: Kind = kind
        self.conditioning = conditioning
        self.step_aware = step_aware
        self.heads_at = heads_at and not plain()

    def predict(self, tokens: Tensor, condition: Condition, rows: Tensor, positions: Tensor) -> Tensor:
        """See `Denoiser.predict`; one forward call."""
        if self.conditioning == "t":
            time = condition.t.float()
        elif self.conditioning == "sigma":
            time = condition.sigma.float()
        else:
            time = torch.zeros(tokens.shape[0], device=tokens.device)
        inputs = (tokens, time, condition.step_size.float()) if self.step_aware else (tokens, time)
        if self.heads_at:
            logits: Tensor = self.network(*inputs, at=(rows, positions))
            return logits
        everywhere: Tensor = self.network(*inputs)
        return everywhere[rows, positions]

    def networks(self) -> Mapping[str, nn.Module]:
        """One network, the denoiser."""
        return {"denoiser": self.network}


class CausalNetworkDenoiser:
    """A causal transformer with a KV cache.

    Args:
        network: has `new_cache(batch, length)` and is called as network(tokens (b, l), cache) -> (b, l, V).
        vocab_size: V.
        bos_id: id fed before the first token.
    """

    def __init__(self, network: nn.Module, vocab_size: int, bos_id: int) -> None:
        self.network = network
        self.vocab_size = vocab_size
        self.bos_id = bos_id

    def begin(self, batch: int, length: int) -> dict[str, Any]:
        """An empty cache; the token before the first is fed with the first call."""
        return {"cache": self.network.new_cache(batch, length), "batch": batch, "begun": False}  # type: ignore[operator]

    def next_logits(self, memory: dict[str, Any], tokens: Tensor) -> Tensor:
        """See `CausalDenoiser.next_logits`; one forward call."""
        if not memory["begun"]:
            memory["begun"] = True
            first = torch.full((memory["batch"], 1), self.bos_id, dtype=torch.int64, device=tokens.device)
            tokens = torch.cat([first, tokens], dim=1)
        logits: Tensor = self.network(tokens, memory["cache"])
        return logits[:, -1]

    def sequence_logits(self, tokens: Tensor) -> Tensor:
        """See the function `sequence_logits`; one forward call, without a cache."""
        first = torch.full_like(tokens[:, :1], self.bos_id)
        logits: Tensor = self.network(torch.cat([first, tokens[:, :-1]], dim=1))
        return logits

    def networks(self) -> Mapping[str, nn.Module]:
        """One network, the denoiser."""
        return {"denoiser": self.network}


def sequence_logits(denoiser: CausalDenoiser, tokens: Tensor) -> Tensor:
    """Logits of every token of whole sequences given the tokens before it.

    Args:
        denoiser: one call if it has a method `sequence_logits`, else one for each token.
        tokens: (batch, length) int64.

    Returns:
        (batch, length, vocab_size); place l belongs to token l.
    """
    whole = getattr(denoiser, "sequence_logits", None)
    if whole is not None:
        result: Tensor = whole(tokens)
        return result
    memory = denoiser.begin(*tokens.shape)
    shifted = [tokens[:, max(0, place - 1) : place] for place in range(tokens.shape[1])]
    return torch.stack([denoiser.next_logits(memory, before) for before in shifted], dim=1)
