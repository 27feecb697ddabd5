"""`tsdfm-bench doctor`: is everything here that a run needs, and what to type if not."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from tsdfm_bench import __version__
from tsdfm_bench.console import stdout_console
from tsdfm_bench.errors import AssetError, BenchError, UsageError
from tsdfm_bench.provenance import available_threads
from tsdfm_bench.registry import BUILTIN, Registry, one_line
from tsdfm_bench.spec import Spec

State = Literal["ok", "note", "missing"]
FREE_BYTES = 1 << 30
OLDEST_PYTHON = (3, 11)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Args:
        name: what.
        state: "ok"; "note" = works, but know this; "missing" = a run will lack it.
        found: what there is.
        remedy: what to type, or "".
    """

    name: str
    state: State
    found: str
    remedy: str = ""


def doctor_command(plugins: Sequence[Path], as_json: bool) -> int:
    """Print what was found; 1 if something is missing."""
    registry = Registry(plugins)
    checks: list[Check] = []
    for look in (_python, _packages, _devices, _task, _weights, _scorers, _disk, _plugins):
        try:
            checks += look(registry)
        except (Exception, SystemExit) as error:
            checks.append(Check(look.__name__.strip("_"), "missing", one_line(error)))
    if as_json:
        print(json.dumps({"version": __version__, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        _print(checks)
    return 1 if any(check.state == "missing" for check in checks) else 0


def _print(checks: Sequence[Check]) -> None:
    from rich.table import Table
    from rich.text import Text

    console = stdout_console()
    grid = Table(box=None, show_header=False, pad_edge=False)
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    styles = {"ok": "green", "note": "yellow", "missing": "red"}
    for check in checks:
        found = Text(check.found)
        if check.remedy:
            found.append(f"\n-> {check.remedy}", style="bold")
        grid.add_row(Text(check.state, style=styles[check.state]), Text(check.name), found)
    console.print(grid)
    missing = sum(check.state == "missing" for check in checks)
    console.print("Everything is here." if not missing else f"{missing} things are missing.", highlight=False)


def _python(registry: Registry) -> list[Check]:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < OLDEST_PYTHON:
        return [Check("python", "missing", f"{found}; 3.11 or newer is needed", "install a newer Python")]
    return [Check("python", "ok", found), Check("tsdfm-bench", "ok", __version__)]


def _packages(registry: Registry) -> list[Check]:
    """Every dependency that this distribution declares, against what is installed."""
    from packaging.requirements import Requirement

    absent, wrong = [], []
    for text in requires(BUILTIN) or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            absent.append(str(requirement))
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed} (wanted {requirement.specifier})")
    if absent or wrong:
        remedy = (
            "pip install " + " ".join(f"'{name}'" for name in absent) if absent else "pip install --upgrade tsdfm-bench"
        )
        return [Check("packages", "missing", "; ".join([*(f"no {name}" for name in absent), *wrong]), remedy)]
    return [Check("packages", "ok", "all dependencies are installed")]


def _devices(registry: Registry) -> list[Check]:
    import torch

    checks = [Check("torch", "ok", f"{torch.__version__}, {available_threads()} CPU threads")]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        checks.append(Check("GPU", "ok", ", ".join(names)))
    else:
        checks.append(Check("GPU", "note", "none; runs use the CPU"))
    return checks


def _task(registry: Registry) -> list[Check]:
    from tsdfm_bench.sweep import load_task

    checks = []
    for entry in registry.entries("tasks"):
        if not entry.builtin:
            continue
        try:
            info = load_task(Spec(entry.name), registry).info
        except UsageError as error:  # it is there, and wants to be told more
            checks.append(Check(f"task {entry.name}", "note", str(error)))
        except BenchError as error:
            checks.append(Check(f"task {entry.name}", "missing", str(error)))
        else:
            checks.append(Check(f"task {entry.name}", "ok", f"tokenizer {info.tokenizer}, text {info.data_hash[:15]}"))
    return checks


def _weights(registry: Registry) -> list[Check]:
    """The default weights of every built-in method, identified but not loaded."""
    from tsdfm_bench.config import SweepConfig
    from tsdfm_bench.plan import identify
    from tsdfm_bench.sweep import load_task

    task = load_task(SweepConfig().task, registry).info
    found, missing = [], []
    for entry in registry.entries("methods"):
        if not entry.builtin:
            continue
        cls = registry.load("methods", entry.name)
        for source in cls.info.sources or (None,):
            params = {"task": task.name, "vocab_size": task.vocab_size, "checkpoint": None, "source": source}
            name = entry.name if source is None else f"{entry.name} ({source})"
            try:
                identity = identify(cls, {**params, "length": task.length})
            except UsageError as error:
                missing.append(Check(f"weights {name}", "note", str(error)))
            except BenchError as error:
                missing.append(Check(f"weights {name}", "missing", str(error)))
            else:
                found.append(f"{name} {identity.weights.removeprefix('sha256:')[:8]}")
    ok = [Check("weights", "ok", ", ".join(found))] if found else []
    return ok + missing


def _scorers(registry: Registry) -> list[Check]:
    """The default scorers; what is not in the cache is fetched by the first run."""
    from tsdfm_bench.config import DEFAULT_SCORERS

    checks = []
    for name in DEFAULT_SCORERS:
        cls = registry.load("scorers", name)
        cached: Callable[[], bool] | None = getattr(cls, "is_cached", None)
        if cached is not None and not cached():
            fetch = f"tsdfm-bench run fetches it once; {cls.describe({}).title}"
            checks.append(Check(f"scorer {name}", "note", "not in the cache yet", fetch))
            continue
        try:
            reason: Any = cls.available({}) if hasattr(cls, "available") else None
        except AssetError as error:
            reason = str(error)
        checks.append(Check(f"scorer {name}", "missing" if reason else "ok", str(reason or "ready")))
    return checks


def _disk(registry: Registry) -> list[Check]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    found = f"{free / 1e9:.1f} GB free here"
    try:
        probe = here / ".tsdfm-bench-probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        remedy = "change to another folder, or give --out"
        return [Check("disk", "missing", f"this folder cannot be written to ({error.strerror})", remedy)]
    return [Check("disk", "ok" if free > FREE_BYTES else "note", found)]


def _plugins(registry: Registry) -> list[Check]:
    """Third-party plug-ins, each imported."""
    checks = [Check(f"plug-in {file}", "missing", str(error)) for file, error in registry.broken_files.items()]
    for kind in ("methods", "tasks", "scorers", "metrics", "figures"):
        for entry in registry.entries(kind):
            if entry.builtin and not entry.problem:
                continue
            try:
                registry.load(kind, entry.name)
            except BenchError as error:
                checks.append(Check(f"plug-in {entry.name}", "missing", str(error)))
            else:
                checks.append(Check(f"plug-in {entry.name}", "ok", f"{kind}, {entry.owner}"))
    return checks
