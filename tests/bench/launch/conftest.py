"""Runs in forked processes: all is imported once, so that a process costs milliseconds and can be killed often."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

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
