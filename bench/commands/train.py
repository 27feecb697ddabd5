"""`tsdfm-bench train`: the recipe, the text and the trainer, joined; progress as everywhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tsdfm_bench.commands.folders import RUNS
from tsdfm_bench.console import Phase, Reporter
from tsdfm_bench.provenance import available_threads, command_line
from tsdfm_bench.registry import Registry
from tsdfm_bench.spec import parse_spec, split_list
from tsdfm_bench.sweep import load_task

if TYPE_CHECKING:
    from tsdfm_bench.methods.train.trainer import Progress

INTERRUPTED = 130
SAVE_EVERY_S = 4.0  # the trainer reports every 5 s, and stops when it reports


class _TimeIsUp(Exception):
    """The minutes are over."""


def train_command(scale: str, only: str | None, out: Path | None, minutes: float | None, threads: int | None) -> int:
    """Train the networks of a scale.

    Args:
        scale: name of a recipe, or a TOML file.
        only: stages separated by commas, or None for all.
        out: folder of the checkpoints.
        minutes: stop after this time.
        threads: CPU threads; None = all available.

    Returns:
        the exit code; 0 also if the minutes were over before the end.
    """
    import torch

    from tsdfm_bench.methods.train.command import train_recipe, training_text
    from tsdfm_bench.methods.train.recipe import load_recipe

    torch.set_num_threads(threads or available_threads())
    reporter = Reporter()
    recipe = load_recipe(scale)
    stages = split_list(only) if only else None
    recipe.select(stages)  # a wrong name is an error before the text is read
    if minutes is not None:  # little is lost when the time is over
        recipe = recipe.model_copy(update={"training": {**recipe.training, "save_every_s": SAVE_EVERY_S}})
    folder = out or RUNS / f"train-{Path(scale).stem}"
    text = training_text(load_task(parse_spec(recipe.task), Registry()))
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    display = _Display(reporter, deadline)
    try:
        train_recipe(recipe, text, folder, stages, display.report, display.announce)
    except _TimeIsUp:
        display.close()
        reporter.note(f"The time is over; what was trained is kept in {folder}. Go on with:\n  {command_line()}")
        return 0
    except KeyboardInterrupt:
        display.close()
        reporter.note(f"Interrupted; all but the last minute is kept in {folder}. Go on with:\n  {command_line()}")
        return INTERRUPTED
    except FloatingPointError as error:
        display.close()
        reporter.note(f"error: {error}", style="red")
        return 1
    display.close()
    reporter.note(f"Trained networks: {folder}. Use them: tsdfm-bench run --checkpoint {folder}")
    return 0


class _Display:
    """One phase per stage."""

    def __init__(self, reporter: Reporter, deadline: float | None) -> None:
        self.reporter, self.deadline = reporter, deadline
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
        if self.phase is None or progress.name != self.name:
            self.close()
            context = self.reporter.phase(progress.name, progress.steps, progress.steps, "steps")
            self.phase, self.name = context.__enter__(), progress.name
            self.leave = lambda: context.__exit__(None, None, None)
            self.phase.skip(progress.step, progress.step)
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
