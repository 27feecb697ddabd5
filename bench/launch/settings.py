"""The `[launcher]` table of a request: how work is run, never what is computed.

    launcher = "local"                       # or a table:

    [launcher]
    name = "local"
    jobs = 4                                 # --jobs 4
    lease_s = 60                             # --lease 60

A launcher with settings of its own has a table of its own in it (`[launcher.slurm]`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from tsdfm_bench.errors import UsageError, unknown_name
from tsdfm_bench.launch import LAUNCHERS

DEFAULT_LEASE_S = 60.0
SHORTEST_LEASE_S = 0.2
LONGEST_S = 366 * 86400.0  # of a lease or a time limit; what timers cannot count begins above it


def _launcher(value: object) -> str:
    if value not in LAUNCHERS:
        raise ValueError(str(unknown_name("launcher", str(value), LAUNCHERS)))
    return str(value)


def _jobs(value: object) -> int | None:
    if value is None:
        return None
    try:
        jobs = int(str(value))
    except ValueError:
        raise ValueError(f"jobs: {value!r} is not a whole number") from None
    if jobs < 1:
        raise ValueError(f"jobs: at least 1 is needed, not {jobs}")
    return jobs


def _lease(value: object) -> float:
    try:
        seconds = float(str(value))
    except ValueError:
        raise ValueError(f"lease: {value!r} is not a number of seconds") from None
    if not (math.isfinite(seconds) and seconds >= SHORTEST_LEASE_S):
        raise ValueError(f"lease: at least {SHORTEST_LEASE_S} s are needed, not {value}")
    if seconds > LONGEST_S:
        raise ValueError(f"lease: at most {LONGEST_S:.0f} s (a year) are possible, not {value}")
    return seconds


class LauncherSettings(BaseModel):
    """How the work is run.

    Args:
        name: one of `LAUNCHERS`.
        jobs: how many worker processes at once; None = the launcher's choice.
        lease_s: seconds without a sign of life after which another process takes over a worker's cell.
        slurm: settings of the slurm launcher.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    name: Annotated[str, BeforeValidator(_launcher)] = "inline"
    jobs: Annotated[int | None, BeforeValidator(_jobs)] = None
    lease_s: Annotated[float, BeforeValidator(_lease)] = DEFAULT_LEASE_S
    slurm: dict[str, Any] = {}

    def __str__(self) -> str:
        return self.name


def launcher_settings(table: Mapping[str, object]) -> LauncherSettings:
    """The settings of a table; `UsageError` says what is wrong with it."""
    try:
        return LauncherSettings(**{str(key): value for key, value in table.items()})  # type: ignore[arg-type]
    except ValidationError as error:
        lines = [str(problem["msg"]).removeprefix("Value error, ") for problem in error.errors()]
        raise UsageError("\n".join(dict.fromkeys(lines))) from None


def launcher_table(value: object) -> dict[str, Any]:
    """A table from a name or a table."""
    if isinstance(value, LauncherSettings):
        return value.model_dump()
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else {"name": value}
