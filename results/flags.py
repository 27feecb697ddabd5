"""Flags: what a reader must know before believing a row.

Perplexity from a scorer rewards text that is too predictable; entropy, repetition, held-out real text and
zero-parameter canaries show when that happens. Every flag is a pure function of the summary: a short code on the row
and one sentence under the table. Rows are compared only within one task, length, tokenizer, data split and prefix.

The range of real text. A row's entropy is a mean over sequences, so it is held against the mean of real text, not
against the spread of single sequences, which is so wide that a collapsed generator stays inside. It is out of range if
its 95 % interval and that of the real row do not meet (a mean difference at about the 0.6 % level when both are equally
wide) and the gap is more than 0.05 nats: a smaller gap is real at large n, but moves perplexity by a few percent only.
Repetition and distinct-n follow the same rule with a gap of more than a tenth of real text's value.

Memorisation is held against real text in the same way, with a gap of one in a hundred: held-out text shares formulas
with the training text too.

Canaries. One that keeps the entropy of real text (unigram, bigram, shuffled) is a floor: a generator that it beats has
learned less than counting. One below that range (a looped phrase) is a proof that this scorer's perplexity can be had
cheaply: where it wins, perplexity alone is not to be trusted.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tsdfm_bench.results.rows import CellRows, Row, cells_of, finite, pick

if TYPE_CHECKING:
    import pandas as pd

ENTROPY_MARGIN_NATS = 0.05
REPETITION_MARGIN = 0.1
MAUVE_SEQUENCES = 5000
FEW_SEQUENCES = 32
MEMORISED_MARGIN = 0.01
MEMORISED = ("memorised_13", "near_copies")

FLAGS: Mapping[str, str] = {
    "entropy-low": "entropy below that of real text (intervals apart, gap over 0.05 nats): a lower perplexity is "
    "expected from this alone",
    "entropy-high": "entropy above that of real text (intervals apart, gap over 0.05 nats): closer to noise than text",
    "rep-high": "repeats itself more than real text (intervals apart, gap over a tenth)",
    "rep-low": "repeats itself less than real text (intervals apart, gap over a tenth)",
    "memorised": "shares more with the training text, word for word, than held-out text does (13-grams or near copies; "
    "intervals apart, gap over one in a hundred)",
    "canary": "perplexity no better than that of a zero-parameter canary with the entropy of text (unigram, bigram, "
    "shuffled)",
    "ppl-gamed": "a canary that only repeats itself has a better perplexity: perplexity alone is not to be trusted",
    "legacy-fp32": "drawn in fp32, which acts like a lower temperature at many steps (arXiv 2409.02908)",
    "mauve-n": f"MAUVE from fewer than {MAUVE_SEQUENCES} sequences: biased, comparable only within this table",
    "mixed-n": "made from another number of sequences than most rows",
    "few": f"fewer than {FEW_SEQUENCES} sequences: intervals are too narrow",
    "scorer-missing": "has no score from a scorer that was asked for",
    "scorer-seen": "the scorer may have been trained on this very text: real text scores too well under it, and "
    "generators look worse beside it",
    "no-real": "no held-out real text of the same task and length to compare with",
    "mixed-length": "the summary holds several lengths of this task: entropy and perplexity depend on length and are "
    "compared within one length only",
}

GROUP = ("task", "tokenizer", "data_hash", "length", "prefix")


@dataclass(frozen=True)
class Flag:
    """One flag on one cell.

    Args:
        cell: id of the cell.
        code: a key of `FLAGS`.
        detail: the numbers behind it.
        scorer: the scorer it concerns, or "".
    """

    cell: str
    code: str
    detail: str = ""
    scorer: str = ""


def _ends(row: Row) -> tuple[float, float]:
    low, high = row["low"], row["high"]
    return (low, high) if finite(low) and finite(high) else (row["value"], row["value"])


def outside(row: Row, real: Row, margin: float) -> int:
    """-1 if the row is below the range of the real row, 1 if above, else 0 (see the module's text)."""
    (low, high), (real_low, real_high) = _ends(row), _ends(real)
    gap = row["value"] - real["value"]
    if abs(gap) <= margin:
        return 0
    if high < real_low:
        return -1
    return 1 if low > real_high else 0


def find_flags(summary: pd.DataFrame) -> list[Flag]:
    """Every flag of a summary, cell by cell in the order of the summary.

    Args:
        summary: see `tsdfm_bench.results.schema`; only rows that are done are looked at.
    """
    groups: dict[tuple[Any, ...], list[CellRows]] = defaultdict(list)
    lengths: dict[str, set[int]] = defaultdict(set)
    for cell in cells_of(summary[summary["state"] == "done"]):
        groups[tuple(cell.first[name] for name in GROUP)].append(cell)
        if cell.first["length"] is not None:
            lengths[cell.first["task"]].add(cell.first["length"])
    found: list[Flag] = []
    for cells in groups.values():
        found += _group_flags(cells)
        found += [Flag(c.id, "mixed-length") for c in cells if len(lengths[c.first["task"]]) > 1]
    order = {cell: i for i, cell in enumerate(dict.fromkeys(summary["cell"]))}
    return sorted(found, key=lambda flag: (order[flag.cell], list(FLAGS).index(flag.code)))


def _group_flags(cells: list[CellRows]) -> list[Flag]:
    real = next((cell for cell in cells if cell.is_real), None)
    metrics = {metric for cell in cells for metric, _ in cell.rows}
    flags: list[Flag] = []
    for cell in cells:
        if cell is real:
            continue
        flags += _range_flags(cell, real, metrics) if real else [Flag(cell.id, "no-real")]
    if real is not None:
        for scorer in sorted(real.scorers):
            why = next(
                (r["scorer_seen"] for (_, name), r in real.rows.items() if name == scorer and r["scorer_seen"]), ""
            )
            if why:
                flags.append(Flag(real.id, "scorer-seen", why, scorer))
    for cell in cells:
        if cell.first["draw"] == "legacy-fp32":
            flags.append(Flag(cell.id, "legacy-fp32"))
        mauve = pick(metrics, "mauve")
        counts = [row["n"] for scorer in cell.judges(mauve) if (row := cell.of(mauve, scorer)) and row["n"] is not None]
        if counts and min(counts) < MAUVE_SEQUENCES:
            flags.append(Flag(cell.id, "mauve-n", f"n = {min(counts)}"))
    return flags + _canary_flags(cells, real, metrics) + _count_flags(cells)


def _range_flags(cell: CellRows, real: CellRows, metrics: set[str]) -> list[Flag]:
    flags = []
    for role, codes in (
        ("entropy", ("entropy-low", "entropy-high")),
        ("repetition", ("rep-low", "rep-high")),
        ("distinct", ("rep-high", "rep-low")),  # fewer distinct n-grams are more repetition
    ):
        name = pick(metrics, role)
        row, reference = cell.of(name), real.of(name)
        if row is None or reference is None:
            continue
        margin = ENTROPY_MARGIN_NATS if role == "entropy" else REPETITION_MARGIN * abs(reference["value"])
        side = outside(row, reference, margin)
        if side:
            detail = f"{name} {row['value']:.4g}, real text {reference['value']:.4g}"
            flags.append(Flag(cell.id, codes[0] if side < 0 else codes[1], detail))
    for name in MEMORISED:
        row, reference = cell.of(name), real.of(name)
        if row is not None and reference is not None and outside(row, reference, MEMORISED_MARGIN) > 0:
            detail = f"{name} {row['value']:.4g}, real text {reference['value']:.4g}"
            flags.append(Flag(cell.id, "memorised", detail))
    merged = {flag.code: flag for flag in reversed(flags)}  # repetition before distinct-n where both say the same
    return [merged[code] for code in dict.fromkeys(flag.code for flag in flags)]


def _canary_flags(cells: list[CellRows], real: CellRows | None, metrics: set[str]) -> list[Flag]:
    ppl, entropy = pick(metrics, "perplexity"), pick(metrics, "entropy")
    scorers = sorted({scorer for cell in cells for metric, scorer in cell.rows if metric == ppl})
    canaries = [c for c in cells if c.first["kind"] == "reference" and c is not real]
    floors: list[CellRows] = []
    degenerate: list[CellRows] = []
    for canary in canaries:
        row, reference = canary.of(entropy), real.of(entropy) if real else None
        if row is None or reference is None:  # whether it has the entropy of text is not known
            continue
        (degenerate if outside(row, reference, ENTROPY_MARGIN_NATS) < 0 else floors).append(canary)
    flags = []
    for cell in cells:
        if cell in canaries:
            continue
        for scorer in scorers:
            row = cell.of(ppl, scorer)
            if row is None:
                continue
            for code, group in (("canary", floors), ("ppl-gamed", degenerate)):
                better = [
                    f"{c.first['method']} {other['value']:.4g}"
                    for c in group
                    if (other := c.of(ppl, scorer)) is not None and other["value"] <= row["value"]
                ]
                if better:
                    detail = f"{scorer or ppl}: {row['value']:.4g} against {', '.join(better)}"
                    flags.append(Flag(cell.id, code, detail, scorer))
    return flags


def _count_flags(cells: list[CellRows]) -> list[Flag]:
    flags = []
    known = Counter(cell.n for cell in cells if cell.n is not None)
    usual = max(known, key=lambda n: (known[n], n)) if known else None
    scorers = {scorer for cell in cells for _, scorer in cell.rows if scorer}
    for cell in cells:
        n = cell.n
        if n is not None and n != usual:
            flags.append(Flag(cell.id, "mixed-n", f"n = {n}, most rows {usual}"))
        if n is not None and n < FEW_SEQUENCES:
            flags.append(Flag(cell.id, "few", f"n = {n}"))
        flags += [Flag(cell.id, "scorer-missing", scorer, scorer) for scorer in sorted(scorers - cell.scorers)]
    return flags


def with_flags(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary with its `flags` column filled: codes of the cell, those of one scorer only on that scorer's rows."""
    cells: dict[str, list[Flag]] = defaultdict(list)
    for flag in find_flags(summary):
        cells[flag.cell].append(flag)

    def codes(cell: str, scorer: str) -> str:
        mine = [f.code for f in cells.get(cell, []) if f.scorer in ("", scorer) or f.code == "scorer-missing"]
        return " ".join(dict.fromkeys(mine))

    pairs = zip(summary["cell"], summary["scorer"], strict=True)
    return summary.assign(flags=[codes(cell, scorer) for cell, scorer in pairs])
