"""The README is a promise: its table is the recorded one, and its commands are real."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tsdfm_bench.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
REFERENCE = ROOT / "results" / "reference"


BLOCKS = re.findall(r"<!-- recorded: tsdfm-bench (.*?) -->\n(.*?)<!-- end -->", README, re.DOTALL)


def test_the_readme_records_a_table_and_the_verdicts() -> None:
    assert [command.split()[0] for command, _ in BLOCKS] == ["verify", "table"]


@pytest.mark.parametrize(("command", "content"), BLOCKS, ids=[command.split()[0] for command, _ in BLOCKS])
def test_what_is_recorded_is_what_the_command_prints(command: str, content: str) -> None:
    printed = CliRunner().invoke(app, command.replace("results/reference", str(REFERENCE)).split())
    assert printed.exit_code == 0, printed.output
    assert content.strip() == printed.stdout.strip()


def shown_commands() -> list[str]:
    lines = re.findall(r"^    (?:pip install -e '\.\[dev\]' && )?(tsdfm-bench .*)$", README, re.MULTILINE)
    inline = re.findall(r"`(tsdfm-bench [^`]*)`", README)
    return sorted({re.sub(r"\s+#.*", "", line).strip() for line in [*lines, *inline]})


@pytest.mark.parametrize("command", shown_commands())
def test_every_command_of_the_readme_exists_with_its_options(command: str) -> None:
    words = command.split()[1:]
    shown = CliRunner().invoke(app, [words[0], "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert shown.exit_code == 0, shown.output
    for option in (word for word in words if word.startswith("--")):
        assert option in shown.output


def test_recorded_results_carry_no_samples_and_no_machine_paths() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "results/reference"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / line for line in listed.stdout.splitlines()]
    assert any(path.name == "summary.parquet" for path in files)
    assert not [path for path in files if path.name.startswith("samples-")]
    for path in files:
        if path.suffix in (".json", ".csv", ".md", ".tex"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"(/home/|/root/|/Users/|/tmp/|/work/)", text), path
