"""Recipes of the large scales: parameter counts, rehearsal, operations by formula, and steps split in parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tsdfm_bench.api import PLAIN_VARIABLE
from tsdfm_bench.commands.train import train_command
from tsdfm_bench.errors import UsageError
from tsdfm_bench.launch.training import PROGRESS_FILE, STATE
from tsdfm_bench.methods.nets.causal import CausalConfig, CausalTransformer
from tsdfm_bench.methods.nets.compass import Compass, CompassConfig
from tsdfm_bench.methods.nets.dit import DiT, DiTConfig
from tsdfm_bench.methods.nets.folder import read_config
from tsdfm_bench.methods.train import data as data_module
from tsdfm_bench.methods.train import trainer as trainer_module
from tsdfm_bench.methods.train.build import build_network
from tsdfm_bench.methods.train.card import changed_settings
from tsdfm_bench.methods.train.data import Draws, TrainingText
from tsdfm_bench.methods.train.dryrun import RandomTokensEnergy, full_network, parameter_count, rehearse
from tsdfm_bench.methods.train.flops import FlopMeter, forward_flops, networks_in
from tsdfm_bench.methods.train.objectives import ARObjective, MDLMObjective
from tsdfm_bench.methods.train.options import OPTIONS, SHAPING, TRAINING
from tsdfm_bench.methods.train.recipe import RECIPES, Recipe, load_recipe
from tsdfm_bench.methods.train.shaping import ShapingChooser, ShapingConfig
from tsdfm_bench.methods.train.shortcut import ShortcutObjective
from tsdfm_bench.methods.train.trainer import Trainer, TrainingConfig, check_hardware
from tsdfm_bench.tasks.synthetic.chain import HiddenMarkov
from tsdfm_bench.tasks.synthetic.oracle import OracleEnergy

V, LENGTH = 23, 8


@pytest.mark.parametrize(
    ("stage", "parameters"),
    [
        ("dfm-uniform", 169_625_681),
        ("dfm-mask", 169_627_218),
        ("fsdfm-uniform", 170_168_529),
        ("tsdfm-uniform", 170_168_529),
        ("fsdfm-mask", 170_170_066),
        ("tsdfm-mask", 170_170_066),
        ("mdlm", 169_627_218),
        ("sedd-mask", 169_627_218),
        ("sedd-uniform", 169_625_681),
        ("ar", 162_246_482 - 2 * 768 - 1),  # the published one has a row for a mask that it never uses
    ],
)
def test_base_has_the_published_parameter_counts(stage, parameters):
    recipe = load_recipe("base")
    (chosen,) = recipe.select([stage])
    assert parameter_count(chosen, recipe, recipe.vocab_size, recipe.length) == parameters


def test_a_recipe_that_extends_another_has_its_tables_and_its_stages_first():
    base, extended = load_recipe("sotu"), load_recipe("sotu-ablation")
    assert extended.stage[: len(base.stage)] == base.stage
    assert (extended.network, extended.training) == (base.network, base.training)
    assert next(s for s in extended.stage if s.name == "k8").draws == "student-uniform"


@pytest.mark.parametrize(
    ("text", "message"),
    [('extends = "loop.toml"', "`extends`"), ("extends = 3", "`extends`"), ('extends = "sott"', "sotu")],
)
def test_a_recipe_that_extends_itself_or_nothing_is_refused(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_recipe("loop.toml")


def test_the_shipped_weights_are_those_of_the_recipe():
    """Every network, and every setting that has an influence on it; what was trained longer in vain is in LOG.md."""
    recipe = load_recipe("sotu")
    weights = Path(trainer_module.__file__).parents[1] / "weights" / "sotu"
    assert {path.name for path in weights.iterdir()} == {stage.name for stage in recipe.stage}
    for stage in recipe.stage:
        assert changed_settings(read_config(weights / stage.name), stage, recipe) == [], stage.name


def test_the_students_of_sotu_differ_by_shaping_alone():
    stages = {stage.name: stage for stage in load_recipe("sotu").stage}
    for source in ("uniform", "mask"):
        shaped, blind = stages[f"tsdfm-{source}"], stages[f"fsdfm-{source}"]
        only = {"name": "", "kind": "fsdfm", "compass": "", "despite_checks": False}
        assert shaped.model_copy(update=only) == blind.model_copy(update=only)


def test_small_is_between_25_and_40_million():
    recipe = load_recipe("small")
    for stage in recipe.stage:
        count = parameter_count(stage, recipe, recipe.vocab_size, recipe.length)
        assert (10e6 if stage.kind == "compass" else 25e6) < count < 40e6


def test_students_of_a_source_differ_by_shaping_alone():
    for name in ("base", "small"):
        recipe = load_recipe(name)
        for source in ("uniform", "mask"):
            plain, shaped = (recipe.select([f"{kind}-{source}"])[0] for kind in ("fsdfm", "tsdfm"))
            assert recipe.training_of(plain) == recipe.training_of(shaped)
            assert plain.options == shaped.options
            assert plain.teacher == shaped.teacher


def tiny(**changes) -> Recipe:
    return load_recipe("base").model_copy(
        update={
            "vocab_size": V,
            "length": LENGTH,
            "network": load_recipe("base").network.model_copy(
                update={"width": 16, "blocks": 3, "heads": 2, "condition": 8}
            ),
            **changes,
        }
    )


def test_the_network_that_is_counted_is_the_one_that_is_trained(tmp_path):
    stream = np.arange(400) % V
    text = TrainingText("t", {"train": stream, "validation": stream}, V, LENGTH, "none", "sha256:0")
    recipe = tiny()
    recipe = recipe.model_copy(
        update={"stage": [s.model_copy(update={"blocks": min(s.blocks, 2)}) for s in recipe.stage]}
    )
    for stage in recipe.stage:
        network = build_network(stage, recipe, text, tmp_path)
        if stage.kind == "dfm":
            network.save_pretrained(tmp_path / stage.name)
        counted = full_network(stage, recipe, V, LENGTH)
        assert {k: v.shape for k, v in network.state_dict().items()} == {
            k: v.shape for k, v in counted.state_dict().items()
        }


def test_a_rehearsal_makes_one_step_of_every_stage():
    recipe = tiny()
    results = []
    rehearse(recipe, None, results.append)
    assert [r.name for r in results] == [stage.name for stage in recipe.stage]
    for result in results:
        assert np.isfinite(result.loss)
        assert result.loss > 0  # students do not agree with their teachers at the start
        assert result.tokens == result.windows * LENGTH * result.steps
        assert result.flops > 0
    only = []
    rehearse(recipe, ["tsdfm-mask"], only.append)  # what it needs is made, and not reported
    assert [r.name for r in only] == ["tsdfm-mask"]


def new_variants() -> dict[str, list[str]]:
    """Recipe -> its first stage, and those that no recipe before it has under any name, seed or length."""
    seen, found = set(), {}
    for path in sorted(RECIPES.glob("*.toml")):
        for stage in load_recipe(path.stem).stage:
            what = stage.model_dump_json(exclude={"name", "variant", "draws", "training", "despite_checks"})
            if what not in seen or path.stem not in found:
                found.setdefault(path.stem, []).append(stage.name)
            seen.add(what)
    return found


@pytest.mark.parametrize(("scale", "names"), new_variants().items())
def test_every_shipped_recipe_can_be_rehearsed(scale, names):
    """Large scales narrow and with few tokens, small ones as they are."""
    recipe = load_recipe(scale)
    if recipe.network.width > 64:
        narrow = recipe.network.model_copy(update={"width": 16, "heads": 2, "condition": 8})
        recipe = recipe.model_copy(update={"network": narrow, "vocab_size": 32, "length": recipe.length or 64})
    results = {}
    rehearse(recipe, names, lambda result: results.update({result.name: result}))
    assert list(results) == names
    for stage in recipe.select(list(results)):
        found = results[stage.name]
        assert np.isfinite(found.loss)
        assert (found.steps == 0) == bool(stage.match)
        if stage.cost_of in results:
            assert found.flops == pytest.approx(results[stage.cost_of].flops, rel=1 / found.steps)


@pytest.mark.parametrize("source", ["mask", "uniform"])
def test_the_energy_of_random_tokens_is_that_of_the_product_law(source):
    """Against the law of independent tokens, all equally likely, of the synthetic tasks."""
    law = HiddenMarkov("even", np.ones(1), np.ones((1, 1)), np.full((1, V), 1 / V))
    tokens = torch.randint(0, V, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    if source == "mask":
        tokens[:, ::2] = V
    time = torch.tensor([0.1, 0.4, 0.7, 0.9])
    wanted = OracleEnergy(law, source)(tokens, time)
    assert torch.allclose(RandomTokensEnergy(V, source)(tokens, time), wanted, rtol=1e-6)


def test_an_exact_energy_is_refused_where_the_law_of_the_text_is_not_known():
    with pytest.raises(UsageError, match="task 'markov' has no exact law; name a compass stage instead"):
        rehearse(load_recipe("markov"), ["oracle"], exact=False)


def test_a_rehearsal_at_full_width():
    results = []
    rehearse(load_recipe("base"), ["ar"], results.append)
    (result,) = results
    assert result.loss == pytest.approx(np.log(50257), rel=0.1)  # nothing is learned yet
    tokens = 512 * 1024 * 1_000_000
    # six operations a parameter and token, and attention; the embedding is not multiplied
    expected = 6 * (result.parameters - 50257 * 768) * tokens + 3 * 12 * 4 * 1024 * 768 * tokens
    assert result.flops == pytest.approx(expected, rel=0.01)


def test_a_recipe_without_vocabulary_cannot_be_rehearsed():
    with pytest.raises(UsageError, match="does not state vocab_size and length"):
        rehearse(tiny(vocab_size=0))


def networks():
    base = {"width": 16, "blocks": 3, "heads": 2, "condition": 8}
    dit = DiTConfig(V, V + 1, LENGTH, **base)
    aware = DiTConfig(V, V, LENGTH, **base, step_aware=True)
    yield DiT(dit), (torch.rand(2),)
    yield DiT(aware), (torch.rand(2), torch.rand(2))
    yield Compass(CompassConfig(V, V, LENGTH, **base)), (torch.rand(2),)
    yield Compass(CompassConfig(V, V, LENGTH, **base, see_origin=True)), (torch.rand(2), torch.zeros(2, 5).long())
    yield CausalTransformer(CausalConfig(V, LENGTH, width=16, blocks=3, heads=2)), ()


@pytest.fixture
def plainly(monkeypatch):
    """Without the product that exchanges the halves of small heads, which is no operation of the networks' formula."""
    monkeypatch.setenv(PLAIN_VARIABLE, "1")


@pytest.mark.parametrize("index", range(5))
def test_operations_by_formula_are_those_torch_counts(plainly, index):
    network, more = list(networks())[index]
    tokens = torch.randint(0, V, (2, 5))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        network(tokens, *more)
    assert counter.get_total_flops() == forward_flops(network, 2, 5)
    meter = FlopMeter(network)
    for parameter in network.parameters():  # zero maps would stop the gradient
        torch.nn.init.normal_(parameter)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(tokens, *more).sum().backward()
    # torch leaves out gradients nobody asks for: those of the sinusoids, and of what is multiplied by a constant
    assert 0.9 * meter.total <= counter.get_total_flops() <= meter.total
    meter.close()
    network(tokens, *more)
    assert meter.total == 3 * forward_flops(network, 2, 5)


def test_operations_of_a_head_at_some_places(plainly):
    network = DiT(DiTConfig(V, V + 1, LENGTH, width=16, blocks=1, heads=2, condition=8))
    at = (torch.tensor([0, 1, 1]), torch.tensor([1, 0, 4]))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        network(torch.zeros(2, 5).long(), torch.rand(2), at=at)
    assert counter.get_total_flops() == forward_flops(network, 2, 5, 3)


def test_every_network_of_an_objective_is_counted():
    nets = [DiT(DiTConfig(V, V, LENGTH, width=8, blocks=1, heads=2, condition=4)) for _ in range(2)]
    compass = Compass(CompassConfig(V, V, LENGTH, width=8, blocks=1, heads=2, condition=4))
    objective = ShortcutObjective(V, V, nets[0], nets[1], choose=ShapingChooser(ShapingConfig(), compass))
    assert {id(net) for net in networks_in(objective)} == {id(net) for net in [*nets, compass]}


# ------------------------------------------------------------------------------------- one step, however it is split

STREAM = np.random.default_rng(0).integers(0, V, 2000)
TEXT = TrainingText("toy", {"train": STREAM, "validation": STREAM}, V, LENGTH, "none", "sha256:toy")


def test_rows_draw_the_same_however_a_step_is_split():
    whole = Draws(0, "x", 3, 6)
    parts = [Draws(0, "x", 3, 2, first=first, total=6) for first in (0, 2, 4)]
    for site in ("a", "b"):
        assert torch.equal(whole.uniform(site, 4), torch.cat([part.uniform(site, 4) for part in parts]))
    assert torch.equal(whole.stratified("t"), torch.cat([part.stratified("t") for part in parts]))
    assert torch.equal(TEXT.windows("train", whole), torch.cat([TEXT.windows("train", part) for part in parts]))


@pytest.mark.usefixtures("in_fp32")
@pytest.mark.parametrize("objective", [ARObjective(V), MDLMObjective(V)], ids=["ar", "mdlm"])
def test_accumulated_gradients_are_those_of_the_whole_batch(objective):
    """A batch of 7 in passes of 3, 3 and 1: the same weights after some steps, up to rounding."""

    def weights(micro_batch: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        network = (
            CausalTransformer(CausalConfig(V, LENGTH, width=16, blocks=1, heads=2))
            if isinstance(objective, ARObjective)
            else DiT(DiTConfig(V, V + 1, LENGTH, width=16, blocks=1, heads=2, condition=8))
        )
        config = TrainingConfig(
            steps=4, batch=7, lr=1e-3, warmup=1, micro_batch=micro_batch, validate_every=99, save_every_s=1e9
        )
        trainer = Trainer("toy", network, lambda ema: objective, TEXT, config)
        trainer.train(until=3)
        return trainer.plain.state_dict()

    whole, parts = weights(0), weights(3)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_state_goes_on_with_another_micro_batch(tmp_path):
    def make(micro_batch: int) -> Trainer:
        torch.manual_seed(0)
        network = CausalTransformer(CausalConfig(V, LENGTH, width=16, blocks=1, heads=2))
        config = TrainingConfig(steps=4, batch=4, lr=1e-3, warmup=1, micro_batch=micro_batch, validate_every=99)
        return Trainer("toy", network, lambda ema: ARObjective(V), TEXT, config, tmp_path)

    make(0).train(until=2)
    again = make(2)
    assert again.resume()
    assert again.step == 2


def test_large_streams_stay_where_they_are(monkeypatch):
    draws = Draws(0, "x", 1, 5)
    expected = TEXT.windows("train", draws)
    monkeypatch.setattr(data_module, "ON_DEVICE_TOKENS", 10)
    small = TrainingText("toy", {"train": STREAM.astype(np.uint16)}, V, LENGTH, "none", "sha256:toy")
    assert torch.equal(small.windows("train", draws), expected)


def test_packed_streams_are_read_from_the_starts_of_blocks():
    stream = np.arange(80)
    text = TrainingText("toy", {"train": stream}, 80, LENGTH, "none", "sha256:toy", block=LENGTH)
    windows = text.windows("train", Draws(0, "x", 1, 64))
    assert set(windows[:, 0].tolist()) <= set(range(0, 80, LENGTH))
    assert windows[:, 0].unique().numel() > 3
    with pytest.raises(UsageError, match="packed in blocks of 8 tokens, not of 4"):
        TrainingText("toy", {"train": stream}, 80, 4, "none", "sha256:toy", block=LENGTH)


@pytest.mark.parametrize("scale", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_the_judge_of_a_compass_is_trained_before_it(scale):
    """Else it would depend on what is ready first whether the autoregressive network or a small scorer judges."""
    kinds = [stage.kind for stage in load_recipe(scale).stage]
    if {"compass", "ar"} <= set(kinds):
        assert kinds.index("ar") < kinds.index("compass")


def test_dry_run_prints_every_network(monkeypatch, capsys):
    from tsdfm_bench.methods.train import recipe as recipes

    real = recipes.load_recipe
    monkeypatch.setattr(recipes, "load_recipe", lambda name: tiny() if name == "base" else real(name))
    assert train_command("base", "dfm-mask,ar", None, None, 1, dry_run=True, as_json=True) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["ar", "dfm-mask"]
    assert train_command("base", "ar", None, None, 1, dry_run=True) == 0
    shown = capsys.readouterr()
    assert "parameters" in shown.out
    assert "Rehearsing" in shown.err
    with pytest.raises(UsageError, match="--json belongs to --dry-run"):
        train_command("base", None, None, None, 1, as_json=True)


TOY = """
scale = "toy"
task = "markov"
[network]
width = 16
blocks = 1
heads = 2
condition = 8
[training]
batch = 8
micro_batch = 3
steps = 6
lr = 1e-2
warmup = 1
validate_every = 100
[[stage]]
name = "mdlm"
kind = "mdlm"
source = "mask"
"""


TWO = """
import sys
from pathlib import Path
import torch
from tsdfm_bench.commands.train import train_command
from tsdfm_bench.methods.train import command
from tsdfm_bench.methods.train.trainer import Trainer
recipe, folder = sys.argv[1], Path(sys.argv[2])
read, joined = command.training_text, []
command.training_text = lambda *given: joined.append(torch.distributed.is_initialized()) or read(*given)
assert train_command(recipe, None, folder / "two", None, 1) == 0
assert joined == [False]  # a long text is not waited for under the time limit of joined processes
assert torch.distributed.get_world_size() == 2
train = Trainer.train
Trainer.train = lambda trainer: (train(trainer, 3), sys.exit())
train_command(recipe, None, folder / "changed", None, 1)
"""


def steps_here(recipe: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Train in this process; which steps were left."""
    steps: list[int] = []
    update = Trainer._update
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", lambda self, number: (steps.append(number), update(self, number)))
        assert train_command(str(recipe), None, folder, None, 1) == 0
    return steps


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    """Rows are numbered over all processes: one, two, or two and then one draw the same and reach the same network."""
    recipe = tmp_path / "toy.toml"
    recipe.write_text(TOY)
    (tmp_path / "two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "two.py"]
    done = subprocess.run(
        [*command, str(recipe), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Trained networks") == 1  # the first process speaks for all
    told = json.loads((tmp_path / "changed" / STATE / "mdlm" / PROGRESS_FILE).read_text())
    assert (told["name"], told["step"], told["steps"]) == ("mdlm", 3, 6)
    assert steps_here(recipe, tmp_path / "one", monkeypatch) == [1, 2, 3, 4, 5, 6]
    assert steps_here(recipe, tmp_path / "changed", monkeypatch) == [4, 5, 6]
    found = {}
    for name in ("one", "two", "changed"):
        config = json.loads((tmp_path / name / "mdlm" / "config.json").read_text())
        history = json.loads((tmp_path / name / "mdlm" / "history.json").read_text())
        found[name] = history[-1]["bound"], config["training_flops"]
    for name in ("two", "changed"):
        assert found[name][0] == pytest.approx(found["one"][0], rel=1e-4)
        # the first process's share, times the processes: its head runs at its own masked positions
        assert found[name][1] == pytest.approx(found["one"][1], rel=0.05)


def test_a_batch_that_does_not_divide_over_the_processes_is_refused(monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.num_processes", property(lambda _: 3))
    config = TrainingConfig(steps=1, batch=4, lr=1e-3, warmup=1)
    network = CausalTransformer(CausalConfig(V, LENGTH, width=16, blocks=1, heads=2))
    with pytest.raises(UsageError, match="a batch of 4 windows does not divide over 3 processes"):
        Trainer("toy", network, lambda ema: ARObjective(V), TEXT, config)


@pytest.mark.parametrize(("name", "major", "bf16"), [("A100", 8, True), ("Tesla V100", 7, False)])
def test_bf16_is_used_where_the_hardware_computes_in_it(monkeypatch, name, major, bf16):
    """Tensors of bf16 can be made on every GPU; before 8.0 arithmetic on them is emulated."""
    a_gpu(monkeypatch, major)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
    assert trainer_module.mixed_precision(torch.device("cuda")) == ("bf16" if bf16 else "no")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_hardware()
    assert any(f"{name} does not compute in bf16" in str(warning.message) for warning in caught) == (not bf16)


def a_gpu(monkeypatch, major):
    """Properties of a GPU of this generation, for torch's own questions."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major, minor=0))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)


@pytest.mark.parametrize("bf16", [True, False])
def test_gpus_of_several_kinds_and_without_bf16_are_said(monkeypatch, bf16):
    a_gpu(monkeypatch, 8 if bf16 else 7)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ["Tesla V100", "A100"][index])
    with pytest.warns(UserWarning, match=r"several kinds \(A100, Tesla V100\).*CUDA_VISIBLE_DEVICES") as caught:
        check_hardware()
    assert any("does not compute in bf16" in str(warning.message) for warning in caught) == (not bf16)


# ---------------------------------------------------------------------------------------------------- wrong recipes

WRONG = """
scale = "toy"
task = "markov"
[network]
width = 16
blocks = 2
heads = 2
[training]
batch = 8
steps = 6
lr = 1e-2
warmup = 1
[[stage]]
name = "dfm"
kind = "dfm"
source = "mask"
[[stage]]
name = "compass"
kind = "compass"
source = "mask"
teacher = "dfm"
blocks = 1
[[stage]]
name = "fsdfm"
kind = "fsdfm"
source = "mask"
teacher = "dfm"
[[stage]]
name = "tsdfm"
kind = "tsdfm"
source = "mask"
teacher = "dfm"
compass = "compass"
[[stage]]
name = "sedd"
kind = "sedd"
source = "mask"
"""


def refused(folder: Path, text: str) -> str:
    """What is said of a recipe, without the file's name in front."""
    path = folder / "wrong.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_recipe(str(path))
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert "\n" not in said
    assert "pydantic" not in said
    return said.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("like", "setting", "words"),
    [
        ("tsdfm", "shaping = { candidates = 2.5 }", "shaping.candidates must be a whole number from 1 to 64, not 2.5"),
        ("tsdfm", "shaping = { candidates = true }", "from 1 to 64, not true"),
        ("tsdfm", 'shaping = { candidates = "4" }', 'from 1 to 64, not "4"'),
        ("tsdfm", "shaping = { candidates = 0 }", "from 1 to 64, not 0"),
        ("tsdfm", "shaping = { candidates = 1000000 }", "from 1 to 64, not 1000000"),
        ("tsdfm", 'shaping = { tau = "a" }', "shaping.tau must be a number from 0 to 1"),
        ("tsdfm", "shaping = { tau = -0.1 }", "not -0.1"),
        ("tsdfm", "shaping = { selection_temperature = nan }", "must be a number above 0, not nan"),
        ("tsdfm", "shaping = { switch_time = 7.0 }", "shaping.switch_time must be a number from 0 to 1, not 7.0"),
        ("tsdfm", 'shaping = { token_guard = "no" }', 'shaping.token_guard must be true or false, not "no"'),
        ("tsdfm", "shaping = { tua = 0.5 }", "unknown key of shaping 'tua'; did you mean 'tau'?"),
        ("tsdfm", "shaping = 3", "shaping must be a table, not 3"),
        ("tsdfm", 'options = { rul = "rk4" }', "unknown key of options 'rul'; did you mean 'rule'?"),
        ("tsdfm", "options = { vocab_size = 3 }", "unknown key of options 'vocab_size'. Known: h_law, "),
        ("tsdfm", 'options = { rule = "rk5" }', 'options.rule must be one of rk4, heun, not "rk5"'),
        ("dfm", 'options = { loss_name = "foo" }', "must be one of cross_entropy, generalised_kl"),
        ("sedd", 'options = { parameterisation = "foo" }', "must be one of score, posterior"),
        ("sedd", 'options = { parameterisation = "posterior" }', 'must be "score" for source mask'),
        ("compass", "options = { largest = 5, smallest = 2 }", "smallest must be at least options.largest (5)"),
        ("compass", 'options = { see_origin = "no" }', "options.see_origin must be true or false"),
        ("compass", "blocks = 0", "blocks must be a whole number from 1 to 2 (those of its teacher), not 0"),
        ("compass", "blocks = 3", "not 3"),
        ("dfm", 'training = { steps = "a" }', 'training.steps must be a whole number of at least 1, not "a"'),
        ("dfm", "training = { steps = 0 }", "at least 1, not 0"),
        ("dfm", "training = { batch = 0 }", "training.batch must be a whole number of at least 1, not 0"),
        ("dfm", "training = { ema = 2.0 }", "training.ema must be a number from 0 to below 1, not 2.0"),
        ("dfm", "training = { lr = inf }", "training.lr must be a number above 0, not inf"),
        ("dfm", "training = { betas = [0.9] }", "training.betas must be two numbers from 0 to below 1, not [0.9]"),
        ("dfm", 'training = { optimizer = "foo" }', 'training.optimizer must be one of adamw, muon, not "foo"'),
        ("fsdfm", "shaping = { tau = 0.5 }", "shaping is set, but only a stage of kind tsdfm has it, not fsdfm"),
        ("fsdfm", 'compass = "compass"', "compass is set, but only a stage of kind tsdfm has it"),
        (
            "dfm",
            'kind = "ar"\nsource = ""\noptions = { rule = "rk4" }',
            "there are no options for this kind",
        ),
        ("dfm", 'source = "x"', "source must be"),
        ("dfm", 'kind = "mdlm"\nsource = "uniform"', 'source must be "mask" for kind mdlm, not "uniform"'),
        ("dfm", 'start_form = "dfm"', "unknown key 'start_form'; did you mean 'start_from'?"),
    ],
)
def test_a_wrong_setting_of_a_stage_is_one_line_that_says_what_is_allowed(tmp_path, like, setting, words):
    said = refused(tmp_path, f'{WRONG}\n[[stage]]\nname = "x"\nlike = "{like}"\n{setting}\n')
    assert said.startswith("stage 'x': ")
    assert words in said


@pytest.mark.parametrize(
    ("line", "instead", "words"),
    [
        ('scale = "toy"', "", "scale is missing"),
        ("width = 16", "", "network.width is missing"),
        ("width = 16", 'width = "a"', 'network.width must be a valid integer, not "a"'),
        ("heads = 2", "heads = 3", "network.width 16 must split into 3 heads of even size"),
        ("heads = 2", "heads = 2\nwidht = 3", "unknown key of [network] 'widht'; did you mean 'width'?"),
        ("steps = 6", "", "stage 'dfm': training.steps is missing"),
        ("steps = 6", 'steps = "a"', 'training.steps must be a whole number of at least 1, not "a"'),
        ('kind = "sedd"', "", "stage 'sedd': kind is missing"),
        ('name = "sedd"', "", "stage 5: name is missing"),
        ('task = "markov"', 'task = "markov"\nfoo = 1', "unknown key 'foo'. Known: extends, "),
    ],
)
def test_a_wrong_or_missing_key_of_a_recipe_is_one_line(tmp_path, line, instead, words):
    assert line in WRONG
    assert refused(tmp_path, WRONG.replace(line, instead)).startswith(words)
    assert refused(tmp_path, "stage = 3").startswith("stage must be a list of tables")


def test_the_tables_have_the_names_and_defaults_of_what_they_are_for():
    """Nothing is said twice: another field or default of a class is that of its table."""
    assert {key: field.default for key, field in SHAPING.model_fields.items()} == vars(ShapingConfig())
    for key, field in OPTIONS["tsdfm"].model_fields.items():
        assert field.default == getattr(ShortcutObjective, key)
    assert set(TRAINING.model_fields) == set(TrainingConfig.__dataclass_fields__)
