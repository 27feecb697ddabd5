"""Files that are either whole or absent: atomic writes, canonical JSON, checksums.

A run may be killed at any instruction, fill the disk, or share its folder with other processes. So every file is
written under a temporary name in the same folder, flushed to the disk and renamed: a reader sees the old file or the
new one, never a part. Temporary names start with a dot and end with ".tmp"; every listing ignores them, so what a
killed process leaves behind is harmless. JSON that decides what happens next carries its own checksum. Identities are
hashes of canonical JSON, in which equal numbers have equal text (RFC 8785 does the same: 1.0 and 1 are both "1").
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import numbers
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

CHECKSUM_KEY = "checksum"
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=@-]{0,119}")


class StoreError(OSError):
    """A result file cannot be written or read; the message says which file, why, and what to do.

    Args:
        message: the whole message, shown as it is.
        path: the file or folder.
        code: errno of the underlying error, if there is one.
    """

    def __init__(self, message: str, path: str | os.PathLike[str] = "", code: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.path = os.fspath(path)
        self.errno = code

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[object, ...]:  # OSError rebuilds itself from `args` alone, which lacks the path
        return (type(self), (self.message, self.path, self.errno))


class MissingFile(StoreError, FileNotFoundError):
    """There is no such file."""


class CorruptFile(StoreError):
    """A stored file is truncated or altered: its checksum, CRC or structure is wrong."""

    reason = ""

    @classmethod
    def of(cls, path: str | os.PathLike[str], why: str) -> CorruptFile:
        """The error for one file."""
        error = cls(f"{os.fspath(path)} is damaged: {why}. Delete it; the same command then makes it again.", path)
        error.reason = why
        return error

    def __reduce__(self) -> tuple[object, ...]:
        return (*super().__reduce__(), {"reason": self.reason})


class UnsafeName(StoreError, ValueError):
    """A name that could leave its folder or does not work as a file name."""


def _explain(error: OSError, action: str, path: Path) -> StoreError:
    """The `StoreError` for an operating-system error: the reason in plain words, then the remedy."""
    kept = "Everything finished before is kept: run the same command again afterwards."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = "the disk is full" if error.errno == errno.ENOSPC else "the disk quota is used up"
        why, remedy = what, f"Free some space or choose another folder. {kept}"
    elif error.errno == errno.EROFS:
        why, remedy = "the file system is read-only", "Choose a folder that can be written to."
    elif error.errno in (errno.EACCES, errno.EPERM):
        why, remedy = "permission denied", "Change the permissions of the folder or choose another one."
    elif error.errno == errno.ENOENT:
        why, remedy = "there is no such file or folder", "Check the path."
    else:
        why, remedy = error.strerror or str(error) or type(error).__name__, kept
    kind = MissingFile if error.errno == errno.ENOENT else StoreError
    return kind(f"cannot {action} {path}: {why}. {remedy}", path, error.errno)


# ------------------------------------------------------------------------------------------------------- names


def check_name(name: str, kind: str = "name") -> str:
    """The name itself if it is one plain file name, else `UnsafeName`.

    Letters, digits and `._+=@-`, at most 120 of them, not starting with a dot or a dash: so no separators, no `..`,
    no hidden or temporary files.
    """
    if not isinstance(name, str) or not _SAFE_NAME.fullmatch(name):
        raise UnsafeName(
            f"{kind} {name!r} cannot be used as a file name: use letters, digits and ._+=@- "
            "(at most 120, starting with a letter or digit).",
            str(name),
        )
    return name


def slug(name: str) -> str:
    """A file name for any user-given name, for example "hf:org/model": unchanged if safe, else cleaned plus a hash."""
    if _SAFE_NAME.fullmatch(name):
        return name
    cleaned = re.sub(r"[^A-Za-z0-9_+=@-]+", "-", name).strip("-.")[:80] or "name"
    return f"{cleaned}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def is_temporary(name: str) -> bool:
    """Whether a file name is one that an unfinished write leaves behind."""
    return name.startswith(".") and name.endswith(".tmp")


# ---------------------------------------------------------------------------------------------------- writing


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder with its parents; `StoreError` if that is not possible."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _explain(error, "make the folder", path) from error
    return path


def _sync_folder(folder: Path) -> None:
    """Make a rename durable. Some network file systems refuse to sync folders; the rename is atomic all the same."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def write_bytes(path: str | os.PathLike[str], data: bytes, *, exclusive: bool = False, durable: bool = True) -> None:
    """Write a file so that a reader sees its old content or all of the new one, whatever happens in between.

    Args:
        path: the file; its folder is made if needed.
        data: the whole content.
        exclusive: raise `FileExistsError` instead of replacing a file that exists.
        durable: flush it to the disk; False for signs of life and progress, which mean nothing after a power cut.

    Raises:
        StoreError: disk full, read-only, no permission; the old content is untouched.
    """
    path = Path(path)
    folder = make_folder(path.parent)
    # The random part keeps processes apart, also on different hosts of a cluster where process ids repeat.
    temporary = folder / f".{path.name[:100]}.{os.getpid()}.{secrets.token_hex(8)}.tmp"
    try:
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            if exclusive:
                _rename_exclusive(temporary, path)
            else:
                os.replace(temporary, path)  # noqa: PTH105 - one call to intercept in tests of a kill in the middle
            if durable:
                _sync_folder(folder)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
    except FileExistsError:
        raise
    except OSError as error:
        raise _explain(error, "write", path) from error


def _rename_exclusive(temporary: Path, path: Path) -> None:
    """Give a finished file its name unless the name is taken; a hard link is the atomic form of that."""
    try:
        os.link(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            if temporary.samefile(path):  # made all the same: a network file system lost its own answer
                return
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        if path.exists():  # a file system without hard links: not atomic, but as good as it gets there
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        temporary.replace(path)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def remove(path: str | os.PathLike[str]) -> None:
    """Delete a file if it exists; `StoreError` if that is not possible."""
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise _explain(error, "delete", Path(path)) from error


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The content of a file; `StoreError` with a clear reason if it cannot be read."""
    path = Path(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise _explain(error, "read", path) from error


# ------------------------------------------------------------------------------------------------------- JSON


def _check_keys(value: Mapping[object, object], where: str) -> None:
    for key in value:
        if not isinstance(key, str):
            raise TypeError(f"{where} has the key {key!r}: keys must be strings")


def _plain(value: object, where: str) -> object:
    """JSON types only, with one form per value."""
    if value is None or isinstance(value, bool | str):
        return value
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # a NumPy or torch scalar
        return _plain(value.item(), where)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}: JSON has no such number; store None or a string instead")
        return int(value) if value.is_integer() else value
    if isinstance(value, Mapping):
        _check_keys(value, where)
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise TypeError(f"{where} is a {type(value).__name__}: not a JSON value")


def canonical_json(obj: object) -> str:
    """The one JSON text of a value: sorted keys, no spaces, ASCII, shortest exact floats, whole floats as integers.

    So 1 and 1.0 (a temperature typed either way) give the same identity, and NaN or infinity is an error.
    """
    return json.dumps(_plain(obj, "value"), sort_keys=True, separators=(",", ":"), allow_nan=False)


def json_hash(obj: object) -> str:
    """Hex sha256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(obj).encode()).hexdigest()


def write_json(
    path: str | os.PathLike[str],
    obj: Mapping[str, object],
    *,
    checksum: bool = True,
    exclusive: bool = False,
    durable: bool = True,
) -> None:
    """Write a JSON object atomically, readable by eye, with a `checksum` field over its canonical JSON.

    Raises:
        ValueError: NaN, infinity, or an own field called "checksum".
        StoreError: see `write_bytes`.
    """
    if CHECKSUM_KEY in obj:
        raise ValueError(f"the field {CHECKSUM_KEY!r} is reserved")
    content = {key: _readable(value, key) for key, value in obj.items()}
    if checksum:
        content[CHECKSUM_KEY] = f"sha256:{json_hash(content)}"
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    write_bytes(path, (text + "\n").encode("utf-8", "surrogatepass"), exclusive=exclusive, durable=durable)


def _readable(value: object, where: str) -> object:
    """Like `_plain`, but floats stay floats: a duration of 2.0 s should not come back as an integer."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Mapping):
        _check_keys(value, where)
        return {key: _readable(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_readable(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    return _plain(value, where)


def read_json(path: str | os.PathLike[str], *, checksum: bool = True) -> dict[str, object]:
    """Read a JSON object and verify its checksum; the checksum field is not part of the result.

    Args:
        path: the file.
        checksum: False accepts a file without a checksum (one that it has is verified all the same).

    Raises:
        CorruptFile: not a JSON object, no checksum, or a wrong one.
        StoreError: the file cannot be read.
    """
    try:
        content = json.loads(read_bytes(path).decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise CorruptFile.of(path, f"it is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CorruptFile.of(path, "it does not hold a JSON object")
    stated = content.pop(CHECKSUM_KEY, None)
    if stated is None and checksum:
        raise CorruptFile.of(path, "it has no checksum")
    if stated is not None:
        try:
            found = f"sha256:{json_hash(content)}"
        except ValueError as error:
            raise CorruptFile.of(path, str(error)) from error
        if stated != found:
            raise CorruptFile.of(path, f"its checksum says {stated} but the content gives {found}")
    return content
