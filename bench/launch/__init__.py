"""How the work of a sweep or a training is run: in this process, by local worker processes, or by a cluster.

A launcher gets a planned sweep and does what is missing of it. `inline` works on the loaded objects. The others write
one file per job under `jobs/<launch>/` (`tsdfm_bench.launch.work`: plain JSON, no pickle, so that any process on any
node that sees the run folder can do it) and have `tsdfm_bench.launch.worker` run them: `work(job_file)` as a function,
`python -m tsdfm_bench.launch.worker JOBFILE` as a command. What comes back are files: samples and scores where they
belong, a progress file and a result file beside the job file. So a launcher never waits for a return value, and may
itself be killed: the next one reads the folder and does the rest.

Who does what at which moment is settled by leases (`tsdfm_bench.launch.leases`), not by launchers: two of them, or a
job that was started twice, may run on one folder at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from tsdfm_bench.errors import unknown_name

if TYPE_CHECKING:
    from tsdfm_bench.console import Reporter
    from tsdfm_bench.job import Job
    from tsdfm_bench.launch.settings import LauncherSettings
    from tsdfm_bench.launch.work import Work
    from tsdfm_bench.sweep import Sweep

# name -> "module:class"; a class takes `LauncherSettings`.
LAUNCHERS = {
    "inline": "tsdfm_bench.launch.inline:Inline",
    "local": "tsdfm_bench.launch.local:Local",
    "slurm": "tsdfm_bench.launch.slurm:Slurm",
}


class Launcher(Protocol):
    """Runs what is missing.

    Args of the class:
        settings: the `[launcher]` table of the request.
    """

    name: str
    settings: LauncherSettings

    def sweep(self, sweep: Sweep, job: Job, reporter: Reporter) -> None:
        """Sample and score what is missing of a sweep; plan.json is written.

        Returns when nothing is left that this launcher could do. Failures are left in files (`job.failures`), so the
        caller finds out what became of a cell from the folder alone.

        Raises:
            StoreError: results cannot be written.
            Detached: the work goes on without this process.
            KeyboardInterrupt: finished batches are kept.
        """

    def train(self, works: Sequence[Work], folder: Path, reporter: Reporter) -> list[dict[str, Any]]:
        """Run the stages of a training, each after those it needs; returns the workers' results (`worker.work`)."""


class Detached(Exception):
    """The work was handed over and goes on without this process; the message says how to follow it."""


class Cancelled(Detached):
    """Somebody cancelled the work; what is finished is kept."""


def find_launcher(settings: LauncherSettings) -> Launcher:
    """The launcher of a request; `UsageError` for an unknown name."""
    target = LAUNCHERS.get(settings.name)
    if target is None:
        raise unknown_name("launcher", settings.name, LAUNCHERS)
    module, _, name = target.partition(":")
    make = cast("Callable[[LauncherSettings], Launcher]", getattr(import_module(module), name))
    return make(settings)
