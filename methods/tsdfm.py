"""TS-DFM: trajectory-shaped discrete flow matching.

At inference TS-DFM is FS-DFM: a network conditioned on t and h, walked with the cumulative law (see
`methods.fsdfm`). What differs is training: the shortcut teacher's midpoints are chosen by an energy compass among
several candidates (`methods.train.shaping`); the compass is not used when sampling, so cost and procedure are
unchanged.

Reference: arXiv 2605.07924.
"""

from __future__ import annotations

from tsdfm_bench.api import MethodInfo
from tsdfm_bench.methods.flow import UNMASK_CHANGE
from tsdfm_bench.methods.fsdfm import FSDFM


class TSDFM(FSDFM):
    """TS-DFM. See `Flow` for the arguments."""

    info = MethodInfo(
        name="tsdfm",
        family="flow matching",
        sources=("uniform", "mask"),
        citation="arXiv:2605.07924",
        options={"unmask_change": UNMASK_CHANGE},
    )
