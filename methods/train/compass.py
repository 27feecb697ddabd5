"""The energy compass is trained by generation-aware noise contrastive estimation (arXiv 2605.07924, 2410.21357).

Negatives are what the trajectory builder really produces: from x_t, the first, second or third state of a chain of
jumps of half a step h', drawn from the frozen teacher's logits. Positives are the data bridge from the same x_t:
every position that is not yet its data token takes it with probability 1 - R, where R is either that of the state's
nominal time ("nominal") or the product over the jumps the negative really made ("matched", the default: otherwise
the second state of the chain, which has jumped twice but is judged at t + h'/2, can be told apart by counting
changes).

    loss = -log sigmoid(-E(x+, s)) - log sigmoid(E(x-, s))

so that E = -log(p_bridge / p_builder) at the optimum and low energy is coherent. h' is drawn from large values: after a
small jump builder and bridge hardly differ and there is nothing to learn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tsdfm_bench.methods.train import losses
from tsdfm_bench.methods.train.data import Draws
from tsdfm_bench.methods.train.objectives import StepResult, noise
from tsdfm_bench.methods.train.shortcut import jump, log_survival_ratio, without_mask


@dataclass(frozen=True)
class Pair:
    """Positives and negatives of a batch: states (batch, length), their time (batch,) and their origin x_t."""

    positive: Tensor
    negative: Tensor
    time: Tensor
    origin: Tensor
    step_size: Tensor


@dataclass
class CompassObjective:
    """Generation-aware NCE.

    Args:
        vocab_size, outputs: V and Vn.
        frozen: the frozen DFM teacher, called as frozen(x, time).
        positives: "matched" or "nominal".
        largest, smallest: range of j in h' = 2^-j, drawn uniformly.
    """

    vocab_size: int
    outputs: int
    frozen: nn.Module
    positives: str = "matched"
    largest: int = 0
    smallest: int = 4

    @torch.no_grad()
    def pair(self, x_1: Tensor, draws: Draws) -> Pair:
        """Negatives from the builder and positives from the bridge, same x_t and same time."""
        batch, length = x_1.shape
        sizes = self.smallest - self.largest + 1
        h = 2.0 ** -(self.largest + (draws.uniform("step_size", 1)[:, 0] * sizes).floor())
        t = draws.uniform("time", 1)[:, 0] * (1 - h)
        jumps = (draws.uniform("chain", 1)[:, 0] * 3).long()  # 0, 1, 2: which midpoint is judged
        x_t = noise(x_1, t, draws, self.outputs, self.vocab_size)
        half = h / 2
        times = [t, t + half, t + half]
        arrival = [t + half, t + half, t + h]
        state, negative = x_t, x_t
        log_ratio = torch.zeros_like(t)
        for index in range(3):
            active = jumps >= index
            logits = without_mask(self.frozen(state, times[index].float()), self.vocab_size)
            state = jump(state, logits, times[index], half, draws, f"builder{index}")[0]
            negative = torch.where(active[:, None], state, negative)
            log_ratio = log_ratio + torch.where(active, log_survival_ratio(times[index], half), 0.0)
        time = torch.stack(arrival)[jumps, torch.arange(batch, device=t.device)]
        if self.positives == "nominal":
            log_ratio = log_survival_ratio(t, time - t)
        take = draws.uniform("bridge", length) < -torch.expm1(log_ratio)[:, None]
        positive = torch.where(take, x_1, x_t)
        return Pair(positive, negative, time.float(), x_t, h)

    def energies(self, network: nn.Module, pair: Pair) -> tuple[Tensor, Tensor]:
        """Sequence energies of positives and negatives, (batch,) each, in one call."""
        both = torch.cat([pair.positive, pair.negative])
        energy = network(both, pair.time.repeat(2), pair.origin.repeat(2, 1)).mean(dim=1)
        positive, negative = energy.chunk(2)
        return positive, negative

    def loss(self, network: nn.Module, x_1: Tensor, draws: Draws) -> StepResult:
        """Mean NCE loss of the batch; chance is 2 log 2 = 1.386."""
        positive, negative = self.energies(network, self.pair(x_1, draws))
        right = (positive < negative).float().mean().item()
        return StepResult(losses.nce(positive, negative).mean(), {"sign": right})

    def bound(self, network: nn.Module, x_1: Tensor, draws: Draws) -> Tensor:
        """(batch,) NCE losses of held-out windows."""
        return losses.nce(*self.energies(network, self.pair(x_1, draws)))
