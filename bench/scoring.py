"""Scoring: token NLLs of every cell by every scorer, stored once.

A scorer reads texts, so each cell's tokens are decoded by the task; one whose input is "ids" gets the tokens.
Texts are scored in the batches they were sampled in, so that a scorer sees the same texts together however the work was
split. Scores are valid for one scorer revision, dtype and windowing: their identity is stored with them, and other
scores are made again. Of an infilling it is stored, too, where the units lie in the text. A scorer whose files cannot
be obtained is left out, with the reason, and the run goes on; a scorer is only loaded if it has something to do. One
that cannot judge is a wrong request if that is seen before sampling, and is left out if it is only seen when loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from tsdfm_bench.api import ScoreBatch, ScorerInfo
from tsdfm_bench.continuation import Known, cut, prompt_length, prompts_of
from tsdfm_bench.contract import check_scores
from tsdfm_bench.errors import AssetError, BenchError, PluginError, UsageError
from tsdfm_bench.guard import shielded
from tsdfm_bench.infilling import is_infilling
from tsdfm_bench.launch.batches import free
from tsdfm_bench.launch.failures import (
    judge_problem_path,
    memory_ran_out,
    read_failure,
    record_score_failure,
    score_failure_path,
)
from tsdfm_bench.launch.inline import Waiting
from tsdfm_bench.launch.leases import Holder, LeaseLost
from tsdfm_bench.launch.work import unit_name
from tsdfm_bench.plan import same_scorer, score_id
from tsdfm_bench.registry import check_info, one_line
from tsdfm_bench.results.store import (
    RECORDED,
    CorruptFile,
    RunFolder,
    Samples,
    StoreError,
    make_folder,
    read_arrow,
    read_samples,
    read_scores,
    remove,
    write_json,
    write_scores,
)
from tsdfm_bench.texts import pack, texts_of, unpack

if TYPE_CHECKING:
    from tsdfm_bench.api import Scorer
    from tsdfm_bench.console import Phase, Reporter
    from tsdfm_bench.job import Job
    from tsdfm_bench.launch.leases import Lease
    from tsdfm_bench.plan import Cell
    from tsdfm_bench.registry import Registry
    from tsdfm_bench.spec import Spec

SAVE_EVERY_S = 20.0
CPU_TEXTS = 16
RECORDED_VARIABLE = "TSDFM_BENCH_RECORDED"


@dataclass
class Judge:
    """One scorer of a run.

    Args:
        spec: as asked for; its text names the scorer in files and tables.
        info: what it is; None if it is not known without loading it.
        unavailable: why it cannot be obtained, or "".
        broken: why the plug-in cannot be used, or "".
        named: whether the request names it; one that is taken by default may be unavailable.
        failures: cell id -> why that cell could not be scored.
        prompts: units of the prompts it has read.
    """

    spec: Spec
    info: ScorerInfo | None = None
    unavailable: str = ""
    broken: str = ""
    named: bool = True
    failures: dict[str, str] = field(default_factory=dict)
    prompts: Known = field(default_factory=dict, repr=False)

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
    """Let every scorer say what it is, and obtain and check the files of those that will have something to score.

    Raises:
        UsageError: a wrong option, or a model that cannot judge.
    """
    for judge in judges:
        if judge.broken:
            continue
        params = judge.spec.params()
        with _blamed(judge):
            cls = job.registry.load("scorers", judge.spec.name)
            with shielded(f"scorer '{judge.name}'", cls):
                if hasattr(cls, "of_task"):
                    judge.info = cls.of_task(job.task, params, job.device).info
                elif hasattr(cls, "describe"):
                    judge.info = cls.describe(params)
                elif isinstance(getattr(cls, "info", None), ScorerInfo):
                    judge.info = cls.info
            if judge.info is not None:
                check_info(job.registry.entry("scorers", judge.spec.name), judge.info)
            obtain = getattr(cls, "check", None) or getattr(cls, "fetch", None)
            if obtain is not None and _todo(cells, judge, job):
                with shielded(f"scorer '{judge.name}'", cls):
                    obtain(params)


@contextlib.contextmanager
def _blamed(judge: Judge, *, late: bool = False) -> Iterator[None]:
    """Put down to a scorer what goes wrong in the block; a wrong request is passed on, unless work was done (late)."""
    try:
        yield
    except UsageError as error:
        if not late:
            raise
        judge.broken = str(error)
    except AssetError as error:
        judge.unavailable = str(error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a plug-in raises
        judge.broken = str(error) if isinstance(error, BenchError) else f"scorer '{judge.name}': {one_line(error)}"


# ----------------------------------------------------------------------------------------------------- scoring


def stored_scores(folder: RunFolder, judge: Judge, cell: str) -> tuple[ScoreBatch, ScorerInfo] | None:
    """Stored scores of a cell and the scorer that made them, or None if there are none of this scorer."""
    try:
        scores = read_scores(folder.scores_path(judge.name, cell))
    except FileNotFoundError:
        return None
    if not _made_by(judge, scores.meta):
        return None
    units = [ids.astype(np.int64) for ids in scores.units]
    found = ScoreBatch(scores.nll, units, scores.special, scores.bytes, scores.features, scores.spans)
    return found, ScorerInfo(**scores.meta["scorer"])


def read_tokens(folder: RunFolder, cell: str, batches: int) -> Samples:
    """All sequences of the first `batches` batches of a cell."""
    parts = [read_samples(folder.samples_path(cell, batch)) for batch in range(batches)]
    texts = [unpack(part) for part in parts]
    extra = pack([text for some in texts for text in some or ()]) if all(some is not None for some in texts) else {}
    return Samples(np.concatenate([p.tokens for p in parts]), np.concatenate([p.lengths for p in parts]), extra)


def unscored(cells: Sequence[Cell], judge: Judge, job: Job) -> list[tuple[Cell, int]]:
    """Cells that lack scores, each with the number of texts that are still to be scored.

    Failures that are remembered are left out. Damaged scores go to quarantine/ and count as none.
    """
    return [(cell, job.batches * job.batch_size - done) for cell, done in _todo(cells, judge, job)]


def score_cells(
    cells: Sequence[Cell], judges: Sequence[Judge], job: Job, reporter: Reporter, *, hidden: bool = True
) -> list[str]:
    """Score what is not scored yet, each cell under the lease of its scores. Judges learn what went wrong.

    Args:
        cells: those whose samples are complete.
        judges: from `find_judges`.
        job: of the run.
        reporter: progress.
        hidden: also score the hidden cells by scorers that give no features.

    Returns:
        names of the units that are left to other living processes; none if the job is patient.

    Raises:
        StoreError: a file cannot be written.
    """
    left: list[str] = []
    for judge in judges:
        if judge.broken:
            continue
        wanted = judged(judge, cells, hidden)
        for cell, _ in _todo(wanted, judge, job):
            if cell.kind == "reference":
                adopt(cell, judge, job)
        if _todo(wanted, judge, job):
            left += _score_by(judge, wanted, job, reporter)
        recall(judge, wanted, job)
    return left


def judged(judge: Judge, cells: Sequence[Cell], hidden: bool) -> list[Cell]:
    """The cells that concern a judge: hidden ones only if asked for, or if it gives features."""
    return [c for c in cells if hidden or not c.hidden or judge.info is None or judge.info.features]


def _score_by(judge: Judge, cells: Sequence[Cell], job: Job, reporter: Reporter) -> list[str]:
    """Let one judge score what is missing."""
    scorer = None if judge.unavailable else _load(judge, job)
    problem = judge_problem_path(job.folder, judge.name)
    if scorer is None:
        make_folder(problem.parent)
        write_json(problem, {"unavailable": judge.unavailable, "broken": judge.broken})
        return []
    remove(problem)
    judge.info = judge.info or scorer.info
    todo = _todo(cells, judge, job)
    texts = sum(job.batches * job.batch_size - done for _, done in todo)
    with reporter.phase(f"scoring, {judge.name}", texts, texts, "texts") as phase:
        waiting = Waiting(job)
        while todo:
            busy = [cell for cell, _ in todo if not _score_unit(cell, judge, scorer, job, phase, waiting)]
            todo = [(cell, 0) for cell in busy]
            if not waiting.again({unit_name(cell.id, scorer=judge.name) for cell in busy}, phase):
                break
    return [unit_name(cell.id, scorer=judge.name) for cell, _ in todo]


def _score_unit(cell: Cell, judge: Judge, scorer: Scorer, job: Job, phase: Phase, waiting: Waiting) -> bool:
    """Score what is missing of a cell; False if another process is at it."""
    unit = unit_name(cell.id, scorer=judge.name)
    rows = job.batches * job.batch_size
    rest = rows - _scored(job, judge, cell)
    left = phase.expect(rest, rest)
    if rest > 0:
        lease = job.leases.take(unit, doing=f"{judge.name}: {cell.describe()}", job=job.name)
        if isinstance(lease, Holder):
            waiting.held(unit, lease)
            return False
        with lease:
            failure = score_failure_path(job.folder, judge.name, cell.id)
            try:
                done = _scored(job, judge, cell)
                if done < rows:
                    remove(failure)
                    phase.doing(cell.describe())
                    _score_cell(cell, judge, scorer, job, done, phase, lease)
            except LeaseLost as error:
                job.say(f"{judge.name}, {cell.describe()}: {error}.")
                return False
            except CorruptFile as error:
                job.damaged(error)
                record_score_failure(job, judge.name, judge.spec.name, cell.id, error)
            except StoreError:
                raise
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # whatever a plug-in raises
                record_score_failure(job, judge.name, judge.spec.name, cell.id, error)
    left.drop()
    return True


def _todo(cells: Sequence[Cell], judge: Judge, job: Job) -> list[tuple[Cell, int]]:
    """Cells that lack scores and are worth a try, each with the number of texts that have some."""
    done = [(cell, _scored(job, judge, cell)) for cell in cells]
    rows = job.batches * job.batch_size
    return [(cell, count) for cell, count in done if count < rows and not _remembers(job, judge, cell)]


def _remembers(job: Job, judge: Judge, cell: Cell) -> bool:
    """Whether this judge failed on a cell for a reason that still holds."""
    mark = read_failure(score_failure_path(job.folder, judge.name, cell.id)).get("mark")
    return bool(mark) and not job.retry_failed and mark == job.mark("scorers", judge.spec.name)


def _scored(job: Job, judge: Judge, cell: Cell) -> int:
    """How many texts of a cell have scores of this scorer; damaged scores go to quarantine/ and count as none."""
    try:
        rows, meta = _head(job, judge, cell)
    except FileNotFoundError:
        return 0
    except CorruptFile as error:
        job.damaged(error)
        return 0
    told = "spans" in meta or not is_infilling(cell.prefix)  # before spans were kept, nobody asked for them
    return rows if told and _made_by(judge, meta) else 0


def _head(job: Job, judge: Judge, cell: Cell) -> tuple[int, Mapping[str, Any]]:
    """Rows and meta of a cell's score file; raises if there is none or it is damaged."""
    path = job.folder.scores_path(judge.name, cell.id)
    stat = path.stat()
    return _head_of(str(path), stat.st_mtime_ns, stat.st_ino, stat.st_size)


@lru_cache(maxsize=1 << 15)
def _head_of(path: str, changed_ns: int, inode: int, size: int) -> tuple[int, Mapping[str, Any]]:
    """Rows and meta of a score file, verified; read once as long as the file stays the same."""
    table, meta = read_arrow(path, columns=["bytes"])
    return int(table.num_rows), meta


def _made_by(judge: Judge, meta: Mapping[str, Any]) -> bool:
    """Whether stored scores are this scorer's; if it is not loaded and does not say what it is, they are believed."""
    try:
        return judge.info is None or same_scorer(judge.info) == same_scorer(ScorerInfo(**meta["scorer"]))
    except (KeyError, TypeError):
        return False


def recall(judge: Judge, cells: Sequence[Cell], job: Job) -> None:
    """Let a judge know what the run folder knows: its failures, its problems, and what it is.

    A scorer whose files are gone but whose scores are all here is not missing.
    """
    folder, rows = job.folder, job.batches * job.batch_size
    judge.failures.clear()
    lacking = [cell for cell in cells if _scored(job, judge, cell) < rows]
    if not lacking:
        judge.unavailable = ""
        if judge.info is None and cells:
            stored = stored_scores(folder, judge, cells[0].id)
            judge.info = stored[1] if stored is not None else None
        return
    problem = read_failure(judge_problem_path(folder, judge.name))
    judge.unavailable = judge.unavailable or str(problem.get("unavailable", ""))
    judge.broken = judge.broken or str(problem.get("broken", ""))
    if judge.problem:
        return
    for cell in lacking:
        reason = read_failure(score_failure_path(folder, judge.name, cell.id)).get("reason")
        judge.failures[cell.id] = str(reason) if reason else "it was not scored yet"


def _load(judge: Judge, job: Job) -> Scorer | None:
    """The ready scorer, or None with the reason in the judge."""
    with _blamed(judge, late=True):
        cls, params = job.registry.load("scorers", judge.spec.name), judge.spec.params()
        of_task = hasattr(cls, "of_task")
        with shielded(f"scorer '{judge.name}'", cls):
            scorer: Scorer = cls.of_task(job.task, params, job.device) if of_task else cls.load(params, job.device)
        check_info(job.registry.entry("scorers", judge.spec.name), scorer.info)
        return scorer
    return None


def texts_at_once(job: Job) -> int:
    """How many texts a scorer is given together; few on a CPU, so that progress is seen."""
    return CPU_TEXTS if job.device == "cpu" else job.batch_size


def _score_cell(cell: Cell, judge: Judge, scorer: Scorer, job: Job, done: int, phase: Phase, lease: Lease) -> None:
    """Score the texts of one cell that follow those `done` before, saving now and then.

    Texts are scored in chunks that never change, so that a scorer sees the same texts together after a restart. Of a
    text that continues a prompt, the scores of the continuation are kept.
    """
    chunk = texts_at_once(job)
    done -= done % job.batch_size % chunk
    stored = stored_scores(job.folder, judge, cell.id) if done else None
    parts = [head(stored[0], done)] if stored is not None else []
    done = done if stored is not None else 0
    rows = job.batches * job.batch_size
    given = prompt_length(cell.prefix, job.task)
    saved_at, digest = time.monotonic(), hashlib.sha256()
    for batch in range(job.batches):
        samples = read_samples(job.folder.samples_path(cell.id, batch))
        texts = _inputs(scorer.info, job, samples)
        prompts = _inputs(scorer.info, job, prompts_of(samples, given)) if given else []
        before = min(job.batch_size, max(0, done - batch * job.batch_size))
        _digest(digest, texts[:before])
        for first in range(before, job.batch_size, chunk):
            some = texts[first : first + chunk]
            scored = _in_memory(scorer, some, job)
            if not is_infilling(cell.prefix):
                scored = replace(scored, spans=None)
            if given:
                told = prompts[first : first + chunk]
                scored = cut(scored, told, judge.prompts, lambda new: _in_memory(scorer, new, job))
            parts.append(scored)
            _digest(digest, some)
            done += len(some)
            phase.advance(len(some), len(some))
            lease.tell(doing=f"{judge.name}: {cell.describe()}", done=done, of=rows, job=job.name)
            if done == rows or time.monotonic() - saved_at > SAVE_EVERY_S:
                parts = [_join(parts)]
                lease.check()
                _save(job.folder, judge, cell, parts[0], scorer.info, digest.hexdigest())
                saved_at = time.monotonic()


def _in_memory(scorer: Scorer, texts: Sequence[Any], job: Job) -> ScoreBatch:
    """Scores of some texts, in halves if memory does not hold them together."""
    try:
        with shielded(f"scorer '{scorer.info.name}'", scorer):
            found = scorer.score(texts)
        return check_scores(found, texts)
    except (Exception, SystemExit) as error:
        if len(texts) == 1 or not memory_ran_out(error):
            raise
    free(job.device, all=True)
    half = len(texts) // 2
    job.say(f"Memory ran out: {scorer.info.title} goes on with {half} texts at a time.")
    return _join([_in_memory(scorer, part, job) for part in (texts[:half], texts[half:])])


def _inputs(info: ScorerInfo, job: Job, samples: Samples) -> Sequence[Any]:
    """What a scorer is given of a batch: texts, or token ids (n int64 each)."""
    if info.input == "ids":
        pairs = zip(samples.tokens, samples.lengths, strict=True)
        return [np.asarray(row[:length], dtype=np.int64) for row, length in pairs]
    with shielded(f"task '{job.task.info.name}'", job.task):
        texts = texts_of(samples, job.task)
    if len(texts) != job.batch_size:
        raise PluginError(f"the task decoded {job.batch_size} sequences into {len(texts)} texts")
    return texts


def adopt(cell: Cell, judge: Judge, job: Job) -> bool:
    """Take over the scores of a reference row that were recorded with this repository, if they are of these texts.

    Held-out text and canaries are the same in every run of a task. What is taken over was scored by the same scorer
    (revision, dtype, window) on texts with the same hash, and says so in its meta. `TSDFM_BENCH_RECORDED=` (empty)
    switches it off.

    Returns:
        whether it was done.
    """
    recorded = RunFolder(RECORDED).scores_path(judge.name, cell.id)
    switched_off = os.environ.get(RECORDED_VARIABLE) == ""
    if judge.info is None or switched_off or not recorded.is_file():
        return False
    try:
        scores = read_scores(recorded)
        rows, texts = len(scores.nll), hashlib.sha256()
        if is_infilling(cell.prefix) and scores.spans is None:
            return False
        if not _made_by(judge, scores.meta) or _scored(job, judge, cell) >= rows or rows % job.batch_size:
            return False
        for batch in range(min(rows // job.batch_size, job.batches)):
            _digest(texts, _inputs(judge.info, job, read_samples(job.folder.samples_path(cell.id, batch))))
    except CorruptFile:
        return False  # it is scored as any other row is, and a damaged batch is found there
    if rows > job.batches * job.batch_size or texts.hexdigest() != scores.meta.get("texts"):
        return False
    units = [ids.astype(np.int64) for ids in scores.units]
    found = ScoreBatch(scores.nll, units, scores.special, scores.bytes, scores.features, scores.spans)
    _save(job.folder, judge, cell, found, judge.info, texts.hexdigest(), taken_over=True)
    return True


def taken_over(cells: Sequence[Cell], judges: Sequence[Judge], job: Job) -> list[str]:
    """Names of the judges some of whose scores were recorded with this repository rather than made in this run."""
    return [judge.name for judge in judges if any(_is_taken_over(cell, judge, job) for cell in cells)]


def _is_taken_over(cell: Cell, judge: Judge, job: Job) -> bool:
    try:
        return bool(_head(job, judge, cell)[1].get("taken_over"))
    except (FileNotFoundError, CorruptFile):
        return False


def _digest(hasher: hashlib._Hash, inputs: Sequence[Any]) -> None:
    """Add what a scorer is given to a hash, each text with its length."""
    for item in inputs:
        content = item.encode("utf-8", "surrogatepass") if isinstance(item, str) else np.asarray(item).tobytes()
        hasher.update(len(content).to_bytes(8, "little") + content)


def _save(
    folder: RunFolder,
    judge: Judge,
    cell: Cell,
    scores: ScoreBatch,
    info: ScorerInfo,
    texts: str,
    taken_over: bool = False,
) -> None:
    meta = {"scorer": asdict(info), "score_id": score_id(cell.id, info), "texts": texts, "taken_over": taken_over}
    if is_infilling(cell.prefix):
        meta["spans"] = scores.spans is not None
    path = folder.scores_path(judge.name, cell.id)
    write_scores(path, scores.nll, scores.units, scores.special, scores.bytes, scores.features, meta, scores.spans)


def head(scores: ScoreBatch, n: int) -> ScoreBatch:
    """The scores of the first n texts."""
    features = None if scores.features is None else scores.features[:n]
    spans = None if scores.spans is None else scores.spans[:n]
    return ScoreBatch(scores.nll[:n], scores.units[:n], scores.special[:n], scores.bytes[:n], features, spans)


def _join(parts: Sequence[ScoreBatch]) -> ScoreBatch:
    features = [part.features for part in parts if part.features is not None]
    if features and len(features) != len(parts):
        raise PluginError("score returned features for some batches only")
    spans = [part.spans for part in parts if part.spans is not None]
    if spans and len(spans) != len(parts):
        raise PluginError("score returned spans for some batches only")
    return ScoreBatch(
        [nll for part in parts for nll in part.nll],
        [units for part in parts for units in part.units],
        [special for part in parts for special in part.special],
        np.concatenate([part.bytes for part in parts]),
        np.concatenate(features) if features else None,
        [row for rows in spans for row in rows] if spans else None,
    )
