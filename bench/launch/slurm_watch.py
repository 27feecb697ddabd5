"""Which units of a run folder Slurm still has jobs for: its records, joined with one look at the queue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tsdfm_bench.launch.slurm_jobs import Record, adopt, records
from tsdfm_bench.launch.slurm_queue import HELD, Task
from tsdfm_bench.launch.work import launches, result_path
from tsdfm_bench.results.files import StoreError, read_json

if TYPE_CHECKING:
    from tsdfm_bench.results.store import RunFolder


@dataclass
class Queue:
    """The jobs of a run folder, as its records and one squeue tell.

    Args:
        known: records by token.
        alive: unit key -> the living task that covers it.
        last: unit key -> the task that was the last to cover it.
        covers: unit key -> tokens of the records with a living task for it.
        files: unit key -> token and job file of its last submission.
        lost: ids of tasks that wait for what will not happen.
    """

    known: dict[str, Record] = field(default_factory=dict)
    alive: dict[str, Task] = field(default_factory=dict)
    last: dict[str, Task] = field(default_factory=dict)
    covers: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, tuple[str, str]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: RunFolder, found: Sequence[Task]) -> Queue:
        """Join the records of a run folder with the tasks of its job name."""
        queue = cls()
        by_job: dict[str, list[Task]] = {}
        for task in found:
            by_job.setdefault(task.job, []).append(task)
        for launch in launches(folder):
            for record in records(launch):
                record = adopt(launch, record, found)
                queue.known[record.token] = record
                queue.files |= {
                    key: (record.token, file)
                    for file, keys in zip(record.files, record.units, strict=True)
                    for key in keys
                }
                for task in by_job.get(record.job, ()) if record.job else ():
                    queue._add(record, task)
        return queue

    def _add(self, record: Record, task: Task) -> None:
        index = record.index_of(task)
        if index >= len(record.units):
            return
        if task.never:
            self.lost.append(task.id)
        for key in record.units[index]:
            self.last[key] = task
            if task.alive and not task.never:
                self.alive[key] = task
                self.covers.setdefault(key, []).append(record.token)

    def result(self, key: str, tokens: Collection[str]) -> dict[str, Any]:
        """What the last job of a unit left, if that was one of these submissions; {} if it left nothing."""
        found = self.files.get(key)
        if found is None or found[0] not in tokens:
            return {}
        try:
            return dict(read_json(result_path(found[1])))
        except StoreError:
            return {}

    def fate(self, key: str) -> str:
        """What became of the last job of a unit, in plain words."""
        task = self.last.get(key)
        return "no trace in the queue" if task is None else task.state.lower().replace("_", " ")

    def counts(self) -> str:
        """How many jobs run and wait, and for what."""
        seen = {task.id: task for task in self.alive.values()}.values()
        waiting = Counter(reason_of(task) for task in seen if task.waiting)
        parts = [f"{sum(1 for task in seen if not task.waiting)} running"]
        parts += [f"{count} {reason}" for reason, count in waiting.most_common()]
        return ", ".join(parts)


def reason_of(task: Task) -> str:
    """Why a task waits, in plain words."""
    if task.reason.startswith(HELD):
        return "held (scontrol release)"
    plain = {
        "Dependency": "waiting for samples",
        "JobArrayTaskLimit": "queued (array_parallelism)",
        "BeginTime": "requeued and waiting",
        "Priority": "queued",
        "Resources": "queued",
        "": "queued",
    }
    return plain.get(task.reason, f"queued ({task.reason})")
