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

A pair is one bit for a whole sequence. With `level = "token"` (an addition of this project) the same contrast is made
at every position that changed since x_t: its token energy e_i must tell whether the token came from the bridge or from
the builder, given the rest of the state, which is some dozens of bits a pair. E is then the mean log odds of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tsdfm_bench.errors import UsageError
from tsdfm_bench.methods.train import losses
from tsdfm_bench.methods.train.data import Draws
from tsdfm_bench.methods.train.objectives import StepResult, noise
from tsdfm_bench.methods.train.shortcut import jump, log_survival_ratio, without_mask

POSITIVES = ("matched", "nominal")
LEVELS = ("sequence", "token")


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
        builder: whose jumps are the negatives: the frozen DFM teacher, called as builder(x, time), or a student (the
            "refresh" of the compass), called as builder(x, time, h'/2).
        step_aware: the builder is a student.
        positives: "matched" or "nominal".
        level: "sequence" (one contrast a pair) or "token" (one a changed position).
        largest, smallest: range of j in h' = 2^-j, drawn uniformly.
    """

    vocab_size: int
    outputs: int
    builder: nn.Module
    step_aware: bool = False
    positives: str = "matched"
    level: str = "sequence"
    largest: int = 0
    smallest: int = 4

    def __post_init__(self) -> None:
        for name, value, known in (("positives", self.positives, POSITIVES), ("level", self.level, LEVELS)):
            if value not in known:
                raise UsageError(f"compass: {name} '{value}' is not one of {', '.join(known)}")

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
        negative, log_ratio = x_t.clone(), torch.zeros_like(t)
        for index in range(3):
            rows = (jumps >= index).nonzero().squeeze(1)  # the others have arrived: no call is spent on them
            if rows.numel() == 0:
                break
            state, begin = negative[rows], times[index][rows]
            step = (half[rows].float(),) if self.step_aware else ()
            logits = without_mask(self.builder(state, begin.float(), *step), self.vocab_size)
            part = draws.rows(rows)
            negative[rows] = jump(state, logits, begin, half[rows], part, f"builder{index}")[0]
            log_ratio[rows] += log_survival_ratio(begin, half[rows])
        time = torch.stack(arrival)[jumps, torch.arange(batch, device=t.device)]
        if self.positives == "nominal":
            log_ratio = log_survival_ratio(t, time - t)
        take = draws.uniform("bridge", length) < -torch.expm1(log_ratio)[:, None]
        positive = torch.where(take, x_1, x_t)
        return Pair(positive, negative, time.float(), x_t, h)

    def energies(self, network: nn.Module, pair: Pair) -> tuple[Tensor, Tensor]:
        """Token energies of positives and negatives, (batch, length) each, in one call."""
        both = torch.cat([pair.positive, pair.negative])
        positive, negative = network(both, pair.time.repeat(2), pair.origin.repeat(2, 1)).chunk(2)
        return positive, negative

    def _per_pair(self, network: nn.Module, pair: Pair) -> tuple[Tensor, Tensor]:
        """NCE losses, and whether the positive has the lower energy, (batch,) each."""
        positive, negative = self.energies(network, pair)
        right = positive.mean(dim=1) < negative.mean(dim=1)
        if self.level == "sequence":
            return losses.nce(positive.mean(dim=1), negative.mean(dim=1)), right
        real, made = pair.positive != pair.origin, pair.negative != pair.origin
        value = F.softplus(positive) * real / real.sum().clamp_min(1) + F.softplus(
            -negative
        ) * made / made.sum().clamp_min(1)
        return value.sum(dim=1) * real.shape[0], right

    def loss(self, network: nn.Module, x_1: Tensor, draws: Draws) -> StepResult:
        """Mean NCE loss of the batch; chance is 2 log 2 = 1.386."""
        value, right = self._per_pair(network, self.pair(x_1, draws))
        return StepResult(value.mean(), {"sign": right.float().mean().item()})

    def bound(self, network: nn.Module, x_1: Tensor, draws: Draws) -> Tensor:
        """(batch,) NCE losses of held-out windows."""
        return self._per_pair(network, self.pair(x_1, draws))[0]
