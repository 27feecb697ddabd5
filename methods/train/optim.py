"""Optimiser and learning-rate schedule of the recipes.

`adamw` is the published choice. `muon` orthogonalises the momentum of the hidden matrices (Jordan et al., 2024; update
scaled to AdamW's RMS as in arXiv 2502.16982) and leaves every other parameter to AdamW; on small networks it
reaches the same loss in about half the tokens (methods/train/LOG.md has the measurement). torch's own Muon does its
Newton-Schulz iteration in bfloat16, which CPUs without bfloat16 instructions emulate several times slower than the
whole training step, so the iteration is done in fp32 here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tsdfm_bench.errors import UsageError

OPTIMIZERS = ("adamw", "muon")
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Newton-Schulz approximation of U V^T of a (rows, columns) matrix, fp32."""
    a, b, c = _COEFFICIENTS
    x = matrix.float()
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for two-dimensional parameters.

    Args:
        params: parameters of dimension 2.
        lr: learning rate, on AdamW's scale.
        momentum: Nesterov momentum.
        weight_decay: decoupled.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                buffer = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalise(parameter.grad.lerp(buffer, group["momentum"]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))


def make_optimizers(
    network: nn.Module,
    name: str,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    embedding_lr: float = 1.0,
) -> list[torch.optim.Optimizer]:
    """The optimisers of a recipe: AdamW for all, or Muon on the matrices of the blocks and AdamW for the rest.

    Args:
        network: one of `methods.nets`.
        name: "adamw" or "muon".
        lr: peak learning rate.
        betas, weight_decay: of AdamW; Muon shares the decay.
        embedding_lr: factor on the learning rate of the token embedding.
    """
    if name not in OPTIMIZERS:
        raise UsageError(f"optimizer '{name}' is not one of {', '.join(OPTIMIZERS)}")
    hidden, embedding, rest = [], [], []
    for key, parameter in network.named_parameters():
        if key.startswith("embedding."):
            embedding.append(parameter)
        elif name == "muon" and key.startswith("blocks.") and parameter.ndim == 2 and ".adaln." not in key:
            hidden.append(parameter)
        else:
            rest.append(parameter)
    groups = [{"params": embedding, "lr": lr * embedding_lr}, {"params": rest, "lr": lr}]
    adamw = torch.optim.AdamW(groups, lr, betas=betas, weight_decay=weight_decay)
    return [adamw, Muon(hidden, lr, weight_decay=weight_decay)] if hidden else [adamw]


def learning_rate(step: int, total: int, warmup: int, peak: float, final: float = 0.1) -> float:
    """Linear warm-up, then cosine to `final` times the peak; `step` counts from 1."""
    if step < warmup:
        return peak * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))
