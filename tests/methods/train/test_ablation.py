"""Variants and controls of a recipe: what they share, what they cost, and that they are recorded for the tables."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tsdfm_bench.errors import UsageError
from tsdfm_bench.methods.nets.dit import DiT
from tsdfm_bench.methods.nets.pretrained import read_config
from tsdfm_bench.methods.train.command import NamedJudge, of_equal_cost, record_trajectories, train_recipe
from tsdfm_bench.methods.train.data import TrainingText
from tsdfm_bench.methods.train.matching import held_out_logits, matching_temperature, mean_entropy
from tsdfm_bench.methods.train.recipe import Recipe, load_recipe, spell_out
from tsdfm_bench.methods.train.trainer import Trainer, TrainingConfig
from tsdfm_bench.methods.train.trajectories import unigram_entropy
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
        ("flop-matched", 0),
        ("fsdfm-uniform, compass at inference", 0),
        ("fsdfm-uniform, compass at inference", 1),
    }
    assert variants["k1", 0].settings["K"] == 1
    assert [v.name for v in variants.values() if v.default] == ["fsdfm-uniform", "tsdfm-uniform"]
    controls = {name: v.settings["control"] for (name, _), v in variants.items()}
    assert controls["entropy-matched"] == "entropy_matched"
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


def test_entropy_matched_student_is_as_certain_as_the_shaped_one(trained) -> None:
    entropies = {
        name: mean_entropy(held_out_logits(DiT.from_pretrained(trained / name), TEXT))
        for name in ("entropy-matched", "tsdfm-uniform", "fsdfm-uniform")
    }
    assert entropies["entropy-matched"] == pytest.approx(entropies["tsdfm-uniform"], abs=2e-3)  # bf16 weights
    about = read_config(trained / "entropy-matched")["matched"]
    assert about["entropy_before_nats"] == pytest.approx(entropies["fsdfm-uniform"], abs=1e-3)


def test_the_temperature_of_a_known_logit() -> None:
    """Two outcomes with logits (a, 0): entropy at T is that of sigmoid(a / T)."""
    logits = torch.tensor([[2.0, 0.0]]).expand(50, 2)
    for temperature in (0.5, 1.7):
        p = 1 / (1 + math.exp(-2 / temperature))
        entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
        assert mean_entropy(logits, temperature) == pytest.approx(entropy, rel=1e-5)
        assert matching_temperature(logits, entropy) == pytest.approx(temperature, rel=1e-3)


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
    first = frame[frame["step"] == 1].pivot_table(index="sequence", columns="arm", values="flips")
    assert (first["blind"] != first["shaped"]).any()


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


def changed(name: str, **settings: object) -> None:
    given = recipe().model_dump(exclude_defaults=True)
    next(stage for stage in given["stage"] if stage["name"] == name).update(settings)
    Recipe.model_validate(given)


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
        *("shuffled_energy", "entropy_matched", "flop_matched"),
    }
    assert {stage.shaping.get("candidates", 4) for stage in shaped} == {1, 2, 4, 8, 16}
    assert {stage.shaping.get("tau", 0.5) for stage in shaped} == {0, 0.25, 0.5, 0.75}
    assert {stage.shaping.get("policy", "seq_to_token") for stage in shaped} == {"seq", "token", "seq_to_token"}
    assert {stage.source for stage in shaped} == {"uniform", "mask"}
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
    with pytest.raises(FloatingPointError, match=r"shortcut teacher's logits are not finite in \d of \d windows"):
        objective.loss(student, x_1, draws)


def test_the_report_of_a_stage_is_json(trained) -> None:
    report = json.loads((trained / "compass-uniform" / "report.json").read_text())
    assert report["choice"]["judge"] == "cycle"
    assert {"auc", "auc_changed", "auc_repeated", "bins", "right_p", "failures", "passed"} <= set(report)
