"""A sweep on a real cluster: whatever becomes of its jobs, it ends complete and equal to one that ran in one process.

The methods and scorers are those of tests/bench/fakes.py: each batch takes as long as a test wants. `slow_s` is an
option of the method and so a part of what a cell is; the draws do not depend on it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tsdfm_bench.launch.slurm_jobs import job_name, records
from tsdfm_bench.launch.work import launches
from tsdfm_bench.results.schema import read_summary
from tsdfm_bench.results.store import RunFolder, read_samples, read_scores

if TYPE_CHECKING:
    from conftest import Cluster

pytestmark = pytest.mark.slurm
FAKES = Path(__file__).parent.parent / "bench" / "fakes.py"
PATIENCE_S = 120.0
SLOW = "counter[slow_s=0.7]"


class Site:
    """A folder to run in, on the cluster.

    Args:
        folder: the working folder.
        inline: where the results of one process are, for all tests.
        cluster: running.
    """

    def __init__(self, folder: Path, inline: Path, cluster: Cluster) -> None:
        self.folder, self.inline, self.cluster = folder, inline, cluster
        self.out = RunFolder(folder / "out")
        self.name = job_name(self.out.root)

    def command(self, out: str, methods: str, samples: int, *more: str) -> list[str]:
        """`tsdfm-bench run` over the fakes."""
        program = [sys.executable, "-m", "tsdfm_bench", "run", "--plugin", str(FAKES), "--task", "tiny"]
        what = ["--methods", methods, "--scorers", "toy", "--metrics", "letters", "--steps", "2"]
        size = ["--samples", str(samples), "--batch-size", "4", "--threads", "1", "--out", out]
        return [*program, *what, *size, *more]

    def start(self, slurm: str, methods: str = SLOW, samples: int = 24, *more: str) -> subprocess.Popen[str]:
        """A launcher that waits for its jobs."""
        keys = f"poll=1,cpus_per_task=1,{slurm}"
        command = self.command("out", methods, samples, "--launcher", "slurm", "--slurm", keys, "--lease", "3", *more)
        return subprocess.Popen(
            command, cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ
        )

    def end(self, launcher: subprocess.Popen[str], code: int = 0) -> str:
        """What the launcher said, when it is done."""
        _, said = launcher.communicate(timeout=PATIENCE_S)
        assert launcher.returncode == code, said
        return said

    def until(self, what: Callable[[], bool], launcher: subprocess.Popen[str] | None = None) -> None:
        """Wait for something to become true."""
        end = time.monotonic() + PATIENCE_S
        while not what():
            assert time.monotonic() < end, self.cluster.slurm("squeue", "--states=all")
            if launcher is not None and launcher.poll() is not None:
                raise AssertionError(f"the launcher has ended: {launcher.communicate()[1]}")
            time.sleep(0.1)

    def under_way(self) -> bool:
        """Whether some, but not all, batches of the method are there."""
        return any(len(self.out.completed_batches(cell)) >= 2 for cell in self.method_cells())

    def method_cells(self) -> list[str]:
        """Ids of the method's cells."""
        if not self.out.plan_path.exists():
            return []
        return [str(cell["id"]) for cell in self.out.read_plan()["cells"] if cell["kind"] == "method"]

    def states(self) -> dict[str, str]:
        """States of this run's jobs."""
        return self.cluster.states(self.name)

    def sampling_job(self) -> str:
        """Id of the running job that samples the method."""
        running = {job for job, state in self.states().items() if state == "RUNNING"}
        for launch in launches(self.out):
            for record in records(launch):
                if record.stage == "sample" and set(self.method_cells()) & {
                    key for keys in record.units for key in keys
                }:
                    found = running & {record.job, *(f"{record.job}_{index}" for index in range(len(record.units)))}
                    if found:
                        return found.pop()
        return ""

    def submissions(self) -> int:
        """How often jobs were submitted."""
        return sum(len(records(launch)) for launch in launches(self.out))

    def check(self, methods: str = SLOW, samples: int = 24) -> None:
        """The run folder holds what a run in one process gives, and nothing but that."""
        inline = RunFolder(self.inline / re.sub(r"\W", "-", f"{methods}-{samples}"))
        if not inline.plan_path.exists():
            command = self.command(str(inline.root), methods, samples, "--launcher", "inline")
            subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE_S)
        assert self.out.cells() == inline.cells()
        for cell in inline.cells():
            batches = inline.completed_batches(cell)
            assert self.out.completed_batches(cell) == batches
            for batch in batches:
                ours, theirs = (read_samples(folder.samples_path(cell, batch)) for folder in (self.out, inline))
                np.testing.assert_array_equal(ours.tokens, theirs.tokens)
            if inline.scores_path("toy", cell).exists():
                ours_nll, theirs_nll = (read_scores(f.scores_path("toy", cell)).nll for f in (self.out, inline))
                for one, other in zip(ours_nll, theirs_nll, strict=True):
                    np.testing.assert_array_equal(one, other)
        columns = ["cell", "metric", "scorer", "value", "low", "high", "n"]
        one, other = (read_summary(folder.root)[columns].reset_index(drop=True) for folder in (self.out, inline))
        assert one.equals(other)


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the runs that all others are compared with."""
    return tmp_path_factory.mktemp("inline")


@pytest.fixture
def site(tmp_path: Path, inline: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Site:
    """An empty folder on the cluster."""
    monkeypatch.setenv("TSDFM_BENCH_CACHE", str(tmp_path / "cache"))
    return Site(tmp_path, inline, cluster)


@pytest.fixture
def high(cluster: Cluster) -> Callable[[], str]:
    """Submits a job that needs the whole node, at once and for a few seconds."""

    def push() -> str:
        answer = cluster.slurm(
            *("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--job-name=high", "--wrap=sleep 3")
        )
        return re.findall(r"\d+", answer)[0]

    return push


def restarts(site: Site, job: str) -> int:
    """How often Slurm has put a job back into the queue."""
    return int(re.findall(r"Restarts=(\d+)", site.cluster.slurm("scontrol", "show", "job", job))[0])


def test_arrays_bring_back_what_one_process_gives(site: Site) -> None:
    """Five cells and their scores, a job each, in arrays no larger than the cluster allows."""
    methods = "counter,counter[flavour=loud]"
    site.end(site.start("partition=main,pack=0", methods, 8))
    site.check(methods, 8)
    arrays = [len(record.files) for launch in launches(site.out) for record in records(launch)]
    assert sum(arrays) == 10
    assert max(arrays) == 4  # MaxArraySize of this cluster
    assert set(site.states().values()) == {"COMPLETED"}


def test_preempted_with_time_to_save(site: Site, high: Callable[[], str]) -> None:
    """A job of higher rank comes: ours saves its batches, goes back into the queue and continues."""
    launcher = site.start("partition=main,time=30")
    site.until(site.under_way, launcher)
    job = site.sampling_job()
    high()
    site.until(lambda: restarts(site, job) == 1, launcher)
    site.end(launcher)
    assert site.submissions() == 2  # samples and scores, once each: Slurm itself brought the job back
    site.check()


def test_preempted_without_warning(site: Site, high: Callable[[], str]) -> None:
    """On `spot` jobs are killed at once; the lease of the killed one runs out, and its second life goes on."""
    launcher = site.start("partition=spot,time=30")
    site.until(site.under_way, launcher)
    job = site.sampling_job()
    high()
    site.until(lambda: restarts(site, job) == 1, launcher)
    site.end(launcher)
    site.check()


def test_killed_hard(site: Site) -> None:
    """kill -9 of the worker: no result, no accounting; the launcher sees that the job is gone and submits again."""
    launcher = site.start("partition=spot,time=30")
    site.until(site.under_way, launcher)
    holders = [json.loads(path.read_text()) for path in site.out.leases_folder.glob("*.json")]
    (cell,) = site.method_cells()
    (pid,) = [holder["pid"] for holder in holders if holder["unit"] == cell]
    os.kill(pid, signal.SIGKILL)
    said = site.end(launcher)
    assert "submitting what is left" in said
    assert site.submissions() > 2
    site.check()


def test_scancel_of_one_job(site: Site) -> None:
    """A job that somebody cancels is submitted again by the launcher that waits for it."""
    launcher = site.start("partition=main,time=30")
    site.until(site.under_way, launcher)
    job = site.sampling_job()
    site.cluster.slurm("scancel", job)
    assert "cancelled" in site.end(launcher)
    assert site.states()[job] == "CANCELLED"
    site.check()


def test_cancel_and_resume(site: Site) -> None:
    """`tsdfm-bench cancel` ends the jobs and the launcher; the same command afterwards finishes the sweep."""
    launcher = site.start("partition=main,time=30")
    site.until(site.under_way, launcher)
    cancel = [sys.executable, "-m", "tsdfm_bench", "cancel", "out"]
    done = subprocess.run(cancel, cwd=site.folder, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert "was cancelled" in site.end(launcher, code=130)
    site.until(lambda: not {"RUNNING", "PENDING", "COMPLETING"} & set(site.states().values()))
    kept = len(site.out.completed_batches(site.method_cells()[0]))
    assert 2 <= kept < 6
    site.end(site.start("partition=main,time=30"))
    site.check()


def test_the_launcher_dies_and_the_next_one_attaches(site: Site) -> None:
    """A second run on a sweep that is under way submits nothing and waits for the jobs of the first."""
    launcher = site.start("partition=main,time=30")
    site.until(site.under_way, launcher)
    launcher.kill()
    launcher.communicate()
    before = site.submissions()
    said = site.end(site.start("partition=main,time=30"))
    assert "Submitted" not in said
    assert site.submissions() == before
    site.check()


def test_the_time_limit_warns_and_the_job_goes_on(site: Site) -> None:
    """The signal before the end of a limit makes the job save its batches and go back into the queue by itself."""
    launcher = site.start("partition=main,time=1,signal_delay_s=55", SLOW, 32)
    site.until(lambda: bool(site.sampling_job()), launcher)
    job = site.sampling_job()
    site.until(lambda: restarts(site, job) >= 1, launcher)
    site.end(launcher)
    site.check(SLOW, 32)


def test_the_node_fails(site: Site) -> None:
    """A node that goes down takes its jobs with it; when it is back, they go on."""
    launcher = site.start("partition=main,time=30")
    site.until(site.under_way, launcher)
    site.cluster.slurm("scontrol", "update", "nodename=node0", "state=down", "reason=test")
    try:
        site.until(lambda: "RUNNING" not in site.states().values(), launcher)
    finally:
        site.cluster.slurm("scontrol", "update", "nodename=node0", "state=resume")
    site.end(launcher)
    site.check()


def test_a_failing_cell_fails_once_and_alone(site: Site) -> None:
    """A method that raises is a row with its reason; its job is not tried again, the other cells are complete."""
    said = site.end(site.start("partition=main,time=30", "counter[spoil=raise],counter", 8), code=1)
    assert "boom in sample" in said
    assert site.submissions() == 2
    summary = read_summary(site.out.root)
    assert set(summary[summary["kind"] == "method"]["state"]) == {"done", "failed"}
