"""The paper's figures: drawn from results alone, marked when incomplete or stale, honest about missing rows."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from typer.testing import CliRunner

from tsdfm_bench.cli import app
from tsdfm_bench.config import SweepConfig, make_config
from tsdfm_bench.paper_figures.base import scenes
from tsdfm_bench.paper_figures.convergence import Convergence, fitted_order, floor_of
from tsdfm_bench.paper_figures.curves import Frontier, Speed
from tsdfm_bench.paper_figures.every_variant import EveryVariant
from tsdfm_bench.paper_figures.figure1 import Figure1, against_teacher
from tsdfm_bench.paper_figures.figure3 import Figure3
from tsdfm_bench.paper_figures.published import Published, published
from tsdfm_bench.paper_figures.table1 import Table1
from tsdfm_bench.paper_figures.table2 import Table2
from tsdfm_bench.results import schema
from tsdfm_bench.results.claim_file import parse_claims
from tsdfm_bench.results.claims import verify
from tsdfm_bench.results.evidence import load_evidence
from tsdfm_bench.results.store import check_name, write_json, write_table
from tsdfm_bench.results.style import figure_metadata
from tsdfm_bench.results.training import TRAJECTORY_COLUMNS

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "paper_figures" / "sweeps").glob("*.toml"))


RECORDED = {f"table{i}" for i in (1, 2, 3)} | {f"figure{i}" for i in (1, 2, 3)}
RECORDED |= {"frontier", "speed-quality", "convergence", "ablation"}
"""What the recorded results draw: everything."""


def invoke(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def rows_of(method: str, ppl: float, entropy: float, **settings: Any) -> list[dict[str, Any]]:
    common = {
        "task": "t",
        "tokenizer": "k",
        "data_hash": "d",
        "method": method,
        "label": method,
        "kind": "method",
        "state": "done",
        "checkpoint": method,
        "weights": "sha256:00000000",
        "source": "uniform",
        "length": 64,
        "steps": 8,
        "draw": "fp64",
        "temperature": 1.0,
        "seed": 0,
        "n": 64,
        "calls": 8.0,
        "interval": "95 %",
    } | settings
    name = f"{method}-{common['source']}-{common['steps']}-{common['weights'][7:]}-{common['checkpoint']}"
    common["cell"] = f"{name}-{common['temperature']}"
    metrics = {"gen_ppl": ("a", ppl, "perplexity"), "entropy_nats": ("", entropy, "nats")}
    if "tv" in settings:
        metrics["tv_2"] = ("", common.pop("tv"), "1")
    common.pop("tv", None)
    return [
        common | {"metric": metric, "scorer": scorer, "value": value, "low": value * 0.97, "high": value * 1.03}
        | {"unit": unit, "definition": metric, "scorer_revision": "r" if scorer else ""}
        for metric, (scorer, value, unit) in metrics.items()
    ]  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Everything that all figures need, made up."""
    folder = tmp_path / "results"
    rows = [row for s in (1, 8, 64) for row in rows_of("tsdfm", 90 / s**0.3, 3.5, steps=s)]
    rows += [row for s in (8, 1024) for row in rows_of("dfm", 120 / s**0.2, 3.9, steps=s)]
    rows += rows_of("real", 20.0, 3.9, kind="reference", steps=None, source="", temperature=None, draw="", tv=0.01)
    for t in (0.7, 0.85, 1.2):
        rows += rows_of("tsdfm", 50 * t, 3.5 + 0.5 * (t - 1), temperature=t)
        rows += rows_of("tsdfm", 44 * t, 3.2 + 0.5 * (t - 1), temperature=t, weights="sha256:00abcdef")
        rows += rows_of("dfm", 79 * t, 3.9 + 0.5 * (t - 1), temperature=t)
    for s in (1, 2, 4, 8):
        rows += rows_of("dfm", 9.0 + 1 / s, 3.8, steps=s, checkpoint="oracle", tv=0.5 / s)
    variants: list[dict[str, Any]] = []
    settings: list[dict[str, Any]] = [{"K": 4, "tau": 0.5}, {"K": 1, "tau": 0.5}, {"K": 4, "tau": 0.25}]
    settings.append({"K": 4, "tau": 0.5, "control": "random_pick"})
    rows += rows_of("fsdfm", 70.0, 3.6, weights="sha256:99abcdef")  # a default too, of its own method, and the first
    unshaped = {"name": "unshaped", "method": "fsdfm", "training_seed": 0, "settings": {"control": "unshaped"}}
    variants.append({**unshaped, "weights": "sha256:99abcdef", "default": True})
    for i, wanted in enumerate(settings):
        for seed in range(3):
            weights = f"sha256:{i}{seed}abcdef"
            rows += rows_of("tsdfm", 60 + 3 * i + seed, 3.4 + 0.1 * i, weights=weights)
            about = {"name": str(wanted), "method": "tsdfm", "training_seed": seed, "settings": wanted}
            variants.append({**about, "weights": weights, "default": i == 0 and seed == 0})
    schema.write_summary(folder, schema.from_rows(rows))
    write_json(folder / "variants.json", {"format": 1, "variants": variants})
    cost = {"scale": "t", "source": "uniform", "batch": 8, "device": "cpu"}
    times = {"fsdfm": 1.0, "tsdfm": 1.3}
    costs = [
        {**cost, "name": name, "method": name, "seconds_per_step": [base + 0.01 * i for i in range(9)]}
        for name, base in times.items()
    ]
    write_json(folder / "training_cost.json", {"format": 1, "costs": costs})
    frame = pd.DataFrame(
        [
            dict(zip(TRAJECTORY_COLUMNS, [arm, "uniform", i, s, s / 4, 3 - s / 4, 1.0, 0.2, s / 4, 3.0], strict=True))
            for arm in ("blind", "shaped") for i in range(4) for s in range(5)
        ]
    )  # fmt: skip
    write_table(folder / "trajectories.parquet", frame)
    return folder


def test_everything_is_drawn_and_says_what_it_shows(results: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    only = "table1,table2,table3,figure1,figure2,figure3,frontier,speed-quality,convergence,ablation"
    done = invoke("figures", "--results", results, "--out", out, "--only", only, "--json")
    assert done.exit_code == 0, done.output
    reports = {report["name"]: report for report in json.loads(done.stdout)["figures"]}
    assert {report["figure"] for report in reports.values()} == set(only.split(","))
    assert {report["state"] for report in reports.values()} <= {"drawn", "incomplete"}, reports
    for name in ("figure1-a", "figure2", "figure3", "convergence"):
        for ending in ("pdf", "svg", "png"):
            assert figure_metadata(out / f"{name}.{ending}")["rows"]
    assert not any("-1.2 " in row for row in figure_metadata(out / "figure3.png")["rows"])  # one temperature only
    made = json.loads((out / "figure1-a.made.json").read_text())
    assert made["published"][0]["value"] == 32
    assert "× 1.29" in (out / "table3.md").read_text()
    listed = json.loads(
        invoke("figures", "--results", results, "--out", out, "--only", only, "--list", "--json").stdout
    )
    assert {report["state"] for report in listed["figures"]} <= {"current", "incomplete"}


def test_every_variant_stands_in_one_table_with_what_differs(results: Path) -> None:
    """Also one that differs in two settings; each over its seeds."""
    variants = json.loads((results / "variants.json").read_text())["variants"]
    for variant in variants:
        if variant["name"] == "{'K': 4, 'tau': 0.25}":
            variant |= {"name": "both", "settings": {"K": 8, "tau": 0.25}}
    write_json(results / "variants.json", {"format": 1, "variants": variants})
    (made,) = EveryVariant().make(load_evidence(results))
    assert made.table is not None
    shown = [[row.text(key) for key in ("variant", "differs", "seeds")] for row in made.table.rows]
    assert shown == [
        ["{'K': 4, 'tau': 0.5}", "the default", "3"],
        ["unshaped", "control unshaped", "1"],
        ["{'K': 1, 'tau': 0.5}", "K 1", "3"],
        ["{'K': 4, 'tau': 0.5, 'control': 'random_pick'}", "control random_pick", "3"],
        ["both", "K 8, tau 0.25", "3"],
    ]
    values = [made.table.rows[2].cells[key].value for key in ("gen_ppl a", "entropy_nats ")]
    assert values == pytest.approx([64.0, 3.5], rel=1e-3)  # perplexities on logarithms


def test_an_incomplete_figure_says_what_is_missing(results: Path, tmp_path: Path) -> None:
    frame = pd.read_parquet(results / "trajectories.parquet")
    write_table(results / "trajectories.parquet", frame[frame["arm"] == "blind"])
    summary = schema.read_summary(results)
    teacher = (summary["method"] == "dfm") & (summary["steps"] == 1024)
    schema.write_summary(results, summary[~teacher])
    out = tmp_path / "out"
    done = invoke("figures", "--results", results, "--only", "figure1,figure2", "--out", out, "--json")
    found = {report["figure"]: report for report in json.loads(done.stdout)["figures"]}
    assert {report["state"] for report in found.values()} == {"incomplete"}
    assert found["figure2"]["missing"] == ["shaped arm"]
    assert any("dfm" in said and "1024" in said.replace(",", "") for said in found["figure1"]["missing"])
    assert "Incomplete, no row for: shaped arm." in figure_metadata(out / "figure2.png")["notes"]


def test_changed_rows_make_a_figure_stale(results: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("figures", "--results", results, "--out", out, "--only", "figure1", "--json")
    assert invoke(*words).exit_code == 0
    summary = schema.read_summary(results)
    summary.loc[summary["metric"] == "gen_ppl", ["value", "low", "high"]] *= 1.5
    schema.write_summary(results, summary)
    assert "stale: the numbers" in json.loads(invoke(*words, "--list").stdout)["figures"][0]["state"]
    schema.write_summary(results, summary[summary["metric"] != "entropy_nats"])
    gone = invoke(*words)
    assert gone.exit_code == 1
    assert "Marked as stale: figure1-a" in json.loads(gone.stdout)["figures"][0]["reason"]
    assert json.loads((out / "figure1-a.made.json").read_text())["state"].startswith("stale")


def test_equal_results_give_equal_files(results: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert invoke("figures", "--results", results, "--out", tmp_path / name, "--only", "figure3").exit_code == 0
    for ending in ("pdf", "svg", "png"):
        assert (tmp_path / f"a/figure3.{ending}").read_bytes() == (tmp_path / f"b/figure3.{ending}").read_bytes()


def test_nothing_to_draw_names_the_sweep(tmp_path: Path) -> None:
    schema.write_summary(tmp_path, schema.from_rows(rows_of("tsdfm", 50.0, 3.9)))
    done = invoke("figures", "--results", tmp_path, "--only", "figure2", "--json")
    assert done.exit_code == 1
    reason = json.loads(done.stdout)["figures"][0]["reason"]
    assert "paper_figures/sweeps/figure2-sotu.toml" in reason
    assert (ROOT / "paper_figures/sweeps/figure2-sotu.toml").exists()


def test_wrong_names_are_wrong_use(results: Path, tmp_path: Path) -> None:
    done = invoke("figures", "--results", results, "--only", "figur1")
    assert done.exit_code == 2
    assert "did you mean 'figure1'" in done.stderr
    done = invoke("verify", results, "--only", "32-percnt")
    assert done.exit_code == 2
    assert "32-percent" in done.stderr
    assert invoke("figures", "--results", tmp_path / "none").exit_code == 1


def test_a_plugin_figure_and_a_broken_one(results: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from tsdfm_bench.paper_figures.base import Made\n"
        "from tsdfm_bench.results.table_model import Table, TableColumn\n"
        "class Mine:\n    title = 'mine'; sweep = ''\n"
        "    def make(self, evidence):\n"
        "        return [Made('mine', 'mine', [], table=Table('mine', [TableColumn('a', 'a')], []))]\n"
        "class Broken(Mine):\n    def make(self, evidence):\n        raise KeyError('x')\n"
        "import os\n"
        "class Leaving(Mine):\n    def make(self, evidence):\n        os._exit(0)\n"
        "class Loud(Mine):\n    def make(self, evidence):\n        os.chdir('/')\n"
        "        print('loud')\n        return super().make(evidence)\n"
        "FIGURES = {'mine': Mine, 'broken': Broken, 'leaving': Leaving, 'loud': Loud}\n"
    )
    words = ("figures", "--results", results, "--out", tmp_path / "out", "--plugin", file, "--json", "--only")
    assert invoke(*words, "mine").exit_code == 0
    assert (tmp_path / "out" / "mine.md").exists()
    here = Path.cwd()
    several = invoke(*words, "mine,broken,leaving,loud")
    assert several.exit_code == 1
    states = [report["state"] for report in json.loads(several.stdout)["figures"]]
    assert states == ["drawn", "failed", "failed", "drawn"]
    assert Path.cwd() == here


@pytest.mark.parametrize("figure", [Frontier, Speed])
def test_samplers_fed_the_exact_law_are_not_their_method(results: Path, figure: type[Frontier] | type[Speed]) -> None:
    rows = load_evidence(results).summary().to_dict("records")
    for t in (0.7, 0.85):
        rows += rows_of("dfm", 10 * t, 3.8, temperature=t, checkpoint="oracle", weights="sha256:00law")
    schema.write_summary(results, schema.from_rows(rows))
    for made in figure().make(load_evidence(results)):
        assert {row["checkpoint"] for row in made.rows if row["method"] == "dfm"} == {"dfm"}


def test_what_failed_with_options_is_no_reason_why_a_method_is_missing(results: Path) -> None:
    rows = load_evidence(results).summary().to_dict("records")
    undone = {"task": "t", "kind": "method", "state": "failed", "source": "mask", "steps": 8, "length": 64}
    for method, label, checkpoint in (("dfm", "dfm[k=2]", "x"), ("mdlm", "mdlm", "oracle"), ("sedd", "sedd", "x")):
        about = {"method": method, "label": label, "checkpoint": checkpoint, "reason": f"{label} broke"}
        rows.append(undone | about | {"cell": f"undone-{method}"})
    schema.write_summary(results, schema.from_rows(rows))
    missing = scenes(load_evidence(results))[0].absent([(name, "mask", 8) for name in ("dfm", "mdlm", "sedd")])
    assert missing == ["dfm mask 8 steps", "mdlm mask 8 steps", "sedd mask 8 steps (failed: sedd broke)"]


def test_every_file_has_a_name_of_its_own(results: Path) -> None:
    """Texts with options in their name, two of equal name and length, and two lengths."""
    rows = load_evidence(results).summary().to_dict("records")
    text = {"task": "text:tinystories[length=64;tokenizer=bpe-8192]"}
    others: list[dict[str, Any]] = [text, text | {"data_hash": "e"}, {"length": 128}, {"length": 256}]
    copies = [{**row, **other, "cell": f"copy{i}-{row['cell']}"} for i, other in enumerate(others) for row in rows]
    schema.write_summary(results, schema.from_rows([*rows, *copies]))
    evidence = load_evidence(results)
    for figure in (Table1, Table2, Figure1, Figure3, Frontier, Speed, Convergence):
        names = [made.name for made in figure().make(evidence)]
        assert len(set(names)) == len(names) >= 5
        assert [check_name(name) for name in names] == names
    names = [made.name for made in Table2().make(evidence)]
    assert (names[0], *names[3:]) == ("table2", "table2-t-uniform", "table2-t-uniform-2")


def test_what_cannot_be_written_stops_nothing_else(results: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from tsdfm_bench.paper_figures.base import Made\n"
        "from tsdfm_bench.results.table_model import Table, TableColumn\n"
        "class Mine:\n    title = 'mine'; sweep = ''\n"
        "    def make(self, evidence):\n"
        "        table = Table('mine', [TableColumn('a', 'a')], [])\n"
        "        return [Made(name, 'mine', [], table=table) for name in ('../mine', 'mine')]\n"
        "FIGURES = {'mine': Mine}\n"
    )
    words = ("figures", "--results", results, "--out", tmp_path / "out", "--plugin", file, "--json")
    done = invoke(*words, "--only", "mine,table3")
    assert done.exit_code == 1
    reports = json.loads(done.stdout)["figures"]
    assert [report["state"] for report in reports] == ["failed", "drawn", "drawn"]
    assert "'../mine' cannot be used as a file name" in reports[0]["reason"]
    assert (tmp_path / "out" / "mine.md").exists()
    listed = invoke(*words, "--only", "mine,table3", "--list")
    assert [report["state"] for report in json.loads(listed.stdout)["figures"]] == ["failed", "current", "current"]


def test_recorded_results_are_drawn_and_verified(tmp_path: Path) -> None:
    recorded = tmp_path / "reference"
    shutil.copytree(ROOT / "results" / "reference", recorded)
    drawn = invoke("figures", "--results", recorded, "--out", tmp_path / "f", "--json")
    assert drawn.exit_code == 0, drawn.output
    states = {report["figure"]: report["state"] for report in json.loads(drawn.stdout)["figures"]}
    assert {name for name, state in states.items() if state in ("drawn", "incomplete")} >= RECORDED
    done = invoke("verify", recorded, "--json")
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    stored = json.loads((ROOT / "results" / "reference" / "verdicts.json").read_text())
    assert stored["verdicts"] == content["verdicts"]
    assert sum(content["counts"].values()) == len(content["verdicts"])
    assert "NaN" not in done.stdout


def test_own_claims_and_strict(results: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(
        'format = 1\n[rows.a]\nmethod = "dfm"\nsteps = 1024\n[[claims]]\nid = "x"\ntitle = "x"\n'
        'value = "ppl(a)"\nholds = "< 1"\n'
    )
    assert invoke("verify", results, "--claims", mine).exit_code == 0
    assert invoke("verify", results, "--claims", mine, "--strict").exit_code == 1
    mine.write_text(mine.read_text().replace("holds", "hold"))
    wrong = invoke("verify", results, "--claims", mine)
    assert wrong.exit_code == 2
    assert "mine.toml, line" in wrong.stderr


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_sweeps_are_requests(path: Path) -> None:
    config = make_config({}, path)
    assert isinstance(config, SweepConfig)
    assert config.samples >= 256


def test_every_claim_names_a_sweep_that_exists() -> None:
    claims = tomllib.loads((ROOT / "paper_figures" / "claims.toml").read_text())["claims"]
    assert all((ROOT / claim["sweep"]).exists() for claim in claims)


def test_published_numbers() -> None:
    numbers = published()
    assert numbers.claim("32-percent").value == 32
    assert [number.gen_ppl for number in numbers.find("fsdfm", "uniform", 8)] == [90.49]
    assert all(number.origin for number in numbers.numbers)
    assert not numbers.find("mdlm", "mask", 1024, draw="fp64")[0].origin.startswith("EDLM")
    raw = tomllib.loads((ROOT / "paper_figures" / "published.toml").read_text())
    raw["tables"][0]["rows"][0].append(1)
    with pytest.raises(ValueError, match="values for"):
        Published.model_validate(raw)


def test_orders_are_slopes_above_the_floor() -> None:
    steps = [1, 2, 4, 8, 16]
    assert fitted_order(steps, [1.0 / s**2 for s in steps], 0.0) == pytest.approx(2.0)
    assert fitted_order([1, 2], [1.0, 0.5], 0.0) is None
    assert np.isfinite(fitted_order(steps, [1.0 / s for s in steps], 0.01) or np.nan)


def exact_law(tmp_path: Path, points: dict[int, tuple[float, float, float]], real: tuple[float, float, float]) -> Path:
    """A sampler with the oracle's predictions: excess NLL with its interval by steps, and that of exact draws."""
    cells = [(rows_of("dfm", 9.0, 3.8, steps=s, checkpoint="oracle")[0], ends) for s, ends in points.items()]
    reference: dict[str, Any] = {"kind": "reference", "steps": None, "source": "", "temperature": None, "draw": ""}
    cells.append((rows_of("real", 9.0, 3.8, **reference)[0], real))
    about = {"metric": "excess_nll", "scorer": "", "scorer_revision": "", "unit": "nats/token", "definition": "excess"}
    rows = [row | about | dict(zip(("value", "low", "high"), ends, strict=True)) for row, ends in cells]
    schema.write_summary(tmp_path, schema.from_rows(rows))
    return tmp_path


def test_no_order_is_fitted_into_the_noise_of_exact_draws(tmp_path: Path) -> None:
    """Exact draws at -0.001±0.010: what is not twice 0.011 away from 0 says nothing of an order."""
    points = {s: (e, e - 0.01, e + 0.01) for s, e in ((1, 0.2), (2, 0.1), (4, 0.02), (8, 0.004), (16, 0.012))}
    (made,) = Convergence().make(load_evidence(exact_law(tmp_path, points, (-0.001, -0.011, 0.009))))
    assert made.figure is not None
    words = [text.get_text() for text in made.figure.axes[0].texts]
    assert "exact draws" in words
    assert not any("order" in text for text in words)  # two clear points
    assert floor_of("excess_nll", {"value": -0.001, "low": -0.011, "high": 0.009}) == 0.011
    assert floor_of("excess_nll", {"value": -0.001, "low": None, "high": None}) == 0.001
    assert floor_of("tv_2", {"value": 0.02, "low": 0.01, "high": 0.03}) == 0.02


def test_a_bar_that_reaches_zero_takes_no_other_along(tmp_path: Path) -> None:
    points = {1: (0.4, 0.39, 0.41), 2: (0.2, 0.19, 0.21), 4: (0.1, 0.09, 0.11), 8: (0.005, -0.005, 0.015)}
    (made,) = Convergence().make(load_evidence(exact_law(tmp_path, points, (0.0, -0.01, 0.01))))
    assert made.figure is not None
    bars = {line.get_xdata()[0] for line in made.figure.axes[0].lines if len(set(line.get_xdata())) == 1}
    assert bars == {1, 2, 4}
    assert "Without a bar, since its interval reaches 0: 1 of 4 points." in made.notes
    assert any("order 1.0" in text.get_text() for text in made.figure.axes[0].texts)


# ---------------------------------------------------------------------------------------------------- training seeds

STUDENTS = (40.0, 50.0, 62.5)


def seeded(folder: Path, seeds: int, labelled: bool = False) -> Path:
    """Students of several training seeds at 8 and 64 steps, and one teacher; each network known to three hundredths."""
    rows = rows_of("dfm", 80.0, 3.9, steps=1024)
    rows += rows_of("real", 20.0, 3.9, kind="reference", steps=None, source="", temperature=None, draw="")
    variants = []
    for seed, ppl in enumerate(STUDENTS[:seeds]):
        stem = "tsdfm-uniform" + (f"-s{seed}" if seed else "")
        about = {"weights": f"sha256:{seed}1234567", "checkpoint": stem}
        about |= {"label": f"tsdfm[checkpoint={stem}]"} if labelled else {}
        for steps, temperature in ((8, 1.0), (64, 1.0), (8, 0.7)):
            rows += rows_of(
                "tsdfm", ppl * temperature, 3.7 - steps / 640, steps=steps, temperature=temperature, **about
            )
        known = {"name": stem, "method": "tsdfm", "training_seed": seed, "settings": {"K": 4}, "default": seed == 0}
        variants.append({**known, "weights": about["weights"]})
    schema.write_summary(folder, schema.from_rows(rows))
    write_json(folder / "variants.json", {"format": 1, "variants": variants})
    return folder


@pytest.mark.parametrize("labelled", [False, True])
def test_several_training_seeds_are_one_row_of_table_1(tmp_path: Path, labelled: bool) -> None:
    (table,) = Table1().make(load_evidence(seeded(tmp_path, 3, labelled)))
    assert table.table is not None
    row = next(row.cells for row in table.table.rows if row.text("method") == "tsdfm")
    logs = np.log(STUDENTS)
    ends = np.exp(stats.t.interval(0.95, 2, logs.mean(), stats.sem(logs)))
    assert row["ppl a"].value == pytest.approx(50.0)
    assert (row["ppl a"].low, row["ppl a"].high) == pytest.approx(tuple(ends))
    assert (row["seeds"].text, [c.title for c in table.table.columns][3]) == ("3", "seeds")
    assert any(note.startswith("Where a recipe has 3 training seeds") for note in table.notes)
    assert len([shown for shown in table.rows if shown["method"] == "tsdfm" and shown["steps"] == 8]) == 2 * 3


def test_several_training_seeds_are_one_point_of_figure_1_and_the_headline_is_over_seeds(tmp_path: Path) -> None:
    evidence = load_evidence(seeded(tmp_path, 3))
    (made,) = Figure1().make(evidence)
    assert made.figure is not None
    top = made.figure.axes[0]
    (line,) = (line for line in top.lines if list(line.get_xdata()) == [8, 64])
    assert line.get_ydata() == pytest.approx([50.0, 50.0])
    marks = [line for line in top.lines if list(line.get_xdata()) == [8] * 3]
    assert [list(mark.get_ydata()) for mark in marks] == [list(STUDENTS)]
    assert any("Small marks are single seeds" in note for note in made.notes)
    assert any("intervals over sequences, over training seeds where there are several" in note for note in made.notes)
    (shown, *_) = Frontier().make(evidence)
    assert any(note.endswith("bars are 95 % intervals over training seeds.") for note in shown.notes)
    found = against_teacher(scenes(evidence)[0], "a", "uniform")
    claims = parse_claims(
        'format = 1\n[rows.s]\nmethod = "tsdfm"\nsteps = 8\n[rows.t]\nmethod = "dfm"\nsteps = 1024\n'
        '[[claims]]\nid = "x"\ntitle = "x"\nvalue = "100 * (1 - ppl(s) / ppl(t))"\nholds = "> 0"\n'
    )
    (instance,) = verify(evidence, claims)[0].instances
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((instance.value, instance.low, instance.high))
    assert found.low < 0 < found.high  # one seed alone: 50 % below, [48, 52]


@pytest.mark.parametrize("figure", [Frontier, Speed])
def test_curves_hold_all_seeds_of_the_default_recipe(tmp_path: Path, figure: type[Frontier] | type[Speed]) -> None:
    for seeds in (1, 3):
        (folder := tmp_path / str(seeds)).mkdir()
        made = figure().make(load_evidence(seeded(folder, seeds)))[0]
        shown = {row["weights"] for row in made.rows if row["method"] == "tsdfm"}
        assert len(shown) == seeds
        assert any("3 training seeds" in note for note in made.notes) is (seeds == 3)


def test_a_network_that_failed_is_not_averaged_away(tmp_path: Path) -> None:
    summary = load_evidence(seeded(tmp_path, 3)).summary()
    lost = (summary["weights"] == "sha256:21234567") & (summary["steps"] == 8) & (summary["temperature"] == 1.0)
    failed = (
        summary[lost]
        .head(1)
        .assign(state="failed", reason="OutOfMemory: x", metric="", scorer="", value=None, low=None, high=None, n=None)
    )
    schema.write_summary(tmp_path, schema.from_rows([*summary[~lost].to_dict("records"), *failed.to_dict("records")]))
    evidence = load_evidence(tmp_path)
    told = "tsdfm uniform 8 steps: 2 of 3 networks, without training seed 2 (failed: OutOfMemory: x)."
    for made in (*Table1().make(evidence), *Figure1().make(evidence)):
        assert told in made.notes
    assert not any("networks, without" in note for note in Table1().make(load_evidence(seeded(tmp_path, 3)))[0].notes)


def test_ablations_count_the_networks_behind_a_mean(results: Path) -> None:
    summary = load_evidence(results).summary()
    lost = (summary["weights"] == "sha256:22abcdef") & (summary["metric"] == "entropy_nats")
    summary.loc[lost, ["value", "low", "high"]] = np.nan
    schema.write_summary(results, summary)
    (table,) = Table2().make(load_evidence(results))
    assert "tau 0.25: entropy_nats of 2 of 3 networks, the others have none." in table.notes
    assert sum("of 2 of 3 networks" in note for note in table.notes) == 1


def test_cells_of_other_sampling_seeds_are_counted(tmp_path: Path) -> None:
    rows = load_evidence(seeded(tmp_path, 1)).summary().to_dict("records")
    again = [{**row, "seed": 1, "cell": f"again-{row['cell']}"} for row in rows if row["kind"] == "method"]
    schema.write_summary(tmp_path, schema.from_rows([*rows, *again]))
    evidence = load_evidence(tmp_path)
    for made in (*Table1().make(evidence), *Figure1().make(evidence)):
        assert "3 further cells with other weights or seeds not shown." in made.notes
    schema.write_summary(tmp_path, schema.from_rows(rows))
    assert not any("further cell" in note for note in Table1().make(load_evidence(tmp_path))[0].notes)


def test_one_training_seed_changes_nothing(tmp_path: Path) -> None:
    evidence = load_evidence(seeded(tmp_path, 1))
    (table,), (figure,) = Table1().make(evidence), Figure1().make(evidence)
    assert table.table is not None
    assert not any(column.key == "seeds" for column in table.table.columns)
    assert not any("seeds" in note for note in (*table.notes, *figure.notes))
    row = next(row.cells for row in table.table.rows if row.text("method") == "tsdfm")
    assert (row["ppl a"].value, row["ppl a"].low, row["ppl a"].high) == (40.0, 40.0 * 0.97, 40.0 * 1.03)


def test_networks_of_another_training_time_are_an_ablation_of_their_own(results: Path) -> None:
    """Beside the default ones they would differ in that too, and stand for further seeds of them."""
    content = json.loads((results / "variants.json").read_text())
    for variant in content["variants"]:
        variant["alike"] = variant["settings"].get("K") != 4 and variant["settings"].get("control") != "random_pick"
        if not variant["alike"]:
            variant |= {"default": False, "settings": {**variant["settings"], "training_steps": 200}}
    write_json(results / "variants.json", {"format": 1, "variants": content["variants"]})
    made = EveryVariant().make(load_evidence(results))
    assert len(made) == 2
    assert [one.title.endswith(", 200 training steps") for one in made].count(True) == 1
    shown = [[row.text("variant") for row in one.table.rows] for one in made if one.table]
    assert not set(shown[0]) & set(shown[1])
