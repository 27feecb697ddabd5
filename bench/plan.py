"""From a request to cells: what will be sampled, under which identity, and what cannot be, with the reason.

A cell is method x options x weights x task x length x steps x source x temperature x nucleus x draw x prefix x root
seed. Its id is the first 16 hex digits of the sha256 of the canonical JSON of exactly that (the weights by their hash,
the text by its hash): equal work has equal ids on every machine. The number of samples is not part of it, so asking for
more extends a cell. Reference rows (held-out text and canaries) are cells too; they have no sampling settings.

Nothing here loads a network: weights are identified by their hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tsdfm_bench.api import Identity, MethodInfo, ScorerInfo, TaskInfo
from tsdfm_bench.conditioning import check_pinning, pinning
from tsdfm_bench.errors import BenchError, CheckpointError, UsageError, unknown_name
from tsdfm_bench.guard import shielded
from tsdfm_bench.records import check_fields
from tsdfm_bench.registry import one_line
from tsdfm_bench.results.files import json_hash
from tsdfm_bench.spec import Spec

if TYPE_CHECKING:
    from tsdfm_bench.config import SweepConfig
    from tsdfm_bench.registry import Registry

PLAN_FORMAT = 1
COMMON_SOURCES = ("mask", "uniform", "unigram")
TOKENS_PER_BATCH = 4096
ORACLE = "oracle"  # the checkpoint that means: the task's exact predictions instead of a network
OTHER_HALF = "other half"  # a second, disjoint set of real text: what distances between samples are compared with


@dataclass(frozen=True)
class Cell:
    """What one row of results is a measurement of; every field is part of its identity.

    Args:
        kind: "method" or "reference".
        method: registered name, or the name of the reference.
        options: the method's own options, as given.
        weights: "sha256:..." or "none".
        task, tokenizer, data_hash: the text.
        length: tokens per sequence.
        steps: None for methods without steps and references.
        source: None for methods without one and references.
        temperature, draw: None for references.
        top_p, top_p_rule: None = no nucleus.
        prefix: what is pinned, see `pinning`; "" = nothing.
        seed: root seed.
        argument: what followed the colon of the name; where weights have a hash, it is not part of the identity.
    """

    kind: Literal["method", "reference"]
    method: str
    options: Mapping[str, str]
    weights: str
    task: str
    tokenizer: str
    data_hash: str
    length: int
    steps: int | None = None
    source: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_p_rule: str | None = None
    draw: str | None = None
    prefix: str = ""
    seed: int = 0
    argument: str = ""

    def identity(self) -> dict[str, Any]:
        """The fields as JSON values."""
        fields = {each: getattr(self, each) for each in _FIELDS} | {"options": dict(self.options)}
        if not self.argument or self.weights != "none":
            del fields["argument"]
        return fields

    @cached_property
    def id(self) -> str:
        """First 16 hex digits of the hash of the identity."""
        return json_hash(self.identity())[:16]

    @property
    def label(self) -> str:
        """Method and options, as shown in tables."""
        if self.hidden:
            return f"{self.method} ({OTHER_HALF})"
        return str(Spec(self.method, self.argument, self.options))

    @property
    def hidden(self) -> bool:
        """Whether it only serves as a reference for others and is no row of the table."""
        return self.kind == "reference" and "set" in self.options

    def describe(self) -> str:
        """Short name for progress and messages."""
        parts = [self.label, self.source or "", f"{self.steps} steps" if self.steps is not None else ""]
        parts.append(f"temp. {self.temperature:g}" if self.temperature not in (None, 1.0) else "")
        parts.append(f"top-p {self.top_p:g}" if self.top_p is not None else "")
        parts.append(self.draw if self.draw not in (None, "fp64") else "")
        return " · ".join(part for part in parts if part)


_FIELDS = tuple(Cell.__dataclass_fields__)


@dataclass(frozen=True)
class PlannedCell:
    """A cell and what is needed to run it.

    Args:
        cell: its identity.
        checkpoint: readable name of the weights.
        params: what `load` gets.
    """

    cell: Cell
    checkpoint: str = "none"
    params: Mapping[str, object] = field(default_factory=dict)

    @cached_property
    def group(self) -> str:
        """Cells with equal groups share one loaded method."""
        return json_hash({"method": self.cell.method, "weights": self.cell.weights, **self.params})


@dataclass(frozen=True)
class Rejected:
    """A requested combination that will not run: a row with its reason."""

    cell: Cell
    state: Literal["skipped", "failed"]
    reason: str


@dataclass(frozen=True)
class Plan:
    """All that a sweep will do.

    Args:
        config: the request.
        task: info of the task.
        cells: in order; references last.
        rejected: rows without work.
        batch_size: sequences per batch.
    """

    config: SweepConfig
    task: TaskInfo
    cells: tuple[PlannedCell, ...]
    rejected: tuple[Rejected, ...]
    batch_size: int

    @property
    def batches(self) -> int:
        """Batches per cell; whole ones, so that batch NNNN always holds the same sequences."""
        return -(-self.config.samples // self.batch_size)

    @property
    def length(self) -> int:
        """Tokens per sequence."""
        return self.config.length or self.task.length

    @property
    def short_hash(self) -> str:
        """Eight hex digits that name the default run folder: depends on what is sampled, not on how much."""
        cells = sorted(planned.cell.id for planned in self.cells)
        rejected = sorted(row.cell.id for row in self.rejected)
        return json_hash({"cells": cells, "rejected": rejected})[:8]

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.config.out or Path("runs") / f"{self.config.task.name}-{self.short_hash}"

    def request(self) -> dict[str, Any]:
        """What is sampled, as asked for: the frozen part of plan.json."""
        config = self.config
        return {
            "task": str(config.task),
            "tokenizer": self.task.tokenizer,
            "data_hash": self.task.data_hash,
            "length": self.length,
            "methods": sorted(map(str, config.methods)),
            "steps": sorted(config.steps),
            "sources": sorted(config.sources),
            "temperatures": sorted(config.temperatures),
            "top_p": sorted(config.top_p, key=lambda mass: mass or 0.0),
            "top_p_rule": config.top_p_rule,
            "draw": sorted(config.draw),
            "checkpoint": config.checkpoint and tidy_path(config.checkpoint),
            "prefix": pinning(config),
            "seed": config.seed,
        }


def tidy_path(text: str) -> str:
    """A path that says where something is without naming a user's folders: the last two parts of an absolute path."""
    path = Path(text).expanduser()
    return "/".join(path.parts[-2:]) if path.is_absolute() else text


def default_batch_size(length: int) -> int:
    """About 4,096 tokens, between 16 and 64 sequences."""
    return max(16, min(64, TOKENS_PER_BATCH // length))


def score_id(cell: str, info: ScorerInfo) -> str:
    """Identity of the scores of a cell: the cell, and everything about the scorer that changes an NLL."""
    about = asdict(info)
    for key in ("title", "licence", "parameters", "trained_on", "api_version"):
        del about[key]
    return json_hash({"cell": cell, **about})[:16]


def same_scorer(info: ScorerInfo) -> str:
    """The scorer's own part of `score_id`, stored with the scores."""
    return score_id("", info)


# ------------------------------------------------------------------------------------------------------ making


def make_plan(config: SweepConfig, registry: Registry, task: TaskInfo, batch_size: int | None = None) -> Plan:
    """Plan a sweep.

    Args:
        config: the request.
        registry: where names are looked up.
        task: info of the loaded task.
        batch_size: that of an existing run folder, or None.

    Raises:
        UsageError: unknown method, option or source; a prefix that does not fit.
        BenchError: no method of the request can be used at all.
    """
    length = config.length or task.length
    check_pinning(pinning(config), length)
    base = {
        "task": str(config.task),
        "tokenizer": task.tokenizer,
        "data_hash": task.data_hash,
        "length": length,
        "prefix": pinning(config),
        "seed": config.seed,
    }
    for spec in config.methods:
        if not registry.broken_files:
            registry.entry("methods", spec.name)
    classes = {str(spec): _class_of(spec, registry) for spec in config.methods}
    _check_sources(config.sources, [cls.info for cls in classes.values() if not isinstance(cls, BenchError)])
    cells: dict[str, PlannedCell] = {}
    rejected: dict[str, Rejected] = {}
    problems: list[BenchError] = []
    shown = _shown_arguments(config.methods)
    for spec in config.methods:
        named = base | {"argument": shown.get(spec.argument, "")}
        found, refused, errors = _method_cells(spec, classes[str(spec)], config, task, named)
        cells |= {planned.cell.id: planned for planned in found}
        rejected |= {row.cell.id: row for row in refused}
        problems += errors
    if not cells and problems:
        raise _first(problems, config)
    for reference in _references(config, registry, task, base):
        cells[reference.cell.id] = reference
    size = batch_size or config.batch_size or min(config.samples, default_batch_size(length))
    return Plan(config, task, tuple(cells.values()), tuple(rejected.values()), size)


def _first(problems: list[BenchError], config: SweepConfig) -> BenchError:
    """What to say if nothing can run: everything that is wrong; a wrong request if the weights were named in it."""
    text = "\n".join(dict.fromkeys(str(problem) for problem in problems))
    named = config.checkpoint is not None or any("checkpoint" in spec.options for spec in config.methods)
    wrong_use = named and all(isinstance(problem, CheckpointError) for problem in problems)
    return UsageError(text) if wrong_use else type(problems[0])(text)


def _class_of(spec: Spec, registry: Registry) -> Any:
    """The method's class, or the error that says why there is none."""
    try:
        return registry.load("methods", spec.name)
    except UsageError:
        raise
    except BenchError as error:
        return error


def _shown_arguments(specs: Iterable[Spec]) -> dict[str, str]:
    """What follows the colon -> how tables call it: without a user's folders, unless two would be called the same."""
    arguments = list(dict.fromkeys(spec.argument for spec in specs if spec.argument))
    tidy = [tidy_path(argument) for argument in arguments]
    return {full: short if tidy.count(short) == 1 else full for full, short in zip(arguments, tidy, strict=True)}


def _check_sources(requested: Iterable[str], infos: Iterable[MethodInfo]) -> None:
    known = {*COMMON_SOURCES, *(source for info in infos for source in info.sources)}
    for source in requested:
        if source not in known:
            raise unknown_name("source", source, known)


def _method_cells(
    spec: Spec, cls: Any, config: SweepConfig, task: TaskInfo, base: Mapping[str, Any]
) -> tuple[list[PlannedCell], list[Rejected], list[BenchError]]:
    """The cells of one method, its rows without work, and the errors behind those."""
    options = dict(spec.options)
    checkpoint = options.pop("checkpoint", config.checkpoint)
    bare = Cell("method", spec.name, options, "none", **base)
    if isinstance(cls, BenchError):
        return [], [Rejected(bare, "failed", str(cls))], [cls]
    info: MethodInfo = cls.info
    _check_options(spec.name, options, info)
    if spec.argument and not info.argument:
        raise UsageError(
            f"method '{spec.name}' takes nothing after a colon, asked for '{spec}'; options: NAME[key=value]"
        )
    if reason := _wrong_vocabulary(info, task):
        return [], [Rejected(bare, "skipped", reason)], []
    sources, missing = _sources_of(info, config.sources)
    rejected = [
        Rejected(
            replace(bare, source=source),
            "skipped",
            f"{spec.name} has no source '{source}'; it has: {', '.join(info.sources)}",
        )
        for source in missing
    ]
    if checkpoint == ORACLE and (reason := _no_oracle(cls, task)):
        return [], [Rejected(bare, "skipped", reason)], []
    cells: list[PlannedCell] = []
    problems: list[BenchError] = []
    for source in sources:
        params: dict[str, object] = {
            **options,
            "task": config.task.name,
            "vocab_size": task.vocab_size,
            "checkpoint": checkpoint,
            "source": source,
            "length": base["length"],
            **({"trust_pickle": True} if config.trust_pickle else {}),
            **({"name": spec.argument} if spec.argument else {}),
        }
        try:
            identity = Identity(ORACLE, task.law) if checkpoint == ORACLE else identify(cls, params)
            if reason := _too_few(cls, params, config.samples, str(spec)):
                rejected.append(Rejected(replace(bare, source=source, weights=identity.weights), "skipped", reason))
                continue
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a plug-in raises
            if info.stored and isinstance(error, UsageError):  # a wrong line in a file of samples: told before any work
                raise
            problem = error if isinstance(error, BenchError) else CheckpointError(f"{spec.name}: {one_line(error)}")
            problems.append(problem)
            rejected.append(Rejected(replace(bare, source=source), "failed", str(problem)))
            continue
        for steps, temperature, top_p, draw in product(
            config.steps if info.uses_steps else [None],
            [None] if info.stored else config.temperatures,
            [None] if info.stored else config.top_p,
            [None] if info.stored else config.draw,
        ):
            cell = replace(
                bare,
                weights=identity.weights,
                steps=steps,
                source=source,
                temperature=temperature,
                top_p=top_p,
                top_p_rule=config.top_p_rule if top_p is not None else None,
                draw=draw,
            )
            cells.append(PlannedCell(cell, tidy_path(identity.checkpoint), params))
    return cells, rejected, problems


def _check_options(name: str, options: Mapping[str, str], info: MethodInfo) -> None:
    for option, value in options.items():
        if option not in info.options:
            raise unknown_name(f"option of method {name}", option, [*info.options, "checkpoint"])
        allowed = info.options[option]
        if isinstance(allowed, tuple) and value not in allowed:
            raise unknown_name(f"{option} of method {name}", value, allowed)


def _too_few(cls: Any, params: Mapping[str, object], samples: int, name: str) -> str | None:
    """Why a method with stored samples cannot serve so many, or None."""
    if not cls.info.stored or not hasattr(cls, "stored_sequences"):
        return None
    with shielded(f"method '{name}'", cls):
        count = int(cls.stored_sequences(params))
    return f"{name} holds {count} samples, asked for {samples}: type --samples {count}" if samples > count else None


def _no_oracle(cls: Any, task: TaskInfo) -> str | None:
    """Why the task's exact predictions cannot stand in for a method's network, or None.

    Raises:
        UsageError: the task has none.
    """
    if not task.law:
        raise UsageError(
            f"task '{task.name}' has no exact law, so there is no oracle for it; tasks with one: markov, hmm, grammar, "
            f"product. (A folder of that name is meant? Type ./{ORACLE}.)"
        )
    if not hasattr(cls, "from_oracle"):
        return f"{cls.info.name} cannot take the task's exact predictions in place of a network (it has no from_oracle)"
    return None


def _wrong_vocabulary(info: MethodInfo, task: TaskInfo) -> str | None:
    if info.tokenizer not in ("task", task.tokenizer):
        return f"its tokenizer is {info.tokenizer}, the task's is {task.tokenizer}"
    if info.vocab_size not in (None, task.vocab_size):
        return f"it knows {info.vocab_size} tokens, the task has {task.vocab_size}"
    return None


def _sources_of(info: MethodInfo, requested: list[str]) -> tuple[list[str | None], list[str]]:
    """Sources to run and requested ones that the method lacks."""
    if not info.sources:
        return [None], []
    if not requested:
        return [info.sources[0]], []
    return [s for s in requested if s in info.sources], [s for s in requested if s not in info.sources]


def identify(cls: Any, params: Mapping[str, object]) -> Identity:
    """The identity of a method's weights: its own hook, or the hash of the file or folder named by `checkpoint`.

    Raises:
        CheckpointError: they do not exist or cannot be read.
        PluginError: the hook gives something else than names.
    """
    hook = getattr(cls, "identify", None)
    if hook is not None:
        who = f"method '{cls.info.name}'"
        with shielded(who, cls):
            identity = hook(params)
        if not isinstance(identity, Identity):
            raise CheckpointError(f"identify() returned a {type(identity).__name__}, not an Identity")
        check_fields(who, Identity, identity, "identity")
        return identity
    if params.get("checkpoint") is None:
        return Identity("none", "none")
    path = Path(str(params["checkpoint"])).expanduser()
    return Identity(str(params["checkpoint"]), f"sha256:{hash_path(path)}")


def hash_path(path: Path) -> str:
    """Sha256 of a file, or of the names and hashes of all files in a folder."""
    if not path.exists():
        raise CheckpointError(f"no such checkpoint: {path}")
    digest = hashlib.sha256()
    try:
        if path.is_file():
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            return digest.hexdigest()
        for file_path in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file_path.relative_to(path).as_posix()}\x1f{hash_path(file_path)}\x1e".encode())
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename or path}: {error.strerror}") from error
    return digest.hexdigest()


def _references(config: SweepConfig, registry: Registry, task: TaskInfo, base: Mapping[str, Any]) -> list[PlannedCell]:
    """Held-out text and the canaries of the task; with a distance among the metrics, more held-out text."""
    cells = [PlannedCell(Cell("reference", name, {}, "none", **base)) for name in task.references]
    if "real" in task.references and any("reference" in needs for needs in _needs(config, registry)):
        cells.append(PlannedCell(Cell("reference", "real", {"set": OTHER_HALF}, "none", **base)))
    return cells


def _needs(config: SweepConfig, registry: Registry) -> list[frozenset[str]]:
    """What the metrics need; one that cannot be imported needs nothing (it is reported when it is used)."""
    names = [spec.name for spec in config.metrics] if config.metrics is not None else registry.names("metrics")
    needs = []
    for name in names:
        try:
            needs.append(frozenset(registry.load("metrics", name).info.needs))
        except UsageError:
            raise
        except BenchError:
            continue
    return needs
