"""What all tests share: no third-party plug-ins, no network, and those that wait for Slurm first."""

from __future__ import annotations

import os

import pytest

os.environ["TSDFM_BENCH_PLUGINS"] = ""
os.environ.setdefault("TSDFM_BENCH_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # one core for each process of the tests
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.pop("COLUMNS", None)  # a terminal's width, which a process of tests has not


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on a cluster wait more than they compute: first. Each file in one process, and the cluster in one."""
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)
    for item in items:
        slurm = item.get_closest_marker("slurm") is not None
        item.add_marker(pytest.mark.xdist_group("slurm" if slurm else item.path.name))
