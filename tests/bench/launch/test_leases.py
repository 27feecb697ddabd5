"""Leases: one holder at a time, whoever dies, however clocks run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tsdfm_bench.launch import leases as module
from tsdfm_bench.launch.leases import Holder, Lease, LeaseLost, Leases, working

HOUR_S = 3600.0


class Clock:
    """A monotonic clock that is set by the test."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def on(folder: Path, lease_s: float = 10.0, clock: Clock | None = None) -> Leases:
    return Leases(folder, lease_s, clock or Clock(), beat=False)


def taken(found: Lease | Holder) -> Lease:
    assert isinstance(found, Lease), found
    return found


def held(found: Lease | Holder) -> Holder:
    assert isinstance(found, Holder), found
    return found


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a call as if it came from another machine, where process numbers mean nothing here."""

    def call(work: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(module, "this_host", lambda: "another machine")
            return work()

    return call


def test_a_unit_has_one_holder_until_it_is_given_back(tmp_path: Path) -> None:
    first, second = on(tmp_path), on(tmp_path)
    lease = taken(first.take("a"))
    assert held(second.take("a")).token == lease.holder.token
    taken(second.take("b")).release()
    lease.release()
    assert list(tmp_path.iterdir()) == []
    taken(second.take("a")).release()


def test_a_free_unit_goes_to_exactly_one_of_many_threads(tmp_path: Path) -> None:
    for k in range(20):
        start, won = threading.Barrier(8), []

        def compete(unit: str, start: threading.Barrier, won: list[object]) -> None:
            mine = on(tmp_path)
            start.wait()
            if isinstance(mine.take(unit), Lease):
                won.append(mine)

        threads = [threading.Thread(target=compete, args=(f"u{k}", start, won)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1


def test_a_dead_process_of_this_host_is_replaced_at_once(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys; from tsdfm_bench.launch.leases import Leases; "
        "Leases(pathlib.Path(sys.argv[1]), 60).take('a'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, timeout=60)
    assert [path.name for path in tmp_path.iterdir()] == ["a.0.json"]
    lease = taken(on(tmp_path, HOUR_S).take("a"))
    assert lease.taken_over is not None
    assert lease.taken_over.gone
    assert lease.holder.generation == 1
    lease.release()
    assert list(tmp_path.iterdir()) == []


def test_a_process_number_that_was_given_again_is_not_taken_for_the_holder(tmp_path: Path) -> None:
    """This process is alive, but was not started when the holder was."""
    lease = taken(on(tmp_path).take("a"))
    lease.path.write_text(json.dumps({**asdict(lease.holder), "started": "1"}))
    taken(on(tmp_path, HOUR_S).take("a"))


def test_a_silent_holder_elsewhere_is_replaced_after_its_lease_on_the_observers_clock(
    tmp_path: Path, elsewhere: Any
) -> None:
    there = on(tmp_path, 30.0)
    lease = elsewhere(lambda: taken(there.take("a")))
    clock = Clock()
    here = on(tmp_path, 10.0, clock)
    held(here.take("a"))
    clock.now = 25.0  # longer than this process's lease, but the holder's own counts
    held(here.take("a"))
    elsewhere(lease.renew)
    clock.now = 31.0  # it has given a sign of life: watching begins anew
    held(here.take("a"))
    clock.now = 60.0
    held(here.take("a"))
    clock.now = 61.5
    mine = taken(here.take("a"))
    assert mine.holder.generation == 1
    with pytest.raises(LeaseLost):
        elsewhere(lease.check)
    with pytest.raises(LeaseLost):
        elsewhere(lease.renew)
    elsewhere(lease.release)  # takes nothing away from the new holder
    mine.check()


def test_signs_of_life_are_counters_and_no_times(
    tmp_path: Path, elsewhere: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clocks of nodes may differ by hours and jump: neither wall time nor modification times decide anything."""
    there = on(tmp_path)
    lease = elsewhere(lambda: taken(there.take("a")))
    clock = Clock()
    here = on(tmp_path, 10.0, clock)
    held(here.take("a"))
    for jump in (-1e9, 1e9):
        monkeypatch.setattr(time, "time", lambda jump=jump: jump)
        os.utime(lease.path, (max(0.0, jump), max(0.0, jump)))
        held(here.take("a"))
        elsewhere(lease.check)
    for _ in range(50):
        clock.now += 9.0
        elsewhere(lease.renew)
        held(here.take("a"))
    assert here.alive(held(here.take("a")))


def test_watching_says_nothing_before_a_lease_has_passed(tmp_path: Path, elsewhere: Any) -> None:
    elsewhere(lambda: taken(on(tmp_path).take("a")))
    clock = Clock()
    clock.now = 1e6  # an observer that was started late has not watched for long
    here = on(tmp_path, 10.0, clock)
    holder = held(here.take("a"))
    assert not here.dead(holder)
    assert not here.alive(holder)  # nobody knows yet


def test_two_that_take_over_at_once_do_not_both_win(tmp_path: Path, elsewhere: Any) -> None:
    for k in range(10):
        elsewhere(lambda k=k: taken(on(tmp_path, 1.0).take(f"u{k}")))
        start, won = threading.Barrier(6), []

        def compete(unit: str, start: threading.Barrier, won: list[object]) -> None:
            clock = Clock()
            mine = on(tmp_path, 1.0, clock)
            mine.take(unit)
            clock.now = 5.0
            start.wait()
            if isinstance(mine.take(unit), Lease):
                won.append(mine)

        threads = [threading.Thread(target=compete, args=(f"u{k}", start, won)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1


def test_an_old_listing_does_not_make_a_second_holder(tmp_path: Path, elsewhere: Any) -> None:
    """A file system may show a folder as it was: the link succeeds for a generation that is over."""
    elsewhere(lambda: taken(on(tmp_path, 1.0).take("a")))
    clock = Clock()
    late = on(tmp_path, 1.0, clock)
    stale = held(late.take("a"))
    clock.now = 5.0
    other_clock = Clock()
    other = on(tmp_path, 1.0, other_clock)
    other.take("a")
    other_clock.now = 5.0
    winner = taken(other.take("a"))
    second = replace(winner.holder, generation=5)
    winner.path.rename(other.path("a", 5))  # as if generations 1 to 4 had come and gone
    other.write(second)
    real = late.holder
    answers = iter([stale])
    late.holder = lambda unit: next(answers, None) or real(unit)  # type: ignore[method-assign]
    assert held(late.take("a")).generation == 5
    assert late.generations("a") == [0, 5]


def test_a_holder_that_came_back_to_life_at_the_last_moment_keeps_its_unit(tmp_path: Path, elsewhere: Any) -> None:
    there = on(tmp_path, 1.0)
    lease = elsewhere(lambda: taken(there.take("a")))
    clock = Clock()
    here = on(tmp_path, 1.0, clock)
    here.take("a")
    clock.now = 5.0
    real = here.write

    def write(holder: Holder, *, exclusive: bool = False) -> None:
        elsewhere(lease.renew)  # between the decision and the link
        real(holder, exclusive=exclusive)

    here.write = write  # type: ignore[method-assign]
    held(here.take("a"))
    elsewhere(lease.check)


def test_an_unreadable_lease_is_a_holder_that_may_die(tmp_path: Path) -> None:
    (tmp_path / "a.0.json").write_bytes(b"\x00{")
    clock = Clock()
    here = on(tmp_path, 10.0, clock)
    held(here.take("a"))
    clock.now = 11.0
    taken(here.take("a"))


def test_what_is_held_is_renewed_from_a_thread_and_not_after_it_was_given_back(tmp_path: Path) -> None:
    leases = Leases(tmp_path, 0.25)
    lease = taken(leases.take("a", doing="x"))
    lease.tell(done=3)
    for _ in range(200):
        holder = leases.holder("a")
        assert holder is not None
        if holder.counter >= 3:
            break
        time.sleep(0.02)
    assert holder.counter >= 3
    assert holder.about == {"doing": "x", "done": 3}
    lease.release()
    leases.close()
    assert list(tmp_path.iterdir()) == []


def test_a_renewal_that_cannot_be_written_loses_the_lease_and_nothing_else(
    tmp_path: Path, elsewhere: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = on(tmp_path, 1.0)
    lease = elsewhere(lambda: taken(there.take("a")))

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_json", full)
        elsewhere(there.renew_all)
    assert held(on(tmp_path).take("a")).counter == 0
    elsewhere(lease.check)


def test_what_the_dead_left_is_tidied_away(tmp_path: Path, elsewhere: Any) -> None:
    mine = on(tmp_path)
    lease = taken(mine.take("mine"))
    gone = taken(mine.take("gone"))
    gone.path.write_text(json.dumps({**asdict(gone.holder), "started": "1"}))
    elsewhere(lambda: taken(on(tmp_path).take("unknown")))
    on(tmp_path).tidy()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.0.json", "unknown.0.json"]
    lease.check()


def test_who_works_is_shown_without_the_dead(tmp_path: Path, elsewhere: Any) -> None:
    mine = on(tmp_path)
    taken(mine.take("0123456789abcdef-0001", doing="mdlm"))
    elsewhere(lambda: taken(on(tmp_path).take("fedcba9876543210-by-toy")))
    gone = taken(mine.take("aaaa"))
    gone.path.write_text(json.dumps({**asdict(gone.holder), "started": "1"}))
    assert set(working(tmp_path)) == {"0123456789abcdef", "fedcba9876543210"}
    assert working(tmp_path / "nothing") == {}
