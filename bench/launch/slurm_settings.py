"""What jobs ask of Slurm: one set of sbatch parameters for all, and changes of it per method, scorer or training stage.

    --slurm partition=main,time=2:00:00,gpus_per_node=1

    [launcher.slurm]
    partition = "main"
    time = "2:00:00"                       # minutes, or any form sbatch knows
    array_parallelism = 64                 # jobs of an array at once
    pack = 10                              # cells together until a job takes about so many minutes

    [launcher.slurm.methods.ar]            # jobs of one method; likewise .scorers.NAME and .stages.NAME
    time = "8:00:00"
    constraint = "a100"

On the command line that is `--slurm methods.ar.time=8:00:00,stages.tsdfm.gpus_per_node=8`.

Names are submitit's, which are sbatch's with underscores. Whatever else sbatch knows goes into the table `extra`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tsdfm_bench.errors import UsageError, nearest

# submitit's parameters a user may set; a test compares them with the installed submitit.
TEXTS = (
    *("partition", "account", "qos", "constraint", "gres", "mem", "mem_per_cpu", "mem_per_gpu", "nodelist", "exclude"),
    *("mail_type", "mail_user", "comment", "wckey", "dependency"),
)
COUNTS = ("nodes", "cpus_per_task", "cpus_per_gpu", "gpus_per_node", "gpus_per_task", "array_parallelism")
LISTS = ("setup", "teardown", "srun_args")
RESERVED = {
    "dependency": "the launcher's own: scores wait for their samples",
    "comment": "the launcher's own: it finds its jobs by it",
    "job_name": "the launcher's own: it finds its jobs by it",
    "use_srun": "needed: without srun a job does not get the signal before its end",
    "ntasks_per_node": "a job is one process on each node; a training starts one for each GPU itself",
}
OWN = ("pack", "poll", "tries", "detach")
OVERRIDES = ("methods", "scorers", "stages")
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")


@dataclass(frozen=True)
class SlurmSettings:
    """The `[launcher.slurm]` table.

    Args:
        parameters: of every job, as submitit wants them; `time` in minutes.
        overrides: "methods", "scorers" or "stages" -> name -> parameters that differ.
        pack: minutes that the cells of one job should take together.
        poll: seconds between two looks at the queue, at most.
        tries: submissions of the same cells without any progress before they are given up.
        detach: submit and leave.
    """

    parameters: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    pack: float = 10.0
    poll: float = 20.0
    tries: int = 3
    detach: bool = False

    def of(self, kind: str, name: str) -> dict[str, Any]:
        """The sbatch parameters of the jobs of a method, a scorer or a stage (`kind`: one of `OVERRIDES`)."""
        return {**self.parameters, **self.overrides.get(kind, {}).get(name, {})}

    def check_sweep(self) -> None:
        """Raise UsageError if a job of a sweep is to have several nodes, which it could not use."""
        named = [table for kind in ("methods", "scorers") for table in self.overrides.get(kind, {}).values()]
        if (asked := max(int(table.get("nodes", 1)) for table in (self.parameters, *named))) > 1:
            raise UsageError(
                f"slurm: nodes = {asked} is for trainings; a job of a sweep runs on one node, many nodes run many jobs"
            )


def check_launcher(name: object) -> None:
    """Raise UsageError if --slurm or --detach were given for another launcher: nobody would heed them."""
    if name != "slurm":
        raise UsageError(f"--slurm and --detach belong to --launcher slurm, and the launcher is {name or 'inline'}")


def parse_option(text: str) -> dict[str, str]:
    """The keys of `--slurm partition=main,time=30`; commas inside a value are kept if no `name=` follows them.

    Raises:
        UsageError: a part without "=".
    """
    found = {}
    for part in re.split(r",(?=\s*[\w.:/@-]+\s*=)", text):
        key, separator, value = part.partition("=")
        if not separator or not key.strip(" ."):
            raise UsageError(
                f"--slurm takes NAME=VALUE pairs with commas between them, for example partition=main,time=30; "
                f"'{part}' is none"
            )
        key = key.strip()
        found[key if "." in key else key.replace("-", "_")] = value.strip()
    return found


def slurm_settings(table: Mapping[str, Any]) -> SlurmSettings:
    """Settings from the keys of the table.

    Raises:
        UsageError: an unknown key (with the nearest known one) or an impossible value.
    """
    table = _nested(table)
    own = {key: table.pop(key) for key in OWN if key in table}
    overrides: dict[str, dict[str, dict[str, Any]]] = {}
    for kind in OVERRIDES:
        named = table.pop(kind, {})
        if not isinstance(named, Mapping) or not all(isinstance(value, Mapping) for value in named.values()):
            raise UsageError(f"slurm: {kind} is a table of tables: [launcher.slurm.{kind}.NAME]")
        overrides[kind] = {str(name): _parameters(value, f"{kind}.{name}: ") for name, value in named.items()}
    return SlurmSettings(
        _parameters(table, "", (*OWN, *OVERRIDES)),
        overrides,
        pack=_number(own.get("pack", SlurmSettings.pack), "pack", 0.0),
        poll=_number(own.get("poll", SlurmSettings.poll), "poll", 0.1),
        tries=_count(own.get("tries", SlurmSettings.tries), "tries", 1),
        detach=_switch(own.get("detach", False), "detach"),
    )


def _nested(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table with `methods.NAME.KEY` of the command line as tables in tables, and "_" for "-" in its own keys."""
    found: dict[str, Any] = {}
    for key, value in sorted(table.items(), key=lambda item: "." in str(item[0])):  # a table first, then changes of it
        kind, _, rest = str(key).partition(".")
        name, _, parameter = rest.rpartition(".")
        if kind in OVERRIDES and name and isinstance(found.get(kind, {}), Mapping):
            named = found.get(kind, {})
            found[kind] = {**named, name: {**named.get(name, {}), parameter: value}}
        else:
            found[str(key).replace("-", "_")] = value
    return found


def known_keys() -> list[str]:
    """The sbatch parameters that may be set."""
    texts = [key for key in TEXTS if key not in RESERVED]
    return sorted([*texts, *COUNTS, *LISTS, "time", "exclusive", "signal_delay_s", "extra"])


def _parameters(table: Mapping[str, Any], where: str, more: tuple[str, ...] = ()) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for given, value in table.items():
        key = str(given).replace("-", "_")
        name = f"{where}{key}"
        if key in RESERVED:
            raise UsageError(f"slurm: {name} cannot be set: {RESERVED[key]}")
        if key not in known_keys():
            known = [*known_keys(), *more]
            close = nearest(key, known)
            hint = f"; did you mean {' or '.join(repr(k) for k in close)}?" if close else "."
            raise UsageError(
                f"slurm: unknown key '{name}'{hint} Known keys: {', '.join(sorted(known))}. "
                "Anything else that sbatch knows: [launcher.slurm.extra]."
            )
        if key == "time":
            found[key] = minutes(value)
        elif key in COUNTS or key == "signal_delay_s":
            found[key] = _count(value, name, 0 if key in ("gpus_per_node", "gpus_per_task") else 1)
        elif key in LISTS:
            found[key] = [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]
        elif key == "exclusive":
            found[key] = value if value in ("user", "mcs") else _switch(value, name)
        elif key == "extra":
            if not isinstance(value, Mapping):
                raise UsageError(f"slurm: {name} is a table: [launcher.slurm.extra]")
            found["additional_parameters"] = {str(k): v for k, v in value.items()}
        else:
            found[key] = str(value)
    return {key: value for key, value in found.items() if value is not False and value != ""}


def minutes(value: object) -> int:
    """Minutes of a time limit as sbatch reads it: 90, 90:00, 1:30:00, 1-12, 1-12:00, 1-12:00:00.

    Raises:
        UsageError: none of these, or nothing.
    """
    match = _TIME.fullmatch(str(value).strip())
    if match is None or isinstance(value, bool):
        raise UsageError(f"slurm: time {value!r} is no time limit: minutes, hours:minutes:seconds or days-hours")
    parts = [int(match[name] or 0) for name in ("first", "second", "third")]
    if match["days"] is not None:
        seconds = 86400 * int(match["days"]) + 3600 * parts[0] + 60 * parts[1] + parts[2]
    elif match["third"] is not None:
        seconds = 3600 * parts[0] + 60 * parts[1] + parts[2]
    else:
        seconds = 60 * parts[0] + parts[1]
    if seconds == 0:
        raise UsageError(f"slurm: time {value!r} leaves a job no time")
    return math.ceil(seconds / 60)


def _count(value: object, name: str, least: int) -> int:
    try:
        number = int(str(value))
    except ValueError:
        raise UsageError(f"slurm: {name}: {value!r} is not a whole number") from None
    if number < least or isinstance(value, bool):
        raise UsageError(f"slurm: {name}: at least {least} is needed, not {value}")
    return number


def _number(value: object, name: str, least: float) -> float:
    try:
        number = float(str(value))
    except ValueError:
        raise UsageError(f"slurm: {name}: {value!r} is not a number") from None
    if not (math.isfinite(number) and number >= least):
        raise UsageError(f"slurm: {name}: at least {least:g} is needed, not {value}")
    return number


def _switch(value: object, name: str) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).lower()
    if text not in ("true", "false", "yes", "no", "1", "0"):
        raise UsageError(f"slurm: {name} is true or false, not {value!r}")
    return text in ("true", "yes", "1")
