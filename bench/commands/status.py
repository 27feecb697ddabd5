"""`tsdfm-bench status`: how far a run folder is, and what goes on with it."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdfm_bench.commands.folders import run_folder
from tsdfm_bench.commands.live import Live, look, scoring_state, with_live
from tsdfm_bench.commands.state import CellReport, report_cells
from tsdfm_bench.console import stdout_console
from tsdfm_bench.results.store import RunFolder

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

EVERY_S = 2.0
SLURM_EVERY_S = 15.0
IDLE_LOOKS = 2
STYLES = {"done": "", "failed": "red", "running": "cyan", "requeued and waiting": "yellow"}
FIRST = ("failed", "running", "requeued and waiting", "queued", "partial", "missing")


@dataclass(frozen=True)
class State:
    """One look at a run.

    Args:
        folder: the run.
        reports: its cells.
        scored: scorer -> cells with scores.
        live: what goes on.
    """

    folder: RunFolder
    reports: list[CellReport]
    scored: dict[str, set[str]]
    live: Live

    @property
    def counts(self) -> Counter[str]:
        """Cells by state."""
        return Counter(report.state for report in self.reports)


def state_of(folder: RunFolder, live: Live | None = None) -> State:
    """Read a run folder; `live` if Slurm was asked a moment ago."""
    plan = folder.read_plan()
    now = look(folder) if live is None else live
    reports = [with_live(report, now, folder) for report in report_cells(plan, folder)]
    return State(folder, reports, {str(name): folder.scored(str(name)) for name in plan["scorers"]}, now)


def status_command(folder: Path | None, as_json: bool, watch: bool = False) -> int:
    """Print the state of every cell, its scores, what goes on, and whether there is a summary.

    Args:
        folder: a run folder, or None for the newest.
        as_json: print JSON.
        watch: print again and again until nothing goes on any more.
    """
    found = run_folder(folder)
    if as_json:
        print(json.dumps(_json(state_of(found)), indent=2))
    elif watch:
        _watch(found)
    else:
        console = stdout_console()
        state = state_of(found)
        console.print(_grid(state, state.reports))
        for line in _lines(state):
            console.print(line, highlight=False, soft_wrap=True)
    return 0


def _json(state: State) -> dict[str, Any]:
    jobs = {} if state.live.queue is None else {key: task.id for key, task in state.live.queue.alive.items()}
    return {
        "folder": str(state.folder.root),
        "states": dict(state.counts),
        "summary": state.folder.summary_path.exists(),
        "launchers": [{"pid": p.pid, "machine": p.machine, "launcher": p.launcher} for p in state.live.launchers],
        "slurm": {"note": state.live.note, "jobs": jobs},
        "cells": [
            {**report.to_json(), "scored_by": [name for name, cells in state.scored.items() if report.id in cells]}
            for report in state.reports
        ],
    }


def _grid(state: State, reports: list[CellReport]) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=str(state.folder.root), title_justify="left")
    for name in ("cell", "method", "source"):
        grid.add_column(name, no_wrap=name != "method")
    grid.add_column("steps", justify="right")
    grid.add_column("batches", justify="right")
    grid.add_column("scored by")
    grid.add_column("state")
    for report in reports:
        grid.add_row(
            *(Text(text) for text in (report.id, report.label, report.source or "–")),
            Text("–" if report.steps is None else str(report.steps)),
            Text(f"{report.completed}/{report.batches}" if report.batches and report.state != "refused" else "–"),
            Text(_scored(state, report)),
            Text(report.state + (f": {report.reason}" if report.reason else "")),
            style=STYLES.get(report.state, "dim"),
        )
    return grid


def _scored(state: State, report: CellReport) -> str:
    """Scorers that are done with a cell, and those whose jobs are on their way."""
    parts = []
    for name, cells in state.scored.items():
        if report.id in cells:
            parts.append(name)
        elif doing := scoring_state(state.live, report.id, name):
            parts.append(f"{name} ({doing})")
    return ", ".join(parts)


def _lines(state: State) -> list[str]:
    root = state.folder.root
    states = ", ".join(f"{count} {name}" for name, count in state.counts.items())
    summary = f"summary.csv and tables/ in {root}" if state.folder.summary_path.exists() else "no summary yet"
    who = [f"{p.launcher} launcher {p.pid} on {p.machine}" for p in state.live.launchers]
    lines = [f"{states}; {summary}", *([state.live.note] if state.live.note else []), *who]
    open_cells = sum(state.counts[name] for name in ("partial", "missing"))
    if open_cells and not state.live.busy:
        lines.append("Nobody works on what is left: the command that started the run goes on with it.")
    return lines


# ------------------------------------------------------------------------------------------------------ watching


def _watch(folder: RunFolder) -> None:
    """Show the state until nothing goes on; the queue is asked less often than files are read."""
    console = stdout_console()
    if not console.is_terminal:
        _watch_lines(folder, console)
        return
    from rich.live import Live as Display

    with Display(console=console, auto_refresh=False, transient=False) as display:
        for state in _looks(folder):
            display.update(_screen(state, console.size.height), refresh=True)


def _watch_lines(folder: RunFolder, console: Console) -> None:
    """A line whenever something has changed."""
    before = ""
    for state in _looks(folder):
        line = f"{_batches(state)}; {'; '.join(_lines(state))}"
        if line != before:
            console.print(line, highlight=False, soft_wrap=True)
        before = line


def _looks(folder: RunFolder) -> Any:
    """States until nothing has gone on for a while."""
    idle, asked, live = 0, -SLURM_EVERY_S, None
    while idle < IDLE_LOOKS:
        if live is None or time.monotonic() - asked >= SLURM_EVERY_S:
            asked, live = time.monotonic(), look(folder)
        else:
            fresh = look(folder, slurm=False)
            live = Live(fresh.working, live.queue, live.note, fresh.launchers)
        state = state_of(folder, live)
        yield state
        idle = 0 if live.busy else idle + 1
        try:
            time.sleep(EVERY_S if idle < IDLE_LOOKS else 0)
        except KeyboardInterrupt:
            return


def _batches(state: State) -> str:
    done, of = (sum(getattr(report, name) for report in state.reports) for name in ("completed", "batches"))
    return f"{done}/{of} batches"


def _screen(state: State, height: int) -> RenderableType:
    """What fits on a terminal: cells that something is going on with first."""
    from rich.console import Group
    from rich.text import Text

    order = {name: i for i, name in enumerate(FIRST)}
    rows = sorted(state.reports, key=lambda report: order.get(report.state, len(order)))
    room = max(3, height - 8)
    more = [Text(f"and {len(rows) - room} more cells", style="dim")] if len(rows) > room else []
    lines = [Text(line) for line in (_batches(state), *_lines(state))]
    return Group(_grid(state, rows[:room]), *more, *lines)
