"""`tsdfm-bench score`: samples that exist are judged by more scorers and metrics, and nothing is sampled."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Here


def test_a_run_gets_more_scorers_and_metrics(here: Here) -> None:
    assert here.run(metrics="speed", infill="0.5").exit_code == 0
    (cell,) = here.cells(kind="method")
    before = here.tokens(cell)
    here.events()
    done = here.cli("score", "out", "--plugin", str(here.fakes), "--scorers", "toy[revision=2]", "--metrics", "entropy")
    assert done.exit_code == 0, done.output
    events = here.events()
    assert not [event for event in events if event.startswith(("sample", "load counter"))]
    assert "load toy" in events
    rows = here.summary().query("kind == 'method'")
    assert {"entropy_nats"} < set(rows["metric"])
    assert here.out.scores_path("toy", cell).exists()
    assert here.out.scores_path("toy[revision=2]", cell).exists()
    assert here.cells(kind="method") == [cell]
    assert (here.tokens(cell) == before).all()


def test_scorers_of_the_run_may_be_missing_and_those_named_here_may_not(here: Here) -> None:
    here.run(scorers="toy,absent")
    for named, code in (("toy[revision=2]", 0), ("absent", 1), ("unfit", 2), ("toy[revision=3]", 0)):
        done = here.cli("score", "out", "--plugin", str(here.fakes), "--scorers", named)
        assert done.exit_code == code, done.output
        assert code == 2 or "Scorer absent is missing" in done.stdout


def test_a_file_is_scored_whole(here: Here) -> None:
    lines = [json.dumps({"text": text}) for text in ("the tin man sat", "a man in a tree", "no one is here")]
    (here.folder / "mine.jsonl").write_text("\n".join(lines), encoding="utf-8")
    words = ["--task", "tiny", "--scorers", "toy", "--metrics", "gen-ppl", "--out", "out"]
    done = here.cli("score", "mine.jsonl", "--plugin", str(here.fakes), *words)
    assert done.exit_code == 0, done.output
    (row,) = here.summary().query("kind == 'method' and metric == 'gen_ppl'").to_dict("records")
    assert row["method"] == "file"
    assert row["n"] == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "no run folder and no file of samples called nowhere"),
        (["."], "is no run folder"),
        (["out", "--samples", "4"], "--samples belongs to a file of samples"),
    ],
)
def test_wrong_use(here: Here, arguments: list[str], said: str) -> None:
    here.out.root.mkdir()
    here.out.plan_path.write_text("{}")
    done = here.cli("score", *arguments)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())
