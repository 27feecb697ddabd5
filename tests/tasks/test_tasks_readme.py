"""The order table of tasks/README.md is what the command prints."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from tsdfm_bench.cli import app

README = Path(__file__).parent.parent.parent / "tasks" / "README.md"


def test_the_order_table_is_the_printed_one() -> None:
    printed = CliRunner().invoke(app, ["orders"], env={"COLUMNS": "120"}).stdout
    shown = [line[4:] for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("    ")]
    for line in printed.splitlines():
        assert not line.strip() or line.rstrip() in shown
