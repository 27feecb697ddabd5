"""`tsdfm-bench run`."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tsdfm_bench.budget import parse_budget
from tsdfm_bench.commands.live import noted, terminable
from tsdfm_bench.config import make_config
from tsdfm_bench.console import Reporter, stdout_console
from tsdfm_bench.guard import stdout_to_stderr
from tsdfm_bench.launch import Cancelled, Detached
from tsdfm_bench.provenance import command_line
from tsdfm_bench.summary import Outcome
from tsdfm_bench.sweep import Result, Sweep, prepare
from tsdfm_bench.sweep import run as run_sweep

INTERRUPTED = 130
SHOWN_FAILURES = 10


def run_command(
    given: Mapping[str, Any],
    file: Path | None,
    as_json: bool,
    budget: str | None = None,
    trim: bool = False,
    named: Collection[str] | None = None,
) -> int:
    """Run a sweep and print its tables.

    Args:
        given: keys of the request from the command line.
        file: TOML sweep file, or None.
        as_json: print JSON instead of tables.
        budget: a time that must not be exceeded, or None.
        trim: leave out what exceeds it instead of refusing.
        named: see `prepare`.

    Returns:
        the exit code.
    """
    reporter = Reporter()
    with terminable(), stdout_to_stderr():
        sweep: Sweep | None = None
        try:
            config = make_config(given, file)
            sweep = prepare(config, named)
            if budget is not None:
                from tsdfm_bench.commands.plan import estimate_sweep, within_budget

                sweep = within_budget(sweep, estimate_sweep(sweep, reporter), parse_budget(budget), trim)
            with noted(sweep.folder, config.launcher.name):
                result = run_sweep(sweep, reporter)
        except Detached as left:
            reporter.note(str(left), style="cyan")
            return INTERRUPTED if isinstance(left, Cancelled) else 0
        except KeyboardInterrupt:
            _interrupted(reporter, sweep)
            return INTERRUPTED
    if as_json:
        _print_json(sweep, result)
    else:
        _print_tables(sweep, result, reporter)
    return result.outcome.exit_code


def _interrupted(reporter: Reporter, sweep: Sweep | None) -> None:
    if sweep is None or not sweep.folder.plan_path.exists():
        reporter.note("Interrupted; nothing was sampled yet.", style="yellow")
    else:
        kept = sum(len(sweep.folder.completed_batches(cell)) for cell in sweep.folder.cells())
        reporter.note(
            f"Interrupted. {kept} finished batches are kept in {sweep.folder.root}. Go on with:", style="yellow"
        )
        reporter.note(f"  {command_line()}")


def _print_tables(sweep: Sweep, result: Result, reporter: Reporter) -> None:
    from tsdfm_bench.results.render import to_rich

    console = stdout_console()
    for table in result.tables:
        console.print(to_rich(table, console.width))
    outcome = result.outcome
    if outcome.exit_code:
        _print_failures(sweep, outcome, reporter)
    console.print(f"\nResults: {sweep.folder.root}  (summary.csv, tables/)", highlight=False, soft_wrap=True)


def _print_failures(sweep: Sweep, outcome: Outcome, reporter: Reporter) -> None:
    """What failed, cells with the same reason together."""
    cells: dict[str, list[str]] = {}
    for cell, reason in outcome.failed.items():
        cells.setdefault(reason, []).append(_name(sweep, cell))
    reporter.note(f"{len(outcome.failed) + len(outcome.broken)} failed:", style="red")
    lines = [f"{', '.join(names[:3])}{_more(len(names) - 3)}: {reason}" for reason, names in cells.items()]
    lines += dict.fromkeys(outcome.broken)
    for line in lines[:SHOWN_FAILURES]:
        reporter.note(f"  {line}")
    if len(lines) > SHOWN_FAILURES:
        reporter.note(f"  and {len(lines) - SHOWN_FAILURES} more: tsdfm-bench status {sweep.folder.root}")
    reporter.note("The same command with --retry-failed tries them again; nothing else is done twice.")


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


def _name(sweep: Sweep, cell: str) -> str:
    cells = {planned.cell.id: planned.cell for planned in sweep.plan.cells}
    cells |= {row.cell.id: row.cell for row in sweep.plan.rejected}
    return cells[cell].describe()


def _print_json(sweep: Sweep, result: Result) -> None:
    from tsdfm_bench.results.render import to_json

    outcome = result.outcome
    content = {
        "folder": str(sweep.folder.root),
        "exit_code": outcome.exit_code,
        "failed": {_name(sweep, cell): reason for cell, reason in outcome.failed.items()},
        "skipped": {_name(sweep, cell): reason for cell, reason in outcome.skipped.items()}
        | {row.cell.describe(): row.reason for row in sweep.plan.rejected if row.state == "skipped"},
        "broken": outcome.broken,
        "notes": outcome.notes,
        "tables": [json.loads(to_json(table)) for table in result.tables],
    }
    print(json.dumps(content, indent=2))
