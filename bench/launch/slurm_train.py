"""A training on Slurm: one job a stage, after the jobs of the stages that it needs (`afterok`), on a node or several.

A stage is done when its checkpoint is there; what a job that was preempted or killed had trained is in its saved state,
and its next life, or the next job, goes on from there bit for bit. The same holds for the tokens of its text. If a
teacher is lost, the jobs that waited for it are replaced by others that wait for its successor; if it fails by an error
of its own (a loss that is not finite, a compass that fails its checks), it is not tried again by this command, and they
are not run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tsdfm_bench.estimate import cache_folder
from tsdfm_bench.launch.slurm_rounds import Part, Parts
from tsdfm_bench.launch.training import CHECKPOINT, STATE, STATE_FILE, steps_trained
from tsdfm_bench.launch.work import Piece, Work

UNKNOWN_STEP_S = 0.1
TOKEN_CACHES = "corpora/*/manifest.json"  # of the task `text`
DEFAULT_THREADS = 2  # of a process: a job has one for each of its GPUs


def _tokenised() -> float:
    """When a token cache has grown last: what stages that are not begun are waiting for."""
    return max((_time_of(path) for path in cache_folder().glob(TOKEN_CACHES)), default=0.0)


def _time_of(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


class TrainParts(Parts):
    """The stages that are not trained yet.

    Args:
        works: of kind "train", a stage each.
        folder: of the checkpoints.
    """

    dependency = "afterok"
    final = ("refused", "error")

    def __init__(self, works: Sequence[Work], folder: Path) -> None:
        self.all = {work.name: work for work in works}
        self.folder = folder
        self.reasons: dict[str, str] = {}

    def left(self) -> list[Part]:
        """Stages that have not failed, without a checkpoint or with a worker that still examines it.

        Their key is the name of their lease.
        """
        trained, cached = steps_trained(self.folder), _tokenised()
        return [
            Part(
                name,
                "train",
                Piece({"id": name}, name, max(0.0, work.weight - trained.get(name, 0)) * UNKNOWN_STEP_S, work.title),
                "stages",
                str(work.stage["stage"]),
                self._progress(work) or cached,
                tuple(work.needs),
            )
            for name, work in self.all.items()
            if name not in self.reasons and (name in trained or not self._trained(work))
        ]

    def _trained(self, work: Work) -> bool:
        return (self.folder / str(work.stage["stage"]) / CHECKPOINT).is_file()

    def _progress(self, work: Work) -> float:
        """When the state of a stage was saved last: later means that something was trained."""
        return _time_of(self.folder / STATE / str(work.stage["stage"]) / STATE_FILE)

    def works(self, parts: Sequence[Part], parameters: Mapping[str, Any], first: int) -> list[tuple[Work, list[Part]]]:
        """See `Parts.works`; a job trains one stage on all nodes and GPUs that it asks for."""
        gpus = int(parameters.get("gpus_per_node", parameters.get("gpus_per_task", 0)))
        found = []
        for part in parts:
            work = self.all[part.key]
            usual = DEFAULT_THREADS * max(1, gpus)
            threads = parameters.get("cpus_per_task") or work.settings.get("threads") or usual
            settings = {**work.settings, "threads": int(threads)}
            nodes = int(parameters.get("nodes", 1))
            resources = {**work.resources, "gpus": gpus, "nodes": nodes, "cpus": int(threads)}
            found.append((replace(work, settings=settings, resources=resources), [part]))
        return found

    def give_up(self, part: Part, reason: str) -> None:
        """Leave the reason to the results."""
        self.reasons[part.key] = reason

    def farewell(self, name: str) -> str:
        """See `Parts.farewell`."""
        return (
            f"  follow:     squeue --name={name}\n"
            "  come back:  the same command again; it submits nothing twice\n"
            f"  cancel:     tsdfm-bench cancel {self.folder}"
        )

    def results(self) -> list[dict[str, Any]]:
        """What became of every stage."""
        found = []
        for name, work in self.all.items():
            done = self._trained(work)
            error = "" if done else self.reasons.get(name, "its job failed")
            found.append({"name": name, "state": "done" if done else "error", "error": error})
        return found
