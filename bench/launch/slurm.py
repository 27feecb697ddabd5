"""The slurm launcher: job arrays for what is missing, watched by its files, submitted again when jobs are lost.

slurm_settings   what jobs ask of Slurm            slurm_queue   squeue, scancel, limits
slurm_jobs       sbatch and the records of it      slurm_watch   which units have a living job
slurm_rounds     look, submit what nobody will do, wait
slurm_parts      a sweep as units of it            slurm_train   a training as units of it
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdfm_bench.errors import UsageError
from tsdfm_bench.launch.slurm_queue import available
from tsdfm_bench.launch.slurm_rounds import Dispatcher
from tsdfm_bench.launch.slurm_settings import SlurmSettings, slurm_settings
from tsdfm_bench.launch.work import Work

if TYPE_CHECKING:
    from tsdfm_bench.console import Reporter
    from tsdfm_bench.job import Job
    from tsdfm_bench.launch.settings import LauncherSettings
    from tsdfm_bench.sweep import Sweep


class Slurm:
    """See the module.

    Args:
        settings: the `[launcher]` table.

    Raises:
        UsageError: a wrong key in its slurm table, or no Slurm here.
    """

    name = "slurm"

    def __init__(self, settings: LauncherSettings) -> None:
        self.settings = settings
        self.slurm: SlurmSettings = slurm_settings(settings.slurm)
        if not available():
            raise UsageError(
                "--launcher slurm: there is no sbatch, squeue and srun here. Run this where jobs are submitted, or use "
                "--launcher local"
            )

    def sweep(self, sweep: Sweep, job: Job, reporter: Reporter) -> None:
        """See `Launcher.sweep`."""
        from tsdfm_bench.launch.slurm_parts import SweepParts

        self.slurm.check_sweep()
        Dispatcher(self.slurm, sweep.folder, SweepParts(sweep, job, self.slurm), self.settings.lease_s).run(reporter)

    def train(self, works: Sequence[Work], folder: Path, reporter: Reporter) -> list[dict[str, Any]]:
        """See `Launcher.train`."""
        from tsdfm_bench.launch.slurm_train import TrainParts
        from tsdfm_bench.launch.training import TrainFolder

        place, parts = TrainFolder(folder), TrainParts(works, folder)
        Dispatcher(self.slurm, place, parts, self.settings.lease_s).run(reporter)
        return parts.results()
