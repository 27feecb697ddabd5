"""From a planned sweep to jobs: which batches and which scores are missing, and how they are packed.

    pieces = sample_pieces(sweep, job)                 what is missing, each with its cost
    works = sample_works(sweep, job, pack(pieces, target))
    Launch.new(...).write(works)

A worker makes the cells again from the names and numbers in the job file and checks that their ids and the hash of
their weights are those it was told, so it cannot compute something else under the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdfm_bench.launch.cost import batch_work
from tsdfm_bench.launch.work import Piece, Work, shard_batches, unit_name

if TYPE_CHECKING:
    from tsdfm_bench.job import Job
    from tsdfm_bench.plan import Cell, PlannedCell
    from tsdfm_bench.scoring import Judge
    from tsdfm_bench.sweep import Sweep

SampleCost = Callable[["PlannedCell", int], float]
ScoreCost = Callable[["Judge", "Cell", int], float]


def _sample_cost(planned: PlannedCell, batches: int) -> float:
    return batch_work(planned.cell) * batches


def _score_cost(judge: Judge, cell: Cell, texts: int) -> float:
    return float(texts)


def sample_pieces(sweep: Sweep, job: Job, cost: SampleCost = _sample_cost) -> list[Piece]:
    """The batches that are missing, a piece per shard of a cell; failures that are remembered are left out.

    Args:
        sweep, job: of the run.
        cost: expected cost of so many batches of a cell, in any unit.
    """
    pieces = []
    for planned in sweep.plan.cells:
        cell = planned.cell
        missing = set(job.missing(cell))
        if missing and job.remembers_failure(cell):
            continue
        for shard, batches in shard_batches(job.batches):
            if count := len(missing.intersection(batches)):
                unit = {
                    "id": cell.id,
                    "cell": cell.identity(),
                    "checkpoint": planned.checkpoint,
                    "params": dict(planned.params),
                    "shard": shard,
                }
                group = planned.group if cell.kind == "method" else "references"
                pieces.append(Piece(unit, group, cost(planned, count), cell.describe()))
    return pieces


def score_pieces(
    sweep: Sweep, job: Job, judge: Judge, cells: Sequence[Cell] | None = None, cost: ScoreCost = _score_cost
) -> list[Piece]:
    """The cells that a judge has not scored yet, a piece each.

    Args:
        sweep, job: of the run.
        judge: one of the sweep's.
        cells: those that count; None = all of the plan, sampled or not (whoever scores leaves out what is not there).
        cost: expected cost of so many texts of a cell, in any unit.
    """
    from tsdfm_bench.scoring import unscored

    wanted = [planned.cell for planned in sweep.plan.cells] if cells is None else cells
    return [
        Piece({"id": cell.id, "cell": cell.identity()}, judge.name, cost(judge, cell, texts), cell.describe())
        for cell, texts in unscored(wanted, judge, job)
    ]


def settings_of(sweep: Sweep, job: Job, report_s: float = 1.0) -> dict[str, Any]:
    """`Work.settings` of a sweep's jobs.

    Args:
        sweep, job: of the run.
        report_s: seconds between the worker's progress reports.
    """
    config = sweep.config
    return {
        "task": str(config.task),
        "plugins": [str(Path(file).resolve()) for file in config.plugins],
        "device": config.device,
        "threads": job.threads,
        "batches": job.batches,
        "batch_size": job.batch_size,
        "lease_s": config.launcher.lease_s,
        "cell_timeout_s": config.cell_timeout,
        "retry_failed": job.retry_failed,
        "report_s": report_s,
        "cwd": str(Path.cwd()),
    }


def sample_works(
    sweep: Sweep, job: Job, packed: Sequence[Sequence[Piece]], report_s: float = 1.0, threads: int | None = None
) -> list[Work]:
    """A work of kind "sample" for every list of pieces; resources are one GPU or the threads of a worker."""
    settings = settings_of(sweep, job, report_s) | ({} if threads is None else {"threads": threads})
    return [
        Work(
            kind="sample",
            name=f"sample-{i:05d}",
            title=_title(pieces),
            folder=str(sweep.folder.root.resolve()),
            settings=settings,
            units=[piece.unit for piece in pieces],
            weight=sum(piece.weight for piece in pieces),
            resources=_resources(job, settings),
        )
        for i, pieces in enumerate(packed)
    ]


def score_works(
    sweep: Sweep,
    job: Job,
    judge: Judge,
    packed: Sequence[Sequence[Piece]],
    after: Sequence[Work] = (),
    report_s: float = 1.0,
    threads: int | None = None,
) -> list[Work]:
    """A work of kind "score" for every list of pieces of one judge.

    Args:
        sweep, job, judge: of the run.
        packed: from `pack`.
        after: works of kind "sample": each work needs those that make its samples.
        report_s, threads: see `sample_works`.
    """
    from tsdfm_bench.results.files import slug

    makers: dict[str, list[str]] = {}
    for work in after:
        for unit in work.units:
            makers.setdefault(str(unit["id"]), []).append(work.name)
    settings = settings_of(sweep, job, report_s) | ({} if threads is None else {"threads": threads})
    return [
        Work(
            kind="score",
            name=f"score-{slug(judge.name)[:60]}-{i:05d}",
            title=f"{judge.name}: {_title(pieces)}",
            folder=str(sweep.folder.root.resolve()),
            settings=settings,
            units=[piece.unit for piece in pieces],
            scorer=judge.name,
            needs=sorted({name for piece in pieces for name in makers.get(str(piece.unit["id"]), ())}),
            weight=sum(piece.weight for piece in pieces),
            resources=_resources(job, settings),
        )
        for i, pieces in enumerate(packed)
    ]


def unit_names(work: Work) -> list[str]:
    """The names under which the units of a work are leased."""
    return [unit_name(str(unit["id"]), int(unit.get("shard", 0)), work.scorer) for unit in work.units]


def _resources(job: Job, settings: dict[str, Any]) -> dict[str, Any]:
    return {"gpus": 1 if job.device.startswith("cuda") else 0, "cpus": settings["threads"]}


def _title(pieces: Sequence[Piece]) -> str:
    titles = list(dict.fromkeys(piece.title for piece in pieces))
    return titles[0] + (f" and {len(titles) - 1} more cells" if len(titles) > 1 else "")
