"""A real Slurm cluster on the loopback interface, for the tests marked `slurm`.

It needs root and Debian's Slurm packages. `TSDFM_BENCH_SLURM=install`, which `.ci/run` sets, lets the fixture install
them; otherwise only a machine that has them runs these tests. They are skipped, with the reason, where that fails.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
START, STOP = HERE / "start-local-slurm.sh", HERE / "stop-local-slurm.sh"
CPUS = 3  # jobs at once, whatever the machine has: Slurm only counts them
LARGEST_ARRAY = 2


@dataclass(frozen=True)
class Cluster:
    """A running cluster.

    Args:
        folder: where it lives.
    """

    folder: Path

    def slurm(self, *command: str) -> str:
        """The output of a Slurm command."""
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    def crash(self) -> None:
        """What a power failure does to the node: the controller calls it down, and every process of a job is gone.

        A node that comes back with a job's old processes still there refuses the job ("duplicate jobid").
        """
        self.slurm("scontrol", "update", "nodename=node0", "state=down", "reason=test")
        for pid in _with_descendants("slurmstepd", self.folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def drain(self) -> None:
        """Take the node out of service: what runs on it may end, nothing new begins."""
        self.slurm("scontrol", "update", "nodename=node0", "state=drain", "reason=test")

    def revive(self) -> None:
        """Bring the node back into service; one that has come back by itself needs nothing."""
        subprocess.run(["scontrol", "update", "nodename=node0", "state=resume"], capture_output=True, timeout=60)
        end = time.monotonic() + 60
        asked = ("sinfo", "--noheader", "--nodes=node0", "--format=%T")
        while not self.slurm(*asked).strip().startswith(("idle", "mixed", "allocated")):
            assert time.monotonic() < end, self.slurm("sinfo")
            time.sleep(0.2)

    def states(self, name: str = "") -> dict[str, str]:
        """Job (array element) id -> state of all jobs the controller remembers, by default of every name."""
        asked = ["squeue", "--array", "--noheader", "--states=all", "--format=%i|%T"]
        lines = self.slurm(*asked, *([f"--name={name}"] if name else [])).splitlines()
        return dict(line.split("|") for line in lines)


def _with_descendants(name: str, folder: Path) -> list[int]:
    """Ids of the processes with this name at work in a folder (a file of it is open), of their children, and so on."""
    parents, found = {}, set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            content = path.read_text()
            pid, parent = int(path.parent.name), int(content.rpartition(")")[2].split()[1])
            parents[pid] = parent
            links = [path.parent / "cwd", *(path.parent / "fd").iterdir()]
            if content[content.index("(") + 1 : content.rindex(")")] == name and any(
                _inside(link, folder) for link in links
            ):
                found.add(pid)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found)


def _inside(link: Path, folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return link.readlink().is_relative_to(folder)
    return False


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The cluster, with SLURM_CONF and PATH set for this process and its children."""
    if os.geteuid() != 0:
        pytest.skip("a Slurm cluster for tests is started by root only")
    if shutil.which("munged", path=f"{os.environ['PATH']}:/usr/sbin") is None and not _may_install():
        pytest.skip("no Slurm here: apt-get install munge slurmctld slurmd slurm-client, or TSDFM_BENCH_SLURM=install")
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a short path: sockets lie in it
    options = ["--cpus", str(CPUS), "--max-array", str(LARGEST_ARRAY), "--second-node"]
    try:
        start = [str(START), str(folder), *options, *([] if _may_install() else ["--no-install"])]
        started = subprocess.run(start, capture_output=True, text=True, timeout=400)
        if started.returncode:
            said = (started.stderr or started.stdout).strip().splitlines()[-3:]
            pytest.skip(f"no Slurm cluster could be started: {' / '.join(said)}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(folder / "etc" / "slurm.conf"))
            patch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
            for name in [name for name in os.environ if name.startswith(("SLURM_JOB", "SLURM_ARRAY", "SBATCH_"))]:
                patch.delenv(name)
            yield Cluster(folder)
    finally:
        subprocess.run([str(STOP), str(folder), "--wipe"], capture_output=True, timeout=120)
        shutil.rmtree(folder, ignore_errors=True)


def _may_install() -> bool:
    return os.environ.get("TSDFM_BENCH_SLURM") == "install"
