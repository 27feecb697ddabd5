"""`tsdfm-bench plan`: what a run would do, without doing it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdfm_bench.budget import about, check_budget, parse_budget, trim
from tsdfm_bench.commands.state import CellReport, report_cells
from tsdfm_bench.config import make_config
from tsdfm_bench.console import Reporter, stdout_console
from tsdfm_bench.errors import UsageError
from tsdfm_bench.estimate import Estimate, Estimator
from tsdfm_bench.sweep import Sweep, make_job, plan_json, prepare

if TYPE_CHECKING:
    from tsdfm_bench.registry import Registry
    from tsdfm_bench.scoring import Judge


def plan_command(
    given: Mapping[str, Any],
    file: Path | None,
    as_json: bool,
    budget: str | None = None,
    trimmed: bool = False,
    timing: bool = True,
) -> int:
    """Print the cells of a request and the work they mean.

    Args:
        given, file, as_json: as in `run_command`.
        budget: a time that must not be exceeded, or None.
        trimmed: leave out what exceeds it instead of refusing.
        timing: time networks whose speed is not known; otherwise only what is known already is said.
    """
    limit = None if budget is None else parse_budget(budget)
    sweep = prepare(make_config(given, file))
    estimate = estimate_sweep(sweep, Reporter(), timing=timing)
    if limit is not None:
        sweep = within_budget(sweep, estimate, limit, trimmed)
        if trimmed:
            estimate = estimate_sweep(sweep, None, timing=False)
    plan = sweep.plan
    reports = report_cells(plan_json(sweep), sweep.folder)
    todo = sum(report.batches - report.completed for report in reports if report.state not in ("done", "refused"))
    calls = sum(_calls(report) for report in reports)
    if as_json:
        content = {
            "folder": str(sweep.folder.root),
            "batch_size": plan.batch_size,
            "batches_to_do": todo,
            "calls_at_most": calls,
            "estimate": estimate.to_json(),
            "cells": [report.to_json() for report in reports],
        }
        print(json.dumps(content, indent=2))
        return 0
    _print(sweep, reports, todo, calls, estimate)
    return 0


def plan_training(recipe: str, given: Mapping[str, Any], as_json: bool) -> int:
    """Print what a training needs: parameters, operations, hours and memory of each network.

    Args:
        recipe: its name, or a TOML file.
        given: options of a sweep; only a task goes with a recipe.
        as_json: print JSON.

    Raises:
        UsageError: there is no such recipe, or options of a sweep were given.
    """
    from tsdfm_bench.commands.train import train_command

    if other := sorted(name for name, value in given.items() if value is not None and name != "task"):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in other)
        raise UsageError(f"--recipe plans a training, {options} belongs to a run: plan them one after the other")
    return train_command(recipe, None, None, None, None, given.get("task"), dry_run=True, as_json=as_json)


def within_budget(sweep: Sweep, estimate: Estimate, limit_s: float, trimmed: bool) -> Sweep:
    """The sweep if it fits, or as much of it as fits.

    Raises:
        UsageError: it does not fit, and is not to be trimmed.
    """
    if trimmed:
        return trim(sweep, estimate, limit_s)
    check_budget(sweep.plan, estimate, limit_s)
    return sweep


def estimate_sweep(sweep: Sweep, reporter: Reporter | None, *, timing: bool = True) -> Estimate:
    """What is left of a sweep in seconds and bytes, on this machine."""
    reports = {report.id: report for report in report_cells(plan_json(sweep), sweep.folder)}
    missing, unscored = [], dict.fromkeys((judge.name for judge in sweep.judges), 0)
    scored = {judge.name: sweep.folder.scored(judge.name) for judge in sweep.judges}
    featured = {judge.name for judge in sweep.judges if gives_features(judge, sweep.registry)}
    for planned in sweep.plan.cells:
        report = reports[planned.cell.id]
        if report.state == "refused":
            continue
        left = max(0, report.batches - report.completed)
        if left:
            missing.append((planned, left))
        for name, cells in scored.items():
            if (left or planned.cell.id not in cells) and (not planned.cell.hidden or name in featured):
                unscored[name] += (left or report.batches) * sweep.plan.batch_size
    return Estimator(make_job(sweep), measure=timing).estimate(missing, unscored, sweep.judges, reporter)


def gives_features(judge: Judge, registry: Registry) -> bool:
    """Whether a scorer says, without being loaded, that it gives features: then it also scores hidden cells."""
    try:
        cls = registry.load("scorers", judge.spec.name)
        info = cls.describe(judge.spec.params()) if hasattr(cls, "describe") else getattr(cls, "info", None)
    except (Exception, SystemExit):
        return False
    return bool(getattr(info, "features", False))


def _calls(report: CellReport) -> int:
    """Network calls that the missing batches need at most: one per step, or per token without steps."""
    if report.kind != "method" or report.state in ("done", "refused") or not report.batches:
        return 0
    return (report.batches - report.completed) * (report.steps if report.steps is not None else report.length)


def _print(sweep: Sweep, reports: list[CellReport], todo: int, calls: int, estimate: Estimate) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    plan = sweep.plan
    console = stdout_console()
    grid = Table(box=box.SIMPLE_HEAD, title="cells", title_justify="left", pad_edge=False)
    for name in ("cell", "method", "source"):
        grid.add_column(name, no_wrap=name != "method")
    grid.add_column("steps", justify="right")
    grid.add_column("settings")
    grid.add_column("batches", justify="right")
    grid.add_column("time left", justify="right")
    grid.add_column("state")
    for report in reports:
        grid.add_row(
            *(Text(text) for text in (report.id, report.label, report.source or "–")),
            Text("–" if report.steps is None else str(report.steps)),
            Text(report.settings),
            Text(f"{report.completed}/{report.batches}" if report.batches and report.state != "refused" else "–"),
            Text(_time(estimate.sampling_s.get(report.id, 0.0))),
            Text(report.state + (f": {report.reason}" if report.reason else "")),
        )
    console.print(grid)
    judges = ", ".join(judge.name + (" (not at hand)" if judge.problem else "") for judge in sweep.judges) or "none"
    lines = [
        f"folder     {sweep.folder.root}",
        f"sequences  {sweep.config.samples} per cell, {plan.length} tokens, in batches of {plan.batch_size}",
        f"to do      {todo} batches, at most {calls} network calls; then scoring by {judges}",
        f"time       {_total(estimate)}",
        f"memory     {_memory(estimate)}",
        f"disk       about {size(estimate.bytes)} more",
        *(f"note       {note}" for note in estimate.notes),
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _time(seconds: float | None) -> str:
    return "?" if seconds is None else about(seconds) if seconds else "–"


def _total(estimate: Estimate) -> str:
    """The seconds with all they are for."""
    if not estimate.seconds and estimate.complete:
        return "none: all samples and scores are there"
    threads = f", {estimate.threads} CPU threads" if estimate.device == "cpu" else ""
    parts = [f"sampling {about(sum(s or 0.0 for s in estimate.sampling_s.values()))}"]
    parts += [f"{name} {_time(seconds)}" for name, seconds in estimate.scoring_s.items() if seconds != 0.0]
    least = "" if estimate.complete else "at least "
    hours = "" if estimate.gpu_hours is None else f" = {estimate.gpu_hours:.2g} GPU-hours"
    what = f"{least}about {about(estimate.seconds)}{hours} ({', '.join(parts)}; metrics not included)"
    return f"{what} in one process on {estimate.device}{threads}"


def _memory(estimate: Estimate) -> str:
    """Peaks of memory, and whose they are."""
    peaks = (("sampling", estimate.sampling_peak_bytes), ("scoring", estimate.scoring_peak_bytes))
    known = [f"{what} about {size(peak)}" for what, peak in peaks if peak is not None]
    whose = "the whole process" if estimate.device == "cpu" else "on the device"
    return f"at peak, {whose}: {', '.join(known)}" if known else "not measured"


def size(count: float) -> str:
    """Bytes as 12 kB, 3.4 MB or 1.2 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"
