"""What a worker process runs: one job file, or job files one after another from its standard input.

    python -m tsdfm_bench.launch.worker JOBFILE        does it, prints the result as one line of JSON
    python -m tsdfm_bench.launch.worker --serve        a path a line on stdin, until its end
    work(JOBFILE)                                      the same as a function

The result is a small plain dictionary of JSON values and is also left in a file beside the job file:

    name       of the job
    state      "done": nothing is left of it; "busy": some units are being worked on by other living processes;
               "failed": some units failed; "refused": versions differ; "stopped": interrupted; "error": see `error`
    units      how many it has
    done       how many are complete now
    failed     {unit: reason}
    busy       units held by other living processes
    notes      what a person should be told (a takeover, a damaged file)
    error      what ended the job as a whole, or ""

`work` never raises but for KeyboardInterrupt: finished batches are kept. With --serve, the end of stdin while a job
runs means that whoever started the worker is gone: the worker stops too, so that a killed launcher leaves no processes
behind. SIGTERM means the same.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

GRACE_S = 20.0


def work(job_file: str) -> dict[str, Any]:
    """Do the work of a job file; see the module for the result.

    Raises:
        KeyboardInterrupt: the result file says "stopped".
    """
    from tsdfm_bench.launch.duty import perform

    return perform(job_file)


def follow(job_file: str) -> dict[str, Any]:
    """The share that the other nodes of a job of several have in its work; the first node leaves the result file.

    Raises:
        BenchError: it failed here.
        KeyboardInterrupt: it was stopped.
    """
    from tsdfm_bench.launch.duty import take_part

    return take_part(job_file)


def serve() -> int:
    """Do the jobs that are named on stdin, in order; 0 at its end."""
    todo: queue.Queue[str | None] = queue.Queue()
    working = threading.Event()
    jobs = os.fdopen(os.dup(0), encoding="utf-8")
    with Path(os.devnull).open() as nothing:  # what the jobs run must not read the names of the next ones
        os.dup2(nothing.fileno(), 0)

    def read() -> None:
        for line in jobs:
            if line.strip():
                working.set()
                todo.put(line.strip())
        todo.put(None)
        if working.is_set():
            _stop()

    threading.Thread(target=read, name="jobs", daemon=True).start()
    while (job_file := todo.get()) is not None:
        work(job_file)
        if todo.empty():
            working.clear()
    return 0


def _stop() -> None:
    """Interrupt the main thread, and end the process if it does not end by itself: code that never returns cannot."""
    os.kill(os.getpid(), signal.SIGINT)
    timer = threading.Timer(GRACE_S, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str]) -> int:
    """The command; returns its exit code: 0, 1 if something failed, 2 for a wrong call, 130 if interrupted."""
    signal.signal(signal.SIGINT, _interrupt)  # also where the starter ignores it, as shells do for background jobs
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if arguments == ["--serve"]:
            return serve()
        if len(arguments) != 1 or arguments[0].startswith("-"):
            print("usage: python -m tsdfm_bench.launch.worker JOBFILE | --serve", file=sys.stderr)
            return 2
        result = work(arguments[0])
    except KeyboardInterrupt:
        return 130
    print(json.dumps(result))
    return 0 if result["state"] in ("done", "busy") else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
