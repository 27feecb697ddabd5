"""Pieces that numbers are worked on in."""

from __future__ import annotations

import pytest
import torch

from tsdfm_bench.methods.core.kernel import pieces


@pytest.mark.parametrize("device", [None, torch.device("cpu"), torch.device("cuda")])
@pytest.mark.parametrize(("count", "width"), [(0, 5), (1, 5), (1000, 50_257), (7, 1 << 26)])
def test_pieces_cover_every_row_once(count: int, width: int, device: torch.device | None) -> None:
    rows = [row for s in pieces(count, width, device=device) for row in range(count)[s]]
    assert rows == list(range(count))


def test_an_accelerator_is_given_more_at_once() -> None:
    """Twenty rows of GPT-2's vocabulary fit a processor's cache; a step of so many launches does nothing else."""
    sizes = {kind: len(list(pieces(16_384, 50_257, device=torch.device(kind)))) for kind in ("cpu", "cuda")}
    assert sizes["cpu"] > 500
    assert sizes["cuda"] < 30
