"""Peak memory: foretold as `plan` does, and measured in processes of their own; what a large size needs.

    python tests/benchmarks/memory.py plan    [METHOD ...]    # sotu, and V = 50,258, L = 1,024, batch 2
    python tests/benchmarks/memory.py large   [METHOD ...]    # V = 128,000, L = 4,096, batch 1
    python tests/benchmarks/memory.py scoring [SCORER ...]    # texts of sotu

Networks have random weights, 2 blocks of width 64 (at sotu its own size). On a CPU the peak is that of the process.
Scoring is foretold from a few real texts and measured on 256 of the canary `unigram`, which have more scorer tokens.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch

from tsdfm_bench.api import SampleRequest
from tsdfm_bench.estimate import Estimator
from tsdfm_bench.meter import Meter
from tsdfm_bench.plan import Cell, PlannedCell
from tsdfm_bench.registry import Registry
from tsdfm_bench.results.store import RunFolder
from tsdfm_bench.rng import Streams
from tsdfm_bench.scoring import CPU_TEXTS
from tsdfm_bench.speed.cases import SMALL_NETWORK, Case, Size, load_method

NARROW = {"width": 64, "blocks": 2, "heads": 2, "condition": 32}
SIZES = {
    "sotu": (Size("sotu", 2048, 64, SMALL_NETWORK), 8),
    "wide vocabulary": (Size("wide", 50_258, 1024, NARROW), 2),
    "large": (Size("large", 128_000, 4096, NARROW), 1),
}
CASES = {
    "mdlm": Case("mdlm", {"source": "mask"}),
    "dfm": Case("dfm", {"source": "uniform"}),
    "tsdfm": Case("tsdfm", {"source": "uniform"}),
    "sedd-mask": Case("sedd", {"source": "mask"}),
    "sedd-uniform": Case("sedd", {"source": "uniform"}),
    "ar": Case("ar"),
}
STEPS = (4, 64)
SCORERS = ("char-rnn", "smollm2")
TEXTS = 256
FORETOLD = ("sotu", "wide vocabulary")
LIMIT_S = 600


def peak(name: str, size: str, steps: int | None) -> None:
    """Print the peak bytes of one run in this process."""
    torch.set_num_threads(1)
    case, (geometry, batch) = CASES[name], SIZES[size]
    method = load_method(Registry(), case, geometry, "cpu")
    with torch.no_grad(), Meter(method.networks(), "cpu").measure(batch) as cost:
        method.sample(SampleRequest(Streams.of(0, "memory", batch), geometry.length, steps, source=case.source))
    print(json.dumps({"bytes": cost.peak_memory_bytes, "seconds": cost.seconds}), flush=True)


def foretold(name: str, size: str, steps: list[int | None]) -> None:
    """Print the peak bytes that `plan` foretells of cells with so many steps."""
    torch.set_num_threads(1)
    case, (geometry, batch) = CASES[name], SIZES[size]
    loaded = SimpleNamespace(load=lambda params, device: load_method(Registry(), case, geometry, device))
    registry = SimpleNamespace(load=lambda kind, method: loaded)
    text = {"weights": "none", "task": size, "tokenizer": "none", "data_hash": "none", "length": geometry.length}
    cells = [
        PlannedCell(Cell("method", case.method, {}, **text, steps=count, source=case.source))  # type: ignore[arg-type]
        for count in steps
    ]
    with TemporaryDirectory() as empty:
        job: Any = SimpleNamespace(
            registry=registry, folder=RunFolder(empty), device="cpu", threads=1, batch_size=batch
        )
        rate = Estimator(job, cache=Path(empty)).rate(cells[0], cells)
    for planned in cells if rate else ():
        print(json.dumps({"bytes": rate.peak_at(planned.cell)}), flush=True)


def scoring_peak(name: str, reference: str, count: int) -> None:
    """Print the peak bytes of scoring so many texts of a reference as a run does."""
    torch.set_num_threads(1)
    registry = Registry()
    task = registry.load("tasks", "sotu").load({})
    scorer = registry.load("scorers", name).load({}, "cpu")
    batch = task.reference(reference, Streams.of(0, "memory", count), task.info.length)
    texts = task.decode(batch.tokens.numpy(), batch.lengths.numpy())
    scorer.score(texts[:2])
    with Meter({}, "cpu").measure(count) as cost:
        for begin in range(0, count, CPU_TEXTS):
            scorer.score(texts[begin : begin + CPU_TEXTS])
    print(json.dumps({"bytes": cost.peak_memory_bytes, "seconds": cost.seconds}), flush=True)


def compare_scoring(name: str) -> None:
    """One line: foretold, measured, and their ratio."""
    few, many = (elsewhere("texts", name, kind, n) for kind, n in (("real", CPU_TEXTS), ("unigram", TEXTS)))
    if not (few and many):
        print(f"scoring, {name}: not measured", flush=True)
        return
    told, real = few[0]["bytes"], many[0]["bytes"]
    print(f"scoring, {name}: foretold {told / 1e6:.0f} MB, measured {real / 1e6:.0f} MB, {told / real:.2f}", flush=True)


def elsewhere(*command: object) -> list[dict[str, Any]]:
    """A function of this file in a process of its own; fewer results if it was ended or took too long."""
    words = [sys.executable, __file__, *(word if isinstance(word, str) else json.dumps(word) for word in command)]
    try:
        told = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, check=False).stdout
    except subprocess.TimeoutExpired as error:
        told = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
    return [json.loads(line) for line in told.splitlines() if line.startswith("{")]


def compare(name: str, size: str) -> None:
    """One line for every number of steps: foretold, measured, and their ratio."""
    steps = STEPS if CASES[name].source else [None]
    told = elsewhere("foretold", name, size, steps)
    if not told:
        print(f"{size}, {name}: not measured in {LIMIT_S} s", flush=True)
        return
    for count, expected in zip(steps, told, strict=True):
        real = elsewhere("peak", name, size, count)
        share = f"{expected['bytes'] / real[0]['bytes']:.2f}" if real else ""
        found = f"measured {real[0]['bytes'] / 1e6:.0f} MB, {share}" if real else "not measured"
        what = f"{count} steps" if count else f"{SIZES[size][0].length} tokens"
        print(f"{size}, {name}, {what}: foretold {expected['bytes'] / 1e6:.0f} MB, {found}", flush=True)


def large(name: str) -> None:
    """What one run of the large size needs."""
    found = elsewhere("peak", name, "large", 2 if CASES[name].source else None)
    text = f"{found[0]['bytes'] / 1e9:.1f} GB, {found[0]['seconds']:.0f} s" if found else f"not done in {LIMIT_S} s"
    print(f"V = 128,000, L = 4,096, batch 1, {name}: {text}", flush=True)


if __name__ == "__main__":
    what, *names = sys.argv[1:]
    if what == "peak":
        peak(names[0], names[1], json.loads(names[2]))
    elif what == "foretold":
        foretold(names[0], names[1], json.loads(names[2]))
    elif what == "texts":
        scoring_peak(names[0], names[1], int(names[2]))
    elif what == "scoring":
        for chosen in names or SCORERS:
            compare_scoring(chosen)
    elif what == "large":
        for chosen in names or CASES:
            large(chosen)
    elif what == "plan":
        for chosen in names or CASES:
            for where in FORETOLD:
                compare(chosen, where)
