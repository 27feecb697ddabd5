"""Text as scorers see it: the end-of-text marker and the number of bytes.

A task decodes its end-of-text token to the marker `<|endoftext|>`. Scorers must not read that as thirteen characters:
each puts its own end-of-text unit there (and marks it in `ScoreBatch.special`), and it counts as one byte, as a single
separator would. Without this rule a sample full of end-of-text tokens would earn thirteen nearly free bytes for each.
"""

from __future__ import annotations

END_OF_TEXT = "<|endoftext|>"


def split_at_end_of_text(text: str) -> list[str]:
    """The pieces of text between end-of-text markers; one marker stands between neighbours, pieces may be empty."""
    return text.split(END_OF_TEXT)


def piece_starts(text: str) -> list[int]:
    """Where the pieces of `split_at_end_of_text` begin; a marker stands right before each but the first."""
    starts = [0]
    for piece in split_at_end_of_text(text)[:-1]:
        starts.append(starts[-1] + len(piece) + len(END_OF_TEXT))
    return starts


def byte_count(text: str) -> int:
    """UTF-8 bytes of a text, each end-of-text marker counted as one byte."""
    pieces = split_at_end_of_text(text)
    return sum(len(piece.encode("utf-8", errors="replace")) for piece in pieces) + len(pieces) - 1
