"""`tsdfm-bench methods`, `tasks`, `scorers`: what is installed, from metadata; one thing in full, from its class."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tsdfm_bench.api import MethodInfo, ScorerInfo
from tsdfm_bench.console import stdout_console
from tsdfm_bench.errors import BenchError, UsageError
from tsdfm_bench.registry import Entry, Registry, check_info, describe, one_line
from tsdfm_bench.spec import parse_spec


def listing_command(kind: str, name: str | None, plugins: Sequence[Path], as_json: bool) -> int:
    """List one kind of plug-in, or describe one.

    Args:
        kind: "methods", "tasks" or "scorers".
        name: what to describe, or None for the list.
        plugins: local plug-in files.
        as_json: print JSON.

    Returns:
        1 if something that is listed or asked for cannot be used.
    """
    registry = Registry(plugins)
    return _describe(registry, kind, name, as_json) if name is not None else _list(registry, kind, as_json)


def _list(registry: Registry, kind: str, as_json: bool) -> int:
    entries = registry.entries(kind)
    broken = [str(error) for error in registry.broken_files.values()]
    if as_json:
        print(json.dumps({kind: [asdict(entry) for entry in entries], "broken_files": broken}, indent=2))
    else:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        console = stdout_console()
        grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("name", "from", "version", "module"):
            grid.add_column(column, overflow="fold")
        for entry in entries:
            origin = "built in" if entry.builtin else entry.distribution
            grid.add_row(*(Text(text) for text in (entry.name, origin, entry.version, entry.target)))
        console.print(grid)
        for problem in [*(entry.problem for entry in entries if entry.problem), *broken]:
            console.print(Text(problem, style="red"), soft_wrap=True)
        console.print(f"More about one: tsdfm-bench {kind} NAME", style="dim", highlight=False)
    return 1 if broken or any(entry.problem for entry in entries) else 0


def _describe(registry: Registry, kind: str, name: str, as_json: bool) -> int:
    from tsdfm_bench.guard import shielded

    spec = parse_spec(name)
    entry = registry.entry(kind, spec.name)
    cls = registry.load(kind, spec.name)
    facts: dict[str, Any] = {"name": name, "from": entry.owner, "module": entry.target}
    try:
        with shielded(describe(entry), cls):
            facts |= _facts(kind, entry, cls, spec.params())
    except UsageError as error:
        if spec.params():
            raise
        facts |= {"about": _about(cls), "needs": str(error)}  # nothing is wrong: it wants a name after the colon
    except (BenchError, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever a plug-in raises
        facts |= {"about": _about(cls), "problem": one_line(error)}
    code = 1 if "problem" in facts else 0
    if as_json:
        print(json.dumps(facts, indent=2, default=_plain))
        return code
    from rich.table import Table
    from rich.text import Text

    console = stdout_console()
    grid = Table(box=None, show_header=False, pad_edge=False)
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for key, value in facts.items():
        if value not in ("", None, [], {}, ()):
            grid.add_row(Text(key.replace("_", " ")), Text(_readable(value)))
    console.print(grid)
    return code


def _facts(kind: str, entry: Entry, cls: Any, params: Mapping[str, object]) -> dict[str, Any]:
    if kind == "methods":
        info: MethodInfo = cls.info
        facts = asdict(info) | {"options": dict(info.options)}
        return {key: value for key, value in facts.items() if key not in ("name", "api_version")} | {
            "about": _about(cls)
        }
    if kind == "scorers":
        scorer = cls.describe(params) if hasattr(cls, "describe") else getattr(cls, "info", None)
        facts = asdict(scorer) if isinstance(scorer, ScorerInfo) else {}
        facts.pop("api_version", None)
        reason = cls.available(params) if hasattr(cls, "available") else None
        return facts | {"about": _about(cls), "available": reason or "yes"}
    task = cls.load(params)
    check_info(entry, getattr(task, "info", None))
    facts = asdict(task.info)
    facts.pop("api_version", None)
    card = getattr(task, "data_card", None)
    return facts | {"about": _about(cls)} | ({"data": dict(card())} if callable(card) else {})


def _about(cls: Any) -> str:
    """What the class says of itself up to its arguments, a paragraph a line."""
    said = (inspect.getdoc(cls) or "").partition("\nArgs:\n")[0]
    return "\n".join(" ".join(paragraph.split()) for paragraph in said.strip().split("\n\n"))


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _readable(value: object) -> str:
    if isinstance(value, Mapping):
        return "\n".join(f"{key}: {_readable(item)}" for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
