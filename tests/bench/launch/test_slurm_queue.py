"""Reading the queue, finding the cluster's limits and submitting, against programs that answer like Slurm's."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tsdfm_bench.launch import slurm_jobs, slurm_queue
from tsdfm_bench.launch.slurm_queue import SlurmError, Task, array_limit, cancel, expand, parse_queue, tasks
from tsdfm_bench.launch.work import Launch

QUEUE = """\
12|0|RUNNING|None|2026-11-24T00:11:45|tok-1|node3
12|1|COMPLETED|None|2026-11-24T00:11:45|tok-1|node3
12|2-4,9%2|PENDING|JobArrayTaskLimit|N/A|tok-1|
14|N/A|PENDING|Dependency|N/A|tok-2|
15|N/A|PENDING|DependencyNeverSatisfied|N/A|tok-3|
16|N/A|PREEMPTED|None|2026-11-24T00:11:45|tok-4|node1
slurm_load_jobs error: something that is no job
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the front of PATH; every program in it writes its arguments and environment to `calls`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return folder


def program(folder: Path, name: str, answer: str, code: int = 0, error: str = "") -> Path:
    """A program that answers; returns the file where its calls are logged, one JSON list a line."""
    log = folder / f"{name}.calls"
    text = (
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"slurm = {{k: v for k, v in os.environ.items() if k.startswith(('SLURM_', 'SBATCH_'))}}\n"
        f"open({str(log)!r}, 'a').write(json.dumps([sys.argv[1:], slurm]) + '\\n')\n"
        f"print({error!r}, end='', file=sys.stderr)\nprint({answer!r}, end='')\nsys.exit({code})\n"
    )
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return log


def calls(log: Path) -> list[tuple[list[str], dict[str, str]]]:
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []


def test_the_queue_is_read_in_one_call(programs: Path) -> None:
    """Array elements come one by one, whether squeue lists them so or as a range."""
    log = program(programs, "squeue", QUEUE)
    found = {task.id: task for task in tasks("mine")}
    assert list(found) == ["12_0", "12_1", "12_2", "12_3", "12_4", "12_9", "14", "15", "16"]
    assert [id for id, task in found.items() if task.alive] == ["12_0", "12_2", "12_3", "12_4", "12_9", "14", "15"]
    assert [id for id, task in found.items() if task.never] == ["15"]
    assert found["12_0"] == Task("12", 0, "RUNNING", "", "2026-11-24T00:11:45", "tok-1", "node3")
    assert found["12_3"].reason == "JobArrayTaskLimit"
    ((arguments, environment),) = calls(log)
    assert "--name=mine" in arguments
    assert environment["SLURM_BITSTR_LEN"] == "0"  # long arrays are not cut


@pytest.mark.parametrize(
    ("text", "indices"),
    [
        ("N/A", [None]),
        ("", [None]),
        ("7", [7]),
        ("0-2", [0, 1, 2]),
        ("[1,4-5%8]", [1, 4, 5]),
        ("0-6:3", [0, 3, 6]),
        ("3-12%4", list(range(3, 13))),
    ],
)
def test_array_indices(text: str, indices: list[int | None]) -> None:
    """The forms in which squeue writes array elements."""
    assert expand(text) == indices


def test_ten_thousand_pending_elements_are_read() -> None:
    """Arrays as large as the cluster's limit, all waiting."""
    text = "".join(f"{job}|0-999%64|PENDING|Priority|N/A|t|\n" for job in range(10))
    assert len({task.id for task in parse_queue(text)}) == 10_000


def test_a_controller_that_does_not_answer_is_not_an_empty_queue(programs: Path) -> None:
    """It is an error, so that nothing is submitted on a guess."""
    program(programs, "squeue", "", 1, "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n")
    with pytest.raises(SlurmError, match="Unable to contact slurm controller"):
        tasks("mine")


@pytest.mark.parametrize(
    ("config", "limit"), [("MaxArraySize            = 1001\n", 1001), ("MaxArraySize = 0\n", 1), ("Nothing\n", 1001)]
)
def test_array_limit(programs: Path, config: str, limit: int) -> None:
    """Read from the cluster; 0 means that arrays are switched off."""
    program(programs, "scontrol", f"Configuration data\n{config}MaxJobCount = 10000\n")
    assert array_limit() == limit


def test_cancelling_many(programs: Path) -> None:
    """Every id once, in commands of bearable length."""
    log = program(programs, "scancel", "")
    cancel([str(n) for n in range(1200)] * 2)
    given = [arguments[1:] for arguments, _ in calls(log)]
    assert [id for ids in given for id in ids] == [str(n) for n in range(1200)]
    assert max(map(len, given)) <= slurm_queue.IDS_PER_COMMAND


def files_of(launch: Launch, count: int) -> list[Path]:
    return [launch.folder / f"{n}.json" for n in range(count)]


def test_an_array_is_submitted_and_recorded(programs: Path, tmp_path: Path) -> None:
    """One sbatch; the record has the id, the files and the units; the script asks for what the settings say."""
    program(programs, "srun", "")
    log = program(programs, "sbatch", "Submitted batch job 77\n")
    launch = Launch.new(tmp_path / "jobs", "slurm")
    units = [[f"cell-{n}"] for n in range(3)]
    parameters = {"partition": "spot", "time": 30, "gpus_per_node": 1, "array_parallelism": 2}
    record = slurm_jobs.submit(launch, "sample", "mine", files_of(launch, 3), units, parameters)
    assert record.job == "77"
    assert slurm_jobs.records(launch) == [record]
    ((arguments, _),) = calls(log)
    script = Path(arguments[0]).read_text()
    for line in ("--partition=spot", "--time=30", "--array=0-2%2", f"--comment={record.token}", "--job-name=mine"):
        assert f"#SBATCH {line}\n" in script
    assert "#SBATCH --signal=USR2@120" in script
    assert "srun " in script


def test_a_short_limit_is_not_all_warning(programs: Path, tmp_path: Path) -> None:
    """The signal before the end comes after two thirds of a short limit, not at the start."""
    program(programs, "srun", "")
    log = program(programs, "sbatch", "Submitted batch job 77\n")
    launch = Launch.new(tmp_path / "jobs", "slurm")
    slurm_jobs.submit(launch, "sample", "mine", files_of(launch, 1), [["a"]], {"time": 3})
    ((arguments, _),) = calls(log)
    assert "--signal=USR2@60" in Path(arguments[0]).read_text()


def test_dependencies(programs: Path, tmp_path: Path) -> None:
    """Later submissions wait for earlier ones by id."""
    program(programs, "srun", "")
    log = program(programs, "sbatch", "Submitted batch job 77\n")
    launch = Launch.new(tmp_path / "jobs", "slurm")
    first = slurm_jobs.submit(launch, "sample", "mine", files_of(launch, 2), [["a"], ["b"]], {})
    slurm_jobs.submit(launch, "score", "mine", files_of(launch, 1), [["a"]], {}, after=[first])
    script = Path(calls(log)[1][0][0]).read_text()
    assert "--dependency=afterany:77" in script


def test_inside_a_job_the_next_one_is_not_a_part_of_it(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sbatch sees no SLURM_ or SBATCH_ variable of the job it is called from, but still finds its cluster."""
    program(programs, "srun", "")
    log = program(programs, "sbatch", "Submitted batch job 77\n")
    inside = {"SLURM_JOB_ID": "5", "SLURM_MEM_PER_NODE": "10", "SBATCH_PARTITION": "x", "SLURM_CONF": "/etc/s.conf"}
    for name, value in inside.items():
        monkeypatch.setenv(name, value)
    launch = Launch.new(tmp_path / "jobs", "slurm")
    slurm_jobs.submit(launch, "sample", "mine", files_of(launch, 1), [["a"]], {})
    ((_, environment),) = calls(log)
    assert environment == {"SLURM_CONF": "/etc/s.conf"}
    assert {name: os.environ[name] for name in inside} == inside


def test_outside_a_job_a_users_own_defaults_hold(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SBATCH_ACCOUNT in a profile is meant."""
    program(programs, "srun", "")
    log = program(programs, "sbatch", "Submitted batch job 77\n")
    monkeypatch.setenv("SBATCH_ACCOUNT", "lab")
    launch = Launch.new(tmp_path / "jobs", "slurm")
    slurm_jobs.submit(launch, "sample", "mine", files_of(launch, 1), [["a"]], {})
    assert calls(log)[0][1]["SBATCH_ACCOUNT"] == "lab"


def test_a_refused_submission_says_what_sbatch_said(programs: Path, tmp_path: Path) -> None:
    """The reason, without a traceback; the record stays without an id."""
    program(programs, "srun", "")
    program(programs, "sbatch", "", 1, "sbatch: error: invalid partition specified: nope\nsbatch: error: failed\n")
    launch = Launch.new(tmp_path / "jobs", "slurm")
    with pytest.raises(SlurmError, match="invalid partition specified: nope"):
        slurm_jobs.submit(launch, "sample", "mine", files_of(launch, 1), [["a"]], {"partition": "nope"})
    (record,) = slurm_jobs.records(launch)
    assert record.job == ""


def test_killed_between_sbatch_and_the_record(programs: Path, tmp_path: Path) -> None:
    """The next launcher finds the jobs by their comment and takes them for its own."""
    program(programs, "srun", "")
    program(programs, "sbatch", "", 1, "sbatch: error: stands for a kill\n")
    launch = Launch.new(tmp_path / "jobs", "slurm")
    with pytest.raises(SlurmError):
        slurm_jobs.submit(launch, "sample", "mine", files_of(launch, 2), [["a"], ["b"]], {})
    (record,) = slurm_jobs.records(launch)
    queue = [Task("88", 0, "RUNNING", comment="another"), Task("99", 1, "RUNNING", comment=record.token)]
    assert slurm_jobs.adopt(launch, record, queue).job == "99"
    assert slurm_jobs.records(launch)[0].job == "99"


def test_job_names_tell_run_folders_apart(tmp_path: Path) -> None:
    """One name per folder, the same from wherever it is named."""
    assert slurm_jobs.job_name(tmp_path / "a") == slurm_jobs.job_name(tmp_path / "b" / ".." / "a")
    assert slurm_jobs.job_name(tmp_path / "a") != slurm_jobs.job_name(tmp_path / "b")
