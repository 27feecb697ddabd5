"""What all tests share: no third-party plug-ins, no network, two processes, and those that wait for Slurm first."""

from __future__ import annotations

import os

import pytest

os.environ["TSDFM_BENCH_PLUGINS"] = ""
os.environ.setdefault("TSDFM_BENCH_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ONE_OF_SEVERAL = "PYTEST_XDIST_WORKER" in os.environ
if ONE_OF_SEVERAL:  # one core for each process
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.pop("COLUMNS", None)  # the width of the terminal that pytest was started in


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Of the whole suite, every file runs in one of two processes; `-n 0` keeps it in this one."""
    if ONE_OF_SEVERAL or not config.pluginmanager.hasplugin("xdist"):
        return
    option = config.option
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if whole and option.numprocesses is None and not option.usepdb:
        option.numprocesses, option.dist, option.loadscopereorder = 2, "loadfile", False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on a cluster wait more than they compute: first, while types are checked beside them (`.ci/run`)."""
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)
