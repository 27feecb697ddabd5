"""Plug-ins: found from metadata, imported late, and never able to break more than themselves."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tsdfm_bench.api import Identity, MethodInfo, MetricInfo, ScorerInfo, TaskInfo
from tsdfm_bench.errors import PluginError, UsageError
from tsdfm_bench.plan import identify
from tsdfm_bench.registry import Entry, Registry, check_info

GOOD = """
from tsdfm_bench.api import MethodInfo
class Thing:
    info = MethodInfo(name="thing", family="test"{extra})
    load = networks = refuse = sample = None
"""


class Index:
    """Distributions on sys.path, made as pip would leave them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delenv("TSDFM_BENCH_PLUGINS", raising=False)

    def add(self, distribution: str, source: str, *, name: str = "thing", kind: str = "methods") -> None:
        module = f"{distribution.replace('-', '_')}_module"
        (self.folder / f"{module}.py").write_text(source)
        info = self.folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[tsdfm_bench.{kind}]\n{name} = {module}:Thing\n")
        sys.modules.pop(module, None)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    return Index(tmp_path, monkeypatch)


def test_a_plugin_is_listed_without_being_imported(index: Index) -> None:
    index.add("acme-thing", "raise RuntimeError('imported')")
    entry = next(e for e in Registry().entries("methods") if e.name == "thing")
    assert (entry.distribution, entry.version, entry.builtin) == ("acme-thing", "1.0", False)
    assert "acme_thing_module" not in sys.modules


def test_a_plugin_is_loaded(index: Index) -> None:
    index.add("acme-thing", GOOD.format(extra=""))
    assert Registry().load("methods", "thing").info.name == "thing"


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("tasks", "load = decode = encode = reference = prompts = None"),
        ("metrics", "info = MetricInfo(name='thing', description='none'); load = compute = None"),
        ("scorers", "load = networks = score = None"),
        ("figures", "title = 'thing'; make = None"),
    ],
)
def test_an_installed_plugin_of_every_kind_is_listed_and_loaded(index: Index, kind: str, body: str) -> None:
    index.add("acme-thing", f"from tsdfm_bench.api import MetricInfo\nclass Thing:\n    {body}\n", kind=kind)
    assert "thing" in Registry().names(kind)
    assert "thing" not in Registry().names("methods")
    assert Registry().load(kind, "thing").__name__ == "Thing"
    index.add("acme-thing", "class Thing:\n    load = None\n", kind=kind)
    with pytest.raises(PluginError, match=r"acme-thing.* lacks "):
        Registry().load(kind, "thing")


RECORDS = {
    "sources": MethodInfo("mine", "test", sources="uniform"),  # type: ignore[arg-type]
    "options": MethodInfo("mine", "test", options={"k": 3}),  # type: ignore[dict-item]
    "uses_steps": MethodInfo("mine", "test", uses_steps=None),  # type: ignore[arg-type]
    "vocab_size": MethodInfo("mine", "test", vocab_size="27"),  # type: ignore[arg-type]
    "needs": MetricInfo("mine", "none", needs=None),  # type: ignore[arg-type]
    "references": TaskInfo("mine", "t@0", 27, 8, "sha256:0", references="real"),  # type: ignore[arg-type]
    "window": ScorerInfo("mine", "Mine", "0", "token", "float32", window=None, stride=1),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("field", RECORDS)
def test_a_record_that_holds_something_else_is_said_by_its_field(field: str) -> None:
    info = RECORDS[field]
    kind = type(info).__name__.removesuffix("Info").lower() + "s"
    with pytest.raises(PluginError, match=rf"'mine' of acme 1: {field} of its info is .*, not (a |True)"):
        check_info(Entry(kind, "mine", "acme:Mine", "acme", "1"), info)


def test_a_record_as_the_contract_has_it_is_taken() -> None:
    info = MethodInfo("mine", "test", vocab_size=27, sources=("mask",), options={"k": ("1", "2"), "file": "a path"})
    check_info(Entry("methods", "mine", "acme:Mine", "acme", "1"), info)


def test_an_identity_of_something_else_is_said() -> None:
    class Mine:
        info = MethodInfo("mine", "test")

        @classmethod
        def identify(cls, params: Mapping[str, object]) -> Identity:
            return Identity(Path("weights"), "sha256:0")  # type: ignore[arg-type]

    with pytest.raises(PluginError, match=r"method 'mine': checkpoint of its identity is .*, not a string"):
        identify(Mine, {})


def test_built_ins_are_listed_first(index: Index) -> None:
    index.add("acme-thing", GOOD.format(extra=""), name="aaa")
    assert Registry().names("methods")[-1] == "aaa"
    assert Registry().names("methods")[:-1] == sorted(Registry().names("methods")[:-1])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise RuntimeError('no such luck')", "RuntimeError: no such luck"),
        ("import nowhere_to_be_found", "ModuleNotFoundError"),
        ("raise SystemExit(1)", "SystemExit"),
        ("class Own(BaseException): pass\nraise Own('odd')", "Own: odd"),
        ("def broken(:", "SyntaxError"),
        ("x = 1", "Thing"),
        ("class Thing:\n    info = load = refuse = None", "lacks networks, sample"),
        ("class Thing:\n    info = load = networks = refuse = sample = None", "not a MethodInfo"),
        (GOOD.format(extra=", api_version=2"), "API version 2, this tsdfm-bench has 1: upgrade tsdfm-bench"),
        (GOOD.format(extra=", api_version=0"), "API version 0, this tsdfm-bench has 1: upgrade the plug-in"),
    ],
)
def test_a_broken_plugin_is_one_line_that_names_it(index: Index, source: str, said: str) -> None:
    index.add("acme-thing", source)
    registry = Registry()
    assert "thing" in registry.names("methods")
    with pytest.raises(PluginError) as caught:
        registry.load("methods", "thing")
    message = str(caught.value)
    assert "'thing' of acme-thing 1.0" in message
    assert said in message
    assert "\n" not in message
    assert registry.load("methods", "mdlm").info.name == "mdlm"


def test_the_same_name_twice_names_both_distributions(index: Index) -> None:
    index.add("acme-thing", GOOD.format(extra=""))
    index.add("other-thing", GOOD.format(extra=""))
    registry = Registry()
    assert registry.names("methods").count("thing") == 1
    with pytest.raises(PluginError, match=r"acme-thing 1\.0 and other-thing 1\.0.*uninstall"):
        registry.load("methods", "thing")


def test_a_plugin_cannot_replace_a_built_in(index: Index) -> None:
    index.add("acme-thing", GOOD.format(extra=""), name="mdlm")
    with pytest.raises(PluginError, match=r"'mdlm' is provided by acme-thing 1\.0 and tsdfm-bench"):
        Registry().load("methods", "mdlm")


def test_third_party_plugins_can_be_switched_off_or_chosen(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.add("acme-thing", GOOD.format(extra=""))
    index.add("other-thing", GOOD.format(extra=""), name="other")
    monkeypatch.setenv("TSDFM_BENCH_PLUGINS", "")
    assert not {"thing", "other"} & set(Registry().names("methods"))
    assert "mdlm" in Registry().names("methods")
    monkeypatch.setenv("TSDFM_BENCH_PLUGINS", "Acme_Thing")
    assert "thing" in Registry().names("methods")
    assert "other" not in Registry().names("methods")


@pytest.mark.parametrize(
    ("kind", "typed", "meant"),
    [("methods", "mdml", "mdlm"), ("scorers", "smolm", "smollm2"), ("metrics", "entrpy", "entropy")],
)
def test_an_unknown_name_shows_the_nearest(kind: str, typed: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"unknown .*'{typed}'; did you mean '{meant}'"):
        Registry().load(kind, typed)


def test_a_local_file_can_register_everything(fakes: Path) -> None:
    registry = Registry([fakes])
    for kind, name in (("methods", "counter"), ("tasks", "tiny"), ("scorers", "toy"), ("metrics", "letters")):
        assert registry.load(kind, name) is not None
        assert registry.entry(kind, name).distribution == "fakes.py"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise ValueError('oh no')", "ValueError: oh no"),
        ("x = 1", "registers nothing"),
        ("METHODS = ['mine']", "must be a dictionary"),
    ],
)
def test_a_broken_local_file_is_said_when_its_name_is_missed(tmp_path: Path, source: str, said: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(source)
    registry = Registry([file])
    assert "mdlm" in registry.names("methods")
    assert list(registry.broken_files) == [file]
    with pytest.raises(PluginError, match=said):
        registry.load("methods", "mine")


@pytest.mark.parametrize("name", ["absent.py", "mine.txt"])
def test_a_local_file_that_is_none_is_wrong_use(tmp_path: Path, name: str) -> None:
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UsageError, match=r"plug-?in"):
        Registry([tmp_path / name]).names("methods")


def test_a_local_file_cannot_take_an_installed_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("class M: pass\nMETHODS = {'mdlm': M}")
    with pytest.raises(PluginError, match=r"mine\.py and tsdfm-bench"):
        Registry([file]).load("methods", "mdlm")
