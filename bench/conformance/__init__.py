"""The conformance kit: does a method keep the contract, and does it sample what it claims?

    tsdfm-bench conform NAME            a table of checks, exit code 1 if one fails
    tsdfm_bench.conformance.pytest      the same as one test per check, for a plug-in author's own suite

Each check is a plain sentence and a function. A method runs in a process of its own with a time limit, so a check that
hangs, exits or prints costs one row. The methods that come with this program pass all of them.
"""

from __future__ import annotations

from tsdfm_bench.conformance.report import Failed, Report, Result, Row, Skipped
from tsdfm_bench.conformance.runner import conform
from tsdfm_bench.conformance.subject import Target

__all__ = ["Failed", "Report", "Result", "Row", "Skipped", "Target", "conform"]
