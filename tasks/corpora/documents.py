"""Documents of a corpus, split by split: files of a folder, or a data set of a hub.

Files: `.txt` (one document a file; `documents=line` or `documents=paragraph` cuts it further, and so does
`<|endoftext|>`; pieces of white space alone are none), `.jsonl` and `.parquet` (one document a row, column `text`
unless `field` says otherwise). Files and folders whose names begin with train, valid or test are those splits. Where
nothing is named held-out, a document's own sha256 decides: 96 in a hundred are training text, two validation, two test.
So equal documents are never in two splits, and a split does not change with the order or the number of files. A single
held-out split is halved in the same way.

Rows are the same from everywhere: null is none, and an empty one is a document without tokens, of which its end-of-text
stays, as in flow_matching's and ml-fs-dfm's code (blank lines of WikiText).

Named corpora are data sets of the hub with their published splits. Where the hub cannot be reached, `path=FOLDER` or
`TSDFM_BENCH_<NAME>=FOLDER` stands in.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from unittest import mock

from tsdfm_bench.errors import AssetError, BenchError, UsageError, hub_reason, unknown_name
from tsdfm_bench.tasks.assets import hub_refusal
from tsdfm_bench.tasks.scorers.units import END_OF_TEXT

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
SUFFIXES = (".txt", ".jsonl", ".parquet")
CUTS = ("file", "line", "paragraph")
HELD_OUT_PERCENT = 2
HASHED, HALVED = "hashed", "halved"
_NAMED_SPLIT = {"train": "train", "valid": "validation", "val": "validation", "dev": "validation", "test": "test"}
_GOES_ON = r"(?![a-z])|(?:ation|ing|s|set|data|split)(?![a-z])"  # "testset", "training-1", but not "testament"
_PARAGRAPH = re.compile(r"\n[ \t]*\n")


@dataclass(frozen=True)
class Corpus:
    """A data set of the hub.

    Args:
        dataset, config: its name and configuration there.
        splits: ours -> the hub's; a split that is missing is half of "held-out".
        revision: branch, tag or commit, or None.
        held_out: name of the corpus whose validation and test splits are used instead of its own.
        clean: applied to every document.
        citation: source and licence.
        published: what its held-out text is, where the hub's splits are used.
    """

    dataset: str
    config: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None
    held_out: str | None = None
    clean: Callable[[str], str] | None = None
    citation: str = ""
    published: str = ""


def detokenise_wikitext(line: str) -> str:
    """WikiText's spaced punctuation as it was written."""
    for spaced, plain in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" – ", "–")):
        line = line.replace(spaced, plain)
    line = re.sub(r" ([.,;:!?)\]}%])", r"\1", line)
    line = re.sub(r"([(\[{$£]) ", r"\1", line)
    line = re.sub(r" (n't|'(?:s|re|ve|ll|d|m))\b", r"\1", line)
    line = re.sub(r'" ([^"]*?) "', r'"\1"', line)
    return re.sub(r"= (?==)", "=", line)


CORPORA: Mapping[str, Corpus] = {
    "fineweb-edu": Corpus(
        "HuggingFaceFW/fineweb-edu",
        "CC-MAIN-2024-10",
        {"train": "train"},
        held_out="wikitext-103",
        citation="FineWeb-Edu, CC-MAIN-2024-10 (ODC-By 1.0)",
    ),
    "openwebtext": Corpus(
        "Skylion007/openwebtext",
        None,
        {"train": "train[:-100000]", "held-out": "train[-100000:]"},
        citation="OpenWebText",
        published="its last 100,000 documents, as in MDLM's code",
    ),
    "wikitext-103": Corpus(
        "Salesforce/wikitext",
        "wikitext-103-raw-v1",
        {"train": "train", "validation": "validation", "test": "test"},
        clean=detokenise_wikitext,
        citation="WikiText-103 (CC BY-SA 3.0), detokenised line by line",
    ),
    "lm1b": Corpus(
        "billion-word-benchmark/lm1b",
        None,
        {"train": "train", "held-out": "test"},
        revision="refs/convert/parquet",
        citation="One Billion Word benchmark",
        published="its test split",
    ),
    "tinystories": Corpus(
        "roneneldan/TinyStories",
        None,
        {"train": "train", "held-out": "validation"},
        citation="TinyStories (CDLA-Sharing 1.0)",
        published="its validation split",
    ),
}


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    Args:
        name: as typed.
        identity: of the text, so far as it is known without reading it: part of a cache's name.
        read: split -> its documents, in a fixed order.
        citation: source and licence.
    """

    name: str
    identity: str
    read: Callable[[Split], Iterator[str]]
    citation: str = ""


def open_source(name: str, path: str | None = None, column: str = "text", cut: str = "file") -> Source:
    """The source a user names.

    Args:
        name: a folder or file, a name of `CORPORA`, or hf:OWNER/NAME[@REVISION][:CONFIG].
        path: a folder that stands in for a named corpus.
        column: of JSONL, Parquet and data sets.
        cut: what is a document in a .txt file.

    Raises:
        UsageError: no such thing.
    """
    if cut not in CUTS:
        raise unknown_name("value of option 'documents'", cut, CUTS)
    if not name:
        raise UsageError(f"task 'text' needs a text: text:FOLDER, text:FILE, or one of {_names()}")
    local = path or (os.environ.get(_variable(name)) if name in CORPORA else None)
    place = Path(local or name).expanduser()
    if local or place.exists():
        if not place.exists():
            raise UsageError(f"no such folder or file: {place}")
        return _local(name, place, column, cut, CORPORA.get(name))
    if name in CORPORA:
        return _named(name, column)
    if name.startswith("hf:"):
        place_there, _, config = name.removeprefix("hf:").partition(":")
        dataset, at, revision = place_there.partition("@")
        if at and not revision:
            raise UsageError(f"text '{name}' has an empty revision: write hf:OWNER/NAME@REVISION, or leave out the @")
        splits = {"train": "train", "held-out": "validation"}
        return _hub(name, Corpus(dataset, config or None, splits, revision or None, citation=place_there), column)
    raise unknown_name("text", name, CORPORA, "Or give a folder or file of .txt, .jsonl or .parquet, or hf:OWNER/NAME.")


def _names() -> str:
    return ", ".join(f"text:{name}" for name in CORPORA)


def _variable(name: str) -> str:
    return "TSDFM_BENCH_" + re.sub(r"\W", "_", name).upper()


# ------------------------------------------------------------------------------------------------------- local files


def _local(name: str, place: Path, column: str, cut: str, corpus: Corpus | None) -> Source:
    clean = corpus.clean if corpus else None
    files = _files(place)
    if not files:
        raise UsageError(f"{place} has no {', '.join(SUFFIXES)} file{_others(place)}")
    names = {file: _split_of_name(file, place) for file in files}
    roles = {file: _role(own, set(names.values())) for file, own in names.items()}
    stamp = hashlib.sha256()
    for file in files:
        stat = file.stat()
        stamp.update(f"{file.relative_to(place) if place.is_dir() else file.name}\x1f{stat.st_size}\x1f".encode())
        stamp.update(f"{stat.st_mtime_ns}\x1e".encode())

    def read(split: Split) -> Iterator[str]:
        for file in files:
            if roles[file] in (split, HASHED) or (roles[file] == HALVED and split != "train"):
                for document in _documents(file, column, cut):
                    if roles[file] == split or split_of(document, halved=roles[file] == HALVED) == split:
                        yield clean(document) if clean else document

    citation = f"local files: {place.name}"
    if corpus:  # the hub's splits are not those of a folder that stands in for it
        held_out = {HASHED: "by hash", HALVED: "files of one name, halved by hash"}
        how = next((held_out[role] for role in roles.values() if role in held_out), "files named so")
        citation = f"{corpus.citation}; {citation}; held out: {how}"
    cleaned = f" {clean.__name__}" if clean else ""
    return Source(name, f"files 3 {stamp.hexdigest()} {column} {cut}{cleaned}", read, citation)


def split_of(document: str, halved: bool = False) -> Split:
    """The split a document's hash puts it in.

    Args:
        document: its text.
        halved: choose between validation and test only.
    """
    place = int.from_bytes(hashlib.sha256(document.encode(errors="surrogatepass")).digest()[:4]) % 100
    if halved:
        return "validation" if place % 2 == 0 else "test"
    return "validation" if place < HELD_OUT_PERCENT else "test" if place < 2 * HELD_OUT_PERCENT else "train"


def _role(own: str | None, named: set[str | None]) -> str:
    """What the documents of a file are: those of a split, of both held-out splits, or of all three."""
    held_out = named & {"validation", "test"}
    if not held_out:
        return HASHED
    if own in held_out and len(held_out) == 1:
        return HALVED
    return own or "train"


def _files(place: Path) -> list[Path]:
    if place.is_file():
        return [place] if place.suffix in SUFFIXES else []
    return sorted(file for file in place.rglob("*") if file.suffix in SUFFIXES and file.is_file())


def _others(place: Path) -> str:
    """What a place has instead of texts, for a message: the endings of its names."""
    there = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
    if not there:
        return ": it is empty"
    endings = Counter("".join(file.suffixes[-2:]) or file.name for file in there)
    return f"; it has: {', '.join(f'{count} {ending}' for ending, count in endings.most_common(5))}"


def _split_of_name(file: Path, place: Path) -> str | None:
    parts = [file.name] if place.is_file() else file.relative_to(place).parts
    for part in reversed(parts):
        for start, split in _NAMED_SPLIT.items():
            if re.match(rf"{start}(?:{_GOES_ON})", part.lower()):
                return split
    return None


def _documents(file: Path, column: str, cut: str) -> Iterator[str]:
    try:
        if file.suffix == ".txt":
            yield from _of_text(file, cut)
        elif file.suffix == ".jsonl":
            with file.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    where = f"{file}, line {number}"
                    text = _field(_row(line, where), column, where) if line.strip() else None
                    if text is not None:
                        yield text
        else:
            yield from _of_parquet(file, column)
    except UnicodeDecodeError as error:
        raise AssetError(f"{file} is not UTF-8: {error}") from error
    except OSError as error:
        raise AssetError(f"{file} cannot be read: {error.strerror or error}") from error


def _row(line: str, where: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise AssetError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error


def _of_text(file: Path, cut: str) -> Iterator[str]:
    text = file.read_text(encoding="utf-8")
    for part in text.split(END_OF_TEXT):
        pieces = [part] if cut == "file" else part.splitlines() if cut == "line" else _PARAGRAPH.split(part)
        yield from (piece.strip() for piece in pieces if piece.strip())


def _of_parquet(file: Path, column: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        content = pq.ParquetFile(file)
        if column not in content.schema_arrow.names:
            raise AssetError(f"{file} has no column '{column}'; it has: {', '.join(content.schema_arrow.names)}")
        for batch in content.iter_batches(batch_size=1024, columns=[column]):
            texts = (_field(row, column, str(file)) for row in batch.to_pylist())
            yield from (text for text in texts if text is not None)
    except pa.ArrowInvalid as error:
        raise AssetError(f"{file} is not a complete Parquet file: {error}") from error


def _field(row: object, column: str, where: str) -> str | None:
    """The text of a row, or None where it is null."""
    text = row.get(column, ...) if isinstance(row, Mapping) else ...
    if text is None:
        return None
    if not isinstance(text, str):
        has = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        what = "" if text is ... else f" but a value of type {type(text).__name__}"
        raise AssetError(f"{where} has no text under '{column}'{what} (it has: {has}); set option 'field'")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise AssetError(f"{where} is no text: it has half a character (a lone surrogate) under '{column}'") from None
    return text


# --------------------------------------------------------------------------------------------------------- data sets


def _named(name: str, column: str) -> Source:
    corpus = CORPORA[name]
    source = _hub(name, corpus, column)
    if corpus.held_out is None:
        return source
    other = open_source(corpus.held_out, column=column)

    def read(split: Split) -> Iterator[str]:
        if split == "train":
            yield from source.read(split)
            return
        try:
            yield from other.read(split)
        except AssetError as error:
            raise AssetError(
                f"{error}\nIt is the held-out text of '{name}': a folder in place of that, {_stand_ins(name)}, holds "
                "out its own"
            ) from error

    citation = f"{corpus.citation}; held out: {other.citation}"
    return Source(name, f"{source.identity} | {other.identity}", read, citation)


def _hub(name: str, corpus: Corpus, column: str) -> Source:
    def read(split: Split) -> Iterator[str]:
        halved = split not in corpus.splits
        asked = corpus.splits.get("held-out" if halved else split)
        if asked is None:
            raise UsageError(f"text '{name}' has no {split} split")
        for row in _unbroken(rows_of(corpus, asked, name), corpus, name):
            document = _field(row, column, name)
            if document is None:
                continue
            if not halved or split_of(document, halved=True) == split:
                yield corpus.clean(document) if corpus.clean else document

    identity = f"hub {corpus.dataset} {corpus.config} {corpus.revision} {sorted(corpus.splits.items())} {column}"
    citation = f"{corpus.citation}; held out: {corpus.published}" if corpus.published else corpus.citation
    return Source(name, identity, read, citation)


def _unbroken(rows: Iterable[object], corpus: Corpus, name: str) -> Iterator[object]:
    """The rows; raises AssetError if the hub breaks off among them."""
    count = 0
    try:
        for row in rows:
            count += 1
            yield row
    except BenchError:
        raise
    except Exception as error:  # the network's many errors, most of them OSError
        raise AssetError(
            f"the text '{name}' ({corpus.dataset}) broke off after {count:,} rows: {_reason(error, corpus)}. The same "
            "command goes on from the last part that was kept"
        ) from error


def rows_of(corpus: Corpus, split: str, name: str) -> Iterable[object]:
    """Rows of a data set, streamed where that is possible.

    Raises:
        AssetError: it cannot be obtained; says what was tried and what to type.
    """
    import datasets

    refusal = hub_refusal()
    tried: list[str] = []
    # a slice cannot be streamed; without the hub only what `datasets` has cached can be read
    for streaming in (False,) if refusal or "[" in split else (True, False):
        try:
            with _offline() if refusal else nullcontext():
                rows: Iterable[object] = datasets.load_dataset(
                    corpus.dataset, corpus.config, split=split, revision=corpus.revision, streaming=streaming
                )
            return rows
        except Exception as error:  # the hub's, the library's and the network's many errors mean the same here
            reason = _reason(error, corpus)
            if refusal and "OfflineModeIsEnabled" in reason:  # ours, see `_offline`; `refusal` says why
                reason = "not in the local cache"
            tried.append(f"  {'cached' if refusal else 'streamed' if streaming else 'downloaded'}: {reason}")
    if refusal:
        tried.append(f"  model hub: {refusal}")
    raise AssetError(
        f"could not obtain the text '{name}' ({corpus.dataset}). Tried:\n" + "\n".join(tried) + "\n"
        f"Give a folder of .txt, .jsonl or .parquet files in its place: {_stand_ins(name)}; or use a text that needs "
        "no hub: --task sotu"
    )


def _stand_ins(name: str) -> str:
    """What to type so that a folder stands in for a data set."""
    return f"text:{name}[path=FOLDER]" + (f" or {_variable(name)}=FOLDER" if name in CORPORA else "")


@contextmanager
def _offline() -> Iterator[None]:
    """Neither `datasets` nor the hub's client asks the network in the block; both read the variable at import only."""
    import datasets
    import huggingface_hub

    settings = (datasets.config, huggingface_hub.constants)
    with ExitStack() as stack:
        for module in settings:
            stack.enter_context(mock.patch.object(module, "HF_HUB_OFFLINE", True))
        yield


def _reason(error: BaseException, corpus: Corpus) -> str:
    return hub_reason(error, corpus.dataset, corpus.revision)
