"""Runs in forked processes (all is imported once, so that a process costs milliseconds and can be killed often), and a
simulated Slurm cluster.

The simulation stands in for `submit`, `tasks` (squeue), `array_limit` and `cancel`; records are written as always. Jobs
do what a test says: they finish their units, are lost, or leave a result.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tsdfm_bench.launch import slurm_rounds
from tsdfm_bench.launch.slurm_jobs import Record, record_path
from tsdfm_bench.launch.slurm_queue import SlurmError, Task
from tsdfm_bench.launch.slurm_rounds import Part, Parts
from tsdfm_bench.launch.work import Launch, Piece, Work, result_path
from tsdfm_bench.results.files import write_json
from tsdfm_bench.results.store import RunFolder

STEADY = Path(__file__).parent / "steady.py"


@pytest.fixture
def steady() -> Path:
    """The plug-in file that logs its batches."""
    return STEADY


@pytest.fixture
def processes() -> SimpleNamespace:
    """`fork` and `wait`."""
    return SimpleNamespace(fork=fork, wait=wait)


def fork(work: Callable[[], int], said: Path | None = None) -> int:
    """Run something in a forked process, with stdout and stderr in a file or nowhere; its number."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sink = os.open(said or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        sys.stdout = sys.__stdout__ = os.fdopen(1, "w", 1, closefd=False)
        sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, closefd=False)
        code = work()
    finally:
        os._exit(code)


def wait(pid: int, timeout_s: float = 120.0) -> int:
    """The exit code of a forked process, negative for a signal; an AssertionError if it does not end."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"process {pid} did not end in {timeout_s} s")


# ---------------------------------------------------------------------------------------------------------------- Slurm


@dataclass
class Simulation(Parts):
    """A cluster and what it has to do.

    Args:
        folder: the run.
        sample, score: keys of the units that are left; scores are named "<cell>-by-toy".
        limit: of an array.
        together: units of a job.
        fate: what becomes of a task: "done", "lost", "stays", or a result that it leaves ("state": "error" or "refused"
            means that the job has failed).
        gone: what "done" means for units that are no cells.
    """

    folder: RunFolder
    sample: list[str]
    score: list[str] = field(default_factory=list)
    limit: int = 1001
    together: int = 1
    fate: Callable[[str], Any] = lambda key: "done"
    found: dict[str, Task] = field(default_factory=dict)
    units: dict[str, Sequence[str]] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    submitted: list[Record] = field(default_factory=list)
    given_up: dict[str, str] = field(default_factory=dict)
    looks: int = 0
    left_looks: int = 0
    progress: dict[str, float] = field(default_factory=dict)
    refuses: int = 0
    names: Mapping[str, str] = field(default_factory=dict)
    after: dict[str, Sequence[str]] = field(default_factory=dict)
    gone: Callable[[Collection[str]], None] | None = None

    # ------------------------------------------------------------------------------------------- what is to be done

    def left(self) -> list[Part]:
        self.left_looks += 1
        parts = []
        for stage, keys in (("sample", self.sample), ("score", self.score)):
            kind = "methods" if stage == "sample" else "scorers"
            for key in keys:
                if key not in self.given_up:
                    name = self.names.get(key, "m") if stage == "sample" else "toy"
                    piece = Piece({"id": key.partition("-")[0]}, name, 1.0, key)
                    needs = tuple(cell for cell in self.sample if stage == "score" and key.startswith(f"{cell}-"))
                    parts.append(Part(key, stage, piece, kind, name, self.progress.get(key, 0.0), needs))
        return parts

    def works(self, parts: Sequence[Part], parameters: Mapping[str, Any], first: int) -> list[tuple[Work, list[Part]]]:
        packed = [list(parts[i : i + self.together]) for i in range(0, len(parts), self.together)]
        return [
            (Work(some[0].stage, f"{some[0].stage}-{first + i:05d}", some[0].key, "", {}), some)  # type: ignore[arg-type]
            for i, some in enumerate(packed)
        ]

    def farewell(self, name: str) -> str:
        return f"come back to {name}"

    def give_up(self, part: Part, reason: str) -> None:
        self.given_up[part.key] = reason

    # --------------------------------------------------------------------------------------------------------- Slurm

    def submit(
        self,
        launch: Launch,
        stage: str,
        name: str,
        files: Sequence[Path],
        units: Sequence[Sequence[str]],
        parameters: Mapping[str, Any],
        after: Sequence[Record] = (),
        kind: str = "afterany",
    ) -> Record:
        if self.refuses:
            self.refuses -= 1
            raise SlurmError("sbatch refused: invalid partition specified: nope")
        number = len(self.submitted)
        job = str(1000 + number)
        texts = [str(path) for path in files]
        record = Record(
            f"{stage}-{number:03d}", name, stage, texts, units, [r.token for r in after], number, parameters, job
        )
        write_json(record_path(launch, record.token), asdict(record))
        self.submitted.append(record)
        self.after[job] = [earlier.job for earlier in after] if kind == "afterok" else []
        for index, keys in enumerate(units):
            task = Task(job, index, "PENDING", comment=record.token)
            self.found[task.id], self.units[task.id], self.files[task.id] = task, keys, files[index]
        return record

    def tasks(self, name: str) -> list[Task]:
        self.looks += 1
        return list(self.found.values())

    def step(self, seconds: float) -> None:
        """Time passes: every living task meets its fate."""
        for id, task in self.found.items():
            if not task.alive or self._waits(id):
                continue
            fate = self.fate(self.units[id][0])
            if fate == "stays":
                continue
            if fate == "lost":
                self.found[id] = replace(task, state="NODE_FAIL")
                continue
            self.found[id] = replace(self.found[id], state="COMPLETED")
            if isinstance(fate, Mapping):
                if fate["state"] in ("error", "refused"):
                    self.found[id] = replace(self.found[id], state="FAILED")
                write_json(result_path(self.files[id]), {"failed": {}, "busy": [], "error": "", **fate})
                continue
            gone = set(self.units[id])
            if self.gone is not None:
                self.gone(gone)
            self.sample = [key for key in self.sample if key not in gone]
            self.score = [key for key in self.score if key not in gone]

    def _waits(self, id: str) -> bool:
        """Whether a task waits for the success of others, as sbatch's `afterok` has it."""
        before = [task for job in self.after[self.found[id].job] for task in self.found.values() if task.job == job]
        if any(not task.alive and task.state != "COMPLETED" for task in before):
            self.found[id] = replace(self.found[id], reason="DependencyNeverSatisfied")
        return any(task.state != "COMPLETED" for task in before)

    def cancel(self, ids: Sequence[str]) -> None:
        """As scancel."""
        for id in ids:
            self.found[id] = replace(self.found[id], state="CANCELLED")


@pytest.fixture
def simulate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Simulation]:
    """Makes a simulated cluster and puts it in place of Slurm."""
    monkeypatch.setattr("os.fsync", lambda handle: None)

    def make(**given: Any) -> Simulation:
        found = Simulation(RunFolder(tmp_path / "run"), **given)
        monkeypatch.setattr(slurm_rounds, "submit", found.submit)
        monkeypatch.setattr(slurm_rounds, "tasks", found.tasks)
        monkeypatch.setattr(slurm_rounds, "array_limit", lambda: found.limit)
        monkeypatch.setattr(slurm_rounds, "cancel", found.cancel)
        return found

    return make
