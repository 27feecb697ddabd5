"""A run that is stopped, kindly or not, and goes on later leaves the same bits as one that never was."""

from __future__ import annotations

import signal
import subprocess
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tsdfm_bench.rng import Streams

if TYPE_CHECKING:
    from conftest import Here


def wait_for_batches(here: Here, process: subprocess.Popen[str], count: int) -> None:
    """Until some batches of the method's cell are stored (the run has more than that to do)."""
    for _ in range(3000):
        if here.out.plan_path.exists() and len(here.out.completed_batches(here.cells(kind="method")[0])) >= count:
            return
        if process.poll() is not None:
            break
        time.sleep(0.02)
    process.kill()
    raise AssertionError(process.communicate())


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_stopped_run_goes_on_where_it_was(here: Here, number: int, code: int) -> None:
    process = here.start(methods="counter[slow_s=0.3]", samples="64")
    wait_for_batches(here, process, 2)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    (cell,) = here.cells(kind="method")
    kept = here.out.completed_batches(cell)
    assert 2 <= len(kept) < 8
    files = {batch: here.out.samples_path(cell, batch).read_bytes() for batch in kept}
    if number != signal.SIGKILL:
        assert "finished batches are kept in out" in said
        line = next(line for line in said.splitlines() if line.strip().startswith("tsdfm-bench run"))
        assert " ".join(here.arguments("run", samples="64")[-4:]) in line
        assert "Traceback" not in said
    here.events()

    assert here.run(methods="counter[slow_s=0.3]", samples="64").exit_code == 0
    made = [event for event in here.events() if event.startswith("sample")][1:]
    assert len(made) == 8 - len(kept)
    assert {batch: here.out.samples_path(cell, batch).read_bytes() for batch in kept} == files
    u = Streams.of(0, cell, 64).uniform("token", 0, 12)  # what the fake draws if it is never stopped
    assert np.array_equal(here.tokens(cell), (u * 16).floor().numpy())


def test_an_interrupt_before_the_first_batch_says_so(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tsdfm_bench.sweep.load_task", interrupt)
    result = here.run()
    assert result.exit_code == 130
    assert "nothing was sampled yet" in result.stderr
