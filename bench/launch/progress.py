"""How far a worker is, from its process to whoever watches, by way of a small file beside its job file.

    state        "running", or the state of the result
    phase        "sampling", "scoring", ... as a `Reporter` calls it
    doing        the cell, or what else takes time
    work         what the phase has to do, in its own unit; work_done of it is done, work_share is a part of a batch
    count, unit  things to make (sequences, texts); count_done of them are made
    notes        what a person should be told, in order
    counter      grows with every report, so that a watcher needs no clock but its own
    pid, host, time

The file is replaced as a whole, at most every `every_s` seconds, and not flushed to the disk: it is worth nothing
later.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tsdfm_bench.console import Phase, Reporter, say
from tsdfm_bench.launch.work import progress_path
from tsdfm_bench.results.files import write_json


class FileReporter(Reporter):
    """Reports to a progress file; notes also go to stderr, which a launcher keeps as the job's log.

    Args:
        job_file: of the work.
        every_s: seconds between reports.
    """

    def __init__(self, job_file: str | os.PathLike[str], every_s: float = 1.0) -> None:
        self.path = progress_path(job_file)
        self.every_s = every_s
        self.notes: list[str] = []
        self._content: dict[str, Any] = {}
        self._counter = 0
        self._last = -float("inf")
        self._write("running", force=True)

    def note(self, text: str, style: str = "") -> None:
        """One line of text."""
        self.notes.append(text)
        say(text)
        self._write("running", force=True)

    @contextmanager
    def phase(self, name: str, work: float, count: int, unit: str) -> Iterator[Phase]:
        """Report one phase while the block runs."""
        phase = Phase(name, work, count, unit)
        phase.show = self._show
        phase.show(phase)
        try:
            yield phase
        finally:
            self._show(phase, force=True)

    def end(self, state: str) -> None:
        """The last report."""
        self._write(state, force=True)

    def _show(self, phase: Phase, force: bool = False) -> None:
        self._content = {
            "phase": phase.name,
            "doing": phase.current,
            "work": phase.work,
            "work_done": phase.work_done,
            "work_share": phase.under_way,
            "count": phase.count,
            "count_done": phase.count_done,
            "unit": phase.unit,
        }
        self._write("running", force)

    def _write(self, state: str, force: bool) -> None:
        now = time.monotonic()
        if not force and now - self._last < self.every_s:
            return
        self._last = now
        self._counter += 1
        about = {"pid": os.getpid(), "host": socket.gethostname(), "time": time.time(), "counter": self._counter}
        with contextlib.suppress(OSError, ValueError):  # progress is not worth a failure
            content = {"state": state, **self._content, "notes": self.notes, **about}
            write_json(self.path, content, checksum=False, durable=False)


@dataclass(frozen=True)
class Progress:
    """What a progress file said; zeros if there is none yet."""

    state: str = ""
    phase: str = ""
    doing: str = ""
    work: float = 0.0
    work_done: float = 0.0
    work_share: float = 0.0
    count: int = 0
    count_done: int = 0
    unit: str = ""
    notes: Sequence[str] = ()
    counter: int = 0
    pid: int = 0
    host: str = ""
    time: float = 0.0


def read_progress(job_file: str | os.PathLike[str]) -> Progress:
    """How far the worker of a job is; a file that cannot be read says nothing."""
    try:
        return Progress(**json.loads(progress_path(job_file).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return Progress()


@dataclass
class Watch:
    """Adds up the progress of several jobs in one phase.

    Args:
        phase: what the user sees.
        reporter: for notes.
    """

    phase: Phase
    reporter: Reporter
    _work: dict[Path, float] = field(default_factory=dict)
    _count: dict[Path, int] = field(default_factory=dict)
    _share: dict[Path, float] = field(default_factory=dict)
    _notes: dict[Path, int] = field(default_factory=dict)

    def look(self, job_file: Path, weight: float, count: int, ended: bool = False) -> None:
        """Take in what a job has reported since the last look.

        Args:
            job_file: of the work.
            weight: its share of the phase's work.
            count: how many things of the phase it makes.
            ended: it has ended: all of its share counts as done.
        """
        found = read_progress(job_file)
        known = self._notes.get(job_file, 0)
        for note in found.notes[known:]:
            self.reporter.note(note, style="yellow")
        self._notes[job_file] = max(known, len(found.notes))
        share = 1.0 if ended else min(1.0, found.work_done / found.work) if found.work > 0 else 0.0
        made = count if ended else min(count, found.count_done)
        work = max(0.0, weight * share - self._work.get(job_file, 0.0))
        things = max(0, made - self._count.get(job_file, 0))
        self._work[job_file] = self._work.get(job_file, 0.0) + work
        self._count[job_file] = self._count.get(job_file, 0) + things
        self._share[job_file] = 0.0 if ended or found.work <= 0 else weight * min(1.0, found.work_share / found.work)
        if work or things:
            self.phase.advance(work, things)
        self.phase.progress(sum(self._share.values()))
        if found.doing and not ended:
            self.phase.doing(found.doing)

    def forget(self, job_file: Path) -> None:
        """A job starts again: its notes and what it reports count from now on; what was counted stays counted."""
        self._share.pop(job_file, None)
        self._notes.pop(job_file, None)
