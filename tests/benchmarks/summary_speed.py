"""A summary of many cells: seconds and peak memory from stored per-sequence numbers to files and tables.

    OMP_NUM_THREADS=1 python tests/benchmarks/summary_speed.py --cells 1000 --sequences 1024

A run folder is made up first, with the project's own writers and the metrics of a default run (23 values with an
interval per cell, two scorers); then, each in a process of its own: every cell's columns are read and get their
intervals, the summary is put together, flagged and written, the tables are rendered (what `run` does once metrics are
computed), and the tables are made again from the finished folder (what `table` does). Not a test.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tsdfm_bench.results.columns import Terms, cell_columns, columns_path, terms, write_columns

SCORERS = ("char-rnn", "smollm2")
METHODS = ("tsdfm", "fsdfm", "dfm", "mdlm", "sedd")
REFERENCES = ("real", "shuffled", "bigram", "unigram", "loop")
PERPLEXITIES = {
    "gen_ppl": "exp-ratio",
    "gen_ppl/mean-of-sequences": "mean-exp-ratio",
    "gen_ppl/mdlm": "exp-ratio",
    "gen_ppl/sedd": "mean-exp-ratio",
    "gen_ppl/sdtt": "exp-mean-ratio",
    "gen_ppl/flow-matching": "mean-exp-ratio",
}
TOKENS = ("distinct_1", "distinct_2", "distinct_3", "distinct_4", "repetition_4", "longest_repeat", "mean_length")


def settings(k: int) -> dict[str, Any]:
    """What distinguishes cell k."""
    common = {"task": "sotu", "tokenizer": "bpe@1", "data_hash": "sha256:d", "length": 64, "seed": 0, "state": "done"}
    if k < len(REFERENCES):
        name = REFERENCES[k]
        return common | {"method": name, "label": name, "kind": "reference", "cell": f"{k:016x}", "checkpoint": "none"}
    temperature, steps, source = 0.5 + 0.01 * (k // 80), 2 ** (k % 8), ("uniform", "mask")[k // 8 % 2]
    name = METHODS[k // 16 % 5]
    return common | {
        "method": name, "label": name, "kind": "method", "cell": f"{k:016x}", "checkpoint": f"sotu/{name}",
        "source": source, "steps": steps, "temperature": temperature, "draw": "fp64",
        "calls": steps, "sequence_calls": steps,
    }  # fmt: skip


def columns(rng: np.random.Generator, n: int) -> dict[str, list[tuple[str, str, Terms]]]:
    """The stored columns of one cell, by metric."""
    found: dict[str, list[tuple[str, str, Terms]]] = {
        "gen-ppl": [],
        "bits-per-byte": [],
        "entropy": [],
        "repetition": [],
    }
    for scorer in SCORERS:
        units = rng.integers(48, 80, n).astype(float)
        nll = units * rng.gamma(12.0, 0.35, n)
        for metric, form in PERPLEXITIES.items():
            found["gen-ppl"].append((metric, scorer, terms(form, (nll, units - (metric == "gen_ppl/mdlm")))))
        found["bits-per-byte"].append(("bits_per_byte", scorer, terms("ratio", (nll, units * 4.0))))
    entropy = 4.0 - rng.gamma(2.0, 0.1, n)
    found["entropy"] = [
        ("entropy_nats", "", terms("mean", (entropy,))),
        ("entropy_bits", "", terms("mean", (entropy * 1.44,))),
    ]
    for metric in TOKENS:
        found["repetition"].append((metric, "", terms("mean", (rng.beta(8.0, 2.0, n),))))
    return found


def make(folder: Path, cells: int, n: int) -> None:
    """Write the columns of every cell."""
    rng = np.random.default_rng(0)
    for k in range(cells):
        for metric, found in columns(rng, n).items():
            write_columns(columns_path(folder, metric, settings(k)["cell"]), found)


def summarise(folder: Path, cells: int, n: int) -> None:
    """From columns to summary.parquet, summary.csv and tables/."""
    from tsdfm_bench.results.flags import with_flags
    from tsdfm_bench.results.resampling import intervals
    from tsdfm_bench.results.schema import from_rows
    from tsdfm_bench.results.store import RunFolder
    from tsdfm_bench.summary import write_results

    rows: list[dict[str, Any]] = []
    for k in range(cells):
        about = settings(k)
        stored = cell_columns(folder, about["cell"]).terms
        for (metric, scorer), found in zip(stored, intervals(list(stored.values())), strict=True):
            rows.append(
                about
                | {"metric": metric, "scorer": scorer, "value": found.value, "low": found.low, "high": found.high}
                | {"n": found.n, "unit": "1", "definition": metric, "interval": found.description, "better": "lower"}
                | {"scorer_title": scorer, "scorer_dtype": "float32" if scorer else ""}
            )
    write_results(RunFolder(folder), with_flags(from_rows(rows)), [])


def tables(folder: Path, cells: int, n: int) -> None:
    """From the finished folder to its tables, in the terminal's form."""
    from tsdfm_bench.results.render import render
    from tsdfm_bench.results.schema import read_summary
    from tsdfm_bench.results.tables import main_tables

    for table in main_tables(read_summary(folder), root=folder):
        render(table, "markdown")


PHASES = {"make": make, "summary": summarise, "table": tables}


def main() -> None:
    """Run the phases, each in a process of its own, and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--sequences", type=int, default=1024)
    parser.add_argument("--phase", choices=sorted(PHASES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where the run folder is made; default: a temporary folder")
    given = parser.parse_args()
    if given.phase:
        started, cpu = time.perf_counter(), time.process_time()
        PHASES[given.phase](given.folder, given.cells, given.sequences)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        took = {"seconds": round(time.perf_counter() - started, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
        print(json.dumps({"phase": given.phase, **took, "peak_mib": round(peak)}))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        for phase in PHASES:
            again = ["--phase", phase, "--folder", str(folder), "--cells", str(given.cells)]
            again += ["--sequences", str(given.sequences)]
            subprocess.run([sys.executable, __file__, *again], check=True)


if __name__ == "__main__":
    main()
