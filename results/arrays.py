"""Samples, features and scores on disk: NPZ and Parquet, without pickle, verified byte for byte when read.

NPZ members are read whole (the ZIP CRC is checked before anything is parsed) and an embedded sha256 over names,
dtypes, shapes and contents is compared. Parquet files carry page checksums, which other readers understand, and in
their footer a sha256 of the whole file, taken with the digest's own 64 characters set to zero: page checksums alone
miss the page headers and the footer. Token NLLs are list columns, so that every convention of perplexity is a cheap
reduction of a file.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tsdfm_bench.results.files import CorruptFile, read_bytes, write_bytes

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

_DIGEST = "sha256"
_MARK = b"tsdfm-bench-file-sha256:"
_BLANK = b"0" * 64
_META = b"tsdfm-bench-meta"
_SPAN = ("begin", "end")


class Samples(NamedTuple):
    """One batch of sequences.

    Args:
        tokens: (n, length) int32.
        lengths: (n,) int64, how many leading tokens of each row count.
        extra: further arrays stored beside them.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    extra: dict[str, np.ndarray]


class Scores(NamedTuple):
    """Scores of n texts by one scorer.

    Args:
        nll: n float arrays, NLL in nats of every scored unit.
        units: n int32 arrays, the scorer's ids of those units.
        special: n bool arrays, True where the unit is an end-of-text token.
        bytes: (n,) int64, UTF-8 bytes of each text.
        features: (n, d) float32, or None.
        meta: what was stored about the scorer.
        spans: n int32 arrays (units, 2), begin and end of each unit in its text; None if none were stored.
    """

    nll: list[np.ndarray]
    units: list[np.ndarray]
    special: list[np.ndarray]
    bytes: np.ndarray
    features: np.ndarray | None
    meta: dict[str, Any]
    spans: list[np.ndarray] | None = None


# -------------------------------------------------------------------------------------------------------- NPZ


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}\x1f{array.dtype.str}\x1f{array.shape}\x1f".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def write_arrays(path: str | os.PathLike[str], *, exclusive: bool = False, **arrays: np.ndarray) -> None:
    """Write named arrays as a compressed NPZ with an embedded sha256; equal arrays give equal files.

    Args:
        path: the .npz file.
        exclusive: raise `FileExistsError` instead of replacing a file that exists.
        arrays: by name.

    Raises:
        TypeError: an array that only pickle could store.
        StoreError: see `write_bytes`.
    """
    if _DIGEST in arrays:
        raise ValueError(f"the array name {_DIGEST!r} is reserved")
    plain = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in plain.items():
        if array.dtype.hasobject:
            raise TypeError(f"array {name!r} has dtype {array.dtype}: only numbers, booleans and strings are stored")
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **plain, **{_DIGEST: np.array(_digest(plain))})
    write_bytes(path, buffer.getvalue(), exclusive=exclusive)


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read and verify what `write_arrays` wrote.

    Raises:
        CorruptFile: truncated or altered.
        StoreError: the file cannot be read.
    """
    data = read_bytes(path)
    try:
        arrays = {}
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.namelist():
                content = io.BytesIO(archive.read(member))  # checks the CRC of the whole member
                arrays[member.removesuffix(".npy")] = np.lib.format.read_array(content, allow_pickle=False)
        stated = str(arrays.pop(_DIGEST))
        found = _digest(arrays)
    except Exception as error:  # the bytes are in memory: whatever fails from here on is the content's fault
        raise CorruptFile.of(path, f"it is not a complete NPZ file ({type(error).__name__}: {error})") from error
    if stated != found:
        raise CorruptFile.of(path, f"its sha256 says {stated} but the arrays give {found}")
    return arrays


def write_samples(
    path: str | os.PathLike[str],
    tokens: np.ndarray,
    lengths: np.ndarray,
    *,
    exclusive: bool = False,
    **extra: np.ndarray,
) -> None:
    """Write one batch of sequences.

    Args:
        path: the .npz file.
        tokens: (n, length) integers that fit int32.
        lengths: (n,) integers in [0, length].
        exclusive: raise `FileExistsError` instead of replacing a batch that exists.
        extra: further arrays to keep beside them (a trace, for example).
    """
    tokens, lengths = np.asarray(tokens), np.asarray(lengths)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens must be integers of shape (n, length), not {tokens.dtype} {tokens.shape}")
    if lengths.shape != tokens.shape[:1] or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(f"lengths must be {tokens.shape[:1]} integers, not {lengths.dtype} {lengths.shape}")
    limits = np.iinfo(np.int32)
    if tokens.size and (tokens.min() < limits.min or tokens.max() > limits.max):
        raise ValueError("token ids do not fit int32")
    if lengths.size and (lengths.min() < 0 or lengths.max() > tokens.shape[1]):
        raise ValueError(f"lengths must lie in [0, {tokens.shape[1]}]")
    if not {"tokens", "lengths"}.isdisjoint(extra):
        raise ValueError("extra arrays cannot be called tokens or lengths")
    write_arrays(path, exclusive=exclusive, tokens=tokens.astype(np.int32), lengths=lengths.astype(np.int64), **extra)


def read_samples(path: str | os.PathLike[str]) -> Samples:
    """Read and verify one batch of sequences; `CorruptFile` if it is not one."""
    arrays = read_arrays(path)
    try:
        tokens, lengths = arrays.pop("tokens"), arrays.pop("lengths")
    except KeyError as error:
        raise CorruptFile.of(path, f"it holds no {error}") from error
    if tokens.dtype != np.int32 or tokens.ndim != 2 or lengths.shape != tokens.shape[:1]:
        raise CorruptFile.of(path, f"tokens are {tokens.dtype} {tokens.shape}, lengths {lengths.shape}")
    return Samples(tokens, lengths, arrays)


# ---------------------------------------------------------------------------------------------------- Parquet


def write_table(
    path: str | os.PathLike[str],
    table: pd.DataFrame | pa.Table | Mapping[str, Any],
    meta: Mapping[str, Any] | None = None,
) -> None:
    """Write a table as Parquet with page checksums and a sha256 of the whole file.

    Args:
        path: the .parquet file.
        table: a DataFrame (its index is dropped), an Arrow table, or columns by name.
        meta: JSON values stored in the footer.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if isinstance(table, Mapping):
        table = pa.table(dict(table))
    elif not isinstance(table, pa.Table):
        table = pa.Table.from_pandas(table, preserve_index=False)
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, write_page_checksum=True, compression="zstd") as writer:
        writer.write_table(table)
        # Added at the end, so that they stand in the footer once and in plain text.
        writer.add_key_value_metadata(
            {_META: json.dumps(meta or {}, allow_nan=False).encode(), b"sha256": _MARK + _BLANK}
        )
    data = sink.getvalue()
    at = data.rindex(_MARK) + len(_MARK)
    digest = hashlib.sha256(data).hexdigest().encode()
    write_bytes(path, data[:at] + digest + data[at + 64 :])


def _verify(path: str | os.PathLike[str], data: bytes) -> None:
    at = data.rfind(_MARK)
    if at < 0:
        raise CorruptFile.of(path, "it has no checksum (truncated, altered, or not written by this package)")
    at += len(_MARK)
    stated = data[at : at + 64]
    found = hashlib.sha256(data[:at] + _BLANK + data[at + 64 :]).hexdigest().encode()
    if stated != found:
        raise CorruptFile.of(
            path, f"its sha256 says {stated.decode('ascii', 'replace')} but the file gives {found.decode()}"
        )


def read_arrow(path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> tuple[pa.Table, dict[str, Any]]:
    """Read and verify a table in Arrow's form, with its `meta`; see `read_table`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = read_bytes(path)
    _verify(path, data)
    try:
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
            table = file.read(columns=list(columns) if columns is not None else None)
            meta = json.loads((file.metadata.metadata or {}).get(_META, b"{}"))
    except Exception as error:
        raise CorruptFile.of(path, f"it is not a readable Parquet file ({error})") from error
    return table, meta


def read_table(path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Read a table that `write_table` wrote, with its checksums verified.

    Args:
        path: the .parquet file.
        columns: only these.

    Raises:
        CorruptFile: truncated or altered.
        StoreError: the file cannot be read.
    """
    return read_arrow(path, columns)[0].to_pandas()


# ----------------------------------------------------------------------------------------------------- scores


def _lists(rows: Sequence[np.ndarray], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths as (values, offsets)."""
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return (
        np.concatenate([np.asarray(row) for row in rows]).astype(dtype) if len(rows) else np.empty(0, dtype)
    ), offsets


def write_scores(
    path: str | os.PathLike[str],
    nll: Sequence[np.ndarray],
    units: Sequence[np.ndarray],
    special: Sequence[np.ndarray],
    bytes: Iterable[int] | np.ndarray,
    features: np.ndarray | None = None,
    meta: Mapping[str, Any] | None = None,
    spans: Sequence[np.ndarray] | None = None,
) -> None:
    """Write the scores of n texts by one scorer, one row a text.

    Args:
        path: the .parquet file.
        nll: n float arrays, NLL in nats of every scored unit; float32 stays float32, all else becomes float64.
        units: n integer arrays of the same lengths.
        special: n bool arrays of the same lengths.
        bytes: (n,) UTF-8 bytes of each text.
        features: (n, d) floats, stored as float32, or None.
        meta: JSON values to keep with them (the scorer's name, revision, dtype, windowing).
        spans: n integer arrays (units, 2), stored as the columns `begin` and `end`, or None.

    Raises:
        ValueError: the shapes do not agree.
    """
    import pyarrow as pa

    sizes = np.asarray(bytes if isinstance(bytes, np.ndarray) else list(bytes), dtype=np.int64)
    n = len(nll)
    if not (len(units) == len(special) == len(sizes) == n):
        raise ValueError(
            f"{n} nll rows, {len(units)} units, {len(special)} special, {len(sizes)} bytes: not one text each"
        )
    for i in range(n):
        if not (len(nll[i]) == len(units[i]) == len(special[i])):
            raise ValueError(f"text {i}: {len(nll[i])} nll, {len(units[i])} units, {len(special[i])} special")
    float32 = n > 0 and all(np.asarray(row).dtype == np.float32 for row in nll)
    lists: list[tuple[str, Sequence[np.ndarray], Any]] = [
        ("nll", nll, np.float32 if float32 else np.float64),
        ("units", units, np.int32),
        ("special", special, np.bool_),
    ]
    if spans is not None:
        shapes = [np.shape(row) for row in spans]
        if shapes != [(len(row), 2) for row in nll]:
            raise ValueError("spans must be a begin and an end for every unit")
        lists += [(name, [row[:, i] for row in spans], np.int32) for i, name in enumerate(_SPAN)]
    columns: dict[str, Any] = {}
    for name, rows, dtype in lists:
        values, offsets = _lists(rows, dtype)
        columns[name] = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))
    columns["bytes"] = pa.array(sizes)
    if features is not None:
        features = np.asarray(features, dtype=np.float32)
        if features.ndim != 2 or len(features) != n:
            raise ValueError(f"features must have shape ({n}, d), not {features.shape}")
        columns["features"] = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), features.shape[1])
    write_table(path, columns, meta)


def read_scores(path: str | os.PathLike[str]) -> Scores:
    """Read and verify what `write_scores` wrote; `CorruptFile` if it is not that."""
    table, meta = read_arrow(path)
    try:
        lists = {}
        placed = set(_SPAN) <= set(table.column_names)
        for name in ("nll", "units", "special", *(_SPAN if placed else ())):
            column = table[name].combine_chunks()
            values = column.values.to_numpy(zero_copy_only=False)
            bounds = column.offsets.to_numpy()
            lists[name] = [values[start:stop].copy() for start, stop in pairwise(bounds)]
        sizes = table["bytes"].to_numpy()
        features = None
        if "features" in table.column_names:
            column = table["features"].combine_chunks()
            features = column.values.to_numpy().reshape(len(sizes), -1).copy()
    except (KeyError, AttributeError, ValueError) as error:
        raise CorruptFile.of(path, f"it is not a score file ({error})") from error
    spans = [np.stack(ends, axis=1) for ends in zip(*(lists[name] for name in _SPAN), strict=True)] if placed else None
    return Scores(lists["nll"], lists["units"], lists["special"], sizes, features, meta, spans)
