"""One job as a JSON file: all that a process on another node needs to do a part of a sweep or of a training.

A job file holds names, numbers and paths, never objects: nothing is unpickled, and the file can be read by eye. It says
which versions wrote it; a worker of other versions refuses it, because its numbers could differ (`VersionSkew`). Units
of a job are independent of each other and of other jobs; each is done under its own lease, and what is already stored
is not made again, so a job may be run twice, at once or after half of it was done.

    kind "sample"   units = {cell: identity, checkpoint, params, shard}: some batches of some cells
    kind "score"    `scorer`, units = {cell: identity}: the scores of some cells by one scorer
    kind "train"    `recipe`, `stage`, `out`: one network

A shard is a fixed block of `SHARD_BATCHES` batches of a cell. Most cells have one.
"""

from __future__ import annotations

import os
import platform
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tsdfm_bench import __version__
from tsdfm_bench.errors import BenchError
from tsdfm_bench.results.files import check_name, read_json, slug, write_json

if TYPE_CHECKING:
    from tsdfm_bench.results.store import RunFolder

FORMAT = 1
JOBS_PER_FOLDER = 100
SHARD_BATCHES = 32


class VersionSkew(BenchError):
    """A job was written by other versions than those of this worker."""


@dataclass(frozen=True)
class Work:
    """One job.

    Args:
        kind: what the worker does.
        name: unique within a launch, a file name.
        title: what a person is shown.
        folder: absolute path of the run folder (of the checkpoints, for a training).
        settings: of the run, see `orders.settings_of`.
        units: see the module; empty for a training.
        scorer: as asked for (kind "score").
        stage: kind "train": recipe, stage, minutes.
        needs: names of works of the same launch that must have ended before.
        weight: expected cost, in units of one network call on a batch; only comparable within a launch.
        seconds: expected seconds, if a calibration knows.
        resources: what it needs: {"gpus": 0 or 1, "cpus": n}; more keys are a scorer's or method's own.
        versions: of whoever wrote it; filled by `here`.
    """

    kind: Literal["sample", "score", "train"]
    name: str
    title: str
    folder: str
    settings: Mapping[str, Any]
    units: Sequence[Mapping[str, Any]] = ()
    scorer: str = ""
    stage: Mapping[str, Any] = field(default_factory=dict)
    needs: Sequence[str] = ()
    weight: float = 1.0
    seconds: float | None = None
    resources: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {"format": FORMAT, **{each.name: getattr(self, each.name) for each in fields(self)}}


def versions_here() -> dict[str, str]:
    """What numbers depend on and must be equal in the submitter and the worker."""
    found = {"tsdfm-bench": __version__, "python": ".".join(platform.python_version_tuple()[:2])}
    try:
        found["torch"] = version("torch")
    except PackageNotFoundError:
        found["torch"] = "none"
    return found


def check_versions(work: Work) -> None:
    """Raise `VersionSkew`, naming both sides, unless this process has the versions of the one that wrote the work."""
    here = versions_here()
    differing = [name for name in here if work.versions.get(name) != here[name]]
    if differing:
        there = ", ".join(f"{name} {work.versions.get(name, 'unknown')}" for name in differing)
        mine = ", ".join(f"{name} {here[name]}" for name in differing)
        raise VersionSkew(
            f"{work.name} was submitted with {there}, but this worker has {mine}: their numbers could differ. "
            "Use the same environment on both sides, or submit again with this one."
        )


class Launch:
    """The files of one launch: `jobs/<id>/<hundred>/<job>.{json,progress.json,result.json,log}`.

    Args:
        folder: jobs/<id>.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, int] = {}

    @classmethod
    def new(cls, jobs_folder: Path, launcher: str) -> Launch:
        """A launch with an id of its own; nothing is written yet."""
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        return cls(jobs_folder.resolve() / check_name(f"{launcher}-{stamp}-{secrets.token_hex(2)}"))

    @property
    def id(self) -> str:
        """Its name in `jobs/`."""
        return self.folder.name

    def write(self, works: Iterable[Work]) -> list[Path]:
        """Write the job files, with the versions of this process; returns their paths in order."""
        paths = []
        for work in works:
            stamped = replace(work, versions=versions_here())
            path = self.path(work.name)
            write_json(path, stamped.to_json())
            paths.append(path)
        return paths

    def path(self, name: str) -> Path:
        """The job file of a work; a hundred jobs share a folder."""
        place = self._places.setdefault(check_name(name, "job"), len(self._places))
        return self.folder / f"{place // JOBS_PER_FOLDER:02d}" / f"{name}.json"


def progress_path(job_file: str | os.PathLike[str]) -> Path:
    """Where the worker of a job says how far it is."""
    return Path(job_file).with_suffix(".progress.json")


def result_path(job_file: str | os.PathLike[str]) -> Path:
    """Where the worker of a job leaves what `work` returned."""
    return Path(job_file).with_suffix(".result.json")


def log_path(job_file: str | os.PathLike[str]) -> Path:
    """Where a launcher sends what the worker of a job prints."""
    return Path(job_file).with_suffix(".log")


def read_work(job_file: str | os.PathLike[str]) -> Work:
    """The work of a job file.

    Raises:
        CorruptFile: truncated or altered.
        VersionSkew: of a format this version does not know.
    """
    content: dict[str, Any] = dict(read_json(job_file))
    found = content.pop("format", None)
    if found != FORMAT:
        there = dict(content.get("versions") or {}).get("tsdfm-bench", "unknown")
        raise VersionSkew(
            f"{job_file} has format {found} (tsdfm-bench {there}), this worker (tsdfm-bench {__version__}) reads "
            f"format {FORMAT}: use the same version on both sides"
        )
    return Work(**content)


# ------------------------------------------------------------------------------------------------------ units


def unit_name(cell: str, shard: int = 0, scorer: str = "") -> str:
    """The name under which a unit is leased: a shard of a cell, or the scores of a cell by one scorer."""
    if scorer:
        return f"{cell}-by-{slug(scorer)}"
    return f"{cell}-{shard:04d}" if shard else cell


def shard_batches(batches: int) -> list[tuple[int, range]]:
    """The shards of a cell with so many batches, each with its batches."""
    firsts = range(0, batches, SHARD_BATCHES)
    return [(first // SHARD_BATCHES, range(first, min(first + SHARD_BATCHES, batches))) for first in firsts]


# ---------------------------------------------------------------------------------------------------- packing


@dataclass(frozen=True)
class Piece:
    """A unit and what it costs, for packing.

    Args:
        unit: goes into `Work.units`.
        group: units of equal groups share what is loaded.
        weight: expected cost.
        title: short name.
    """

    unit: Mapping[str, Any]
    group: str
    weight: float
    title: str


def pack(pieces: Sequence[Piece], target: float) -> list[list[Piece]]:
    """Divide pieces into jobs of about `target` weight: pieces of a group stay together as far as that allows.

    A piece is never divided, so a job is heavier than the target only if a single piece is.
    """
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.group, []).append(piece)
    jobs: list[list[Piece]] = []
    current: list[Piece] = []
    filled = 0.0
    for group in groups.values():
        for piece in group:
            if current and filled + piece.weight > target:
                jobs.append(current)
                current, filled = [], 0.0
            current.append(piece)
            filled += piece.weight
    if current:
        jobs.append(current)
    return jobs


def launches(folder: RunFolder) -> list[Launch]:
    """The launches of a run folder, oldest first."""
    try:
        found = [path for path in folder.jobs_folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [Launch(path) for path in sorted(found, key=lambda path: path.name.split("-", 1)[-1])]
