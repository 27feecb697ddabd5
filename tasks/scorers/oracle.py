"""The scorer `oracle`: exact NLLs from the law of a synthetic task, on the task's ids, with no scorer's taste in them.

A sequence that is impossible under the law (a bracket that does not match) has no finite NLL: it gets no unit, means
over units leave it out, and the metric `exact` says how many there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tsdfm_bench.api import ExactLaw, ScoreBatch, ScorerInfo, Task
from tsdfm_bench.errors import UsageError
from tsdfm_bench.tasks.options import read_options

if TYPE_CHECKING:
    from torch import nn

NEEDS_A_TASK = "the scorer 'oracle' judges by the exact law of a task; choose --task markov, hmm, grammar or product"


class OracleScorer:
    """Exact token NLLs of a synthetic task; it has no options.

    Args:
        law: of the task.
        revision: its hash.
    """

    def __init__(self, law: ExactLaw, revision: str) -> None:
        self.law = law
        self.info = ScorerInfo(
            name="oracle",
            title=f"the exact law of task {law.name}",
            revision=revision,
            unit="token",
            dtype="float64",
            window=0,
            stride=0,
            input="ids",
        )

    @classmethod
    def load(cls, params: Mapping[str, object], device: str) -> OracleScorer:
        """There is nothing to load without a task; see `of_task`."""
        raise UsageError(NEEDS_A_TASK)

    @classmethod
    def of_task(cls, task: Task, params: Mapping[str, object], device: str) -> OracleScorer:
        """The scorer of a task; raises UsageError if the task has no exact law."""
        read_options("scorer 'oracle'", params, {})
        law: Any = getattr(task, "law", None)
        if law is None or not task.info.law:
            raise UsageError(f"task '{task.info.name}' has no exact law: {NEEDS_A_TASK}")
        return cls(law, task.info.law)

    def networks(self) -> Mapping[str, nn.Module]:
        """None: a law is no network."""
        return {}

    def score(self, texts: Sequence[np.ndarray]) -> ScoreBatch:
        """NLL in nats of every token of n id sequences, (length,) int64 each; none of an impossible sequence."""
        nll, units = [np.empty(0)] * len(texts), [np.empty(0, dtype=np.int64)] * len(texts)
        for length in {len(text) for text in texts} - {0}:
            rows = [i for i, text in enumerate(texts) if len(text) == length]
            found = self.law.token_nll(np.stack([texts[i] for i in rows]))
            for i, values in zip(rows, found, strict=True):
                if np.isfinite(values).all():
                    nll[i], units[i] = values, np.asarray(texts[i], dtype=np.int64)
        special = [np.zeros(len(values), dtype=bool) for values in nll]
        spans = [np.arange(len(values))[:, None] + np.arange(2) for values in nll]
        return ScoreBatch(nll, units, special, np.zeros(len(texts), dtype=np.int64), spans=spans)
