"""Where a bad early jump goes: blind and shaped trajectories, recorded step by step (arXiv 2605.07924, the thesis).

Both arms start from the same noise and walk to data in N jumps of the frozen teacher (`shortcut.jump`). The blind arm
takes the first draw of every jump, the shaped arm the one of K that the chooser of a student's training would take; the
first candidate of both comes from the same random numbers. After every jump is recorded

    nll_nats      NLL per token, under a judge, of the sequence completed from this state by the teacher itself; the
                  completions of both arms share their random numbers
    energy        of the state, as the compass judged it when it was a candidate
    flips         share of positions that changed in this jump
    committed     share of positions that already hold their final token
    commits       the positions that took their final token in this jump (at step 0: that began with it), in order of
                  position; over the steps, the order in which the sequence is committed
    entropy_nats  unigram entropy of the state's tokens

The columns are those of `tsdfm_bench.results.training`, which the figure of trajectories reads.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tsdfm_bench.methods.train.compass import CompassObjective
from tsdfm_bench.methods.train.compass_report import Judge, builder_logits, finish
from tsdfm_bench.methods.train.data import Draws
from tsdfm_bench.methods.train.shaping import Energy, ShapingChooser, ShapingConfig
from tsdfm_bench.methods.train.shortcut import BlindChooser, Chooser, jump

STEPS, SEQUENCES = 8, 64


@torch.inference_mode()
def record(
    builder: CompassObjective,
    energy: Energy,
    shaping: ShapingConfig,
    judge: Judge,
    length: int,
    source: str,
    sequences: int = SEQUENCES,
    steps: int = STEPS,
) -> list[dict[str, Any]]:
    """Rows of both arms.

    Args:
        builder: walks; its network and vocabulary are used.
        energy: judges the states.
        shaping: how the shaped arm chooses.
        judge: of completed sequences.
        length: tokens per sequence.
        source: for the record.
        sequences, steps: sizes.
    """
    device = next(builder.builder.parameters()).device
    rows: list[dict[str, Any]] = []
    chooser = ShapingChooser(shaping, energy)
    for arm, choose in (("blind", BlindChooser()), ("shaped", chooser)):
        draws = Draws(0, "trajectories", 0, sequences, device)
        states, times = walk(builder, choose, draws, length, steps)
        rest = Draws(0, "completions", 0, sequences, device)
        commit = commit_steps(states).tolist()
        for step, (state, time) in enumerate(zip(states, times, strict=True)):
            before = states[max(0, step - 1)]
            whole = finish(builder, state[None], time, rest)[0]
            columns = {
                "nll_nats": torch.from_numpy(judge(whole.cpu().numpy())),
                "energy": energy(state, time.float(), before).mean(dim=1) if step else torch.full_like(time, torch.nan),
                "flips": (state != before).double().mean(dim=1),
                "committed": (state == states[-1]).double().mean(dim=1),
                "entropy_nats": unigram_entropy(state),
            }
            values = {name: column.double().tolist() for name, column in columns.items()}
            rows += [
                {"arm": arm, "source": source, "sequence": i, "step": step, "t": time[i].item()}
                | {name: column[i] for name, column in values.items()}
                | {"commits": [position for position, when in enumerate(commit[i]) if when == step]}
                for i in range(sequences)
            ]
    return rows


def walk(
    builder: CompassObjective, choose: Chooser, draws: Draws, length: int, steps: int
) -> tuple[list[Tensor], list[Tensor]]:
    """States (sequences, length) and their times (sequences,) from noise to data, steps + 1 of each."""
    if builder.outputs > builder.vocab_size:
        x = torch.full((draws.batch, length), builder.vocab_size, device=draws.streams.device)
    else:
        x = (draws.uniform("start", length) * builder.vocab_size).long()
    t = torch.zeros(draws.batch, dtype=torch.float64, device=x.device)
    h = torch.full_like(t, 1 / steps)
    states, times = [x], [t]
    for step in range(steps):
        end = torch.full_like(t, (step + 1) / steps)
        pool = jump(x, builder_logits(builder, x, t, h), t, h, draws, f"walk{step}", choose.candidates)
        x, t = choose(pool, x, t, end, step, draws), end
        states.append(x)
        times.append(t)
    return states, times


def commit_steps(states: list[Tensor]) -> Tensor:
    """The step in which each position took its final token, (rows, length) int64, from steps + 1 states."""
    steps = torch.zeros_like(states[0])
    for step, (before, state) in enumerate(pairwise(states), start=1):
        steps = torch.where(state != before, step, steps)
    return steps


def unigram_entropy(states: Tensor) -> Tensor:
    """Entropy in nats of the tokens of each state, (rows, length) -> (rows,) fp64."""
    counts = (states[:, :, None] == states[:, None, :]).sum(dim=2).double()
    return -(counts / states.shape[1]).log().mean(dim=1)
