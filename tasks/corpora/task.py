"""The task `text`: any text with any tokenizer.

    text:FOLDER                         files of a folder (or one file): .txt, .jsonl, .parquet
    text:fineweb-edu                    a corpus of the hub: fineweb-edu, openwebtext, wikitext-103, lm1b, tinystories
    text:hf:OWNER/NAME[@REVISION][:CONFIG]
                                        any data set of the hub with the splits train and validation
    text:FOLDER[tokenizer=gpt2;length=1024;packing=mdlm]

Reference rows: `real` is held-out text (test split); the canaries `shuffled` and `loop` are made from it, `unigram` and
`bigram` from the counts of the validation split, so that no training text is needed to judge samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from tsdfm_bench.api import SampleBatch, TaskInfo, TrainingStreams
from tsdfm_bench.errors import UsageError, unknown_name
from tsdfm_bench.tasks.assets import cache_folder
from tsdfm_bench.tasks.corpora.documents import SPLITS, Split, open_source
from tsdfm_bench.tasks.corpora.packing import PACKINGS, Cache, PackedTokens, Packer
from tsdfm_bench.tasks.corpora.vocabulary import open_vocabulary, some
from tsdfm_bench.tasks.options import read_options

if TYPE_CHECKING:
    import torch

    from tsdfm_bench.rng import Streams
    from tsdfm_bench.tasks.canaries import HeldOut, NgramCanaries

OPTIONS: dict[str, Any] = {
    "name": "",
    "path": None,
    "tokenizer": "gpt2",
    "vocab_size": 0,
    "length": 1024,
    "packing": "joined",
    "field": "text",
    "documents": "file",
    "tokens": 0,
    "lossy": False,
}
REFERENCES = ("real", "unigram", "bigram", "shuffled", "loop")
ROUND_TRIPS = 8
CACHE_FORMAT = 1


class TextCorpus:
    """The task `text:NAME`; NAME is a folder, a file, a named corpus or hf:OWNER/NAME.

    Options: `tokenizer` (gpt2, bpe-N, a folder, a hub name), `length` (tokens per sequence, default 1024), `packing`
    (joined, fs-dfm, sedd, mdlm, unwrapped), `field` (column of the text), `documents` (file, line or paragraph: what is
    a document in a .txt), `tokens` (most training tokens, 0 = all), `vocab_size` (ids beyond the tokenizer's own),
    `path` (folder that stands in for a named corpus), `lossy` (accept a tokenizer that does not give texts back).
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.source = open_source(settings["name"], settings["path"], settings["field"], settings["documents"])
        self.vocabulary = open_vocabulary(
            settings["tokenizer"], settings["vocab_size"], lambda: self.source.read("train"), self.source.identity
        )
        held_out = self.stream("test")
        self._require(held_out, "test")
        self.info = TaskInfo(
            name=self._name,
            tokenizer=self.vocabulary.name,
            vocab_size=self.vocabulary.size,
            length=settings["length"],
            data_hash=held_out.data_hash,
            references=REFERENCES,
            description=f"{self._name}, packing {settings['packing']}",
            citation=self.source.citation,
        )

    @classmethod
    def load(cls, params: Mapping[str, object]) -> TextCorpus:
        """Make the task: tokenises the held-out split, once.

        Raises:
            UsageError: a wrong option, an empty text, a tokenizer that does not give texts back.
            AssetError: text or tokenizer cannot be obtained.
        """
        settings = read_options("task 'text'", params, OPTIONS)
        if settings["packing"] not in PACKINGS:
            raise unknown_name("value of option 'packing'", settings["packing"], PACKINGS)
        if settings["length"] < 4:
            raise UsageError(f"option 'length' of task 'text' is at least 4, not {settings['length']}")
        if settings["tokens"] < 0:
            raise UsageError(f"option 'tokens' of task 'text' is at least 0 (all), not {settings['tokens']}")
        return cls(settings)

    @property
    def _name(self) -> str:
        return f"text:{Path(self.settings['name']).name}"

    def stream(self, split: Split) -> PackedTokens:
        """Tokens of a split, tokenised on first use."""
        settings, encode = self.settings, self.vocabulary.encode_batch
        packer = Packer(settings["packing"], settings["length"], self.vocabulary.end_of_text)
        title = f"{self._name}, {split} split"
        check = self._check_round_trip if split == "test" and not settings["lossy"] else None
        read = partial(self.source.read, split)
        return self._cache(split).write(read, encode, packer, title, self._most(split), check=check)

    def _most(self, split: Split) -> int:
        return int(self.settings["tokens"]) if split == "train" else 0

    def _cache(self, split: Split) -> Cache:
        """Where the tokens of a split are kept."""
        packing, length, vocabulary = self.settings["packing"], self.settings["length"], self.vocabulary
        shape = packing if packing == "joined" else f"{packing} {length}"
        limit = f"at most {most}" if (most := self._most(split)) else "0"
        key = f"{CACHE_FORMAT} {self.source.identity} {vocabulary.name} {shape} {split} {limit}"
        name = f"{Path(self.settings['name']).name}-{split}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        return Cache(cache_folder() / "corpora" / name, "uint16" if vocabulary.size <= 1 << 16 else "uint32")

    def _check_round_trip(self) -> None:
        self.vocabulary.require_round_trip(some(self.source.read("test"), ROUND_TRIPS), f"task '{self._name}'")

    def _require(self, stream: PackedTokens, split: str) -> None:
        length = self.settings["length"]
        if stream.size < length:
            raise UsageError(
                f"the {split} split of {self._name} has {stream.size:,} tokens: no sequence of {length} can be taken "
                "from it. Choose a smaller length=..., or more text"
            )

    def data_card(self) -> Mapping[str, object]:
        """Tokens and hash of the splits that are tokenised, as printed by `tsdfm-bench tasks`."""
        streams = {split: self.stream(split) for split in SPLITS if split != "train"}
        return {split: {"tokens": stream.size, "hash": stream.data_hash} for split, stream in streams.items()}

    def decode(self, tokens: np.ndarray, lengths: np.ndarray) -> list[str]:
        """Texts of (n, length) token ids; special tokens are written out."""
        rows = [np.asarray(row[:length]).tolist() for row, length in zip(tokens, lengths, strict=True)]
        return self.vocabulary.decode_batch(rows)

    def encode(self, text: str) -> list[int]:
        """Token ids of one text."""
        return self.vocabulary.encode(text)

    def reference(self, name: str, streams: Streams, length: int) -> SampleBatch:
        """Sequences (batch, length) of a reference row; raises UsageError for an unknown one."""
        from tsdfm_bench.tasks import canaries

        if name == "unigram":
            tokens = self._ngrams.unigram(streams, length)
        elif name == "bigram":
            tokens = self._ngrams.bigram(streams, length)
        elif name in REFERENCES:
            tokens = self._held_out.windows(streams, length)
            if name == "shuffled":
                tokens = canaries.shuffle_words(tokens, self._starts_word, streams)
            elif name == "loop":
                tokens = canaries.loop_phrase(tokens, self._starts_word)
        else:
            raise unknown_name("reference of task 'text'", name, REFERENCES)
        return SampleBatch(tokens, tokens.new_full((len(streams),), length))

    def prompts(self, streams: Streams, length: int) -> torch.Tensor:
        """Held-out windows (batch, length) int64."""
        return self._held_out.windows(streams, length)

    def training_streams(self) -> TrainingStreams:
        """Training and validation tokens; tokenised on first use."""
        train, validation = self.stream("train"), self.stream("validation")
        self._require(validation, "validation")
        block = 0 if self.settings["packing"] == "joined" else self.settings["length"]
        ours, held_out = (cast("np.ndarray", stream) for stream in (train, validation))
        return TrainingStreams(ours, held_out, train.data_hash, self.vocabulary.end_of_text, block)

    def training_at_hand(self) -> TrainingStreams | None:
        """`training_streams` if the training split is tokenised already; else None, and no text is read."""
        return self.training_streams() if self._cache("train").manifest().get("done") else None

    @cached_property
    def _held_out(self) -> HeldOut:
        from tsdfm_bench.tasks.canaries import HeldOut

        return HeldOut(np.asarray(self.stream("test")))

    @cached_property
    def _ngrams(self) -> NgramCanaries:
        from tsdfm_bench.tasks.canaries import NgramCanaries

        return NgramCanaries(np.asarray(self.stream("validation")), self.vocabulary.size)

    @cached_property
    def _starts_word(self) -> torch.Tensor:
        """(V,) bool: tokens that start with white space, and end-of-text."""
        import torch

        return torch.tensor(self.vocabulary.starts_word())
