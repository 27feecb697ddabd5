"""`tsdfm-bench status`: how far a run folder is."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from tsdfm_bench.commands.folders import run_folder
from tsdfm_bench.commands.state import report_cells
from tsdfm_bench.console import stdout_console


def status_command(folder: Path | None, as_json: bool) -> int:
    """Print the state of every cell, its scores, and whether there is a summary.

    Args:
        folder: a run folder, or None for the newest.
        as_json: print JSON.
    """
    found = run_folder(folder)
    plan = found.read_plan()
    reports = report_cells(plan, found)
    scored = {str(name): found.scored(str(name)) for name in plan["scorers"]}
    counts = Counter(report.state for report in reports)
    if as_json:
        content = {
            "folder": str(found.root),
            "states": dict(counts),
            "summary": found.summary_path.exists(),
            "cells": [
                {**report.to_json(), "scored_by": [name for name, cells in scored.items() if report.id in cells]}
                for report in reports
            ],
        }
        print(json.dumps(content, indent=2))
        return 0
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = stdout_console()
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=str(found.root), title_justify="left")
    for name in ("cell", "method", "source"):
        grid.add_column(name, no_wrap=name != "method")
    grid.add_column("steps", justify="right")
    grid.add_column("batches", justify="right")
    grid.add_column("scored by")
    grid.add_column("state")
    for report in reports:
        style = {"done": "", "failed": "red", "running": "cyan"}.get(report.state, "dim")
        grid.add_row(
            *(Text(text) for text in (report.id, report.label, report.source or "–")),
            Text("–" if report.steps is None else str(report.steps)),
            Text(f"{report.completed}/{report.batches}" if report.batches and report.state != "refused" else "–"),
            Text(", ".join(name for name, cells in scored.items() if report.id in cells)),
            Text(report.state + (f": {report.reason}" if report.reason else "")),
            style=style,
        )
    console.print(grid)
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    summary = f"summary.csv and tables/ in {found.root}" if found.summary_path.exists() else "no summary yet"
    console.print(f"{states}; {summary}", highlight=False, soft_wrap=True)
    return 0
