"""What a worker process runs: one job file, or job files one after another from its standard input.

    python -m tsdfm_bench.launch.worker JOBFILE        does it, prints the result as one line of JSON
    python -m tsdfm_bench.launch.worker --serve        a path a line on stdin; a result a line on stdout
    work(JOBFILE)                                      the same as a function

The result is a small plain dictionary of JSON values and is also left in a file beside the job file:

    name       of the job
    state      "done": nothing is left of it; "busy": some units are being worked on by other living processes;
               "failed": some units failed; "refused": versions differ; "stopped": interrupted; "error": see `error`
    units      how many it has
    done       how many are complete now
    failed     {unit: reason}
    busy       units held by other living processes
    notes      what a person should be told (a takeover, a damaged file)
    error      what ended the job as a whole, or ""

`work` never raises but for KeyboardInterrupt (also made from SIGTERM and SIGUSR2): finished batches are kept.
"""

from __future__ import annotations

from typing import Any


def work(job_file: str) -> dict[str, Any]:
    """Do the work of a job file; see the module for the result."""
    from tsdfm_bench.launch.duty import perform

    return perform(job_file)
