"""`tsdfm-bench bench-speed`: how fast samplers and judges are, as ratios measured in one process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdfm_bench import provenance
from tsdfm_bench.console import Reporter, stdout_console
from tsdfm_bench.errors import UsageError, unknown_name
from tsdfm_bench.registry import Registry

if TYPE_CHECKING:
    from tsdfm_bench.speed.cases import Case, Size
    from tsdfm_bench.speed.clock import Clock, Ratio
    from tsdfm_bench.speed.others import OtherRow
    from tsdfm_bench.speed.sampling import SpeedRow
    from tsdfm_bench.speed.scaling import Growth

PARTS = ("sampling", "generate", "scoring", "scaling")
NOTES = (
    "overhead: seconds of a run / seconds of its network calls alone, made again on the same inputs.",
    "ratio_plain: seconds of the plain loop of equal law (full-vocabulary softmax and fp64 draw at every position and "
    "step, same network) / seconds of the run. ratio_published: the loop as published (fp32 race, whose law is another;"
    " MDLM with its cache) / the run.",
    "Ratios: median of the repeats and, in brackets, their range; what is divided was measured alternately.",
    "calls: network calls of the batch; in brackets per sequence.",
)


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        sizes, methods, parts: names.
        batches, steps: numbers.
        repeats: of every measurement.
        plain_steps: steps of the plain loops that are made; the rest is computed from them.
        threads: CPU threads.
    """

    sizes: Sequence[str]
    methods: Sequence[str]
    parts: Sequence[str]
    batches: Sequence[int]
    steps: Sequence[int]
    repeats: int
    plain_steps: int
    threads: int


@dataclass
class Found:
    """Everything that was measured."""

    device: str
    threads: int
    unit: str
    sampling: list[SpeedRow] = field(default_factory=list)
    others: list[OtherRow] = field(default_factory=list)
    scaling: list[Growth] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def bench_speed_command(
    quick: bool,
    sizes: str | None,
    methods: str | None,
    parts: str | None,
    batches: str | None,
    steps: str | None,
    repeats: int | None,
    threads: int,
    device: str,
    out: Path | None,
    as_json: bool,
) -> int:
    """Measure and print.

    Args:
        quick: the size sotu, one batch size, few repeats.
        sizes, methods, parts, batches, steps: lists separated by commas; None = all, or the quick ones. On a CPU the
            size base is measured only if it is named: a run of 1,024 steps takes hours there.
        repeats: of every measurement; None = 5, quick 3.
        threads: CPU threads.
        device: torch device string, or "auto".
        out: folder for speed.json, provenance.json and the figure of the growth; None = nothing is written.
        as_json: print JSON only.

    Raises:
        UsageError: an unknown name, an impossible number, or a file in the place of the folder.
        StoreError: the folder cannot be written to; said before anything is measured.
    """
    import torch

    from tsdfm_bench.launch.failures import memory_ran_out
    from tsdfm_bench.meter import choose_device, device_name
    from tsdfm_bench.speed.cases import CASES, SIZES
    from tsdfm_bench.speed.clock import Clock
    from tsdfm_bench.speed.figure import draw_growth

    where = choose_device(device)
    settings = Settings(
        _names(sizes, SIZES, "size", ["sotu"] if quick or where == "cpu" else list(SIZES)),
        _names(methods, dict.fromkeys(case.method for case in CASES), "method of bench-speed"),
        _names(parts, dict.fromkeys(PARTS), "part"),
        _numbers(batches, "--batches", [8] if quick else [1, 8, 32]),
        _numbers(steps, "--steps", [8, 64, 1024]),
        repeats or (3 if quick else 5),
        16 if quick else 64,
        threads,
    )
    if out is not None:
        _require_writable(out)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        clock = Clock(where, threads)
        found = Found(device_name(where), threads, clock.counts)
        reporter = Reporter(quiet=as_json)
        if out is not None:
            provenance.record(out, provenance.describe(Registry(), found.device, threads))
        work = list(_work(settings, clock, found))
        with reporter.phase("measuring", len(work), len(work), "measurements") as phase:
            for name, measure in work:
                phase.doing(name)
                try:
                    measure()
                except (RuntimeError, MemoryError) as error:
                    if not memory_ran_out(error):
                        raise
                    reporter.note(f"{name}: memory ran out; left out", style="yellow")
                if out is not None:  # what is measured is kept, whatever becomes of the rest
                    _write(found, out)
                phase.advance(1, 1)
    finally:
        torch.set_num_threads(before)
    if out is not None:
        if found.scaling:
            draw_growth(found.scaling, found.unit, out)
        reporter.note(f"written: {out}")
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        _print(found)
    return 0


def _work(settings: Settings, clock: Clock, found: Found) -> Iterator[tuple[str, Callable[[], None]]]:
    """Named measurements, each of which adds its rows."""
    from tsdfm_bench.speed import others, scaling
    from tsdfm_bench.speed.cases import CASES, SIZES

    registry = Registry()

    def sampling(case: Case, size: Size) -> None:
        for row in _rows(registry, case, size, settings, clock):
            found.sampling.append(row)

    def generation(size: Size, batch: int) -> None:
        found.others.append(others.generation(registry, size, batch, clock, settings.repeats))

    def scoring(size: Size, texts: int) -> None:
        found.others.append(others.scoring(registry, size, texts, clock, settings.repeats))

    def growth(case: Case, axis: str) -> None:
        found.scaling.append(scaling.measure_growth(registry, case, axis, clock, settings.repeats))

    for size in (SIZES[name] for name in settings.sizes):
        if "sampling" in settings.parts:
            for case in (case for case in CASES if case.method in settings.methods):
                yield f"{case.label} at {size.name}", partial(sampling, case, size)
        if "generate" in settings.parts:
            for batch in settings.batches:
                yield f"ar against generate at {size.name}", partial(generation, size, batch)
        if "scoring" in settings.parts:
            yield f"scoring at {size.name}", partial(scoring, size, max(settings.batches))
    if "scaling" in settings.parts:
        for case in (case for case in scaling.CASES if case.method in settings.methods):
            for axis in scaling.AXES:
                if axis == "steps" and case.source is None:
                    continue
                yield f"{case.method} by {axis}", partial(growth, case, axis)


def _rows(registry: Registry, case: Case, size: Size, settings: Settings, clock: Clock) -> Iterator[SpeedRow]:
    from tsdfm_bench.speed.cases import load_method
    from tsdfm_bench.speed.sampling import measure

    method = load_method(registry, case, size, clock.device)
    stepless = not registry.load("methods", case.method).info.uses_steps
    for batch in settings.batches:
        for steps in [None] if stepless else settings.steps:
            yield measure(case, method, size, batch, steps, clock, settings.repeats, settings.plain_steps)


def _names(text: str | None, known: dict[str, Any], what: str, default: list[str] | None = None) -> list[str]:
    if text is None:
        return list(known) if default is None else default
    names = [part.strip() for part in text.split(",") if part.strip()]
    for name in names:
        if name not in known:
            raise unknown_name(what, name, list(known))
    if not names:
        raise UsageError(f"no {what} is left to measure; known: {', '.join(known)}")
    return names


def _numbers(text: str | None, option: str, default: list[int]) -> list[int]:
    if text is None:
        return default
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UsageError(f"{option} takes whole numbers from 1 on, separated by commas, not '{text}'")
    return numbers


def _require_writable(folder: Path) -> None:
    """Raise UsageError or StoreError before anything is measured that could not be kept."""
    from tsdfm_bench.results.files import remove, write_bytes

    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file: give a folder for speed.json and the figure")
    write_bytes(folder / ".writable", b"", durable=False)
    remove(folder / ".writable")


def _write(found: Found, folder: Path) -> None:
    from tsdfm_bench.results.files import write_json

    write_json(folder / "speed.json", found.to_json())


def _print(found: Found) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = stdout_console()

    def table(title: str, left: Sequence[str], right: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        if not rows:
            return
        grid = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
        for name in left:
            grid.add_column(name)
        for name in right:
            grid.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            grid.add_row(*(Text(text) for text in row))
        console.print(grid)

    table(
        "sampling",
        ("method",),
        ("size", "batch", "steps", "calls", "seconds", "overhead", "ratio_plain", "ratio_published"),
        [
            (
                row.method,
                row.size,
                str(row.batch),
                "–" if row.steps is None else str(row.steps),
                f"{row.calls} ({row.sequence_calls:.1f})",
                f"{row.seconds:.3g}",
                str(row.overhead),
                row.note or _ratio(row.ratio_plain),
                _ratio(row.ratio_published),
            )
            for row in found.sampling
        ],
    )
    table(
        "against transformers, random weights",
        ("what",),
        ("size", "batch", "tokens", "seconds", "theirs / ours"),
        [
            (row.what, row.size, str(row.batch), str(row.length), f"{row.seconds:.3g}", str(row.ratio))
            for row in found.others
        ],
    )
    table(
        "growth of cost, random weights",
        ("method",),
        ("axis", "exponent", "seconds at its values"),
        [
            (row.method, row.axis, f"{row.exponent:.2f}", ", ".join(f"{x}: {s:.3g}" for x, s in row.points))
            for row in found.scaling
        ],
    )
    if found.sampling:
        for note in NOTES:
            console.print(note, highlight=False)
    cut = sorted({row.plain_steps for row in found.sampling if row.plain_steps and row.plain_steps < (row.steps or 0)})
    if cut:
        console.print(
            f"Plain loops: {', '.join(map(str, cut))} steps were made, the rest computed from them: every step costs "
            "the same.",
            highlight=False,
        )
    console.print(f"Seconds: {found.unit}; {found.device}, {found.threads} CPU threads.", highlight=False)


def _ratio(ratio: Ratio | None) -> str:
    return "–" if ratio is None else str(ratio)
