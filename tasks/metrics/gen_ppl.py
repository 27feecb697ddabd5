"""Generative perplexity and bits per byte: reductions of stored token NLLs.

The literature computes "generative perplexity" in several ways that differ by many percent on the same samples: which
tokens count, and whether the mean is taken before or after the exponential. All are reductions of the same NLLs, so
each is offered under its name:

    convention           counted units                                       aggregation
    pooled (default)     all                                                 exp(sum of NLL / number of units)
    mean-of-sequences    all                                                 mean over sequences of exp(mean NLL)
    mdlm                 not the first of a text; no end-of-text but         exp(sum / number)
                         the first one of the text
    sedd                 all                                                 mean of exp(mean NLL)
    sdtt                 all                                                 exp(mean over sequences of mean NLL)
    bd3                  all but end-of-text                                 mean of exp(mean NLL)
    flow-matching        not the first of a text (alias: tsdfm)              mean of exp(mean NLL)

They are used here on our own NLLs: text re-tokenised by the scorer, one context token before it, the scorer's own
window. The original protocols also differ in these, as the definition that goes with every number says: SEDD's code
gives its scorer no context token, so there a sequence's first token has no NLL, and "all" are those after it.
Sequences without a counted unit are left out of the means of per-sequence values.

Perplexities per token of scorers with different tokenizers cannot be compared; bits per byte can.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tsdfm_bench.api import CellData, Measurement, MetricInfo, ScoreBatch, ScorerInfo
from tsdfm_bench.errors import unknown_name
from tsdfm_bench.tasks.options import read_options

Counted = Callable[[np.ndarray], np.ndarray]


def count_all(special: np.ndarray) -> np.ndarray:
    """Every unit."""
    return np.ones(special.shape, dtype=bool)


def count_not_first(special: np.ndarray) -> np.ndarray:
    """Every unit but the first of the text."""
    counted = np.ones(special.shape, dtype=bool)
    counted[:1] = False
    return counted


def count_no_end(special: np.ndarray) -> np.ndarray:
    """Every unit but end-of-text."""
    return ~special


def count_mdlm(special: np.ndarray) -> np.ndarray:
    """Units that are not end-of-text, and the first end-of-text; never the first unit of the text.

    A text that begins with end-of-text has its first one there, so no later one counts.
    """
    counted = ~special
    counted[np.flatnonzero(special)[:1]] = True
    counted[:1] = False
    return counted


def _quotient(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """total / count, nan without a warning where nothing counts: the measurement's `reason` says so."""
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient: np.ndarray = total / count
    return quotient


def pooled(nll: np.ndarray, count: np.ndarray) -> np.ndarray:
    """exp(sum of NLL / number of units)."""
    return np.exp(_quotient(nll.sum(-1), count.sum(-1)))


def mean_of_perplexities(nll: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Mean over sequences of exp(NLL / count), over those with count > 0."""
    each = np.where(count > 0, np.exp(nll / np.maximum(count, 1)), 0.0)
    return _quotient(each.sum(-1), (count > 0).sum(-1))


def exp_of_mean(nll: np.ndarray, count: np.ndarray) -> np.ndarray:
    """exp(mean over sequences of NLL / count), over those with count > 0."""
    each = np.where(count > 0, nll / np.maximum(count, 1), 0.0)
    return np.exp(_quotient(each.sum(-1), (count > 0).sum(-1)))


_FORMS: Mapping[Callable[..., np.ndarray], str] = {
    pooled: "exp-ratio",
    mean_of_perplexities: "mean-exp-ratio",
    exp_of_mean: "exp-mean-ratio",
}


@dataclass(frozen=True)
class Convention:
    """Which units count, and how they are reduced.

    Args:
        counted: bool array of counted units from the bool array of end-of-text units.
        statistic: from per-sequence sums of NLL and counts, (..., n) each, to the value (...).
        text: what the two are, for the definition.
    """

    counted: Counted
    statistic: Callable[..., np.ndarray]
    text: str

    @property
    def form(self) -> str:
        """The name of the reduction, see `Measurement.form`."""
        return _FORMS[self.statistic]


CONVENTIONS: Mapping[str, Convention] = {
    "pooled": Convention(count_all, pooled, "exp(sum of NLL / number of units), all units"),
    "mean-of-sequences": Convention(count_all, mean_of_perplexities, "mean over sequences of exp(mean NLL), all units"),
    "mdlm": Convention(
        count_mdlm,
        pooled,
        "as MDLM counts: exp(sum / number) over all units but the first of each text and any end-of-text after the "
        "first",
    ),
    "sedd": Convention(count_all, mean_of_perplexities, "as SEDD counts: mean of exp(mean NLL), all units"),
    "sdtt": Convention(count_all, exp_of_mean, "as SDTT counts: exp(mean over sequences of mean NLL), all units"),
    "bd3": Convention(
        count_no_end, mean_of_perplexities, "as BD3-LM counts: mean of exp(mean NLL), all units but end-of-text"
    ),
    "flow-matching": Convention(
        count_not_first,
        mean_of_perplexities,
        "as flow_matching and FS-DFM count (preset tsdfm): mean of exp(mean NLL), all units but the first, no "
        "sequence dropped",
    ),
}
ALIASES = {"tsdfm": "flow-matching"}
DEFAULT = "pooled"


def sums(scores: ScoreBatch, counted: Counted) -> tuple[np.ndarray, np.ndarray]:
    """Per-sequence sum of NLL in nats and number of counted units, (n,) float64 each."""
    masks = [counted(np.asarray(special, dtype=bool)) for special in scores.special]
    totals = [float(np.sum(nll[mask], dtype=np.float64)) for nll, mask in zip(scores.nll, masks, strict=True)]
    return np.asarray(totals, dtype=np.float64), np.asarray([int(mask.sum()) for mask in masks], dtype=np.float64)


def how_scored(info: ScorerInfo) -> str:
    """The part of a definition that names scorer, units, window and context."""
    window = f", window {info.window} stride {info.stride}" if info.window else ""
    context = f", {info.context} before the text" if info.context else ""
    text = "text re-tokenised" if info.input == "text" and info.unit == "token" else info.input
    text = "the task's own tokens" if info.input == "ids" else text
    return f"{info.title}, {info.dtype}, per {info.unit}, {text}{window}{context}; interval over sequences"


class GenPPL:
    """The metric `gen-ppl`: `gen_ppl` (pooled) and `gen_ppl/CONVENTION` for each scorer.

    Option `conventions`: names joined by "+", or "all" (default).
    """

    info: ClassVar[MetricInfo] = MetricInfo(
        name="gen-ppl",
        description="generative perplexity of each scorer, pooled and under every published convention",
        needs=frozenset({"scores"}),
        citation="arXiv:2409.02908",
    )

    def __init__(self, conventions: tuple[str, ...] = tuple(CONVENTIONS)) -> None:
        self.conventions = conventions

    @classmethod
    def load(cls, params: Mapping[str, object]) -> GenPPL:
        """Make the metric; raises UsageError for an unknown convention."""
        asked = read_options("metric 'gen-ppl'", params, {"conventions": ("all",)})["conventions"]
        if asked == ("all",):
            return cls()
        names = [ALIASES.get(name, name) for name in asked]
        for name in names:
            if name not in CONVENTIONS:
                raise unknown_name("gen-ppl convention", name, [*CONVENTIONS, *ALIASES, "all"])
        return cls(tuple(dict.fromkeys(names)))

    def compute(self, cell: CellData) -> list[Measurement]:
        """One measurement per scorer and convention."""
        found = []
        for scorer, scores in cell.scores.items():
            counts: dict[Counted, tuple[np.ndarray, np.ndarray]] = {}  # several conventions count the same units
            for name in self.conventions:
                how = CONVENTIONS[name]
                if how.counted not in counts:
                    counts[how.counted] = sums(scores, how.counted)
                columns = counts[how.counted]
                found.append(
                    Measurement(
                        metric="gen_ppl" if name == DEFAULT else f"gen_ppl/{name}",
                        unit="perplexity",
                        definition=f"generative perplexity, {how.text}; {how_scored(cell.scorer_info[scorer])}",
                        scorer=scorer,
                        columns=columns,
                        statistic=how.statistic,
                        form=how.form,
                        better="lower",
                        reason="" if columns[1].any() else "no unit counts: every text is empty or ends at once",
                    )
                )
        return found


def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """sum of a / sum of b."""
    return _quotient(a.sum(-1), b.sum(-1))


class BitsPerByte:
    """The metric `bits-per-byte`: what scorers with different tokenizers can be compared in."""

    info: ClassVar[MetricInfo] = MetricInfo(
        name="bits-per-byte",
        description="bits per UTF-8 byte of the generated text under each scorer",
        needs=frozenset({"scores"}),
    )

    @classmethod
    def load(cls, params: Mapping[str, object]) -> BitsPerByte:
        """Make the metric; it has no options."""
        read_options("metric 'bits-per-byte'", params, {})
        return cls()

    def compute(self, cell: CellData) -> list[Measurement]:
        """One measurement per scorer that reads text (ids have no bytes)."""
        return [
            Measurement(
                metric="bits_per_byte",
                unit="bits/byte",
                definition="sum of NLL / (ln 2 x UTF-8 bytes), all units, an end-of-text marker counted as one byte; "
                + how_scored(cell.scorer_info[scorer]),
                scorer=scorer,
                columns=(sums(scores, count_all)[0] / np.log(2.0), np.asarray(scores.bytes, dtype=np.float64)),
                statistic=ratio,
                form="ratio",
                better="lower",
                reason="" if np.any(scores.bytes) else "every text is empty",
            )
            for scorer, scores in cell.scores.items()
            if cell.scorer_info[scorer].input != "ids"
        ]
