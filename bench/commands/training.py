"""How far a training is that was handed to a launcher: its stages, by files first, and what Slurm adds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tsdfm_bench.commands.live import Live, look, waiting_state, why_waiting
from tsdfm_bench.commands.watching import watch
from tsdfm_bench.console import stdout_console
from tsdfm_bench.launch.leases import Holder, workers
from tsdfm_bench.launch.training import CHECKPOINT, STATE, STATE_FILE, TrainFolder
from tsdfm_bench.launch.work import VersionSkew, Work, launches, read_work, result_path
from tsdfm_bench.results.files import StoreError, read_json
from tsdfm_bench.summary import reason_of

if TYPE_CHECKING:
    from rich.console import RenderableType

STYLES = {"done": "", "failed": "red", "running": "cyan", "requeued and waiting": "yellow"}


@dataclass(frozen=True)
class StageReport:
    """A stage and how far it is.

    Args:
        stage, needs: its name, and those of the stages before it.
        state: "done", "running", "queued", "requeued and waiting", "failed", "partial" or "missing".
        done, steps: trained, as far as its worker says, and wanted.
        reason: why it failed or waits.
    """

    stage: str
    needs: tuple[str, ...]
    state: str
    done: int
    steps: int
    reason: str = ""


@dataclass(frozen=True)
class Training:
    """One look at a training; see `Shown`.

    Args:
        folder: of the checkpoints.
        stages: all that were handed to a launcher.
        live: what goes on.
    """

    folder: TrainFolder
    stages: list[StageReport]
    live: Live

    @property
    def busy(self) -> bool:
        """Whether anything goes on with it."""
        return self.live.busy

    def lines(self) -> list[str]:
        """What is to be said under the table."""
        counts = Counter(report.state for report in self.stages)
        who = [f"{p.launcher} launcher {p.pid} on {p.machine}" for p in self.live.launchers]
        states = ", ".join(f"{count} {state}" for state, count in counts.items())
        lines = [states, *([self.live.note] if self.live.note else []), *who]
        if not self.busy and set(counts) - {"done"}:
            lines.append("Nobody works on what is left: the command that started the training goes on with it.")
        return lines

    def line(self) -> str:
        """See `Shown`."""
        running = [f"{r.stage} {r.done:,}/{r.steps:,} steps {r.reason}" for r in self.stages if r.state == "running"]
        return "; ".join([*running, *self.lines()])

    def table(self) -> RenderableType:
        """A row a stage."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=str(self.folder.root), title_justify="left")
        for name in ("stage", "after"):
            grid.add_column(name)
        grid.add_column("steps", justify="right")
        grid.add_column("state")
        for report in self.stages:
            grid.add_row(
                *(Text(text) for text in (report.stage, ", ".join(report.needs) or "–")),
                Text(f"{report.done:,}/{report.steps:,}" if report.done else f"{report.steps:,}"),
                Text(report.state + (f": {report.reason}" if report.reason else "")),
                style=STYLES.get(report.state, "dim"),
            )
        return grid

    def screen(self, height: int) -> RenderableType:
        """See `Shown`."""
        from rich.console import Group
        from rich.text import Text

        return Group(self.table(), *(Text(line) for line in self.lines()))


def training_folder(folder: Path | None) -> TrainFolder | None:
    """The folder, if a training was handed to a launcher for it."""
    found = None if folder is None else TrainFolder(folder)
    return found if found is not None and launches(found) else None


def training_of(folder: TrainFolder, live: Live) -> Training:
    """Read a folder of checkpoints."""
    held = workers(folder.leases_folder)
    stages = [_report(folder, work, file, held, live) for work, file in _works(folder).values()]
    return Training(folder, stages, live)


def _works(folder: TrainFolder) -> dict[str, tuple[Work, Path]]:
    """The works that launchers have written, the newest of each name."""
    found: dict[str, tuple[Work, Path]] = {}
    for launch in launches(folder):
        for path in sorted(launch.folder.glob("*/train-*.json")):
            if path.name.count(".") == 1:  # no progress, no result
                try:
                    found[path.stem] = (read_work(path), path)
                except (StoreError, VersionSkew, TypeError):
                    continue
    return found


def _report(folder: TrainFolder, work: Work, file: Path, held: Mapping[str, Holder], live: Live) -> StageReport:
    stage, steps = str(work.stage["stage"]), round(work.weight)
    needs = tuple(name.removeprefix("train-") for name in work.needs)
    if (folder.root / stage / CHECKPOINT).is_file():
        return StageReport(stage, needs, "done", steps, steps)
    holder, task = held.get(work.name), None if live.queue is None else live.queue.alive.get(work.name)
    done = 0 if holder is None else int(holder.about.get("done", 0))
    if holder is not None:
        speed = f": {holder.about['speed']}" if "speed" in holder.about else ""
        return StageReport(stage, needs, "running", done, steps, f"on {holder.machine}{speed}")
    begun = (folder.root / STATE / stage / STATE_FILE).is_file()
    if task is not None and not task.waiting:
        return StageReport(stage, needs, "running", done, steps, f"job {task.id} on {task.node or 'a node'}")
    if task is not None:
        return StageReport(stage, needs, waiting_state(task, begun), done, steps, f"job {task.id}{why_waiting(task)}")
    reason = _failure(file)
    return StageReport(stage, needs, "failed" if reason else "partial" if begun else "missing", done, steps, reason)


def _failure(file: Path) -> str:
    """What ended the last job of a stage, on one line; "" if it left nothing or was only stopped."""
    try:
        result = read_json(result_path(file))
    except StoreError:
        return ""
    return reason_of(str(result.get("error") or "")) if result.get("state") in ("error", "refused") else ""


def training_status(folder: TrainFolder, as_json: bool, again: bool) -> int:
    """Print the state of every stage, what goes on, and how to go on; see `status_command`."""
    live = look(folder)
    if as_json:
        found = training_of(folder, live)
        print(json.dumps({"folder": str(folder.root), "stages": [asdict(r) for r in found.stages]}, indent=2))
        return 0
    if not again:
        console = stdout_console()
        found = training_of(folder, live)
        console.print(found.table())
        for line in found.lines():
            console.print(line, highlight=False, soft_wrap=True)
        return 0

    def once_more(ask: bool) -> Training:
        nonlocal live
        live = look(folder) if ask else live.refreshed(folder)
        return training_of(folder, live)

    watch(once_more)
    return 0
