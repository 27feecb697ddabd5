"""No sampler builds an fp64 tensor of (batch, length, vocabulary): every tensor that is made is measured."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tsdfm_bench.methods.core import kernel
from tsdfm_bench.methods.dfm import DFM
from tsdfm_bench.methods.fsdfm import FSDFM
from tsdfm_bench.methods.mdlm import MDLM
from tsdfm_bench.methods.sedd import SEDD

V, BATCH, LENGTH = 300, 40, 32


class Largest(TorchDispatchMode):
    """Remembers the largest number of fp64 elements any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64:
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "top_p": 0.9}, {"draw": "legacy-fp32"}], ids=str)
@pytest.mark.parametrize(
    "build",
    [
        lambda lab: MDLM(lab.TableDenoiser(V, V + 1)),
        lambda lab: DFM(lab.TableDenoiser(V, V)),
        lambda lab: DFM(lab.TableDenoiser(V, V + 1), "mask", solver="exact"),
        lambda lab: FSDFM(lab.TableDenoiser(V, V)),
        lambda lab: SEDD(lab.TableDenoiser(V, V + 1, "log_score"), "mask"),
        lambda lab: SEDD(lab.TableDenoiser(V, V, "log_score"), "uniform"),
        lambda lab: SEDD(lab.TableDenoiser(V, V, "x0_logits"), "uniform"),
    ],
)
def test_fp64_work_is_done_in_pieces(lab, monkeypatch, build, settings, steps):
    monkeypatch.setattr(kernel, "_PIECE", 60 * V)
    with Largest() as largest:
        build(lab).sample(lab.request(BATCH, LENGTH, steps, **settings))
    assert 10 * V < largest.elements <= 61 * (V + 1)
    assert largest.elements < BATCH * LENGTH * V / 10
