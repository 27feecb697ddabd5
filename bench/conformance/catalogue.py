"""The checks, in the order they are run and shown.

A check is a function of a `Subject` that returns what it saw, or raises `Failed` or `Skipped`. It runs once per setting
or once per method, and only after the checks it needs have passed: what is known to be broken is reported once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tsdfm_bench.conformance import asking, basics, calls, cost, hygiene, laws, streams
from tsdfm_bench.conformance.subject import Subject
from tsdfm_bench.errors import unknown_name

_BASE = ("contract", "runs", "shapes")


@dataclass(frozen=True)
class Check:
    """One check.

    Args:
        id: its name on the command line.
        title: a few words.
        explanation: what is checked and why, for someone who has not read the contract.
        run: the check.
        once: run it on the default setting only.
        needs: ids of checks without which it makes no sense.
    """

    id: str
    title: str
    explanation: str
    run: Callable[[Subject], str]
    once: bool = False
    needs: tuple[str, ...] = _BASE


CHECKS: tuple[Check, ...] = (
    Check(
        "contract",
        "attributes and types",
        "It has info, load, networks, refuse and sample, says what it is in the agreed form, and refuses an option "
        "that does not exist.",
        basics.contract,
        once=True,
        needs=(),
    ),
    Check(
        "runs",
        "loads and samples",
        "It loads, accepts a plain request and returns: no exception, no exit, no endless loop.",
        basics.runs,
        needs=("contract",),
    ),
    Check(
        "shapes",
        "shapes and dtypes",
        "Tokens are int64 (batch, length), lengths int64 (batch,) in 0 .. length, a trace (batch, steps, length).",
        basics.shapes,
        needs=("contract", "runs"),
    ),
    Check(
        "ids",
        "ids in range",
        "Every id is a token of the vocabulary; no mask id is left over, at any temperature, nucleus or draw.",
        basics.ids,
    ),
    Check(
        "lengths",
        "lengths 1, 2 and odd",
        "It works, or refuses with a reason, for sequences of 1, 2 and 5 tokens.",
        basics.lengths,
    ),
    Check(
        "repeatable",
        "same streams, same tokens",
        "What a sequence becomes depends on its own stream alone: not on the batch, the order, the shard, a resume, or "
        "what was drawn elsewhere.",
        streams.repeatable,
    ),
    Check(
        "independent",
        "other streams, other tokens",
        "Sequences differ from each other and change with the root seed.",
        streams.independent,
    ),
    Check(
        "pinned",
        "pinned tokens kept",
        "Prefix and infill positions come back as given, and free positions do not read the held-out text beside them.",
        asking.pinned,
        needs=(*_BASE, "repeatable"),
    ),
    Check(
        "refusals",
        "refusals are reasons",
        "refuse() answers with None or a sentence, never with an exception, and sample() can do what it lets through.",
        asking.refusals,
    ),
    Check(
        "temperature",
        "temperature and nucleus",
        "Temperature 0 is the limit of low temperatures and equals a nucleus of one token; a full nucleus changes "
        "nothing. Otherwise the setting is ignored and a sweep over it means nothing.",
        asking.temperature,
        needs=(*_BASE, "repeatable"),
    ),
    Check(
        "calls",
        "calls counted = calls made",
        "Every network that is called is shown by networks() and called as a whole, so the reported cost is the cost.",
        calls.calls,
    ),
    Check(
        "law",
        "converges to the exact law",
        "Given the exact posterior of a small enumerated law instead of a network, its samples approach that law with "
        "more steps.",
        laws.convergence,
        needs=(*_BASE, "independent"),
    ),
    Check(
        "draw",
        "arithmetic of the draw",
        "Rare tokens are drawn at their probability under fp64, and at the share f(c) = 1/(c(e^(1/c)-1)) of it only "
        "where the published fp32 race is asked for (weight = c 2^-24).",
        laws.arithmetic,
        once=True,
        needs=(*_BASE, "independent"),
    ),
    Check(
        "state",
        "no global state",
        "The random generators of torch, numpy and Python, precision, threads and grad mode are as they were.",
        hygiene.state,
        once=True,
    ),
    Check(
        "files",
        "no files",
        "Nothing is written outside the run folder; loading may fill the usual caches.",
        hygiene.files,
        once=True,
    ),
    Check(
        "process",
        "quiet",
        "Nothing is printed to stdout; working folder and environment stay as they are.",
        hygiene.process,
        once=True,
    ),
    Check(
        "pickle",
        "no pickle",
        "Nothing is unpickled: reading a pickle can run any code.",
        hygiene.pickles,
        once=True,
    ),
    Check(
        "cost",
        "time and memory",
        "Eight times the batch costs about eight times as much, not sixty-four times.",
        cost.cost,
        once=True,
    ),
)


def check_ids() -> list[str]:
    """Ids of all checks, in order."""
    return [check.id for check in CHECKS]


def select(only: Sequence[str] | None) -> list[Check]:
    """The checks with these ids and those they need; all if None.

    Raises:
        UsageError: an unknown id.
    """
    if not only:
        return list(CHECKS)
    known = {check.id: check for check in CHECKS}
    for name in only:
        if name not in known:
            raise unknown_name("check", name, known)
    wanted = set(only)
    for check in reversed(CHECKS):  # a check only needs earlier ones
        wanted.update(check.needs if check.id in wanted else ())
    return [check for check in CHECKS if check.id in wanted]
