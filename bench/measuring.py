"""Measuring: from stored tokens and scores to numbers with intervals, one file per cell and metric.

A metric is a pure function of what is stored; the harness gives its statistics a bootstrap interval over sequences.
Per-sequence columns of the usual forms are stored too (`columns/<metric>/<cell>.npz`, see `results.columns`). What was
measured is kept under `measurements/<metric>/<cell>.json` together with the hash of everything it depends on
(number of sequences, scores, references, cost, version and code of the metric), so nothing is measured twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tsdfm_bench import __version__
from tsdfm_bench.api import (
    CellData,
    CostRecord,
    Infilling,
    Measurement,
    Metric,
    ScoreBatch,
    ScorerInfo,
    TrainingStreams,
)
from tsdfm_bench.conditioning import pinned_tokens
from tsdfm_bench.continuation import is_typed, prompt_length
from tsdfm_bench.errors import BenchError, PluginError, UsageError
from tsdfm_bench.guard import is_own, shielded
from tsdfm_bench.infilling import (
    ABOUT,
    ABOUT_FEATURES,
    ABOUT_TOKENS,
    ABOUT_UNITS,
    NO_SPANS,
    Filled,
    filled_places,
    is_infilling,
)
from tsdfm_bench.launch.batches import read_costs
from tsdfm_bench.meter import total
from tsdfm_bench.plan import same_scorer
from tsdfm_bench.registry import check_info, code_of, one_line
from tsdfm_bench.results.columns import Terms, columns_path, read_columns, write_columns
from tsdfm_bench.results.columns import terms as terms_of
from tsdfm_bench.results.files import json_hash, read_json, write_json
from tsdfm_bench.results.resampling import intervals
from tsdfm_bench.results.store import CorruptFile, RunFolder, read_arrow
from tsdfm_bench.scoring import Judge, head, read_tokens, stored_scores
from tsdfm_bench.texts import texts_of

if TYPE_CHECKING:
    from tsdfm_bench.api import Task
    from tsdfm_bench.console import Reporter
    from tsdfm_bench.plan import Cell
    from tsdfm_bench.registry import Registry
    from tsdfm_bench.results.stats import Interval
    from tsdfm_bench.spec import Spec


@dataclass
class Gauge:
    """One metric of a run.

    Args:
        spec: as asked for.
        metric: ready to compute, or None if it is broken.
        needs: of its info.
        code: hash of its version and source.
        broken: why it cannot be used, or "".
    """

    spec: Spec
    metric: Metric | None = None
    needs: frozenset[str] = frozenset()
    code: str = ""
    broken: str = ""


@dataclass
class Measured:
    """All numbers of one cell.

    Args:
        rows: fields of the summary that depend on the metric.
        failures: metric -> why it could not be computed.
        cost: of sampling, or None.
        without: scorer -> why its scores say nothing of this cell.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    cost: CostRecord | None = None
    without: dict[str, str] = field(default_factory=dict)


def find_gauges(
    specs: Sequence[Spec], registry: Registry, options: Mapping[str, Mapping[str, object]] | None = None
) -> list[Gauge]:
    """Make the metrics.

    Args:
        specs: as asked for.
        registry: where they are looked up.
        options: metric -> options of the request that are not part of its spec.

    Raises:
        UsageError: unknown metric or option.
    """
    return [_find(spec, registry, (options or {}).get(spec.name, {})) for spec in specs]


def _find(spec: Spec, registry: Registry, options: Mapping[str, object]) -> Gauge:
    entry = registry.entry("metrics", spec.name)
    try:
        cls = registry.load("metrics", spec.name)
        check_info(entry, cls.info)
        with shielded(f"metric '{spec}'", cls):
            metric = cls.load({**options, **spec.params()})
        code = json_hash(
            {
                "spec": str(spec),
                "options": {k: str(v) for k, v in options.items()},
                "owner": entry.owner,
                "source": code_of(entry) or _source_hash(cls),
            }
        )
        return Gauge(spec, metric, frozenset(cls.info.needs), code)
    except UsageError:
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a plug-in raises
        return Gauge(
            spec, broken=str(error) if isinstance(error, BenchError) else f"metric '{spec}': {one_line(error)}"
        )


def _source_hash(cls: Any) -> str:
    """Hash of the file a built-in class stands in, so that a changed metric measures again."""
    with contextlib.suppress(TypeError, OSError):
        return hashlib.sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest()
    return ""


class Measurer:
    """Measures the cells of a run.

    Args:
        folder, task: of the run.
        judges, gauges: its scorers and metrics.
        samples: sequences per row.
        batch_size: sequences per stored batch.
        seed: of the intervals and of metrics that draw.
        real, other: the cells of held-out text, if they are complete.
        damaged: told of damaged files before they count as missing; None = they stay where they are.
    """

    def __init__(
        self,
        folder: RunFolder,
        task: Task,
        judges: Sequence[Judge],
        gauges: Sequence[Gauge],
        samples: int,
        batch_size: int,
        seed: int,
        real: Cell | None,
        other: Cell | None,
        damaged: Callable[[CorruptFile], None] | None = None,
    ) -> None:
        self.folder, self.task, self.samples, self.batch_size, self.seed = folder, task, samples, batch_size, seed
        self.judges = [judge for judge in judges if not judge.problem]
        self.gauges = gauges
        self.real, self.other = real, other
        self._damaged = damaged or (lambda error: None)
        self._kept: dict[str, CellData] = {}
        self._prompts: dict[tuple[str, bool], np.ndarray | None] = {}

    def measure(self, cells: Sequence[Cell], reporter: Reporter) -> dict[str, Measured]:
        """Numbers of every cell, by id; what is stored is not computed again.

        Raises:
            StoreError: a file cannot be written.
        """
        result = {cell.id: Measured(cost=self._cost(cell)) for cell in cells}
        todo: list[tuple[Cell, Gauge, str]] = []
        task = f"task '{self.task.info.name}'"
        for cell in cells:
            for gauge in self.gauges:
                if gauge.metric is None:
                    result[cell.id].failures[str(gauge.spec)] = gauge.broken
                    continue
                key = self._key(cell, gauge)
                stored = self._stored(cell, gauge, key)
                if stored is None:
                    todo.append((cell, gauge, key))
                else:
                    result[cell.id].rows += stored
        if todo:
            with reporter.phase("measuring", len(todo), len(todo), "metrics") as phase:
                for cell, gauge, key in todo:
                    phase.doing(f"{gauge.spec}: {cell.describe()}")
                    try:
                        with shielded(task, self.task), shielded(f"metric '{gauge.spec}'", gauge.metric):
                            rows = self._compute(cell, gauge)
                    except CorruptFile as error:
                        self._damaged(error)
                        result[cell.id].failures[str(gauge.spec)] = str(error)
                    except KeyboardInterrupt:
                        raise
                    except BaseException as error:  # whatever a plug-in raises
                        text = str(error) if isinstance(error, BenchError) else one_line(error)
                        result[cell.id].failures[str(gauge.spec)] = f"metric '{gauge.spec}' failed: {text}"
                    else:
                        columns = columns_path(self.folder.root, str(gauge.spec), cell.id).exists()
                        write_json(self._path(cell, gauge), {"key": key, "rows": rows, "columns": columns})
                        result[cell.id].rows += rows
                    phase.advance(1, 1)
        for cell in cells:
            if is_infilling(cell.prefix):
                result[cell.id].without = self._without(cell)
        order = {str(gauge.spec): i for i, gauge in enumerate(self.gauges)}
        for measured in result.values():
            _merge(measured, order)
        return result

    # -------------------------------------------------------------------------------------------------- storage

    def _path(self, cell: Cell, gauge: Gauge) -> Path:
        return self.folder.measurement_path(str(gauge.spec), cell.id)

    def _stored(self, cell: Cell, gauge: Gauge, key: str) -> list[dict[str, Any]] | None:
        try:
            content = read_json(self._path(cell, gauge))
        except FileNotFoundError:
            return None
        except CorruptFile as error:
            self._damaged(error)
            return None
        rows = content.get("rows")
        if content.get("key") != key or not isinstance(rows, list):
            return None
        columns = columns_path(self.folder.root, str(gauge.spec), cell.id)
        if content.get("columns"):
            if not columns.exists():
                return None
            try:
                read_columns(columns)
            except CorruptFile as error:
                self._damaged(error)
                return None
        return rows

    def _key(self, cell: Cell, gauge: Gauge) -> str:
        """Hash of everything a measurement depends on."""
        scored = [cell, *(c for c in (self.real, self.other) if c is not None)] if gauge.needs else []
        infilled = {"infilled": ABOUT} if is_infilling(cell.prefix) else {}
        training = {} if gauge.needs or self._at_hand is None else {"training": self._at_hand.data_hash}
        return json_hash(
            {
                **infilled,
                **training,
                "cell": cell.id,
                "samples": self.samples,
                "prompt": prompt_length(cell.prefix, self.task),
                "batch_size": self.batch_size,
                "seed": self.seed,
                "metric": gauge.code,
                "harness": __version__,
                "real": [c.id if c is not None else None for c in (self.real, self.other)],
                "scores": [[j.name, self._scorer_of(j, c)] for j in self.judges for c in scored],
                "cost": json_hash(asdict(cost)) if "cost" in gauge.needs and (cost := self._cost(cell)) else "",
            }
        )

    def _scorer_of(self, judge: Judge, cell: Cell) -> str:
        if not self.folder.scores_path(judge.name, cell.id).exists() or cell.id in judge.failures:
            return ""
        return same_scorer(judge.info) if judge.info is not None else "unknown"

    def _without(self, cell: Cell) -> dict[str, str]:
        """Judges that have scored an infilling and do not say where their units lie, with that reason."""
        stored = {judge.name: self.folder.scores_path(judge.name, cell.id) for judge in self.judges}
        metas = {name: read_arrow(path, ["bytes"])[1] for name, path in stored.items() if path.exists()}
        return {name: NO_SPANS for name, meta in metas.items() if not meta.get("spans")}

    def _cost(self, cell: Cell) -> CostRecord | None:
        if cell.kind == "method" and cell.draw is None:  # samples made elsewhere: reading them is not what they cost
            return None
        costs = read_costs(self.folder, cell.id, self._damaged)
        return total(costs.values(), self.batch_size)

    # ------------------------------------------------------------------------------------------------ computing

    def _compute(self, cell: Cell, gauge: Gauge) -> list[dict[str, Any]]:
        assert gauge.metric is not None
        data = self._data(cell)
        try:
            found = gauge.metric.compute(data if is_own(gauge.metric) else _lent(data))
        except ValueError as error:
            if "read-only" not in str(error):
                raise
            raise PluginError(f"it writes into what all metrics are given ({error}): write into a copy") from error
        if not isinstance(found, list) or not all(isinstance(m, Measurement) for m in found):
            raise PluginError("compute() must return a list of Measurement")
        names = [(measurement.metric, measurement.scorer) for measurement in found]
        if len(set(names)) < len(names):
            raise PluginError("compute() returned two measurements with the same metric and scorer")
        clusters = self._clusters(cell)
        forms = [m for m in found if m.form]
        terms = [self._terms(m) for m in forms]
        over = "sequences" if clusters is None else "prompts"
        made = intervals(terms, clusters=clusters, over=over, seed=self.seed)
        known = {(m.metric, m.scorer): interval for m, interval in zip(forms, made, strict=True)}
        if terms:
            path = columns_path(self.folder.root, str(gauge.spec), cell.id)
            write_columns(path, [(m.metric, m.scorer, t) for m, t in zip(forms, terms, strict=True)], clusters)
        note = self._note(cell, gauge)
        return [self._row(gauge, m, known.get((m.metric, m.scorer)), note) for m in found]

    def _note(self, cell: Cell, gauge: Gauge) -> str:
        """What a definition has to say of what was given."""
        if is_infilling(cell.prefix) and "cost" not in gauge.needs:
            if "features" in gauge.needs:
                return ABOUT_FEATURES
            return ABOUT_UNITS if "scores" in gauge.needs else ABOUT_TOKENS
        given = prompt_length(cell.prefix, self.task)
        if not given or "cost" in gauge.needs:
            return ""
        part = "prompt and continuation together" if "features" in gauge.needs else "the continuation alone"
        return f"; after a prompt of {given} tokens, {part}"

    def _terms(self, m: Measurement) -> Terms:
        """The stored form of a measurement; it must give the value of the metric's own statistic."""
        try:
            found = terms_of(m.form, m.columns)
        except ValueError as error:
            raise PluginError(f"the measurement '{m.metric}': {error}") from error
        if m.statistic is not None and len(m.columns[0]):
            own, here = float(m.statistic(*m.columns)), float(found.value())
            if not (math.isclose(own, here, rel_tol=1e-9, abs_tol=1e-12) or (math.isnan(own) and math.isnan(here))):
                raise PluginError(f"the measurement '{m.metric}': its statistic gives {own}, its form {m.form} {here}")
        return found

    def _clusters(self, cell: Cell) -> np.ndarray | None:
        """(n,) the same number for sequences that continue the same held-out text; None if all are different."""
        if not cell.prefix.startswith(("held-out", "infill")):
            return None
        key = (cell.prefix, cell.hidden)
        if key not in self._prompts:
            pinned = pinned_tokens(cell, self.task, 0, self.samples, odd=cell.hidden)
            assert pinned is not None
            # A continuation depends on what it was given, an infilling on the whole sequence it was cut from.
            given = pinned[1].all(dim=0) if cell.prefix.startswith("held-out") else slice(None)
            names, index = np.unique(pinned[0][:, given].numpy(), axis=0, return_inverse=True)
            self._prompts[key] = None if len(names) == self.samples else index.ravel().astype(np.int64)
        return self._prompts[key]

    def _row(self, gauge: Gauge, m: Measurement, interval: Interval | None, note: str) -> dict[str, Any]:
        """Value and interval of one measurement as fields of the summary."""
        from tsdfm_bench.results.stats import bootstrap

        if interval is None and m.statistic is not None:
            interval = bootstrap(m.columns, m.statistic, seed=self.seed)
        why = m.reason
        if interval is not None:
            value, low, high, n, how = interval.value, interval.low, interval.high, interval.n, interval.description
        else:
            value = math.nan if m.value is None else float(m.value)
            low = math.nan if m.low is None else float(m.low)
            high = math.nan if m.high is None else float(m.high)
            n = len(m.columns[0]) if m.columns else self.samples
            how = "the metric's own" if m.low is not None else "no interval"
        n = m.n if m.n is not None else n
        bounded = math.isfinite(low) and math.isfinite(high)
        if not (m.metric and m.unit and m.definition):
            raise PluginError(f"the measurement '{m.metric}' lacks its name, unit or definition")
        if bounded and low > high:
            raise PluginError(f"the interval of '{m.metric}' is upside down: {low} > {high}")
        return {
            "from": str(gauge.spec),
            "metric": m.metric,
            "scorer": m.scorer,
            "value": _finite(value),
            "low": low if bounded else None,
            "high": high if bounded else None,
            "n": int(n) if n > 0 else None,
            "unit": m.unit,
            "definition": m.definition + note,
            "interval": how,
            "better": m.better,
            "reason": "" if math.isfinite(value) else why or f"the value is {value:g}",
        }

    def _data(self, cell: Cell) -> CellData:
        """What a metric sees of a cell; the last cell and the references stay in memory."""
        if cell.id not in self._kept:
            self._kept = {key: data for key, data in self._kept.items() if key.startswith("reference")}
            self._kept[cell.id] = self._read(cell)
        return self._kept[cell.id]

    def _read(self, cell: Cell) -> CellData:
        n, training = self.samples, self._training()
        samples = read_tokens(self.folder, cell.id, -(-n // self.batch_size))
        tokens, lengths = samples.tokens[:n], samples.lengths[:n]
        texts, prompt = texts_of(samples, self.task)[:n], None
        if given := prompt_length(cell.prefix, self.task):
            prompt, tokens = tokens[:, :given], np.ascontiguousarray(tokens[:, given:])
            lengths = np.maximum(lengths - given, 0)
            texts = self.task.decode(tokens, lengths)
        part, infilling = None, None
        if is_infilling(cell.prefix):
            part = Filled(tokens, lengths, texts, filled_places(cell, self.task, lengths), self.task)
            tokens, lengths, infilling = part.moved_together()
            texts = self.task.decode(tokens, lengths)
        scores: dict[str, ScoreBatch] = {}
        infos: dict[str, ScorerInfo] = {}
        for judge in self.judges:
            stored = stored_scores(self.folder, judge, cell.id) if cell.id not in judge.failures else None
            if stored is None or len(stored[0].nll) < n:
                continue
            found, info = head(stored[0], n), stored[1]
            if part is not None and found.spans is None:
                continue  # `_without` says why
            scores[judge.name] = found if part is None else part.scores(found, info.input == "ids")
            infos[judge.name] = info
        return CellData(
            tokens=tokens,
            lengths=lengths,
            texts=texts,
            vocab_size=self.task.info.vocab_size,
            scores=scores,
            scorer_info=infos,
            reference=None if self.real is None else self._reference(self.real),
            reference_other=None if self.other is None else self._reference(self.other),
            cost=self._cost(cell),
            seed=self.seed,
            law=getattr(self.task, "law", None) if self.task.info.law else None,
            training=None if training is None else lambda: _lent(training()),
            prompt=prompt,
            typed=prompt is not None and is_typed(cell.prefix),
            infilling=infilling,
        )

    @cached_property
    def _at_hand(self) -> TrainingStreams | None:
        """The training text of a task that need not have it at hand; None if it has not, or is another task."""
        at_hand = getattr(self.task, "training_at_hand", None)
        streams: TrainingStreams | None = None if at_hand is None else at_hand()
        return streams

    def _training(self) -> Callable[[], TrainingStreams] | None:
        """Gives the task's training text; None if it offers none, or has none at hand."""
        if not hasattr(self.task, "training_at_hand"):
            return getattr(self.task, "training_streams", None)
        streams = self._at_hand
        return None if streams is None else lambda: streams

    def _reference(self, cell: Cell) -> CellData:
        """A reference as its own record, without references of its own."""
        key = f"reference {cell.id}"
        if key not in self._kept:
            plain = Measurer(
                self.folder, self.task, self.judges, [], self.samples, self.batch_size, self.seed, None, None
            )
            self._kept[key] = plain._read(cell)
        return self._kept[key]


def _lent(value: Any) -> Any:
    """What was read, for one metric: copies, of which the arrays cannot be written into."""
    if isinstance(value, np.ndarray):
        copy = value.copy()
        copy.setflags(write=False)
        return copy
    if isinstance(value, list):
        return [_lent(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _lent(item) for key, item in value.items()}
    if isinstance(value, CellData | ScoreBatch | Infilling | CostRecord | TrainingStreams):
        return replace(value, **{each.name: _lent(getattr(value, each.name)) for each in fields(value)})
    return value


def _merge(measured: Measured, order: Mapping[str, int]) -> None:
    """Rows in the order of the metrics; a number that two metrics claim is the first one's, the other has failed."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in sorted(measured.rows, key=lambda row: order[row["from"]]):
        metric = row.pop("from")
        if rows.setdefault((row["metric"], row["scorer"]), row) is not row:
            measured.failures[metric] = f"metric '{metric}': '{row['metric']}' is another metric's number"
    measured.rows = list(rows.values())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
