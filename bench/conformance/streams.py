"""Randomness: one stream per sequence, and nothing else, decides what a sequence becomes.

Only then do a run on one machine, a run split over eight and a run that was killed and resumed hold the same samples,
and only then may two methods be compared sequence by sequence. The generators of torch, numpy and Python are set to
other states before every call, so a method that draws from them is caught.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tsdfm_bench.conformance.laws import PLACES, SYMBOLS, Enumerated, with_denoiser
from tsdfm_bench.conformance.report import Failed, Skipped
from tsdfm_bench.conformance.subject import BATCH, SEED, Broke, Refused, Subject, require, rows_equal, stir

if TYPE_CHECKING:
    from torch import Tensor

    from tsdfm_bench.api import SampleRequest
PARTS = ((0, 3), (3, 1), (4, BATCH - 4))  # first sequence and number of sequences
BATCHES = 8  # with exact predictions, of a law so small that two sequences may be equal by chance
DEPENDS = "what a sequence becomes depends on the size of its batch"
ROUNDED = 1
"""Sequences of 8 that may differ between batch sizes where a network is asked: matrix products of another shape round
differently, which changes one draw in ten thousand. Most faults of a method change more; those that do not are found
with exact predictions, where none is spared."""
LEAST = 3  # different sequences of 32: a generator may have collapsed, which is no fault of its streams


def repeatable(subject: Subject) -> str:
    """Same streams, same tokens: twice, in parts, in another order, after a new start."""
    import torch

    kinds = rounded = 0
    networks = subject.method.networks().values()
    spare = ROUNDED if any(True for network in networks for _ in network.parameters()) else 0
    for name, settings in _kinds(subject):
        whole = _sample(subject, settings, plain=not name)
        if whole is None:
            continue
        kinds += 1
        where = f" ({name})" if name else ""
        again = _sample(subject, settings)
        _same(whole, again, f"asked twice for the same, it gave other tokens{where}")
        parts = [_sample(subject, settings, batch=size, first=first) for first, size in PARTS]
        if any(part is None for part in parts):
            raise Failed(f"it serves a batch and refuses a part of it{where}")
        joined = torch.cat([part for part in parts if part is not None])
        rounded += _same(whole, joined, f"{DEPENDS}{where}", spare)
        _same(whole.flip(0), _sample(subject, settings, backwards=True), f"the order of the sequences matters{where}")
    fresh = subject.load()
    stir()
    resumed = subject.serve(subject.request(BATCH - 4, first=4), fresh).tokens
    plain = _sample(subject, {}, plain=True)
    assert plain is not None
    rounded += _same(plain[4:], resumed, "a newly loaded instance that goes on in the middle gives other tokens", spare)
    but = f", but for {rounded} that the network's rounding changed between batch sizes" if rounded else ""
    strict = strictly_repeatable(subject) if spare else ""
    return f"equal when repeated, split, reordered and resumed, {kinds} kinds of request{but}{strict}"


def strictly_repeatable(subject: Subject) -> str:
    """With exact predictions in fp64 in the network's place, which do not round by batch, every sequence is equal.

    Returns:
        what was seen, to be appended; "" if the kit has no exact denoiser for the method (the check 'law' says why).
    """
    import torch

    try:
        method = with_denoiser(subject, Enumerated, SYMBOLS, PLACES)
    except (Skipped, Failed):
        return ""
    compared = 0
    for name, settings in _kinds(subject):
        for first in range(0, BATCH * BATCHES, BATCH):
            try:
                whole, *parts = (
                    subject.serve(subject.request(size, PLACES, first=first + at, **settings), method).tokens
                    for at, size in ((0, BATCH), *PARTS)
                )
            except (Refused, Broke):
                break
            where = f" ({name})" if name else ""
            _same(whole, torch.cat(parts), f"with exact predictions in place of the network, {DEPENDS}{where}")
            compared += BATCH
    return (
        f"; {compared} of {compared} sequences equal with exact predictions in place of the network" if compared else ""
    )


def _kinds(subject: Subject) -> list[tuple[str, dict[str, Any]]]:
    """The plain request and its variations; beside the default setting, only the draw has a law of its own."""
    return [("", {}), *(item for item in subject.variations() if subject.setting.default or "draw" in item[1])]


def _sample(
    subject: Subject,
    settings: dict[str, Any],
    batch: int = BATCH,
    first: int = 0,
    backwards: bool = False,
    plain: bool = False,
) -> Tensor | None:
    request = subject.request(batch, first=first, **settings)
    if backwards:
        request = _backwards(request)
    stir()
    try:
        return subject.serve(request).tokens
    except (Refused, Broke) as error:
        if plain or batch != BATCH or backwards:
            raise Failed(f"{batch} sequences from number {first} on: {error}") from None
        return None


def _backwards(request: SampleRequest) -> SampleRequest:
    from tsdfm_bench.rng import Streams

    return replace(request, streams=Streams(request.streams.key, request.streams.sequences.flip(0)))


def _same(wanted: Tensor, found: Tensor | None, message: str, spare: int = 0) -> int:
    if found is None:
        raise Failed(message)
    equal = rows_equal(wanted, found)
    differing = int((~equal).sum())
    require(differing <= spare, f"{message}: {differing} of {len(wanted)} sequences differ")
    return differing


def independent(subject: Subject) -> str:
    """Different streams, different tokens."""
    rows = 4 * BATCH
    first = subject.serve(subject.request(rows)).tokens
    distinct = len({tuple(row) for row in first.tolist()})
    require(
        distinct >= LEAST,
        f"{rows} streams gave only {distinct} different sequences: every sequence must draw from its own stream",
    )
    seen = f"{distinct} of {rows} sequences differ"
    if getattr(subject.info, "stored", False):
        return f"{seen} (stored ones do not change with the seed)"
    other = subject.serve(subject.request(rows, seed=SEED + 1)).tokens
    equal = int(rows_equal(first, other).sum())
    require(equal <= rows - LEAST, f"another root seed gave the same tokens in {equal} of {rows} sequences")
    return f"{seen}, {rows - equal} of {rows} change with the seed"
