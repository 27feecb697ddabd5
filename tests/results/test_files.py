"""Files are whole or absent: kills, full disks, concurrent writers, damaged bytes."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tsdfm_bench.results import files
from tsdfm_bench.results.files import (
    CorruptFile,
    StoreError,
    UnsafeName,
    canonical_json,
    check_name,
    read_bytes,
    read_json,
    slug,
    write_bytes,
    write_json,
)


def test_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.bin"
    write_bytes(path, b"old")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["b.bin"]


@pytest.mark.parametrize("moment", ["write", "replace"])
def test_kill_in_the_middle_keeps_the_old_file(tmp_path: Path, moment: str) -> None:
    """SIGKILL after the temporary file is written (or half written), before the rename."""
    path = tmp_path / "data.bin"
    write_bytes(path, b"old content")
    code = f"""
        import os, signal
        from tsdfm_bench.results import files
        die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
        if {moment!r} == "replace":
            os.replace = die
        else:
            os.fsync = die
        files.write_bytes({str(path)!r}, b"new content" * 100000)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, check=False)
    assert done.returncode == -signal.SIGKILL
    assert read_bytes(path) == b"old content"
    leftovers = [p.name for p in tmp_path.iterdir() if p != path]
    assert leftovers
    assert all(files.is_temporary(name) for name in leftovers)
    write_bytes(path, b"newer")
    assert read_bytes(path) == b"newer"


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EIO, os.strerror(errno.EIO)),
    ],
)
def test_a_write_that_fails_says_why_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, words: str
) -> None:
    path = tmp_path / "data.bin"
    write_bytes(path, b"old")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, call, fail)
        with pytest.raises(StoreError, match=words) as caught:
            write_bytes(path, b"new")
    assert str(path) in str(caught.value)
    assert caught.value.errno == code
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["data.bin"]


def test_a_disk_that_fills_up_during_the_write(tmp_path: Path) -> None:
    """A file-size limit is the nearest thing to a full disk that needs no privileges: write() fails half way."""
    code = f"""
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        from tsdfm_bench.results.files import StoreError, write_bytes
        try:
            write_bytes({str(tmp_path / "x")!r}, b"a" * 100000)
        except StoreError as error:
            print("StoreError", error)
    """
    out = subprocess.run(
        [sys.executable, "-B", "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert out.stdout.startswith("StoreError cannot write")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(StoreError, match="cannot make the folder"):
        write_bytes(tmp_path / "taken" / "x", b"")


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    for kind in (StoreError, FileNotFoundError):
        with pytest.raises(kind, match="no such file"):
            read_bytes(tmp_path / "none")


def test_exclusive_writes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "once"
    write_bytes(path, b"first", exclusive=True)
    with pytest.raises(FileExistsError):
        write_bytes(path, b"second", exclusive=True)
    assert path.read_bytes() == b"first"

    def no_links(*args: Any) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(files.os, "link", no_links)
    with pytest.raises(FileExistsError):
        write_bytes(path, b"third", exclusive=True)
    write_bytes(tmp_path / "other", b"fine", exclusive=True)
    assert (tmp_path / "other").read_bytes() == b"fine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["once", "other"]


def _write_many(path: str, worker: int) -> None:
    for _ in range(20):
        write_bytes(path, bytes([worker]) * 50_000)


def test_concurrent_writers_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "shared.bin"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write_many, args=(str(path), k)) for k in range(4)]
    for worker in workers:
        worker.start()
    seen = set()
    while any(worker.is_alive() for worker in workers):
        if path.exists():
            content = path.read_bytes()
            assert len(content) == 50_000
            assert len(set(content)) == 1
            seen.add(content[0])
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert seen <= {0, 1, 2, 3}
    assert [p.name for p in tmp_path.iterdir()] == ["shared.bin"]


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(CorruptFile.of("/a/b", "short")))
    assert isinstance(error, CorruptFile)
    assert error.path == "/a/b"
    assert "short" in str(error)


# ------------------------------------------------------------------------------------------------------- JSON


def test_canonical_json_has_one_text_per_value() -> None:
    a = {"b": 1.0, "a": [True, None, "é", 0.1], "c": {"y": 2, "x": -0.0}}
    b = {"c": {"x": 0, "y": np.int64(2)}, "a": (True, None, "é", np.float64(0.1)), "b": 1}
    assert canonical_json(a) == canonical_json(b) == '{"a":[true,null,"\\u00e9",0.1],"b":1,"c":{"x":0,"y":2}}'
    assert canonical_json(True) != canonical_json(1)
    assert json.loads(canonical_json(0.1 + 0.2)) == 0.1 + 0.2
    assert canonical_json(1e22) == canonical_json(10**22)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_canonical_json_refuses_what_json_has_no_word_for(value: object) -> None:
    with pytest.raises(ValueError, match="no such number"):
        canonical_json(value)


@pytest.mark.parametrize("value", [{1: 2}, {"a": Path("x")}, {"a": {1, 2}}, np.arange(3)])
def test_canonical_json_refuses_other_types(value: object) -> None:
    with pytest.raises(TypeError):
        canonical_json(value)


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    content = {"seconds": 2.0, "n": 3, "text": "ü \ud800", "none": None, "list": [1.5, [2.0]], "flag": True}
    write_json(tmp_path / "a.json", content)
    back = read_json(tmp_path / "a.json")
    assert back == content
    assert isinstance(back["seconds"], float)
    assert isinstance(back["n"], int)


def test_every_byte_of_checked_json_counts(tmp_path: Path) -> None:
    """A flipped bit is either found or does not change what is read (it hit a space)."""
    path = tmp_path / "done.json"
    content = {"batches": 16, "seconds": 12.25, "cell": "abc"}
    write_json(path, content)
    good = path.read_bytes()
    found = 0
    for i in range(len(good)):
        path.write_bytes(good[:i] + bytes([good[i] ^ (1 << (i % 8))]) + good[i + 1 :])
        try:
            assert read_json(path) == content
        except CorruptFile as error:
            assert str(path) in str(error)  # noqa: PT017 - both outcomes are allowed, each with its own law
            found += 1
    assert found > 0.8 * len(good)
    for cut in range(0, len(good) - 1, 3):
        path.write_bytes(good[:cut])
        with pytest.raises(CorruptFile):
            read_json(path)


def test_json_without_checksum(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1}, checksum=False)
    assert read_json(tmp_path / "a.json", checksum=False) == {"x": 1}
    with pytest.raises(CorruptFile, match="no checksum"):
        read_json(tmp_path / "a.json")
    with pytest.raises(ValueError, match="reserved"):
        write_json(tmp_path / "b.json", {"checksum": 1})


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"x": NaN, "checksum": "sha256:0"}'])
def test_not_a_json_object(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(CorruptFile):
        read_json(tmp_path / "a.json")


# ------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    "name", ["..", ".", "", "a/b", "../x", "/abs", "a\\b", ".hidden", "-rf", "a\0b", "x" * 121, "a\n", "é"]
)
def test_names_that_could_leave_the_folder(name: str) -> None:
    with pytest.raises(UnsafeName):
        check_name(name)
    safe = slug(name)
    assert check_name(safe) == safe


def test_slug_keeps_safe_names_and_keeps_others_apart() -> None:
    assert slug("smollm2") == "smollm2"
    assert slug("hf:gpt2/a") != slug("hf:gpt2-a") != slug("hf-gpt2-a")
    assert slug("hf:org/model").startswith("hf-org-model-")


def test_importing_the_store_is_light() -> None:
    code = """
        import sys
        from tsdfm_bench.results import flags, render, schema, stats, store, tables
        heavy = {"pandas", "pyarrow", "scipy", "torch", "rich", "matplotlib"} & set(sys.modules)
        assert not heavy, heavy
        outside = {n for n in sys.modules if n.startswith("tsdfm_bench.") and not n.startswith("tsdfm_bench.results")}
        assert not outside, outside
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
