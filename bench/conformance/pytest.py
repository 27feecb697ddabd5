"""The conformance kit in a plug-in author's own tests: one line, one pytest case per check.

    from tsdfm_bench.conformance.pytest import conformance_test

    test_my_method = conformance_test("my-method")
    test_local_file = conformance_test("mine", plugin="my_method.py", task="sotu", checkpoint="runs/mine")

The kit runs once, when the first case is asked for; a check that does not apply is a skipped case with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

import pytest

from tsdfm_bench.conformance.report import Report
from tsdfm_bench.conformance.runner import LIMIT_S, conform
from tsdfm_bench.conformance.subject import Target
from tsdfm_bench.spec import parse_spec


def conformance_test(
    method: str,
    *,
    plugin: str | PathLike[str] | Sequence[str | PathLike[str]] = (),
    task: str = "sotu",
    checkpoint: str | None = None,
    only: Sequence[str] | None = None,
    limit_s: float = LIMIT_S,
    isolated: bool = True,
) -> Callable[..., None]:
    """A parametrised test function to be bound to a name that starts with `test_`.

    Args:
        method: as on the command line: a name, NAME:ARGUMENT, or a name with options.
        plugin: local plug-in files that provide it; none for an installed package.
        task: the task whose vocabulary is used, by a method without its own.
        checkpoint: weights; None = the method's default.
        only: ids of checks; None = all.
        limit_s: seconds a check may take.
        isolated: test in a process of its own; False = in this one, for a debugger.
    """
    from tsdfm_bench.conformance.catalogue import select

    files = (plugin,) if isinstance(plugin, str | PathLike) else tuple(plugin)
    spec = parse_spec(method)
    target = Target(
        spec.name,
        spec.argument,
        dict(spec.options),
        tuple(str(Path(file).resolve()) for file in files),
        checkpoint,
        task,
    )

    @lru_cache(maxsize=1)
    def report() -> Report:
        return conform(target, only, limit_s, isolated=isolated)

    @pytest.mark.parametrize("check", [check.id for check in select(only)])
    def test(check: str) -> None:
        row: Any = next(row for row in report().rows if row.check == check)
        if row.verdict == "skipped":
            pytest.skip(row.seen)
        assert row.verdict == "pass", f"{row.title}: {row.seen}\n({row.explanation})"

    return test
