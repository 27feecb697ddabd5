"""Training without bf16."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState

from tsdfm_bench.methods.train import trainer as trainer_module


@pytest.fixture
def in_fp32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Training without bf16, whose rounding would hide a wrong weight; accelerate decides once per process."""
    monkeypatch.setattr(trainer_module, "mixed_precision", lambda device: "no")
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()
