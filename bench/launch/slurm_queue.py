"""Talking to Slurm: one `squeue` for all jobs of a run, cluster limits, cancelling.

What Slurm says only adds to what the run folder holds: it tells which jobs may still come back, nothing else. A job
that the controller has forgotten is simply not alive. A controller that does not answer is not a queue without jobs:
`alive` raises, and nothing is submitted on a guess.

States: slurm.schedmd.com/squeue.html, "JOB STATE CODES".
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tsdfm_bench.errors import BenchError

PENDING = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "RESV_DEL_HOLD", "REQUEUE_HOLD"})
ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT", "REVOKED"}
    | {"PREEMPTED", "SPECIAL_EXIT", "LAUNCH_FAILED"}
)
NEVER = ("DependencyNeverSatisfied",)
HELD = ("JobHeldUser", "JobHeldAdmin", "launch failed requeued held", "job requeued in held state")
IDS_PER_COMMAND = 500
ANSWER_WITHIN_S = 60.0
SMALLEST_LIMIT = 1001  # Slurm's own default of MaxArraySize
# Parameters that sbatch would take from the job this process runs in.
_INHERITED = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_")
_KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS")
_FIELDS = ("%F", "%K", "%T", "%r", "%S", "%k", "%N")


class SlurmError(BenchError):
    """Slurm did not do what it was asked for."""


@dataclass(frozen=True)
class Task:
    """One job, or one element of an array, as the controller sees it.

    Args:
        job: id of the job or of the array.
        index: in the array; None for a plain job.
        state: PENDING, RUNNING, ...
        reason: why it waits, "" if it does not.
        start: when it started or is expected to, "" if nobody knows.
        comment: what it was submitted with.
        node: where it runs.
    """

    job: str
    index: int | None
    state: str
    reason: str = ""
    start: str = ""
    comment: str = ""
    node: str = ""

    @property
    def id(self) -> str:
        """As Slurm writes it: 123 or 123_4."""
        return self.job if self.index is None else f"{self.job}_{self.index}"

    @property
    def alive(self) -> bool:
        """Whether it may still do something."""
        return self.state not in ENDED

    @property
    def never(self) -> bool:
        """Whether it waits for what will not happen."""
        return self.state in PENDING and self.reason.startswith(NEVER)

    @property
    def waiting(self) -> bool:
        """Whether it is still (or again) in the queue."""
        return self.state in PENDING


def available() -> bool:
    """Whether this machine has Slurm's commands."""
    return all(shutil.which(program) for program in ("sbatch", "squeue", "srun"))


def outside_environment() -> dict[str, str]:
    """This process's environment; inside a job, without what would turn the next job into a part of this one."""
    if "SLURM_JOB_ID" not in os.environ:
        return dict(os.environ)
    return {k: v for k, v in os.environ.items() if k in _KEPT or not k.startswith(_INHERITED)}


def _ask(command: Sequence[str]) -> str:
    """The output of a command.

    Raises:
        SlurmError: it is missing, failed, or did not answer in time.
    """
    # Long lists of array indices are cut without this.
    env = {**outside_environment(), "SLURM_BITSTR_LEN": "0", "SLURM_TIME_FORMAT": "standard"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_WITHIN_S, env=env)
    except FileNotFoundError:
        raise SlurmError(f"there is no {command[0]} on this machine: --launcher slurm runs where sbatch does") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} did not answer within {ANSWER_WITHIN_S:.0f} s") from None
    if done.returncode:
        raise SlurmError(f"{' '.join(command[:2])} failed: {_last(done.stderr or done.stdout)}")
    return done.stdout


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-2:]) or "it said nothing"


# ------------------------------------------------------------------------------------------------------- queue


def tasks(name: str) -> list[Task]:
    """All jobs of a name that the controller remembers, array elements one by one.

    Raises:
        SlurmError: the controller does not answer.
    """
    wanted = "|".join(_FIELDS)
    command = ["squeue", f"--name={name}", "--me", "--states=all", "--noheader", f"--format={wanted}"]
    return list(parse_queue(_ask(command)))


def parse_queue(text: str) -> Iterator[Task]:
    """The jobs of squeue's lines in the format of `tasks`; lines that are no jobs are passed over."""
    for line in text.splitlines():
        parts = line.strip().split("|")
        if len(parts) != len(_FIELDS) or not parts[0].isdigit():
            continue
        job, indices, state, reason, start, comment, node = (part.strip() for part in parts)
        about = (state, "" if reason == "None" else reason, "" if start == "N/A" else start, comment, node)
        for index in expand(indices):
            yield Task(job, index, *about)


def expand(indices: str) -> list[int | None]:
    """The elements of "0-3,7,10-20:5%4"; [None] for a job that is no array."""
    if not re.match(r"\[?\d", indices):
        return [None]
    found: list[int | None] = []
    for part in indices.strip("[]").partition("%")[0].split(","):
        if match := re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part):
            first = int(match[1])
            found += range(first, int(match[2] or first) + 1, int(match[3] or 1))
    return found


def array_limit() -> int:
    """How many elements an array may have on this cluster.

    Raises:
        SlurmError: the controller does not answer.
    """
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", _ask(["scontrol", "show", "config"]), re.MULTILINE)
    return max(1, int(match[1]) if match else SMALLEST_LIMIT)


def cancel(ids: Iterable[str]) -> None:
    """Cancel jobs; ids that are over or unknown are no error.

    Raises:
        SlurmError: the controller does not answer.
    """
    ids = list(dict.fromkeys(ids))
    for first in range(0, len(ids), IDS_PER_COMMAND):
        _ask(["scancel", "--quiet", *ids[first : first + IDS_PER_COMMAND]])
