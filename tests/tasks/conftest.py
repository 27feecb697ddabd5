"""A private cache and no network for every test of tasks."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tsdfm_bench.api import CellData, CostRecord, ScoreBatch, ScorerInfo


@pytest.fixture(autouse=True, scope="session")
def private_cache(tmp_path_factory):
    """The session's cache folder; files that tests obtain never reach the user's."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("TSDFM_BENCH_CACHE", str(folder))
        patch.setenv("TSDFM_BENCH_OFFLINE", "1")
        yield folder


def scorer_info(name: str = "s", parameters: int = 1, features: str = "") -> ScorerInfo:
    return ScorerInfo(
        name=name,
        title=f"Title of {name}",
        revision="sha256:0",
        unit="token",
        dtype="float32",
        window=8,
        stride=4,
        context="<s>",
        parameters=parameters,
        features=features,
    )


def score_batch(nll, special=None, size=None, features=None) -> ScoreBatch:
    nll = [np.asarray(row, dtype=np.float32) for row in nll]
    special = special or [[False] * len(row) for row in nll]
    return ScoreBatch(
        nll=nll,
        units=[np.arange(len(row)) for row in nll],
        special=[np.asarray(row, dtype=bool) for row in special],
        bytes=np.asarray([len(row) for row in nll] if size is None else size),
        features=features,
    )


def cell_data(
    tokens, lengths=None, scores=None, infos=None, reference=None, other=None, cost: CostRecord | None = None
) -> CellData:
    tokens = np.asarray(tokens, dtype=np.int32)
    lengths = np.full(len(tokens), tokens.shape[1]) if lengths is None else np.asarray(lengths)
    scores = scores or {}
    return CellData(
        tokens=tokens,
        lengths=lengths,
        texts=[""] * len(tokens),
        vocab_size=100,
        scores=scores,
        scorer_info=infos or {name: scorer_info(name) for name in scores},
        reference=reference,
        reference_other=other,
        cost=cost,
    )


@pytest.fixture(scope="session")
def make():
    """Builders of records: make.info, make.scores, make.cell."""
    return SimpleNamespace(info=scorer_info, scores=score_batch, cell=cell_data)
