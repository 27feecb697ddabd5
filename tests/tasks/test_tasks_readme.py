"""tasks/README.md: its order table is what the command prints, and it names every corpus, packing and option."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from tsdfm_bench.cli import app
from tsdfm_bench.tasks.corpora import documents, packing, task
from tsdfm_bench.tasks.scorers.transformer import OPTIONS

README = Path(__file__).parent.parent.parent / "tasks" / "README.md"


def test_the_order_table_is_the_printed_one() -> None:
    printed = CliRunner().invoke(app, ["orders"], env={"COLUMNS": "120"}).stdout
    shown = [line[4:] for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("    ")]
    for line in printed.splitlines():
        assert not line.strip() or line.rstrip() in shown


def test_every_corpus_packing_and_option_is_named() -> None:
    text = README.read_text(encoding="utf-8")
    any_text, judge = text.partition("## Any text\n")[2].partition("## A judge by name\n")[::2]
    judge = judge.partition("\n## ")[0]
    for name in documents.CORPORA:
        variable = "TSDFM_BENCH_" + name.upper().replace("-", "_")
        assert f"| `text:{name}` | `{documents.CORPORA[name].dataset}`" in any_text
        assert f"| `{variable}` |" in any_text
    for name in (*packing.PACKINGS, *set(task.OPTIONS) - {"name"}):
        assert f"`{name}`" in any_text
    for name in set(OPTIONS) - {"name"}:
        assert f"`{name}`" in judge
