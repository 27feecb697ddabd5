"""What sampling cost: network calls, seconds, throughput, memory.

Calls are counted by the harness with forward hooks, per network: `calls/ROLE` per batch, `sequence_calls/ROLE` per
sequence (a sampler may send only the sequences that still change through the network). Neither is the number of steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from tsdfm_bench.api import CellData, Measurement, MetricInfo
from tsdfm_bench.tasks.options import read_options


class Cost:
    """The metric `cost`."""

    info: ClassVar[MetricInfo] = MetricInfo(
        name="cost",
        description="network calls by role, seconds, sequences per second, peak memory",
        needs=frozenset({"cost"}),
    )

    @classmethod
    def load(cls, params: Mapping[str, object]) -> Cost:
        """Make the metric; it has no options."""
        read_options("metric 'cost'", params, {})
        return cls()

    def compute(self, cell: CellData) -> list[Measurement]:
        """Measurements of a sampled cell; none for a reference row."""
        cost = cell.cost
        if cost is None:
            return []
        place = f"{cost.device}, {cost.threads} CPU threads, batches of {cost.batch_size}"
        found = [
            Measurement(
                f"calls/{role}",
                "calls",
                f"forward calls of the {role} per batch of {cost.batch_size}, counted by hooks, mean over batches",
                value=calls,
                n=cost.sequences,
                better="lower",
            )
            for role, calls in cost.calls.items()
        ]
        found += [
            Measurement(
                f"sequence_calls/{role}",
                "calls",
                f"rows that went through the {role} / sequences, counted by hooks",
                value=calls,
                n=cost.sequences,
                better="lower",
            )
            for role, calls in cost.sequence_calls.items()
        ]
        found.append(
            Measurement(
                "seconds",
                "s",
                f"wall-clock seconds of sampling {cost.sequences} sequences, warm-up excluded; {place}",
                value=cost.seconds,
                n=cost.sequences,
                better="lower",
            )
        )
        if cost.seconds > 0:
            found.append(
                Measurement(
                    "sequences_per_second",
                    "1/s",
                    f"sequences / wall-clock seconds of sampling, warm-up excluded; {place}",
                    value=cost.sequences / cost.seconds,
                    n=cost.sequences,
                    better="higher",
                )
            )
        found.append(
            Measurement(
                "peak_memory_bytes",
                "bytes",
                f"peak device memory of sampling, or resident memory of the process on a CPU; {place}",
                value=float(cost.peak_memory_bytes),
                n=cost.sequences,
                better="lower",
            )
        )
        return found
