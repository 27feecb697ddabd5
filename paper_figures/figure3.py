"""Figure 3: what the gain depends on: K, every option of shaping and of its targets, and the controls that explain it
away.

One line per variant: quality on the left, entropy on the right, because a choice by energy can lower perplexity by
lowering entropy alone. Small marks are training seeds, large ones their mean with its 95 % interval.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from tsdfm_bench.paper_figures.ablation import Ablation, Level, ablations, lacking
from tsdfm_bench.paper_figures.base import Made, NothingToDraw, mark_incomplete, own_names, unique_rows
from tsdfm_bench.results.axes import log_axis
from tsdfm_bench.results.evidence import Evidence
from tsdfm_bench.results.plots import seed_marks
from tsdfm_bench.results.rows import Row, finite
from tsdfm_bench.results.style import COLUMN_IN, INK, PALETTE, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GROUPS = {
    "K": "candidates K",
    "tau": "tau",
    "policy": "policy",
    "token_guard": "guard",
    "switch": "switch",
    "switch_time": "switch time",
    "gate_on": "gate",
    "rule": "rule",
    "teacher": "shortcut teacher",
    "semi_teacher": "semi-teacher",
    "h_law": "law of h",
    "small_h_target": "small h",
    "control": "control",
}
NAMES = {
    "none": "shaped (default)",
    "unshaped": "unshaped",
    "entropy_matched": "entropy-matched",
    "certainty_matched": "certainty-matched",
    "flop_matched": "FLOP-matched",
    "random_pick": "random pick",
    "argmax_pick": "worst pick",
    "shuffled_energy": "shuffled energy",
    "compass_at_inference": "compass when sampling",
    "oracle": "oracle compass",
    "scorer": "scorer as compass",
    "seq": "sequence",
    "token": "token",
    "seq_to_token": "sequence, then token",
    "True": "on",
    "False": "off",
    "time": "at a time",
    "midpoint_index": "after the first midpoint",
    "curriculum": "during training",
    "midpoint_time": "midpoint's time",
    "row_start_time": "start time",
    "rk4": "RK-4",
    "heun": "Heun",
    "ema": "average",
    "inverse_h": "1/h",
    "kl_frozen_teacher": "frozen teacher",
    "path_loss": "path loss",
}
WANTED = {
    "K": ("1", "2", "4", "8", "16"),
    "policy": ("seq", "token", "seq_to_token"),
    "control": ("unshaped", "entropy_matched", "flop_matched", "random_pick", "oracle"),
}


class Figure3:
    """See the module's text."""

    title: ClassVar[str] = "K, options and controls"
    sweep: ClassVar[str] = "figure3"

    def make(self, evidence: Evidence) -> list[Made]:
        """One figure per text setting, source and judge of quality."""
        found: list[Made] = []
        for ablation in ablations(evidence):
            groups = {key: levels for key in GROUPS if len(levels := ablation.levels(key)) > 1}
            if not groups:
                continue
            for metric, scorer in ablation.quality:
                name = "figure3" if not found else f"figure3-{ablation.task}-{ablation.source}-{scorer or metric}"
                found.append(_one(ablation, groups, metric, scorer, name))
        if not found:
            raise NothingToDraw("no two variants that differ in one setting or control alone")
        return own_names(found)


def _one(ablation: Ablation, groups: dict[str, list[Level]], metric: str, scorer: str, name: str) -> Made:
    lines = sum(len(levels) + 1 for levels in groups.values())
    rows: list[Row | None] = []
    with styled():
        figure, (left, right) = new_figure(COLUMN_IN, 0.55 + 0.15 * lines, columns=2, sharey=True, width_ratios=[3, 2])
        y, ticks, labels = 0.0, [], []
        for key, levels in groups.items():
            ticks.append(y)
            labels.append(GROUPS[key])
            y += 1
            for level in levels:
                for axes, measure in ((left, (metric, scorer)), (right, (ablation.entropy, ""))):
                    _level(axes, y, level, *measure)
                    rows += level.rows(*measure)
                ticks.append(y)
                labels.append(NAMES.get(level.name, level.name))
                y += 1
        _default_line(left, groups, metric, scorer)
        _default_line(right, groups, ablation.entropy, "")
        left.set_yticks(ticks, labels)
        for text in left.get_yticklabels():
            if text.get_text() in GROUPS.values():
                text.set_fontweight("bold")
        left.set_ylim(y - 0.4, -0.6)
        perplexity = metric != "excess_nll"
        cut = _frame(left, groups, metric, scorer, perplexity), _frame(right, groups, ablation.entropy, "", log=False)
        for axes in (left, right):
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
        left.set_xlabel(f"gen-PPL ({scorer})" if perplexity else "excess NLL (nats/token)")
        right.set_xlabel("entropy (nats)")
        if perplexity:
            log_axis(left, "x")
        missing = [
            f"{GROUPS[key]} {NAMES.get(value, value)}"
            for key, values in WANTED.items()
            for value in values
            if value not in {level.name for level in groups.get(key, [])}
        ]
        mark_incomplete(figure, missing)
    shown = unique_rows(rows)
    notes = [
        "Each line differs from the default in one setting. Small marks are training seeds, large ones their mean with "
        "its 95 % interval (t, over seeds; over sequences where there is one seed). The vertical line is the default.",
        *(["Intervals that leave the frame are cut; all networks lie inside."] if any(cut) else []),
        *(
            f"{GROUPS[key]} {text}"
            for key, levels in groups.items()
            for text in lacking(levels, [(metric, scorer), (ablation.entropy, "")])
        ),
        *(f"{text}." for text in dict.fromkeys(row["definition"] for row in shown if row["definition"])),
    ]
    return Made(name, f"K, options and controls; {ablation.name}", shown, figure=figure, notes=notes, missing=missing)


def _level(axes: Axes, y: float, level: Level, metric: str, scorer: str) -> None:
    found = level.estimate(metric, scorer)
    if found is None:
        return
    value, low, high = found
    color = PALETTE[1] if level.is_default else PALETTE[0]
    seed_marks(axes, [y], [level.rows(metric, scorer)], along="x")
    if finite(low) and finite(high):
        axes.plot([low, high], [y, y], color=color, linewidth=0.9)
    axes.plot(
        value, y, marker="o" if level.is_default else "s", color=color, markersize=3.8, linestyle="none", zorder=3
    )


def _frame(axes: Axes, groups: dict[str, list[Level]], metric: str, scorer: str, log: bool) -> bool:
    """Let the networks, not the widest interval, set the frame; whether an interval leaves it."""
    levels = [level for found in groups.values() for level in found]
    values = [row["value"] for level in levels for row in level.rows(metric, scorer)]
    if not values:
        return False
    scale, back = (math.log, math.exp) if log else (float, float)
    low, high = scale(min(values)), scale(max(values))
    room = 0.15 * ((high - low) or 1.0)
    low, high = back(low - room), back(high + room)
    axes.set_xlim(low, high)
    estimates = [found for level in levels if (found := level.estimate(metric, scorer)) is not None]
    return any(finite(end) and not low <= end <= high for found in estimates for end in found[1:])


def _default_line(axes: Axes, groups: dict[str, list[Level]], metric: str, scorer: str) -> None:
    level = next((level for levels in groups.values() for level in levels if level.is_default), None)
    found = level.estimate(metric, scorer) if level is not None else None
    if found is not None:
        axes.axvline(found[0], color=INK, linewidth=0.6, linestyle=(0, (2, 2)), zorder=1)
