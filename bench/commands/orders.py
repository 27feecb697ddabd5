"""`tsdfm-bench orders`: how fast every sampler approaches the true law, computed exactly."""

from __future__ import annotations

import json
from dataclasses import asdict

from tsdfm_bench.conformance.orders import EXACT, FIT_FROM, PLACES, STEPS, SYMBOLS, Convergence, convergence_orders
from tsdfm_bench.console import stdout_console


def orders_command(as_json: bool) -> int:
    """Print total variation by steps and the fitted order of every sampler."""
    found = convergence_orders()
    if as_json:
        print(json.dumps([asdict(row) for row in found], indent=2))
        return 0
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = stdout_console()
    # on a narrow terminal some step counts give way
    shown = [i for i in range(len(STEPS)) if console.width >= 116 or i % 3 == 1]
    grid = Table(box=box.SIMPLE_HEAD, title="total variation to the true law", title_justify="left", pad_edge=False)
    grid.add_column("method", no_wrap=True)
    grid.add_column("source")
    for i in shown:
        grid.add_column(str(STEPS[i]), justify="right")
    grid.add_column("order", justify="right")
    for row in found:
        cells = [_number(row.total_variation[i]) for i in shown]
        grid.add_row(*(Text(text) for text in (row.label, row.source or "–", *cells, _order(row))))
    console.print(grid)
    for line in (
        f"Columns: steps. Exact laws by multiplying transition matrices, on {PLACES} places of {SYMBOLS} symbols with "
        "the exact posterior; nothing is sampled.",
        f"order: slope of -log2(total variation) over log2(steps) from {FIT_FROM} steps on; 1 = it halves when steps "
        "double; exact = 0 at any number of steps.",
        "Euler from the uniform source also waits too long before its last steps, where h g(t) is not small: 1 up to a "
        "logarithm.",
    ):
        console.print(line, highlight=False)
    return 0


def _number(value: float) -> str:
    return "0" if value < EXACT else f"{value:.4f}"


def _order(row: Convergence) -> str:
    return "exact" if row.order is None else f"{row.order:.2f}"
