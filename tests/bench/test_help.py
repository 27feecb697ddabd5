"""`--help` and the listings are quick because they import nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "pandas", "matplotlib", "datasets", "mauve")
COMMANDS = (
    "run",
    "plan",
    "status",
    "table",
    "methods",
    "tasks",
    "scorers",
    "doctor",
    "train",
    "verify",
    "figures",
    "conform",
    "new-method",
)
CODE = """
import sys
from tsdfm_bench.cli import main
for arguments in {arguments!r}:
    sys.argv = ["tsdfm-bench", *arguments]
    try:
        main()
    except SystemExit as left:
        assert not left.code, (arguments, left.code)
found = [name for name in {heavy!r} if name in sys.modules]
assert not found, found
"""


@pytest.mark.parametrize(
    "arguments",
    [
        [["--help"], *([command, "--help"] for command in COMMANDS), ["--version"]],
        [["methods"], ["tasks"], ["scorers"], ["methods", "--json"]],
    ],
    ids=["help", "listings"],
)
def test_nothing_heavy_is_imported(arguments: list[list[str]]) -> None:
    code = CODE.format(arguments=arguments, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_module_runs_like_the_script() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tsdfm_bench", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("tsdfm-bench ")


def test_a_wrong_option_is_wrong_use() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tsdfm_bench", "run", "--stepz", "8"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--steps" in done.stderr
