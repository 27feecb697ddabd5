"""Run folders: of another request, not writable, full."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Here


@pytest.fixture(scope="module")
def finished(shared: Here) -> Here:
    """A folder with a finished run."""
    assert shared.run().exit_code == 0
    return shared


@pytest.mark.parametrize(
    ("given", "said", "typed"),
    [
        ({"steps": "2,4"}, "steps: there 2, asked for 2,4", "--steps 2"),
        ({"seed": "1"}, "seed: there 0, asked for 1", "--seed 0"),
        ({"sources": "mask"}, "sources: there default, asked for mask", ""),
        ({"temperatures": "0.5"}, "temperatures: there 1.0, asked for 0.5", "--temperatures 1.0"),
        ({"methods": "stepless"}, "methods: there counter, asked for stepless", "--methods counter"),
        ({"top_p": "0.9"}, "top-p: there none, asked for 0.9", "--top-p none"),
        ({"prefix": "3"}, "prefix: there default, asked for held-out 3", ""),
        ({"length": "6"}, "length: there 12, asked for 6", "--length 12"),
    ],
)
def test_a_folder_of_another_request_is_refused(finished: Here, given: dict[str, str], said: str, typed: str) -> None:
    before = finished.out.plan_path.read_bytes()
    finished.events()
    result = finished.run(**given)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "--out" in result.stderr
    assert typed in result.stderr
    assert finished.out.plan_path.read_bytes() == before
    assert finished.events() == []


def test_weights_that_changed_are_refused_in_the_same_folder(here: Here) -> None:
    weights = here.folder / "w.bin"
    weights.write_bytes(b"one")
    assert here.run(checkpoint="w.bin").exit_code == 0
    weights.write_bytes(b"two")
    result = here.run(checkpoint="w.bin")
    assert result.exit_code == 2
    assert "weights of counter: they have changed" in result.stderr


def test_weights_that_were_missing_may_arrive(here: Here) -> None:
    methods = "counter[checkpoint=w.bin],stepless"
    assert here.run(methods=methods).exit_code == 1
    (here.folder / "w.bin").write_bytes(b"here now")
    assert here.run(methods=methods).exit_code == 0


def test_a_folder_that_is_no_run_is_used_and_a_damaged_plan_is_said(here: Here) -> None:
    here.out.root.mkdir()
    (here.out.root / "notes.txt").write_text("mine")
    assert here.run().exit_code == 0
    before = here.out.read_plan()
    here.out.plan_path.write_text("{")
    here.events()
    result = here.run()
    assert result.exit_code == 0
    assert "plan.json is damaged" in result.stderr
    assert "plan.json" in here.out.quarantined()
    assert here.out.read_plan() == before
    assert here.events() == []


def fail_writes(monkeypatch: pytest.MonkeyPatch, code: int, match: str) -> None:
    """Let writing a file whose name contains `match` fail as the operating system would."""
    real = os.open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> int:
        if match in Path(path).name and Path(path).name.endswith(".tmp"):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.parametrize(
    ("code", "match", "said"),
    [
        (errno.EROFS, "plan.json", "the file system is read-only"),
        (errno.EACCES, "plan.json", "permission denied"),
        (errno.ENOSPC, "samples-0001", "the disk is full"),
        (errno.EDQUOT, "samples-0001", "the disk quota is used up"),
        (errno.ENOSPC, ".0.json", "the disk is full"),
        (errno.ENOSPC, ".parquet", "the disk is full"),
        (errno.ENOSPC, "summary.csv", "the disk is full"),
    ],
)
def test_a_disk_that_does_not_take_files_ends_the_run_and_keeps_the_rest(
    here: Here, monkeypatch: pytest.MonkeyPatch, code: int, match: str, said: str
) -> None:
    with monkeypatch.context() as patch:
        fail_writes(patch, code, match)
        result = here.run()
    assert result.exit_code == 1
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    kept = {path: path.read_bytes() for path in here.out.root.rglob("*.npz")}
    here.events()
    assert here.run().exit_code == 0
    assert all(path.read_bytes() == content for path, content in kept.items())


def test_nothing_unfinished_is_left_behind(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        fail_writes(patch, errno.ENOSPC, "samples-0002")
        here.run()
    assert not list(here.out.root.rglob("*.tmp"))
    assert not list(here.out.leases_folder.glob("*"))
