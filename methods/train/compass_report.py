"""Whether a compass may be trusted: what it tells apart, and whether following it helps (arXiv 2605.07924).

A compass that only learned how noisy a state is, or how often it repeats itself, shapes nothing but entropy. So before
a student is taught with it, it is tried on held-out text:

    discrimination   AUC of the energy between builder states and data-bridge states of the same x_t, by time
    trivial rivals   AUC of the number of changed positions and of repeated tokens: they must lie well below
    sign             share of pairs whose data-bridge state has the lower energy; binomial test
    choice           among K builder states of the same x_t: the NLL, under a judge, of the finished sequences that
                     argmin, argmax and a random pick lead to; argmax must be worse than argmin (paired, one-sided)
    correlation      Spearman's rho of energy and the finished sequence's NLL, within the K states of one x_t: positive

Only times at which shaping is allowed (s >= tau) count for the verdict. The judge is any function from finished
sequences to nats per token: the task's exact law, a bundled scorer, an autoregressive network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from tsdfm_bench.methods.core.draw import inverse_cdf
from tsdfm_bench.methods.train.compass import CompassObjective, Pair
from tsdfm_bench.methods.train.data import Draws, TrainingText
from tsdfm_bench.methods.train.objectives import noise
from tsdfm_bench.methods.train.shortcut import jump, without_mask

Judge = Callable[[np.ndarray], np.ndarray]
"""(n, length) int64 finished sequences -> (n,) nats per token."""

LEVEL = 0.01
BINS = 5
FINISH_JUMPS = 8


@dataclass(frozen=True)
class TimeBin:
    """Discrimination among states of times in [low, high]; AUC 0.5 is chance, nan where there are too few pairs."""

    low: float
    high: float
    pairs: int
    auc: float
    auc_changed: float
    auc_repeated: float


@dataclass(frozen=True)
class Choice:
    """What following the energy does to the finished sequence, in nats per token of the judge.

    Args:
        judge: its name.
        sets, candidates: number of origins, and states per origin.
        argmin, random, argmax: mean NLL of what each pick leads to.
        sign_p: one-sided p-value that argmax is worse than argmin (Wilcoxon signed ranks over origins).
        rho, rho_p: mean Spearman correlation within origins, one-sided p-value that it is positive (t-test).
    """

    judge: str
    sets: int
    candidates: int
    argmin: float
    random: float
    argmax: float
    sign_p: float
    rho: float
    rho_p: float


@dataclass(frozen=True)
class CompassReport:
    """Everything measured, and the reasons not to trust the compass (none: it passed)."""

    tau: float
    pairs: int
    auc: float
    auc_error: float
    auc_changed: float
    auc_repeated: float
    right: float
    right_p: float
    bins: list[TimeBin]
    choice: Choice | None
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failures

    def summary(self) -> str:
        """One line."""
        verdict = "passed its checks" if self.passed else "failed its checks: " + "; ".join(self.failures)
        return (
            f"AUC {self.auc:.3f} ± {2 * self.auc_error:.3f} from t = {self.tau:g} on (changed positions "
            f"{self.auc_changed:.3f}, repeated tokens {self.auc_repeated:.3f}); {verdict}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return {**asdict(self), "passed": self.passed}


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """P(score of a negative > score of a positive) + half of P(equal); nan without both."""
    if positive.size == 0 or negative.size == 0:
        return float("nan")
    statistic = stats.mannwhitneyu(negative, positive).statistic
    return float(statistic / (positive.size * negative.size))


def folded(value: float) -> float:
    """AUC of the better of a classifier and its opposite."""
    return max(value, 1 - value)


def repeated(states: Tensor) -> np.ndarray:
    """Positions whose token stands earlier in the same state, (rows,) int."""
    ordered = states.sort(dim=1).values
    return (ordered[:, 1:] == ordered[:, :-1]).sum(dim=1).numpy()


@torch.inference_mode()
def examine(
    compass: nn.Module,
    objective: CompassObjective,
    text: TrainingText,
    tau: float,
    judge: Judge | None = None,
    judge_name: str = "",
    pairs: int = 512,
    sets: int = 128,
    candidates: int = 8,
    batch: int = 64,
) -> CompassReport:
    """Try a compass on held-out text.

    Args:
        compass: called as compass(states, time, origin) -> token energies.
        objective: makes the pairs it was trained on; its builder makes the states to choose among.
        text: its validation split is used.
        tau: from which time on shaping is allowed.
        judge: of finished sequences; None leaves the choice out.
        judge_name: for the record.
        pairs, sets, candidates, batch: sizes.
    """
    made = [_pairs(compass, objective, text, index, batch) for index in range(max(1, pairs // batch))]
    time, low, high, changed, again = (np.concatenate(column, axis=-1) for column in zip(*made, strict=True))
    edges = np.linspace(0, 1, BINS + 1)
    bins = []
    for start, end in pairwise(edges):
        inside = (time >= start) & ((time < end) | (end == 1.0))
        bins.append(TimeBin(float(start), float(end), int(inside.sum()), *_aucs(low, high, changed, again, inside)))
    allowed = time >= min(tau, 1.0)
    overall, by_changes, by_repeats = _aucs(low, high, changed, again, allowed)
    count = int(allowed.sum())
    right, wrong = int((low[allowed] < high[allowed]).sum()), int((low[allowed] > high[allowed]).sum())
    told = right + wrong  # pairs of equal energy say nothing
    test = stats.binomtest(right, told, alternative="greater") if told else None
    choice = None
    if judge is not None:
        choice = _choice(compass, objective, text, tau, judge, judge_name, sets, candidates)
    report = CompassReport(
        tau=tau,
        pairs=count,
        auc=overall,
        auc_error=_auc_error(overall, count),
        auc_changed=by_changes,
        auc_repeated=by_repeats,
        right=right / told if told else 0.5,
        right_p=float(test.pvalue) if test else 1.0,
        bins=bins,
        choice=choice,
    )
    report.failures.extend(_failures(report))
    return report


def _pairs(
    compass: nn.Module, objective: CompassObjective, text: TrainingText, index: int, batch: int
) -> tuple[np.ndarray, ...]:
    """Time, energies of positives and negatives, changed positions and repeated tokens (2, batch) of one batch."""
    device = next(compass.parameters()).device
    draws = Draws(0, "compass-report", index, batch, device)
    pair: Pair = objective.pair(text.windows("validation", draws), draws)
    low, high = (energy.mean(dim=1).cpu().numpy() for energy in objective.energies(compass, pair))
    states = [pair.positive, pair.negative]
    changed = np.stack([(state != pair.origin).sum(dim=1).cpu().numpy() for state in states])
    again = np.stack([repeated(state.cpu()) for state in states])
    return pair.time.cpu().numpy(), low, high, changed, again


def _aucs(
    low: np.ndarray, high: np.ndarray, changed: np.ndarray, again: np.ndarray, keep: np.ndarray
) -> tuple[float, float, float]:
    trivial = [folded(auc(column[0][keep], column[1][keep])) for column in (changed, again)]
    return auc(low[keep], high[keep]), trivial[0], trivial[1]


def _auc_error(value: float, count: int) -> float:
    """Standard error of an AUC from `count` positives and negatives (Hanley and McNeil, Radiology 1982)."""
    if count < 2:
        return float("nan")
    q1, q2 = value / (2 - value), 2 * value**2 / (1 + value)
    spread = value * (1 - value) + (count - 1) * (q1 + q2 - 2 * value**2)
    return float(np.sqrt(max(spread, 0.0)) / count)


def _choice(
    compass: nn.Module,
    objective: CompassObjective,
    text: TrainingText,
    tau: float,
    judge: Judge,
    judge_name: str,
    sets: int,
    candidates: int,
) -> Choice:
    """Pick among builder states of the same x_t and finish each with the builder."""
    device = next(compass.parameters()).device
    draws = Draws(0, "compass-choice", 0, sets, device)
    x_1 = text.windows("validation", draws)
    # states are judged between tau and 7/8, or at 0.9: later there is nothing left to finish
    arrival = tau + (0.875 - tau) * draws.uniform("arrival", 1)[:, 0]
    if tau >= 0.875:
        arrival = torch.full_like(arrival, 0.9)
    h = torch.minimum(arrival, torch.full_like(arrival, 0.25))
    t = arrival - h
    x_t = noise(x_1, t, draws, objective.outputs, objective.vocab_size)
    states = jump(x_t, builder_logits(objective, x_t, t, h), t, h, draws, "candidates", candidates)
    flat, when = states.flatten(0, 1), arrival.repeat(candidates)
    energy = compass(flat, when.float(), x_t.repeat(candidates, 1)).mean(dim=1).view(candidates, sets)
    finished = finish(objective, states, arrival, draws)
    nll = judge(finished.flatten(0, 1).cpu().numpy()).reshape(candidates, sets)
    order, columns = energy.cpu().numpy(), np.arange(sets)
    best, worst = nll[order.argmin(axis=0), columns], nll[order.argmax(axis=0), columns]
    varied = (np.ptp(order, axis=0) > 0) & (np.ptp(nll, axis=0) > 0)
    rho = np.array([stats.spearmanr(order[:, i], nll[:, i]).statistic for i in np.flatnonzero(varied)])
    differ = best != worst
    return Choice(
        judge=judge_name,
        sets=sets,
        candidates=candidates,
        argmin=float(best.mean()),
        random=float(nll.mean()),
        argmax=float(worst.mean()),
        sign_p=float(stats.wilcoxon(worst, best, alternative="greater").pvalue) if differ.any() else 1.0,
        rho=float(rho.mean()) if rho.size else 0.0,
        rho_p=float(stats.ttest_1samp(rho, 0.0, alternative="greater").pvalue) if rho.size > 1 else 1.0,
    )


def builder_logits(objective: CompassObjective, x: Tensor, t: Tensor, h: Tensor) -> Tensor:
    """Logits of the builder at states (rows, length), the mask id excluded."""
    step = (h.float(),) if objective.step_aware else ()
    return without_mask(objective.builder(x, t.float(), *step), objective.vocab_size)


def finish(objective: CompassObjective, states: Tensor, time: Tensor, draws: Draws) -> Tensor:
    """Walk (K, rows, length) states at `time` (rows,) to t = 1 with the builder; the K share their random numbers.

    The clamp at t = 1 leaves a mask in place with a probability of about 1e-7: such a position is drawn once more.
    """
    rest = []
    for state in states:
        x, t = state, time
        step = (1 - time) / FINISH_JUMPS
        for index in range(FINISH_JUMPS):
            x = jump(x, builder_logits(objective, x, t, step), t, step, draws, f"finish{index}")[0]
            t = t + step
        rows, positions = (x >= objective.vocab_size).nonzero(as_tuple=True)
        if rows.numel():
            weights = builder_logits(objective, x, t, step)[rows, positions].double().softmax(dim=-1)
            x[rows, positions] = inverse_cdf(weights, draws.at("finish/rest", rows, positions))[0]
        rest.append(x)
    return torch.stack(rest)


def _failures(report: CompassReport) -> list[str]:
    """Reasons not to trust it."""
    reasons = []
    rival, name = max((report.auc_changed, "changed positions"), (report.auc_repeated, "repeated tokens"))
    if not report.right_p < LEVEL:
        reasons.append(
            f"it prefers the data in {report.right:.0%} of {report.pairs} pairs from t = {report.tau:g} on, "
            f"not clearly more than half (p = {report.right_p:.2g})"
        )
    elif not report.auc - 2 * report.auc_error > rival:
        reasons.append(
            f"its AUC {report.auc:.3f} ± {2 * report.auc_error:.3f} is not clearly above that of counting {name} "
            f"({rival:.3f})"
        )
    choice = report.choice
    if choice is not None and not choice.sign_p < LEVEL:
        reasons.append(
            f"picking the highest energy is not worse than picking the lowest: {choice.judge} gives the finished "
            f"sequences {choice.argmax:.3f} against {choice.argmin:.3f} nats per token (p = {choice.sign_p:.2g}, "
            f"{choice.sets} sets)"
        )
    if choice is not None and not choice.rho_p < LEVEL:
        reasons.append(
            f"its energy does not go with what {choice.judge} gives the finished sequences: mean rank correlation "
            f"{choice.rho:.3f} within {choice.sets} sets (p = {choice.rho_p:.2g})"
        )
    return reasons
