"""Variants and controls of a recipe: what they share, what they cost, and that they are recorded for the tables."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import tomllib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tsdfm_bench.errors import CheckpointError, MatchError, UsageError
from tsdfm_bench.methods.nets import pretrained
from tsdfm_bench.methods.nets.dit import DiT, DiTConfig
from tsdfm_bench.methods.nets.pretrained import CONFIG_FILE, read_config, replace_file
from tsdfm_bench.methods.train import matching, records
from tsdfm_bench.methods.train.command import (
    REPORT_FILE,
    NamedJudge,
    failures_of,
    is_trained,
    of_equal_cost,
    record_trajectories,
    train_recipe,
)
from tsdfm_bench.methods.train.data import TrainingText
from tsdfm_bench.methods.train.matching import (
    TOLERANCE_NATS,
    held_out_logits,
    match_entropy,
    matching_temperature,
    mean_entropy,
    sampled_entropy,
)
from tsdfm_bench.methods.train.recipe import Recipe, load_recipe, spell_out
from tsdfm_bench.methods.train.records import STUDENTS, trained_as
from tsdfm_bench.methods.train.shaping import GATES, RULES, SWITCHES
from tsdfm_bench.methods.train.shortcut import DEFAULTS, OPTIONS
from tsdfm_bench.methods.train.trainer import Trainer, TrainingConfig
from tsdfm_bench.methods.train.trajectories import commit_steps, unigram_entropy
from tsdfm_bench.results.arrays import write_table
from tsdfm_bench.results.training import TRAJECTORY_COLUMNS, read_costs, read_trajectories, read_variants

V, LENGTH = 6, 8
STREAM = np.tile(np.arange(V), 500)
TEXT = TrainingText("cycle", {"train": STREAM, "validation": STREAM}, V, LENGTH, "cycle@1", "sha256:cycle")
TRAINING = {"batch": 8, "steps": 6, "lr": 1e-2, "warmup": 1, "validate_every": 100}
STUDENT = {"source": "uniform", "teacher": "dfm-uniform", "draws": "student"}


def recipe() -> Recipe:
    return Recipe.model_validate(
        {
            "scale": "toy",
            "task": "cycle",
            "network": {"width": 16, "blocks": 2, "heads": 2, "condition": 8},
            "training": TRAINING,
            "stage": [
                {"name": "dfm-uniform", "kind": "dfm", "source": "uniform", "training": {"steps": 30}},
                {
                    "name": "compass-uniform",
                    "kind": "compass",
                    "source": "uniform",
                    "teacher": "dfm-uniform",
                    "blocks": 1,
                },
                {"name": "fsdfm-uniform", "kind": "fsdfm", **STUDENT, "seeds": [0, 1]},
                {
                    "name": "tsdfm-uniform",
                    "kind": "tsdfm",
                    **STUDENT,
                    "compass": "compass-uniform",
                    "despite_checks": True,
                    "shaping": {"tau": 0.0, "candidates": 16},
                },
                {"name": "k1", "like": "tsdfm-uniform", "shaping": {"candidates": 1}},
                {
                    "name": "entropy-matched",
                    "like": "fsdfm-uniform",
                    "start_from": "fsdfm-uniform",
                    "match": "tsdfm-uniform",
                },
                {"name": "certainty-matched", "like": "entropy-matched", "match_on": "predictions"},
                {"name": "flop-matched", "like": "fsdfm-uniform", "cost_of": "tsdfm-uniform"},
            ],
        }
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Every stage of the toy recipe, trained."""
    folder = tmp_path_factory.mktemp("trained")
    said: list[str] = []
    judge = NamedJudge("cycle", lambda tokens: (tokens[:, 1:] != (tokens[:, :-1] + 1) % V).mean(axis=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "SAMPLES", 64)
        assert train_recipe(recipe(), TEXT, folder, announce=said.append, judge=judge) == []
    return folder


def weights(folder) -> dict[str, Tensor]:
    return DiT.from_pretrained(folder).state_dict()


def test_one_candidate_is_fsdfm_bit_for_bit_after_training(trained) -> None:
    """Same seed, same named random numbers, no shaping: the same network; with shaping another one."""
    plain, one, shaped = (weights(trained / name) for name in ("fsdfm-uniform", "k1", "tsdfm-uniform"))
    assert all(torch.equal(plain[key], one[key]) for key in plain)
    assert any(not torch.equal(plain[key], shaped[key]) for key in plain)
    other = weights(trained / "fsdfm-uniform-s1")
    assert any(not torch.equal(plain[key], other[key]) for key in plain)


def test_variants_and_costs_are_recorded_as_the_tables_read_them(trained) -> None:
    variants = {(v.name, v.training_seed): v for v in read_variants(trained / "variants.json").variants}
    assert set(variants) == {
        ("fsdfm-uniform", 0),
        ("fsdfm-uniform", 1),
        ("tsdfm-uniform", 0),
        ("k1", 0),
        ("entropy-matched", 0),
        ("certainty-matched", 0),
        ("flop-matched", 0),
        ("fsdfm-uniform, compass at inference", 0),
        ("fsdfm-uniform, compass at inference", 1),
    }
    assert variants["k1", 0].settings["K"] == 1
    assert variants["k1", 0].settings["switch_time"] == 0.75
    steps = {name: v.settings["training_steps"] for (name, _), v in variants.items()}
    assert steps["k1"] == TRAINING["steps"] < steps["flop-matched"]
    assert [v.name for v in variants.values() if v.default] == ["fsdfm-uniform", "tsdfm-uniform"]
    controls = {name: v.settings["control"] for (name, _), v in variants.items()}
    assert controls["entropy-matched"] == "entropy_matched"
    assert controls["certainty-matched"] == "certainty_matched"
    assert controls["fsdfm-uniform, compass at inference"] == "compass_at_inference"
    costs = {cost.name: cost for cost in read_costs(trained / "training_cost.json").costs}
    assert costs["tsdfm-uniform"].flops_per_step > 1.05 * costs["k1"].flops_per_step  # type: ignore[operator]
    assert costs["k1"].flops_per_step == pytest.approx(costs["fsdfm-uniform"].flops_per_step)
    assert len(costs["k1"].seconds_per_step) == TRAINING["steps"] - 3


def test_flop_matched_student_costs_what_shaping_costs(trained) -> None:
    cost = {name: read_config(trained / name)["training_flops"] for name in ("tsdfm-uniform", "flop-matched")}
    steps = read_config(trained / "flop-matched")["steps"]
    assert steps > TRAINING["steps"]
    assert abs(cost["flop-matched"] - cost["tsdfm-uniform"]) < 1.5 * cost["flop-matched"] / steps
    stage = next(stage for stage in recipe().stage if stage.name == "flop-matched")
    assert recipe().training_of(of_equal_cost(stage, recipe(), TEXT, trained, "cpu")).steps == steps  # resumable


def tempered(folder: Path, temperature: float) -> None:
    """A student that draws every token from one law whatever the state, at some temperature."""
    student = DiT(DiTConfig(V, V, LENGTH, width=8, blocks=1, heads=1, condition=4, step_aware=True))
    with torch.no_grad():
        student.output.linear.bias.copy_(torch.linspace(3, -3, V) / temperature)
    about = {"recipe": {}, "validation": {}}
    student.save_pretrained(folder, about, torch.float32)


def test_entropy_matched_student_samples_with_the_entropy_of_the_shaped_one(tmp_path) -> None:
    tempered(tmp_path / "dfm-uniform", 1.0)
    tempered(tmp_path / "fsdfm-uniform", 1.0)
    tempered(tmp_path / "tsdfm-uniform", 0.6)
    stage = next(stage for stage in recipe().stage if stage.name == "entropy-matched")
    assert match_entropy(stage, TEXT, tmp_path, "cpu") == pytest.approx(0.6, rel=0.01)
    wanted, got, before = (
        sampled_entropy(DiT.from_pretrained(tmp_path / name), "uniform", LENGTH)
        for name in ("tsdfm-uniform", "entropy-matched", "fsdfm-uniform")
    )
    assert got == pytest.approx(wanted, abs=TOLERANCE_NATS)
    assert before > wanted + 10 * TOLERANCE_NATS
    about = read_config(tmp_path / "entropy-matched")["matched"]
    assert (about["before_nats"], about["wanted_nats"]) == pytest.approx((before, wanted), abs=1e-4)


def test_an_entropy_out_of_reach_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(matching, "LOWEST", 0.8)
    tempered(tmp_path / "fsdfm-uniform", 1.0)
    tempered(tmp_path / "tsdfm-uniform", 0.6)
    stage = next(stage for stage in recipe().stage if stage.name == "entropy-matched")
    with pytest.raises(MatchError, match=r"no temperature from 0\.8 to 5 gives 'fsdfm-uniform' the entropy of"):
        match_entropy(stage, TEXT, tmp_path, "cpu")


def test_certainty_matched_student_is_as_certain_as_the_shaped_one(trained) -> None:
    entropies = {
        name: mean_entropy(held_out_logits(DiT.from_pretrained(trained / name), TEXT))
        for name in ("certainty-matched", "tsdfm-uniform", "fsdfm-uniform")
    }
    assert entropies["certainty-matched"] == pytest.approx(entropies["tsdfm-uniform"], abs=2e-3)  # bf16 weights
    about = read_config(trained / "certainty-matched")["matched"]
    assert about["before_nats"] == pytest.approx(entropies["fsdfm-uniform"], abs=1e-3)


def test_the_temperature_of_a_known_logit() -> None:
    """Two outcomes with logits (a, 0): entropy at T is that of sigmoid(a / T)."""
    logits = torch.tensor([[2.0, 0.0]]).expand(50, 2)
    for temperature in (0.5, 1.7):
        p = 1 / (1 + math.exp(-2 / temperature))
        entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
        assert mean_entropy(logits, temperature) == pytest.approx(entropy, rel=1e-5)
        found, reached = matching_temperature(partial(mean_entropy, logits), entropy)
        assert found == pytest.approx(temperature, rel=2e-3)
        assert reached == pytest.approx(entropy, rel=2e-3)


def test_a_seed_is_matched_to_its_own_seed() -> None:
    stages = {stage.name: stage for stage in load_recipe("hmm").stage}
    assert (stages["entropy-matched-s2"].start_from, stages["entropy-matched-s2"].match) == (
        "fsdfm-uniform-s2",
        "tsdfm-uniform-s2",
    )
    assert stages["refreshed-s2"].start_from == stages["restarted-s2"].start_from == "first-half-s2"


@pytest.mark.parametrize("scale", ["markov", "hmm", "sotu-ablation"])
def test_the_sweeps_of_an_ablation_sample_every_student_of_its_recipe(scale: str) -> None:
    """But for those that others are made from only, and sotu's mask students, which are in the main table."""
    sampled = set()
    for path in (Path(__file__).parents[3] / "paper_figures" / "sweeps").glob("ablation-*.toml"):
        for method in tomllib.loads(path.read_text())["methods"]:
            folder = re.search(r"runs/train-([^/]*)/([^]]*)", method)
            assert folder is not None
            sampled |= {folder[2]} if folder[1] == scale else set()
    students = {stage.name for stage in load_recipe(scale).stage if stage.kind in STUDENTS}
    apart = {name for name in students if name.startswith("first-half")}
    assert sampled == students - apart - ({"fsdfm-mask", "tsdfm-mask"} if scale == "sotu-ablation" else set())


def test_a_network_made_from_another_one_than_is_there_now_is_refused(trained, tmp_path) -> None:
    folder = tmp_path / "trained"
    shutil.copytree(trained, folder)
    stages = {stage.name: stage for stage in recipe().stage}
    assert all(is_trained(stage, recipe(), TEXT, folder) for stage in stages.values())
    about = {k: v for k, v in read_config(folder / "tsdfm-uniform").items() if k not in ("architecture", "network")}
    shaped = DiT.from_pretrained(folder / "tsdfm-uniform")
    with torch.no_grad():
        shaped.output.linear.bias.add_(1.0)
    shaped.save_pretrained(folder / "tsdfm-uniform", about, torch.bfloat16)
    for name in ("entropy-matched", "certainty-matched", "flop-matched"):
        with pytest.raises(CheckpointError, match=f"{name} was made from another 'tsdfm-uniform' than is there now"):
            is_trained(stages[name], recipe(), TEXT, folder)
    assert is_trained(stages["k1"], recipe(), TEXT, folder)


def test_a_compass_is_examined_again_for_another_tau(trained, tmp_path) -> None:
    folder = tmp_path / "trained"
    shutil.copytree(trained, folder)
    kept = folder / "compass-uniform" / REPORT_FILE
    before = json.loads(kept.read_text())
    kept.write_text(json.dumps({**before, "failures": ["made up"]}))
    compass, judge = recipe().stage[1], NamedJudge("cycle", lambda tokens: np.zeros(len(tokens)))
    assert failures_of(compass, recipe(), TEXT, folder, judge) == ["made up"]  # not done again without a reason
    later = changed("tsdfm-uniform", shaping={"tau": 0.5})
    failures_of(compass, later, TEXT, folder, judge)
    assert json.loads(kept.read_text())["tau"] == 0.5
    kept.write_text(json.dumps({**before, "weights": "sha256:0", "failures": ["made up"]}))
    assert failures_of(compass, recipe(), TEXT, folder, judge) != ["made up"]
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2])
    failures_of(compass, recipe(), TEXT, folder, judge)
    assert json.loads(kept.read_text())["failures"] == json.loads(whole)["failures"]


def test_a_damaged_cost_is_left_out_with_a_warning(trained, tmp_path) -> None:
    folder = tmp_path / "trained"
    shutil.copytree(trained, folder)
    (folder / "k1" / "cost.json").write_text('{"seconds_per_step": [0.1,')
    with pytest.warns(UserWarning, match=r"cost\.json is damaged .*training_cost\.json does without it"):
        assert train_recipe(recipe(), TEXT, folder, announce=lambda line: None) == []
    names = [{cost.name for cost in read_costs(place / "training_cost.json").costs} for place in (trained, folder)]
    assert names[0] - names[1] == {"k1"}


def test_a_stage_counts_as_trained_when_all_of_its_files_are_there(tmp_path, monkeypatch) -> None:
    """A kill just before the mark: the same command ends the stage, and its record is whole."""

    def killed(path, write) -> None:
        if path.name == CONFIG_FILE:
            raise KeyboardInterrupt
        replace_file(path, write)

    kept = tmp_path / "dfm-uniform"
    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "replace_file", killed)
        with pytest.raises(KeyboardInterrupt):
            train_recipe(recipe(), TEXT, tmp_path, ["dfm-uniform"], announce=lambda line: None)
    assert {"history.json", "cost.json", "model.safetensors"} <= {path.name for path in kept.iterdir()}
    said: list[str] = []
    train_recipe(recipe(), TEXT, tmp_path, ["dfm-uniform"], announce=said.append)
    assert "trained already" not in said[0]
    assert {"history.json", "cost.json", CONFIG_FILE, "README.md"} <= {path.name for path in kept.iterdir()}


def test_trajectories_share_their_start_and_fit_the_figure(trained, tmp_path) -> None:
    import pandas as pd

    def judge(tokens: np.ndarray) -> np.ndarray:
        return (tokens[:, 1:] != (tokens[:, :-1] + 1) % V).mean(axis=1)

    compass = recipe().stage[1]
    rows = record_trajectories(compass, recipe(), TEXT, trained, NamedJudge("cycle", judge))
    write_table(tmp_path / "trajectories.parquet", pd.DataFrame(rows))
    frame = read_trajectories(tmp_path / "trajectories.parquet")
    assert set(TRAJECTORY_COLUMNS) <= set(frame.columns)
    start, end = frame[frame["step"] == 0], frame[frame["step"] == frame["step"].max()]
    for column in ("nll_nats", "entropy_nats"):  # the arms start, and complete the start, alike
        blind, shaped = (start[start["arm"] == arm][column].to_numpy() for arm in ("blind", "shaped"))
        assert (blind == shaped).all()
    assert (end["committed"] == 1).all()
    assert (end["t"] == 1).all()
    assert (start["flips"] == 0).all()
    assert start["energy"].isna().all()
    for _, steps in frame.groupby(["arm", "sequence"]):
        ordered = steps.sort_values("step")
        assert sorted(position for commits in ordered["commits"] for position in commits) == list(range(LENGTH))
        assert (ordered["commits"].map(len).cumsum() <= (ordered["committed"] * LENGTH).round()).all()
    first = frame[frame["step"] == 1].pivot_table(index="sequence", columns="arm", values="flips")
    assert (first["blind"] != first["shaped"]).any()


def test_a_position_commits_when_it_changes_for_the_last_time() -> None:
    states = [torch.tensor([row]) for row in ([0, 1, 2, 3], [0, 5, 2, 4], [0, 1, 2, 4], [0, 1, 6, 4])]
    assert commit_steps(states).tolist() == [[0, 2, 3, 1]]


def test_entropy_of_tokens() -> None:
    values = unigram_entropy(torch.tensor([[0, 0, 1, 1], [2, 2, 2, 2], [0, 1, 2, 3]]))
    assert values.tolist() == pytest.approx([math.log(2), 0.0, math.log(4)])


def test_a_variant_takes_what_it_does_not_say() -> None:
    base = {"name": "a", "kind": "tsdfm", "shaping": {"tau": 0.0, "policy": "seq"}, "training": {"steps": 5}}
    variants = [base, {"name": "b", "like": "a", "shaping": {"tau": 0.5}, "seeds": [0, 7]}]
    first, second, third = spell_out(variants)
    assert first == base
    assert second["shaping"] == {"tau": 0.5, "policy": "seq"}
    assert (second["name"], third["name"]) == ("b", "b-s7")
    assert third["training"] == {"steps": 5, "seed": 7}
    assert (third["draws"], third["variant"], third["kind"]) == ("a", "b", "tsdfm")
    with pytest.raises(ValueError, match="is like 'z'"):
        spell_out([{"name": "b", "like": "z"}])
    with pytest.raises(ValueError, match="whole numbers"):
        spell_out([{"name": "b", "seeds": [0.5]}])


def changed(name: str, **settings: object) -> Recipe:
    given = recipe().model_dump(exclude_defaults=True)
    next(stage for stage in given["stage"] if stage["name"] == name).update(settings)
    return Recipe.model_validate(given)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("tsdfm-uniform", {"shaping": {"candidates": 0}}, "from 1 to 64, not 0"),
        ("tsdfm-uniform", {"shaping": {"tau": 1.5}}, "tau must be a number from 0 to 1"),
        ("tsdfm-uniform", {"shaping": {"tau": -0.5}}, "tau"),
        ("tsdfm-uniform", {"shaping": {"tau": float("nan")}}, "tau"),
        ("tsdfm-uniform", {"shaping": {"policy": "best"}}, "policy must be one of seq, token, seq_to_token, not"),
        ("tsdfm-uniform", {"source": "mask"}, "its teacher has 'uniform'"),
        ("fsdfm-uniform", {"teacher": "compass-uniform"}, "needs `teacher`"),
        ("entropy-matched", {"match": "fsdfm-uniform"}, "`match` makes a control"),
        ("entropy-matched", {"start_from": ""}, "`match` needs `start_from`"),
        ("flop-matched", {"cost_of": "nothing"}, "is not an earlier stage"),
    ],
)
def test_impossible_students_are_refused(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, UsageError), match=message):
        changed(name, **settings)


@pytest.mark.parametrize("scale", ["markov", "hmm"])
def test_the_complete_ablation_is_one_recipe(scale: str) -> None:
    found = load_recipe(scale)
    shaped = [stage for stage in found.stage if stage.kind == "tsdfm"]
    controls = {stage.control for stage in found.stage if stage.kind in ("fsdfm", "tsdfm")}
    assert controls == {
        *("none", "unshaped", "oracle", "random_pick", "argmax_pick"),
        *("shuffled_energy", "certainty_matched", "flop_matched"),
        *(("entropy_matched",) if scale == "hmm" else ()),  # out of reach on markov
    }
    assert {stage.shaping.get("candidates", 4) for stage in shaped} == {1, 2, 4, 8, 16}
    assert {stage.shaping.get("tau", 0.5) for stage in shaped} == {0, 0.25, 0.5, 0.75}
    assert {stage.shaping.get("policy", "seq_to_token") for stage in shaped} == {"seq", "token", "seq_to_token"}
    assert {stage.source for stage in shaped} == {"uniform", "mask"}
    assert {stage.shaping.get("gate_on", GATES[0]) for stage in shaped} == {*GATES}
    assert {stage.shaping.get("switch", SWITCHES[0]) for stage in shaped} == {*SWITCHES}
    assert {stage.shaping.get("rule", RULES[0]) for stage in shaped} == {*RULES}
    assert {stage.shaping.get("token_guard", True) for stage in shaped} == {True, False}
    for name, values in OPTIONS.items():  # of the targets
        assert {stage.options.get(name, DEFAULTS[name]) for stage in shaped} == {*values}, name
    main = [stage for stage in found.stage if stage.variant == "tsdfm-uniform"]
    assert [found.training_of(stage).seed for stage in main] == [0, 1, 2]


class Breaking(nn.Module):
    """An energy that is not finite for some rows from the third call on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, states: Tensor, time: Tensor, origin: Tensor) -> Tensor:
        self.calls += 1
        bad = torch.zeros(states.shape[0], 1)
        bad[0] = math.nan if self.calls >= 3 else 0.0
        return states.float() + bad


def test_records_hold_what_another_process_finished_meanwhile(trained, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(trained, folder)
    late = folder / "k1" / "config.json"
    late.rename(tmp_path / "late.json")
    write = records._write

    def slow(path, content) -> None:
        write(path, content)
        if not late.exists():
            (tmp_path / "late.json").rename(late)

    monkeypatch.setattr(records, "_write", slow)
    records.write_records(recipe(), folder)
    assert read_variants(folder / "variants.json") == read_variants(trained / "variants.json")


@pytest.mark.parametrize(
    ("what", "value", "message"),
    [("source", "mask", "has source mask, stage .* needs uniform"), ("tokenizer", "other@1", "has tokenizer other@1")],
)
def test_a_teacher_of_another_source_or_tokenizer_is_refused(trained, tmp_path, what, value, message) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(trained / "dfm-uniform", folder / "dfm-uniform")
    config = folder / "dfm-uniform" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), what: value}))
    for name in ("compass-uniform", "fsdfm-uniform"):
        with pytest.raises(CheckpointError, match=message):
            train_recipe(recipe(), TEXT, folder, [name], announce=str)


def test_a_teacher_of_another_length_is_refused(trained, tmp_path) -> None:
    shutil.copytree(trained / "dfm-uniform", tmp_path / "dfm-uniform")
    longer = dataclasses.replace(TEXT, length=TEXT.length + 1)
    with pytest.raises(CheckpointError, match=f"has length {TEXT.length}, stage 'fsdfm-uniform' needs"):
        train_recipe(recipe(), longer, tmp_path, ["fsdfm-uniform"], announce=str)


def test_energy_that_is_not_finite_stops_with_step_rows_and_recipe_and_keeps_the_state(trained, tmp_path) -> None:
    from tsdfm_bench.methods.train.build import build_network
    from tsdfm_bench.methods.train.shaping import ShapingChooser, ShapingConfig
    from tsdfm_bench.methods.train.shortcut import ShortcutObjective

    stage = recipe().stage[4]
    config = TrainingConfig(**{**TRAINING, "steps": 50})  # type: ignore[arg-type]
    chooser = ShapingChooser(ShapingConfig(tau=0.0, policy="seq"), Breaking())
    frozen = DiT.from_pretrained(trained / "dfm-uniform")
    trainer = Trainer(
        "toy",
        build_network(stage, recipe(), TEXT, trained),
        lambda ema: ShortcutObjective(V, V, ema, frozen, h_law="uniform", choose=chooser),
        TEXT,
        config,
        tmp_path / "state",
    )
    with pytest.raises(FloatingPointError) as caught:
        trainer.train()
    said = str(caught.value)
    assert "training 'toy' stopped at step 1 of 50" in said
    assert "not finite at jump 3 in 1 of" in said
    assert "windows (numbers" in said
    assert f"the state after step 0 is kept in {tmp_path / 'state'}" in said
    assert trainer.resume()
    assert trainer.step == 0


def test_logits_that_are_not_finite_are_named(trained) -> None:
    from tsdfm_bench.methods.train.data import Draws
    from tsdfm_bench.methods.train.shortcut import ShortcutObjective

    student, frozen = DiT.from_pretrained(trained / "k1"), DiT.from_pretrained(trained / "dfm-uniform")
    broken = DiT.from_pretrained(trained / "k1")
    with torch.no_grad():
        broken.output.linear.bias[0] = math.inf
    draws = Draws(0, "broken", 4, 6)
    x_1 = TEXT.windows("train", draws)
    objective = ShortcutObjective(V, V, broken, frozen, h_law="uniform")
    with pytest.raises(FloatingPointError, match=r"'jump0' is drawn from are not finite in \d of \d windows"):
        objective.loss(student, x_1, draws)


def test_the_report_of_a_stage_is_json(trained) -> None:
    report = json.loads((trained / "compass-uniform" / "report.json").read_text())
    assert report["choice"]["judge"] == "cycle"
    assert {"auc", "auc_changed", "auc_repeated", "bins", "right_p", "failures", "passed"} <= set(report)


def test_what_is_trained_like_the_default_may_be_compared_with_it() -> None:
    """From masks the ablation has fewer steps than the shipped students, so no claim compares the two."""
    recipe = load_recipe("sotu-ablation")
    training = {stage.name: trained_as(stage, recipe) for stage in recipe.stage}
    for control in ("random", "entropy-matched", "flop-matched", "tau0"):
        assert training[control] == training["tsdfm-uniform"] == training["fsdfm-uniform"] == (128, 200)
        assert training[f"{control}-mask"] == training["shaped-mask"] == (128, 200)
    assert training["tsdfm-mask"] == (128, 600)


def test_two_halves_of_a_training_are_as_long_as_the_default() -> None:
    recipe = load_recipe("markov")
    training = {stage.name: trained_as(stage, recipe) for stage in recipe.stage}
    for name in ("restarted", "refreshed", "refreshed-s1", "k8"):
        assert training[name] == training["tsdfm-uniform"]
    assert training["first-half"] != training["tsdfm-uniform"]
