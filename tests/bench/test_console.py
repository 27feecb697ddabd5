"""Progress: rate and time left, a bar on a terminal, a few lines elsewhere, nothing on stdout."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tsdfm_bench.console import Phase, Reporter, duration, say
from tsdfm_bench.console import time as console_time
from tsdfm_bench.terminal import Terminal


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only moves by hand."""
    now = [100.0]
    monkeypatch.setattr(console_time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (7.4, "0:07"), (750, "12:30"), (3725, "1:02:05")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_rate_and_time_left_follow_from_the_work(clock: list[float]) -> None:
    phase = Phase("sampling", 100.0, 40, "seq")
    assert (phase.left_s, phase.rate) == (None, None)
    clock[0] += 10
    phase.advance(20.0, 8)
    assert phase.left_s == pytest.approx(40.0)
    assert phase.rate == pytest.approx(0.8)
    assert phase.figures() == ("8/40 seq", "0.8/s", "0:40 left")


def test_what_was_done_before_does_not_count_for_the_rate(clock: list[float]) -> None:
    phase = Phase("training", 100, 100, "steps")
    phase.skip(80, 80)
    clock[0] += 10
    phase.advance(10, 10)
    assert phase.rate == pytest.approx(1.0)
    assert phase.left_s == pytest.approx(10.0)


def test_work_that_falls_away_shortens_the_rest() -> None:
    phase = Phase("sampling", 100.0, 40, "seq")
    left = phase.expect(60.0, 24)
    phase.advance(10.0, 4)
    left.drop()
    assert (phase.work, phase.count) == (50.0, 20)
    assert phase.fraction == pytest.approx(0.2)


def test_without_a_terminal_there_is_a_line_now_and_then(clock: list[float]) -> None:
    out = io.StringIO()
    reporter = Reporter(Console(file=out, force_terminal=False, width=40))
    with reporter.phase("sampling", 100, 100, "seq") as phase:
        for _ in range(100):
            clock[0] += 0.3
            phase.doing("a cell with a name that is far too long for forty columns")
            phase.advance(1, 1)
    lines = out.getvalue().splitlines()
    assert len(lines) == 2 + 5  # 30 s, a line every 5 s, the last one being the end
    assert all("left" in line and "/s" in line for line in lines[1:-1])


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_bar_fits_its_terminal(width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, color_system=None)
    with Reporter(console).phase("scoring, smollm2", 5120, 5120, "texts") as phase:
        phase.doing("fsdfm[solver=exact] · uniform · 1024 steps · temp. 0.9")
        phase.advance(2048, 2048)
    lines = [line.split("\r")[-1] for line in out.getvalue().splitlines()]
    assert any("2048/5120 texts" in line for line in lines)
    assert max(len(_plain(line)) for line in lines) <= width


def _plain(line: str) -> str:
    from rich.text import Text

    return Text.from_ansi(line).plain


EVIL = "runs/dfm[solver=exact][/b]:dog:\x1b[2J\x1b]0;owned\x07\x9b31m\udc80end"
SHOWN = "runs/dfm[solver=exact][/b]:dog: [2J ]0;owned"


@pytest.mark.parametrize("terminal", [False, True])
def test_what_others_wrote_is_shown_and_does_nothing(terminal: bool) -> None:
    """No markup, no emoji, no control character of a path or an error reaches a line, a cell, a title or a bar."""
    from rich.table import Table

    out = io.StringIO()
    console = Terminal(file=out, force_terminal=terminal, width=120, color_system=None)
    table = Table("cell", title=EVIL)
    table.add_row(EVIL)
    console.print(table)
    console.print(f"Results: {EVIL}", soft_wrap=True)
    reporter = Reporter(console)
    reporter.note(f"failed: {EVIL}\nnext line")
    with reporter.phase(EVIL[:28], 1, 1, "seq") as phase:
        phase.doing(EVIL)
        phase.advance(1, 1)
    text = _plain(out.getvalue())
    assert text.count(SHOWN) >= 4
    assert "end" in text
    assert "\nnext line" in text
    assert not [ch for ch in text if not ch.isprintable() and ch not in "\r\n"]


def test_an_error_message_is_printable(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"error: {EVIL}")
    assert capsys.readouterr().err == f"error: {SHOWN}  31m end\n"
