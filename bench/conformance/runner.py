"""The kit from outside: starts the worker, watches the clock, and makes rows of what it reports.

A check that takes longer than the limit is stopped with its process and counts as failed; the worker is started again
for the checks that are left. The limit is on the clock for a check that does nothing, and on its own processor time for
one that works: a busy machine makes no check fail. The worker's working folder is an empty one that is removed
afterwards: the run folder, as far as the method can tell.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tsdfm_bench.conformance.report import Report, Result, Row, Verdict, summarise
from tsdfm_bench.conformance.subject import Target

LIMIT_S = 120.0
_POLL_S = 0.02
_IDLE = 0.01  # of a processor: who gets less is waiting for something, not for its turn
_LONGEST = 10  # times the limit, on the clock

Progress = Callable[[str], None]


@dataclass
class _State:
    """What is known so far."""

    settings: list[str] = field(default_factory=list)
    results: dict[tuple[str, str], Result] = field(default_factory=dict)
    current: tuple[str, str] = ("contract", "")
    ended: bool = False

    def add(self, check: str, setting: str, verdict: Verdict, seen: str, seconds: float = 0.0) -> None:
        self.results[check, setting] = Result(check, setting, verdict, seen, seconds)


def conform(
    target: Target,
    only: Sequence[str] | None = None,
    limit_s: float = LIMIT_S,
    progress: Progress | None = None,
    *,
    isolated: bool = True,
) -> Report:
    """Test a method.

    Args:
        target: which.
        only: ids of checks; what they need is run too. None = all.
        limit_s: seconds a check of one setting may take.
        progress: told what is being checked.
        isolated: in a process of its own; False = here, where a debugger reaches it and nothing stops it.

    Raises:
        UsageError: an unknown check.
    """
    from tsdfm_bench.conformance.catalogue import CHECKS, select

    checks = select(only)
    state = _State()
    with tempfile.TemporaryDirectory(prefix="tsdfm-conform-") as scratch:
        if not isolated:
            _here(target, [check.id for check in checks], state, Path(scratch).resolve(), progress)
        while not state.ended:
            _worker(target, [check.id for check in checks], state, Path(scratch).resolve(), limit_s, progress)
    rows: list[Row] = []
    for check in CHECKS:
        if check in checks:
            results = [result for (name, _), result in state.results.items() if name == check.id]
            results = results or [Result(check.id, "", "skipped", "needs 'contract'")]
            rows.append(summarise(check.id, check.title, check.explanation, results))
    return Report(str(target), tuple(state.settings), tuple(rows))


def _here(target: Target, checks: list[str], state: _State, scratch: Path, progress: Progress | None) -> None:
    """All checks in this process, with the scratch folder as the run folder and for temporary files."""
    from tsdfm_bench.conformance.worker import run_checks

    before, temporary = Path.cwd(), tempfile.tempdir
    try:
        os.chdir(scratch)
        tempfile.tempdir = str(scratch)
        run_checks(target, checks, [], lambda **event: _take(event, state, progress))
    finally:
        tempfile.tempdir = temporary
        os.chdir(before)
    state.ended = True


def _worker(
    target: Target, checks: list[str], state: _State, scratch: Path, limit_s: float, progress: Progress | None
) -> None:
    """One worker process, until it ends, dies, or is stopped."""
    folder = scratch / "run"
    temporary = scratch / "tmp"
    for path in (folder, temporary):
        path.mkdir(exist_ok=True)
    job, results = scratch / "job.json", scratch / f"results-{time.monotonic_ns()}.jsonl"
    done = [[check, setting, result.verdict] for (check, setting), result in state.results.items()]
    asked = {"target": target.to_json(), "checks": checks, "done": done, "parent": os.getpid()}
    job.write_text(json.dumps(asked), encoding="utf-8")
    results.touch()
    command = [sys.executable, "-m", "tsdfm_bench.conformance.worker", str(job), str(results)]
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}
    with (scratch / "stdout").open("ab") as out, (scratch / "stderr").open("ab") as err:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            silent = _follow(process, results, state, limit_s, progress)
        finally:
            _stop(process)
    if state.ended:
        return
    check, setting = state.current
    why = f"no answer within {limit_s:g} seconds" if silent else _last_words(process.returncode, scratch / "stderr")
    state.add(check, setting or "default", "fail", why, limit_s if silent else 0.0)
    if not state.settings:
        state.ended = True


def _follow(
    process: subprocess.Popen[bytes], results: Path, state: _State, limit_s: float, progress: Progress | None
) -> bool:
    """Read along until the worker ends (False) or is silent for too long (True)."""
    patience = Patience(limit_s, time.monotonic(), _cpu_s(process.pid))
    with results.open(encoding="utf-8") as file:
        pending = ""
        while True:
            alive = process.poll() is None
            pending += file.read()
            *lines, pending = pending.split("\n")
            for line in lines:
                _take(json.loads(line), state, progress)
                patience = Patience(limit_s, time.monotonic(), _cpu_s(process.pid))
            if state.ended or not alive:
                return False
            if patience.due(time.monotonic()) and patience.over(time.monotonic(), _cpu_s(process.pid)):
                return True
            if not lines:
                time.sleep(_POLL_S)


class Patience:
    """Whether a silent worker has had its time. Asked four times per limit, so that what stands still is seen.

    Args:
        limit_s: seconds a check may take.
        now_s: monotonic clock.
        cpu_s: processor time the worker has used so far, or None where that is not known.
    """

    def __init__(self, limit_s: float, now_s: float, cpu_s: float | None) -> None:
        self.limit_s = limit_s
        self.start = self.mark = (now_s, cpu_s)

    def due(self, now_s: float) -> bool:
        """Whether it is time to look again."""
        return now_s - self.mark[0] >= self.limit_s / 4

    def over(self, now_s: float, cpu_s: float | None) -> bool:
        """True if it must be stopped."""
        (before_s, worked_before), self.mark = self.mark, (now_s, cpu_s)
        elapsed = now_s - self.start[0]
        if elapsed < self.limit_s:
            return False
        if cpu_s is None or worked_before is None or self.start[1] is None or elapsed >= _LONGEST * self.limit_s:
            return True
        idle = cpu_s - worked_before < _IDLE * (now_s - before_s)
        return idle or cpu_s - self.start[1] >= self.limit_s


def _cpu_s(pid: int) -> float | None:
    """Processor time of a process and its ended children, in seconds; None where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None


def _take(event: dict[str, Any], state: _State, progress: Progress | None) -> None:
    """One event of the worker."""
    match event["event"]:
        case "plan":
            state.settings = list(event["settings"])
        case "start":
            state.current = (event["check"], event["setting"])
            if progress is not None and event["setting"]:
                progress(f"{event['check']} ({event['setting']})")
        case "result":
            state.add(event["check"], event["setting"], event["verdict"], event["seen"], event["seconds"])
        case "broken":
            state.add("contract", "default", "fail", event["seen"])
            state.ended = True
        case "end":
            state.ended = True


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the worker and what it started."""
    with suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def _last_words(code: int, stderr: Path) -> str:
    """Why a worker ended that should not have."""
    text = stderr.read_text("utf-8", "replace").strip() if stderr.exists() else ""
    last = f": {text.splitlines()[-1][:200]}" if text else ""
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return f"the process {how} during this check{last}"
