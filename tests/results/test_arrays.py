"""Samples, tables and scores come back exactly, and damage anywhere in the file is found."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from tsdfm_bench.results.arrays import (
    read_arrays,
    read_arrow,
    read_samples,
    read_scores,
    read_table,
    write_arrays,
    write_samples,
    write_scores,
    write_table,
)
from tsdfm_bench.results.files import CorruptFile, StoreError

RNG = np.random.default_rng(7)


def _samples(path: Path) -> None:
    write_samples(path, RNG.integers(0, 2048, (5, 16)), np.full(5, 16), trace=np.zeros((5, 2, 16), np.int32))


def _table(path: Path) -> None:
    write_table(path, pd.DataFrame({"a": np.arange(50), "b": [f"t{i}" for i in range(50)], "c": RNG.normal(size=50)}))


def _scores(path: Path) -> None:
    rows = [RNG.exponential(3, k).astype(np.float32) for k in (3, 0, 7)]
    units = [np.arange(len(row)) for row in rows]
    write_scores(
        path, rows, units, [u == 0 for u in units], np.array([9, 0, 30]), RNG.normal(size=(3, 4)), {"scorer": "x"}
    )


def test_spans_come_back_and_files_without_them_are_read(tmp_path: Path) -> None:
    rows = [np.zeros(3), np.zeros(0)]
    spans = [np.array([[0, 2], [1, 3], [3, 9]]), np.empty((0, 2), dtype=int)]
    marks = [row == 1 for row in rows]
    write_scores(tmp_path / "a", rows, marks, marks, np.zeros(2), spans=spans)
    found = read_scores(tmp_path / "a").spans
    assert found is not None
    assert [row.tolist() for row in found] == [row.tolist() for row in spans]
    write_scores(tmp_path / "b", rows, marks, marks, np.zeros(2))
    assert read_scores(tmp_path / "b").spans is None
    with pytest.raises(ValueError, match="a begin and an end for every unit"):
        write_scores(tmp_path / "c", rows, marks, marks, np.zeros(2), spans=spans[::-1])


FILES: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "samples.npz": (_samples, read_samples),
    "table.parquet": (_table, read_table),
    "scores.parquet": (_scores, read_scores),
}


@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_wherever_it_is(tmp_path: Path, name: str) -> None:
    """For a flip in every third byte: an error that names the file, or (ZIP dates and flags only) the same content."""
    write, read = FILES[name]
    path = tmp_path / name
    write(path)
    good, content = path.read_bytes(), pickle.dumps(read(path))
    silent = 0
    for i in range(0, len(good), 3):
        path.write_bytes(good[:i] + bytes([good[i] ^ (1 << (i % 8))]) + good[i + 1 :])
        try:
            same = pickle.dumps(read(path))
        except CorruptFile as error:
            assert str(path) in str(error)  # noqa: PT017 - both outcomes are allowed, each with its own law
            continue
        assert same == content
        silent += 1
    # A Parquet file is hashed whole; a ZIP archive has fields that nobody reads (dates, versions, attributes).
    assert silent <= (0 if name.endswith("parquet") else 0.35 * len(good) / 3)


@pytest.mark.parametrize("name", FILES)
def test_truncated_and_foreign_files(tmp_path: Path, name: str) -> None:
    write, read = FILES[name]
    path = tmp_path / name
    write(path)
    good = path.read_bytes()
    for cut in (0, 1, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:cut])
        with pytest.raises(CorruptFile, match=name):
            read(path)
    path.write_bytes(b"not what it says")
    with pytest.raises(CorruptFile):
        read(path)
    path.unlink()
    with pytest.raises(StoreError, match="no such file"):
        read(path)


def test_samples_come_back(tmp_path: Path) -> None:
    tokens, lengths = np.array([[1, 2, 3], [2047, 0, 0]]), np.array([3, 1])
    write_samples(tmp_path / "a.npz", tokens, lengths, step=np.array(["x", "y"]))
    back = read_samples(tmp_path / "a.npz")
    np.testing.assert_array_equal(back.tokens, tokens)
    assert back.tokens.dtype == np.int32
    np.testing.assert_array_equal(back.lengths, lengths)
    assert back.extra["step"].tolist() == ["x", "y"]


def test_equal_samples_are_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_samples(tmp_path / f"{name}.npz", np.ones((2, 3), int), np.array([3, 3]))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize(
    ("tokens", "lengths"),
    [
        (np.zeros((2, 3)), np.array([3, 3])),
        (np.zeros(3, int), np.array([3])),
        (np.zeros((2, 3), int), np.array([3])),
        (np.zeros((2, 3), int), np.array([3, 4])),
        (np.full((1, 3), 2**31), np.array([3])),
        (np.zeros((1, 3), int), np.array([2.0])),
    ],
)
def test_samples_of_the_wrong_form_are_refused(tmp_path: Path, tokens: np.ndarray, lengths: np.ndarray) -> None:
    with pytest.raises(ValueError):
        write_samples(tmp_path / "a.npz", tokens, lengths)
    assert list(tmp_path.iterdir()) == []


def test_no_pickle_is_written_or_read(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="only numbers"):
        write_arrays(tmp_path / "a.npz", x=np.array([{}], dtype=object))
    np.savez(tmp_path / "b.npz", x=np.array([{}], dtype=object))
    with pytest.raises(CorruptFile):
        read_arrays(tmp_path / "b.npz")


def test_an_array_swapped_for_another_is_found(tmp_path: Path) -> None:
    """The CRCs of a rewritten archive are right; the embedded sha256 is not."""
    write_samples(tmp_path / "a.npz", np.zeros((1, 2), int), np.array([2]))
    write_samples(tmp_path / "b.npz", np.ones((1, 2), int), np.array([2]))
    with zipfile.ZipFile(tmp_path / "a.npz") as a, zipfile.ZipFile(tmp_path / "b.npz") as b:
        members = {name: a.read(name) for name in a.namelist()} | {"tokens.npy": b.read("tokens.npy")}
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as out:
        for name, data in members.items():
            out.writestr(name, data)
    with pytest.raises(CorruptFile, match="sha256"):
        read_samples(tmp_path / "c.npz")


def test_features_are_not_samples(tmp_path: Path) -> None:
    write_arrays(tmp_path / "f.npz", features=np.ones((2, 3), np.float32))
    with pytest.raises(CorruptFile, match="tokens"):
        read_samples(tmp_path / "f.npz")
    np.testing.assert_array_equal(read_arrays(tmp_path / "f.npz")["features"], np.ones((2, 3)))


def test_scores_come_back_bit_by_bit(tmp_path: Path) -> None:
    nll = [np.array([0.1, np.inf, 3.0]), np.array([]), np.array([np.nan])]
    units = [np.array([5, 6, 0]), np.array([], int), np.array([0])]
    special = [u == 0 for u in units]
    write_scores(tmp_path / "s.parquet", nll, units, special, [10, 0, 3], np.eye(3), {"revision": "sha256:x"})
    back = read_scores(tmp_path / "s.parquet")
    for mine, stored in zip((nll, units, special), (back.nll, back.units, back.special), strict=True):
        for a, b in zip(mine, stored, strict=True):
            np.testing.assert_array_equal(a, b)
    assert back.nll[0].dtype == np.float64
    assert back.units[0].dtype == np.int32
    assert back.special[0].dtype == np.bool_
    assert back.bytes.tolist() == [10, 0, 3]
    np.testing.assert_array_equal(back.features, np.eye(3, dtype=np.float32))
    assert back.meta == {"revision": "sha256:x"}


def test_float32_scores_stay_float32(tmp_path: Path) -> None:
    row = np.array([0.1, 0.2], np.float32)
    write_scores(tmp_path / "s.parquet", [row], [np.array([1, 2])], [np.array([False, False])], [4])
    back = read_scores(tmp_path / "s.parquet")
    assert back.nll[0].dtype == np.float32
    np.testing.assert_array_equal(back.nll[0], row)
    assert back.features is None


def test_scores_of_nothing(tmp_path: Path) -> None:
    write_scores(tmp_path / "s.parquet", [], [], [], [])
    assert read_scores(tmp_path / "s.parquet").nll == []


def test_scores_that_do_not_agree_are_refused(tmp_path: Path) -> None:
    one = [np.array([1.0, 2.0])]
    with pytest.raises(ValueError, match="not one text each"):
        write_scores(tmp_path / "s", one, [np.array([1, 2])], [np.array([True, True])], [1, 2])
    with pytest.raises(ValueError, match="text 0"):
        write_scores(tmp_path / "s", one, [np.array([1])], [np.array([True, True])], [1])
    with pytest.raises(ValueError, match="features"):
        write_scores(tmp_path / "s", one, [np.array([1, 2])], [np.array([True, True])], [1], np.ones(3))


def test_tables_carry_page_checksums_and_meta_for_other_readers(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    frame = pd.DataFrame({"x": [1, 2], "rows": [np.array([1.0]), np.array([2.0, 3.0])]})
    write_table(path, frame, meta={"about": "test"})
    assert read_arrow(path)[1] == {"about": "test"}
    assert read_table(path, columns=["x"]).columns.tolist() == ["x"]
    assert pq.read_table(path, page_checksum_verification=True).column_names == ["x", "rows"]
    assert [row.tolist() for row in read_table(path)["rows"]] == [[1.0], [2.0, 3.0]]


def test_a_parquet_file_of_someone_else_has_no_checksum(tmp_path: Path) -> None:
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(CorruptFile, match="no checksum"):
        read_table(tmp_path / "t.parquet")
