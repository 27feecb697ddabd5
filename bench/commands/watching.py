"""Showing something again and again, until nothing goes on with it any more."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol, TypeVar

from tsdfm_bench.console import stdout_console

if TYPE_CHECKING:
    from rich.console import RenderableType

EVERY_S = 2.0
SLURM_EVERY_S = 15.0
IDLE_LOOKS = 2


class Shown(Protocol):
    """One look at something."""

    @property
    def busy(self) -> bool:
        """Whether anything goes on with it."""

    def screen(self, height: int) -> RenderableType:
        """What fits on a terminal of so many lines."""

    def line(self) -> str:
        """The same in short."""


T = TypeVar("T", bound=Shown)


def watch(look: Callable[[bool], T]) -> None:
    """Show something until nothing goes on: on a terminal in place, elsewhere a line whenever it has changed.

    Args:
        look: looks at it; with True Slurm may be asked, which is done less often than files are read.
    """
    console = stdout_console()
    if console.is_terminal:
        from rich.live import Live as Display

        with Display(console=console, auto_refresh=False, transient=False) as display:
            for shown in _looks(look):
                display.update(shown.screen(console.size.height), refresh=True)
        return
    before = ""
    for shown in _looks(look):
        line = shown.line()
        if line != before:
            console.print(line, highlight=False, soft_wrap=True)
        before = line


def _looks(look: Callable[[bool], T]) -> Iterator[T]:
    idle, asked = 0, -SLURM_EVERY_S
    while idle < IDLE_LOOKS:
        ask = time.monotonic() - asked >= SLURM_EVERY_S
        if ask:
            asked = time.monotonic()
        shown = look(ask)
        yield shown
        idle = 0 if shown.busy else idle + 1
        try:
            time.sleep(EVERY_S if idle < IDLE_LOOKS else 0)
        except KeyboardInterrupt:
            return
