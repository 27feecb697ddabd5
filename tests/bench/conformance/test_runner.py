"""The clock of the kit, and what becomes of the worker when the kit is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tsdfm_bench.conformance.runner import Patience, _cpu_s

BROKEN = Path(__file__).parent / "broken.py"


def stopped_at(cpu_per_s: float | None, limit_s: float = 100.0) -> float:
    """When a silent worker is stopped that gets so much of a processor."""
    patience = Patience(limit_s, 0.0, None if cpu_per_s is None else 0.0)
    for now in range(1, 100_000):
        cpu_s = None if cpu_per_s is None else cpu_per_s * now
        if patience.due(now) and patience.over(now, cpu_s):
            return now
    raise AssertionError


@pytest.mark.parametrize(
    ("cpu_per_s", "when"),
    [
        (0.0, 100),  # it sleeps
        (1.0, 100),  # it works, and nobody disturbs it
        (0.5, 200),  # it has to share the processor
        (0.02, 1000),  # hardly ever its turn: not for ever
        (None, 100),  # nobody can tell
    ],
)
def test_a_busy_machine_makes_no_check_fail(cpu_per_s: float | None, when: float) -> None:
    assert stopped_at(cpu_per_s) == when


def test_what_falls_asleep_after_some_work_is_stopped_soon() -> None:
    patience = Patience(100.0, 0.0, 0.0)
    for now, cpu_s in ((25.0, 20.0), (50.0, 20.0), (75.0, 20.0)):
        assert not patience.over(now, cpu_s)
    assert patience.over(100.0, 20.0)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_processor_time_is_that_of_the_process() -> None:
    before, used = _cpu_s(os.getpid()), time.process_time()
    while time.process_time() - used < 0.3:
        pass
    after = _cpu_s(os.getpid())
    assert before is not None
    assert after is not None
    assert 0.2 <= after - before <= 1.0
    assert _cpu_s(2**22 + 1) is None


def test_a_worker_does_not_outlive_the_kit(tmp_path: Path) -> None:
    """Killed in the middle of a check that hangs: neither process is left."""
    code = (
        "from tsdfm_bench.conformance import Target, conform\n"
        f"target = Target('runs-hangs', files=({str(BROKEN)!r},))\n"
        "conform(target, ['runs'], 600.0, lambda text: print(text, flush=True))"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    kit = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert kit.stdout is not None
    for line in kit.stdout:
        if line.startswith("runs"):
            break
    (worker,) = _children(kit.pid)
    kit.send_signal(signal.SIGKILL)
    kit.wait()
    for _ in range(600):
        if not _alive(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker is still there a minute later")


def _children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=True)
    return [int(line) for line in listed.stdout.split()]


def _alive(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.strip().startswith("Z")
