"""`tsdfm-bench cancel`: end the jobs and processes of a run; what is finished is kept."""

from __future__ import annotations

import json
from pathlib import Path

from tsdfm_bench.commands.folders import run_folder
from tsdfm_bench.commands.live import launcher_processes, submitted
from tsdfm_bench.commands.training import training_folder
from tsdfm_bench.console import Reporter
from tsdfm_bench.launch.slurm_jobs import job_name, records
from tsdfm_bench.launch.slurm_queue import SlurmError, Task, available, cancel, tasks
from tsdfm_bench.launch.work import launches
from tsdfm_bench.results.files import write_text
from tsdfm_bench.results.store import RunFolder


def cancel_command(folder: Path | None, as_json: bool = False) -> int:
    """Cancel a run, or a training that was handed to a launcher.

    Slurm jobs are cancelled by id, local processes by number and start time, so that no other process is hit. A
    launcher that waits for Slurm jobs, on whatever machine, is told by a file and ends too.

    Args:
        folder: a run folder or a folder of checkpoints, or None for the newest run.
        as_json: print what was ended as JSON.

    Returns:
        the exit code; 1 if something could not be ended from here.
    """
    from tsdfm_bench.launch.slurm_rounds import cancel_mark

    training = training_folder(folder)
    found, reporter = training or run_folder(folder), Reporter()
    ended: dict[str, list[str]] = {"jobs": [], "processes": [], "elsewhere": []}
    trouble = ""
    if submitted(found):
        write_text(cancel_mark(found), "Waiting launchers stop when they see this file; the next run deletes it.\n")
        try:
            ended["jobs"] = _cancel_jobs(found)
        except SlurmError as error:
            trouble = str(error)
    for process in launcher_processes(found):
        name = f"{process.launcher} launcher, process {process.pid} on {process.machine}"
        if process.launcher == "slurm" or process.stop():
            ended["processes"].append(name)
        else:
            ended["elsewhere"].append(name)
    if as_json:
        print(json.dumps({"folder": str(found.root), **ended, "trouble": trouble}, indent=2))
    for what, names in (("Cancelled", ended["jobs"]), ("Told to end", ended["processes"])):
        if names:
            reporter.note(f"{what}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}")
    for name in ended["elsewhere"]:
        reporter.note(f"Not ended from here: {name}. Run this command there.", style="yellow")
    if trouble:
        reporter.note(f"error: {trouble}", style="red")
    if not any(ended.values()) and not trouble:
        reporter.note(f"Nothing goes on with {found.root}.")
    if training is not None:
        kept = "What was trained up to the last saved state (one every `save_every_s` of the recipe) is kept"
    else:
        kept = f"{sum(len(found.completed_batches(cell)) for cell in found.cells())} finished batches are kept"
    reporter.note(f"{kept}; the command that started it goes on.")
    return 1 if trouble or ended["elsewhere"] else 0


def _cancel_jobs(folder: RunFolder) -> list[str]:
    """Cancel the living jobs of a run; returns their ids."""
    if not available():
        raise SlurmError("Slurm's commands are not on this machine: run this where jobs are submitted")
    ids = {record.job for launch in launches(folder) for record in records(launch)}
    tokens = {record.token for launch in launches(folder) for record in records(launch)}
    alive: list[Task] = [
        task for task in tasks(job_name(folder.root)) if task.alive and (task.job in ids or task.comment in tokens)
    ]
    cancel(dict.fromkeys(task.job for task in alive))
    return list(dict.fromkeys(task.id for task in alive))
