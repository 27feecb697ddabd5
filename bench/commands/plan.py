"""`tsdfm-bench plan`: what a run would do, without doing it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tsdfm_bench.commands.state import CellReport, report_cells
from tsdfm_bench.config import make_config
from tsdfm_bench.console import stdout_console
from tsdfm_bench.sweep import Sweep, plan_json, prepare


def plan_command(given: Mapping[str, Any], file: Path | None, as_json: bool) -> int:
    """Print the cells of a request and the work they mean; arguments as in `run_command`."""
    sweep = prepare(make_config(given, file))
    plan = sweep.plan
    reports = report_cells(plan_json(sweep), sweep.folder)
    todo = sum(report.batches - report.completed for report in reports if report.state not in ("done", "refused"))
    calls = sum(_calls(report) for report in reports)
    if as_json:
        content = {
            "folder": str(sweep.folder.root),
            "batch_size": plan.batch_size,
            "batches_to_do": todo,
            "calls_at_most": calls,
            "cells": [report.to_json() for report in reports],
        }
        print(json.dumps(content, indent=2))
        return 0
    _print(sweep, reports, todo, calls)
    return 0


def _calls(report: CellReport) -> int:
    """Network calls that the missing batches need at most: one per step, or per token without steps."""
    if report.kind != "method" or report.state in ("done", "refused") or not report.batches:
        return 0
    return (report.batches - report.completed) * (report.steps if report.steps is not None else report.length)


def _print(sweep: Sweep, reports: list[CellReport], todo: int, calls: int) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    plan = sweep.plan
    console = stdout_console()
    grid = Table(box=box.SIMPLE_HEAD, title="cells", title_justify="left", pad_edge=False)
    for name in ("cell", "method", "source"):
        grid.add_column(name, no_wrap=name != "method")
    grid.add_column("steps", justify="right")
    grid.add_column("settings")
    grid.add_column("batches", justify="right")
    grid.add_column("state")
    for report in reports:
        grid.add_row(
            *(Text(text) for text in (report.id, report.label, report.source or "–")),
            Text("–" if report.steps is None else str(report.steps)),
            Text(report.settings),
            Text(f"{report.completed}/{report.batches}" if report.batches and report.state != "refused" else "–"),
            Text(report.state + (f": {report.reason}" if report.reason else "")),
        )
    console.print(grid)
    judges = ", ".join(judge.name + (" (not at hand)" if judge.problem else "") for judge in sweep.judges) or "none"
    lines = [
        f"folder     {sweep.folder.root}",
        f"sequences  {sweep.config.samples} per cell, {plan.length} tokens, in batches of {plan.batch_size}",
        f"to do      {todo} batches, at most {calls} network calls; then scoring by {judges}",
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
