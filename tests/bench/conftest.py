"""The command line over the fakes, inside this process or in one of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import Result
from typer.testing import CliRunner

from tsdfm_bench.cli import app
from tsdfm_bench.results.schema import read_summary
from tsdfm_bench.results.store import RunFolder, read_samples

FAKES = Path(__file__).parent / "fakes.py"
DEFAULTS = {
    "--plugin": str(FAKES),
    "--task": "tiny",
    "--methods": "counter",
    "--steps": "2",
    "--scorers": "toy",
    "--metrics": "letters,distance,speed",
    "--samples": "24",
    "--batch-size": "8",
    "--out": "out",
    "--threads": "1",
}


def arguments(command: str, **given: str | None) -> list[str]:
    """A command with the fakes and small numbers; an option given as None is left out."""
    options = dict(DEFAULTS)
    for name, value in given.items():
        key = f"--{name.replace('_', '-')}"
        if value is None:
            options.pop(key, None)
        else:
            options[key] = value
    return [command, *(part for pair in options.items() for part in pair)]


class Here:
    """An empty working folder and the commands that run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log_path = folder / "events.log"
        self.out = RunFolder(folder / "out")
        self.fakes = FAKES
        self.arguments = arguments

    def cli(self, *args: str) -> Result:
        """Run a command line in this process."""
        return CliRunner().invoke(app, list(args), prog_name="tsdfm-bench")

    def run(self, *flags: str, **given: str | None) -> Result:
        """`tsdfm-bench run` over the fakes."""
        return self.cli(*arguments("run", **given), *flags)

    def start(self, *flags: str, **given: str | None) -> subprocess.Popen[str]:
        """The same in a process of its own."""
        command = [sys.executable, "-m", "tsdfm_bench", *arguments("run", **given), *flags]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ,
            # tests started in the background ignore Ctrl-C and would hand that on
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def events(self) -> list[str]:
        """What was loaded and called since the last look."""
        if not self.log_path.exists():
            return []
        lines = self.log_path.read_text().splitlines()
        self.log_path.unlink()
        return lines

    def summary(self) -> pd.DataFrame:
        """The summary of `out`."""
        return read_summary(self.out.root)

    def cells(self, **wanted: Any) -> list[str]:
        """Ids of the planned cells with these fields."""
        plan = json.loads(self.out.plan_path.read_text())
        return [c["id"] for c in plan["cells"] if all(c[key] == value for key, value in wanted.items())]

    def tokens(self, cell: str) -> np.ndarray:
        """All stored tokens of a cell, in order."""
        batches = self.out.completed_batches(cell)
        return np.concatenate([read_samples(self.out.samples_path(cell, batch)).tokens for batch in batches])


def _enter(folder: Path, patch: pytest.MonkeyPatch) -> Here:
    patch.chdir(folder)
    patch.setattr(os, "fsync", lambda handle: None)  # tests do not survive a power cut, and need not
    patch.setattr("tsdfm_bench.provenance.git_commit", lambda: None)
    found = Here(folder)
    patch.setenv("FAKES_LOG", str(found.log_path))
    patch.setenv("TSDFM_BENCH_CACHE", str(folder / ".cache"))
    return found


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    """An empty folder as the working folder, with events logged."""
    return _enter(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    """The same for all tests of a module that only look at one run."""
    with pytest.MonkeyPatch.context() as patch:
        yield _enter(tmp_path_factory.mktemp("shared"), patch)


@pytest.fixture
def fakes() -> Path:
    """The file of the fakes."""
    return FAKES
