"""Properties every built-in sampler must have, whatever its law: parametrised over all methods, sources and options."""

from __future__ import annotations

import pytest
import torch

from tsdfm_bench.api import Method
from tsdfm_bench.errors import PluginError, UsageError
from tsdfm_bench.methods.ar import AR
from tsdfm_bench.methods.core import UnigramSource
from tsdfm_bench.methods.dfm import DFM
from tsdfm_bench.methods.fsdfm import FSDFM
from tsdfm_bench.methods.mdlm import MDLM
from tsdfm_bench.methods.sedd import SEDD
from tsdfm_bench.methods.tsdfm import TSDFM
from tsdfm_bench.rng import Streams

V = 7


class Chain:
    """An autoregressive denoiser that looks up the previous token."""

    vocab_size = V

    def __init__(self):
        self.table = 2 * torch.randn(V + 1, V, generator=torch.Generator().manual_seed(3))

    def begin(self, batch, length):
        return {"last": torch.full((batch,), V)}

    def next_logits(self, memory, tokens):
        if tokens.shape[1]:
            memory["last"] = tokens[:, -1]
        return self.table[memory["last"]]

    def networks(self):
        return {}


def diffusion(method, source, kind="x0_logits", **options):
    def build(lab):
        denoiser = lab.TableDenoiser(V, V + (source == "mask"), kind, seed=11, spread=2.0)
        return method(denoiser, source, **options) if method is not MDLM else method(denoiser, **options)

    return build


CASES = {
    "ar": lambda lab: AR(Chain()),
    **{f"mdlm-{s}": diffusion(MDLM, "mask", sampler=s) for s in ("cached", "ancestral", "first-hitting")},
    **{f"mdlm-{f}": diffusion(MDLM, "mask", finaliser=f) for f in ("sample", "none")},
    **{
        f"sedd-{source}-{sampler}-{kind}": diffusion(SEDD, source, kind, sampler=sampler)
        for source in ("mask", "uniform")
        for sampler in ("analytic", "euler")
        for kind in ("log_score", "x0_logits")
    },
    **{
        f"dfm-{source}-{solver}": diffusion(DFM, source, solver=solver)
        for source in ("mask", "uniform")
        for solver in ("euler", "cumulative", "exact")
    },
    **{f"dfm-mask-{u}": diffusion(DFM, "mask", unmask_change=u) for u in ("always", "never")},
    **{f"fsdfm-mask-{u}": diffusion(FSDFM, "mask", unmask_change=u) for u in ("always", "never")},
    "fsdfm-uniform": diffusion(FSDFM, "uniform"),
    "fsdfm-mask": diffusion(FSDFM, "mask"),
    "tsdfm-uniform": diffusion(TSDFM, "uniform"),
    "tsdfm-mask": diffusion(TSDFM, "mask"),
    "fsdfm-unigram": diffusion(FSDFM, UnigramSource(torch.arange(1.0, V + 1))),
}


@pytest.fixture(params=list(CASES))
def method(request, lab):
    return CASES[request.param](lab)


def ask(lab, method, batch=6, length=5, steps=6, **settings):
    return lab.request(batch, length, steps if method.info.uses_steps else None, **settings)


SETTINGS = [
    {},
    {"temperature": 0.7, "top_p": 0.9},
    {"top_p": 0.8, "top_p_rule": "exclusive"},
    {"temperature": 0.0},
    {"draw": "legacy-fp32"},
]


def test_contract(lab, method):
    assert isinstance(method, Method)
    batch = method.sample(ask(lab, method, trace=True))
    assert batch.tokens.shape == (6, 5)
    assert batch.tokens.dtype == torch.int64
    assert batch.lengths.tolist() == [5] * 6
    assert batch.trace is not None
    assert torch.equal(batch.trace[:, -1], batch.tokens)
    assert method.sample(ask(lab, method)).trace is None


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_sequence_does_not_depend_on_its_batch(lab, method, settings):
    """Any split and any order of the sequences gives every sequence the same tokens."""
    whole = method.sample(ask(lab, method, **settings)).tokens
    parts = [method.sample(ask(lab, method, batch=b, first=f, **settings)).tokens for f, b in ((0, 2), (2, 1), (3, 3))]
    assert torch.equal(torch.cat(parts), whole)
    backwards = ask(lab, method, **settings)
    order = torch.arange(5, -1, -1)
    reversed_streams = Streams(backwards.streams.key, order)
    changed = type(backwards)(**{**vars(backwards), "streams": reversed_streams})
    assert torch.equal(method.sample(changed).tokens, whole[order])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_no_mask_leaves_and_every_shape_works(lab, method, settings):
    for length, steps in [(1, 1), (1, 5), (9, 1), (4, 2), (3, 20)]:
        tokens = method.sample(ask(lab, method, 20, length, steps, **settings)).tokens
        assert tokens.shape == (20, length)
        assert int(tokens.min()) >= 0
        assert int(tokens.max()) < V


def test_pinned_tokens_stay_and_condition_the_rest(lab, method):
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randint(V, (6, 5), generator=generator)
    pinned = torch.rand(6, 5, generator=generator) < 0.5
    pinned[0], pinned[1] = True, False
    if method.info.name == "ar":
        pinned = pinned.long().cumprod(dim=1).bool()
    for settings in ({}, {"draw": "legacy-fp32"}):
        batch = method.sample(ask(lab, method, prefix=prefix, pinned=pinned, trace=True, **settings))
        assert torch.equal(batch.tokens[pinned], prefix[pinned])
        steps = batch.trace.shape[1]
        assert torch.equal(
            batch.trace[pinned[:, None, :].expand(-1, steps, -1)].view(-1),
            (prefix[:, None, :].expand(-1, steps, -1)[pinned[:, None, :].expand(-1, steps, -1)]),
        )
        assert int(batch.tokens.max()) < V
    free = method.sample(ask(lab, method)).tokens
    assert not torch.equal(batch.tokens[2:], free[2:])


def test_everything_pinned_needs_no_call(lab, method):
    prefix = torch.zeros(3, 4, dtype=torch.int64)
    pinned = torch.ones(3, 4, dtype=torch.bool)
    assert torch.equal(method.sample(ask(lab, method, 3, 4, prefix=prefix, pinned=pinned)).tokens, prefix)
    if hasattr(method.denoiser, "calls"):
        method.denoiser.calls = 0
        method.sample(ask(lab, method, 3, 4, prefix=prefix, pinned=pinned))
        assert method.denoiser.calls == 0


def test_temperature_zero_only_draws_the_most_likely_tokens(lab, method):
    """In the last step every token that is drawn is an argmax: with one step, all of them are."""
    if method.info.name == "sedd" and method.source.name == "uniform":
        pytest.skip("uniform score entropy mixes the clean-token distribution with the noise in every step")
    if getattr(method, "sampler", "") == "first-hitting":
        pytest.skip("every sequence asks this denoiser at another time")
    request = ask(lab, method, 50, 1, 1, temperature=0.0)
    tokens = method.sample(request).tokens
    if method.info.name == "ar" or method.source.name == "mask":
        assert tokens.unique().numel() == 1
        return
    start = method.source.prior(request.streams, 1)
    for row in range(50):
        p = method.denoiser.probabilities((int(start[row]),), 0.0)[0]
        assert tokens[row] == p[:V].argmax()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"temperature": -1.0}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_p": 0.0}, "top_p must lie"),
        ({"top_p": 1.5}, "top_p must lie"),
        ({"top_p_rule": "both"}, "unknown top-p rule"),
        ({"draw": "fp16"}, "unknown draw"),
        ({"length": 0}, "length must be"),
        ({"source": "gaussian"}, "no source|has no source"),
        ({"prefix": torch.zeros(6, 5, dtype=torch.int64)}, "belong together"),
        ({"prefix": torch.zeros(6, 4, dtype=torch.int64), "pinned": torch.ones(6, 5).bool()}, "prefix has shape"),
        ({"prefix": torch.full((6, 5), V), "pinned": torch.ones(6, 5).bool()}, "pinned tokens must lie"),
        ({"prefix": torch.full((6, 5), -1), "pinned": torch.ones(6, 5).bool()}, "pinned tokens must lie"),
    ],
    ids=str,
)
def test_refusals(lab, method, settings, reason):
    request = ask(lab, method, **settings)
    assert method.refuse(ask(lab, method)) is None
    told = method.refuse(request)
    assert told is not None
    with pytest.raises(UsageError, match=reason):
        method.sample(request)


@pytest.mark.parametrize("steps", [None, 0, -3])
def test_step_counts_are_checked(lab, method, steps):
    told = method.refuse(lab.request(2, 3, steps))
    if method.info.uses_steps:
        assert "steps" in str(told)
    else:
        assert told is None


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_damaged_logits_are_reported(lab, method, temperature):
    """At temperature 0 too, where the greatest of numbers that are none would be token 0."""
    table = method.denoiser.table
    method.denoiser.table = torch.full_like(table, float("nan"))
    with pytest.raises(PluginError, match="not finite"):
        method.sample(ask(lab, method, temperature=temperature))
