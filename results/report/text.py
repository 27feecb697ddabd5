"""Generated text as it can be shown: what is invisible or would act on the page is spelt out.

A generator may write anything: null bytes, terminal codes, characters that turn the reading direction, lines of a
megabyte. Control characters become their pictures (U+2400 ...), format characters, surrogates, private and unassigned
ones a bracketed code point; newline and tab stay, and so do the joiners that scripts need. Escaping for HTML is the
template's work, not this module's.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from difflib import SequenceMatcher

_KEPT = frozenset("\n\t\u200c\u200d")
_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
_WORD = re.compile(r"\s*\S+")
MOST_WORDS = 1500  # compared; a longer text is not marked beyond them
MOST_CHARACTERS = 20_000  # of any other text on the page (labels, reasons, commands)


class _Shown(dict[int, str]):
    """code point -> how it is shown, found once per character."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if character in _KEPT or unicodedata.category(character) not in _HIDDEN:
            shown = character
        elif code < 0x20:
            shown = chr(0x2400 + code)
        elif code == 0x7F:
            shown = "\u2421"
        else:
            shown = f"\u2039U+{code:04X}\u203a"
        self[code] = shown
        return shown


_SHOWN = _Shown()


def visible(text: str) -> str:
    """The text with every invisible or acting character spelt out."""
    return text.translate(_SHOWN)


def cut(text: str, limit: int) -> str:
    """At most `limit` characters, with a count of what was left out."""
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters)"


def finalize(value: object) -> object:
    """What the template writes for a value: markup as it is, all other text visible and of bounded length."""
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return visible(cut(value, MOST_CHARACTERS))
    return "" if value is None else value


def differences(text: str, other: str) -> list[tuple[bool, str]]:
    """The text in pieces (differs, piece), by words in the longest common order with another text.

    Args:
        text: to be shown.
        other: what it is compared with; white space does not count.

    Returns:
        pieces that join to `text`; white space at the edge of a piece that differs is part of the next one.
    """
    words = [match.group() for match in _WORD.finditer(text)]
    tail = text[sum(map(len, words)) :]
    compared = [word.strip() for word in words[:MOST_WORDS]]
    same = [False] * len(compared)
    for block in SequenceMatcher(None, compared, _words(other), autojunk=False).get_matching_blocks():
        same[block.a : block.a + block.size] = [True] * block.size
    same += [True] * (len(words) - len(compared))
    pieces: list[tuple[bool, str]] = []
    for word, equal in zip(words, same, strict=True):
        bare = word.lstrip()
        space = word[: len(word) - len(bare)]
        if not equal and pieces and pieces[-1][0]:
            pieces[-1] = (True, pieces[-1][1] + word)
            continue
        _append(pieces, False, space)
        _append(pieces, not equal, bare)
    _append(pieces, False, tail)
    return pieces


def _words(text: str) -> Sequence[str]:
    return [match.group().strip() for match in _WORD.finditer(text)][:MOST_WORDS]


def _append(pieces: list[tuple[bool, str]], differs: bool, piece: str) -> None:
    if not piece:
        return
    if pieces and pieces[-1][0] == differs:
        pieces[-1] = (differs, pieces[-1][1] + piece)
    else:
        pieces.append((differs, piece))
