"""What a compass is examined by: the exact law of a synthetic task, an autoregressive network, or a scorer.

In this order: the task's law; the autoregressive network that the same recipe trained, if it is there; the first scorer
of the task that can be obtained. The judge is loaded when it is first asked.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tsdfm_bench.config import DEFAULT_SCORERS
from tsdfm_bench.errors import AssetError
from tsdfm_bench.spec import parse_spec

if TYPE_CHECKING:
    from tsdfm_bench.api import Task
    from tsdfm_bench.methods.train.command import NamedJudge
    from tsdfm_bench.methods.train.recipe import Recipe
    from tsdfm_bench.registry import Registry


def find_judge(task: Task, recipe: Recipe, folder: Path, registry: Registry) -> NamedJudge:
    """The judge of finished sequences of a task's ids, see the module.

    Args:
        task: loaded.
        recipe: whose stages lie in `folder`.
        folder: of the checkpoints.
        registry: of scorers.
    """
    from tsdfm_bench.methods.train.command import NamedJudge, ar_judge

    if task.info.law:
        scorer = registry.load("scorers", "oracle").of_task(task, {}, "cpu")
        return NamedJudge("the exact law", lambda tokens: _means(scorer.score(list(tokens)).nll))
    found = ar_judge(recipe, folder)
    if found is not None:
        return found
    names = task.info.scorers or DEFAULT_SCORERS
    return NamedJudge(f"{names[0]} (per unit of the scorer)", _Lazy(task, tuple(names), registry))


def judges_of(task: Task, registry: Registry) -> Callable[[str], Callable[[np.ndarray], np.ndarray]]:
    """Spec of a scorer -> judge of finished sequences of a task's ids, loaded when it is first asked."""
    return lambda spec: _Lazy(task, (spec,), registry)


class _Lazy:
    """The first of some scorers that can be obtained."""

    def __init__(self, task: Task, names: tuple[str, ...], registry: Registry) -> None:
        self.task, self.names, self.registry = task, names, registry
        self.scorer: Any = None

    def _load(self) -> Any:
        reasons = []
        for name in self.names:
            spec = parse_spec(name)
            cls: Any = self.registry.load("scorers", spec.name)
            try:
                if hasattr(cls, "fetch"):
                    cls.fetch(spec.params())
                return cls.load(spec.params(), "cpu")
            except AssetError as error:
                reasons.append(str(error))
        raise AssetError("no scorer can examine the compass: " + "; ".join(reasons))

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """(n, length) ids -> (n,) nats per unit of the scorer."""
        self.scorer = self.scorer or self._load()
        if self.scorer.info.input == "ids":
            return _means(self.scorer.score(list(tokens)).nll)
        texts = self.task.decode(tokens, np.full(len(tokens), tokens.shape[1]))
        parts = [self.scorer.score(texts[i : i + 64]).nll for i in range(0, len(texts), 64)]
        return _means([nll for part in parts for nll in part])


def _means(nll: list[np.ndarray]) -> np.ndarray:
    """(n,) mean NLLs; a text with none (impossible, or empty) counts as the worst of the others."""
    means = np.array([float(values.mean()) if len(values) else np.nan for values in nll])
    return np.where(np.isnan(means), np.nanmax(means, initial=0.0), means)
