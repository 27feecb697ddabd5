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
from types import SimpleNamespace
from typing import Any

import torch

from tsdfm_bench.api import SampleRequest
from tsdfm_bench.estimate import MEMORY, TIMED_STEPS, TIMED_TOKENS, Rate
from tsdfm_bench.meter import Meter
from tsdfm_bench.registry import Registry
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


def peaks(name: str, size: str, runs: list[int]) -> None:
    """Print the peak bytes of each of some runs in this process, one after another: numbers of steps, or of tokens."""
    torch.set_num_threads(1)
    case, (geometry, batch) = CASES[name], SIZES[size]
    method = load_method(Registry(), case, geometry, "cpu")
    meter = Meter(method.networks(), "cpu")
    for count in runs:
        steps, length = (count, geometry.length) if case.source else (None, count)
        with torch.no_grad(), meter.measure(batch) as cost:
            method.sample(SampleRequest(Streams.of(0, "memory", batch), length, steps, source=case.source))
        print(json.dumps({"bytes": cost.peak_memory_bytes, "seconds": cost.seconds}), flush=True)


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
    case, (geometry, _) = CASES[name], SIZES[size]
    first = TIMED_STEPS if case.source else min(TIMED_TOKENS, geometry.length)
    short = elsewhere("peaks", name, size, [first, MEMORY * first])
    if len(short) < 2:
        print(f"{size}, {name}: not measured in {LIMIT_S} s", flush=True)
        return
    near, far = (1 / first, 1 / (MEMORY * first)) if case.source else (first, MEMORY * first)
    rate = Rate(0.0, peak_bytes=short[0]["bytes"], extent=near, more_peak_bytes=short[1]["bytes"], more_extent=far)
    for count in STEPS if case.source else [geometry.length]:
        real = elsewhere("peaks", name, size, [count])
        cell = SimpleNamespace(steps=count if case.source else None, length=geometry.length)
        told = rate.peak_at(cell)  # type: ignore[arg-type]
        found = f"measured {real[0]['bytes'] / 1e6:.0f} MB, {told / real[0]['bytes']:.2f}" if real else "not measured"
        what = f"{count} steps" if case.source else f"{count} tokens"
        print(f"{size}, {name}, {what}: foretold {told / 1e6:.0f} MB, {found}", flush=True)


def large(name: str) -> None:
    """What one run of the large size needs."""
    case, (geometry, _) = CASES[name], SIZES["large"]
    found = elsewhere("peaks", name, "large", [2 if case.source else geometry.length])
    text = f"{found[0]['bytes'] / 1e9:.1f} GB, {found[0]['seconds']:.0f} s" if found else f"not done in {LIMIT_S} s"
    print(f"V = 128,000, L = 4,096, batch 1, {name}: {text}", flush=True)


if __name__ == "__main__":
    what, *names = sys.argv[1:]
    if what == "peaks":
        peaks(names[0], names[1], json.loads(names[2]))
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
