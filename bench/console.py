"""What the user sees while waiting: progress with rate and time left on a terminal, a line now and then elsewhere.

Progress goes to stderr, so that stdout holds nothing but tables (or JSON).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

LINE_EVERY_S = 5.0
_BAR, _NAME = 16, 16


def duration(seconds: float) -> str:
    """Seconds as 0:07, 12:30 or 1:02:05."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def printable(text: str) -> str:
    """The text with spaces for control characters and lone surrogates; line breaks stay."""
    return text if text.isprintable() else "".join(ch if ch.isprintable() or ch == "\n" else " " for ch in text)


def say(text: str) -> None:
    """A line on stderr, as `printable`."""
    print(printable(text), file=sys.stderr, flush=True)


class Reporter:
    """Shows phases of work.

    Args:
        console: where to; default stderr.
        quiet: show nothing but notes.
        line_every_s: seconds between lines if the console is no terminal.
    """

    def __init__(
        self, console: Console | None = None, *, quiet: bool = False, line_every_s: float = LINE_EVERY_S
    ) -> None:
        from tsdfm_bench.terminal import Terminal

        self.console = console or Terminal(stderr=True)
        self.quiet = quiet
        self.line_every_s = line_every_s

    def note(self, text: str, style: str = "") -> None:
        """One line of text, as it is."""
        from rich.text import Text

        if self.console.is_terminal:
            self.console.print(Text(printable(text), style=style))
        else:  # a log: never wrapped
            print(printable(text), file=self.console.file, flush=True)

    @contextmanager
    def phase(self, name: str, work: float, count: int, unit: str) -> Iterator[Phase]:
        """Show one phase while the block runs.

        Args:
            name: "sampling", "scoring", ...
            work: what there is to do, in any unit: the time left follows from it.
            count: how many things will be made.
            unit: what they are called.
        """
        phase = Phase(name, work, count, unit)
        if self.quiet:
            yield phase
        elif self.console.is_terminal:
            with _bar(self.console) as bar:
                view = _BarView(bar, phase)
                phase.show = view.show
                phase.show(phase)
                yield phase
                view.finish(phase)
        else:
            phase.show = _LineView(self, self.line_every_s).show
            self.note(f"{name}: {count} {unit} to do")
            yield phase
            self.note(f"{name}: {phase.count_done} {unit} done in {duration(phase.elapsed_s)}")


class Phase:
    """How far a phase is.

    Args:
        name, work, count, unit: see `Reporter.phase`.
    """

    def __init__(self, name: str, work: float, count: int, unit: str) -> None:
        self.name, self.unit = name, unit
        self.work, self.count = work, count
        self.work_done, self.count_done = 0.0, 0
        self.work_before, self.count_before = 0.0, 0
        self.under_way = 0.0
        self.current = ""
        self.started = time.monotonic()
        self.show: Any = lambda phase: None

    def doing(self, text: str) -> None:
        """Say what is being worked on."""
        self.current = text
        self.show(self)

    def begin(self) -> None:
        """The first piece of work begins now: what was done so far (loading, warming up) is not its fault."""
        if not self.work_done:
            self.started = time.monotonic()

    def progress(self, work: float) -> None:
        """Some work of a piece that is not finished."""
        self.under_way = work
        self.show(self)

    def advance(self, work: float, count: int) -> None:
        """A piece of work is finished."""
        self.under_way = 0.0
        self.work_done += work
        self.count_done += count
        self.show(self)

    def skip(self, work: float, count: int) -> None:
        """Some work had been done before: it counts as done, but not for the rate."""
        self.work_done += work
        self.count_done += count
        self.work_before, self.count_before = self.work_done, self.count_done
        self.show(self)

    def expect(self, work: float, count: int) -> Expected:
        """Reserve work that may end early; see `Expected.drop`."""
        return Expected(self, self.work_done + work, self.count_done + count)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the phase began."""
        return time.monotonic() - self.started

    @property
    def fraction(self) -> float:
        """Share of the work that is done."""
        return min(1.0, (self.work_done + self.under_way) / self.work) if self.work > 0 else 1.0

    @property
    def left_s(self) -> float | None:
        """Seconds left if work goes on as so far, or None before any was done."""
        reached = self.work_done + self.under_way
        done = reached - self.work_before
        return self.elapsed_s * max(0.0, self.work - reached) / done if done > 0 else None

    @property
    def rate(self) -> float | None:
        """Things per second so far."""
        done = self.count_done - self.count_before
        return done / self.elapsed_s if done and self.elapsed_s > 0 else None

    def figures(self) -> tuple[str, str, str]:
        """Count, rate and time left as text."""
        count = f"{self.count_done}/{self.count} {self.unit}"
        rate = "" if self.rate is None else f"{self.rate:.3g}/s" if self.rate < 1000 else f"{self.rate:.0f}/s"
        left = "" if self.left_s is None else f"{duration(self.left_s)} left"
        return count, rate, left


class Expected:
    """Work that was announced for one cell.

    Args:
        phase: the phase.
        work_then, count_then: what will be done by the end of the cell.
    """

    def __init__(self, phase: Phase, work_then: float, count_then: int) -> None:
        self.phase, self.work_then, self.count_then = phase, work_then, count_then

    def drop(self) -> None:
        """The cell is over: what it did not do is no longer to be done."""
        self.phase.under_way = 0.0
        self.phase.work -= max(0.0, self.work_then - self.phase.work_done)
        self.phase.count -= max(0, self.count_then - self.phase.count_done)
        self.phase.show(self.phase)


@contextmanager
def _bar(console: Console) -> Iterator[Progress]:
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=_BAR),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True)),
        TextColumn(
            "{task.fields[current]}",
            style="dim",
            markup=False,
            table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
        ),
    )
    with Progress(*columns, console=console, expand=True, refresh_per_second=5) as bar:
        yield bar


class _BarView:
    def __init__(self, bar: Progress, phase: Phase) -> None:
        self.bar = bar
        self.task = bar.add_task(f"{phase.name:<{_NAME}}", total=1.0, figures="", current="")

    def show(self, phase: Phase) -> None:
        figures = "  ".join(part for part in phase.figures() if part)
        self.bar.update(self.task, completed=phase.fraction, figures=figures, current=phase.current)

    def finish(self, phase: Phase) -> None:
        """How long it took, in place of how long it takes."""
        count, rate, _ = phase.figures()
        figures = "  ".join(part for part in (count, rate, f"in {duration(phase.elapsed_s)}") if part)
        self.bar.update(self.task, completed=1.0, figures=figures, current="")


class _LineView:
    def __init__(self, reporter: Reporter, every_s: float) -> None:
        self.reporter, self.every_s = reporter, every_s
        self.last = time.monotonic()

    def show(self, phase: Phase) -> None:
        now = time.monotonic()
        if now - self.last < self.every_s:
            return
        self.last = now
        parts = [f"{100 * phase.fraction:.0f} %", *(part for part in phase.figures() if part), phase.current]
        self.reporter.note(f"{phase.name}: " + ", ".join(part for part in parts if part))


def stdout_console(width: int | None = None) -> Console:
    """The console that tables are printed on; without a terminal and COLUMNS it is 120 wide."""
    from os import environ

    from tsdfm_bench.terminal import Terminal

    if width is None and not sys.stdout.isatty() and "COLUMNS" not in environ:
        width = 120
    return Terminal(width=width)
