"""The commands around `run`: what they print, as text and as JSON, and their exit codes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conftest import Here


def test_plan_shows_the_work_and_writes_nothing(here: Here) -> None:
    result = here.cli(*here.arguments("plan", steps="2,4", methods="counter,stepless,foreign"), "--no-timing")
    assert result.exit_code == 0, result.stderr
    assert "at most 54 network calls" in result.stdout  # 3 batches x (2 + 4 + 12 tokens)
    assert "skipped" in result.stdout
    assert not here.out.root.exists()
    assert here.events() == []


def test_plan_knows_what_is_done(here: Here) -> None:
    here.run()
    content = json.loads(here.cli(*here.arguments("plan", samples="32"), "--json").stdout)
    assert content["batches_to_do"] == 5
    assert content["calls_at_most"] == 2
    assert {cell["state"] for cell in content["cells"]} == {"partial"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"methods": "cuonter"}, "did you mean 'counter'"),
        ({"task": "tinny"}, "did you mean 'tiny'"),
        ({"scorers": "toi"}, "did you mean 'toy'"),
        ({"metrics": "leters"}, "did you mean 'letters'"),
        ({"sources": "uniforn"}, "did you mean 'uniform'"),
        ({"steps": "0"}, "at least 1"),
        ({"steps": "-1"}, "at least 1"),
        ({"steps": "x"}, "not a whole number"),
        ({"prefix": "99"}, "does not fit"),
        ({"checkpoint": "gone.bin"}, "no such checkpoint"),
        ({"plugin": "gone.py"}, "no such plug-in file"),
        ({"config": "gone.toml"}, "no such sweep file"),
        ({"device": "quantum"}, "device 'quantum'"),
    ],
)
def test_wrong_use_is_code_2_and_leaves_nothing(here: Here, given: dict[str, str], said: str) -> None:
    result = here.run(**given)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert here.events() == []
    assert not list(here.out.root.rglob("*.npz"))


def test_status_counts_states(here: Here) -> None:
    here.run(methods="counter,counter[spoil=late raise],foreign", steps="2,13")
    content = json.loads(here.cli("status", "out", "--json").stdout)
    assert content["states"] == {"done": 5, "refused": 2, "failed": 1, "skipped": 1}
    failed = next(cell for cell in content["cells"] if cell["state"] == "failed")
    assert (failed["completed"], failed["batches"]) == (1, 3)
    assert failed["reason"] == "RuntimeError: boom in sample"
    shown = here.cli("status", "out")
    assert shown.exit_code == 0
    assert "5 done" in shown.stdout


def test_a_folder_may_be_called_anything(here: Here) -> None:
    """Nothing in a path is markup or the name of an emoji."""
    name = "x[/b]/dfm[solver=exact]:dog:"
    ran = here.run(out=name, samples="8")
    assert ran.exit_code == 0, ran.stderr
    assert f"Results: {name}  (summary.csv" in ran.stdout
    state = here.cli("status", name).stdout
    assert state.startswith(name)
    assert f"tables/ in {name}" in state
    assert f"folder     {name}\n" in here.cli(*here.arguments("plan", out=name, samples="8")).stdout


def test_the_newest_run_is_meant_if_none_is_named(here: Here) -> None:
    nothing = here.cli("status")
    assert nothing.exit_code == 2
    assert "there is no run" in nothing.stderr
    here.run(out=None)
    assert here.cli("status").exit_code == 0
    assert here.cli("table").exit_code == 0
    wrong = here.cli("table", "elsewhere")
    assert wrong.exit_code == 2
    assert "is no run folder" in wrong.stderr
    assert "runs/tiny-" in wrong.stderr


@pytest.fixture(scope="module")
def finished(shared: Here) -> Here:
    """A folder with a finished run that lacks one scorer."""
    assert shared.run(scorers="toy,absent").exit_code == 0
    return shared


@pytest.mark.parametrize(
    ("format", "start"),
    [("markdown", "**tiny"), ("md", "**tiny"), ("csv", "section,"), ("latex", "\\begin"), ("json", "{")],
)
def test_the_table_in_every_format(finished: Here, format: str, start: str) -> None:
    result = finished.cli("table", "out", "--format", format)
    assert result.exit_code == 0
    assert result.stdout.startswith(start)
    if format == "json":
        assert any("absent is missing" in note for note in json.loads(result.stdout)["footnotes"])


def test_a_part_of_a_table(here: Here) -> None:
    """Generators can be chosen; references and generators without steps stay; a wrong value names what there is."""
    here.run(methods="counter,stepless", steps="2,4")

    def rows(*args: str) -> list[list[str]]:
        lines = here.cli("table", "out", "-f", "csv", *args).stdout.splitlines()
        return [line.split(",")[:4] for line in lines[1:]]

    def generators(*args: str) -> list[list[str]]:
        return [row[1:4] for row in rows(*args) if row[0] == "method"]

    assert len(generators()) == 3
    assert len(generators("--steps", "4")) == 2
    assert len(generators("--steps", "2,4", "--methods", "counter")) == 2
    assert len(rows("--steps", "4")) == len(rows()) - 1
    wrong = here.cli("table", "out", "--steps", "8")
    assert wrong.exit_code == 2
    assert "unknown steps '8'. Known: 2, 4" in wrong.stderr


def test_an_unknown_format_and_an_unfinished_run(here: Here) -> None:
    here.run()
    assert "did you mean 'latex'" in here.cli("table", "out", "-f", "latx").stderr
    here.out.summary_path.unlink()
    result = here.cli("table", "out")
    assert result.exit_code == 1
    assert "finish the run first" in result.stderr


@pytest.mark.parametrize(("kind", "name"), [("methods", "counter"), ("tasks", "tiny"), ("scorers", "toy")])
def test_listings_and_descriptions(here: Here, kind: str, name: str) -> None:
    plugin = str(here.fakes)
    listed = json.loads(here.cli(kind, "--plugin", plugin, "--json").stdout)[kind]
    entry = next(entry for entry in listed if entry["name"] == name)
    assert entry["distribution"] == "fakes.py"
    assert name in here.cli(kind, "--plugin", plugin).stdout
    one = json.loads(here.cli(kind, name, "--plugin", plugin, "--json").stdout)
    assert one["name"] == name
    assert here.cli(kind, name, "--plugin", plugin).exit_code == 0
    unknown = here.cli(kind, f"{name}x", "--plugin", plugin)
    assert unknown.exit_code == 2
    assert f"did you mean '{name}'" in unknown.stderr


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("tasks", "text", ("tokenizer", "packing", "vocab_size", "lossy")),
        ("scorers", "hf", ("dtype", "stride", "revision")),
    ],
)
def test_what_needs_a_name_is_described_without_one(here: Here, kind: str, name: str, options: Sequence[str]) -> None:
    described = here.cli(kind, name)
    assert described.exit_code == 0
    assert f"{name}:" in described.stdout  # how it is typed
    facts = json.loads(here.cli(kind, name, "--json").stdout)
    assert f"'{name}' needs a " in facts["needs"]
    for option in options:
        assert f"`{option}`" in facts["about"]
    assert "Args:" not in json.loads(here.cli("scorers", "char-rnn", "--json").stdout)["about"]
    wrong = here.cli(kind, f"{name}[wrong=1]")
    assert wrong.exit_code == 2
    assert "unknown option" in wrong.stderr


def test_doctor_reports_and_never_raises(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    (here.folder / "bad.py").write_text("1 / 0")
    result = here.cli("doctor", "--json", "--plugin", "bad.py")
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert checks["python"]["state"] == "ok"
    assert checks["disk"]["state"] in ("ok", "note")
    assert "ZeroDivisionError" in checks["plug-in bad.py"]["found"]
    assert result.exit_code == 1
    healthy = here.cli("doctor", "--json")
    states = {check["name"]: check["state"] for check in json.loads(healthy.stdout)["checks"]}
    assert states["task text"] == states["weights file"] == "note"  # they are there, and want to be told more
    assert healthy.exit_code == ("missing" in states.values())


def test_training_an_unknown_scale_or_stage_is_wrong_use(here: Here) -> None:
    result = here.cli("train", "sotoo")
    assert result.exit_code == 2
    assert "did you mean 'sotu'" in result.stderr
    result = here.cli("train", "sotu", "--only", "mdml")
    assert result.exit_code == 2
    assert "did you mean 'mdlm'" in result.stderr
