"""One sweep from request to table: plan, folder, samples, scores, numbers, summary.

The run folder belongs to one request. What is sampled is frozen in plan.json; more samples, other scorers and other
metrics extend the folder, anything else needs another one. The default folder is named after the plan, so the same
command finds its folder again, and does what is missing there.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tsdfm_bench import provenance
from tsdfm_bench.config import DEFAULT_SCORERS
from tsdfm_bench.errors import BenchError, PluginError, UsageError
from tsdfm_bench.guard import shielded
from tsdfm_bench.plan import ORACLE, PLAN_FORMAT, Cell, Plan, PlannedCell, make_plan
from tsdfm_bench.registry import Registry, check_info, one_line
from tsdfm_bench.results.store import CorruptFile, PlanConflict, RunFolder, read_samples, read_table
from tsdfm_bench.spec import Spec
from tsdfm_bench.summary import Outcome, build_summary, first_line, reason_of, write_results

if TYPE_CHECKING:
    from tsdfm_bench.api import Task
    from tsdfm_bench.config import SweepConfig
    from tsdfm_bench.console import Reporter
    from tsdfm_bench.job import Job
    from tsdfm_bench.measuring import Gauge, Measured
    from tsdfm_bench.results.table_model import Table
    from tsdfm_bench.scoring import Judge

# What of plan.json may change while the folder stays the same one.
EXTENDABLE = ("format", "samples", "scorers", "metrics", "cells", "not_run", "settings")

ORACLE_NOTE = (
    "Checkpoint oracle: the exact posterior of the task's law stands in for the network, so what is left of an error "
    "is the sampler's own. It knows no step size: with it fsdfm and tsdfm are dfm with the cumulative law."
)

ROUNDS = 3  # the second makes again what the first found damaged

_OPTIONS = {"top_p": "--top-p", "top_p_rule": "--top-p-rule"}


@dataclass(frozen=True)
class Sweep:
    """A planned sweep, ready to run.

    Args:
        config: the request.
        registry: where names are looked up.
        task: loaded.
        plan: its cells.
        folder: where results go.
        judges: the scorers.
        hidden: whether the hidden half of real text is scored by scorers that give no features.
    """

    config: SweepConfig
    registry: Registry
    task: Task
    plan: Plan
    folder: RunFolder
    judges: list[Judge]
    hidden: bool = True


@dataclass(frozen=True)
class Result:
    """What a sweep gives.

    Args:
        tables: to be shown.
        outcome: what was skipped or failed.
    """

    tables: list[Table]
    outcome: Outcome


def load_task(spec: Spec, registry: Registry) -> Task:
    """The loaded task.

    Raises:
        UsageError: unknown task or option.
        PluginError, AssetError: it cannot be used, or its text not be obtained.
    """
    entry = registry.entry("tasks", spec.name)
    cls = registry.load("tasks", spec.name)
    try:
        with shielded(f"task '{spec}'", cls):
            task: Task = cls.load(spec.params())
    except BenchError:
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a plug-in raises
        raise PluginError(f"task '{spec}' cannot be loaded: {one_line(error)}") from error
    check_info(entry, getattr(task, "info", None))
    return task


def prepare(config: SweepConfig, named: Collection[str] | None = None) -> Sweep:
    """Plan a sweep; nothing is written and no network is loaded.

    Args:
        config: the request.
        named: those of its scorers that the user names; None = all, unless they are taken by default.

    Raises:
        UsageError: the request is wrong, or its folder belongs to another one.
        BenchError: see `load_task` and `make_plan`.
    """
    from tsdfm_bench.conditioning import check_pinning, pinning
    from tsdfm_bench.scoring import find_judges

    registry = Registry(config.plugins)
    for spec in metric_specs(config, registry):
        registry.entry("metrics", spec.name)
    judges = find_judges(config.scorers or [], registry)
    for spec in config.methods:
        with suppress(PluginError):  # that is a row of the table
            registry.entry("methods", spec.name)
    task = load_task(config.task, registry)
    if config.scorers is None:
        config = config.model_copy(update={"scorers": [Spec(name) for name in task.info.scorers or DEFAULT_SCORERS]})
        judges = find_judges(config.scorers or [], registry)
        named = ()
    for judge in judges:
        judge.named = named is None or judge.name in named
    check_pinning(pinning(config), config.length or task.info.length, task)
    plan = make_plan(config, registry, task.info)
    folder = RunFolder(plan.folder)
    if folder.plan_path.exists():
        try:
            stored = folder.read_plan()
            check_same(folder, stored, plan)
            plan = replace(plan, batch_size=int(stored["request"]["batch_size"]))
        except CorruptFile:  # cells are found by their identity: the folder can be used without its plan
            plan = replace(plan, batch_size=_batch_size_there(folder, plan))
    return Sweep(config, registry, task, plan, folder, judges)


def _batch_size_there(folder: RunFolder, plan: Plan) -> int:
    """The batch size of a folder whose plan.json is damaged, from the samples that the plan's cells have."""
    for planned in plan.cells:
        for batch in folder.completed_batches(planned.cell.id):
            with suppress(CorruptFile):
                return len(read_samples(folder.samples_path(planned.cell.id, batch)).tokens)
    return plan.batch_size


def metric_specs(config: SweepConfig, registry: Registry) -> list[Spec]:
    """The metrics asked for; by default all there are."""
    return config.metrics if config.metrics is not None else [Spec(name) for name in registry.names("metrics")]


# -------------------------------------------------------------------------------------------------- run folder


def plan_json(sweep: Sweep) -> dict[str, Any]:
    """plan.json: the request (frozen) and what it came to."""
    plan, config = sweep.plan, sweep.config
    return {
        "format": PLAN_FORMAT,
        "request": {**plan.request(), "batch_size": plan.batch_size},
        "samples": config.samples,
        "scorers": [str(spec) for spec in config.scorers or []],
        "metrics": [str(spec) for spec in metric_specs(config, sweep.registry)],
        "cells": [{**_about(planned.cell), "checkpoint": planned.checkpoint} for planned in plan.cells],
        "not_run": [{**_about(row.cell), "state": row.state, "reason": row.reason} for row in plan.rejected],
        "settings": {"conventions": config.conventions, "launcher": str(config.launcher)},
    }


def _about(cell: Cell) -> dict[str, Any]:
    return {"id": cell.id, "label": cell.label, **cell.identity()}


def check_same(folder: RunFolder, stored: Mapping[str, Any], plan: Plan) -> None:
    """Raise `UsageError` unless the folder's request is this one, saying what differs and what to type."""
    before = stored.get("request")
    if not isinstance(before, dict) or stored.get("format") != PLAN_FORMAT:
        raise UsageError(f"{folder.plan_path} was written by another version of tsdfm-bench: choose another --out")
    now = plan.request()
    if plan.config.batch_size is not None:
        now["batch_size"] = plan.config.batch_size
    differing = [key for key in now if before.get(key) != now[key]]
    lines = [
        f"  {key.replace('_', '-')}: there {_shown(before.get(key))}, asked for {_shown(now[key])}" for key in differing
    ]
    if not differing:
        wanted = {planned.cell.id for planned in plan.cells if planned.cell.kind == "method"}
        gone = [cell for cell in stored.get("cells", []) if cell["kind"] == "method" and cell["id"] not in wanted]
        if gone:
            names = ", ".join(dict.fromkeys(str(cell["method"]) for cell in gone))
            lines = [f"  weights of {names}: they have changed since"]
    if lines:
        typed = " ".join(_option(key, before.get(key)) for key in differing)
        remedy = f", or repeat what is there (with {typed.strip()})" if typed.strip() else ""
        raise UsageError(
            f"{folder.root} belongs to another request:\n" + "\n".join(lines) + "\nMore samples, other scorers and "
            f"metrics may be added to a folder, nothing else. Choose another --out, or none{remedy}."
        )


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ",".join("none" if item is None else str(item) for item in value) or "default"
    return str(value) if value not in (None, "") else "default"


def _option(key: str, value: object) -> str:
    if key in ("tokenizer", "data_hash") or value in (None, "", []):
        return ""
    return f"{_OPTIONS.get(key, '--' + key.replace('_', '-'))} {shlex.quote(_shown(value))}"


def freeze(sweep: Sweep, job: Job) -> None:
    """Write plan.json, or bring what may change in it up to date; a damaged one goes to quarantine/.

    Raises:
        StoreError: it cannot be written.
    """
    if sweep.folder.plan_path.exists():
        try:
            sweep.folder.read_plan()
        except CorruptFile as error:
            job.damaged(error)
    try:
        sweep.folder.freeze(plan_json(sweep), EXTENDABLE)
    except PlanConflict as error:  # another process was faster, with another request
        raise UsageError(str(error)) from error


# --------------------------------------------------------------------------------------------------------- run


def run(sweep: Sweep, reporter: Reporter) -> Result:
    """Do what is missing, and give the tables.

    What turns out to be damaged goes to quarantine/, and another round makes it again.

    Raises:
        StoreError: a file cannot be written; what is finished is kept.
        Detached: the work goes on without this process.
        KeyboardInterrupt: what is finished is kept.
    """
    from tsdfm_bench.launch import find_launcher
    from tsdfm_bench.measuring import find_gauges
    from tsdfm_bench.scoring import introduce

    config, folder = sweep.config, sweep.folder
    options = {"gen-ppl": {"conventions": "+".join(config.conventions)}} if config.conventions else {}
    gauges = find_gauges(metric_specs(config, sweep.registry), sweep.registry, options)
    hidden = any({"reference", "scores"} <= gauge.needs and "features" not in gauge.needs for gauge in gauges)
    sweep = replace(sweep, hidden=hidden)
    job = replace(make_job(sweep), say=lambda text: reporter.note(text, style="yellow"))
    introduce(sweep.judges, [planned.cell for planned in sweep.plan.cells], job)  # a wrong one stays out of plan.json
    freeze(sweep, job)
    provenance.record(folder.root, provenance.describe(sweep.registry, job.device, job.threads))
    for problem in sweep.registry.broken_files.values():
        reporter.note(str(problem), style="yellow")
    for judge in sweep.judges:
        if judge.problem:
            reporter.note(f"Scorer {judge.name} is left out. {judge.problem}", style="yellow")
    launcher = find_launcher(config.launcher)
    for _ in range(ROUNDS):
        damaged = len(folder.quarantined())
        launcher.sweep(sweep, job, reporter)
        outcome, complete, measured = _take_stock(sweep, job, gauges, reporter)
        if len(folder.quarantined()) == damaged:
            break
    else:
        outcome.notes.append(f"Files in {folder.root} are damaged again and again: check the disk")
    job.leases.tidy()
    job.leases.close()
    if any(planned.checkpoint == ORACLE for planned in complete):
        outcome.notes.append(ORACLE_NOTE)
    outcome.notes += _behaviour([planned.cell for planned in sweep.plan.cells], folder)
    if folder.summary_path.exists():
        try:
            read_table(folder.summary_path, ["cell"])
        except CorruptFile as error:
            job.damaged(error)
    summary = build_summary(sweep.plan, measured, sweep.judges, outcome)
    return Result(write_results(folder, summary, outcome.notes), outcome)


def scorable(sweep: Sweep, job: Job) -> list[Cell]:
    """The cells that judges are to score: those that are sampled, if there is anything to compare."""
    complete = [planned.cell for planned in sweep.plan.cells if not job.refusal(planned.cell)]
    complete = [cell for cell in complete if not job.missing(cell)]
    # With nothing to compare, references are not worth their judges.
    return [] if all(cell.kind == "reference" for cell in complete) else complete


def _take_stock(
    sweep: Sweep, job: Job, gauges: Sequence[Gauge], reporter: Reporter
) -> tuple[Outcome, list[PlannedCell], dict[str, Measured]]:
    """What became of every cell, from the run folder: states, scores, numbers."""
    from tsdfm_bench.measuring import Measurer
    from tsdfm_bench.scoring import RECORDED_VARIABLE, judged, recall, taken_over

    plan, config, outcome = sweep.plan, sweep.config, Outcome()
    complete = [planned for planned in plan.cells if _complete(planned, job, outcome)]
    if all(planned.cell.kind == "reference" for planned in complete):
        complete = []
    for judge in sweep.judges:
        recall(judge, judged(judge, [planned.cell for planned in complete], sweep.hidden), job)
    real, other = _held_out(complete)
    measurer = Measurer(
        job.folder,
        sweep.task,
        sweep.judges,
        gauges,
        config.samples,
        plan.batch_size,
        config.seed,
        real,
        other,
        job.damaged,
    )
    measured = measurer.measure([planned.cell for planned in complete if not planned.cell.hidden], reporter)
    for planned in complete:
        if planned.cell.id in measured:
            found = measured[planned.cell.id]
            outcome.broken += [f"{planned.cell.describe()}: {reason}" for reason in found.failures.values()]
            if found.cost is not None and found.cost.batch_size < plan.batch_size:
                outcome.notes.append(
                    f"{planned.cell.describe()}: memory held {found.cost.batch_size} of {plan.batch_size} sequences at "
                    "a time; the draws are the same, calls and seconds are not comparable"
                )
    for name in taken_over([planned.cell for planned in complete], sweep.judges, job):
        outcome.notes.append(
            f"Scores by {name} of reference rows are the recorded ones (same texts, same scorer); set "
            f"{RECORDED_VARIABLE}= to make them again in a new folder"
        )
    _judge_notes(sweep.judges, {planned.cell.id: planned.cell.describe() for planned in complete}, outcome)
    for rejected in plan.rejected:
        if rejected.state == "failed":
            outcome.failed[rejected.cell.id] = rejected.reason
    return outcome, complete, measured


def make_job(sweep: Sweep) -> Job:
    """What sampling needs; sets the number of threads."""
    import torch

    from tsdfm_bench.job import Job
    from tsdfm_bench.meter import choose_device

    threads = sweep.config.threads or provenance.available_threads()
    torch.set_num_threads(threads)
    device = choose_device(sweep.config.device)
    plan = sweep.plan
    return Job(
        RunFolder(sweep.folder.root.absolute()),  # a plug-in may change the working directory while leases are renewed
        sweep.registry,
        sweep.task,
        plan.batches,
        plan.batch_size,
        device,
        threads,
        sweep.config.cell_timeout,
        lease_s=sweep.config.launcher.lease_s,
        retry_failed=sweep.config.retry_failed,
    )


def _complete(planned: PlannedCell, job: Job, outcome: Outcome) -> bool:
    """Whether all samples of a cell exist; if not, the reason goes to the outcome."""
    cell = planned.cell
    if reason := job.refusal(cell):
        outcome.skipped[cell.id] = reason
        return False
    if job.missing(cell):
        outcome.failed[cell.id] = reason_of(job.folder.read_error(cell.id, lines=1000)) or "it was not sampled"
        return False
    return True


def _held_out(complete: list[PlannedCell]) -> tuple[Any, Any]:
    """The cells of held-out text: the row, and the other half."""
    cells = [planned.cell for planned in complete if planned.cell.kind == "reference" and planned.cell.method == "real"]
    return next((c for c in cells if not c.hidden), None), next((c for c in cells if c.hidden), None)


def _behaviour(cells: list[Cell], folder: RunFolder) -> list[str]:
    """What methods did beside sampling, a sentence for each row and deed."""
    from tsdfm_bench.guard import read_notes

    return list(dict.fromkeys(f"{cell.label} {note}." for cell in cells for note in read_notes(folder, cell.id)))


def _judge_notes(judges: list[Judge], names: Mapping[str, str], outcome: Outcome) -> None:
    """What became of the judges. One may be missing; if all that were named are, what was asked for is not done."""
    none_left = all(judge.unavailable for judge in judges if judge.named)
    for judge in judges:
        if judge.unavailable:
            missing = f"Scorer {judge.name} is missing: {first_line(judge.unavailable)}"
            outcome.notes.append(missing)
            outcome.broken += [missing] if judge.named and none_left else []
        elif judge.broken:
            outcome.notes.append(f"Scorer {judge.name} failed: {first_line(judge.broken)}")
            outcome.broken.append(judge.broken)
        outcome.broken += [f"{names[cell]}: scorer {judge.name}: {reason}" for cell, reason in judge.failures.items()]
