"""Counting and timing: what a batch of samples costs, measured from outside the method.

Forward hooks on every network a method shows count its calls and the rows (sequences) that went through it, so the
requested number of steps is never reported as the number of calls. Seconds are wall-clock with the device synchronised
before and after. Peak memory is that of the device during the batch or, on a CPU, of the process: Linux lets a process
reset its own high-water mark (`/proc/self/clear_refs`); where that is not possible it is the peak of the whole process
so far.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdfm_bench.api import CostRecord, plain
from tsdfm_bench.errors import PluginError

if TYPE_CHECKING:
    from torch import nn


@dataclass
class BatchCost:
    """What one batch cost.

    Args:
        sequences: in the batch.
        calls: role -> forward calls.
        rows: role -> rows that went through the network, over all calls.
        seconds: wall-clock, device synchronised.
        peak_memory_bytes: see the module.
        device, threads: where it was measured.
        pieces: in how many parts it was sampled, because memory did not hold the whole batch.
    """

    sequences: int
    calls: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    device: str = "cpu"
    threads: int = 1
    pieces: int = 1

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


class Meter:
    """Counts the forward calls of some networks.

    Args:
        networks: role -> module.
        device: where they run.

    Raises:
        PluginError: `networks` is not a mapping of modules.
    """

    def __init__(self, networks: Mapping[str, nn.Module], device: str = "cpu") -> None:
        from torch import nn

        if not isinstance(networks, Mapping) or not all(isinstance(n, nn.Module) for n in networks.values()):
            raise PluginError("networks() must return a mapping of role -> torch.nn.Module")
        self.networks = {str(role): network for role, network in networks.items()}
        self.device = device

    @contextmanager
    def measure(self, sequences: int, tick: Callable[[], None] | None = None) -> Iterator[BatchCost]:
        """Count and time what happens inside; the cost is complete when the block ends.

        Args:
            sequences: how many are made.
            tick: called after every call of the first network, for progress.
        """
        import torch

        cost = BatchCost(sequences, device=measured_on(self.device), threads=torch.get_num_threads())
        cost.calls = dict.fromkeys(self.networks, 0)
        cost.rows = dict.fromkeys(self.networks, 0)
        handles = [
            network.register_forward_hook(_hook(cost, role, None if i else tick), with_kwargs=True)
            for i, (role, network) in enumerate(self.networks.items())
        ]
        _synchronise(self.device)
        _reset_peak(self.device)
        started = time.perf_counter()
        try:
            yield cost
            _synchronise(self.device)
            cost.seconds = time.perf_counter() - started
            cost.peak_memory_bytes = _peak(self.device)
        finally:
            for handle in handles:
                handle.remove()


def _hook(cost: BatchCost, role: str, tick: Callable[[], None] | None) -> Any:
    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cost.calls[role] += 1
        cost.rows[role] += _leading_size([*args, *kwargs.values()])
        if tick is not None:
            tick()

    return count


def _leading_size(values: Iterable[Any]) -> int:
    """Length of the first axis of the first tensor that has one, else 1."""
    for value in values:
        shape = getattr(value, "shape", None)
        if shape is not None and len(shape):
            return int(shape[0])
    return 1


def total(costs: Iterable[BatchCost], batch_size: int) -> CostRecord | None:
    """The cost of a cell from its batches; None if there are none."""
    costs = list(costs)
    sequences = sum(cost.sequences for cost in costs)
    if not sequences:
        return None
    roles = list(dict.fromkeys(role for cost in costs for role in cost.calls))
    pieces = max(cost.pieces for cost in costs)
    device = ", ".join(dict.fromkeys(cost.device for cost in costs))
    if pieces > 1:
        device += f" ({-(-batch_size // pieces)} of {batch_size} sequences at a time: memory)"
    parts = sum(cost.pieces for cost in costs)
    return CostRecord(
        sequences=sequences,
        calls={role: sum(c.calls.get(role, 0) for c in costs) / parts for role in roles},
        sequence_calls={role: sum(c.rows.get(role, 0) for c in costs) / sequences for role in roles},
        seconds=sum(cost.seconds for cost in costs),
        peak_memory_bytes=max(cost.peak_memory_bytes for cost in costs),
        batch_size=-(-batch_size // pieces),
        device=device,
        threads=max(cost.threads for cost in costs),
    )


# ------------------------------------------------------------------------------------------------------ device


def choose_device(wanted: str = "auto") -> str:
    """A torch device string; "auto" takes a GPU if there is one."""
    import torch

    from tsdfm_bench.errors import UsageError

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0]
        raise UsageError(f"device '{wanted}' cannot be used ({first}); leave --device out, or say cpu") from None
    return str(device)


def device_name(device: str) -> str:
    """What the device is called: the GPU's name, or "cpu"."""
    if device.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name(torch.device(device)))
    return device


def measured_on(device: str) -> str:
    """`device_name`, and whether optimisations are left out: what seconds belong to."""
    return device_name(device) + (" (optimisations off)" if plain() else "")


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
    elif device.startswith("mps"):
        import torch

        torch.mps.synchronize()


def _reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak(device: str) -> int:
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024
