"""What all tests share: no third-party plug-ins, and no network."""

from __future__ import annotations

import os

os.environ["TSDFM_BENCH_PLUGINS"] = ""
os.environ.setdefault("TSDFM_BENCH_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
