"""How much a sampling run costs beyond its network calls, and how memory grows: ratios measured in one process.

    python tests/benchmarks/sampling_overhead.py [--batch 128] [--steps 1024] [--methods dfm,mdlm] [--json]

For each method the run is timed as a whole; its network calls are recorded and made again, bare, on the same inputs.
The ratio of the two is the overhead (draws, bookkeeping, Python). The largest tensor allocated outside the network is
compared with batch x length x vocabulary in fp64. Numbers depend on the machine; the ratios hardly do. Not a test.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from tsdfm_bench.api import Method, SampleRequest
from tsdfm_bench.registry import Registry
from tsdfm_bench.rng import Streams

CASES: list[tuple[str, dict[str, str]]] = [
    ("dfm", {"source": "uniform", "solver": "euler"}),
    ("dfm", {"source": "mask", "solver": "exact"}),
    ("fsdfm", {"source": "uniform"}),
    ("tsdfm", {"source": "uniform"}),
    ("tsdfm", {"source": "mask"}),
    ("mdlm", {"source": "mask", "sampler": "cached"}),
    ("mdlm", {"source": "mask", "sampler": "ancestral"}),
    ("mdlm", {"source": "mask", "sampler": "first-hitting"}),
    ("sedd", {"source": "mask", "sampler": "analytic"}),
    ("sedd", {"source": "uniform", "sampler": "analytic"}),
    ("ar", {}),
]


class LargestTensor(TorchDispatchMode):
    """Remembers the largest fp64 tensor any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, torch.Tensor) and item.dtype == torch.float64:
                self.bytes = max(self.bytes, item.numel() * 8)
        return result


def measure(method: Method, request: SampleRequest, vocab_size: int) -> dict[str, float]:
    """Seconds, calls and the overhead ratio of one request."""
    network = next(iter(method.networks().values()))
    calls: list[tuple[Any, Any]] = []
    handle = network.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with LargestTensor() as largest:
        method.sample(request)
    handle.remove()
    rows = sum(args[0].shape[0] for args, _ in calls)

    def run() -> float:
        begun = time.perf_counter()
        method.sample(request)
        return time.perf_counter() - begun

    def bare() -> float:
        for args, _ in calls:
            for value in args[1:]:
                if hasattr(value, "length"):
                    value.length = 0  # a KV cache is filled again from the start
        begun = time.perf_counter()
        with torch.inference_mode():
            for args, kwargs in calls:
                network(*args, **kwargs)
        return time.perf_counter() - begun

    whole, plain = min(run(), run()), min(bare(), bare())
    dense = request.batch * request.length * vocab_size * 8
    return {
        "calls": len(calls),
        "calls_per_sequence": rows / request.batch,
        "seconds": whole,
        "bare_seconds": plain,
        "overhead": whole / plain,
        "largest_fp64_share": largest.bytes / dense,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1024)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--methods", default="")
    parser.add_argument("--checkpoint", default=None)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    wanted = {name for name in options.methods.split(",") if name}
    results = []
    for name, params in CASES:
        if wanted and name not in wanted:
            continue
        given = {
            "task": "sotu",
            "vocab_size": 2048,
            "length": options.length,
            "checkpoint": options.checkpoint,
            **params,
        }
        method = Registry().load("methods", name).load(given, "cpu")
        request = SampleRequest(
            Streams.of(0, "overhead", options.batch),
            options.length,
            None if name == "ar" else options.steps,
            source=params.get("source"),
        )
        label = name + (f"[{', '.join(f'{k}={v}' for k, v in params.items())}]" if params else "")
        results.append({"method": label, **measure(method, request, 2048)})
    if options.json:
        print(json.dumps(results, indent=1))
        return
    table = Table("method", "calls", "calls/sequence", "seconds", "bare", "overhead", "largest fp64 tensor")
    for row in results:
        table.add_row(
            row["method"],
            f"{row['calls']:,.0f}",
            f"{row['calls_per_sequence']:.1f}",
            f"{row['seconds']:.2f}",
            f"{row['bare_seconds']:.2f}",
            f"{row['overhead']:.3f}",
            f"{row['largest_fp64_share']:.1%} of batch x length x V",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
