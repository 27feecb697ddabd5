"""The fakes with a method that writes down when it begins and ends a batch, and in which process."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path

from tsdfm_bench.api import SampleBatch, SampleRequest

_spec = importlib.util.spec_from_file_location("steady_fakes", Path(__file__).parent.parent / "fakes.py")
assert _spec is not None
assert _spec.loader is not None
fakes = importlib.util.module_from_spec(_spec)
sys.modules["steady_fakes"] = fakes
_spec.loader.exec_module(fakes)


class Steady(fakes.Counter):  # type: ignore[name-defined,misc]
    """Logs `begin KEY FIRST PID` and `end KEY FIRST PID`."""

    def sample(self, request: SampleRequest) -> SampleBatch:
        what = f"{request.streams.key} {int(request.streams.sequences[0])} x{request.batch} {os.getpid()}"
        fakes.log(f"begin {what} {time.monotonic():.6f}")
        batch: SampleBatch = super().sample(request)
        fakes.log(f"end {what} {time.monotonic():.6f}")
        return batch


METHODS = {**fakes.METHODS, "counter": Steady}
TASKS, SCORERS, METRICS = fakes.TASKS, fakes.SCORERS, fakes.METRICS
