"""`tsdfm-bench conform`: the conformance kit as a table, or as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tsdfm_bench.conformance import Report, Result, Target, conform
from tsdfm_bench.conformance.catalogue import select
from tsdfm_bench.console import say, stdout_console
from tsdfm_bench.errors import PluginError, UsageError
from tsdfm_bench.registry import Registry
from tsdfm_bench.spec import parse_spec, split_list

if TYPE_CHECKING:
    from rich.console import Console

_STYLE = {"pass": "green", "fail": "bold red", "skipped": "dim"}


def conform_command(
    name: str,
    only: str | None,
    task: str | None,
    checkpoint: str | None,
    plugins: Sequence[Path],
    limit_s: float,
    as_json: bool,
) -> int:
    """Test a method, or every method of a plug-in file.

    Args:
        name: NAME, NAME:ARGUMENT, NAME[option=value] or a .py file.
        only: checks, separated by commas; None = all.
        task: whose vocabulary is used; None = sotu.
        checkpoint: weights; None = the method's default.
        plugins: local plug-in files.
        limit_s: seconds a check may take.
        as_json: print JSON.

    Returns:
        1 if a check failed.
    """
    checks = split_list(only) if only else None
    select(checks)
    targets = _targets(name, task or "sotu", checkpoint, plugins)
    reports = []
    for target in targets:
        started = time.monotonic()
        with _progress(str(target)) as progress:
            report = conform(target, checks, limit_s, progress)
        reports.append(report)
        if not as_json:
            _print(report, time.monotonic() - started)
    if as_json:
        print(json.dumps({"methods": [report.to_json() for report in reports]}, indent=2))
    return 0 if all(report.passed for report in reports) else 1


def _targets(name: str, task: str, checkpoint: str | None, plugins: Sequence[Path]) -> list[Target]:
    """What is to be tested.

    Raises:
        UsageError: nothing of that name.
        PluginError: a plug-in file that cannot be imported.
    """
    if name.endswith(".py"):
        plugins = [*plugins, Path(name)]
        registry = Registry(plugins)
        if Path(name) in registry.broken_files:
            raise registry.broken_files[Path(name)]
        names = [entry.name for entry in registry.entries("methods") if entry.target == str(Path(name))]
        if not names:
            raise UsageError(f"{name} registers no method: it needs METHODS = {{'name': Class}}")
        specs = [parse_spec(found) for found in names]
    else:
        specs = [parse_spec(name)]
        registry = Registry(plugins)
        entry = registry.entry("methods", specs[0].name)
        if entry.problem:
            raise PluginError(entry.problem)
    files = tuple(str(file.resolve()) for file in plugins)
    return [
        Target(spec.name, _absolute(spec.argument), dict(spec.options), files, _absolute(checkpoint) or None, task)
        for spec in specs
    ]


def _absolute(text: str | None) -> str:
    """A path that exists here, so that it is found from the worker's folder too; other text as it is."""
    if not text:
        return ""
    path = Path(text).expanduser()
    return str(path.resolve()) if path.exists() else text


@contextmanager
def _progress(name: str) -> Iterator[Callable[[str], None] | None]:
    """What is being checked, on a terminal."""
    if not sys.stderr.isatty():
        say(f"conform: testing {name} ...")
        yield None
        return
    from rich.text import Text

    from tsdfm_bench.terminal import Terminal

    with Terminal(stderr=True).status(Text(f"testing {name}")) as status:
        yield lambda what: status.update(Text(f"testing {name}: {what}"))


def _print(report: Report, seconds: float) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = stdout_console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=Text(f"conform {report.method}"), title_justify="left")
    table.add_column("check", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("what is checked, and what was seen", overflow="fold", ratio=1)
    for row in report.rows:
        told = Text(row.explanation)
        told.append(f"\n{row.seen}", style="dim" if row.verdict == "pass" else _STYLE[row.verdict])
        told.append(f" [{_tried(row.results)}]" if len(row.results) > 1 else "", style="dim")
        table.add_row(Text(row.check), Text(row.verdict, style=_STYLE[row.verdict]), told)
    console.print(table)
    _conclude(console, report, seconds)


def _tried(results: Sequence[Result]) -> str:
    kinds = [result.verdict for result in results]
    parts = [f"{kinds.count('pass')} of {len(kinds)} settings pass"]
    parts += [f"{kinds.count('skipped')} do not apply"] if "skipped" in kinds else []
    return ", ".join(parts)


def _conclude(console: Console, report: Report, seconds: float) -> None:
    from rich.text import Text

    kinds = [row.verdict for row in report.rows]
    counts = f"{kinds.count('pass')} passed, {kinds.count('fail')} failed, {kinds.count('skipped')} skipped"
    settings = ", ".join(report.settings) or "none"
    console.print(Text(f"Settings: {settings}", style="dim"))
    style = "bold red" if report.failed else "green"
    console.print(Text(f"{counts} in {seconds:.0f} s", style=style))
    if report.failed:
        first = report.failed[0]
        console.print(Text(f"One check again: tsdfm-bench conform {report.method} --only {first}"))
