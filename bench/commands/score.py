"""`tsdfm-bench score`: judge samples that exist already, of a run folder or in a file, by scorers and metrics given.

It is `run` with a request that is read instead of typed: that of the folder's plan with more scorers and metrics, or
the method `file:PATH` with all samples of the file. So nothing is sampled again, and what was scored stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tsdfm_bench.commands.run import run_command
from tsdfm_bench.errors import UsageError
from tsdfm_bench.registry import Registry
from tsdfm_bench.reproduce import sweep_keys
from tsdfm_bench.results.store import RunFolder, read_json
from tsdfm_bench.spec import parse_spec, split_list

ANY_ID = 2**31  # the samples are counted before the task, which says what its ids are, is known
_ADDED = ("scorers", "metrics")
_OF_A_FILE = ("task", "samples", "length", "out")


def score_command(target: str, given: Mapping[str, Any], as_json: bool) -> int:
    """Score a run folder or a file of samples and print its tables; returns the exit code.

    Raises:
        UsageError: no such folder or file, or an option that a run folder has settled.
    """
    path = Path(target)
    if not path.is_dir():
        return run_command(_of_file(path, given), None, as_json)
    named = [str(parse_spec(name)) for name in split_list(given.get("scorers") or "")]
    return run_command(_of_run(RunFolder(path), given), None, as_json, named=named)


def _of_run(folder: RunFolder, given: Mapping[str, Any]) -> dict[str, Any]:
    """The request of a run folder, with what is given added to its scorers and metrics."""
    if not folder.plan_path.is_file():
        raise UsageError(
            f"{folder.root} is no run folder: it has no plan.json. A file of samples is scored by its name"
        )
    for name in _OF_A_FILE:
        if given.get(name) is not None:
            raise UsageError(f"--{name} belongs to a file of samples; {folder.root} says what its own is")
    plan = read_json(folder.plan_path)
    keys = {**sweep_keys(plan), "out": str(folder.root)}
    rest = {key: value for key, value in given.items() if key not in _ADDED}
    more = {key: list(dict.fromkeys([*keys.get(key, []), *split_list(given[key])])) for key in _ADDED if given.get(key)}
    return {**keys, **rest, **more}


def _of_file(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The request for all samples of a file."""
    if not path.is_file():
        raise UsageError(f"there is no run folder and no file of samples called {path}")
    method: Any = Registry().load("methods", "file")
    count = method.stored_sequences({"name": str(path), "vocab_size": ANY_ID})
    return {"methods": [f"file:{path}"], "samples": count, **given}
