"""Names to classes: built-in methods, tasks, scorers, metrics and figures, and those of plug-ins, found lazily.

Everything registers the same way, through entry points of the groups `tsdfm_bench.methods`, `.tasks`, `.scorers`,
`.metrics` and `.figures`; the built-ins are this distribution's own entries. Listing reads package metadata and imports
nothing. A name is imported and checked when something is made of it, and whatever is wrong with a plug-in (it cannot be
imported, lacks an attribute, was written for another version of the contract, or two distributions claim one name) is
one `PluginError` line about that name, never a broken listing.

`--plugin FILE` names a local .py file that holds the same groups as module-level dictionaries, name -> class:

    METHODS = {"mine": MyMethod}          # likewise TASKS, SCORERS, METRICS, FIGURES

The environment variable TSDFM_BENCH_PLUGINS, set and empty, switches installed third-party plug-ins off; set to
distribution names separated by commas, it admits only those. Files given with --plugin are always read.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tsdfm_bench.api import API_VERSION, MethodInfo, MetricInfo, ScorerInfo, TaskInfo
from tsdfm_bench.errors import PluginError, UsageError, unknown_name
from tsdfm_bench.records import check_fields

BUILTIN = "tsdfm-bench"
SWITCH = "TSDFM_BENCH_PLUGINS"
KINDS = ("methods", "tasks", "scorers", "metrics", "figures")

_SINGULAR = {"methods": "method", "tasks": "task", "scorers": "scorer", "metrics": "metric", "figures": "figure"}
_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "methods": ("info", "load", "networks", "refuse", "sample"),
    "tasks": ("load", "decode", "encode", "reference", "prompts"),
    "scorers": ("load", "networks", "score"),
    "metrics": ("info", "load", "compute"),
    "figures": ("title", "make"),
}
_INFO: Mapping[str, type] = {"methods": MethodInfo, "tasks": TaskInfo, "scorers": ScorerInfo, "metrics": MetricInfo}


@dataclass(frozen=True)
class Entry:
    """One registered name, known from metadata.

    Args:
        kind: one of `KINDS`.
        name: as typed on the command line.
        target: "module:attribute", or the file of a local plug-in.
        distribution: who provides it.
        version: of the distribution; "" for a local file.
        problem: why it cannot be used, as far as metadata tell, or "".
    """

    kind: str
    name: str
    target: str
    distribution: str
    version: str
    problem: str = ""

    @property
    def builtin(self) -> bool:
        """Whether this distribution provides it."""
        return self.distribution == BUILTIN

    @property
    def owner(self) -> str:
        """Distribution and version, for messages."""
        return f"{self.distribution} {self.version}".rstrip()


class Registry:
    """All registered names.

    Args:
        files: local plug-in files.
    """

    def __init__(self, files: Iterable[str | os.PathLike[str]] = ()) -> None:
        self.files = [Path(file) for file in files]
        self._loaded: dict[tuple[str, str], Any] = {}

    # -------------------------------------------------------------------------------------------------- listing

    def entries(self, kind: str) -> list[Entry]:
        """Everything of one kind, built-ins first, then by name; nothing that is installed is imported."""
        found = self._found[kind]
        listed = [self._merged(kind, name, entries) for name, entries in found.items()]
        return sorted(listed, key=lambda entry: (not entry.builtin, entry.name))

    def names(self, kind: str) -> list[str]:
        """All names of one kind."""
        return [entry.name for entry in self.entries(kind)]

    @cached_property
    def broken_files(self) -> dict[Path, PluginError]:
        """Local plug-in files that could not be imported, with the reason."""
        return {file: module for file, module in self._modules.items() if isinstance(module, PluginError)}

    @cached_property
    def _found(self) -> dict[str, dict[str, list[Entry]]]:
        return {kind: self._find(kind) for kind in KINDS}

    def _find(self, kind: str) -> dict[str, list[Entry]]:
        admitted = _admitted()
        found: dict[str, list[Entry]] = defaultdict(list)
        for point in importlib.metadata.entry_points(group=f"tsdfm_bench.{kind}"):
            distribution = _canonical(point.dist.name) if point.dist is not None else "unknown distribution"
            if distribution != BUILTIN and admitted is not None and distribution not in admitted:
                continue
            version = point.dist.version if point.dist is not None else ""
            entry = Entry(kind, point.name, point.value, distribution, version)
            if entry not in found[point.name]:  # one installation can be seen twice, from two folders of sys.path
                found[point.name].append(entry)
        for file, module in self._modules.items():
            if isinstance(module, PluginError):
                continue
            for name in getattr(module, kind.upper(), {}):
                found[str(name)].append(Entry(kind, str(name), str(file), file.name, ""))
        return dict(found)

    def _merged(self, kind: str, name: str, entries: list[Entry]) -> Entry:
        if len(entries) == 1:
            return entries[0]
        first = next((entry for entry in entries if entry.builtin), entries[0])
        owners = " and ".join(sorted(entry.owner for entry in entries))
        remedy = f"uninstall one of them, or set {SWITCH} to the distributions you want (empty: built-ins only)"
        problem = f"{_SINGULAR[kind]} '{name}' is provided by {owners}: {remedy}"
        return Entry(kind, name, first.target, first.distribution, first.version, problem)

    # -------------------------------------------------------------------------------------------------- loading

    def entry(self, kind: str, name: str) -> Entry:
        """The entry of a name.

        Raises:
            UsageError: unknown, with the nearest known names.
            PluginError: unknown, but a local plug-in file that could not be read may have defined it.
        """
        for entry in self.entries(kind):
            if entry.name == name:
                return entry
        if self.broken_files:
            raise next(iter(self.broken_files.values()))
        hint = f"List them: tsdfm-bench {kind}." if kind in ("methods", "tasks", "scorers") else ""
        raise unknown_name(_SINGULAR[kind], name, self.names(kind), hint)

    def load(self, kind: str, name: str) -> Any:
        """The class registered under a name, imported and checked.

        Raises:
            UsageError: unknown name.
            PluginError: it cannot be used; the message is one line with the reason.
        """
        entry = self.entry(kind, name)
        key = (kind, name)
        if key not in self._loaded:
            if entry.problem:
                raise PluginError(entry.problem)
            self._loaded[key] = self._import(entry)
        return self._loaded[key]

    def _import(self, entry: Entry) -> Any:
        module = self._modules.get(Path(entry.target))
        if module is not None:
            target = getattr(module, entry.kind.upper())[entry.name]
        else:
            point = importlib.metadata.EntryPoint(entry.name, entry.target, f"tsdfm_bench.{entry.kind}")
            try:
                with contextlib.redirect_stdout(sys.stderr) if entry.builtin else _shielded(describe(entry)):
                    target = point.load()
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # whatever a plug-in raises
                raise PluginError(
                    f"{describe(entry)} cannot be imported from {entry.target}: {one_line(error)}"
                ) from error
        missing = [name for name in _REQUIRED[entry.kind] if not hasattr(target, name)]
        if missing:
            raise PluginError(
                f"{describe(entry)} lacks {', '.join(missing)} (see tsdfm_bench.api, {_SINGULAR[entry.kind]})"
            )
        if isinstance(getattr(target, "info", None), tuple(_INFO.values())) or "info" in _REQUIRED[entry.kind]:
            check_info(entry, target.info)
        return target

    @cached_property
    def _modules(self) -> dict[Path, Any]:
        """Local plug-in files: module, or the reason why there is none."""
        return {file: _import_file(file, i) for i, file in enumerate(self.files)}


def check_info(entry: Entry, info: object) -> None:
    """Raise `PluginError` unless `info` is of the entry's kind and keeps this version of the contract."""
    wanted = _INFO[entry.kind]
    if not isinstance(info, wanted):
        raise PluginError(f"{describe(entry)}: its info is a {type(info).__name__}, not a {wanted.__name__}")
    version = getattr(info, "api_version", None)
    if version != API_VERSION:
        newer = isinstance(version, int) and version > API_VERSION
        remedy = "upgrade tsdfm-bench" if newer else "upgrade the plug-in"
        raise PluginError(
            f"{describe(entry)} was written for API version {version}, this tsdfm-bench has {API_VERSION}: {remedy}"
        )
    check_fields(describe(entry), wanted, info)


def describe(entry: Entry) -> str:
    """Kind, name and owner, for messages."""
    return f"{_SINGULAR[entry.kind]} '{entry.name}' of {entry.owner}"


def one_line(error: BaseException, limit: int = 300) -> str:
    """Type and message of an exception on one line."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    text = f"{name}: {text}" if text else name
    return text if len(text) <= limit else text[: limit - 3] + "..."


def code_of(entry: Entry) -> list[str]:
    """Hashes of a plug-in's code: its local file, or its module or package, which is found without being imported.

    A package that is installed in editable form changes under one version. Built-ins change with their version: [].
    """
    return [] if entry.builtin else [hashlib.sha256(data).hexdigest() for data in _sources(entry)]


def _sources(entry: Entry) -> Iterator[bytes]:
    with contextlib.suppress(OSError, ValueError, ImportError):
        if not entry.version:
            yield Path(entry.target).read_bytes()
            return
        found = importlib.util.find_spec(entry.target.partition(":")[0].partition(".")[0])
        folders = list(found.submodule_search_locations or ()) if found is not None else []
        if found is not None and not folders and found.origin:
            yield Path(found.origin).read_bytes()
        for folder in folders:
            for path in sorted(Path(folder).rglob("*.py")):
                yield path.read_bytes()


def _shielded(who: str) -> contextlib.AbstractContextManager[None]:
    from tsdfm_bench.guard import shielded

    return shielded(who)


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _admitted() -> set[str] | None:
    """Distributions whose plug-ins may be used; None = all."""
    value = os.environ.get(SWITCH)
    if value is None:
        return None
    return {_canonical(name.strip()) for name in value.split(",") if name.strip()}


def _import_file(file: Path, index: int) -> Any:
    if not file.is_file():
        raise UsageError(f"no such plug-in file: {file}")
    if file.suffix != ".py":
        raise UsageError(f"--plugin takes a .py file, not {file.name}; installed plug-ins need no --plugin")
    name = f"tsdfm_bench_plugin_{index}_{re.sub(r'[^A-Za-z0-9_]', '_', file.stem)}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look their module up there
    try:
        with _shielded(f"plug-in file {file}"):
            spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a plug-in raises
        del sys.modules[name]
        return PluginError(f"plug-in file {file} cannot be imported: {one_line(error)}")
    groups = [kind.upper() for kind in KINDS]
    given = [group for group in groups if hasattr(module, group)]
    if not given:
        return PluginError(
            f"plug-in file {file} registers nothing: it needs METHODS = {{'name': Class}}, or {groups[1:]}"
        )
    for group in given:
        if not isinstance(getattr(module, group), Mapping):
            return PluginError(f"plug-in file {file}: {group} must be a dictionary of name -> class")
    return module
