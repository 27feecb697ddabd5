"""Requests: what is refused is refused with a reason; what is accepted is done as asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tsdfm_bench.conformance.report import Failed, Skipped
from tsdfm_bench.conformance.subject import BATCH, LENGTH, SEED, Broke, Refused, Subject, require
from tsdfm_bench.registry import one_line

if TYPE_CHECKING:
    from torch import Tensor

    from tsdfm_bench.api import SampleRequest

COLD = 1e-5
AGREEMENT = 0.9


# --------------------------------------------------------------------------------------------------- refusals


def refusals(subject: Subject) -> str:
    """`refuse` answers None or a reason, whatever is asked; what it lets through, `sample` can do."""
    reasons, served = [], 0
    for name, request in _possible(subject):
        reason = _answer(subject, name, request)
        if reason is not None:
            reasons.append(name)
            continue
        try:
            subject.serve(request)
        except Broke as error:
            raise Failed(f"{name}: refuse() let it through, then sample() failed: {error}") from None
        served += 1
    accepted = [name for name, request in _impossible(subject) if _answer(subject, name, request) is None]
    seen = f"{served} kinds of request served, " + (f"refused: {', '.join(reasons)}" if reasons else "none refused")
    return seen + (f"; lets through without effect: {', '.join(accepted)}" if accepted else "")


def _answer(subject: Subject, name: str, request: SampleRequest) -> str | None:
    try:
        reason = subject.method.refuse(request)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise Failed(f"{name}: refuse() must answer with a reason, it raised {one_line(error)}") from None
    good = reason is None or (isinstance(reason, str) and reason.strip() != "")
    require(good, f"{name}: refuse() must return None or a sentence, not {reason!r}")
    return reason


def _possible(subject: Subject) -> Iterator[tuple[str, SampleRequest]]:
    for name, settings in subject.variations():
        yield name, subject.request(**settings)
    yield "a temperature near 0", subject.request(temperature=COLD)
    yield "a nucleus of one token", subject.request(top_p=1e-9)
    yield "a nucleus of everything", subject.request(top_p=1.0)
    yield "a trace", subject.request(trace=True)
    yield "one sequence", subject.request(1)
    if subject.info.uses_steps:
        yield "one step", subject.request(steps=1)
        yield "more steps than tokens", subject.request(steps=3 * LENGTH)
    prefix, start, scattered = pins(subject)
    yield "a prefix", subject.request(prefix=prefix, pinned=start)
    yield "infill", subject.request(prefix=prefix, pinned=scattered)


def _impossible(subject: Subject) -> Iterator[tuple[str, SampleRequest]]:
    prefix, start, _ = pins(subject)
    yield "a source that does not exist", subject.request(source="no-such-source")
    yield "a draw that does not exist", subject.request(draw="no-such-draw")
    yield "a negative temperature", subject.request(temperature=-1.0)
    yield "top-p 0", subject.request(top_p=0.0)
    yield "a prefix without its mask", subject.request(prefix=prefix)
    yield "a prefix of another shape", subject.request(prefix=prefix[:, :3], pinned=start[:, :3])
    if subject.info.uses_steps:
        yield "0 steps", subject.request(steps=0)
        yield "no number of steps", subject.request(steps=None)


# ------------------------------------------------------------------------------------------------------ pinned


def pins(subject: Subject) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens (batch, length), a mask of the first three places, and one of scattered places."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    prefix = torch.randint(subject.vocab_size, (BATCH, LENGTH), generator=generator)
    start = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    start[:, :3] = True
    scattered = torch.rand(BATCH, LENGTH, generator=generator) < 0.5
    scattered[:, 0] = False  # a mask no left-to-right method can take for a prefix
    scattered[:, -1] = True
    return prefix, start, scattered


def pinned(subject: Subject) -> str:
    """Pinned tokens are kept, and only they are read."""
    prefix, start, scattered = pins(subject)
    seen, served = [], 0
    for name, mask in (("prefix", start), ("infill", scattered)):
        request = subject.request(prefix=prefix.clone(), pinned=mask.clone())
        try:
            tokens = subject.serve(request).tokens
        except Refused as error:
            seen.append(f"{name} refused: {error}")
            continue
        except Broke:
            seen.append(f"{name} failed, see 'refusals'")
            continue
        served += 1
        changed = int((tokens[mask] != prefix[mask]).sum())
        require(changed == 0, f"{name}: {changed} of {int(mask.sum())} pinned tokens were changed")
        unread = torch_where(mask, prefix, (prefix + 1) % subject.vocab_size)
        other = subject.serve(replace(request, prefix=unread)).tokens
        moved = int((other != tokens).sum())
        require(
            moved == 0,
            f"{name}: {moved} tokens change with what `prefix` holds at places that are not pinned; those hold the "
            "held-out continuation and must not be read",
        )
        seen.append(f"{name} kept")
    if not served:
        raise Skipped("; ".join(seen))
    return "; ".join(seen)


def torch_where(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`torch.where`, imported late."""
    import torch

    return torch.where(mask, a, b)


# ------------------------------------------------------------------------------------------------- temperature


def temperature(subject: Subject) -> str:
    """Limits: temperature towards 0, a nucleus of one token, a nucleus of everything."""
    plain = subject.serve(subject.request()).tokens
    greedy = _tokens(subject, temperature=0.0)
    seen = []
    if greedy is not None:
        require(
            not bool((greedy == plain).all()),
            "temperature 0 gives the same tokens as temperature 1: it is ignored (refuse it if it has no meaning)",
        )
        cold = _tokens(subject, temperature=COLD)
        if cold is not None:
            _agree(cold, greedy, f"temperature {COLD:g}", "temperature 0")
            seen.append("temperature 0 is the limit of low temperatures")
    for rule in ("inclusive", "exclusive"):
        one = _tokens(subject, top_p=1e-9, top_p_rule=rule)
        if one is not None and greedy is not None:
            _agree(one, greedy, f"a nucleus of one token ({rule})", "temperature 0")
            seen.append(f"one-token nucleus ({rule}) = temperature 0")
    everything = _tokens(subject, top_p=1.0)
    if everything is not None:
        _agree(everything, plain, "a nucleus of everything", "no nucleus")
        seen.append("full nucleus = none")
    if not seen:
        raise Skipped("temperature and nucleus are refused")
    return "; ".join(seen)


def _tokens(subject: Subject, **settings: Any) -> Tensor | None:
    batch = subject.maybe(subject.request(**settings))
    return None if batch is None else batch.tokens


def _agree(a: Tensor, b: Tensor, left: str, right: str) -> None:
    share = float((a == b).double().mean())
    require(share >= AGREEMENT, f"{left} and {right} must agree, they do in {share:.0%} of the tokens")
