"""Scoring: token NLLs of every cell by every scorer, stored once.

A scorer reads texts, so each cell's tokens are decoded by the task; one whose input is "ids" gets the tokens.
Texts are scored in the batches they were sampled in, so that a scorer sees the same texts together however the work was
split. Scores are valid for one scorer revision, dtype and windowing: their identity is stored with them, and other
scores are made again. A scorer whose files cannot be obtained is left out, with the reason, and the run goes on; a
scorer is only loaded if it has something to do.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tsdfm_bench.api import ScoreBatch, ScorerInfo
from tsdfm_bench.contract import check_scores
from tsdfm_bench.errors import AssetError, BenchError, PluginError, UsageError
from tsdfm_bench.plan import same_scorer, score_id
from tsdfm_bench.registry import check_info, one_line
from tsdfm_bench.results.store import (
    CorruptFile,
    RunFolder,
    Samples,
    StoreError,
    read_arrow,
    read_samples,
    read_scores,
    write_scores,
)

if TYPE_CHECKING:
    from tsdfm_bench.api import Scorer
    from tsdfm_bench.console import Phase, Reporter
    from tsdfm_bench.job import Job
    from tsdfm_bench.plan import Cell
    from tsdfm_bench.registry import Registry
    from tsdfm_bench.spec import Spec

SAVE_EVERY_S = 20.0
CPU_TEXTS = 16


@dataclass
class Judge:
    """One scorer of a run.

    Args:
        spec: as asked for; its text names the scorer in files and tables.
        info: what it is; None if it is not known without loading it.
        unavailable: why it cannot be obtained, or "".
        broken: why the plug-in cannot be used, or "".
        failures: cell id -> why that cell could not be scored.
    """

    spec: Spec
    info: ScorerInfo | None = None
    unavailable: str = ""
    broken: str = ""
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its name in files and tables."""
        return str(self.spec)

    @property
    def problem(self) -> str:
        """Why it gives no scores at all, or ""."""
        return self.unavailable or self.broken


def find_judges(specs: Sequence[Spec], registry: Registry) -> list[Judge]:
    """The scorers of a run, by name: nothing is fetched or loaded.

    Raises:
        UsageError: unknown scorer.
    """
    judges = []
    for spec in specs:
        judge = Judge(spec)
        registry.entry("scorers", spec.name)
        with _blamed(judge):
            registry.load("scorers", spec.name)
        judges.append(judge)
    return judges


def introduce(judges: Sequence[Judge], cells: Sequence[Cell], job: Job) -> None:
    """Let every scorer say what it is, and obtain the files of those that will have something to score.

    Raises:
        UsageError: a wrong option.
    """
    for judge in judges:
        if judge.broken:
            continue
        params = judge.spec.params()
        with _blamed(judge):
            cls = job.registry.load("scorers", judge.spec.name)
            if hasattr(cls, "of_task"):
                judge.info = cls.of_task(job.task, params, job.device).info
            elif hasattr(cls, "describe"):
                judge.info = cls.describe(params)
            elif isinstance(getattr(cls, "info", None), ScorerInfo):
                judge.info = cls.info
            if judge.info is not None:
                check_info(job.registry.entry("scorers", judge.spec.name), judge.info)
            if hasattr(cls, "fetch") and _todo(cells, judge, job):
                cls.fetch(params)


@contextlib.contextmanager
def _blamed(judge: Judge) -> Iterator[None]:
    """Put down to a scorer what goes wrong in the block; a wrong request is passed on."""
    try:
        yield
    except UsageError:
        raise
    except AssetError as error:
        judge.unavailable = str(error)
    except (Exception, SystemExit) as error:
        judge.broken = str(error) if isinstance(error, BenchError) else f"scorer '{judge.name}': {one_line(error)}"


# ----------------------------------------------------------------------------------------------------- scoring


def stored_scores(folder: RunFolder, judge: Judge, cell: str) -> tuple[ScoreBatch, ScorerInfo] | None:
    """Stored scores of a cell and the scorer that made them, or None if there are none of this scorer."""
    path = folder.scores_path(judge.name, cell)
    if not path.exists():
        return None
    scores = read_scores(path)
    if not _made_by(judge, scores.meta):
        return None
    units = [ids.astype(np.int64) for ids in scores.units]
    return ScoreBatch(scores.nll, units, scores.special, scores.bytes, scores.features), ScorerInfo(
        **scores.meta["scorer"]
    )


def read_tokens(folder: RunFolder, cell: str, batches: int) -> Samples:
    """All sequences of the first `batches` batches of a cell."""
    parts = [read_samples(folder.samples_path(cell, batch)) for batch in range(batches)]
    return Samples(np.concatenate([p.tokens for p in parts]), np.concatenate([p.lengths for p in parts]), {})


def score_cells(
    cells: Sequence[Cell], judges: Sequence[Judge], job: Job, reporter: Reporter, *, hidden: bool = True
) -> None:
    """Score what is not scored yet. Judges learn what went wrong.

    Args:
        cells: those whose samples are complete.
        judges: from `find_judges`.
        job: of the run.
        reporter: progress.
        hidden: also score the hidden cells by scorers that give no features.

    Raises:
        StoreError: a file cannot be written.
    """
    for judge in judges:
        if judge.broken:
            continue
        wanted = [c for c in cells if hidden or not c.hidden or judge.info is None or judge.info.features]
        todo = _todo(wanted, judge, job)
        if not todo:
            _recall(judge, wanted, job.folder)
            continue
        scorer = None if judge.unavailable else _load(judge, job)
        if scorer is None:
            continue
        if judge.info is None:
            judge.info = scorer.info
            todo = _todo(wanted, judge, job)
        texts = sum(job.batches - done for _, done in todo) * job.batch_size
        with reporter.phase(f"scoring, {judge.name}", texts, texts, "texts") as phase:
            for cell, done in todo:
                phase.doing(cell.describe())
                rest = (job.batches - done) * job.batch_size
                left = phase.expect(rest, rest)
                try:
                    _score_cell(cell, judge, scorer, job, done, phase)
                except StoreError as error:
                    if not isinstance(error, CorruptFile):
                        raise
                    judge.failures[cell.id] = str(error)
                except (Exception, SystemExit) as error:
                    judge.failures[cell.id] = str(error) if isinstance(error, BenchError) else one_line(error)
                left.drop()


def _todo(cells: Sequence[Cell], judge: Judge, job: Job) -> list[tuple[Cell, int]]:
    """Cells that lack scores, each with the number of batches that have some."""
    done = [(cell, _scored(job.folder, judge, cell, job.batch_size)) for cell in cells]
    return [(cell, count) for cell, count in done if count < job.batches]


def _scored(folder: RunFolder, judge: Judge, cell: Cell, batch_size: int) -> int:
    """How many batches of a cell have scores of this scorer; damaged scores count as none."""
    path = folder.scores_path(judge.name, cell.id)
    if not path.exists():
        return 0
    with contextlib.suppress(CorruptFile):
        table, meta = read_arrow(path, columns=["bytes"])
        if _made_by(judge, meta):
            return int(table.num_rows) // batch_size
    return 0


def _made_by(judge: Judge, meta: Mapping[str, Any]) -> bool:
    """Whether stored scores are this scorer's; if it is not loaded and does not say what it is, they are believed."""
    try:
        return judge.info is None or same_scorer(judge.info) == same_scorer(ScorerInfo(**meta["scorer"]))
    except (KeyError, TypeError):
        return False


def _recall(judge: Judge, cells: Sequence[Cell], folder: RunFolder) -> None:
    """A scorer whose files are gone but whose scores are all here is not missing."""
    judge.unavailable = ""
    if judge.info is None and cells:
        stored = stored_scores(folder, judge, cells[0].id)
        judge.info = stored[1] if stored is not None else None


def _load(judge: Judge, job: Job) -> Scorer | None:
    """The ready scorer, or None with the reason in the judge."""
    with _blamed(judge):
        cls, params = job.registry.load("scorers", judge.spec.name), judge.spec.params()
        of_task = hasattr(cls, "of_task")
        scorer: Scorer = cls.of_task(job.task, params, job.device) if of_task else cls.load(params, job.device)
        check_info(job.registry.entry("scorers", judge.spec.name), scorer.info)
        return scorer
    return None


def _score_cell(cell: Cell, judge: Judge, scorer: Scorer, job: Job, done: int, phase: Phase) -> None:
    """Score the batches of one cell that follow those `done` before, saving now and then."""
    stored = stored_scores(job.folder, judge, cell.id) if done else None
    parts = [head(stored[0], done * job.batch_size)] if stored is not None else []
    chunk = CPU_TEXTS if job.device == "cpu" else job.batch_size  # small, so that progress is seen; always the same
    saved_at = time.monotonic()
    for batch in range(done, job.batches):
        samples = read_samples(job.folder.samples_path(cell.id, batch))
        texts = _inputs(scorer.info, job, samples)
        for first in range(0, job.batch_size, chunk):
            some = texts[first : first + chunk]
            parts.append(check_scores(scorer.score(some), len(some)))
            phase.advance(len(some), len(some))
        if batch == job.batches - 1 or time.monotonic() - saved_at > SAVE_EVERY_S:
            parts = [_join(parts)]
            _save(job.folder, judge, cell, parts[0], scorer.info)
            saved_at = time.monotonic()


def _inputs(info: ScorerInfo, job: Job, samples: Samples) -> Sequence[Any]:
    """What a scorer is given of a batch: texts, or token ids (n int64 each)."""
    if info.input == "ids":
        pairs = zip(samples.tokens, samples.lengths, strict=True)
        return [np.asarray(row[:length], dtype=np.int64) for row, length in pairs]
    texts = job.task.decode(samples.tokens, samples.lengths)
    if len(texts) != job.batch_size:
        raise PluginError(f"the task decoded {job.batch_size} sequences into {len(texts)} texts")
    return texts


def _save(folder: RunFolder, judge: Judge, cell: Cell, scores: ScoreBatch, info: ScorerInfo) -> None:
    meta: Mapping[str, Any] = {"scorer": asdict(info), "score_id": score_id(cell.id, info)}
    path = folder.scores_path(judge.name, cell.id)
    write_scores(path, scores.nll, scores.units, scores.special, scores.bytes, scores.features, meta)


def head(scores: ScoreBatch, n: int) -> ScoreBatch:
    """The scores of the first n texts."""
    features = None if scores.features is None else scores.features[:n]
    return ScoreBatch(scores.nll[:n], scores.units[:n], scores.special[:n], scores.bytes[:n], features)


def _join(parts: Sequence[ScoreBatch]) -> ScoreBatch:
    features = [part.features for part in parts if part.features is not None]
    if features and len(features) != len(parts):
        raise PluginError("score returned features for some batches only")
    return ScoreBatch(
        [nll for part in parts for nll in part.nll],
        [units for part in parts for units in part.units],
        [special for part in parts for special in part.special],
        np.concatenate([part.bytes for part in parts]),
        np.concatenate(features) if features else None,
    )
