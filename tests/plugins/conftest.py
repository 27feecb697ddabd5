"""The examples are not installed for their tests: their folders are put on the path, with the tools of the samplers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

HERE = Path(__file__).parent
EXAMPLES = ("remdm", "edlm", "duo", "generate")

for example in EXAMPLES:
    sys.path.insert(0, str(HERE / example))


def _tools() -> SimpleNamespace:
    path = HERE.parent / "methods" / "conftest.py"
    spec = importlib.util.spec_from_file_location("sampler_tools", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = ("TableDenoiser", "states", "first_step", "product_law", "agrees", "request")
    return SimpleNamespace(**{name: getattr(module, name) for name in names})


@pytest.fixture(scope="session")
def lab() -> SimpleNamespace:
    """Denoisers without a network, and a chi-square verdict on sampled laws."""
    return _tools()
