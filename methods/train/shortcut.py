"""FS-DFM: a student conditioned on the step size, taught by shortcut targets (arXiv 2509.20624, Algorithm 1, eq. 4.5).

For rows with h >= h_small a chain of three jumps of half the step, drawn from the semi-teacher's own logits, gives four
sets of logits; their weighted mean is the target. With h2 = h / 2, t_mid = t + h2, t_next = t + h:

    l1 = teacher(x_t, t, h2)        xa = Jump(x_t, l1, t, h2)
    l2 = teacher(xa, t_mid, h2)     xb = Jump(xa, l2, t_mid, h2)
    l3 = teacher(xb, t_mid, h2)     xc = Jump(xb, l3, t_mid, h2)
    l4 = teacher(xc, t_next, h2)    target = (l1 + 2 l2 + 2 l3 + l4) / 6             "rk4"
                                    target = (l1 + l2) / 2                            "heun"

and the student minimises KL(softmax(target) || softmax(student(x_t, t, h))). Rows with h < h_small learn from data
(path loss) or from the frozen teacher. `Jump` is one cumulative step: a position leaves z with probability 1 - R^(1
- p(z)), R = (1 - kappa(t + h)) / (1 - kappa(t)), and goes to y != z with probability proportional to p(y). The
jumps are the only random decisions of the target; TS-DFM replaces the blind choice among them (`shaping`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from tsdfm_bench.errors import UsageError
from tsdfm_bench.methods.train import losses
from tsdfm_bench.methods.train.data import Draws
from tsdfm_bench.methods.train.objectives import DFMObjective, StepResult, noise

H_SMALL = 1 / 513
GRID = 1024
HALVINGS = 10
OPTIONS = {
    "rule": ("rk4", "heun"),
    "h_law": ("uniform", "inverse_h"),
    "small_h_target": ("kl_frozen_teacher", "path_loss"),
    "path_weight": ("g", "gbar"),
    "semi_teacher": ("ema", "live"),
}
"""Options of the objective and their values."""


def log_survival_ratio(t: Tensor, h: Tensor) -> Tensor:
    """log R of the linear schedule, both ends clamped to [1e-8, 1] as in the released code, (batch,) fp64."""
    before = (1 - t.double()).clamp(1e-8, 1)
    after = (1 - t.double() - h.double()).clamp(1e-8, 1)
    return after.log() - before.log()


def jump(
    x: Tensor,
    logits: Tensor,
    t: Tensor,
    h: Tensor,
    draws: Draws,
    site: str,
    candidates: int = 1,
    several: Tensor | None = None,
) -> Tensor:
    """Independent cumulative steps from the same logits: one softmax and one cumulative sum, whatever K is.

    Args:
        x: (batch, length) int64.
        logits: (batch, length, outputs) fp32; the mask id, if there is one, must already be excluded.
        t, h: (batch,).
        draws, site: where the uniforms come from; candidate k uses the sites "<site>/<k>/...", so
            candidate 0 is the same whatever `candidates` is.
        candidates: K.
        several: (batch,) bool, rows that need more than candidate 0; the others have x in its place. None = all.

    Returns:
        (K, batch, length) int64; an entry of weight 0 is never drawn.

    Raises:
        FloatingPointError: a NaN or an infinity among the logits.
    """
    p = torch.softmax(logits, dim=-1)
    stay = p.gather(-1, x[..., None]).squeeze(-1).double()
    if not torch.isfinite(stay.sum()):
        bad = (~torch.isfinite(stay)).any(dim=1)
        raise FloatingPointError(f"the logits that '{site}' is drawn from are not finite in {draws.describe(bad)}")
    leave = -torch.expm1(log_survival_ratio(t, h)[:, None] * (1 - stay))
    moved = torch.stack([draws.uniform(f"{site}/{k}/leave", x.shape[1]) < leave for k in range(candidates)])
    if several is not None:
        moved[1:] &= several[:, None]
    rows, positions = moved.any(dim=0).nonzero(as_tuple=True)
    result = x.expand(candidates, *x.shape).clone()
    if rows.numel() == 0:
        return result
    weights = p[rows, positions].scatter_(-1, x[rows, positions][:, None], 0.0)
    cdf = weights.cumsum(dim=-1)
    levels = torch.stack([draws.at(f"{site}/{k}/token", rows, positions) for k in range(candidates)], dim=1)
    total = cdf[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # rounding may put a level at the total or above
    tokens = torch.searchsorted(cdf, torch.minimum(levels.to(cdf.dtype) * total, below), right=True)
    tokens.clamp_max_(p.shape[-1] - 1)
    at = (slice(None), rows, positions)
    result[at] = torch.where(moved[at], tokens.T, result[at])
    return result


class Chooser(Protocol):
    """Picks one state per row among candidates; the blind choice is candidate 0."""

    candidates: int

    def gate(self, row_time: Tensor, state_time: Tensor) -> Tensor:
        """(rows,) bool, rows that are chosen for at all: the others keep candidate 0."""
        ...

    def __call__(
        self, states: Tensor, origin: Tensor, row_time: Tensor, state_time: Tensor, index: int, draws: Draws
    ) -> Tensor:
        """(K, rows, length) candidates at `state_time` (rows,) -> (rows, length); `index` is the jump's place."""
        ...


class BlindChooser:
    """FS-DFM: the first and only draw."""

    candidates = 1

    def gate(self, row_time: Tensor, state_time: Tensor) -> Tensor:
        """None."""
        return torch.zeros_like(row_time, dtype=torch.bool)

    def __call__(
        self, states: Tensor, origin: Tensor, row_time: Tensor, state_time: Tensor, index: int, draws: Draws
    ) -> Tensor:
        """Candidate 0."""
        return states[0]


def without_mask(logits: Tensor, vocab_size: int) -> Tensor:
    """Logits with the mask id (if the network has one) excluded."""
    if logits.shape[-1] == vocab_size:
        return logits
    blocked = torch.zeros(logits.shape[-1], device=logits.device)
    blocked[vocab_size] = float("-inf")
    return logits + blocked


@torch.no_grad()
def shortcut_target(
    teacher: nn.Module,
    x_t: Tensor,
    t: Tensor,
    h: Tensor,
    draws: Draws,
    vocab_size: int,
    rule: str,
    choose: Chooser,
) -> Tensor:
    """Target logits of the shortcut teacher, (rows, length, outputs) fp32.

    Args:
        teacher: the semi-teacher, called as teacher(x, time, step size).
        x_t: (rows, length) int64; t, h: (rows,) fp32.
        rule: "rk4" or "heun".
        choose: picks among the candidates of each jump.
    """
    half = h / 2
    middle, end = (t + half).clamp_max(1), (t + h).clamp_max(1)

    def advance(x: Tensor, logits: Tensor, start: Tensor, arrival: Tensor, index: int) -> Tensor:
        allowed = without_mask(logits, vocab_size)
        several = choose.gate(t, arrival) if choose.candidates > 1 else None
        states = jump(x, allowed, start, half, draws, f"jump{index}", choose.candidates, several)
        return choose(states, x, t, arrival, index, draws)

    first: Tensor = teacher(x_t, t, half)
    x = advance(x_t, first, t, middle, 0)
    second: Tensor = teacher(x, middle, half)
    if rule == "heun":
        return (first + second) / 2
    x = advance(x, second, middle, middle, 1)
    third: Tensor = teacher(x, middle, half)
    x = advance(x, third, middle, end, 2)
    fourth: Tensor = teacher(x, end, half)
    return (first + 2 * second + 2 * third + fourth) / 6


def require_finite(logits: Tensor, what: str, draws: Draws) -> None:
    """Refuse logits (rows, length, outputs) with NaN or infinity; FloatingPointError names the windows of the step."""
    if torch.isfinite(logits.sum()):
        return
    bad = (~torch.isfinite(logits)).flatten(1).any(dim=1)
    if bad.any():
        raise FloatingPointError(f"{what} are not finite in {draws.describe(bad)}")


def step_size_and_time(draws: Draws, law: str) -> tuple[Tensor, Tensor]:
    """(t, h) of a batch: h = 2^-j, j = 0..10, and t on the 1/1024 grid, uniform in [0, 1 - h].

    Args:
        law: "uniform" over the eleven sizes, or "inverse_h": weight 1 / h (the released FS-DFM configuration).

    Returns:
        t, h: (batch,) fp64.
    """
    exponents = torch.arange(HALVINGS + 1, dtype=torch.float64, device=draws.streams.device)
    weights = torch.ones_like(exponents) if law == "uniform" else 2.0**exponents
    cdf = weights.cumsum(0) / weights.sum()
    index = torch.searchsorted(cdf, draws.uniform("step_size", 1)[:, 0], right=True).clamp_max(HALVINGS)
    h = 2.0 ** -exponents[index]
    last = ((1 - h) * GRID).floor()
    t = (draws.uniform("time", 1)[:, 0] * (last + 1)).floor() / GRID
    return t, h


@dataclass
class ShortcutObjective:
    """FS-DFM and, with a shaping chooser, TS-DFM.

    Args:
        vocab_size, outputs: V and Vn.
        ema: EMA copy of the student (eval mode, no gradient), kept by the trainer.
        frozen: the pre-trained DFM network.
        rule: "rk4" or "heun".
        h_law: "uniform" or "inverse_h".
        small_h_target: "path_loss" (generalised KL on data) or "kl_frozen_teacher".
        semi_teacher: "ema", or "live": the student itself.
        path_weight: "g" (released code) or "gbar" (paper), the weight of the path loss.
        choose: blind or shaping.
    """

    vocab_size: int
    outputs: int
    ema: nn.Module
    frozen: nn.Module
    rule: str = "rk4"
    h_law: str = "inverse_h"
    small_h_target: str = "path_loss"
    path_weight: str = "g"
    semi_teacher: str = "ema"
    choose: Chooser = BlindChooser()  # noqa: RUF009 - stateless

    def __post_init__(self) -> None:
        for name, known in OPTIONS.items():
            if getattr(self, name) not in known:
                raise UsageError(f"{name} '{getattr(self, name)}' is not one of {', '.join(known)}")

    def loss(self, network: nn.Module, x_1: Tensor, draws: Draws) -> StepResult:
        """Mean over positions, then over rows; spec: KL for large steps, path loss or frozen teacher for small ones."""
        t, h = step_size_and_time(draws, self.h_law)
        x_t = noise(x_1, t, draws, self.outputs, self.vocab_size)
        large = h >= H_SMALL
        student = network(x_t, t.float(), h.float())
        rows = torch.empty(x_1.shape[0], dtype=torch.float32, device=x_1.device)
        shown: dict[str, float] = {}
        big, small = large.nonzero().squeeze(1), (~large).nonzero().squeeze(1)
        if big.numel():
            live = self.semi_teacher == "live"
            training = network.training
            network.train(training and not live)
            target = shortcut_target(
                network if live else self.ema,
                x_t[big],
                t[big].float(),
                h[big].float(),
                draws.rows(big),
                self.vocab_size,
                self.rule,
                self.choose,
            )
            network.train(training)
            require_finite(target, "the shortcut teacher's logits", draws.rows(big))
            rows = rows.index_put((big,), losses.forward_kl(target, student[big]).mean(dim=1))
        if small.numel():
            if self.small_h_target == "path_loss":
                weight = 1 / (1 - t[small])
                if self.path_weight == "gbar":
                    weight = -log_survival_ratio(t[small], h[small]) / (h[small] + 1e-8)
                values = losses.generalised_kl(student[small], x_1[small], x_t[small], weight.float())
            else:
                with torch.no_grad():
                    target = self.frozen(x_t[small], t[small].float())
                require_finite(target, "the frozen teacher's logits", draws.rows(small))
                values = losses.forward_kl(target, student[small])
            rows = rows.index_put((small,), values.mean(dim=1))
        shown["large"] = rows[big].mean().item() if big.numel() else float("nan")
        return StepResult(rows.mean(), shown)

    def bound(self, network: nn.Module, x_1: Tensor, draws: Draws) -> Tensor:
        """(batch,) ELBO estimates per token of the student at the smallest step, comparable with its teacher's."""

        def at_smallest_step(x: Tensor, time: Tensor) -> Tensor:
            logits: Tensor = network(x, time, torch.full_like(time, 1 / GRID))
            return logits

        return DFMObjective(self.vocab_size, self.outputs)._per_token(at_smallest_step, x_1, draws).mean(dim=1)  # type: ignore[arg-type]


DEFAULTS: dict[str, str] = {name: getattr(ShortcutObjective, name) for name in OPTIONS}
"""Values of the options when a recipe does not give them: FS-DFM's, as released."""
