"""Handing jobs to Slurm, and remembering which were handed over.

Each submission is one record `jobs/<launch>/slurm/<token>/record.json`, written *before* sbatch is called and completed
with the job id afterwards; the token is also the jobs' comment. So a launcher that was killed in between leaves a
record without an id, and the next one finds the jobs by their comment: a sweep is never submitted twice.

A job runs `Errand`: the work of one job file (`tsdfm_bench.launch.worker`), under submitit. Before a time limit, and
when Slurm preempts it and says so, the job gets a signal, stops after its last whole batch and puts itself back into
the queue. That saves waiting, nothing else depends on it.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdfm_bench.launch.several import rank_of_this_node
from tsdfm_bench.launch.slurm_queue import SlurmError, Task, outside_environment
from tsdfm_bench.launch.work import Launch
from tsdfm_bench.results.files import CorruptFile, json_hash, make_folder, read_json, write_json

if TYPE_CHECKING:
    import submitit

REQUEUES = 20  # after time-outs; Slurm does not count preemptions
SIGNAL_BEFORE_END_S = 120
AFTER_TERM_S = 20.0
RECORD = "record.json"
ARRAY_AT_MOST = 1000  # a job has three files: this bounds a folder
DEFAULT_MINUTES = 60


class JobFailed(Exception):
    """A job did not do its work; its result file says why."""


class Errand:
    """What a job does; made on the submitting node, run on a compute node.

    Args:
        job_file: absolute path.
    """

    def __init__(self, job_file: str) -> None:
        self.job_file = job_file

    def __call__(self) -> dict[str, Any]:
        """Do the work; a small plain dictionary, which nobody needs: results are files."""
        from tsdfm_bench.launch.worker import follow, work

        first = rank_of_this_node() == 0
        requeue = signal.getsignal(signal.SIGUSR2)
        told: list[int] = []
        try:
            with _listening(told):
                result = work(self.job_file) if first else follow(self.job_file)
        except KeyboardInterrupt:
            result = {"state": "stopped"}
            _leave(told, requeue if first else None)
            if not first:
                return result  # the first node says what becomes of the job
        state = result.get("state")
        if state in ("error", "refused") or (Path(self.job_file).name.startswith("train-") and state != "done"):
            raise JobFailed(str(result.get("error") or state))  # Slurm is to know: others may wait for a success
        return {key: result.get(key) for key in ("name", "state", "units", "done", "error")}

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What the job does when it comes back: the same, which finds the finished batches."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


@contextlib.contextmanager
def _listening(told: list[int]) -> Iterator[None]:
    """Stop the work in the block at a polite kill or a warning, and note which it was."""

    def stop(number: int, frame: object) -> None:
        told.append(number)
        if len(told) == 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if number != signal.SIGUSR2:  # one that comes now is noted, and heeded by `_leave`
                signal.signal(number, handler)


def _leave(told: Sequence[int], requeue: Any) -> None:
    """Go back into the queue if that was asked for; after a polite kill alone, see whether it is asked for yet."""
    until = time.monotonic() + AFTER_TERM_S
    while signal.SIGUSR2 not in told and time.monotonic() < until:
        time.sleep(0.1)
    if signal.SIGUSR2 in told and callable(requeue):
        requeue(signal.SIGUSR2, None)


# ----------------------------------------------------------------------------------------------------- records


@dataclass(frozen=True)
class Record:
    """One submission.

    Args:
        token: comment of its jobs and name of its folder.
        name: job name of all jobs of the run folder.
        stage: "sample", "score" or "train".
        files: job files, in the order of the array's elements.
        units: what each of them does: keys of `unit_key`.
        after: tokens of the submissions that must end before.
        time: when, in seconds since 1970.
        parameters: given to sbatch.
        job: id of the job or array; "" while it is being submitted.
    """

    token: str
    name: str
    stage: str
    files: Sequence[str]
    units: Sequence[Sequence[str]]
    after: Sequence[str] = ()
    time: float = 0.0
    parameters: Mapping[str, Any] = field(default_factory=dict)
    job: str = ""

    def index_of(self, task: Task) -> int:
        """Which of `files` a task is."""
        return task.index or 0


def record_path(launch: Launch, token: str) -> Path:
    """Where a record is."""
    return launch.folder / "slurm" / token / RECORD


def records(launch: Launch) -> list[Record]:
    """The submissions of a launch, oldest first; damaged ones are left out (their jobs run, and leases protect)."""
    found = []
    for path in sorted((launch.folder / "slurm").glob(f"*/{RECORD}")):
        with contextlib.suppress(CorruptFile, TypeError):
            found.append(Record(**dict(read_json(path))))  # type: ignore[arg-type]
    return sorted(found, key=lambda record: record.time)


def adopt(launch: Launch, record: Record, tasks: Sequence[Task]) -> Record:
    """The record with the id of its jobs, if it has none but they exist: the launcher was killed while submitting."""
    if record.job:
        return record
    for task in tasks:
        if task.comment == record.token:
            found = replace(record, job=task.job)
            write_json(record_path(launch, record.token), asdict(found))
            return found
    return record


def job_name(folder: Path) -> str:
    """The name of all jobs of a run folder."""
    return f"tsdfm-bench-{json_hash({'folder': str(folder.resolve())})[:10]}"


# ---------------------------------------------------------------------------------------------------- submitting


def submit(
    launch: Launch,
    stage: str,
    name: str,
    files: Sequence[Path],
    units: Sequence[Sequence[str]],
    parameters: Mapping[str, Any],
    after: Sequence[Record] = (),
    kind: str = "afterany",
) -> Record:
    """Submit job files as one job or one array.

    Args:
        launch: whose files they are.
        stage, name, files, units: see `Record`; at most as many files as an array may have elements.
        parameters: of `SlurmSettings`.
        after: submissions that must have ended before.
        kind: "afterany", or "afterok" if their success is needed.

    Returns:
        the completed record.

    Raises:
        SlurmError: sbatch refused.
    """
    token = f"{stage}-{time.time_ns():x}-{secrets.token_hex(3)}"
    record = Record(
        token,
        name,
        stage,
        [str(path) for path in files],
        [list(keys) for keys in units],
        [before.token for before in after],
        time.time(),
        dict(parameters),
    )
    path = record_path(launch, token)
    make_folder(path.parent)
    write_json(path, asdict(record))
    jobs = ":".join(dict.fromkeys(before.job for before in after if before.job))
    more = {"dependency": f"{kind}:{jobs}"} if jobs else {}
    job = _sbatch(path.parent, [Errand(str(file)) for file in files], {**parameters, **more}, name, token)
    record = replace(record, job=job)
    write_json(path, asdict(record))
    return record


def _sbatch(folder: Path, errands: Sequence[Errand], parameters: Mapping[str, Any], name: str, token: str) -> str:
    """The id of the new job or array."""
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    time_min = int(parameters.get("time", DEFAULT_MINUTES))
    given = {
        "time": time_min,
        "cpus_per_task": 1,
        # A limit of a few minutes must not be all warning.
        "signal_delay_s": min(SIGNAL_BEFORE_END_S, 60 * time_min // 3),
        **parameters,
        "job_name": name,
        "comment": token,
        "stderr_to_stdout": True,
    }
    if int(parameters.get("nodes", 1)) > 1:  # one task on each, and none outlives another
        given |= {"ntasks_per_node": 1, "srun_args": [*parameters.get("srun_args", ()), "--kill-on-bad-exit=1"]}
    with _clean_environment(), contextlib.redirect_stderr(io.StringIO()):  # the error says the same
        try:
            python = f"{shlex.quote(sys.executable)} -P"  # nothing in the working folder shadows a module
            executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=REQUEUES, python=python)
            executor.update_parameters(**given)
            with executor.batch():
                jobs = [executor.submit(errand) for errand in errands]
        except (FailedJobError, FailedSubmissionError, RuntimeError, OSError) as error:
            raise SlurmError(f"sbatch refused {len(errands)} jobs: {_sense(error)}") from error
    return str(jobs[0].job_id).partition("_")[0]


def _sense(error: BaseException) -> str:
    """What sbatch said, without the call stack around it."""
    lines = [line.strip() for line in str(error).splitlines() if "error" in line.lower()]
    said = [line.partition("error:")[2].strip() or line for line in lines]
    return " / ".join(dict.fromkeys(said)) or str(error).strip() or type(error).__name__


@contextlib.contextmanager
def _clean_environment() -> Iterator[None]:
    """Inside the block, sbatch does not see the job this process may be a part of."""
    before = dict(os.environ)
    clean = outside_environment()
    try:
        for key in set(before) - set(clean):
            del os.environ[key]
        yield
    finally:
        os.environ.update(before)
