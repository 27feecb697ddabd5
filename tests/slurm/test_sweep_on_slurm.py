"""A sweep on a real cluster: whatever becomes of its jobs, it ends complete and equal to one that ran in one process.

The methods and scorers are those of tests/bench/fakes.py; in the jobs each batch takes as long as FAKES_SLOW_S says.
What takes time is starting processes, so there are few jobs, and the sweep that meets its time limit runs beside the
other tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from tsdfm_bench.cli import app
from tsdfm_bench.launch.slurm_jobs import job_name, records
from tsdfm_bench.launch.work import launches
from tsdfm_bench.results.schema import read_summary
from tsdfm_bench.results.store import RunFolder, read_samples, read_scores

if TYPE_CHECKING:
    from conftest import Cluster

pytestmark = pytest.mark.slurm
FAKES = Path(__file__).parent.parent / "bench" / "fakes.py"
PATIENCE_S = 600.0  # only a hang takes that long


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
        program = ["run", "--plugin", str(FAKES), "--task", "tiny"]
        what = ["--methods", methods, "--scorers", "toy", "--metrics", "letters", "--steps", "2"]
        size = ["--samples", str(samples), "--batch-size", "4", "--threads", "1", "--out", out]
        return [*program, *what, *size, *more]

    def start(
        self, slurm: str, samples: int = 24, slow_s: float = 0.0, methods: str = "counter"
    ) -> subprocess.Popen[str]:
        """A launcher that waits for its jobs."""
        keys = f"poll=1,cpus_per_task=1,{slurm}"
        command = self.command("out", methods, samples, "--launcher", "slurm", "--slurm", keys, "--lease", "3")
        return self.spawn(command, slow_s)

    def spawn(self, command: list[str], slow_s: float = 0.0) -> subprocess.Popen[str]:
        """`tsdfm-bench` in a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "tsdfm_bench", *command],
            cwd=self.folder,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "FAKES_SLOW_S": str(slow_s)},
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

    def batches(self) -> int:
        """Batches of the method that are there."""
        return sum(len(self.out.completed_batches(cell)) for cell in self.method_cells())

    def some_more(self, launcher: subprocess.Popen[str]) -> str:
        """Wait until a running job has made some batches; returns its id."""
        before = self.batches()
        self.until(lambda: self.batches() >= before + 2 and bool(self.sampling_job()), launcher)
        return self.sampling_job()

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

    def check(self, samples: int = 24, methods: str = "counter", code: int = 0) -> None:
        """The run folder holds what a run in one process gives, and nothing but that."""
        inline = RunFolder(self.inline / re.sub(r"\W", "-", f"{methods}-{samples}"))
        if not inline.plan_path.exists():
            done = CliRunner().invoke(app, self.command(str(inline.root), methods, samples, "--launcher", "inline"))
            assert done.exit_code == code, done.stderr
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


class Limited:
    """A sweep whose sampling job has worked already when its time limit is lowered to the next full minute.

    Args:
        site: where it runs.
    """

    samples = 64

    def __init__(self, site: Site) -> None:
        self.site = site
        self.launcher = site.start("partition=main,time=9", self.samples, slow_s=3.0)
        self.job = site.some_more(self.launcher)
        minutes, seconds = site.cluster.slurm("squeue", "--noheader", f"--jobs={self.job}", "--format=%M").split(":")
        self.limit(int(minutes) + 1 + (int(seconds) > 55))
        self.thread = Thread(target=self._back)
        self.thread.start()

    def limit(self, minutes: int) -> None:
        """Set the time limit of the job."""
        self.site.cluster.slurm("scontrol", "update", f"jobid={self.job}", f"timelimit={minutes}")

    def _back(self) -> None:
        """When the job is back in the queue, give it time again."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end and self.launcher.poll() is None:
            with contextlib.suppress(subprocess.CalledProcessError):  # not while the job is between two states
                if restarts(self.site, self.job):
                    self.limit(30)
                    return
            time.sleep(0.5)


@pytest.fixture(scope="module", autouse=True)
def limited(tmp_path_factory: pytest.TempPathFactory, inline: Path, cluster: Cluster) -> Iterator[Limited]:
    """A sweep whose first job meets its time limit; it runs beside the first tests."""
    found = Limited(Site(tmp_path_factory.mktemp("limited"), inline, cluster))
    yield found
    if found.launcher.poll() is None:
        found.launcher.kill()
        found.launcher.communicate()
    found.thread.join()  # it needs the cluster


def test_arrays_bring_back_what_one_process_gives(site: Site) -> None:
    """Several cells in a job, where a method fails once and alone; scores in arrays no larger than allowed."""
    methods = "counter[spoil=raise],counter"
    said = site.end(site.start("partition=main,pack=0.0125", 8, methods=methods), code=1)
    assert "boom in sample" in said
    site.check(8, methods, code=1)
    found = [record for launch in launches(site.out) for record in records(launch)]
    assert [len(keys) for record in found if record.stage == "sample" for keys in record.units] == [3, 2]
    assert sorted(len(record.files) for record in found if record.stage == "score") == [1, 2, 2]  # MaxArraySize is 2
    assert set(site.states().values()) == {"COMPLETED"}
    summary = read_summary(site.out.root)
    assert set(summary[summary["kind"] == "method"]["state"]) == {"done", "failed"}


def test_a_sweep_file_and_a_node_that_is_drained(site: Site) -> None:
    """`run --config sweep.toml --launcher slurm`: what runs on the node ends, the rest waits, and `status` says so."""
    sweep = site.folder / "sweep.toml"
    sweep.write_text(
        f"plugins = ['{FAKES}']\ntask = 'tiny'\nmethods = ['counter']\nsteps = [2]\nscorers = ['toy']\n"
        "metrics = ['letters']\nsamples = 32\nbatch_size = 4\nthreads = 1\n"
        "[launcher]\nlease_s = 3.0\n[launcher.slurm]\npartition = 'main'\ntime = 30\npoll = 1\ncpus_per_task = 1\n"
    )
    command = ["run", "--config", str(sweep), "--launcher", "slurm", "--out", "out"]
    launcher = site.spawn(command, slow_s=0.8)
    site.some_more(launcher)
    site.cluster.drain()
    try:
        site.until(lambda: site.batches() == 8 and "RUNNING" not in site.states().values(), launcher)
        assert sorted(set(site.states().values())) == ["COMPLETED", "PENDING"]
        shown = CliRunner().invoke(app, ["status", str(site.out.root)])
        assert re.search(r"queued", shown.stdout), shown.stdout
        assert launcher.poll() is None
    finally:
        site.cluster.revive()
    site.end(launcher)
    site.check(32)


def test_cancel_and_resume(site: Site) -> None:
    """`tsdfm-bench cancel` ends the jobs and the launcher; the same command afterwards finishes the sweep."""
    samples = 96
    launcher = site.start("partition=main,time=30", samples, slow_s=1.0)
    site.some_more(launcher)
    done = CliRunner().invoke(app, ["cancel", str(site.out.root)])
    assert done.exit_code == 0, done.stderr
    assert "Cancelled: " in done.stderr
    assert "was cancelled" in site.end(launcher, code=130)
    site.until(lambda: not {"RUNNING", "PENDING", "COMPLETING"} & set(site.states().values()))
    assert 2 <= site.batches() < samples / 4
    site.end(site.start("partition=main,time=30", samples))
    site.check(samples)


def test_the_time_limit(limited: Limited) -> None:
    """A warning comes before the limit: the job keeps its batches, goes back into the queue by itself, and goes on."""
    site = limited.site
    site.end(limited.launcher)
    limited.thread.join()
    assert restarts(site, limited.job) >= 1
    logs = "".join(path.read_text() for path in site.out.jobs_folder.glob("*/slurm/*/*.out"))
    assert "this job is timed-out" in logs
    assert site.submissions() == 2  # samples and scores, once each
    site.check(limited.samples)


def test_preempted_killed_cancelled_and_left_alone(site: Site, high: Callable[[], str]) -> None:
    """One sweep meets it all: preemption with a warning, kill -9, scancel, the death of its launcher, a second one."""
    samples = 96
    launcher = site.start("partition=main,time=30", samples, slow_s=0.8)
    job = site.some_more(launcher)
    high()
    site.until(lambda: restarts(site, job) == 1, launcher)  # Slurm brings it back: nothing is submitted
    assert site.some_more(launcher) == job
    assert site.submissions() == 2

    (cell,) = site.method_cells()
    holders = [json.loads(path.read_text()) for path in site.out.leases_folder.glob("*.json")]
    (pid,) = [holder["pid"] for holder in holders if holder["unit"] == cell]
    os.kill(pid, signal.SIGKILL)
    again = site.some_more(launcher)
    assert again != job
    site.cluster.slurm("scancel", again)
    third = site.some_more(launcher)
    assert third not in (job, again)

    launcher.kill()
    _, said = launcher.communicate()
    assert "Jobs ended early (failed)" in said
    assert "Jobs ended early (cancelled)" in said
    before = site.submissions()
    said = site.end(site.start("partition=main,time=30", samples, slow_s=0.8))
    assert "Submitted" not in said
    assert site.submissions() == before
    site.check(samples)


def test_preempted_without_warning_and_the_node_fails(site: Site, high: Callable[[], str]) -> None:
    """Jobs that vanish with no time to save anything come back, wait for the lease of their dead self, and go on."""
    samples = 64
    launcher = site.start("partition=spot,time=30", samples, slow_s=0.8)
    job = site.some_more(launcher)
    high()
    site.until(lambda: restarts(site, job) == 1, launcher)
    site.some_more(launcher)
    site.cluster.crash()
    try:
        site.until(lambda: "RUNNING" not in site.states().values(), launcher)
    finally:
        site.cluster.revive()
    site.end(launcher)
    site.check(samples)


RECIPE = """
scale = "toy"
task = "markov[vocab=4;length=8]"
network = {width = 16, blocks = 1, heads = 1, condition = 8}
training = {steps = 700, batch = 2, lr = 1e-3, warmup = 2, validate_every = 100000, save_every_s = 0.1}
[[stage]]
name = "teacher"
kind = "mdlm"
source = "mask"
[[stage]]
name = "student"
kind = "mdlm"
source = "mask"
start_from = "teacher"
training = {steps = 3}
"""


def test_a_training_is_killed_and_goes_on(site: Site) -> None:
    """A stage whose job is killed goes on from its saved state; the job that waited for its success is replaced."""
    recipe = site.folder / "toy.toml"
    recipe.write_text(RECIPE)
    train = ["train", str(recipe), "--threads", "1", "--out"]
    keys = "partition=main,time=30,poll=1,cpus_per_task=1"
    more = ["--launcher", "slurm", "--slurm", keys, "--lease", "3"]
    trained = site.folder / "trained"
    launcher = site.spawn([*train, str(trained), *more])
    site.until((trained / ".state" / "teacher" / "state.safetensors").exists, launcher)
    (path,) = (trained / ".leases").glob("train-teacher.*.json")
    os.kill(json.loads(path.read_text())["pid"], signal.SIGKILL)
    said = site.end(launcher)
    assert "Jobs ended early (failed)" in said
    ended = ["CANCELLED", "COMPLETED", "COMPLETED", "FAILED"]
    site.until(lambda: sorted(site.cluster.states(job_name(trained)).values()) == ended)
    shown = CliRunner().invoke(app, ["status", str(trained)])
    assert "2 done" in shown.stdout
    assert CliRunner().invoke(app, [*train, str(site.folder / "inline")]).exit_code == 0
    for stage in ("teacher", "student"):
        ours, theirs = (site.folder / where / stage / "model.safetensors" for where in ("trained", "inline"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_training_on_two_nodes_loses_one_and_goes_on(site: Site) -> None:
    """The nodes train as one process would; when one is lost none waits for it, and a new job resumes the state."""
    recipe = site.folder / "toy.toml"
    recipe.write_text(RECIPE.replace("steps = 700", "steps = 100"))
    train = ["train", str(recipe), "--threads", "1", "--out"]
    keys = "partition=pair,nodes=2,time=30,poll=1,cpus_per_task=1"
    trained = site.folder / "trained"
    launcher = site.spawn([*train, str(trained), "--launcher", "slurm", "--slurm", keys, "--lease", "3"])
    state = trained / ".state" / "teacher" / "state.safetensors"
    site.until(state.exists, launcher)
    lost = [pid for pid in processes(str(trained)) if environment(pid).get("RANK") == "1"]
    for pid in lost:
        os.kill(pid, signal.SIGKILL)
    assert lost
    said = site.end(launcher)
    assert "Jobs ended early (failed)" in said
    assert CliRunner().invoke(app, [*train, str(site.folder / "inline")]).exit_code == 0
    for stage in ("teacher", "student"):
        ours, theirs = (load_file(site.folder / where / stage / "model.safetensors") for where in ("trained", "inline"))
        for name, tensor in theirs.items():  # gradients are added in another order
            np.testing.assert_allclose(ours[name].float(), tensor.float(), rtol=0.02, atol=0.02)


def processes(folder: str) -> list[int]:
    """Ids of the processes that name a folder in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if folder in path.read_text().split("\0"):
                found.append(int(path.parent.name))
    return found


def environment(pid: int) -> dict[str, str]:
    """Environment of a process; empty if it has ended."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/environ").read_text().split("\0")
        return dict(line.split("=", 1) for line in lines if "=" in line)
    return {}
