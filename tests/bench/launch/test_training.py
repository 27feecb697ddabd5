"""A training on several GPUs of a node: accelerate runs in a process of its own, and never outlives its job."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tsdfm_bench.launch import training
from tsdfm_bench.launch.leases import Lease, LeaseLost, Leases, process_start
from tsdfm_bench.launch.training import _on_several, accelerate_command
from tsdfm_bench.launch.work import Work

WORK = Work(
    "train",
    "train-tsdfm",
    "train tsdfm",
    "trained",
    {},
    stage={"scale": "base", "stage": "tsdfm", "task": "text:mine"},
    resources={"gpus": 8, "cpus": 1},
)
# Says its number, and takes a polite end as accelerate does.
PATIENT = """
import os, pathlib, signal, sys, time
def leave(number, frame):
    pathlib.Path(sys.argv[1], "left").touch()
    sys.exit(1)
signal.signal(signal.SIGTERM, leave)
pathlib.Path(sys.argv[1], "pid").write_text(str(os.getpid()))
time.sleep(600)
"""


class Interrupted:
    """A lease; once the child has said its number, checking it raises."""

    def __init__(self, folder: Path, error: type[BaseException]) -> None:
        self.folder, self.error = folder, error

    def check(self) -> None:
        path = self.folder / "pid"
        if path.exists() and path.read_text():
            raise self.error


def test_one_process_for_each_gpu_of_one_node() -> None:
    """The command trains this stage and no other, where the job says."""
    command = accelerate_command(WORK)
    assert command[command.index("--num_processes") + 1] == "8"
    assert command[command.index("--num_machines") + 1] == "1"
    assert command[command.index("-m", command.index("--dynamo_backend")) :] == [
        *("-m", "tsdfm_bench", "train", "base", "--only", "tsdfm", "--out", "trained", "--task", "text:mine")
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt, LeaseLost])
def test_whatever_ends_the_job_ends_accelerate_politely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """It gets time to end its processes; nothing goes on training what another job may go on with."""
    monkeypatch.setattr(training, "accelerate_command", lambda work: [sys.executable, "-c", PATIENT, str(tmp_path)])
    with pytest.raises(error):
        _on_several(WORK, Interrupted(tmp_path, error))  # type: ignore[arg-type]
    assert (tmp_path / "left").exists()
    assert process_start(int((tmp_path / "pid").read_text())) == ""


def test_a_failure_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a success none."""
    lease = Leases(tmp_path, 60.0, beat=False).take("train-tsdfm")
    assert isinstance(lease, Lease)
    monkeypatch.setattr(training, "accelerate_command", lambda work: [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(RuntimeError, match="tsdfm with accelerate ended with exit code 3"):
        _on_several(WORK, lease)
    monkeypatch.setattr(training, "accelerate_command", lambda work: [sys.executable, "-c", ""])
    _on_several(WORK, lease)
