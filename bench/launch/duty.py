"""The work of one job file, done in this process: everything is made again from names, checked, and run.

What is loaded stays loaded for the next job of the same process (tasks, registries of the same plug-ins).
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdfm_bench.errors import BenchError, CheckpointError
from tsdfm_bench.launch.progress import FileReporter
from tsdfm_bench.launch.work import VersionSkew, Work, check_versions, read_work, result_path
from tsdfm_bench.results.files import CorruptFile, StoreError, write_json

if TYPE_CHECKING:
    from tsdfm_bench.api import Task
    from tsdfm_bench.job import Job
    from tsdfm_bench.plan import Cell, PlannedCell
    from tsdfm_bench.registry import Registry

ERROR_LINES = 12


def perform(job_file: str) -> dict[str, Any]:
    """Do the work of a job file; see `tsdfm_bench.launch.worker` for the result.

    Raises:
        KeyboardInterrupt: finished batches are kept; the result file says "stopped".
    """
    result: dict[str, Any] = {
        "name": Path(job_file).stem,
        "state": "error",
        "units": 0,
        "done": 0,
        "failed": {},
        "busy": [],
        "notes": [],
        "error": "",
    }
    reporter: FileReporter | None = None
    try:
        work = read_work(job_file)
        result |= {"name": work.name, "units": len(work.units)}
        check_versions(work)
        reporter = FileReporter(job_file, float(work.settings.get("report_s", 1.0)))
        if cwd := work.settings.get("cwd"):
            os.chdir(cwd)
        result |= _DUTIES[work.kind](work, reporter)
    except VersionSkew as error:
        result |= {"state": "refused", "error": str(error)}
    except KeyboardInterrupt:
        result |= {"state": "stopped", "error": "interrupted"}
        raise
    except (BenchError, StoreError) as error:
        result["error"] = str(error)
    except BaseException as error:  # whatever a plug-in raises
        lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
        result["error"] = "\n".join(lines[-ERROR_LINES:])
    finally:
        if reporter is not None:
            result["notes"] = reporter.notes
            reporter.end(str(result["state"]))
        leave(job_file, result)
    return result


def take_part(job_file: str) -> dict[str, Any]:
    """See `tsdfm_bench.launch.worker.follow`."""
    from tsdfm_bench.launch.training import follow_stage_of

    work = read_work(job_file)
    check_versions(work)
    if cwd := work.settings.get("cwd"):
        os.chdir(cwd)
    return follow_stage_of(work)


def leave(job_file: str, result: Mapping[str, Any]) -> None:
    """Write the result file; a disk that is full has been said already."""
    try:
        write_json(result_path(job_file), result)
    except OSError as error:
        os.write(2, f"{error}\n".encode())


# --------------------------------------------------------------------------------------------------- making again


@lru_cache(maxsize=4)
def _registry(files: tuple[str, ...]) -> Registry:
    from tsdfm_bench.registry import Registry

    return Registry(files)


@lru_cache(maxsize=2)
def _task(spec: str, files: tuple[str, ...]) -> Task:
    from tsdfm_bench.spec import parse_spec
    from tsdfm_bench.sweep import load_task

    return load_task(parse_spec(spec), _registry(files))


def job_of(work: Work, reporter: FileReporter) -> Job:
    """What sampling and scoring need; sets the number of threads."""
    import torch

    from tsdfm_bench.job import Job
    from tsdfm_bench.meter import choose_device
    from tsdfm_bench.results.store import RunFolder

    settings = work.settings
    files = tuple(settings["plugins"])
    torch.set_num_threads(int(settings["threads"]))
    return Job(
        folder=RunFolder(work.folder),
        registry=_registry(files),
        task=_task(settings["task"], files),
        batches=int(settings["batches"]),
        batch_size=int(settings["batch_size"]),
        device=choose_device(settings["device"]),
        threads=int(settings["threads"]),
        cell_timeout_s=settings.get("cell_timeout_s"),
        lease_s=float(settings["lease_s"]),
        retry_failed=bool(settings.get("retry_failed")),
        patient=False,
        name=work.name,
        say=reporter.note,
    )


def cell_of(unit: Mapping[str, Any]) -> Cell:
    """The cell of a unit; `VersionSkew` if this process gives it another identity than the submitter did."""
    from tsdfm_bench.plan import Cell

    cell = Cell(**unit["cell"])
    if cell.id != unit["id"]:
        raise VersionSkew(
            f"cell {unit['id']} is {cell.id} here: this worker computes other identities than the submitter"
        )
    return cell


def _planned(unit: Mapping[str, Any], job: Job) -> PlannedCell:
    """The cell of a unit with what `load` gets; the weights are those of the plan, or an error."""
    from tsdfm_bench.plan import ORACLE, PlannedCell, identify

    cell = cell_of(unit)
    params = dict(unit["params"])
    if cell.kind == "method" and params.get("checkpoint") != ORACLE:
        found = identify(job.registry.load("methods", cell.method), params).weights
        if found != cell.weights:
            raise CheckpointError(f"the weights of {cell.label} have changed since the sweep was planned; run it again")
    return PlannedCell(cell, str(unit["checkpoint"]), params)


# -------------------------------------------------------------------------------------------------------- duties


def _sample(work: Work, reporter: FileReporter) -> dict[str, Any]:
    from tsdfm_bench.launch.failures import record_failure
    from tsdfm_bench.launch.inline import sample_cells
    from tsdfm_bench.launch.work import unit_name

    job = job_of(work, reporter)
    planned: dict[str, PlannedCell] = {}
    shards: dict[str, set[int]] = {}
    failed: dict[str, str] = {}
    for unit in work.units:
        cell = cell_of(unit)
        try:
            planned[cell.id] = _planned(unit, job)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a plug-in raises
            record_failure(job, cell, error)
            failed[unit_name(cell.id, int(unit["shard"]))] = str(error)
            continue
        shards.setdefault(cell.id, set()).add(int(unit["shard"]))
    busy = sample_cells(planned.values(), job, reporter, shards)
    done = 0
    for unit in work.units:
        cell = cell_of(unit)
        name = unit_name(cell.id, int(unit["shard"]))
        if not job.missing(cell, int(unit["shard"])):
            done += 1
        elif name not in busy:
            failed[name] = job.folder.read_error(cell.id) or "it was not sampled"
    return {"state": _state(failed, busy), "done": done, "failed": failed, "busy": busy}


def _score(work: Work, reporter: FileReporter) -> dict[str, Any]:
    from tsdfm_bench.launch.work import unit_name
    from tsdfm_bench.scoring import Judge, find_judges, introduce, score_cells, unscored
    from tsdfm_bench.spec import parse_spec

    job = job_of(work, reporter)
    judge: Judge = find_judges([parse_spec(work.scorer)], job.registry)[0]
    cells = [cell for unit in work.units if not job.missing(cell := cell_of(unit))]
    introduce([judge], cells, job)
    busy = score_cells(cells, [judge], job, reporter)
    left = {cell.id for cell, _ in unscored(cells, judge, job)}
    failed = {unit_name(str(unit["id"]), 0, work.scorer): "not scored" for unit in work.units if unit["id"] in left}
    failed |= {unit_name(cell, 0, work.scorer): reason for cell, reason in judge.failures.items()}
    failed = {name: judge.problem or reason for name, reason in failed.items() if name not in busy}
    done = len(cells) - len(left)
    return {"state": _state(failed, busy), "done": done, "failed": failed, "busy": busy}


def _train(work: Work, reporter: FileReporter) -> dict[str, Any]:
    from tsdfm_bench.launch.training import train_stage_of

    return train_stage_of(work, reporter)


def _state(failed: Mapping[str, str], busy: object) -> str:
    return "failed" if failed else "busy" if busy else "done"


_DUTIES = {"sample": _sample, "score": _score, "train": _train}


__all__ = ["CorruptFile", "leave", "perform"]
