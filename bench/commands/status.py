"""`tsdfm-bench status`: how far a run folder is, and what goes on with it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdfm_bench.commands.folders import run_folder
from tsdfm_bench.commands.live import Live, look, scoring_state, with_live
from tsdfm_bench.commands.state import CellReport, report_cells
from tsdfm_bench.commands.training import training_folder, training_status
from tsdfm_bench.commands.watching import watch
from tsdfm_bench.console import stdout_console
from tsdfm_bench.results.store import RunFolder

if TYPE_CHECKING:
    from rich.console import RenderableType

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

    @property
    def busy(self) -> bool:
        """See `Shown`."""
        return self.live.busy

    def line(self) -> str:
        """See `Shown`."""
        return f"{self._batches()}; {'; '.join(_lines(self))}"

    def screen(self, height: int) -> RenderableType:
        """See `Shown`: cells that something is going on with first."""
        from rich.console import Group
        from rich.text import Text

        order = {name: i for i, name in enumerate(FIRST)}
        rows = sorted(self.reports, key=lambda report: order.get(report.state, len(order)))
        room = max(3, height - 8)
        more = [Text(f"and {len(rows) - room} more cells", style="dim")] if len(rows) > room else []
        lines = [Text(line) for line in (self._batches(), *_lines(self))]
        return Group(_grid(self, rows[:room]), *more, *lines)

    def _batches(self) -> str:
        done, of = (sum(getattr(report, name) for report in self.reports) for name in ("completed", "batches"))
        return f"{done}/{of} batches"


def state_of(folder: RunFolder, live: Live | None = None) -> State:
    """Read a run folder; `live` if Slurm was asked a moment ago."""
    plan = folder.read_plan()
    now = look(folder) if live is None else live
    reports = [with_live(report, now, folder) for report in report_cells(plan, folder)]
    return State(folder, reports, {str(name): folder.scored(str(name)) for name in plan["scorers"]}, now)


def status_command(folder: Path | None, as_json: bool, watching: bool = False) -> int:
    """Print the state of every cell, its scores, what goes on, and whether there is a summary.

    Args:
        folder: a run folder or a folder of checkpoints that a launcher trains, or None for the newest run.
        as_json: print JSON.
        watching: print again and again until nothing goes on any more.
    """
    if (training := training_folder(folder)) is not None:
        return training_status(training, as_json, watching)
    found = run_folder(folder)
    if as_json:
        print(json.dumps(_json(state_of(found)), indent=2))
    elif watching:
        watch(_look_again(found))
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


def _look_again(folder: RunFolder) -> Callable[[bool], State]:
    """Looks at a run; the queue is asked only if that is allowed."""
    live: Live | None = None

    def once_more(ask: bool) -> State:
        nonlocal live
        live = look(folder) if ask or live is None else live.refreshed(folder)
        return state_of(folder, live)

    return once_more
