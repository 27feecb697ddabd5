"""One stage on several processes: torchrun starts one for each GPU of each node, and accelerate joins them.

A job of several nodes runs one task on each. The first one holds the lease of the stage and writes where it listens, or
that there is nothing to do, into the meeting's file; the others wait for that file and start their share. No node
outlives another: Slurm ends all tasks when one fails (`--kill-on-bad-exit`); what was trained is in the saved state.

How many processes there are may differ from one life of a training to the next: draws and state do not depend on it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tsdfm_bench.errors import BenchError
from tsdfm_bench.launch.work import Work
from tsdfm_bench.results.files import StoreError, check_name, make_folder, read_json, write_json

POLITE_S = 20.0
LOOK_S = 0.2
SIGNAL_S = 1.0
HERE = "127.0.0.1"
LEASED = "TSDFM_BENCH_LEASED"  # set for processes whose starter holds the lease of what they train


class ProcessesFailed(BenchError):
    """The processes of a training ended early: by an error of the training, or because one of them was lost."""


@dataclass(frozen=True)
class Node:
    """The place of this process among the nodes of its job.

    Args:
        count: nodes of the job.
        rank: of this one.
        life: names the job and how often it was put back into the queue.
    """

    count: int = 1
    rank: int = 0
    life: str = ""

    @classmethod
    def of(cls, work: Work) -> Node:
        """From the resources of a work and the environment that Slurm gives to its tasks.

        Raises:
            BenchError: Slurm gave it another number of nodes.
        """
        asked, given = int(work.resources.get("nodes", 1)), int(os.environ.get("SLURM_NNODES", "1"))
        if asked == 1:
            return cls()
        if asked != given:
            raise BenchError(f"{work.name} is for {asked} nodes, and Slurm has given it {given}")
        names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT")
        return cls(given, rank_of_this_node(), "-".join(os.environ.get(name, "0") for name in names))


def rank_of_this_node() -> int:
    """0 for the first or only node of a job."""
    return int(os.environ.get("SLURM_NODEID", "0"))


def processes_of(work: Work) -> int:
    """How many train on one node: one for each GPU, or one."""
    return max(1, int(work.resources.get("gpus", 0)))


def threads_of(work: Work) -> int:
    """CPU threads of each process."""
    return max(1, int(work.resources.get("cpus", 1)) // processes_of(work))


def torchrun_command(work: Work, node: Node, address: str = HERE, port: int = 0) -> list[str]:
    """The command that starts the processes of one node.

    Args:
        work: of kind "train".
        node: this one.
        address, port: of the first node; unused if there is one only.
    """
    stage, processes = work.stage, processes_of(work)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    if node.count > 1:
        command += ["--nnodes", str(node.count), "--node-rank", str(node.rank)]
        command += ["--master-addr", address, "--master-port", str(port)]
    else:
        command.append("--standalone")
    command += ["-m", "tsdfm_bench", "train", str(stage["scale"]), "--only", str(stage["stage"]), "--out", work.folder]
    command += ["--threads", str(threads_of(work))]
    return command + (["--task", str(stage["task"])] if stage.get("task") else [])


def lead(work: Work, check: Callable[[], None]) -> None:
    """Train the stage of a work, on this node and with those that `follow`.

    Args:
        work: of kind "train".
        check: called every second; what it raises ends the training.

    Raises:
        ProcessesFailed: they did not come to their end (the log says why).
    """
    node = Node.of(work)
    if node.count == 1:
        _run(work, torchrun_command(work, node), check)
        return
    address, port = socket.gethostname(), _free_port()
    path = _meeting(work, node)
    _tell(path, address, port)
    try:
        _run(work, torchrun_command(work, node, address, port), check)
    finally:
        path.unlink(missing_ok=True)


def dismiss(work: Work) -> None:
    """Tell the other nodes of this job, if there are any, that there is nothing to do."""
    node = Node.of(work)
    if node.count > 1:
        _tell(_meeting(work, node), "", 0)


def follow(work: Work) -> bool:
    """Train with the first node, when it says where; False if it says that there is nothing to do.

    It waits without a limit: if the first node fails, Slurm ends this process.

    Raises:
        ProcessesFailed: see `lead`.
    """
    node = Node.of(work)
    path = _meeting(work, node)
    while (found := _told(path)) is None:
        time.sleep(LOOK_S)
    address, port = found
    if not address:
        return False
    _run(work, torchrun_command(work, node, address, port), lambda: None)
    return True


def _meeting(work: Work, node: Node) -> Path:
    return Path(work.folder) / ".nodes" / check_name(f"{work.name}-{node.life}.json")


def _tell(path: Path, address: str, port: int) -> None:
    make_folder(path.parent)
    write_json(path, {"address": address, "port": port})


def _told(path: Path) -> tuple[str, int] | None:
    """Address and port of the first node; None if it has not said anything yet."""
    try:
        found = read_json(path)
    except StoreError:
        return None
    return str(found["address"]), int(str(found["port"]))


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("", 0))
        return int(listening.getsockname()[1])


def _run(work: Work, command: list[str], check: Callable[[], None]) -> None:
    """Run torchrun. Whatever ends this process ends it: politely, so that it ends its own."""
    threads = str(threads_of(work))
    settings = {
        "OMP_NUM_THREADS": threads,  # accelerate heeds only this
        "PYTHONSAFEPATH": "1",  # nothing in the working folder shadows a module
        LEASED: "1",
    }
    process = subprocess.Popen(command, env={**os.environ, **settings})
    try:
        while process.poll() is None:
            check()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(POLITE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    if process.returncode:
        time.sleep(SIGNAL_S)  # a signal that ended them may be on its way to this process, and says more
        stage = work.stage["stage"]
        raise ProcessesFailed(
            f"training {stage} on several processes ended with exit code {process.returncode}; see the log"
        )
