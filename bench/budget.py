"""A limit on what a sweep may cost: it refuses, with the reason and what would fit, or leaves out the dearest cells.

The estimate is that of `tsdfm_bench.estimate`. References and cells that are already there cost nothing. What is left
out is a row of the table with its reason, and is run when the same command is given without the limit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from tsdfm_bench.errors import UsageError
from tsdfm_bench.plan import Rejected

if TYPE_CHECKING:
    from tsdfm_bench.estimate import Estimate
    from tsdfm_bench.plan import Plan, PlannedCell
    from tsdfm_bench.sweep import Sweep

_PARTS = re.compile(r"(\d+(?:\.\d+)?)\s*(d|h|min|m|s)")
_SECONDS = {"d": 86400.0, "h": 3600.0, "min": 60.0, "m": 60.0, "s": 1.0}
SHOWN = 5


def parse_budget(text: str) -> float:
    """Seconds of 90s, 30m, 2h, 1h30m or 1d.

    Raises:
        UsageError: none of these.
    """
    compact = text.strip().lower()
    parts = _PARTS.findall(compact)
    if not parts or _PARTS.sub("", compact).strip():
        raise UsageError(f"--budget {text}: write a time with its unit, for example 90s, 30m, 2h, 1h30m or 1d")
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    if seconds <= 0:
        raise UsageError(f"--budget {text} leaves no time")
    return seconds


def about(seconds: float) -> str:
    """A rough time: 40 s, 12 min, 3.5 h, 2.1 days."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


def check_budget(plan: Plan, estimate: Estimate, budget_s: float) -> None:
    """Refuse a sweep that would take longer.

    Raises:
        UsageError: with what it would take, which cells take most, and what would fit.
    """
    _check_known(plan, estimate)
    if estimate.seconds <= budget_s:
        return
    dear = sorted(_costs(plan, estimate), key=lambda pair: -pair[1])[:SHOWN]
    lines = [f"  {planned.cell.describe()}: {about(seconds)}" for planned, seconds in dear if seconds > 0]
    fitting = len(_affordable(plan, estimate, budget_s))
    raise UsageError(
        f"this would take about {about(estimate.seconds)} on {estimate.device}, the budget is {about(budget_s)}.\n"
        + "\n".join(lines)
        + f"\nWithin the budget: {_fewer(plan, estimate, budget_s)}, or --trim, which runs the "
        f"{fitting} cheapest of {len(_costs(plan, estimate))} cells."
    )


def trim(sweep: Sweep, estimate: Estimate, budget_s: float) -> Sweep:
    """The sweep with as many cells as the budget allows, cheapest first; the others become rows with the reason.

    Raises:
        UsageError: not even one fits, or the cost is not known.
    """
    plan = sweep.plan
    _check_known(plan, estimate)
    if estimate.seconds <= budget_s:
        return sweep
    kept = _affordable(plan, estimate, budget_s)
    costs = _costs(plan, estimate)
    if not kept:
        planned, seconds = min(costs, key=lambda pair: pair[1])
        raise UsageError(
            f"not one cell fits the budget of {about(budget_s)}: the cheapest, {planned.cell.describe()}, takes about "
            f"{about(seconds)}; {_fewer(plan, estimate, budget_s)}"
        )
    left_out = [
        Rejected(planned.cell, "skipped", f"would take about {about(seconds)}, beyond the budget of {about(budget_s)}")
        for planned, seconds in costs
        if planned.cell.id not in kept
    ]
    gone = {row.cell.id for row in left_out}
    cells = tuple(planned for planned in plan.cells if planned.cell.id not in gone)
    return replace(sweep, plan=replace(plan, cells=cells, rejected=(*plan.rejected, *left_out)))


def _check_known(plan: Plan, estimate: Estimate) -> None:
    unknown = [cell for cell, seconds in estimate.sampling_s.items() if seconds is None]
    if unknown:
        names = {planned.cell.id: planned.cell.label for planned in plan.cells}
        methods = ", ".join(dict.fromkeys(names[cell] for cell in unknown))
        reasons = "; ".join(estimate.notes)
        raise UsageError(f"the budget cannot be kept: the cost of {methods} is not known ({reasons or 'not timed'})")


def _costs(plan: Plan, estimate: Estimate) -> list[tuple[PlannedCell, float]]:
    """Seconds of every cell of a method that has something left to do: its sampling and its share of the scoring."""
    left = [p for p in plan.cells if p.cell.kind == "method" and p.cell.id in estimate.sampling_s]
    share = _scoring(estimate.scoring_s) / max(1, sum(1 for p in plan.cells if p.cell.id in estimate.sampling_s))
    return [(planned, (estimate.sampling_s[planned.cell.id] or 0.0) + share) for planned in left]


def _affordable(plan: Plan, estimate: Estimate, budget_s: float) -> set[str]:
    """Ids of the cells that fit, cheapest first, after what references cost."""
    costs = _costs(plan, estimate)
    spent = estimate.seconds - sum(seconds for _, seconds in costs)
    kept = set()
    for planned, seconds in sorted(costs, key=lambda pair: pair[1]):
        spent += seconds
        if spent > budget_s:
            break
        kept.add(planned.cell.id)
    return kept


def _fewer(plan: Plan, estimate: Estimate, budget_s: float) -> str:
    """The number of samples that would fit, in whole batches."""
    samples = plan.config.samples
    fitting = int(samples * budget_s / estimate.seconds) // plan.batch_size * plan.batch_size
    if 0 < fitting < samples:
        return f"--samples {fitting}"
    return "fewer --steps or --methods"


def _scoring(seconds: Mapping[str, float | None]) -> float:
    return sum(s or 0.0 for s in seconds.values())
