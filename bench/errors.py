"""Errors a user can act on.

Every error says what was asked, what exists, and what to type next. `UsageError` means that the request itself is
wrong (exit code 2, before any work starts); the others belong to one cell, one file or one plug-in and never end a
sweep.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BenchError(Exception):
    """Base of every error that is shown to the user as one clear message, without a traceback."""


class UsageError(BenchError):
    """The request is wrong: unknown name, impossible value, another plan in the folder (exit code 2)."""


class PluginError(BenchError):
    """A plug-in cannot be used: import failed, attribute missing, wrong API version, wrong output."""


class CheckpointError(BenchError):
    """Weights are missing, truncated, altered, or of another shape than their configuration says."""


class AssetError(BenchError):
    """Text, tokenizer or scorer files could not be obtained; the message lists every place that was tried."""


class StorageError(BenchError):
    """A result file cannot be written or read: disk full, read-only, checksum mismatch."""


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """The known names most similar to `name`, best first (at most three)."""
    return difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)


def unknown_name(kind: str, name: str, known: Iterable[str], hint: str = "") -> UsageError:
    """A `UsageError` for a name that does not exist, with the nearest known ones.

    Args:
        kind: what was looked up, for example "method".
        name: what the user typed.
        known: every name that would have been accepted.
        hint: the command that lists them, or another remedy.
    """
    known = sorted(known)
    close = nearest(name, known)
    message = f"unknown {kind} '{name}'"
    message += f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else "."
    message += f" Known: {', '.join(known) if known else 'none'}."
    if hint:
        message += f" {hint}"
    return UsageError(message)
