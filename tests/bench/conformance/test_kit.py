"""The kit itself: its laws, the command, the pytest plug-in, and that the built-in methods pass."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tsdfm_bench.cli import app
from tsdfm_bench.conformance import Target, conform, laws
from tsdfm_bench.conformance.catalogue import CHECKS, select
from tsdfm_bench.conformance.pytest import conformance_test
from tsdfm_bench.errors import UsageError

BROKEN = Path(__file__).parent / "broken.py"
BUILT_IN = ("ar", "mdlm", "sedd", "dfm", "fsdfm", "tsdfm")

test_good = conformance_test("good", plugin=BROKEN, only=["pinned", "refusals"], isolated=False)


def test_the_pytest_plug_in_fails_where_a_check_fails() -> None:
    check = conformance_test("pinned-changed", plugin=BROKEN, only=["pinned", "refusals"], isolated=False)
    with pytest.raises(AssertionError, match="pinned"):
        check("pinned")
    check("refusals")


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_methods_pass(name: str) -> None:
    """All but the sampled ones in every setting: laws and draws are tested method by method in tests/methods."""
    quick = [check.id for check in CHECKS if check.id not in ("draw", "repeatable", "cost", "law")]
    report = conform(Target(name, options=ONE_SETTING.get(name, {})), quick, isolated=False)
    assert {row.check: row.seen for row in report.rows if row.verdict == "fail"} == {}
    assert report.passed


ONE_SETTING = {
    "mdlm": {"sampler": "cached", "finaliser": "argmax"},
    "sedd": {"sampler": "analytic"},
    "dfm": {"solver": "exact", "unmask_change": "reference"},
    "fsdfm": {"unmask_change": "reference"},
    "tsdfm": {"unmask_change": "reference"},
}


@pytest.mark.parametrize("c", [0.3, 1.0, 4.0, 100.0])
def test_closed_form_of_the_race(c: float) -> None:
    """f(c) against the sum it comes from: quantised times k 2^-24 / w against an exponential of mean 1."""
    k = np.arange(1, int(60 * c) + 60)
    wins = laws.QUANTUM * np.exp(-k / c).sum()
    assert laws.kept_share(c) * c * laws.QUANTUM == pytest.approx(wins, rel=1e-12)


def test_closed_form_agrees_with_a_race_on_coarser_uniforms() -> None:
    """The same form for multiples of 2^-12, where the race can be counted: weight 2^-12 / 2 beside weight 1."""
    generator = np.random.default_rng(1)
    n, quantum, c = 4_000_000, 2.0**-12, 0.5
    rare = -np.log((generator.integers(0, 4096, n) + 0.0) * quantum + 1e-300) / (c * quantum)
    wins = (rare < generator.exponential(size=n)).sum()
    wanted = n * quantum * c * laws.kept_share(c)
    assert abs(wins - wanted) < 5 * math.sqrt(wanted)


@pytest.mark.parametrize("source", ["mask", "uniform"])
def test_score_and_posterior_of_the_enumerated_law_agree(source: str) -> None:
    """On the absorbing graph S(y) = p(y) kappa / (1 - kappa); on the uniform one p follows from the ratios."""
    tokens = torch.tensor([[0, 3, 2], [3, 3, 1]]) if source == "mask" else torch.tensor([[0, 1, 2], [2, 2, 1]])
    kappa = torch.tensor([0.3, 0.7], dtype=torch.float64)
    rows, places = torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1])
    forms = ("posterior", "score")
    p, ratios = (
        laws.Enumerated(form, source).predict(tokens, SimpleNamespace(kappa=kappa), rows, places).exp()[:, :3]
        for form in forms
    )
    k = kappa[rows, None]
    if source == "mask":
        assert torch.allclose(ratios, p * k / (1 - k))
    else:
        here = tokens[rows, places, None]
        own = torch.zeros_like(p).scatter(1, here, 1.0)
        others = ratios / ratios.sum(dim=1, keepdim=True)  # law of this place given the noised others
        clean = (others - (1 - k) / 3) / k
        bayes = clean * (k * own + (1 - k) / 3)
        assert torch.allclose(p, bayes / bayes.sum(dim=1, keepdim=True))


def test_the_command_prints_a_table_and_leaves_with_the_verdict(tmp_path: Path) -> None:
    arguments = ["conform", "refusals-raise", "--plugin", str(BROKEN), "--only", "refusals"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "it raised ValueError: top_p" in result.stdout.replace("\n", " ")
    assert "3 passed, 1 failed" in result.stdout
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert found["methods"][0]["passed"] is False
    assert [check["check"] for check in found["methods"][0]["checks"]] == ["contract", "runs", "shapes", "refusals"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mdlmm"], "did you mean 'mdlm'"),
        (["mdlm", "--only", "pined"], "did you mean 'pinned'"),
        (["nowhere.py"], "no such plug-in file"),
    ],
)
def test_wrong_use(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["conform", *arguments])
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_check_brings_what_it_needs() -> None:
    assert [check.id for check in select(["law"])] == ["contract", "runs", "shapes", "independent", "law"]
    with pytest.raises(UsageError):
        select(["laws"])
