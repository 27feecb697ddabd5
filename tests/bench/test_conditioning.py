"""Pinned tokens and reference rows: shared prompts, and two halves of real text that never meet."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tsdfm_bench.conditioning import check_pinning, pinned_tokens, pinning, reference_batch
from tsdfm_bench.config import make_config
from tsdfm_bench.errors import UsageError
from tsdfm_bench.plan import OTHER_HALF, Cell

LENGTH = 12
CELL = Cell("method", "m", {}, "none", "tiny", "tok", "sha256:0", LENGTH, 8, "mask", 1.0)
REAL = Cell("reference", "real", {}, "none", "tiny", "tok", "sha256:0", LENGTH)


@pytest.fixture(scope="module")
def fake() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fakes_module", Path(__file__).parent / "fakes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("given", "setting"),
    [
        ({}, ""),
        ({"prefix": "4"}, "held-out 4"),
        ({"prefix": 4}, "held-out 4"),
        ({"prefix": "the"}, "text the"),
        ({"infill": "0.5"}, "infill 0.5"),
    ],
)
def test_one_form_per_pinning(given: dict[str, object], setting: str) -> None:
    assert pinning(make_config(given)) == setting


def test_a_prompt_is_the_same_in_every_cell_and_batch_split(fake: ModuleType) -> None:
    task = fake.TinyTask()
    cell = replace(CELL, prefix="held-out 4")
    whole = pinned_tokens(cell, task, 0, 6)
    other = pinned_tokens(replace(cell, method="n", steps=1), task, 4, 2)
    assert whole is not None
    assert other is not None
    assert torch.equal(whole[0][4:], other[0])
    assert whole[1].sum().item() == 6 * 4
    assert whole[1][:, :4].all()


def test_infill_pins_about_its_share_and_a_text_its_tokens(fake: ModuleType) -> None:
    task = fake.TinyTask()
    infill = pinned_tokens(replace(CELL, prefix="infill 0.25"), task, 0, 400)
    assert infill is not None
    assert infill[1].double().mean().item() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 4800) ** 0.5)
    text = pinned_tokens(replace(CELL, prefix="text the"), task, 0, 2)
    assert text is not None
    assert text[0][0, :3].tolist() == task.encode("the")
    assert text[1].sum(dim=1).tolist() == [3, 3]
    assert pinned_tokens(CELL, task, 0, 2) is None


@pytest.mark.parametrize(("setting", "fits"), [("held-out 11", True), ("held-out 12", False), ("text ???", False)])
def test_at_least_one_position_is_free_and_one_pinned(fake: ModuleType, setting: str, fits: bool) -> None:
    if fits:
        check_pinning(setting, LENGTH, fake.TinyTask())
    else:
        with pytest.raises(UsageError, match="does not fit"):
            check_pinning(setting, LENGTH, fake.TinyTask())


def test_the_halves_of_real_text_are_the_even_and_odd_places(fake: ModuleType) -> None:
    """Rows see places 0, 2, 4, ... and distances 1, 3, 5, ...: disjoint for every number of sequences."""
    task = fake.TinyTask()
    seen: dict[str, list[int]] = {"row": [], "other": []}

    class Spy:
        info = task.info

        def reference(self, name: str, streams: object, length: int) -> object:
            seen[self.which].extend(streams.sequences.tolist())  # type: ignore[attr-defined]
            return task.reference(name, streams, length)

    spy = Spy()
    for which, cell in (("row", REAL), ("other", replace(REAL, options={"set": OTHER_HALF}))):
        spy.which = which  # type: ignore[attr-defined]
        reference_batch(cell, spy, 0, 3)  # type: ignore[arg-type]
        reference_batch(cell, spy, 3, 2)  # type: ignore[arg-type]
    assert seen == {"row": [0, 2, 4, 6, 8], "other": [1, 3, 5, 7, 9]}


def test_under_a_held_out_prefix_real_text_continues_the_prompts(fake: ModuleType) -> None:
    task = fake.TinyTask()
    pinned = pinned_tokens(replace(CELL, prefix="held-out 4"), task, 0, 3)
    assert pinned is not None
    real, lengths = reference_batch(replace(REAL, prefix="held-out 4"), task, 0, 3)
    canary, _ = reference_batch(replace(REAL, method="unigram", prefix="held-out 4"), task, 0, 3)
    assert torch.equal(real, pinned[0])
    assert torch.equal(canary[:, :4], pinned[0][:, :4])
    assert not torch.equal(canary, pinned[0])
    assert lengths.tolist() == [LENGTH] * 3
