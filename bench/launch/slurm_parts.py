"""What a sweep still lacks, as parts that the slurm launcher submits: samples by shard of a cell, scores by cell.

Only what was open at the last look is looked at again, so that a round over thousands of cells stays cheap. Weights are
seconds, as far as earlier runs have measured them (`tsdfm_bench.estimate`); nothing is timed on the submitting node,
which is rarely of the kind that the jobs run on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tsdfm_bench.estimate import Estimator
from tsdfm_bench.launch.cost import batch_work
from tsdfm_bench.launch.failures import record_failure, record_score_failure
from tsdfm_bench.launch.orders import sample_pieces, sample_works, score_pieces, score_works
from tsdfm_bench.launch.slurm_queue import SlurmError
from tsdfm_bench.launch.slurm_rounds import Part, Parts
from tsdfm_bench.launch.work import Piece, Work, pack, unit_name
from tsdfm_bench.scoring import judged

if TYPE_CHECKING:
    from tsdfm_bench.job import Job
    from tsdfm_bench.launch.slurm_settings import SlurmSettings
    from tsdfm_bench.plan import Cell, PlannedCell
    from tsdfm_bench.scoring import Judge
    from tsdfm_bench.sweep import Sweep

UNKNOWN_CALL_S = 0.05  # of a network call that nobody has timed
UNKNOWN_TEXT_S = 0.1
LEAST_S = 0.05
REPORT_S = 5.0
DEFAULT_THREADS = 2


class LostJob(SlurmError):
    """A cell's jobs ended again and again; another run may have more luck."""

    passing = True


class SweepParts(Parts):
    """See the module.

    Args:
        sweep, job: of the run.
        settings: of the slurm launcher.
    """

    def __init__(self, sweep: Sweep, job: Job, settings: SlurmSettings) -> None:
        self.sweep, self.job, self.settings = sweep, job, settings
        self.judges: dict[str, Judge] = {judge.name: judge for judge in sweep.judges if not judge.problem}
        self.estimator = Estimator(job, measure=False)
        self.cells = {planned.cell.id: planned.cell for planned in sweep.plan.cells}
        self.unsampled: list[PlannedCell] = list(sweep.plan.cells)
        self.unscored: dict[str, list[Cell]] = {
            name: judged(judge, list(self.cells.values()), sweep.hidden) for name, judge in self.judges.items()
        }
        self.refused: set[str] = set()
        self.gone: set[str] = set()

    def left(self) -> list[Part]:
        """Units that are not done and have not failed."""
        sweep = replace(self.sweep, plan=replace(self.sweep.plan, cells=tuple(self.unsampled)))
        pieces = sample_pieces(sweep, self.job, self._sample_s)
        waiting = {str(piece.unit["id"]) for piece in pieces}
        for planned in self.unsampled:
            if planned.cell.id not in waiting:
                self._settled(planned.cell)
        self.unsampled = [planned for planned in self.unsampled if planned.cell.id in waiting]
        parts = [self._sampling(piece) for piece in pieces]
        makers: dict[str, tuple[str, ...]] = {}
        for part in parts:
            id = str(part.piece.unit["id"])
            makers[id] = (*makers.get(id, ()), part.key)
        for name, judge in self.judges.items():
            cells = [cell for cell in self.unscored[name] if cell.id not in self.gone]
            if all(self.cells[cell.id].kind == "reference" for cell in self.comparable()):
                cells = []  # with nothing to compare, references are not worth their judges
            found = score_pieces(sweep, self.job, judge, cells, self._score_s)
            left = {str(piece.unit["id"]) for piece in found}
            self.unscored[name] = [cell for cell in cells if cell.id in left]
            parts += [self._scoring(piece, name, makers.get(str(piece.unit["id"]), ())) for piece in found]
        return parts

    def _settled(self, cell: Cell) -> None:
        """Nothing of a cell is left to be sampled: it is complete, refused or has failed."""
        if self.job.refusal(cell) or self.job.missing(cell):
            self.gone.add(cell.id)

    def comparable(self) -> list[Cell]:
        """Cells that are sampled or may still be."""
        return [cell for id, cell in self.cells.items() if id not in self.gone]

    def _sampling(self, piece: Piece) -> Part:
        cell = self.cells[str(piece.unit["id"])]
        name = cell.method if cell.kind == "method" else ""
        return Part(unit_name(cell.id, int(piece.unit["shard"])), "sample", piece, "methods", name, piece.weight)

    def _scoring(self, piece: Piece, judge: str, needs: tuple[str, ...]) -> Part:
        known = self.settings.overrides.get("scorers", {})
        name = judge if judge in known else self.judges[judge].spec.name
        key = unit_name(str(piece.unit["id"]), 0, judge)
        return Part(key, "score", piece, "scorers", name, piece.weight, needs)

    def _sample_s(self, planned: PlannedCell, batches: int) -> float:
        seconds = self.estimator.sampling_s(planned, batches)
        return max(
            LEAST_S * batches, batch_work(planned.cell) * batches * UNKNOWN_CALL_S if seconds is None else seconds
        )

    def _score_s(self, judge: Judge, cell: Cell, texts: int) -> float:
        rate = self.estimator.scorer_rate(judge)
        return max(LEAST_S, texts * (UNKNOWN_TEXT_S if rate is None else rate.seconds))

    # -------------------------------------------------------------------------------------------------------- jobs

    def works(self, parts: Sequence[Part], parameters: Mapping[str, Any], first: int) -> list[tuple[Work, list[Part]]]:
        """See `Parts.works`; several short cells become one job."""
        of_piece = {id(part.piece): part for part in parts}
        by_judge: dict[str, list[Piece]] = {}
        for part in parts:
            by_judge.setdefault(part.piece.group if part.stage == "score" else "", []).append(part.piece)
        threads = int(parameters.get("cpus_per_task") or self.sweep.config.threads or DEFAULT_THREADS)
        found: list[tuple[Work, list[Part]]] = []
        for judge, pieces in by_judge.items():
            packed = pack(pieces, self.settings.pack * 60)
            if judge:
                works = score_works(
                    self.sweep, self.job, self.judges[judge], packed, report_s=REPORT_S, threads=threads
                )
            else:
                works = sample_works(self.sweep, self.job, packed, REPORT_S, threads)
            for work, some in zip(works, packed, strict=True):
                stem = work.name.rpartition("-")[0]
                named = replace(work, name=f"{stem}-{first + len(found):05d}", seconds=work.weight)
                found.append((named, [of_piece[id(piece)] for piece in some]))
        return found

    def farewell(self, name: str) -> str:
        """See `Parts.farewell`."""
        root = self.sweep.folder.root
        return (
            f"  follow:     tsdfm-bench status {root} --watch\n"
            "  come back:  the same command again; it submits nothing twice\n"
            f"  cancel:     tsdfm-bench cancel {root}"
        )

    def give_up(self, part: Part, reason: str) -> None:
        """Leave the reason where every other failure is; the next run tries again."""
        cell = self.cells[str(part.piece.unit["id"])]
        error = LostJob(reason)
        if part.stage == "sample":
            record_failure(self.job, cell, error)
            self.gone.add(cell.id)
        else:
            judge = self.judges[part.piece.group]
            record_score_failure(self.job, judge.name, judge.spec.name, cell.id, error)
