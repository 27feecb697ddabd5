"""`tsdfm-bench train SCALE --dry-run`: what a recipe would train, and one step of each stage on random tokens."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from tsdfm_bench.console import Reporter, stdout_console
from tsdfm_bench.registry import Registry
from tsdfm_bench.spec import parse_spec

if TYPE_CHECKING:
    from tsdfm_bench.methods.train.dryrun import Rehearsal
    from tsdfm_bench.methods.train.recipe import Recipe

PEAK, SHARE = 989e12, 0.14  # bf16 operations per second of an H100 by its data sheet, and the share that was measured
NOTE = (
    "loss: of one step at full width, two blocks and random tokens. operations: of the whole training, by formula from "
    "the calls that the step made. memory: of one process with `pass` windows, by formula, without what the passes of "
    "a student's teacher and of its candidates need meanwhile. H100 hours: operations at "
    f"{100 * SHARE:.0f} % of the data sheet's bf16 peak, measured with dfm-uniform of `base` (methods/train/LOG.md);"
    " smaller networks reach less of it."
)


def rehearse_command(recipe: Recipe, stages: list[str] | None, as_json: bool) -> int:
    """Rehearse a recipe and print what it comes to; returns the exit code."""
    from tsdfm_bench.methods.train.dryrun import rehearse

    reporter = Reporter()
    results: list[Rehearsal] = []

    def done(result: Rehearsal) -> None:
        results.append(result)
        reporter.note(f"{result.name}: one step in {result.seconds:.1f} s, loss {result.loss:.4g}")

    reporter.note(f"Rehearsing recipe '{recipe.scale}' on random tokens, {recipe.vocab_size:,} in the vocabulary:")
    exact = hasattr(Registry().load("tasks", parse_spec(recipe.task).name), "oracle")
    rehearse(recipe, stages, done, exact)
    if as_json:
        json.dump([asdict(result) for result in results], sys.stdout, indent=1)
        print()
        return 0
    _print(results)
    return 0


def _print(results: list[Rehearsal]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("network", no_wrap=True)
    for name in ("parameters", "steps", "windows", "tokens", "operations", "H100 hours", "pass", "memory", "loss"):
        table.add_column(name, justify="right", no_wrap=True)
    for r in results:
        table.add_row(
            r.name,
            f"{r.parameters:,}",
            f"{r.steps:,}",
            f"{r.windows}x{r.length}",
            _short(r.tokens),
            f"{r.flops:.1e}",
            f"{r.flops / (PEAK * SHARE) / 3600:,.1f}",
            str(r.micro_batch),
            f"{r.memory_bytes / 1e9:.1f} GB",
            f"{r.loss:.4g}",
        )
    console = stdout_console()
    console.print(table)
    console.print(NOTE, style="dim", highlight=False)


def _short(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:,.0f}"
