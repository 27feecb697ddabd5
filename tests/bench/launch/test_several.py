"""A training on several processes: torchrun never outlives its job, and the nodes of a job find each other."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread, current_thread

import pytest

from tsdfm_bench.console import Reporter
from tsdfm_bench.errors import BenchError
from tsdfm_bench.launch import several, training
from tsdfm_bench.launch.leases import Lease, LeaseLost, Leases, process_start, workers
from tsdfm_bench.launch.several import Node, ProcessesFailed, dismiss, follow, lead, torchrun_command
from tsdfm_bench.launch.training import leave_progress, train_stage_of
from tsdfm_bench.launch.work import Work
from tsdfm_bench.methods.train.trainer import Progress

WORK = Work(
    "train",
    "train-tsdfm",
    "train tsdfm",
    "trained",
    {},
    stage={"scale": "base", "stage": "tsdfm", "task": "text:mine"},
    resources={"gpus": 8, "cpus": 17},
)
# Says its number, and takes a polite end as torchrun does.
PATIENT = """
import os, pathlib, signal, sys, time
def leave(number, frame):
    pathlib.Path(sys.argv[1], "left").touch()
    sys.exit(1)
signal.signal(signal.SIGTERM, leave)
pathlib.Path(sys.argv[1], "pid").write_text(str(os.getpid()))
time.sleep(600)
"""


def interrupting(folder: Path, error: type[BaseException]) -> None:
    """Raise, once the child has said its number."""
    path = folder / "pid"
    if path.exists() and path.read_text():
        raise error


def runs(monkeypatch: pytest.MonkeyPatch, code: str, *arguments: str) -> None:
    """Let a small program stand in for torchrun."""
    monkeypatch.setattr(several, "torchrun_command", lambda *_: [sys.executable, "-c", code, *arguments])


def on_node(monkeypatch: pytest.MonkeyPatch, rank: int, count: int = 2) -> None:
    """Make this process a task of a Slurm job."""
    for name, value in {"JOB_ID": 7, "RESTART_COUNT": 1, "NNODES": count, "NODEID": rank}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))


def test_one_process_for_each_gpu_of_one_node() -> None:
    """The command trains this stage and no other, where the job says, and divides the CPUs."""
    command = torchrun_command(WORK, Node())
    assert command[1:6] == ["-m", "torch.distributed.run", "--nproc-per-node", "8", "--standalone"]
    assert command[6:] == [
        *("-m", "tsdfm_bench", "train", "base", "--only", "tsdfm", "--out", "trained", "--threads", "2"),
        *("--task", "text:mine"),
    ]


def test_one_process_for_each_gpu_of_every_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each node starts its own processes, and meets the others at the first one."""
    on_node(monkeypatch, 1, 4)
    work = replace(WORK, resources={**WORK.resources, "nodes": 4})
    node = Node.of(work)
    assert node == Node(4, 1, "7-1")
    command = torchrun_command(work, node, "first", 29500)
    expected = "--nproc-per-node 8 --nnodes 4 --node-rank 1 --master-addr first --master-port 29500 -m tsdfm_bench"
    assert expected in " ".join(command)


def test_another_number_of_nodes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the processes would wait for the other half."""
    on_node(monkeypatch, 0, 1)
    with pytest.raises(BenchError, match="train-tsdfm is for 2 nodes, and Slurm has given it 1"):
        Node.of(replace(WORK, resources={"nodes": 2}))


@pytest.mark.parametrize("error", [KeyboardInterrupt, LeaseLost])
def test_whatever_ends_the_job_ends_its_processes_politely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """They get time to end; nothing goes on training what another job may go on with."""
    runs(monkeypatch, PATIENT, str(tmp_path))
    with pytest.raises(error):
        lead(WORK, lambda: interrupting(tmp_path, error))
    assert (tmp_path / "left").exists()
    assert process_start(int((tmp_path / "pid").read_text())) == ""


def test_a_failure_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be the loss of a process, so the stage is tried again ("failed", not "error"). A success is none."""
    monkeypatch.setattr(several, "SIGNAL_S", 0.0)
    work = replace(WORK, folder=str(tmp_path))
    runs(monkeypatch, "raise SystemExit(3)")
    result = train_stage_of(work, Reporter(quiet=True))
    assert result["state"] == "failed"
    assert "training tsdfm on several processes ended with exit code 3" in result["error"]
    told = "os.environ['TSDFM_BENCH_LEASED'] == '1' and sys.flags.safe_path"  # whose lease it is; no module from here
    runs(monkeypatch, f"import os, sys; sys.exit(not ({told}))")
    assert train_stage_of(work, Reporter(quiet=True))["state"] == "done"


def test_what_the_processes_have_trained_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease says steps and speed of the first process, not those that an earlier life has left."""
    lease = Leases(tmp_path, 60.0, beat=False).take("train-tsdfm")
    assert isinstance(lease, Lease)
    told: list[tuple[object, object]] = []

    def train(work: Work, check: Callable[[], None]) -> None:
        for progress in (
            None,
            Progress("tsdfm", 7, 10, 12345.6, {"loss": 2.5, "large": float("nan"), "MFU %": 41.0}),
            Progress("tsdfm", 8, 10, 0.0, {"validation": 3.0}),
        ):
            if progress is not None:
                leave_progress(tmp_path, progress)
            check()
            lease.renew()
            about = workers(tmp_path)["train-tsdfm"].about
            told.append((about.get("done"), about.get("speed")))

    leave_progress(tmp_path, Progress("tsdfm", 3, 10, 1.0, {}))
    monkeypatch.setattr(training, "lead", train)
    training._several(replace(WORK, folder=str(tmp_path)), Reporter(quiet=True), lease)
    speed = "12,346 tokens/s  loss 2.5  MFU % 41"
    assert told == [(None, None), (7, speed), (8, speed)]


def test_nodes_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits for the first, hears its address and port, and the meeting leaves no file."""
    work = replace(WORK, folder=str(tmp_path), resources={"nodes": 2})
    said: list[tuple[int, str, int]] = []

    def command(work: Work, node: Node, address: str = "", port: int = 0) -> list[str]:
        said.append((node.rank, address, port))
        # The first one ends after the second has come.
        wait = "import sys, time, pathlib\nwhile not pathlib.Path(sys.argv[1], 'second').exists(): time.sleep(0.05)"
        come = "import sys, pathlib\npathlib.Path(sys.argv[1], 'second').touch()"
        return [sys.executable, "-c", come if node.rank else wait, str(tmp_path)]

    monkeypatch.setattr(several, "torchrun_command", command)
    followed: list[bool] = []
    second = Thread(target=lambda: followed.append(follow(work)))
    on_node(monkeypatch, 0)
    monkeypatch.setattr(several, "rank_of_this_node", lambda: int(current_thread() is second))
    second.start()
    path = tmp_path / ".nodes" / "train-tsdfm-7-1.json"
    assert not path.exists()
    lead(work, lambda: None)
    second.join(60)
    assert followed == [True]
    (first, other) = sorted(said)
    assert (first[0], other[0]) == (0, 1)
    assert first[1:] == other[1:]
    assert first[2] > 0
    assert not path.exists()


def test_nodes_are_sent_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another process trains the stage, the other nodes do not wait for ever; nor does a job of one node care."""
    work = replace(WORK, folder=str(tmp_path), resources={"nodes": 2}, settings={"lease_s": 60.0})
    lease = Leases(tmp_path / ".leases", 60.0).take("train-tsdfm")
    assert isinstance(lease, Lease)
    on_node(monkeypatch, 0)
    assert train_stage_of(work, Reporter(quiet=True))["state"] == "busy"
    on_node(monkeypatch, 1)
    assert follow(work) is False
    dismiss(WORK)
    assert not Path(WORK.folder).exists()
    lease.release()


def test_a_failure_of_a_later_node_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised, so that Slurm ends the others."""
    monkeypatch.setattr(several, "SIGNAL_S", 0.0)
    work = replace(WORK, folder=str(tmp_path), resources={"nodes": 2})
    on_node(monkeypatch, 1)
    several._tell(several._meeting(work, Node.of(work)), "first", 29500)
    runs(monkeypatch, "raise SystemExit(1)")
    with pytest.raises(ProcessesFailed):
        follow(work)
