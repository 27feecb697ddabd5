"""Fetch one pinned package from the package index the user's pip is configured for, and show how far it is.

`pip download` runs as a subprocess of this interpreter, so that mirrors, proxies, certificates and find-links folders
are those the user already has, and no host is named here. The transfer itself is ours where this pip allows that
(`tsdfm_bench.tasks.wheel`): one that broke off goes on where it was, in the same program or in the next. Files go to a
folder of ours, whose growth is the progress. Nothing is installed and no code of the package runs: only wheels are
accepted, and files are read out of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from tsdfm_bench.tasks import wheel

POLL_S = 0.1
PLAIN_LINE_EVERY_S = 10.0
CONNECT_TIMEOUT_S = 10
RETRIES = 1
RESUMES = 5  # of a transfer that broke off


class DownloadFailed(Exception):
    """One place did not deliver; the message says why."""


class Progress(Protocol):
    """Receives the number of bytes so far."""

    def __call__(self, done_bytes: int) -> None: ...


@contextmanager
def progress(title: str, total_bytes: int) -> Iterator[Progress]:
    """Show a download on stderr: a bar with bytes, rate and time left on a terminal, plain lines elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _PlainLines(title, total_bytes)
        return
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"fetching {title}", total=total_bytes)
        yield lambda done_bytes: bar.update(task, completed=min(done_bytes, total_bytes))


class _PlainLines:
    def __init__(self, title: str, total_bytes: int) -> None:
        self.title, self.total_bytes = title, total_bytes
        self.started = self.last = time.monotonic()
        print(f"fetching {title} ({total_bytes / 1e6:.0f} MB) ...", file=sys.stderr, flush=True)

    def __call__(self, done_bytes: int) -> None:
        now = time.monotonic()
        if now - self.last < PLAIN_LINE_EVERY_S or done_bytes <= 0:
            return
        self.last = now
        rate = done_bytes / (now - self.started)
        left_s = max(self.total_bytes - done_bytes, 0) / rate
        print(
            f"fetching {self.title}: {done_bytes / 1e6:.0f} of {self.total_bytes / 1e6:.0f} MB, "
            f"{rate / 1e6:.1f} MB/s, about {left_s:.0f} s left",
            file=sys.stderr,
            flush=True,
        )


def pip_download(requirement: str, staging: Path, report: Progress, kept: Path | None = None) -> Path:
    """Download one wheel, without its dependencies.

    Args:
        requirement: "name==version".
        staging: an empty folder of the caller, on the disk with room for the file.
        report: receives the bytes downloaded so far.
        kept: where the beginning of a transfer that broke off lies, and is left, on the same disk; None = nowhere.

    Returns:
        the wheel, in `staging`.

    Raises:
        DownloadFailed: with pip's own last error line.
    """
    wheels, scratch = staging / "wheels", staging / "tmp"
    wheels.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(exist_ok=True)
    if kept is not None:
        _move(kept, wheels)
    by_us = [sys.executable, "-P", wheel.__file__, requirement, str(wheels), str(RESUMES), str(CONNECT_TIMEOUT_S)]
    command = [sys.executable, "-m", "pip", "download", requirement, "--dest", str(wheels), "--no-deps"]
    command += ["--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    command += ["--timeout", str(CONNECT_TIMEOUT_S), "--retries", str(RETRIES)]
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    environment.setdefault("PIP_RESUME_RETRIES", str(RESUMES))  # pip 25.1 and newer; older ones begin again
    log = staging / "pip.log"
    try:
        code = _run(by_us, environment, log, staging, report)
        if code == wheel.ASK_PIP:
            code = _run(command, environment, log, staging, report)
    finally:
        if kept is not None:
            _move(wheels, kept)
    found = sorted(wheels.glob("*.whl"))
    if code != 0 or len(found) != 1:
        raise DownloadFailed(_reason(log.read_text(encoding="utf-8", errors="replace"), code))
    return found[0]


def _run(command: list[str], environment: dict[str, str], log: Path, staging: Path, report: Progress) -> int:
    """Run a process that fills the staging folder; its exit code."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                report(_size(staging))
                time.sleep(POLL_S)
        except BaseException:  # Ctrl-C included: no pip is left behind
            process.kill()
            process.wait()
            raise
    return process.returncode


def _move(source: Path, target: Path) -> None:
    """Move beginnings of transfers; one that another process has moved meanwhile is its own."""
    for part in source.glob("*.part"):
        target.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):
            part.replace(target / part.name)


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # removed by pip between listing and asking
            continue
    return total


def _reason(log: str, code: int) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return "this Python has no pip; type: python -m ensurepip"
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    causes = [line for line in lines if "connection broken by" in line]
    if causes and "(from versions: none)" in " ".join(errors):
        return "no package index can be reached"
    return (errors or lines or [f"pip ended with exit code {code}"])[0][:300]
