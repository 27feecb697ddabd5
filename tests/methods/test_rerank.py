"""Compass at inference: the law of the best of K, what is counted, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tsdfm_bench.errors import CheckpointError, UsageError
from tsdfm_bench.methods.core.grid import Grid
from tsdfm_bench.methods.core.kernel import Posterior
from tsdfm_bench.methods.core.schedule import Polynomial
from tsdfm_bench.methods.fsdfm import FSDFM, CumulativeKernel
from tsdfm_bench.methods.nets.compass import Compass
from tsdfm_bench.methods.nets.dit import DiT, DiTConfig
from tsdfm_bench.methods.rerank import RerankedKernel
from tsdfm_bench.methods.tsdfm import TSDFM
from tsdfm_bench.tasks.synthetic.oracle import make_oracle
from tsdfm_bench.tasks.synthetic.recipe import markov_chain

V, LENGTH = 3, 2


def energy(states: Tensor, time: Tensor, origin: Tensor) -> Tensor:
    """Sums of tokens: states of equal energy exist, and the tie is part of the law."""
    return (states % V).float()


def best_of(law: dict[tuple[int, ...], float], count: int) -> dict[tuple[int, ...], float]:
    """The module's formula: P (((G + P_e)^K - G^K) / P_e)."""
    values = {y: sum(v % V for v in y) for y in law}
    chosen = {}
    for y, p in law.items():
        same = sum(q for z, q in law.items() if values[z] == values[y])
        higher = sum(q for z, q in law.items() if values[z] > values[y])
        chosen[y] = p * ((higher + same) ** count - higher**count) / same if p else 0.0
    return chosen


@pytest.mark.parametrize(("outputs", "change"), [(3, "reference"), (4, "reference"), (4, "never")])
@pytest.mark.parametrize(("count", "tau"), [(1, 0.0), (4, 0.0), (4, 0.5)])
def test_a_step_is_the_best_of_k(lab, outputs: int, change: str, count: int, tau: float) -> None:
    """First of three steps, t_next = 1/3: with tau = 0.5 it is not chosen, with K = 1 it is FS-DFM's."""
    table = lab.TableDenoiser(V, outputs)
    mask = V if outputs > V else None
    grid = Grid.reference(3)
    posterior = Posterior(table, Polynomial(), mask_id=mask)
    kernel = RerankedKernel(posterior, change, energy, count, tau)
    start = (V, 1) if mask else (2, 1)
    sampled = lab.first_step(kernel, start, grid, 20_000, 5)
    p = torch.from_numpy(table.probabilities(start, 0.0))
    matrix = CumulativeKernel(posterior, change).transition(p, torch.tensor(start), 0.0, 1 / 3).numpy()
    plain = lab.product_law(list(matrix), outputs)
    lab.agrees(sampled, best_of(plain, count) if tau == 0 else plain)


def test_no_mask_is_left_and_both_networks_are_counted() -> None:
    chain = markov_chain(4)
    for source in ("uniform", "mask"):
        oracle = lambda form, source: make_oracle(chain, form, source)  # noqa: E731
        method = FSDFM.from_oracle(oracle, {"rerank": "compass", "K": "8", "tau": "0", "source": source}, "cpu")
        assert set(method.networks()) == {"denoiser", "energy"}
        from tsdfm_bench.api import SampleRequest
        from tsdfm_bench.rng import Streams

        request = SampleRequest(Streams.of(0, "rerank", 400), 12, 4)
        chosen = method.sample(request).tokens
        assert ((chosen >= 0) & (chosen < 4)).all()
        plain = FSDFM.from_oracle(oracle, {"source": source}, "cpu").sample(request).tokens
        better, worse = (chain.token_nll(x.numpy()).mean() for x in (chosen, plain))
        assert better < worse  # the exact energy at few steps finds likelier text


def saved(folder, source: str = "uniform", **about: object) -> DiT:
    torch.manual_seed(0)
    network = DiT(DiTConfig(V, V, 4, width=8, blocks=1, heads=1, condition=4, step_aware=True))
    network.save_pretrained(folder / f"fsdfm-{source}", {"method": "fsdfm", "source": source, **about})
    return network


def test_the_compass_lies_beside_the_weights_and_belongs_to_the_identity(tmp_path) -> None:
    network = saved(tmp_path)
    params = {"checkpoint": str(tmp_path), "source": "uniform", "rerank": "compass", "K": "2"}
    with pytest.raises(CheckpointError, match="compass-uniform"):
        FSDFM.identify(params)
    compass = Compass.from_teacher(network, 1)
    compass.save_pretrained(tmp_path / "compass-uniform")
    plain = FSDFM.identify({"checkpoint": str(tmp_path), "source": "uniform"})
    both = FSDFM.identify(params)
    assert both.weights != plain.weights
    with torch.no_grad():
        compass.head.bias.fill_(1.0)
    compass.save_pretrained(tmp_path / "compass-uniform")
    assert FSDFM.identify(params).weights != both.weights
    method = FSDFM.load(params, "cpu")
    assert isinstance(method.networks()["energy"], Compass)
    assert "energy" not in FSDFM.load({"checkpoint": str(tmp_path)}, "cpu").networks()
    other = Compass.from_teacher(DiT(DiTConfig(V + 2, V + 2, 4, width=8, blocks=1, heads=1, condition=4)), 1)
    other.save_pretrained(tmp_path / "compass-uniform")
    with pytest.raises(CheckpointError, match=r"has outputs 5, the student .* 3"):
        FSDFM.load(params, "cpu")
    longer = Compass.from_teacher(DiT(DiTConfig(V, V, 8, width=8, blocks=1, heads=1, condition=4)), 1)
    longer.save_pretrained(tmp_path / "compass-uniform")
    with pytest.raises(CheckpointError, match=r"has length 8, the student .* 4"):
        FSDFM.load(params, "cpu")


def test_a_compass_of_another_teacher_is_refused(tmp_path) -> None:
    network = saved(tmp_path, needed={"dfm-uniform": "sha256:aa"})
    params = {"checkpoint": str(tmp_path), "source": "uniform", "rerank": "compass"}
    compass = Compass.from_teacher(network, 1)
    compass.save_pretrained(tmp_path / "compass-uniform", {"teacher_hash": "sha256:aa"})
    FSDFM.load(params, "cpu")
    compass.save_pretrained(tmp_path / "compass-uniform", {"teacher_hash": "sha256:bb"})
    with pytest.raises(CheckpointError, match="made with another teacher than the student"):
        FSDFM.load(params, "cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rerank": "compass", "K": "0"}, "K of fsdfm"),
        ({"rerank": "compass", "K": "2.5"}, "K of fsdfm"),
        ({"rerank": "compass", "tau": "1.5"}, "tau of fsdfm"),
        ({"rerank": "compass", "tau": "nan"}, "tau of fsdfm"),
        ({"K": "4"}, "belong to rerank=compass"),
    ],
)
def test_impossible_options_are_refused(tmp_path, options: dict[str, str], message: str) -> None:
    saved(tmp_path)
    with pytest.raises(UsageError, match=message):
        FSDFM.identify({"checkpoint": str(tmp_path), **options})


def test_shaped_students_are_not_reranked() -> None:
    assert "rerank" not in TSDFM.info.options


def test_an_energy_that_is_not_finite_is_noticed(lab) -> None:
    from tsdfm_bench.errors import PluginError

    class Broken(nn.Module):
        def forward(self, states: Tensor, time: Tensor, origin: Tensor) -> Tensor:
            return torch.full(states.shape, np.nan)

    method = FSDFM(lab.TableDenoiser(V, V), rerank="compass", energy=Broken(), tau=0.0)
    with pytest.raises(PluginError, match="not finite"):
        method.sample(lab.request(3, 4, 4))


def test_options_are_listed_with_the_method() -> None:
    assert json.dumps(dict(FSDFM.info.options)).count("rerank") >= 2
