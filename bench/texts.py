"""Texts that come with samples: of a method whose text is the sample, not the task's token ids (`SampleBatch.texts`).

Scorers read such texts as they are. For measures on tokens the task's tokenizer encodes them; a text of more tokens
than the run's length is cut there, so that rows of one table are about equally long text. Texts are stored beside the
tokens as UTF-8 bytes and the places where they end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tsdfm_bench.errors import PluginError
from tsdfm_bench.registry import one_line
from tsdfm_bench.results.store import Samples

if TYPE_CHECKING:
    from tsdfm_bench.api import SampleBatch, Task

_BYTES, _ENDS = "text_bytes", "text_ends"


def encode(batch: SampleBatch, task: Task, length: int) -> tuple[SampleBatch, list[str] | None]:
    """The batch with tokens (n, length) and lengths of its texts, and the texts, cut where tokens are cut.

    Raises:
        PluginError: texts of the wrong number or type, without a tensor of tokens beside them, or that the task
            cannot encode.
    """
    import torch

    given = getattr(batch, "texts", None)
    if given is None:
        return batch, None
    if not isinstance(batch.tokens, torch.Tensor) or batch.tokens.ndim != 2:
        raise PluginError(
            f"sample must return a tensor of tokens ({len(given)}, {length}) also with texts, not a "
            f"{type(batch.tokens).__name__}; zeros will do, since the task's tokenizer encodes the texts"
        )
    if len(given) != len(batch.tokens) or not all(isinstance(text, str) for text in given):
        raise PluginError(f"sample must return a text for each of its {len(batch.tokens)} rows")
    tokens = torch.zeros(len(given), length, dtype=torch.int64)
    lengths = torch.zeros(len(given), dtype=torch.int64)
    texts = []
    for row, text in enumerate(given):
        try:
            ids = task.encode(text)
        except Exception as error:
            raise PluginError(
                f"task '{task.info.name}' cannot encode the text {text[:40]!r}: {one_line(error)}"
            ) from None
        if len(ids) > length:
            ids = ids[:length]
            text = task.decode(np.asarray([ids]), np.asarray([length]))[0].rstrip("\ufffd")  # half a character
        tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        lengths[row] = len(ids)
        texts.append(text)
    return replace(batch, tokens=tokens, lengths=lengths, texts=tuple(texts)), texts


def pack(texts: Sequence[str] | None) -> dict[str, np.ndarray]:
    """Texts as arrays; none for None."""
    if texts is None:
        return {}
    encoded = [text.encode("utf-8") for text in texts]
    ends = np.cumsum([len(data) for data in encoded], dtype=np.int64)
    return {_BYTES: np.frombuffer(b"".join(encoded), dtype=np.uint8), _ENDS: ends}


def unpack(samples: Samples) -> list[str] | None:
    """The texts stored beside tokens, or None."""
    if _ENDS not in samples.extra:
        return None
    data, ends = samples.extra[_BYTES].tobytes(), samples.extra[_ENDS].tolist()
    return [data[begin:end].decode("utf-8") for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def texts_of(samples: Samples, task: Task) -> list[str]:
    """What scorers read: the stored texts, or the task's decoding."""
    stored = unpack(samples)
    return task.decode(samples.tokens, samples.lengths) if stored is None else stored
