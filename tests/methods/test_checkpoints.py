"""Finding, hashing and checking checkpoints: names, folders, files, and what the errors tell the user."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tsdfm_bench.errors import CheckpointError, UsageError
from tsdfm_bench.methods import checkpoints
from tsdfm_bench.methods.ar import AR
from tsdfm_bench.methods.dfm import DFM
from tsdfm_bench.methods.fsdfm import FSDFM
from tsdfm_bench.methods.mdlm import MDLM
from tsdfm_bench.methods.nets.causal import CausalConfig, CausalTransformer
from tsdfm_bench.methods.nets.dit import DiT, DiTConfig
from tsdfm_bench.methods.sedd import SEDD

BOTH = ("uniform", "mask")
ROOT = Path(__file__).parents[2]


def write_dit(
    folder: Path, method: str, source: str, vocab: int = 6, step_aware: bool = False, **about: object
) -> Path:
    torch.manual_seed(0)
    config = DiTConfig(
        vocab, vocab + (source == "mask"), 8, width=8, blocks=1, heads=2, condition=8, step_aware=step_aware
    )
    network = DiT(config)
    torch.nn.init.normal_(network.output.linear.weight)
    network.save_pretrained(folder, {"method": method, "source": source, **about})
    return folder


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A shipped-weights folder with one set."""
    weights = tmp_path / "weights"
    write_dit(weights / "tiny" / "dfm-uniform", "dfm", "uniform")
    write_dit(weights / "tiny" / "dfm-mask", "dfm", "mask")
    write_dit(weights / "tiny" / "fsdfm-uniform", "fsdfm", "uniform", step_aware=True)
    write_dit(weights / "tiny" / "mdlm", "mdlm", "mask")
    write_dit(weights / "tiny" / "sedd-mask", "sedd", "mask", parameterisation="score", schedule="log-linear")
    write_dit(weights / "tiny" / "sedd-uniform", "sedd", "uniform", parameterisation="posterior")
    ar = CausalTransformer(CausalConfig(6, 8, bos_id=0, width=8, blocks=1, heads=2))
    ar.save_pretrained(weights / "tiny" / "ar", {"method": "ar"})
    monkeypatch.setattr(checkpoints, "WEIGHTS_ROOT", weights)
    return weights


def test_names_of_weights():
    assert checkpoints.weights_name("dfm", "mask", BOTH) == "dfm-mask"
    assert checkpoints.weights_name("mdlm", "mask", ("mask",)) == "mdlm"
    assert checkpoints.weights_name("ar", None, ()) == "ar"


def test_every_way_to_name_a_checkpoint(root, tmp_path, monkeypatch):
    by_task = checkpoints.find("dfm", "mask", BOTH, None, "tiny")
    assert by_task.folder == root / "tiny" / "dfm-mask"
    assert by_task.name == "tiny/dfm-mask"
    assert checkpoints.find("dfm", "mask", BOTH, "tiny", "other") == by_task
    for typed in (by_task.folder, by_task.folder / "model.safetensors", root / "tiny"):
        found = checkpoints.find("dfm", "mask", BOTH, str(typed), "tiny")
        assert found.folder == by_task.folder
        assert found.name == str(typed)
    monkeypatch.chdir(root)  # a folder of that name in the working directory wins if it holds the weights
    assert checkpoints.find("dfm", "mask", BOTH, "tiny", None).name == "tiny"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()  # an unrelated folder does not hide the shipped set
    assert checkpoints.find("dfm", "mask", BOTH, "tiny", None).name == "tiny/dfm-mask"


@pytest.mark.parametrize(
    ("typed", "error", "message"),
    [
        ("tini", CheckpointError, "Did you mean 'tiny'"),
        ("nowhere/at/all", CheckpointError, "no such checkpoint"),
        ("../../etc", CheckpointError, "no such checkpoint"),
        ("..", CheckpointError, "holds no weights called 'dfm-mask'"),
        (" ", UsageError, "empty checkpoint name"),
    ],
)
def test_wrong_names(root, tmp_path, monkeypatch, typed, error, message):
    work = tmp_path / "work" / "deep"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    with pytest.raises(error, match=message):
        checkpoints.find("dfm", "mask", BOTH, typed, "tiny")


@pytest.mark.parametrize("task", ["../tiny", "a/b", "/etc", "..", ".hidden"])
def test_a_task_name_cannot_leave_the_weights_folder(root, task):
    with pytest.raises(UsageError, match="cannot be the name of a set"):
        checkpoints.find("dfm", "mask", BOTH, None, task)


def test_errors_say_what_exists_and_what_to_type(root, tmp_path):
    with pytest.raises(CheckpointError, match=r"no 'tsdfm-mask'; they have: ar, dfm-mask, .*tsdfm-bench train tiny"):
        checkpoints.find("tsdfm", "mask", BOTH, None, "tiny")
    with pytest.raises(CheckpointError, match=r"no weights are shipped for task 'small' \(shipped: tiny\)"):
        checkpoints.find("dfm", "mask", BOTH, None, "small")
    with pytest.raises(CheckpointError, match="it has: ar, dfm-mask"):
        checkpoints.find("tsdfm", "mask", BOTH, str(root / "tiny"), None)
    pickled = tmp_path / "model.pt"
    pickled.write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"model\.pt is a pickle.*--trust-pickle"):
        checkpoints.load_network(checkpoints.find("dfm", "mask", BOTH, str(pickled), None), "cpu")
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"other\.safetensors is truncated or damaged"):
        checkpoints.load_network(checkpoints.find("dfm", "mask", BOTH, str(other), None), "cpu")
    text = tmp_path / "model.txt"
    text.write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"model\.txt is not a weight file"):
        checkpoints.find("dfm", "mask", BOTH, str(text), None)
    (root / "tiny" / "dfm-mask" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors in"):
        checkpoints.find("dfm", "mask", BOTH, str(root / "tiny" / "dfm-mask"), None)


def test_identity_is_the_hash_of_both_files(root):
    params = {"task": "tiny", "source": "uniform", "checkpoint": None}
    first = DFM.identify(params)
    assert first.checkpoint == "tiny/dfm-uniform"
    assert first.weights.startswith("sha256:")
    assert DFM.identify(params) == first
    assert DFM.identify({**params, "source": "mask"}).weights != first.weights
    folder = root / "tiny" / "dfm-uniform"
    for name in ("config.json", "model.safetensors"):
        before = DFM.identify(params).weights
        with (folder / name).open("ab") as handle:
            handle.write(b" ")
        assert DFM.identify(params).weights != before
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        DFM.identify(params)


def test_finding_and_hashing_need_no_torch():
    code = (
        "import sys; from tsdfm_bench.methods import checkpoints as c; import pathlib, tempfile;"
        "f = pathlib.Path(tempfile.mkdtemp()); (f / 'config.json').write_text('{}');"
        "(f / 'model.safetensors').write_bytes(b'w');"
        "print(c.identify(c.find('mdlm', 'mask', ('mask',), str(f), None)).weights);"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sha256:")


@pytest.mark.parametrize("method", [DFM, MDLM, SEDD, AR])
def test_methods_load_what_their_folder_says_and_sample(root, lab, method):
    for source in method.info.sources or (None,):
        params = {"task": "tiny", "vocab_size": 6, "checkpoint": None, "source": source, "length": 8}
        loaded = method.load(params, "cpu")
        network = loaded.networks()["denoiser"]
        calls = []
        network.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        request = lab.request(3, 8, 4 if method.info.uses_steps else None, source=source)
        tokens = loaded.sample(request).tokens
        assert tokens.shape == (3, 8)
        assert 0 <= int(tokens.min()) <= int(tokens.max()) < 6
        assert calls
        assert not network.training


def test_options_reach_the_method(root):
    base = {"task": "tiny", "vocab_size": 6}
    assert DFM.load({**base, "solver": "exact"}, "cpu").solver == "exact"
    assert DFM.load(base, "cpu").source.name == "uniform"
    assert FSDFM.load(base, "cpu").denoiser.step_aware
    assert not DFM.load(base, "cpu").denoiser.step_aware
    assert MDLM.load({**base, "sampler": "first-hitting", "finaliser": "none"}, "cpu").finaliser == "none"
    with pytest.raises(UsageError, match=r"unknown option of dfm 'solvr'; did you mean 'solver'\?"):
        DFM.load({**base, "solvr": "exact"}, "cpu")
    with pytest.raises(UsageError, match="did you mean 'cumulative'"):
        DFM.load({**base, "solver": "cumulativ"}, "cpu")
    with pytest.raises(UsageError, match="unknown source of mdlm 'uniform'"):
        MDLM.load({**base, "source": "uniform"}, "cpu")


def test_sedd_reads_its_parameterisation(root):
    base = {"task": "tiny", "vocab_size": 6}
    mask = SEDD.load(base, "cpu")
    assert type(mask.denoiser).__name__ == "ScaledScoreDenoiser"
    assert (mask.denoiser.kind, mask.denoiser.conditioning) == ("log_score", "sigma")
    uniform = SEDD.load({**base, "source": "uniform"}, "cpu")
    assert (uniform.denoiser.kind, uniform.schedule.name) == ("x0_logits", "log-linear")
    geometric = {"name": "geometric", "sigma_min": 1e-4, "sigma_max": 20}
    write_dit(root / "geo" / "sedd-uniform", "sedd", "uniform", schedule=geometric)
    loaded = SEDD.load({"task": "geo", "source": "uniform"}, "cpu")
    assert (loaded.schedule.name, loaded.schedule.sigma_max, loaded.denoiser.kind) == ("geometric", 20.0, "log_score")
    write_dit(root / "odd" / "sedd-uniform", "sedd", "uniform", parameterisation="mystery")
    with pytest.raises(CheckpointError, match="unknown parameterisation 'mystery'"):
        SEDD.load({"task": "odd", "source": "uniform"}, "cpu")


def test_mdlm_is_conditioned_only_if_its_configuration_says_so(root):
    assert MDLM.load({"task": "tiny"}, "cpu").denoiser.conditioning == "none"
    write_dit(root / "timed" / "mdlm", "mdlm", "mask", time_conditioning=True)
    assert MDLM.load({"task": "timed"}, "cpu").denoiser.conditioning == "sigma"


def edit(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(method="mdlm"), r"holds weights of method 'mdlm', asked for 'dfm'"),
        (lambda c: c.update(source="mask"), r"holds weights of source 'mask', asked for 'uniform'"),
        (lambda c: c["network"].update(vocab_size=7), "know 7 tokens, the task has 6"),
        (lambda c: c["network"].update(outputs=7), "must have 6"),
        (lambda c: c["network"].pop("vocab_size"), "vocab_size is missing"),
        (lambda c: c.pop("network"), "does not describe a network"),
        (lambda c: c.update(architecture="mamba"), "unknown architecture 'mamba'; known: dit, causal"),
        (lambda c: c.update(schedule="geometrik"), "unknown schedule 'geometrik'"),
    ],
)
def test_a_configuration_that_does_not_fit(root, change, message):
    edit(root / "tiny" / "dfm-uniform", change)
    with pytest.raises(CheckpointError, match=message):
        DFM.load({"task": "tiny", "vocab_size": 6, "source": "uniform"}, "cpu")


def test_damaged_files(root):
    folder = root / "tiny" / "mdlm"
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        MDLM.load({"task": "tiny"}, "cpu")
    (folder / "config.json").write_text("{not json")
    with pytest.raises(CheckpointError, match="is damaged"):
        MDLM.load({"task": "tiny"}, "cpu")


def test_a_flipped_bit_in_the_weights_is_found(root):
    folder = root / "tiny" / "mdlm"
    weights = folder / "model.safetensors"
    MDLM.load({"task": "tiny"}, "cpu")
    content = bytearray(weights.read_bytes())
    content[-9] ^= 1  # a mantissa: the file is valid, the number finite
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged or was altered: .* restore it or train again"):
        MDLM.load({"task": "tiny"}, "cpu")
    (folder / "model.safetensors.sha256").unlink()
    MDLM.load({"task": "tiny"}, "cpu")


def test_the_shipped_weights_have_their_sums():
    """In the format of sha256sum, so that `sha256sum -c` checks them too."""
    folders = sorted(path.parent for path in (ROOT / "methods" / "weights").rglob("model.safetensors"))
    assert len(folders) >= 12
    for folder in folders:
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        assert (folder / "model.safetensors.sha256").read_text() == f"{digest}  model.safetensors\n"


def test_without_shipped_weights_those_trained_here_are_found(tmp_path, monkeypatch) -> None:
    """`tsdfm-bench train markov`, then `run --task markov`: no --checkpoint is needed; shipped weights come first."""
    monkeypatch.chdir(tmp_path)
    for task in ("markov", "sotu"):
        folder = tmp_path / "runs" / f"train-{task}" / "dfm-uniform"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"")
    root = tmp_path / "shipped"
    (root / "sotu" / "dfm-uniform").mkdir(parents=True)
    (root / "sotu" / "dfm-uniform" / "config.json").write_text("{}")
    found = checkpoints.find("dfm", "uniform", ("uniform", "mask"), None, "markov", root)
    assert found.folder.resolve() == (tmp_path / "runs" / "train-markov" / "dfm-uniform").resolve()
    shipped = checkpoints.find("dfm", "uniform", ("uniform", "mask"), None, "sotu", root)
    assert shipped.folder == root / "sotu" / "dfm-uniform"
    with pytest.raises(CheckpointError, match="no weights are shipped for task 'hmm'"):
        checkpoints.find("dfm", "uniform", ("uniform", "mask"), None, "hmm", root)
