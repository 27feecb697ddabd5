"""How long a sweep will take: seconds of a network call, measured once, times the calls that are left.

A method is timed on a few calls at the sweep's own batch size and length, after a warm-up; a scorer on a few texts.
What was measured is kept in the cache folder under the weights, the settings that change the cost, the device and the
number of threads, so a second plan asks nobody. Costs that the run folder itself holds are better and are taken first.

The result is an estimate: steps that are skipped because nothing can change, and rows that leave a batch, are taken
into account only roughly (`expected_calls`), and computing the metrics is not included. Peak memory is measured in the
same calls: the device's, or on a CPU that of the whole process. It depends on how many positions one call has to draw,
and that on one over the number of steps; without steps, on the tokens that are kept. So it is measured twice and taken
to be linear; without steps the second time on a quarter of the length at least, lest what a process takes in by the
way counts as if it grew with every token. A peak that the run folder holds counts for cells with as many steps, or
between the most and the fewest steps of several.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdfm_bench import __version__
from tsdfm_bench.guard import shielded
from tsdfm_bench.results.files import StoreError, json_hash, read_json, write_json
from tsdfm_bench.results.store import CorruptFile

if TYPE_CHECKING:
    from tsdfm_bench.console import Reporter
    from tsdfm_bench.job import Job
    from tsdfm_bench.plan import Cell, PlannedCell
    from tsdfm_bench.scoring import Judge

TIMED_STEPS = 4
MEMORY = 4  # so many times the steps, or tokens, in the second measurement of memory; or one in so many of all tokens
TIMED_TOKENS = 12  # of methods without steps: one token a call
COSTS_READ = 3  # cells per network whose stored costs are looked at
BYTES_PER_TOKEN = 4
BYTES_PER_UNIT = 9  # NLL, id, whether it is special


@dataclass(frozen=True)
class Rate:
    """What a piece of work costs.

    Args:
        seconds: of a network call on a whole batch, or of a text.
        units: scored units per text, 0 for methods.
        features: bytes of features per text.
        origin: "this run", "an earlier measurement" or "measured now".
        peak_bytes: of memory while it was measured, 0 if unknown.
        extent: what that depends on (`_extent`); 0 if it holds for any.
        more_peak_bytes, more_extent: the same at another extent, 0 if it was not measured.
    """

    seconds: float
    units: float = 0.0
    features: int = 0
    origin: str = "measured now"
    peak_bytes: int = 0
    extent: float = 0.0
    more_peak_bytes: int = 0
    more_extent: float = 0.0

    def tells_peaks(self, group: Sequence[PlannedCell]) -> bool:
        """Whether `peak_at` knows more than the peak of cells unlike these."""
        return not self.extent or bool(self.more_extent) or all(_extent(p.cell) == self.extent for p in group)

    def peak_at(self, cell: Cell) -> int:
        """Bytes for a cell: linear through the two measurements, but not less than half of both."""
        if not (self.more_peak_bytes and self.extent != self.more_extent):
            return self.peak_bytes
        share = (_extent(cell) - self.more_extent) / (self.extent - self.more_extent)
        found = self.more_peak_bytes + share * (self.peak_bytes - self.more_peak_bytes)
        return round(max(found, min(self.peak_bytes, self.more_peak_bytes) / 2))


@dataclass(frozen=True)
class Estimate:
    """What is left of a sweep.

    Args:
        sampling_s: cell id -> seconds; None where the method could not be timed.
        scoring_s: scorer -> seconds; None where the scorer could not be timed.
        bytes: of disk that will be added, about.
        device, threads: what the seconds are for.
        notes: what could not be timed, with the reason.
        sampling_peak_bytes, scoring_peak_bytes: of memory, the largest of all that was measured; None if nothing was.
    """

    sampling_s: Mapping[str, float | None]
    scoring_s: Mapping[str, float | None]
    bytes: int
    device: str
    threads: int
    notes: Sequence[str] = ()
    sampling_peak_bytes: int | None = None
    scoring_peak_bytes: int | None = None

    @property
    def seconds(self) -> float:
        """Of one process doing all that could be timed."""
        return sum(s or 0.0 for s in (*self.sampling_s.values(), *self.scoring_s.values()))

    @property
    def complete(self) -> bool:
        """Whether everything could be timed."""
        return None not in (*self.sampling_s.values(), *self.scoring_s.values())

    @property
    def gpu_hours(self) -> float | None:
        """The same in hours of one GPU; None if the device is none."""
        return None if self.device == "cpu" else self.seconds / 3600

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "seconds": self.seconds, "complete": self.complete, "gpu_hours": self.gpu_hours}


def cache_folder() -> Path:
    """Where measurements are kept: `TSDFM_BENCH_CACHE`, or tsdfm-bench in the platform's cache folder."""
    if explicit := os.environ.get("TSDFM_BENCH_CACHE"):
        return Path(explicit).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "tsdfm-bench"
    local = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    return (Path(local) if local else Path.home() / ".cache") / "tsdfm-bench"


@dataclass
class Estimator:
    """Times what is left of a sweep.

    Args:
        job: of the run.
        measure: time what is not known yet; otherwise it stays unknown.
        cache: folder of kept measurements.
        notes: why something could not be timed.
    """

    job: Job
    measure: bool = True
    cache: Path = field(default_factory=cache_folder)
    notes: list[str] = field(default_factory=list)
    _known: dict[str, Rate | None] = field(default_factory=dict)

    def estimate(
        self,
        missing: Sequence[tuple[PlannedCell, int]],
        scoring: Mapping[str, int],
        judges: Sequence[Judge],
        reporter: Reporter | None = None,
    ) -> Estimate:
        """Seconds and bytes of what is missing.

        Args:
            missing: cells, each with the batches to be made.
            scoring: scorer -> texts to be scored.
            judges: the scorers.
            reporter: shows the timing.
        """
        from tsdfm_bench.meter import device_name

        networks: dict[str, list[PlannedCell]] = {}
        for planned, _ in missing:
            if planned.cell.kind == "method":
                networks.setdefault(self._method_key(planned), []).append(planned)
        with _phase(reporter, self._untimed(networks, scoring, judges)) as doing:
            for group in networks.values():
                doing(group[0].cell.method)
                self.rate(group[0], group)
            for judge in judges:
                if scoring.get(judge.name):
                    doing(judge.name)
                    self.scorer_rate(judge)
        sampling = {planned.cell.id: self.sampling_s(planned, batches) for planned, batches in missing}
        scored: dict[str, float | None] = {}
        stored = sum(batches * self._batch_bytes(planned.cell.length) for planned, batches in missing)
        for judge in judges:
            texts = scoring.get(judge.name, 0)
            rate = self.scorer_rate(judge) if texts else Rate(0.0)
            scored[judge.name] = None if rate is None else texts * rate.seconds
            if rate is not None:
                stored += round(texts * (rate.units * BYTES_PER_UNIT + rate.features))
        device = device_name(self.job.device)
        methods = [
            rate.peak_at(planned.cell)
            for group in networks.values()
            if (rate := self.rate(group[0], group)) is not None
            for planned in group
        ]
        scorers = [
            rate.peak_bytes
            for judge in judges
            if scoring.get(judge.name) and (rate := self.scorer_rate(judge)) is not None
        ]
        return Estimate(
            sampling,
            scored,
            stored,
            device,
            self.job.threads,
            tuple(dict.fromkeys(self.notes)),
            max(filter(None, methods), default=None),
            max(filter(None, scorers), default=None),
        )

    def sampling_s(self, planned: PlannedCell, batches: int) -> float | None:
        """Seconds of so many batches of a cell; None if the method could not be timed."""
        from tsdfm_bench.launch.cost import expected_calls

        if planned.cell.kind == "reference":
            return 0.0
        rate = self.rate(planned, [planned])
        return None if rate is None else batches * rate.seconds * expected_calls(planned.cell)

    def _batch_bytes(self, length: int) -> int:
        return self.job.batch_size * (length * BYTES_PER_TOKEN + 4) + 1024

    def _untimed(self, networks: Iterable[str], scoring: Mapping[str, int], judges: Sequence[Judge]) -> int:
        wanted = [*networks]
        wanted += [self._scorer_key(judge) for judge in judges if scoring.get(judge.name)]
        return sum(1 for key in wanted if self._kept(key) is None) if self.measure else 0

    # ------------------------------------------------------------------------------------------------- methods

    def rate(self, planned: PlannedCell, group: Sequence[PlannedCell]) -> Rate | None:
        """Seconds of one call of a method's first network on a batch; None if it could not be timed.

        Args:
            planned: a cell of the method.
            group: cells that share its network, whose stored costs count.
        """
        key = self._method_key(planned)
        if key not in self._known:
            stored = self._stored_rate(group)
            found = stored if stored is not None and stored.peak_bytes else self._kept(key)
            if self.measure and (found is None or not found.tells_peaks(group)):
                found = self._timed(key, planned.cell.label, lambda: self._time_method(planned, group)) or found
            if found is not None and stored is not None:
                found = replace(found, seconds=stored.seconds, origin=stored.origin)
            self._known[key] = found or stored
        return self._known[key]

    def _method_key(self, planned: PlannedCell) -> str:
        cell = planned.cell
        about = {"group": planned.group, "length": cell.length, "steps": cell.steps is None, "draw": cell.draw, "v": 3}
        return self._key("method", about | {"batch_size": self.job.batch_size})

    def _stored_rate(self, group: Sequence[PlannedCell]) -> Rate | None:
        """From the costs that the run folder holds, if they were measured on this device.

        Its peak is 0 if those costs do not tell it for the whole group.
        """
        from tsdfm_bench.launch.batches import read_costs
        from tsdfm_bench.meter import measured_on

        seconds, calls, looked, peaks = 0.0, 0, 0, dict[float, int]()
        for planned in group:
            if looked == COSTS_READ:
                break
            with contextlib.suppress(CorruptFile):
                costs = read_costs(self.job.folder, planned.cell.id).values()
                looked += bool(costs)
                for cost in costs:
                    if cost.device == measured_on(self.job.device):
                        seconds += cost.seconds
                        calls += next(iter(cost.calls.values()), 0)
                        extent = _extent(planned.cell)
                        peaks[extent] = max(peaks.get(extent, 0), cost.peak_memory_bytes)
        if not calls:
            return None
        rate = Rate(seconds / calls, origin="this run")
        most, least = max(peaks), min(peaks)
        if any(not least <= _extent(planned.cell) <= most for planned in group):
            return rate
        return replace(rate, peak_bytes=peaks[most], extent=most, more_peak_bytes=peaks[least], more_extent=least)

    def _time_method(self, planned: PlannedCell, group: Sequence[PlannedCell]) -> Rate:
        import torch

        from tsdfm_bench.launch.cost import expected_calls
        from tsdfm_bench.meter import Meter

        job, cell = self.job, planned.cell
        cls = job.registry.load("methods", cell.method)
        short = _shortened(min(group, key=_steps).cell)
        with shielded(f"method '{cell.label}'", cls):
            method = cls.load(dict(planned.params), job.device)
            meter = Meter(method.networks(), job.device)
        with shielded(f"method '{cell.label}'", cls), torch.no_grad():
            method.sample(_request(job, short, min(2, job.batch_size)))
            with meter.measure(job.batch_size) as cost:
                method.sample(_request(job, short, job.batch_size))
            calls = next(iter(cost.calls.values()), 0) or expected_calls(short)
            rate = Rate(cost.seconds / calls, peak_bytes=cost.peak_memory_bytes, extent=_extent(short))
            longer = _shortened(max(group, key=_steps).cell, for_memory=True)
            if _extent(longer) == _extent(short):
                return rate
            with meter.measure(job.batch_size) as more:
                method.sample(_request(job, longer, job.batch_size))
        return replace(rate, more_peak_bytes=more.peak_memory_bytes, more_extent=_extent(longer))

    # ------------------------------------------------------------------------------------------------- scorers

    def scorer_rate(self, judge: Judge) -> Rate | None:
        """Seconds of one text; None if the scorer could not be timed. Nothing is fetched for that."""
        key = self._scorer_key(judge)
        if key not in self._known:
            self._known[key] = self._kept(key)
            if self._known[key] is None and self.measure and not judge.problem:
                self._known[key] = self._timed(key, judge.name, lambda: self._time_scorer(judge))
        return self._known[key]

    def _scorer_key(self, judge: Judge) -> str:
        info = self.job.task.info
        return self._key("scorer", {"scorer": judge.name, "task": info.name, "data": info.data_hash})

    def _time_scorer(self, judge: Judge) -> Rate:
        from tsdfm_bench.meter import Meter
        from tsdfm_bench.rng import Streams
        from tsdfm_bench.scoring import texts_at_once

        job = self.job
        cls = job.registry.load("scorers", judge.spec.name)
        with _offline(), shielded(f"scorer '{judge.name}'", cls):
            if hasattr(cls, "fetch"):
                cls.fetch(judge.spec.params())
            scorer = cls.load(judge.spec.params(), job.device)
        length = job.task.info.length
        count = texts_at_once(job)
        batch = job.task.reference("real", Streams.of(0, "timing", count, 0, "cpu"), length)
        texts = job.task.decode(batch.tokens.numpy(), batch.lengths.numpy())
        with shielded(f"scorer '{judge.name}'", cls):
            scorer.score(texts[:2])
            with Meter({}, job.device).measure(count) as cost:
                scores = scorer.score(texts)
        units = sum(len(nll) for nll in scores.nll) / count
        features = 0 if scores.features is None else scores.features[0].nbytes
        return Rate(cost.seconds / count, units, features, peak_bytes=cost.peak_memory_bytes)

    # ------------------------------------------------------------------------------------------------- storage

    def _timed(self, key: str, who: str, measure: Callable[[], Rate]) -> Rate | None:
        """Measure and keep; what goes wrong will be reported by the run itself."""
        try:
            rate = measure()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a plug-in raises
            first = next(iter(str(error).splitlines()), "").removesuffix("Tried:").strip() or type(error).__name__
            self.notes.append(f"{who} could not be timed: {first}")
            return None
        with contextlib.suppress(StoreError):  # a cache that cannot be written is no cache
            write_json(self._path(key), asdict(rate))
        return rate

    def _kept(self, key: str) -> Rate | None:
        try:
            stored: dict[str, Any] = dict(read_json(self._path(key)))
            return Rate(**stored | {"origin": "an earlier measurement"})
        except (StoreError, TypeError):
            return None

    def _key(self, kind: str, about: Mapping[str, Any]) -> str:
        from tsdfm_bench.meter import measured_on

        where = {"device": measured_on(self.job.device), "threads": self.job.threads, "version": __version__}
        return json_hash({"kind": kind, **about, **where})[:24]

    def _path(self, key: str) -> Path:
        return self.cache / "timing" / f"{key}.json"


@contextlib.contextmanager
def _phase(reporter: Reporter | None, count: int) -> Iterator[Callable[[str], None]]:
    if reporter is None or not count:
        yield lambda text: None
        return
    with reporter.phase("timing", count, count, "networks") as phase:
        started: list[str] = []

        def doing(text: str) -> None:
            if started:
                phase.advance(1, 1)
            started.append(text)
            phase.doing(text)

        yield doing
        phase.advance(1, 1)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Nothing is fetched in the block."""
    names = ("TSDFM_BENCH_OFFLINE", "HF_HUB_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _extent(cell: Cell) -> float:
    """What a peak of memory is linear in: 1 / steps, or the tokens of a method without steps."""
    return float(cell.length) if cell.steps is None else 1 / cell.steps


def _steps(planned: PlannedCell) -> int:
    return planned.cell.steps or planned.cell.length


def _shortened(cell: Cell, for_memory: bool = False) -> Cell:
    """The cell with few steps, or without steps with few tokens; more of both for the second measurement of memory."""
    if cell.steps is None:
        tokens = max(TIMED_TOKENS * MEMORY, cell.length // MEMORY) if for_memory else TIMED_TOKENS
        return replace(cell, length=min(tokens, cell.length), prefix="")
    return replace(cell, steps=min(TIMED_STEPS * (MEMORY if for_memory else 1), cell.steps), prefix="")


def _request(job: Job, cell: Cell, rows: int) -> Any:
    from tsdfm_bench.api import SampleRequest
    from tsdfm_bench.rng import Streams

    return SampleRequest(
        streams=Streams.of(cell.seed, "timing", rows, 0, job.device),
        length=cell.length,
        steps=cell.steps,
        temperature=1.0 if cell.temperature is None else cell.temperature,
        top_p=cell.top_p,
        top_p_rule="exclusive" if cell.top_p_rule == "exclusive" else "inclusive",
        source=cell.source,
        draw="legacy-fp32" if cell.draw == "legacy-fp32" else "fp64",
    )
