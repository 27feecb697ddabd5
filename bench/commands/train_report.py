"""`tsdfm-bench train SCALE --report`: what the trained compasses are worth, and trajectories with and without them."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdfm_bench.console import stdout_console
from tsdfm_bench.errors import UsageError
from tsdfm_bench.spec import parse_spec

if TYPE_CHECKING:
    from tsdfm_bench.console import Reporter
    from tsdfm_bench.methods.train.compass_report import CompassReport
    from tsdfm_bench.methods.train.recipe import Recipe

FAILED = 1


def report_command(recipe: Recipe, folder: Path, stages: list[str] | None, as_json: bool, reporter: Reporter) -> int:
    """Examine the trained compasses of a recipe, print and keep what was found, and record trajectories.

    `report.json` lies beside each compass, `trajectories.parquet` in the folder of the checkpoints.

    Returns:
        0, or 1 if a compass failed its checks.

    Raises:
        UsageError: no compass is trained there.
    """
    from tsdfm_bench.judge import find_judge
    from tsdfm_bench.methods.nets.folder import CONFIG_FILE
    from tsdfm_bench.methods.train.command import examine_compass, record_trajectories, training_text
    from tsdfm_bench.registry import Registry
    from tsdfm_bench.sweep import load_task

    wanted = [stage for stage in recipe.select(stages) if stage.kind == "compass"]
    trained = [stage for stage in wanted if (folder / stage.name / CONFIG_FILE).is_file()]
    if not trained:
        names = ", ".join(stage.name for stage in wanted) or "none in this choice of stages"
        raise UsageError(
            f"no compass of recipe '{recipe.scale}' is trained in {folder} (compasses: {names}); train one first: "
            f"tsdfm-bench train {recipe.scale} --out {folder}, or name the folder with --out"
        )
    registry = Registry()
    task = load_task(parse_spec(recipe.task), registry)
    text, judge = training_text(task), find_judge(task, recipe, folder, registry)
    found: dict[str, CompassReport] = {}
    rows: list[dict[str, Any]] = []
    for stage in trained:
        reporter.note(f"Examining {stage.name} on held-out text; finished sequences are judged by {judge.name}")
        found[stage.name] = examine_compass(stage, recipe, text, folder, judge)
        if stage.source not in {row["source"] for row in rows}:
            rows += record_trajectories(stage, recipe, text, folder, judge)
    _keep(rows, folder)
    reporter.note(f"Trajectories: {folder / 'trajectories.parquet'} (tsdfm-bench figures --results {folder})")
    if as_json:
        json.dump({name: _plain(report.to_json()) for name, report in found.items()}, sys.stdout, indent=1)
        print()
    else:
        for name, report in found.items():
            _print(name, report)
    return 0 if all(report.passed for report in found.values()) else FAILED


def _keep(rows: list[dict[str, Any]], folder: Path) -> None:
    import pandas as pd

    from tsdfm_bench.results.store import write_table
    from tsdfm_bench.results.training import TRAJECTORIES

    write_table(folder / TRAJECTORIES, pd.DataFrame(rows))


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print(name: str, report: CompassReport) -> None:
    from rich.table import Table

    console = stdout_console()
    table = Table(title=name, title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("time", no_wrap=True)
    for column in ("pairs", "AUC", "changed positions", "repeated tokens"):
        table.add_column(column, justify="right", no_wrap=True)
    for part in report.bins:
        table.add_row(
            f"{part.low:g} to {part.high:g}",
            str(part.pairs),
            *(_number(value) for value in (part.auc, part.auc_changed, part.auc_repeated)),
        )
    table.add_row(
        f"from {report.tau:g} on",
        str(report.pairs),
        f"{report.auc:.3f} ± {2 * report.auc_error:.3f}",
        _number(report.auc_changed),
        _number(report.auc_repeated),
        style="bold",
    )
    console.print(table)
    lines = [
        f"The data's state has the lower energy in {report.right:.1%} of pairs (sign test, p = {report.right_p:.2g})"
    ]
    if report.choice is not None:
        c = report.choice
        lines += [
            f"Among {c.candidates} states of one x_t, finished by the teacher, {c.judge} gives nats per token: "
            f"lowest energy {c.argmin:.4f}, random {c.random:.4f}, highest {c.argmax:.4f} "
            f"(p = {c.sign_p:.2g}; {c.sets} sets).",
            f"Rank correlation of energy and NLL within a set: {c.rho:.3f} (p = {c.rho_p:.2g}).",
        ]
    lines += [f"Failed: {reason}." for reason in report.failures] or ["It passed its checks."]
    for line in lines:
        console.print(line, highlight=False)
    console.print()


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"
