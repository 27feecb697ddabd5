"""A bounded pool of worker processes that do job files.

A process is started for each place of the pool and does one job after another, so that Python and torch are imported
once. A job whose process dies is done again by another one; the units that it had finished are there. Nothing comes
back but files: the pool looks for result files, and reads progress files while it waits.

The workers read from a pipe that only this process holds. If this process dies, however it dies, the pipe ends and the
workers stop.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tsdfm_bench.errors import BenchError
from tsdfm_bench.launch.work import Launch, Work, result_path
from tsdfm_bench.results.files import CorruptFile, make_folder, read_json, remove

POLL_S = 0.1
STOP_S = 8.0
MOST_TRIES = 4  # of a job whose processes die
MOST_STARTS = 3  # of a place whose processes die before they do anything
LOG_LINES = 6


class WorkerTrouble(BenchError):
    """Worker processes cannot be kept alive."""


@dataclass
class Place:
    """One place of the pool: a process and what it does."""

    number: int
    log: Path
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    work: Work | None = None
    file: Path | None = None
    starts: int = 0
    output: IO[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of its process; 0 if there is none."""
        return self.process.pid if self.process is not None else 0


@dataclass
class Pool:
    """Worker processes and the jobs they are to do.

    Args:
        launch: whose job files they are.
        environments: one for each place: variables beyond this process's own.
        say: tells a person something.
    """

    launch: Launch
    environments: Sequence[Mapping[str, str]]
    say: Callable[[str], None]
    places: list[Place] = field(default_factory=list)
    tries: dict[str, int] = field(default_factory=dict)

    def run(
        self,
        works: Sequence[Work],
        look: Callable[[Work, Path, bool], None],
        again: Callable[[Work, dict[str, Any]], bool],
    ) -> dict[str, dict[str, Any]]:
        """Do works, each after those it needs.

        Args:
            works: to be done.
            look: called for a running work now and then, and once with True when it has ended.
            again: whether a work with such a result has to be done again; asked until it says no.

        Returns:
            the results by name; a work whose processes died again and again has state "error".

        Raises:
            WorkerTrouble: no worker can be kept alive.
            KeyboardInterrupt: workers are stopped by `close`.
        """
        files = dict(zip([work.name for work in works], self.launch.write(works), strict=True))
        waiting = deque(works)
        later: list[tuple[float, Work]] = []
        results: dict[str, dict[str, Any]] = {}
        while waiting or later or any(place.work is not None for place in self.places):
            now = time.monotonic()
            for due in [item for item in later if item[0] <= now]:
                later.remove(due)
                waiting.append(due[1])
            self._hand_out(waiting, files, results, len(works))
            ended = [place for place in self.places if place.work is not None and self._ended(place)]
            for place in ended:
                work, file = place.work, place.file
                assert work is not None
                assert file is not None
                result = _read(file)
                place.work = place.file = None
                if result is None:
                    result = self._died(place, work)
                    if result is None:
                        waiting.appendleft(work)
                        continue
                look(work, file, True)
                results[work.name] = result
                if again(work, result):
                    later.append((now + 1.0, work))
            for place in self.places:
                if place.work is not None and place.file is not None:
                    look(place.work, place.file, False)
            if not ended:
                time.sleep(POLL_S)
        return results

    def _hand_out(
        self, waiting: deque[Work], files: Mapping[str, Path], results: Mapping[str, object], of: int
    ) -> None:
        """Give jobs whose needs are met to places that are free, starting processes as needed."""
        while len(self.places) < min(len(self.environments), of):
            number = len(self.places)
            place = Place(number, self.launch.folder / f"worker-{number}.log", self.environments[number])
            self.places.append(place)
        for place in self.places:
            if place.work is not None:
                continue
            work = next((w for w in waiting if all(n in results or n not in files for n in w.needs)), None)
            if work is None:
                return
            waiting.remove(work)
            place.work, place.file = work, files[work.name]
            remove(result_path(place.file))
            self._start(place)
            assert place.process is not None
            assert place.process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has just died: found out by `_ended`
                place.process.stdin.write(f"{place.file}\n".encode())
                place.process.stdin.flush()

    def _start(self, place: Place) -> None:
        if place.process is not None and place.process.poll() is None:
            return
        _let_go(place)
        make_folder(place.log.parent)
        place.output = place.log.open("ab")
        place.starts += 1
        place.process = subprocess.Popen(
            # -P: nothing in the working folder shadows a module
            [sys.executable, "-P", "-m", "tsdfm_bench.launch.worker", "--serve"],
            stdin=subprocess.PIPE,
            stdout=place.output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **place.environment},
            start_new_session=True,  # Ctrl-C is for this process, which then stops them in order
        )

    def _ended(self, place: Place) -> bool:
        assert place.process is not None
        assert place.file is not None
        dead = place.process.poll() is not None  # asked first: a result may come just before the end
        return result_path(place.file).exists() or dead

    def _died(self, place: Place, work: Work) -> dict[str, Any] | None:
        """A process died in a job: None to have it done again, or what is recorded instead of a result.

        Raises:
            WorkerTrouble: processes die before they can do anything.
        """
        assert place.process is not None
        how, tries = _how(place.process.returncode), self.tries.get(work.name, 0) + 1
        self.tries[work.name] = tries
        last = _last_lines(place.log)
        if place.starts >= MOST_STARTS and not any(_began(place.log)):
            raise WorkerTrouble(f"worker processes die at once ({how}). The last lines of {place.log}:\n{last}")
        if tries < MOST_TRIES:
            self.say(f"Worker {place.number + 1} (process {place.pid}) {how}; another one goes on where it was.")
            return None
        error = f"{tries} worker processes died in this job (the last {how}); see {place.log}"
        return {"name": work.name, "state": "error", "units": len(work.units), "error": error, "busy": [], "failed": {}}

    def close(self) -> None:
        """Stop all workers: first by ending their input, then by force. Finished batches are kept."""
        for place in self.places:
            if place.process is not None and place.process.stdin is not None:
                with contextlib.suppress(OSError):
                    place.process.stdin.close()
        until = time.monotonic() + STOP_S
        for place in self.places:
            if place.process is None:
                continue
            try:
                place.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                place.process.kill()
                place.process.wait()
            _let_go(place)


def _let_go(place: Place) -> None:
    if place.process is not None and place.process.stdin is not None:
        with contextlib.suppress(OSError):
            place.process.stdin.close()
    if place.output is not None:
        place.output.close()
        place.output = None


def _read(file: Path) -> dict[str, Any] | None:
    """The result of a job; None if there is none, or none that can be read."""
    path = result_path(file)
    try:
        return dict(read_json(path)) if path.exists() else None
    except CorruptFile:
        return None


def _how(code: int | None) -> str:
    """How a process ended, in words."""
    if code is not None and code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"was killed by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")
    return f"ended with exit code {code}"


def _last_lines(log: Path) -> str:
    with contextlib.suppress(OSError):
        lines = log.read_text("utf-8", "replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-LOG_LINES:])
    return ""


def _began(log: Path) -> list[bool]:
    """Whether any job of the launch has a progress file: then workers can start."""
    return [True for _ in log.parent.glob("*/*.progress.json")]
