"""A plug-in can fail in every way it likes: its cells say so, the others finish, the exit code is 1."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from click.testing import Result
    from conftest import Here

SPOILS = {
    "load": "the weights do not fit: missing keys blocks.0.weight",
    "raise": "RuntimeError: boom in sample",
    "exit": "SystemExit: 3",
    "nothing": "must return a SampleBatch with a tensor of tokens, not nothing",
    "shape": "tokens of shape (8, 11), asked for (8, 12)",
    "dtype": "tokens of dtype torch.int32, the contract says torch.int64",
    "mask": "the token id 16 (a mask: positions were left undecided)",
    "negative": "the token id -1",
    "lengths": "lengths outside [0, 12]",
    "memory": "choose a smaller --batch-size",
}


@pytest.fixture(scope="module")
def spoiled(shared: Here) -> tuple[Here, Result]:
    """One run with every fault at once, beside a method without any."""
    methods = ",".join(f"counter[spoil={spoil}]" for spoil in SPOILS)
    return shared, shared.run(methods=f"{methods},stepless", steps="2,4")


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_method_that_fails_costs_its_own_cells_only(spoiled: tuple[Here, Result], spoil: str) -> None:
    here, _ = spoiled
    rows = here.summary().query(f"label == 'counter[spoil={spoil}]'")
    assert list(rows["state"]) == ["failed", "failed"]
    assert list(rows["steps"]) == [2, 4]
    assert all(SPOILS[spoil] in reason for reason in rows["reason"])
    for cell in here.cells(method="counter", options={"spoil": spoil}):
        assert SPOILS[spoil] in here.out.error_path(cell).read_text()
        assert not here.out.completed_batches(cell)


def test_the_others_finish_and_the_exit_code_says_that_something_failed(spoiled: tuple[Here, Result]) -> None:
    here, result = spoiled
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    assert f"{2 * len(SPOILS)} failed" in result.stderr
    assert (here.summary().query("method == 'stepless'")["state"] == "done").all()
    assert (here.summary().query("kind == 'reference'")["state"] == "done").all()


def test_the_traceback_is_kept_for_its_author(spoiled: tuple[Here, Result]) -> None:
    here, _ = spoiled
    cell = here.cells(options={"spoil": "raise"})[0]
    assert "fakes.py" in here.out.error_path(cell).read_text()


def test_changed_prompts_are_noticed(here: Here) -> None:
    result = here.run(methods="counter[spoil=pinned]", prefix="4")
    assert result.exit_code == 1
    assert "pinned tokens" in result.stderr


def test_batches_before_a_failure_are_kept_and_the_cell_is_tried_again(here: Here, tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    source = here.fakes.read_text()
    plugin.write_text(source.replace('self.spoil = str(params.get("spoil", ""))', 'self.spoil = "late raise"'))
    assert here.run(plugin=str(plugin)).exit_code == 1
    (cell,) = here.cells(kind="method")
    assert here.out.completed_batches(cell) == [0]
    assert here.out.state(cell, 3).state == "failed"
    here.events()
    assert here.run().exit_code == 0
    assert [e for e in here.events() if e.startswith("sample")][1:] == ["sample 8 x8 steps 2", "sample 16 x8 steps 2"]
    assert here.out.state(cell, 3).state == "done"
    assert not here.out.error_path(cell).exists()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise ValueError('oh no')", "ValueError: oh no"),
        ("class M: pass\nMETHODS = {'mine': M}", "lacks info, load, networks, refuse, sample"),
        (
            "from tsdfm_bench.api import MethodInfo\nclass M:\n    info = MethodInfo('mine', 'x', api_version=7)\n"
            "    load = networks = refuse = sample = None\nMETHODS = {'mine': M}",
            "API version 7",
        ),
        (
            "from tsdfm_bench.api import MethodInfo\nclass M:\n    info = MethodInfo('mine', 'x')\n"
            "    load = networks = refuse = sample = None\nMETHODS = {'mine': M}",
            "TypeError",
        ),
    ],
    ids=["import", "attributes", "version", "load"],
)
def test_a_plugin_file_that_is_broken_is_a_row(here: Here, tmp_path: Path, source: str, said: str) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(source)
    result = here.run("--plugin", str(plugin), methods="mine,counter")
    assert result.exit_code == 1
    assert said in result.stderr
    summary = here.summary()
    assert (summary.query("method == 'counter'")["state"] == "done").all()
    assert (summary.query("method == 'mine'")["state"] == "failed").all()
    listing = here.cli("methods", "--plugin", str(plugin))
    assert "mdlm" in listing.stdout


def test_an_identity_that_raises_is_a_row(here: Here, tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    body = here.fakes.read_text().replace(
        "if checkpoint is None:", 'raise KeyError("lost")\n        if checkpoint is None:'
    )
    plugin.write_text(body)
    result = here.run(plugin=str(plugin), methods="counter,stepless")
    assert result.exit_code == 1
    assert "KeyError" in result.stderr


def test_if_every_method_fails_nothing_is_scored(here: Here) -> None:
    result = here.run(methods="counter[spoil=raise]", steps="2,4")
    assert result.exit_code == 1
    assert "2 failed:\n  counter[spoil=raise] · uniform · 2 steps, " in result.stderr
    assert result.stderr.count("boom in sample") == 1
    assert "load toy" not in here.events()
    assert set(here.summary()["state"]) == {"failed"}
