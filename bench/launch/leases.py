"""Leases: who works on what, so that two processes on one run folder never do the same thing at once.

A lease is a small file `leases/<unit>.<generation>.json`. Only two operations decide anything, and both are atomic on
every file system that clusters use, NFS included: giving a finished file a name that must be free (a hard link), and
replacing a file by its holder (a rename). No `flock`, no clock of another machine, no modification times.

- Taking: the holder writes its file and links it as the next generation of the unit. The link fails if another process
  was faster. After a success the folder is listed again: a higher generation means that the listing before was old, and
  the lease is given back.
- Living: the holder renews its file, with a counter that grows, several times per lease time.
- Dying: whoever wants the unit watches the counter on its *own* monotonic clock. If it has not moved for the holder's
  lease time, or if the holder was a process of this host that is gone, the next generation may be taken.
- Losing: a holder that was asleep for longer than its lease finds a higher generation, or its file gone, and stops
  (`LeaseLost`). `Lease.check` is called before anything is stored. What such a process may still do between a check and
  a write is harmless, because batches are written once and equal work gives equal bits.
- Giving back: the holder deletes its file.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from tsdfm_bench.results.files import StoreError, check_name, write_json

RENEWALS = 5  # per lease time
_FILE = re.compile(r"(?P<unit>[A-Za-z0-9_][A-Za-z0-9._+=@-]*)\.(?P<generation>\d+)\.json")


class LeaseLost(Exception):
    """Another process has taken over, because this one gave no sign of life for too long."""


@dataclass(frozen=True)
class Holder:
    """Who holds a unit, as its file says.

    Args:
        unit: what is held.
        generation: how often it was taken over since it was last free.
        token: of this holding; never repeated.
        host: machine, boot and process namespace.
        machine: name of the machine, for people.
        pid, started: the process; `started` tells it from another one with the same number.
        lease_s: seconds without a sign of life that mean death.
        counter: grows with every sign of life.
        since: wall-clock time of taking, on the holder's clock, for people.
        about: how far it is: {"doing", "done", "of", "job"}, as far as known.
    """

    unit: str
    generation: int
    token: str
    host: str
    machine: str
    pid: int
    started: str
    lease_s: float
    counter: int = 0
    since: float = 0.0
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gone(self) -> bool:
        """Whether it was a process of this host that does not exist any more."""
        return self.host == this_host() and process_start(self.pid) != self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.machine}"


@lru_cache(maxsize=1)
def this_host() -> str:
    """This machine since it was started, and this process namespace: what makes a process number mean something."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def process_start(pid: int) -> str:
    """When a process of this machine was started, in the kernel's units; "" if it does not exist or has ended."""
    try:
        # The command may hold spaces and brackets: fields are counted from the last bracket.
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        return "" if fields[0] in ("Z", "X") else fields[19]
    except (OSError, IndexError):
        if Path("/proc/self/stat").exists():
            return ""
    try:  # no /proc: whether it exists is all that can be known
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        return "exists"
    return "exists"


class Lease:
    """A unit that this process holds; made by `Leases.take`.

    Args:
        leases: where.
        holder: what its file says.
        taken_over: the dead holder it was taken from, or None.
    """

    def __init__(self, leases: Leases, holder: Holder, taken_over: Holder | None) -> None:
        self.leases, self.holder, self.taken_over = leases, holder, taken_over
        self.path = leases.path(holder.unit, holder.generation)
        self._lock = threading.Lock()
        self._about: dict[str, Any] = dict(holder.about)
        self._counter = 0
        self._released = False

    @property
    def unit(self) -> str:
        """What is held."""
        return self.holder.unit

    def tell(self, **about: Any) -> None:
        """What the next sign of life will say; see `Holder.about`."""
        self._about |= about

    def check(self) -> None:
        """Raise `LeaseLost` unless this process still holds the unit.

        Raises:
            StoreError: the folder cannot be read.
        """
        generations = self.leases.generations(self.unit)
        mine = self.leases.read(self.unit, self.holder.generation)
        if mine is None or mine.token != self.holder.token or generations[-1:] != [self.holder.generation]:
            raise LeaseLost(
                f"{self.unit} was taken over by another process: this one gave no sign of life for too long"
            )

    def renew(self) -> None:
        """Give a sign of life; nothing happens if the unit was given back.

        Raises:
            LeaseLost: another process has it.
            StoreError: it cannot be written.
        """
        with self._lock:
            if self._released:
                return
            self.check()
            self._counter += 1
            self.leases.write(Holder(**{**asdict(self.holder), "counter": self._counter, "about": dict(self._about)}))

    def release(self) -> None:
        """Give the unit back; another process may have it from now on."""
        with self._lock:
            self._released = True
            self.leases.forget(self)
            with contextlib.suppress(OSError, LeaseLost):
                self.check()
                # Older generations first: as long as one of this unit exists, nobody takes it for free.
                for generation in self.leases.generations(self.unit):
                    self.leases.path(self.unit, generation).unlink(missing_ok=True)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


class Leases:
    """The leases of one run folder, as one process sees and holds them.

    Args:
        folder: leases/.
        lease_s: seconds without a sign of life after which others may take over what this process holds.
        clock: monotonic seconds, for observing others.
        beat: renew what is held from a thread; False leaves that to the caller (`renew_all`).
    """

    def __init__(
        self, folder: Path, lease_s: float, clock: Callable[[], float] = time.monotonic, *, beat: bool = True
    ) -> None:
        self.folder, self.lease_s, self.clock, self.beat = folder, lease_s, clock, beat
        self._held: dict[str, Lease] = {}
        self._seen: dict[str, tuple[str, int, float, bool]] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    # ---------------------------------------------------------------------------------------------------- files

    def path(self, unit: str, generation: int) -> Path:
        """The file of one generation of a unit."""
        return self.folder / f"{check_name(unit, 'unit')}.{generation}.json"

    def generations(self, unit: str) -> list[int]:
        """Generations of a unit that exist, sorted."""
        return sorted(generation for found, generation in self._listed() if found == unit)

    def _listed(self) -> Iterator[tuple[str, int]]:
        try:
            with os.scandir(self.folder) as entries:
                names = [entry.name for entry in entries]
        except FileNotFoundError:
            return
        except OSError as error:
            raise StoreError(f"cannot list {self.folder}: {error.strerror}.", self.folder, error.errno) from error
        for name in names:
            if match := _FILE.fullmatch(name):
                yield match["unit"], int(match["generation"])

    def read(self, unit: str, generation: int) -> Holder | None:
        """The holder of a generation; None if there is none. A file that cannot be read is a holder without a name."""
        try:
            content = json.loads(self.path(unit, generation).read_text("utf-8"))
            return Holder(**{**content, "unit": unit, "generation": generation})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError):
            return Holder(unit, generation, "unreadable", "", "an unknown machine", 0, "", self.lease_s)

    def write(self, holder: Holder, *, exclusive: bool = False) -> None:
        """Write a holder's file; `FileExistsError` if it must not exist and does."""
        path = self.path(holder.unit, holder.generation)
        write_json(path, asdict(holder), checksum=False, exclusive=exclusive, durable=False)

    # ------------------------------------------------------------------------------------------------- watching

    def holder(self, unit: str) -> Holder | None:
        """Who holds a unit now, dead or alive; None if nobody does."""
        generations = self.generations(unit)
        return self.read(unit, generations[-1]) if generations else None

    def holders(self) -> dict[str, Holder]:
        """Everything that is held, by unit: one listing and one small file each."""
        last: dict[str, int] = {}
        for unit, generation in self._listed():
            last[unit] = max(generation, last.get(unit, 0))
        found = {unit: self.read(unit, generation) for unit, generation in sorted(last.items())}
        return {unit: holder for unit, holder in found.items() if holder is not None}

    def dead(self, holder: Holder) -> bool:
        """Whether a holder is known to be dead: a process of this host that is gone, or one that was watched in vain.

        Watching begins with the first call; call it again later.
        """
        if holder.gone:
            return True
        now = self.clock()
        token, counter, since, moved = self._seen.get(holder.unit, ("", -1, now, False))
        if (token, counter) != (holder.token, holder.counter):
            moved = token == holder.token
            self._seen[holder.unit] = (holder.token, holder.counter, now, moved)
            return False
        return now - since > max(self.lease_s, holder.lease_s)

    def alive(self, holder: Holder) -> bool:
        """Whether a sign of life was seen since watching began, or it is a process of this host that exists."""
        if holder.host == this_host():
            return not holder.gone and not self.dead(holder)
        token, _, _, moved = self._seen.get(holder.unit, ("", -1, 0.0, False))
        return token == holder.token and moved and not self.dead(holder)

    # -------------------------------------------------------------------------------------------------- holding

    def take(self, unit: str, **about: Any) -> Lease | Holder:
        """Take a unit that is free or whose holder is dead.

        Returns:
            the lease, or the holder that was faster or is not known to be dead (yet).

        Raises:
            StoreError: the folder cannot be written.
        """
        before = self.holder(unit)
        if before is not None and not self.dead(before):
            return before
        mine = Holder(
            unit=unit,
            generation=0 if before is None else before.generation + 1,
            token=secrets.token_hex(12),
            host=this_host(),
            machine=socket.gethostname(),
            pid=os.getpid(),
            started=process_start(os.getpid()),
            lease_s=self.lease_s,
            since=time.time(),
            about=about,
        )
        with contextlib.suppress(FileExistsError):
            self.write(mine, exclusive=True)
            lease = Lease(self, mine, before)
            if self._confirmed(mine, before):
                with self._lock:
                    self._held[unit] = lease
                self._seen.pop(unit, None)
                self._start()
                return lease
            with contextlib.suppress(OSError):
                lease.path.unlink(missing_ok=True)
        return self.holder(unit) or mine

    def _confirmed(self, mine: Holder, before: Holder | None) -> bool:
        """Whether what was known before the link was still true at the link."""
        if self.generations(mine.unit)[-1:] != [mine.generation]:
            return False
        if before is None:
            return True
        still = self.read(mine.unit, before.generation)
        return still is not None and still.token == before.token and still.counter == before.counter

    def tidy(self) -> None:
        """Give back what dead processes held: a kill between the last write and the giving back leaves a file."""
        for unit, holder in self.holders().items():
            if self.dead(holder) and isinstance(lease := self.take(unit), Lease):
                lease.release()

    def forget(self, lease: Lease) -> None:
        """Stop renewing a lease."""
        with self._lock:
            if self._held.get(lease.unit) is lease:
                del self._held[lease.unit]

    def renew_all(self) -> None:
        """Renew everything that is held; what was lost is found out by `Lease.check`."""
        with self._lock:
            held = list(self._held.values())
        for lease in held:
            with contextlib.suppress(OSError, LeaseLost):
                lease.renew()

    def _start(self) -> None:
        """Renew from a thread of our own, so that a long network call is no sign of death."""
        if not self.beat or (self._thread is not None and self._thread.is_alive()):
            return
        self._wake.clear()
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._wake.wait(self.lease_s / RENEWALS):
            self.renew_all()

    def close(self) -> None:
        """Stop renewing; leases that are still held die after their time."""
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)
            self._thread = None


def working(folder: Path) -> dict[str, Holder]:
    """Who seems to work on which cell, for showing: cell id -> holder; see `workers`."""
    return {unit.split("-")[0]: holder for unit, holder in workers(folder).items()}


def workers(folder: Path) -> dict[str, Holder]:
    """Who seems to work on which unit, for showing: its name -> holder.

    Of a process of this host it is known whether it lives. Of another one the last sign of life is taken from the time
    of its file, which is good enough to show and never decides anything.

    Args:
        folder: leases/.
    """
    leases = Leases(folder, 1.0, beat=False)
    found: dict[str, Holder] = {}
    for unit, holder in leases.holders().items():
        with contextlib.suppress(OSError):
            age = time.time() - leases.path(unit, holder.generation).stat().st_mtime
            if holder.host == this_host() and holder.gone:
                continue
            if age < 2 * holder.lease_s:
                found[unit] = holder
    return found
