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


class CompassError(BenchError):
    """An energy compass failed its checks, so no student is taught with it."""


class MatchError(BenchError):
    """A control cannot be made equal to what it controls for."""


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


def hub_reason(error: BaseException, name: str, revision: str | None = None) -> str:
    """Why a model or data hub did not deliver, and what to do about it, in one line.

    Args:
        error: any exception of the hub's client; told apart by the names of its classes, so that nothing is imported.
        name: what was asked for, "owner/name".
        revision: the revision asked for, or None.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = str(error).strip().splitlines()
    line = (text[0] if text else type(error).__name__)[:300]
    unknown = "DatasetNotFoundError" in kinds  # of `datasets`, for three things that only its text tells apart
    if "GatedRepoError" in kinds or (unknown and "is a gated dataset" in line):
        return (
            f"{name} is gated: accept its licence on its page with your account, then log in here (hf auth login, or "
            "HF_TOKEN=...)"
        )
    if kinds & {"DisabledRepoError"}:
        return f"{name} was disabled by its hub"
    if "RevisionNotFoundError" in kinds or (unknown and line.startswith("Revision ")):
        return f"{name} has no revision '{revision}': check the branch, tag or commit"
    if unknown or "RepositoryNotFoundError" in kinds:
        return f"there is no {name}, or it is private: check the name, or log in (hf auth login)"
    if "HFValidationError" in kinds:
        return f"'{name}' cannot be the name of a repository: write OWNER/NAME"
    if kinds & {"OfflineModeIsEnabled"}:
        return "HF_HUB_OFFLINE is set"
    if "LocalEntryNotFoundError" in kinds:
        return "not there, or incomplete"
    return line
