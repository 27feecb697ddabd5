"""A request is checked before any work: every wrong value is one line that says what would have been right."""

from __future__ import annotations

from pathlib import Path

import pytest

from tsdfm_bench.config import DEFAULT_METHODS, make_config
from tsdfm_bench.errors import UsageError
from tsdfm_bench.spec import Spec, parse_spec, spec_of, split_list


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("mdlm", Spec("mdlm")),
        ("hf:org/model-2.b", Spec("hf", "org/model-2.b")),
        ("hf:/some/folder", Spec("hf", "/some/folder")),
        ("dfm[solver=exact]", Spec("dfm", "", {"solver": "exact"})),
        ("dfm[b=2; a=1]", Spec("dfm", "", {"a": "1", "b": "2"})),
        ("hf:gpt2[dtype=bfloat16,window=64]", Spec("hf", "gpt2", {"dtype": "bfloat16", "window": "64"})),
        ("a[path=x=y]", Spec("a", "", {"path": "x=y"})),
    ],
)
def test_a_spec_is_read_and_printed(text: str, spec: Spec) -> None:
    assert parse_spec(text) == spec
    assert parse_spec(str(spec)) == spec


@pytest.mark.parametrize("text", ["", "a b", "a[b", "a]b", "a[b]", "a[=1]", "a[b=1;b=2]", "[a=1]", ":x"])
def test_a_spec_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UsageError, match=r"cannot read|given twice"):
        parse_spec(text)


def test_commas_inside_brackets_do_not_split() -> None:
    assert split_list("dfm[a=1,b=2], mdlm,,ar") == ["dfm[a=1,b=2]", "mdlm", "ar"]


def test_a_table_is_a_spec() -> None:
    assert spec_of({"name": "dfm", "solver": "exact", "flag": True}) == parse_spec("dfm[solver=exact;flag=true]")


def test_defaults() -> None:
    config = make_config({})
    assert [str(spec) for spec in config.methods] == list(DEFAULT_METHODS)
    assert (config.steps, config.samples, config.seed) == ([8, 64], 128, 0)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("steps", "0", "at least 1"),
        ("steps", "8,-2", "at least 1"),
        ("steps", "many", "'many' is not a whole number"),
        ("steps", [2.5], "not a whole number"),
        ("steps", [True], "not a whole number"),
        ("steps", "", "at least one"),
        ("temperatures", "-0.1", "at least 0"),
        ("temperatures", "hot", "not a number"),
        ("temperatures", "nan", "finite"),
        ("top_p", "0", "above 0"),
        ("top_p", "1.1", "at most 1"),
        ("top_p_rule", "inclusiv", "did you mean 'inclusive'"),
        ("draw", "fp46", "did you mean 'fp64'"),
        ("samples", "0", "at least 1"),
        ("samples", "few", "not a whole number"),
        ("batch_size", "-1", "at least 1"),
        ("length", "0", "at least 1"),
        ("seed", "x", "not a whole number"),
        ("seed", "-1", "from 0 to 9223372036854775807, not -1"),
        ("seed", str(2**63), "from 0 to"),
        ("cell_timeout", "1e10", "at most 31622400 seconds"),
        ("infill", "1.0", "between 0 and 1"),
        ("threads", "0", "at least 1"),
        ("launcher", "inlin", "did you mean 'inline'"),
        ("methods", "a b", "cannot read"),
        ("methods", "", "at least one"),
    ],
)
def test_a_wrong_value_is_named(key: str, value: object, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_config({key: value})
    assert str(caught.value).startswith(key.replace("_", "-"))
    assert said in str(caught.value)


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        make_config({"steps": "0", "samples": "0"})
    assert len(str(caught.value).splitlines()) == 2


def test_prefix_and_infill_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="one of them"):
        make_config({"prefix": "4", "infill": "0.5"})


def test_a_sweep_file_and_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(
        'methods = ["mdlm", {name = "dfm", solver = "exact"}]\nsteps = [2, 4]\ntop-p = ["none", 0.9]\nsamples = 16\n'
    )
    config = make_config({"steps": "8", "samples": None}, file)
    assert [str(spec) for spec in config.methods] == ["mdlm", "dfm[solver=exact]"]
    assert (config.steps, config.samples, config.top_p) == ([8], 16, [None, 0.9])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("stepz = [8]", "unknown key 'stepz'.*did you mean 'steps'"),
        ("steps = ", "is not TOML"),
        ("[methods]\nx = 1", "needs the key 'name'"),
    ],
)
def test_a_wrong_sweep_file(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(content)
    with pytest.raises(UsageError, match=said):
        make_config({}, file)


def test_a_missing_sweep_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such sweep file"):
        make_config({}, tmp_path / "none.toml")


def test_plugins_of_a_sweep_file_are_relative_to_it(tmp_path: Path) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text('plugins = ["mine.py"]')
    assert make_config({}, file).plugins == [tmp_path / "mine.py"]
