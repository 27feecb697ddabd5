"""Which cells a request means, and what their ids depend on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tsdfm_bench.api import Identity, ScorerInfo, TaskInfo
from tsdfm_bench.config import make_config
from tsdfm_bench.errors import CheckpointError, PluginError, UsageError
from tsdfm_bench.plan import Cell, Plan, default_batch_size, hash_path, identify, make_plan, score_id, tidy_path
from tsdfm_bench.registry import Registry

TASK = TaskInfo("tiny", "tiny-16@00000000", 16, 12, "sha256:0", ("real", "unigram"))
CELL = Cell("method", "m", {}, "sha256:1", "tiny", "tok", "sha256:0", 12, 8, "mask", 1.0, None, None, "fp64", "", 0)


def plan_of(fakes: Path, registry: Registry | None = None, **given: Any) -> Plan:
    config = make_config({"task": "tiny", "methods": "counter", "metrics": "letters", "plugins": [fakes], **given})
    return make_plan(config, registry or Registry([fakes]), TASK)


def test_a_cell_id_is_the_hash_of_its_canonical_json() -> None:
    text = json.dumps({**CELL.identity(), "temperature": 1}, sort_keys=True, separators=(",", ":"))
    assert CELL.id == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_equal_numbers_give_equal_ids() -> None:
    assert replace(CELL, temperature=1).id == CELL.id  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "reference"},
        {"method": "n"},
        {"options": {"solver": "exact"}},
        {"weights": "sha256:2"},
        {"task": "other"},
        {"tokenizer": "other"},
        {"data_hash": "sha256:3"},
        {"length": 13},
        {"steps": 9},
        {"source": None},
        {"temperature": 0.9},
        {"top_p": 0.9},
        {"top_p_rule": "inclusive"},
        {"draw": "legacy-fp32"},
        {"prefix": "held-out 4"},
        {"seed": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_of_a_cell_is_part_of_its_id(change: dict[str, Any]) -> None:
    assert replace(CELL, **change).id != CELL.id


def test_the_number_of_samples_and_the_judges_are_no_part_of_ids(fakes: Path) -> None:
    few = plan_of(fakes, samples=8)
    many = plan_of(fakes, samples=800, scorers="toy,broken", metrics="letters,speed", batch_size=4)
    assert {p.cell.id for p in few.cells} == {p.cell.id for p in many.cells}
    assert few.folder == many.folder


def test_the_order_of_a_request_does_not_matter(fakes: Path) -> None:
    a = plan_of(fakes, methods="counter,stepless", steps="2,4", sources="mask,uniform")
    b = plan_of(fakes, methods="stepless,counter", steps="4,2,4", sources="uniform,mask")
    assert a.folder == b.folder
    assert a.request() == b.request()


def test_the_product_of_the_axes(fakes: Path) -> None:
    plan = plan_of(fakes, steps="2,4", sources="uniform,mask", temperatures="1,0.5", top_p="none,0.9")
    cells = [p.cell for p in plan.cells if p.cell.kind == "method"]
    assert len(cells) == len({c.id for c in cells}) == 16
    assert {(c.top_p, c.top_p_rule) for c in cells} == {(None, None), (0.9, "inclusive")}


def test_a_method_without_steps_and_sources_is_one_cell(fakes: Path) -> None:
    plan = plan_of(fakes, methods="stepless", steps="2,4,8", sources="uniform,mask")
    cells = [p.cell for p in plan.cells if p.cell.kind == "method"]
    assert [(c.steps, c.source) for c in cells] == [(None, None)]
    assert not plan.rejected


def test_references_have_no_sampling_settings_and_do_not_depend_on_the_methods(fakes: Path) -> None:
    a, b = plan_of(fakes), plan_of(fakes, methods="stepless", temperatures="0.5")
    references = [[p.cell for p in plan.cells if p.cell.kind == "reference"] for plan in (a, b)]
    assert references[0] == references[1]
    assert [c.method for c in references[0]] == ["real", "unigram"]
    assert all(c.temperature is None and c.draw is None for c in references[0])


def test_more_held_out_text_is_planned_if_a_metric_compares_with_it(fakes: Path) -> None:
    cells = [p.cell for p in plan_of(fakes, metrics="letters,distance").cells]
    assert [c.label for c in cells if c.hidden] == ["real (other half)"]


def test_without_a_source_asked_for_the_first_one_is_taken(fakes: Path) -> None:
    assert {p.cell.source for p in plan_of(fakes).cells if p.cell.kind == "method"} == {"uniform"}


def test_a_source_that_a_method_lacks_is_a_row_with_its_reason(fakes: Path) -> None:
    plan = plan_of(fakes, sources="mask,unigram", steps="2,4")
    assert {p.cell.source for p in plan.cells if p.cell.kind == "method"} == {"mask"}
    (row,) = plan.rejected
    assert (row.state, row.cell.source) == ("skipped", "unigram")
    assert row.reason == "counter has no source 'unigram'; it has: uniform, mask"


def test_another_vocabulary_is_a_row_with_its_reason(fakes: Path) -> None:
    (row,) = plan_of(fakes, methods="foreign,counter").rejected
    assert row.state == "skipped"
    assert "gpt2" in row.reason


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"methods": "countr"}, "unknown method 'countr'; did you mean 'counter'"),
        ({"sources": "masc"}, "unknown source 'masc'; did you mean 'mask'"),
        ({"methods": "counter[flavor=loud]"}, "unknown option of method counter 'flavor'; did you mean 'flavour'"),
        ({"methods": "counter[flavour=lout]"}, "unknown flavour of method counter 'lout'; did you mean 'loud'"),
        ({"metrics": "leters"}, "unknown metric 'leters'"),
        ({"prefix": "12"}, "prefix of 12 tokens does not fit sequences of 12"),
        ({"prefix": "0"}, "prefix of 0 tokens"),
        ({"checkpoint": "nowhere.bin"}, "no such checkpoint: nowhere.bin"),
        ({"methods": "counter[checkpoint=nowhere.bin]"}, "no such checkpoint: nowhere.bin"),
    ],
)
def test_a_wrong_request(fakes: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        plan_of(fakes, **given)


def test_weights_that_are_missing_are_a_row_if_others_can_run(fakes: Path) -> None:
    plan = plan_of(fakes, methods="counter[checkpoint=nowhere.bin],stepless")
    (row,) = plan.rejected
    assert row.state == "failed"
    assert "no such checkpoint" in row.reason
    assert [p.cell.method for p in plan.cells if p.cell.kind == "method"] == ["stepless"]


def test_altered_weights_are_other_cells(fakes: Path, tmp_path: Path) -> None:
    weights = tmp_path / "w.bin"
    ids = []
    for content in (b"one", b"two"):
        weights.write_bytes(content)
        ids.append(plan_of(fakes, checkpoint=str(weights)).cells[0].cell.id)
    assert ids[0] != ids[1]
    weights.rename(tmp_path / "renamed.bin")
    assert plan_of(fakes, checkpoint=str(tmp_path / "renamed.bin")).cells[0].cell.id == ids[1]


def test_a_broken_plugin_is_a_row_and_the_only_method_an_error(fakes: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("raise ValueError('oh no')")
    registry = Registry([fakes, file])
    (row,) = plan_of(fakes, registry, methods="counter,mine").rejected
    assert (row.state, row.cell.method) == ("failed", "mine")
    assert "ValueError: oh no" in row.reason
    with pytest.raises(PluginError, match="oh no"):
        plan_of(fakes, registry, methods="mine")


def test_weights_without_a_hook_are_hashed(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_text("1")
    (folder / "sub" / "b").write_text("2")
    first = identify(object, {"checkpoint": str(folder)})
    assert first.weights == f"sha256:{hash_path(folder)}"
    (folder / "sub" / "b").write_text("3")
    assert identify(object, {"checkpoint": str(folder)}).weights != first.weights
    assert identify(object, {"checkpoint": None}) == Identity("none", "none")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        identify(object, {"checkpoint": str(tmp_path / "absent")})


@pytest.mark.parametrize(
    "change", [{"revision": "2"}, {"dtype": "bf16"}, {"window": 9}, {"stride": 2}, {"context": "x"}]
)
def test_a_score_id_depends_on_what_changes_an_nll(change: dict[str, Any]) -> None:
    info = ScorerInfo("s", "S", "1", "token", "fp32", 8, 4)
    assert score_id("cell", replace(info, **change)) != score_id("cell", info)
    assert score_id("cell", replace(info, title="T")) == score_id("cell", info)
    assert score_id("other", info) != score_id("cell", info)


def test_batch_sizes_follow_the_length() -> None:
    assert [default_batch_size(length) for length in (1, 64, 128, 1024)] == [64, 64, 32, 16]


def test_paths_are_told_without_folders_of_users() -> None:
    assert tidy_path("/home/someone/runs/weights") == "runs/weights"
    assert tidy_path("weights/mine") == "weights/mine"
