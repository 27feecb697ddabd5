"""What `bench-speed` measures is what it says: the same calls again, the same networks, exponents of known laws."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tsdfm_bench.api import SampleRequest
from tsdfm_bench.cli import app
from tsdfm_bench.commands import bench_speed
from tsdfm_bench.errors import UsageError
from tsdfm_bench.registry import Registry
from tsdfm_bench.rng import Streams
from tsdfm_bench.speed import others, scaling
from tsdfm_bench.speed.cases import CASES, Case, Size, load_method
from tsdfm_bench.speed.clock import Clock, Ratio
from tsdfm_bench.speed.figure import draw_growth
from tsdfm_bench.speed.sampling import Recorded, measure

TINY = Size("tiny", 40, 8, {"width": 16, "blocks": 2, "heads": 2, "condition": 8})


def test_ratios_are_taken_within_a_repeat() -> None:
    ratio = Ratio.of([2.0, 40.0, 3.0], [1.0, 10.0, 1.0])
    assert (ratio.median, ratio.low, ratio.high, ratio.repeats) == (3.0, 2.0, 4.0, 3)


def test_works_alternate() -> None:
    done: list[str] = []
    taken = Clock("cpu", 1).alternate([lambda: done.append("a"), lambda: done.append("b")], 3)
    assert "".join(done) == "ababab"
    assert [len(seconds) for seconds in taken] == [3, 3]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_recorded_calls_are_made_again(case: Case) -> None:
    """As many calls, with the same outputs; a key-value cache is filled from its start."""
    method = load_method(Registry(), case, TINY, "cpu")
    network = next(iter(method.networks().values()))
    outputs: list[torch.Tensor] = []
    network.register_forward_hook(lambda *given: outputs.append(given[-1].clone()))
    recorded = Recorded(network)
    steps = None if case.source is None else 5
    with recorded.recording():
        method.sample(SampleRequest(Streams.of(0, "again", 3), TINY.length, steps, source=case.source))
    first, outputs[:] = list(outputs), []
    recorded.again()
    assert len(first) == len(outputs) == len(recorded.calls) > 0
    assert all(torch.equal(a, b) for a, b in zip(first, outputs, strict=True))


def test_a_row_counts_the_calls_that_were_made() -> None:
    case = next(case for case in CASES if case.label == "mdlm mask cached")
    method = load_method(Registry(), case, TINY, "cpu")
    row = measure(case, method, TINY, 2, 1000, Clock("cpu", 1), 1, 2)
    assert row.calls <= TINY.length + 1  # a call reveals something, or is the finaliser's
    assert row.sequence_calls <= row.calls
    assert row.plain_steps == 2
    assert row.ratio_plain is not None
    assert row.ratio_plain.median > 1  # a thousand plain steps cost more than nine calls


def test_the_network_of_transformers_is_ours() -> None:
    """As many numbers in matrices; only biases differ."""

    def matrices(network: torch.nn.Module) -> int:
        return sum(p.numel() for p in network.parameters() if p.dim() == 2)

    method = load_method(Registry(), Case("ar"), TINY, "cpu")
    other = others.neox(TINY)
    assert matrices(method.networks()["denoiser"]) == matrices(other)
    rotated = 2 * other.gpt_neox.rotary_emb.inv_freq.numel()
    assert rotated == TINY.network["width"] // TINY.network["heads"]  # the whole head, as ours


def test_scores_of_both_ways_are_equal() -> None:
    size = replace(TINY, vocab_size=300)
    texts = others.random_texts(3, size.length)
    scorer, model = others.scorer_and_model(Registry(), size, "cpu")
    scores = scorer.score(texts)
    for nll, units in zip(scores.nll, scores.units, strict=True):
        row = torch.tensor([[0, *units.tolist()]])
        assert len(units) == size.length
        np.testing.assert_allclose(nll.mean(), float(model(input_ids=row, labels=row).loss.detach()), rtol=1e-4)


def test_generation_is_compared() -> None:
    row = others.generation(Registry(), TINY, 2, Clock("cpu", 1), 1)
    assert row.seconds > 0
    assert row.ratio.median > 0


def test_the_exponent_of_a_power_law_is_found(tmp_path) -> None:
    points = [(x, 3e-4 * x**1.5) for x in (2, 8, 32)]
    assert scaling.fit_exponent(points) == pytest.approx(1.5)
    growths = [scaling.Growth("dfm", axis, points, [1, 1, 1], 1.5) for axis in scaling.AXES[:2]]
    for path in draw_growth(growths, "seconds", tmp_path):
        assert path.stat().st_size > 1000


@pytest.mark.parametrize(("device", "sizes"), [("cpu", {"sotu"}), ("cuda", {"sotu", "base"})])
def test_the_large_size_is_measured_on_an_accelerator_unless_it_is_named(
    device: str, sizes: set[str], monkeypatch
) -> None:
    asked: list[bench_speed.Settings] = []
    monkeypatch.setattr("tsdfm_bench.meter.choose_device", lambda _: device)
    monkeypatch.setattr("tsdfm_bench.meter.device_name", lambda _: device)
    monkeypatch.setattr(bench_speed, "_work", lambda settings, *_: asked.append(settings) or ())
    for words in ([], ["--quick"], ["--sizes", "base"]):
        assert CliRunner().invoke(app, ["bench-speed", *words]).exit_code == 0
    assert [set(settings.sizes) for settings in asked] == [sizes, {"sotu"}, {"base"}]


@pytest.mark.parametrize("axis", scaling.AXES)
def test_an_axis_varies_one_thing(axis: str) -> None:
    varied = [(size.length, size.vocab_size, batch, steps) for _, size, batch, steps in scaling.settings(axis)]
    changing = [len(set(column)) > 1 for column in zip(*varied, strict=True)]
    assert changing == [name == axis for name in scaling.AXES]


def test_a_method_without_random_weights_says_so() -> None:
    with pytest.raises(UsageError, match="untrained"):
        load_method(Registry(), Case("file"), TINY, "cpu")


def test_command_prints_json_and_keeps_it_with_its_provenance(tmp_path: Path) -> None:
    words = ["bench-speed", "--quick", "--parts", "sampling", "--methods", "dfm", "--batches", "1", "--steps", "2"]
    printed = CliRunner().invoke(app, [*words, "--repeats", "1", "--json", "--out", str(tmp_path / "kept")])
    assert printed.exit_code == 0, printed.output
    found = json.loads(printed.stdout)
    assert json.loads((tmp_path / "kept" / "speed.json").read_text()).items() >= found.items()
    (run,) = json.loads((tmp_path / "kept" / "provenance.json").read_text())["runs"]
    assert run["threads"] == found["threads"] == 1
    assert "torch" in run["versions"]
    assert [row["method"] for row in found["sampling"]] == [c.label for c in CASES if c.method == "dfm"]
    assert {"overhead", "ratio_plain", "calls", "seconds"} <= set(found["sampling"][0])
    assert all(row["calls"] <= 2 for row in found["sampling"])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--sizes", "huge", "sotu"), ("--parts", "scorng", "scoring"), ("--batches", "0", "from 1 on")],
)
def test_wrong_use_is_explained(option: str, value: str, message: str) -> None:
    shown = CliRunner().invoke(app, ["bench-speed", option, value])
    assert shown.exit_code == 2
    assert message in shown.output


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(bench_speed, "_work", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").write_text("kept")
    shown = CliRunner().invoke(app, ["bench-speed", "--out", str(tmp_path / "file")])
    assert shown.exit_code == 2
    assert "is a file: give a folder" in shown.output
    assert (tmp_path / "file").read_text() == "kept"
    shown = CliRunner().invoke(app, ["bench-speed", "--out", str(tmp_path / "file" / "below")])
    assert shown.exit_code == 1
    assert "cannot make the folder" in shown.output
