"""The launcher `local`: worker processes on this machine, as many as its cores and memory hold.

    tsdfm-bench run --launcher local --jobs 4

Cells are packed into several jobs a worker, heavy ones first, so that workers end at about the same time. With GPUs
each worker gets one, round robin, and by default there are as many workers as GPUs. Without, the threads of this
process are divided among the workers. Sampling comes first, then scoring; measuring is done here.

Tokens do not depend on the number of workers or on who made which batch. They could depend on the number of threads of
a worker, because sums of floats in another order may differ in the last bit, and a draw that falls between the two
values then differs: `--threads` fixes it, and every cost record says what it was.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdfm_bench.errors import BenchError
from tsdfm_bench.launch.leases import Holder
from tsdfm_bench.launch.orders import sample_pieces, sample_works, score_pieces, score_works
from tsdfm_bench.launch.pool import Pool, WorkerTrouble
from tsdfm_bench.launch.progress import Watch
from tsdfm_bench.launch.work import SHARD_BATCHES, Launch, Piece, Work, pack
from tsdfm_bench.provenance import available_threads

if TYPE_CHECKING:
    from tsdfm_bench.console import Reporter
    from tsdfm_bench.job import Job
    from tsdfm_bench.launch.settings import LauncherSettings
    from tsdfm_bench.scoring import Judge
    from tsdfm_bench.sweep import Sweep

JOBS_PER_WORKER = 4
WORKER_BYTES = 2 << 30  # Python, torch, a small network and a scorer; more is asked for with --jobs
REPORT_S = 0.5


class Local:
    """Runs a sweep or a training in worker processes.

    Args:
        settings: the `[launcher]` table; `jobs` = workers at once.
    """

    name = "local"

    def __init__(self, settings: LauncherSettings) -> None:
        self.settings = settings

    def sweep(self, sweep: Sweep, job: Job, reporter: Reporter) -> None:
        """See `Launcher.sweep`."""
        from tsdfm_bench.scoring import judged
        from tsdfm_bench.sweep import scorable

        gpus = gpu_names() if job.device == "cuda" else []
        workers = self.settings.jobs or default_jobs(gpus)
        threads = sweep.config.threads or max(1, available_threads() // workers)
        launch = Launch.new(sweep.folder.jobs_folder, self.name)
        pool = Pool(launch, environments(workers, threads, gpus), job.say)
        try:
            pieces = sample_pieces(sweep, job)
            works = sample_works(sweep, job, packed(pieces, workers), REPORT_S, threads)
            if works:
                sequences = {work.name: _sequences(work, job) for work in works}
                self._run(pool, works, sequences, "sampling", "seq", job, reporter)
            cells = scorable(sweep, job)
            for judge in sweep.judges:
                if judge.problem and not judge.unavailable:
                    continue
                pieces = score_pieces(sweep, job, judge, judged(judge, cells, sweep.hidden))
                if pieces and not judge.unavailable:
                    self._score(pool, sweep, job, judge, pieces, workers, threads, reporter)
        finally:
            pool.close()

    def _score(
        self,
        pool: Pool,
        sweep: Sweep,
        job: Job,
        judge: Judge,
        pieces: Sequence[Piece],
        workers: int,
        threads: int,
        reporter: Reporter,
    ) -> None:
        works = score_works(sweep, job, judge, packed(pieces, workers), report_s=REPORT_S, threads=threads)
        texts = {work.name: round(work.weight) for work in works}
        self._run(pool, works, texts, f"scoring, {judge.name}", "texts", job, reporter)

    def _run(
        self,
        pool: Pool,
        works: Sequence[Work],
        counts: Mapping[str, int],
        name: str,
        unit: str,
        job: Job,
        reporter: Reporter,
    ) -> None:
        """Do the works of one phase.

        Raises:
            WorkerTrouble: a job cannot be done, for a reason that no cell is to blame for.
        """
        told: set[str] = set()

        def again(work: Work, result: Mapping[str, Any]) -> bool:
            """Units that others were working on when the worker looked: done again once they are free."""
            held = [holder for unit in result.get("busy", ()) if (holder := _living(job, str(unit))) is not None]
            for who in sorted({str(holder) for holder in held} - told):
                told.add(who)
                job.say(f"Waiting for {who}, which works on cells of this run.")
            return bool(result.get("busy"))

        with reporter.phase(name, sum(work.weight for work in works), sum(counts.values()), unit) as phase:
            watch = Watch(phase, reporter)
            results = pool.run(
                works, lambda work, file, ended: watch.look(file, work.weight, counts[work.name], ended), again
            )
        for work in works:
            self._blame(work, results[work.name], job)

    def _blame(self, work: Work, result: Mapping[str, Any], job: Job) -> None:
        """Make failures of whole jobs failures of their cells; what concerns all of them ends the run."""
        if result["state"] not in ("error", "refused"):
            return
        error = WorkerTrouble(str(result["error"]))
        if result["state"] == "refused" or "worker processes died" not in str(result["error"]):
            raise error
        from tsdfm_bench.launch.duty import cell_of
        from tsdfm_bench.launch.failures import record_failure, record_score_failure

        for entry in work.units:
            cell = cell_of(entry)
            if work.kind == "score":
                name = work.scorer.partition("[")[0].partition(":")[0]
                record_score_failure(job, work.scorer, name, cell.id, _Died(str(error)))
            elif job.missing(cell, int(entry["shard"])):
                record_failure(job, cell, _Died(str(error)))

    def train(self, works: Sequence[Work], folder: Path, reporter: Reporter) -> list[dict[str, Any]]:
        """See `Launcher.train`."""
        from tsdfm_bench.launch.training import TrainFolder
        from tsdfm_bench.meter import choose_device

        gpus = gpu_names() if choose_device() == "cuda" else []
        workers = min(self.settings.jobs or default_jobs(gpus), len(works))
        threads = max(1, available_threads() // max(1, workers))
        jobs = TrainFolder(folder).jobs_folder
        pool = Pool(Launch.new(jobs, self.name), environments(workers, threads, gpus), reporter.note)
        try:
            with reporter.phase("training", sum(w.weight for w in works), len(works), "networks") as phase:
                watch = Watch(phase, reporter)
                results = pool.run(
                    works,
                    lambda work, file, ended: watch.look(file, work.weight, int(ended), ended),
                    lambda work, result: False,
                )
        finally:
            pool.close()
        return [results[work.name] for work in works]


class _Died(BenchError):
    """Worker processes died; the next command tries again."""

    passing = True


def _living(job: Job, unit: str) -> Holder | None:
    holder = job.leases.holder(unit)
    return None if holder is None or job.leases.dead(holder) else holder


def packed(pieces: Sequence[Piece], workers: int) -> list[list[Piece]]:
    """Pieces as jobs, several for each worker, the heaviest first."""
    total = sum(piece.weight for piece in pieces)
    jobs = pack(pieces, total / (workers * JOBS_PER_WORKER))
    return sorted(jobs, key=lambda job: -sum(piece.weight for piece in job))


def _sequences(work: Work, job: Job) -> int:
    """How many sequences a work makes, if nothing of it is there."""
    shards = [range(int(u["shard"]) * SHARD_BATCHES, (int(u["shard"]) + 1) * SHARD_BATCHES) for u in work.units]
    have = [set(job.folder.completed_batches(str(u["id"]))) for u in work.units]
    return job.batch_size * sum(
        sum(batch not in done for batch in shard if batch < job.batches)
        for shard, done in zip(shards, have, strict=True)
    )


# ----------------------------------------------------------------------------------------------------- resources


def default_jobs(gpus: Sequence[str]) -> int:
    """One worker a GPU; without, one a core as far as memory holds."""
    if gpus:
        return len(gpus)
    free = free_bytes()
    by_memory = available_threads() if free is None else max(1, free // WORKER_BYTES)
    return max(1, min(available_threads(), by_memory))


def free_bytes() -> int | None:
    """Memory that can be had without swapping, within the limits of the container; None if it is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        return None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        found.append(limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return min(found) if found else None


def gpu_names() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def environments(workers: int, threads: int, gpus: Sequence[str]) -> list[dict[str, str]]:
    """What each worker finds in its environment: its threads, and its GPU if there are GPUs."""
    found = []
    for number in range(workers):
        own = {"OMP_NUM_THREADS": str(threads)}
        if gpus:
            own["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
        found.append(own)
    return found
