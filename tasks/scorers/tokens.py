"""Tokenizers of judges: special tokens, a check, and one tokenisation for all judges whose tokenizers agree.

Judges read the same texts one after another. Tokens and where they stand are remembered by the hash of the text under a
fingerprint of the tokenizer (its whole definition, and the id that ends a text), so the second judge of a family (gpt2
and gpt2-large, two sizes of one Llama) tokenises nothing. The memory of each is bounded; what does not fit is
tokenised again: every judge begins with the same texts, so the first ones are kept.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tsdfm_bench.errors import AssetError, UsageError
from tsdfm_bench.tasks.scorers.units import END_OF_TEXT

PROBE = "The State of the Union:  1,234 é?\n\n\t“ﬁve” – n .½, 中文, 😀\n"
MOST_BYTES = 256_000_000


class TokenMemory:
    """Whole numbers of texts (ids, and where they stand), by tokenizer and text.

    Args:
        most_bytes: kept of one tokenizer; later texts are not.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes = most_bytes
        self.kept = Counter[str]()
        self._ids: dict[tuple[str, bytes], np.ndarray] = {}

    def numbers(self, fingerprint: str, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """What belongs to a text, from `encode` if they are not remembered; nothing is kept without a fingerprint."""
        if not fingerprint:
            return encode(text)
        key = (fingerprint, hashlib.sha256(text.encode(errors="surrogatepass")).digest())
        if key not in self._ids:
            numbers = encode(text)
            ids = np.asarray(numbers, dtype=np.min_scalar_type(max(numbers, default=0)))
            if self.kept[fingerprint] + ids.nbytes > self.most_bytes:
                return numbers
            self._ids[key] = ids
            self.kept[fingerprint] += ids.nbytes
        found: list[int] = self._ids[key].tolist()
        return found


SHARED = TokenMemory()


def fingerprint(tokenizer: Any, end_id: int) -> str:
    """What two tokenizers that agree have in common, or "" for one that cannot be described."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        return ""
    return hashlib.sha256(f"{end_id}\x1f{backend.to_str()}".encode()).hexdigest()


def require_round_trip(tokenizer: Any, name: str, texts: Sequence[str] = (PROBE,)) -> None:
    """Raise UsageError if the tokenizer changes a text: its NLLs would be those of another one.

    Accepted are a space before the text, as SentencePiece puts it, and characters composed another way that Unicode
    holds to be the same text (NFC, as in the tokenizers of Qwen and Pythia).

    Args:
        tokenizer: of transformers.
        name: of the scorer.
        texts: what is read, without end-of-text markers; the probe has white space, punctuation, compatibility
            characters and other scripts.
    """
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        back = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        given, got = (unicodedata.normalize("NFC", each) for each in (text, back))
        if got not in (given, " " + given):
            was, became = difference(given, got.removeprefix(" ") if not given.startswith(" ") else got)
            raise UsageError(
                f"the tokenizer of scorer '{name}' does not give a text back ({was!r} became {became!r}): bits per "
                "byte and perplexity would be those of another text. Choose another scorer, or accept it with "
                "lossy=true"
            )


def difference(text: str, back: str, characters: int = 30) -> tuple[str, str]:
    """What follows in two texts from their first difference on."""
    at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
    return text[at : at + characters], back[at : at + characters]


def token_id(tokenizer: Any, token: str, scorer: str) -> int:
    """The id of a token by its text; raises UsageError if there is none."""
    index = tokenizer.convert_tokens_to_ids(token)
    if index is None or (index == tokenizer.unk_token_id and token != tokenizer.unk_token):
        raise UsageError(f"context token {token!r} of scorer '{scorer}' is not in its vocabulary; set option 'context'")
    return int(index)


def end_of_text_id(tokenizer: Any) -> int:
    """The token a text ends with: `<|endoftext|>` where it exists, else the tokenizer's end-of-sequence token."""
    vocabulary = tokenizer.get_vocab()
    if END_OF_TEXT in vocabulary:
        return int(vocabulary[END_OF_TEXT])
    if tokenizer.eos_token_id is None:
        raise AssetError("the scorer's tokenizer has no end-of-text token")
    return int(tokenizer.eos_token_id)
