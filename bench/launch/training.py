"""Trainings as jobs: one stage of a recipe each, after the stages it needs (teacher -> compass -> students).

A stage is trained by one worker at a time: it holds the lease `train-<stage>` in the folder of the checkpoints, checks
it whenever the trainer reports, and stops if another process has taken over. What is trained already is not trained
again, and a stage that was stopped goes on from its saved state, bit for bit (`tsdfm_bench.methods.train`).

With several GPUs or nodes for one job, the worker starts a process for each and waits (`tsdfm_bench.launch.several`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdfm_bench.errors import BenchError, CompassError
from tsdfm_bench.launch.leases import Holder, Lease, Leases, workers
from tsdfm_bench.launch.settings import DEFAULT_LEASE_S
from tsdfm_bench.launch.several import ProcessesFailed, dismiss, follow, lead, processes_of
from tsdfm_bench.launch.work import Work
from tsdfm_bench.results.files import write_json
from tsdfm_bench.results.store import RunFolder
from tsdfm_bench.spec import parse_spec

if TYPE_CHECKING:
    from tsdfm_bench.console import Phase, Reporter
    from tsdfm_bench.methods.train.recipe import Recipe, Stage
    from tsdfm_bench.methods.train.trainer import Progress

CHECKPOINT = "config.json"
STATE, STATE_FILE = ".state", "state.safetensors"  # of a training that is not done
PROGRESS_FILE = "progress.json"  # beside it, of one on several processes


class StageBusy(BenchError):
    """Another process trains a stage."""


class TrainFolder(RunFolder):
    """A folder of checkpoints; what launchers keep beside them starts with a dot."""

    @property
    def jobs_folder(self) -> Path:
        """.jobs/."""
        return self.root / ".jobs"

    @property
    def leases_folder(self) -> Path:
        """.leases/."""
        return self.root / ".leases"


def steps_trained(folder: Path) -> dict[str, int]:
    """What those who train say: name of a work -> steps."""
    held = workers(TrainFolder(folder).leases_folder)
    return {unit: int(holder.about.get("done", 0)) for unit, holder in held.items()}


def leave_progress(folder: Path, progress: Progress) -> None:
    """What the first of several processes leaves in the folder of the checkpoints for the one that has started them."""
    about = {**vars(progress), "shown": {key: value for key, value in progress.shown.items() if math.isfinite(value)}}
    with suppress(OSError):  # progress is not worth a failure
        write_json(folder / STATE / progress.name / PROGRESS_FILE, about, checksum=False, durable=False)


def train_works(
    scale: str,
    recipe: Recipe,
    folder: Path,
    only: Sequence[str] | None = None,
    task: str | None = None,
    threads: int | None = None,
    gpus: int = 0,
    lease_s: float = DEFAULT_LEASE_S,
) -> list[Work]:
    """A work for every stage asked for.

    Args:
        scale: name of the recipe, or its TOML file.
        recipe: loaded.
        folder: of the checkpoints.
        only: stages; None = all.
        task: another text than the recipe's.
        threads: CPU threads of a worker; None = what its environment says.
        gpus: of each job.
        lease_s: see `Leases`.
    """
    stages = recipe.select(list(only) if only else None)
    names = {stage.name for stage in stages}
    path = Path(scale)
    return [
        Work(
            kind="train",
            name=f"train-{stage.name}",
            title=f"train {stage.name}",
            folder=str(folder.resolve()),
            settings={"threads": threads, "lease_s": lease_s, "report_s": 1.0, "cwd": str(Path.cwd())},
            stage={
                "scale": str(path.resolve()) if scale.endswith(".toml") else scale,
                "stage": stage.name,
                "task": task,
            },
            needs=[f"train-{need}" for need in (*stage.needs, *_judges(stage, stages)) if need in names],
            weight=float(recipe.training_of(stage).steps),
            resources={"gpus": gpus, "cpus": threads or 1},
        )
        for stage in stages
    ]


def _judges(stage: Stage, stages: Sequence[Stage]) -> list[str]:
    """Networks that a compass is examined by, if one process would have trained them before it."""
    before = stages[: stages.index(stage)] if stage.kind == "compass" else []
    return [other.name for other in before if other.kind == "ar" and other.name not in stage.needs]


def train_stage_of(work: Work, reporter: Reporter) -> dict[str, Any]:
    """Train the stage of a work, unless another living process does.

    Returns:
        fields of the result of `tsdfm_bench.launch.worker.work`.

    Raises:
        BenchError: a stage it needs is missing, or the recipe is wrong.
        FloatingPointError: the training diverged.
        LeaseLost: another process has taken over.
    """
    stage = str(work.stage["stage"])
    folder = Path(work.folder)
    leases = Leases(TrainFolder(folder).leases_folder, float(work.settings.get("lease_s", DEFAULT_LEASE_S)))
    lease = take_stage(leases, stage, reporter)
    if isinstance(lease, Holder):
        dismiss(work)
        return {"state": "busy", "units": 1, "done": 0, "busy": [lease.unit]}
    try:
        with lease:
            if processes_of(work) > 1 or int(work.resources.get("nodes", 1)) > 1:
                _several(work, reporter, lease)
            else:
                _here(work, reporter, lease)
    except ProcessesFailed as error:
        return {"state": "failed", "units": 1, "done": 0, "error": str(error)}
    finally:
        leases.close()
    return {"state": "done", "units": 1, "done": 1}


def take_stage(leases: Leases, stage: str, reporter: Reporter) -> Lease | Holder:
    """Take a stage, waiting until a silent holder is known to be dead; the holder if it is alive.

    Raises:
        StoreError: the folder cannot be written.
    """
    name = f"train-{stage}"
    while isinstance(lease := leases.take(name, doing=f"train {stage}", job=name), Holder):
        if leases.alive(lease):
            return lease
        leases_wait(leases)
    if lease.taken_over is not None:
        reporter.note(f"Took over the training of {stage} from {lease.taken_over}; it goes on from its saved state.")
    return lease


class Alone:
    """Keeps other processes from the stages that this one trains.

    Args:
        folder: of the checkpoints.
        lease_s: see `Leases`.
        reporter: tells a person what happens.
    """

    def __init__(self, folder: Path, lease_s: float, reporter: Reporter) -> None:
        self.folder, self.reporter = folder, reporter
        self.leases = Leases(TrainFolder(folder).leases_folder, lease_s)
        self.lease: Lease | None = None

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Hold the lease of a stage.

        Raises:
            StageBusy: another process has it.
        """
        lease = take_stage(self.leases, stage, self.reporter)
        if isinstance(lease, Holder):
            raise StageBusy(
                f"another process trains '{stage}' in {self.folder}: {lease}. Wait until it has ended, or choose "
                "another folder with --out"
            )
        try:
            with lease:
                self.lease = lease
                yield
        finally:
            self.lease = None
            self.leases.close()

    def check(self, progress: Progress) -> None:
        """Show how far the stage is; `LeaseLost` if another process has taken over."""
        if self.lease is not None:
            self.lease.tell(done=progress.step, of=progress.steps)
            self.lease.check()


def follow_stage_of(work: Work) -> dict[str, Any]:
    """Train the stage of a work with the first node of its job, which holds the lease; as `train_stage_of`."""
    done = follow(work)
    return {"state": "done", "units": 1, "done": int(done)}


def leases_wait(leases: Leases) -> None:
    """Sleep until a holder may have given the next sign of life."""
    time.sleep(min(1.0, leases.lease_s / 4))


def _several(work: Work, reporter: Reporter, lease: Lease) -> None:
    stage = str(work.stage["stage"])
    path = Path(work.folder) / STATE / stage / PROGRESS_FILE
    path.unlink(missing_ok=True)  # of an earlier life
    with reporter.phase(f"training {stage}", work.weight, round(work.weight), "steps") as phase:
        lead(work, _relay(path, _reporting(phase, lease), lease))


def _relay(path: Path, report: Callable[..., None], lease: Lease) -> Callable[[], None]:
    """What the leading process calls every second: the lease is checked, and what is new is reported."""
    seen = ""

    def look() -> None:
        nonlocal seen
        lease.check()
        with suppress(OSError, ValueError, TypeError):
            found = path.read_text("utf-8")
            if found != seen:
                seen = found
                report(**json.loads(found))

    return look


def _here(work: Work, reporter: Reporter, lease: Lease) -> None:
    import torch

    from tsdfm_bench.judge import find_judge, judges_of
    from tsdfm_bench.methods.train.command import train_recipe, training_text
    from tsdfm_bench.methods.train.recipe import load_recipe
    from tsdfm_bench.registry import Registry
    from tsdfm_bench.sweep import load_task

    if work.settings.get("threads"):
        torch.set_num_threads(int(work.settings["threads"]))
    recipe = load_recipe(str(work.stage["scale"]))
    if work.stage.get("task"):
        recipe = recipe.model_copy(update={"task": work.stage["task"]})
    registry = Registry()
    loaded = load_task(parse_spec(recipe.task), registry)
    text, folder = training_text(loaded, judges_of(loaded, registry)), Path(work.folder)
    stage = str(work.stage["stage"])
    with reporter.phase(f"training {stage}", work.weight, round(work.weight), "steps") as phase:
        phase.doing(stage)
        judge = find_judge(loaded, recipe, folder, registry)
        report = _reporting(phase, lease)
        refused = train_recipe(recipe, text, folder, [stage], lambda p: report(**vars(p)), lambda text: None, judge)
    if refused:
        raise CompassError(refused[0])


def _reporting(phase: Phase, lease: Lease) -> Callable[..., None]:
    """What is called with the fields of a `Progress`: it is shown and told, and the lease is checked."""

    def report(name: str, step: int, steps: int, tokens_per_s: float, shown: Mapping[str, float]) -> None:
        figures = "  ".join(f"{key} {value:.4g}" for key, value in shown.items())
        if "validation" not in shown:
            figures = f"{tokens_per_s:,.0f} tokens/s  {figures}"
            lease.tell(speed=figures)
        lease.tell(done=step, of=steps)
        lease.check()
        done = step - phase.count_done
        if done > 0:
            phase.advance(done, done)
        phase.doing(f"{name}: {figures}")

    return report
