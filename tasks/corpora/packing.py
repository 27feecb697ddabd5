"""Token streams on disk: Arrow files that are mapped into memory, packed as the papers' code packs them.

    packing     a training row of L tokens                                                  as in
    joined      any L tokens of the documents, each followed by end-of-text (default)       this project
    fs-dfm      the same, but 1,000 documents at a time, cut into rows, their rest dropped   DFM, FS-DFM
    sedd        the same without a rest, cut into rows                                       SEDD
    mdlm        end-of-text, L - 2 tokens of the joined documents, end-of-text               MDLM, DUO, SDTT ("wrapped")
    unwrapped   one document, cut or filled up with end-of-text to L                         MDLM's LM1B

Rows of different packings differ at their first and last places, and perplexities of models trained on them cannot be
compared there.

Tokenising is done once per text, tokenizer and packing, by one process: others that need the same tokens wait for it.
It goes on where it was stopped: finished parts and the number of documents they cover are on disk. The hash of a split
is a chain over its documents, in order. Once all is there, the documents are not asked for again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tsdfm_bench.api import alone
from tsdfm_bench.errors import AssetError, UsageError

PACKINGS = ("joined", "fs-dfm", "sedd", "mdlm", "unwrapped")
DOCUMENTS_PER_BATCH = 1000
PART_TOKENS = 1 << 26
MANIFEST = "manifest.json"
NOTE_EVERY_S = 10.0


class Packer:
    """Documents' tokens -> a flat stream of rows (or of plain tokens, for "joined").

    Args:
        packing: see the module.
        length: L.
        end: the end-of-text id.
        carry: tokens left over from before.
    """

    def __init__(self, packing: str, length: int, end: int, carry: list[int] | None = None) -> None:
        self.packing, self.length, self.end = packing, length, end
        self.carry = list(carry or [])

    def add(self, documents: list[list[int]]) -> np.ndarray:
        """Tokens that are complete after one batch of documents, (n,) int64."""
        if self.packing == "unwrapped":
            padded = [(ids + [self.end] * self.length)[: self.length] for ids in documents]
            return np.asarray(padded, dtype=np.int64).reshape(-1)
        joined = [token for ids in documents for token in (*ids, self.end)]
        if self.packing == "joined":
            return np.asarray(joined, dtype=np.int64)
        tokens = np.asarray(self.carry + joined, dtype=np.int64)
        inner = self.length - 2 if self.packing == "mdlm" else self.length
        count = len(tokens) // inner
        rows = tokens[: count * inner].reshape(count, inner)
        self.carry = [] if self.packing == "fs-dfm" else tokens[count * inner :].tolist()
        if self.packing == "mdlm":
            rows = np.pad(rows, ((0, 0), (1, 1)), constant_values=self.end)
        return rows.reshape(-1)


@dataclass(frozen=True)
class Cache:
    """Where one split's tokens are kept.

    Args:
        folder: of its parts and manifest.
        dtype: of the tokens.
    """

    folder: Path
    dtype: str

    def manifest(self) -> dict[str, Any]:
        """What is there so far; {} if nothing, or if it is damaged."""
        try:
            found = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        complete = isinstance(found, dict) and all((self.folder / part["file"]).is_file() for part in found["parts"])
        return found if complete else {}

    def write(
        self,
        documents: Callable[[], Iterator[str]],
        encode: Callable[[list[str]], list[list[int]]],
        packer: Packer,
        title: str,
        most_tokens: int = 0,
        part_tokens: int = PART_TOKENS,
        check: Callable[[], None] | None = None,
    ) -> PackedTokens:
        """Tokenise what is missing and return the stream.

        Args:
            documents: gives them from the start.
            encode: a batch of texts -> their ids.
            packer: fresh.
            title: for progress.
            most_tokens: at most so many, in whole rows (but one row at least); 0 = all.
            part_tokens: about how many a file holds.
            check: raises if these tokens are not to be used; that it did not is kept with them, and it is not asked
                again.

        Raises:
            UsageError: no document gave a row.
            AssetError: the cache cannot be written.
        """
        state = self._state()
        if not state["done"] or (check and not state["checked"]):
            with self._writing():
                self.folder.mkdir(parents=True, exist_ok=True)
            with alone(
                self.folder, "filling", lambda holder: _say(f"{title}: waiting for {holder}, which tokenises it")
            ):
                state = self._state()
                if check and not state["checked"]:
                    check()
                    state["checked"] = True
                if not state["done"]:
                    self._fill(state, documents, encode, packer, title, most_tokens, part_tokens)
                self._save(state)
        return PackedTokens(self.folder, state["parts"], "sha256:" + state["hash"], np.dtype(self.dtype))

    def _state(self) -> dict[str, Any]:
        new = {"parts": [], "documents": 0, "hash": "", "carry": [], "done": False, "checked": False}
        return new | self.manifest()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise AssetError(
                f"cannot write the token cache {self.folder}: {error.strerror or error}; set TSDFM_BENCH_CACHE to "
                "a folder with room"
            ) from error

    def _fill(
        self,
        state: dict[str, Any],
        documents: Callable[[], Iterator[str]],
        encode: Callable[[list[str]], list[list[int]]],
        packer: Packer,
        title: str,
        most_tokens: int,
        part_tokens: int,
    ) -> None:
        packer.carry = list(state["carry"])
        waiting: list[np.ndarray] = []
        held, total = 0, sum(part["tokens"] for part in state["parts"])
        started = noted = time.monotonic()
        before = total
        stream = islice(documents(), state["documents"], None)
        while batch := list(islice(stream, DOCUMENTS_PER_BATCH)):
            chain = hashlib.sha256(bytes.fromhex(state["hash"]))
            for text in batch:
                chain.update(hashlib.sha256(text.encode(errors="surrogatepass")).digest())
            state["hash"] = chain.hexdigest()
            state["documents"] += len(batch)
            tokens = packer.add(encode(batch))
            if most_tokens:
                row = 1 if packer.packing == "joined" else packer.length
                tokens = tokens[: max(most_tokens // row, 1) * row - total]
            waiting.append(tokens)
            held, total = held + tokens.size, total + tokens.size
            if held >= part_tokens:
                self._part(state, np.concatenate(waiting), packer)
                waiting, held = [], 0
            now = time.monotonic()
            if now - noted > NOTE_EVERY_S:
                rate = (total - before) / (now - started)
                _say(f"tokenising {title}: {total / 1e6:.1f}M tokens, {rate:,.0f}/s")
                noted = now
            if most_tokens and total >= most_tokens:
                break
        if held:
            self._part(state, np.concatenate(waiting), packer)
        if not state["parts"]:
            found = f"the {state['documents']} documents found there do not fill one row of {packer.length} tokens"
            raise UsageError(
                f"{title} is empty: {found if state['documents'] else 'no document was found there'}. Check the files, "
                "set documents=line or documents=paragraph if few large files hold many texts, or give files train.*, "
                "validation.*, test.*"
            )
        state["done"] = True

    def _part(self, state: dict[str, Any], tokens: np.ndarray, packer: Packer) -> None:
        import pyarrow as pa

        name = f"part-{len(state['parts']):05d}.arrow"
        partial = self.folder / f".{name}.{os.getpid()}.partial"
        batch = pa.record_batch({"tokens": pa.array(tokens.astype(self.dtype))})
        with self._writing():
            with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
                writer.write_batch(batch)
            partial.replace(self.folder / name)
        state["parts"].append({"file": name, "tokens": int(tokens.size)})
        state["carry"] = list(packer.carry)
        self._save(state)

    def _save(self, state: dict[str, Any]) -> None:
        partial = self.folder / f".{MANIFEST}.{os.getpid()}.partial"
        with self._writing():
            partial.write_text(json.dumps(state), encoding="utf-8")
            partial.replace(self.folder / MANIFEST)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class PackedTokens:
    """A stream in parts, mapped into memory; slices and arrays of it are numpy.

    Args:
        folder, parts: of the cache.
        data_hash: "sha256:..." of the documents.
        dtype: of the tokens.
    """

    ndim = 1

    def __init__(self, folder: Path, parts: list[dict[str, Any]], data_hash: str, dtype: np.dtype[Any]) -> None:
        self.folder, self.data_hash, self.dtype = folder, data_hash, dtype
        self.files = [folder / part["file"] for part in parts]
        self.ends = np.cumsum([part["tokens"] for part in parts])
        self._mapped: dict[int, np.ndarray] = {}

    @property
    def size(self) -> int:
        """Number of tokens."""
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def shape(self) -> tuple[int]:
        """(size,)."""
        return (self.size,)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, at: slice) -> np.ndarray:
        start, stop, step = at.indices(self.size)
        if step != 1:
            raise ValueError("a packed stream is read in steps of one")
        pieces = []
        for part in range(int(np.searchsorted(self.ends, start, side="right")), len(self.ends)):
            begin = int(self.ends[part - 1]) if part else 0
            if begin >= stop:
                break
            pieces.append(self._part(part)[max(start - begin, 0) : stop - begin])
        return np.concatenate(pieces) if len(pieces) != 1 else pieces[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)

    def _part(self, part: int) -> np.ndarray:
        if part not in self._mapped:
            import pyarrow as pa

            try:
                table = pa.ipc.open_file(pa.memory_map(str(self.files[part])))
                tokens: np.ndarray = table.get_batch(0).column(0).to_numpy(zero_copy_only=True)
            except (OSError, pa.ArrowInvalid) as error:
                raise AssetError(
                    f"{self.files[part]} is damaged ({error}); delete {self.folder} to tokenise the text again"
                ) from error
            self._mapped[part] = tokens
        return self._mapped[part]
