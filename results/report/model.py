"""What a report is made of. Files are read by the caller, which also decodes tokens: nothing here knows a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


@dataclass(frozen=True)
class Texts:
    """Sample texts of one cell.

    Args:
        texts: of the sequences 0, 1, 2, ...
        stored: how many sequences there are in all.
    """

    texts: Sequence[str]
    stored: int


@dataclass(frozen=True)
class Trace:
    """One sequence through its steps.

    Args:
        cell: id of the cell.
        sequence: its number within the cell.
        steps: (k,) step numbers of the states, rising; 0 = the start, if it is there.
        states: (k, length) int token ids; a mask id may appear.
        pieces: token id -> text, for every id in `states`.
        of_steps: how many steps the cell has; None = unknown.
    """

    cell: str
    sequence: int
    steps: Sequence[int]
    states: np.ndarray
    pieces: Mapping[int, str]
    of_steps: int | None = None


@dataclass(frozen=True)
class Pending:
    """A cell that was planned and has no row in the summary: what it is and how far it is."""

    cell: str
    name: str
    state: str
    reason: str = ""


@dataclass(frozen=True)
class Material:
    """Everything on the page.

    Args:
        name: of the run, for the title.
        summary: see `tsdfm_bench.results.schema`; may be empty.
        root: the run folder, whose per-sequence numbers give intervals of what is read off curves; None: none.
        verdicts: JSON forms of `results.claims.Verdict`, in order.
        claims_title: what the claims are of.
        texts: by cell id; texts_note says why there are none, or what a reader should know.
        traces: recorded sequences; traces_note likewise.
        teacher: label of the row that texts are compared with; None = dfm with the most steps.
        commands: a command that makes the row, by cell id.
        pending: planned cells without a row.
        provenance: records of provenance.json.
        notes: further sentences (a missing scorer, a damaged file).
        made_by: program and version.
        command: what makes this report again.
    """

    name: str
    summary: pd.DataFrame
    root: Path | None = None
    verdicts: Sequence[Mapping[str, Any]] = ()
    claims_title: str = ""
    claims_note: str = ""
    texts: Mapping[str, Texts] = field(default_factory=dict)
    texts_note: str = ""
    traces: Sequence[Trace] = ()
    traces_note: str = ""
    teacher: str | None = None
    commands: Mapping[str, str] = field(default_factory=dict)
    pending: Sequence[Pending] = ()
    provenance: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()
    made_by: str = "tsdfm-bench"
    command: str = ""
