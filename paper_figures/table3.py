"""Table 3: what shaping costs in training, in seconds and floating-point operations per step.

Each recipe is compared with the unshaped student (fsdfm) of the same scale, source, batch and device. The paper's
values are unknown. From `training_cost.json`, see `results.training`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from tsdfm_bench.paper_figures.base import Made, NothingToDraw
from tsdfm_bench.results.evidence import Evidence
from tsdfm_bench.results.numbers import plain, with_interval
from tsdfm_bench.results.rows import Row
from tsdfm_bench.results.stats import Interval, bootstrap, ratio
from tsdfm_bench.results.table_model import Table, TableColumn, TableRow, Value
from tsdfm_bench.results.training import Cost


class Table3:
    """See the module's text."""

    title: ClassVar[str] = "training overhead"
    sweep: ClassVar[str] = "table3"

    def make(self, evidence: Evidence) -> list[Made]:
        """One table of all recorded costs."""
        costs = evidence.costs.costs
        if not costs:
            raise NothingToDraw("no training_cost.json")
        columns = [
            TableColumn("name", "recipe", align="left"),
            TableColumn("where", "scale, source", align="left"),
            TableColumn("batch", "batch", give_way=2),
            TableColumn("seconds", "step", "s"),
            TableColumn("more", "against unshaped", "time"),
            TableColumn("flops", "step", "GFLOP"),
            TableColumn("more_flops", "against unshaped", "FLOP"),
            TableColumn("memory", "peak memory", "MB", give_way=1),
            TableColumn("device", "device", align="left", give_way=3),
        ]
        lines = [TableRow("method", _cells(cost, costs)) for cost in costs]
        missing = [
            f"unshaped student of {cost.name} ({cost.scale} {cost.source})"
            for cost in costs
            if cost.method == "tsdfm" and _unshaped(cost, costs) is None
        ]
        notes = [
            "Median seconds of a training step; ± is half of its 95 % bootstrap interval over measured steps.",
            "Against unshaped: ratio to fsdfm of the same scale, source, batch and device.",
            "The paper's own values are unknown.",
        ]
        notes += [f"Incomplete, no row for: {'; '.join(missing)}."] if missing else []
        title = "Table 3. Training overhead of shaping"
        rows = [_row(cost) for cost in costs]
        return [Made("table3", title, rows, table=Table(title, columns, lines, notes), notes=notes, missing=missing)]


def _median(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.median(x, axis=-1))


def _spent(cost: Cost) -> Interval:
    return bootstrap([np.asarray(cost.seconds_per_step)], _median)


def _row(cost: Cost) -> Row:
    """A cost as a row, so that changes of it are noticed."""
    found = _spent(cost)
    settings = " ".join(f"{key}={value}" for key, value in sorted(cost.settings.items()))
    return {
        "cell": f"{cost.name} {cost.scale} {cost.source} {settings}".strip(),
        "metric": "training_seconds",
        "scorer": "",
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "n": len(cost.seconds_per_step),
    }


def _unshaped(cost: Cost, costs: list[Cost]) -> Cost | None:
    def where(c: Cost) -> tuple[Any, ...]:
        return (c.scale, c.source, c.batch, c.device, c.threads)

    return next((c for c in costs if c.method == "fsdfm" and c is not cost and where(c) == where(cost)), None)


def _cells(cost: Cost, costs: list[Cost]) -> dict[str, Value]:
    spent, base = _spent(cost), _unshaped(cost, costs)
    values = {
        "name": Value(cost.name),
        "where": Value(", ".join(part for part in (cost.scale, cost.source) if part)),
        "batch": Value(str(cost.batch), cost.batch),
        "seconds": _interval(spent),
        "flops": Value("–" if cost.flops_per_step is None else plain(cost.flops_per_step / 1e9), cost.flops_per_step),
        "memory": Value(plain(None if cost.peak_memory_bytes is None else cost.peak_memory_bytes / 1e6)),
        "device": Value(f"{cost.device}, {cost.threads} threads" if cost.threads else cost.device),
        "more": Value("–"),
        "more_flops": Value("–"),
    }
    if base is not None:
        both = ([np.asarray(cost.seconds_per_step)], [np.asarray(base.seconds_per_step)])
        values["more"] = _interval(ratio(*both, _median, paired=False), "× ")
        if cost.flops_per_step is not None and base.flops_per_step is not None:
            more = cost.flops_per_step / base.flops_per_step
            values["more_flops"] = Value(f"× {plain(more)}", more)
    return values


def _interval(found: Interval, before: str = "") -> Value:
    return Value(before + with_interval(found.value, found.low, found.high), found.value, found.low, found.high)
