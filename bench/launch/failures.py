"""What is remembered of a failure, and for how long.

A method or scorer that raised will raise again: trying the same code on the same device in every run would cost a sweep
of thousands of cells its time. So such a failure *lasts*: it is kept with a mark (`Job.mark`) and the cell is tried
again when the mark changes (another version of the plug-in or of this program, an edited plug-in file, another device
or time limit), or with `--retry-failed`. A failure that lies in circumstances (files that could not be had or read, a
full disk, memory that ran out, a process that was killed) is tried again by the same command. A refusal is no failure:
it holds until the version or the plug-in's code changes (`Job.version`).
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdfm_bench.errors import AssetError, BenchError, CheckpointError, StorageError
from tsdfm_bench.registry import one_line
from tsdfm_bench.results.store import CorruptFile, RunFolder, StoreError, read_json, remove, write_json
from tsdfm_bench.summary import MEMORY_HINT

if TYPE_CHECKING:
    from tsdfm_bench.job import Job
    from tsdfm_bench.plan import Cell

_CIRCUMSTANCES = (AssetError, CheckpointError, StorageError, OSError, MemoryError)
_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")


def memory_ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in _MEMORY)


def lasts(error: BaseException) -> bool:
    """Whether the same code would fail again."""
    return not (isinstance(error, _CIRCUMSTANCES) or memory_ran_out(error) or getattr(error, "passing", False))


def record_failure(job: Job, cell: Cell, error: BaseException) -> None:
    """Leave error.txt (the message of our own errors, else the traceback and, if memory ran out, what to type)."""
    from tsdfm_bench.launch.batches import describe

    describe(job, cell)
    if isinstance(error, BenchError | StoreError):
        text = str(error)
    else:
        text = "".join(traceback.format_exception(error)).rstrip()
        if memory_ran_out(error):
            text += f"\n{MEMORY_HINT}, even for one sequence at a time: choose a smaller --length or a larger --device."
    folder = job.folder
    if lasts(error) and cell.kind == "method":
        write_json(folder.failure_path(cell.id), {"mark": job.mark("methods", cell.method)})
    else:
        remove(folder.failure_path(cell.id))
    folder.write_error(cell.id, text + "\n")


# ------------------------------------------------------------------------------------------------------- scores


def score_failure_path(folder: RunFolder, scorer: str, cell: str) -> Path:
    """Where the failure of one scorer on one cell is kept, beside its scores."""
    return folder.scores_path(scorer, cell).with_suffix(".failure.json")


def judge_problem_path(folder: RunFolder, scorer: str) -> Path:
    """Where it is kept that a scorer gives no scores at all."""
    return folder.scorer_folder(scorer) / "problem.json"


def record_score_failure(job: Job, scorer: str, name: str, cell: str, error: BaseException) -> None:
    """Remember why a scorer could not score a cell."""
    text = str(error) if isinstance(error, BenchError | StoreError) else one_line(error)
    mark = job.mark("scorers", name) if lasts(error) else ""
    write_json(score_failure_path(job.folder, scorer, cell), {"reason": text, "mark": mark})


def read_failure(path: Path) -> Mapping[str, Any]:
    """A remembered failure of a scorer; {} if there is none."""
    try:
        return read_json(path)
    except (FileNotFoundError, CorruptFile):
        return {}
