"""What all tests share: no third-party plug-ins, no network, and those that wait for Slurm first."""

from __future__ import annotations

import os

import pytest

os.environ["TSDFM_BENCH_PLUGINS"] = ""
os.environ.setdefault("TSDFM_BENCH_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on a cluster wait more than they compute: first, while types are checked beside them (`.ci/run`)."""
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)
