"""Samples that were made elsewhere, read from a file: `--methods file:samples.jsonl`.

One sample a line, in JSON: a text or token ids of the task, in any of these forms, the same kind in every line:

    "The state of the union is strong."                   {"text": "The state of the union is strong."}
    [464, 1181, 286]                                      {"ids": [464, 1181, 286]}
    {"ids": [464, 1181, 286, 0, 0], "length": 3}          only the first 3 count

Sequence i of a run is line i. Texts are handed to the harness as they are: scorers read them unchanged, and the task's
tokenizer is only used for measures on tokens. What is longer than the run's length is cut to it, so that every row of a
table is about equally long text. The file is identified by its hash, and read whole before anything is sampled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tsdfm_bench.api import Identity, MethodInfo, SampleBatch, SampleRequest
from tsdfm_bench.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from torch import nn

HARNESS_KEYS = ("task", "vocab_size", "checkpoint", "source", "length", "name", "trust_pickle")
FORMS = 'a line is a text ("...", {"text": "..."}) or token ids ([1, 2], {"ids": [1, 2]})'


@dataclass(frozen=True)
class Contents:
    """What a file of samples holds.

    Args:
        digest: sha256 of the file, in hex.
        texts: its lines as texts, or None.
        ids: its lines as token ids, or None.
    """

    digest: str
    texts: tuple[str, ...] | None
    ids: tuple[tuple[int, ...], ...] | None

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.texts if self.texts is not None else self.ids or ())


def read_samples(path: Path, vocab_size: int) -> Contents:
    """Read and check a file.

    Args:
        path: JSON lines.
        vocab_size: V of the task, for token ids.

    Raises:
        UsageError: it cannot be read, or a line is wrong; the message names the line.
    """
    try:
        stat = path.stat()
        return _read(path, vocab_size, stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        raise UsageError(f"cannot read the samples {path}: {error.strerror}; type file:PATH.jsonl") from None


@lru_cache(maxsize=8)
def _read(path: Path, vocab_size: int, changed_ns: int, size: int) -> Contents:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}, line {line}: not UTF-8 text") from None
    lines = text.split("\n")  # JSON allows other line separators inside a text
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise UsageError(f"{path} holds no samples: {FORMS}")
    samples = [_sample(line, f"{path}, line {number}", vocab_size) for number, line in enumerate(lines, start=1)]
    kind = type(samples[0])
    for number, sample in enumerate(samples, start=1):
        if type(sample) is not kind:
            names = {str: "a text", tuple: "token ids"}
            raise UsageError(f"{path}, line {number}: {names[type(sample)]}, but line 1 holds {names[kind]}")
    texts = tuple(sample for sample in samples if isinstance(sample, str))
    ids = tuple(sample for sample in samples if isinstance(sample, tuple))
    return Contents(hashlib.sha256(data).hexdigest(), texts or None, ids or None)


def _sample(line: str, where: str, vocab_size: int) -> str | tuple[int, ...]:
    """One line as a text or as ids."""
    if not line.strip():
        raise UsageError(f"{where}: it is empty; {FORMS}")
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON ({error}); {FORMS}") from None
    length: Any = None
    if isinstance(value, dict):
        found = [key for key in ("text", "ids") if key in value]
        if len(found) != 1:
            raise UsageError(f"{where}: it needs 'text' or 'ids', one of them; {FORMS}")
        value, length = value[found[0]], value.get("length")
    if isinstance(value, str) and length is None:
        return _text(value, where)
    if isinstance(value, list):
        return _ids(value, length, where, vocab_size)
    raise UsageError(f"{where}: {FORMS}")


def _text(value: str, where: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"{where}: the text has half a surrogate pair, which is no character") from None
    if not value.strip():
        raise UsageError(f"{where}: the text is empty")
    return value


def _ids(value: list[Any], length: Any, where: str, vocab_size: int) -> tuple[int, ...]:
    if not value:
        raise UsageError(f"{where}: there are no ids in it")
    for token in value:
        if not isinstance(token, int) or isinstance(token, bool):
            raise UsageError(f"{where}: {json.dumps(token)[:40]} is no token id")
        if not 0 <= token < vocab_size:
            raise UsageError(f"{where}: the id {token} is not in [0, {vocab_size}), the vocabulary of the task")
    count = len(value) if length is None else length
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= len(value):
        raise UsageError(f"{where}: 'length' must be a number from 1 to {len(value)}, not {json.dumps(length)[:40]}")
    return tuple(value[:count])


class File:
    """Samples from a file, `file:samples.jsonl`: one text, or one list of the task's token ids, a line.

    Args:
        contents: of the file.
        name: how it was called, for messages.
    """

    info: ClassVar[MethodInfo] = MethodInfo(
        name="file",
        family="made elsewhere",
        uses_steps=False,
        argument="a JSON-lines file of texts or token ids",
        stored=True,
    )

    def __init__(self, contents: Contents, name: str) -> None:
        self.contents = contents
        self.name = name

    @classmethod
    def load(cls, params: Mapping[str, object], device: str) -> File:
        """Read the file; raises UsageError for a wrong line, with its number, or an option."""
        return cls(cls._contents(params), str(params["name"]))

    @classmethod
    def identify(cls, params: Mapping[str, object]) -> Identity:
        """The hash of the file."""
        contents = cls._contents(params)
        kind = "texts" if contents.texts is not None else "id lists"
        return Identity(f"{contents.count} {kind}", f"sha256:{contents.digest}")

    @classmethod
    def stored_sequences(cls, params: Mapping[str, object]) -> int:
        """How many samples there are."""
        return cls._contents(params).count

    @staticmethod
    def _contents(params: Mapping[str, object]) -> Contents:
        for key in params:
            if key not in HARNESS_KEYS:
                raise unknown_name("option of file", key, ())
        if not params.get("name"):
            raise UsageError("method 'file' needs a file: file:samples.jsonl")
        if params.get("checkpoint") is not None:
            raise UsageError("method 'file' has no checkpoint; the file comes after the colon: file:samples.jsonl")
        return read_samples(Path(str(params["name"])).expanduser(), int(str(params["vocab_size"])))

    def networks(self) -> Mapping[str, nn.Module]:
        """None."""
        return {}

    def refuse(self, request: SampleRequest) -> str | None:
        """What was made before cannot be made in another way."""
        if request.prefix is not None or request.pinned is not None:
            return f"{self.name} was made without these pinned tokens"
        if request.temperature != 1.0 or request.top_p not in (None, 1.0) or request.draw != "fp64":
            return f"{self.name} is made already: temperature, nucleus and draw have no effect"
        if request.source is not None:
            return "method 'file' has no source distribution"
        return None

    def sample(self, request: SampleRequest) -> SampleBatch:
        """Lines of the file by sequence number; past its end it starts again, for batches that are not full."""
        import torch

        lines = [index % self.contents.count for index in request.streams.sequences.tolist()]
        tokens = torch.zeros(request.batch, request.length, dtype=torch.int64)
        lengths = torch.zeros(request.batch, dtype=torch.int64)
        if self.contents.texts is not None:
            return SampleBatch(tokens, lengths, texts=tuple(self.contents.texts[line] for line in lines))
        assert self.contents.ids is not None
        for row, line in enumerate(lines):
            ids = torch.tensor(self.contents.ids[line][: request.length])
            tokens[row, : len(ids)] = ids
            lengths[row] = len(ids)
        return SampleBatch(tokens, lengths)
