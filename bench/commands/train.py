"""`tsdfm-bench train`: the recipe, the text and the trainer, joined; progress as everywhere."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdfm_bench.commands.folders import RUNS
from tsdfm_bench.console import Phase, Reporter
from tsdfm_bench.errors import UsageError
from tsdfm_bench.launch.leases import LeaseLost
from tsdfm_bench.launch.settings import LauncherSettings, launcher_settings
from tsdfm_bench.launch.several import LEASED
from tsdfm_bench.launch.slurm_settings import check_launcher, parse_option
from tsdfm_bench.launch.training import Alone, StageBusy, leave_progress
from tsdfm_bench.provenance import available_threads, command_line, describe, record
from tsdfm_bench.registry import Registry
from tsdfm_bench.spec import parse_spec, split_list
from tsdfm_bench.summary import reason_of
from tsdfm_bench.sweep import load_task

if TYPE_CHECKING:
    from tsdfm_bench.methods.train.recipe import Recipe
    from tsdfm_bench.methods.train.trainer import Progress

INTERRUPTED = 130
SAVE_EVERY_S = 4.0  # the trainer reports every 5 s, and stops when it reports


class _TimeIsUp(Exception):
    """The minutes are over."""


def train_command(
    scale: str,
    only: str | None,
    out: Path | None,
    minutes: float | None,
    threads: int | None,
    task: str | None = None,
    dry_run: bool = False,
    as_json: bool = False,
    launcher: Mapping[str, object] | None = None,
    report: bool = False,
    tokenize: bool = False,
) -> int:
    """Train the networks of a scale.

    Started by torchrun (or `accelerate launch`) it trains on all its processes; the first one reports.

    Args:
        scale: name of a recipe, or a TOML file.
        only: stages separated by commas, or None for all.
        out: folder of the checkpoints.
        minutes: stop after this time.
        threads: CPU threads; None = all available.
        task: another text than the recipe's.
        dry_run: train nothing, rehearse.
        as_json: print the rehearsal as JSON.
        launcher: options of the launcher, see `launcher_of`; None as a value = not given.
        report: train nothing, examine the compasses that are trained.
        tokenize: train nothing, read and tokenise the text, which the cache then has.

    Returns:
        the exit code; 0 also if the minutes were over before the end.
    """
    import torch
    from rich.console import Console

    from tsdfm_bench.judge import find_judge, judges_of
    from tsdfm_bench.methods.train.command import train_recipe, training_text
    from tsdfm_bench.methods.train.recipe import load_recipe

    torch.set_num_threads(threads or available_threads())
    processes, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
    reporter = Reporter(Console(file=StringIO()) if rank else None)
    recipe = load_recipe(scale)
    stages = split_list(only) if only else None
    recipe.select(stages)  # a wrong name is an error before the text is read
    if minutes is not None and processes > 1:
        raise UsageError("--minutes is for one process; on several, the scheduler's time limit ends a training")
    if dry_run + report + tokenize > 1:
        raise UsageError("--dry-run, --report and --tokenize each train nothing: give one of them")
    if as_json and not dry_run and not report:
        raise UsageError(
            "--json belongs to --dry-run and --report; a training's record is history.json beside its weights"
        )
    if task is not None:
        recipe = recipe.model_copy(update={"task": task})
    if dry_run and (task is not None or not recipe.vocab_size or not recipe.length):
        info = load_task(parse_spec(recipe.task), Registry()).info
        recipe = recipe.model_copy(update={"vocab_size": info.vocab_size, "length": info.length})
    if dry_run:
        from tsdfm_bench.commands.rehearse import rehearse_command

        return rehearse_command(recipe, stages, as_json)
    if tokenize:
        if minutes is not None or any(value is not None for value in (launcher or {}).values()):
            raise UsageError(
                "--tokenize reads the text in this process, to its end: leave out --minutes and --launcher"
            )
        text = training_text(load_task(parse_spec(recipe.task), Registry()))
        counts = ", ".join(f"{len(stream):,} of {split}" for split, stream in text.streams.items())
        reporter.note(f"Tokens of {recipe.task}: {counts}")
        return 0
    if minutes is not None:  # little is lost when the time is over
        recipe = recipe.model_copy(update={"training": {**recipe.training, "save_every_s": SAVE_EVERY_S}})
    folder = out or RUNS / f"train-{Path(scale).stem}"
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file: give a folder for the checkpoints")
    if report:
        from tsdfm_bench.commands.train_report import report_command

        code = report_command(recipe, folder, stages, as_json, reporter)
        _record(Registry(), folder)
        return code
    settings = launcher_of(launcher or {})
    if settings.name != "inline":
        if minutes is not None:
            raise UsageError(f"--minutes is for training in this process; leave it out with --launcher {settings.name}")
        return _launched(scale, recipe, folder, stages, task, threads, settings, reporter)
    registry = Registry()
    loaded = load_task(parse_spec(recipe.task), registry)
    text = training_text(loaded, judges_of(loaded, registry))
    if processes > 1:  # only now: joined processes do not wait for hours, as those of a long text may have to
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())  # each gets its GPU
    if task is None and recipe.vocab_size not in (0, text.vocab_size):
        raise UsageError(
            f"recipe '{recipe.scale}' is for {recipe.vocab_size:,} tokens, its task has {text.vocab_size:,}; name the "
            "text with --task if that is meant"
        )
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    held = rank > 0 or LEASED in os.environ  # by the first process, or by who has started this one
    alone = None if held else Alone(folder, settings.lease_s, reporter)
    display = _Display(reporter, deadline, alone, folder if processes > 1 and rank == 0 else None)
    if not held:
        _record(registry, folder)
    try:
        judge = find_judge(loaded, recipe, folder, registry)
        refused = train_recipe(
            recipe, text, folder, stages, display.report, display.announce, judge, alone or nullcontext
        )
    except _TimeIsUp:
        display.close()
        reporter.note(f"The time is over; what was trained is kept in {folder}. Go on with:\n  {command_line()}")
        return 0
    except KeyboardInterrupt:
        display.close()
        reporter.note(_interrupted(folder))
        return INTERRUPTED
    except (FloatingPointError, MemoryError, LeaseLost, StageBusy) as error:
        display.close()
        reporter.note(f"error: {error}", style="red")
        return 1
    except torch.OutOfMemoryError as error:  # before the first step: the networks alone are too large
        display.close()
        reason = str(error).splitlines()[0]
        reporter.note(f"error: the networks do not fit into the GPU's memory ({reason})", style="red")
        return 1
    display.close()
    for reason in refused:
        reporter.note(reason, style="red")
    reporter.note(f"Trained networks: {folder}. Use them: tsdfm-bench run --checkpoint {folder}")
    return 1 if refused else 0


def _record(registry: Registry, folder: Path) -> None:
    """Keep when, with what and on what the networks of a folder are made, beside them."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    record(folder, describe(registry, device, torch.get_num_threads()))


def _interrupted(folder: Path) -> str:
    return (
        f"Interrupted; what was trained up to the last saved state (one every `save_every_s` of the recipe) is kept in "
        f"{folder}. Go on with:\n  {command_line()}"
    )


def launcher_of(given: Mapping[str, object]) -> LauncherSettings:
    """The `[launcher]` table of the options that were given; `slurm` is the text of --slurm, `detach` a switch."""
    table = {key: value for key, value in given.items() if value is not None}
    slurm: dict[str, object] = dict(parse_option(str(table.pop("slurm")))) if "slurm" in table else {}
    if table.pop("detach", None):
        slurm["detach"] = True
    if slurm:
        check_launcher(table.get("name"))
    return launcher_settings({**table, "slurm": slurm} if slurm else table)


def _launched(
    scale: str,
    recipe: Recipe,
    folder: Path,
    stages: list[str] | None,
    task: str | None,
    threads: int | None,
    settings: LauncherSettings,
    reporter: Reporter,
) -> int:
    """Train the stages as jobs of a launcher, each after those it needs; the exit code."""
    from tsdfm_bench.commands.live import noted, terminable
    from tsdfm_bench.launch import Cancelled, Detached, find_launcher
    from tsdfm_bench.launch.training import TrainFolder, train_works

    works = train_works(scale, recipe, folder, stages, task, threads, lease_s=settings.lease_s)
    _record(Registry(), folder)
    try:
        with terminable(), noted(TrainFolder(folder), settings.name):
            results = find_launcher(settings).train(works, folder, reporter)
    except Detached as left:
        reporter.note(str(left), style="cyan")
        return INTERRUPTED if isinstance(left, Cancelled) else 0
    except KeyboardInterrupt:
        reporter.note(_interrupted(folder))
        return INTERRUPTED
    bad = [result for result in results if result["state"] != "done"]
    for why, names in _reasons(bad).items():
        reporter.note(f"{', '.join(names)}: {why}", style="red")
    if not bad:
        reporter.note(f"Trained networks: {folder}. Use them: tsdfm-bench run --checkpoint {folder}")
    return 1 if bad else 0


def _reasons(results: list[dict[str, Any]]) -> dict[str, list[str]]:
    """What kept stages from being trained, with the stages that it kept; a traceback is told by its exception."""
    found: dict[str, list[str]] = {}
    for result in results:
        name = result["name"].removeprefix("train-")
        why = str(result.get("error") or f"another process is at it ({', '.join(result.get('busy', ()))})")
        if '  File "' in why:
            why = reason_of(why)
        found.setdefault(why.removeprefix(f"stage '{name}' "), []).append(name)
    return found


class _Display:
    """One phase per stage; in `folder` progress is left for who has started several processes."""

    def __init__(self, reporter: Reporter, deadline: float | None, alone: Alone | None, folder: Path | None) -> None:
        self.reporter, self.deadline, self.alone, self.folder = reporter, deadline, alone, folder
        self.name = ""
        self.phase: Phase | None = None
        self.leave: Callable[[], object] = lambda: None

    def announce(self, text: str) -> None:
        """A line between stages."""
        if self.phase is not None:
            self.close()
            self._check_time()
        self.reporter.note(text)

    def report(self, progress: Progress) -> None:
        """Some steps, or a validation, are done."""
        if self.alone is not None:
            self.alone.check(progress)
        if self.phase is None or progress.name != self.name:
            self.close()
            context = self.reporter.phase(progress.name, progress.steps, progress.steps, "steps")
            self.phase, self.name = context.__enter__(), progress.name
            self.leave = lambda: context.__exit__(None, None, None)
            self.phase.skip(progress.step, progress.step)
        if self.folder is not None:
            leave_progress(self.folder, progress)
        shown = "  ".join(f"{key} {value:.4g}" for key, value in progress.shown.items())
        if "validation" in progress.shown:
            self.reporter.note(f"{progress.name}, step {progress.step}: {shown}")
        else:
            done = progress.step - self.phase.count_done
            self.phase.advance(done, done)
            self.phase.doing(f"{progress.tokens_per_s:,.0f} tokens/s  {shown}")
        if progress.step < progress.steps:
            self._check_time()

    def _check_time(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise _TimeIsUp

    def close(self) -> None:
        """End the phase of the last stage."""
        self.leave()
        self.leave, self.phase = (lambda: None), None
