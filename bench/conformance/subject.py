"""The method under test, as the harness would use it: named, loaded with the harness's own parameters, asked politely.

A `Target` says what to test and travels to the worker process as JSON. `settings` are the ways it can be set up: every
source, and for every source the default options and each named option value once. A `Subject` is one of them, loaded.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdfm_bench.conformance.report import Failed
from tsdfm_bench.errors import BenchError, PluginError
from tsdfm_bench.registry import Registry, one_line
from tsdfm_bench.spec import Spec

if TYPE_CHECKING:
    from tsdfm_bench.api import Method, MethodInfo, SampleBatch, SampleRequest

BATCH, LENGTH, STEPS = 8, 8, 4
SEED = 20_260_507


class Refused(Exception):
    """The method gave a reason not to serve a request."""


class Broke(Exception):
    """The method accepted a request and then failed."""


@dataclass(frozen=True)
class Target:
    """What is to be tested.

    Args:
        method: registered name.
        argument: what followed the colon, or "".
        options: the options given; they hold in every setting.
        files: local plug-in files.
        checkpoint: weights, or None for the method's own default.
        task: the task whose vocabulary is used.
    """

    method: str
    argument: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    checkpoint: str | None = None
    task: str = "sotu"

    def __str__(self) -> str:
        return str(Spec(self.method, self.argument, self.options))

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Target:
        """The target of `to_json`."""
        return cls(**{**content, "files": tuple(content["files"])})

    def registry(self) -> Registry:
        """Where the method is looked up."""
        return Registry([Path(file) for file in self.files])


@dataclass(frozen=True)
class Setting:
    """One way of setting the method up.

    Args:
        source: the source it starts from, or None.
        options: all options given to `load`.
        default: it is the method's own default.
    """

    source: str | None
    options: Mapping[str, str]
    default: bool = False

    def __str__(self) -> str:
        parts = [self.source or "", *(f"{key}={value}" for key, value in self.options.items())]
        return " ".join(part for part in parts if part) or "default"


def settings_of(info: MethodInfo, given: Mapping[str, str]) -> list[Setting]:
    """Every source with the given options, and beside them each value but the first (the default) of each option."""
    found: list[Setting] = []
    for source in info.sources or (None,):
        found.append(Setting(source, dict(given)))
        for option, values in info.options.items():
            if option not in given and isinstance(values, tuple):
                found += [Setting(source, {**given, option: value}) for value in values[1:]]
    found[0] = replace(found[0], default=True)
    return found


@dataclass(frozen=True)
class Vocabulary:
    """The task's part of what `load` is given.

    Args:
        task: its name.
        size: number of tokens V.
        length: default length.
    """

    task: str
    size: int


def vocabulary(target: Target, info: MethodInfo, registry: Registry) -> Vocabulary:
    """The task's vocabulary, or the method's own if it has another tokenizer.

    Raises:
        BenchError: the task cannot be loaded, or the method does not say how many tokens it knows.
    """
    if info.tokenizer != "task" and info.vocab_size is not None:
        return Vocabulary(target.task, info.vocab_size)
    from tsdfm_bench.spec import parse_spec
    from tsdfm_bench.sweep import load_task

    task = load_task(parse_spec(target.task), registry)
    if info.tokenizer not in ("task", task.info.tokenizer):
        raise PluginError(
            f"its tokenizer is {info.tokenizer}, that of task '{task.info.name}' is {task.info.tokenizer}: state "
            "vocab_size in its info, or name a task with its tokenizer (--task)"
        )
    if info.vocab_size not in (None, task.info.vocab_size):
        return Vocabulary(target.task, int(info.vocab_size or 0))
    return Vocabulary(parse_spec(target.task).name, task.info.vocab_size)


class Subject:
    """A method in one setting.

    Args:
        cls: its class.
        target: what is tested.
        setting: which source and options.
        words: the vocabulary.
    """

    def __init__(self, cls: Any, target: Target, setting: Setting, words: Vocabulary) -> None:
        self.cls, self.target, self.setting, self.words = cls, target, setting, words
        self.info: MethodInfo = cls.info
        self._method: Method | None = None

    @property
    def vocab_size(self) -> int:
        """Number of real tokens V."""
        return self.words.size

    def params(self, length: int = LENGTH, **more: object) -> dict[str, object]:
        """What `load` is given."""
        named: dict[str, object] = {"name": self.target.argument} if self.target.argument else {}
        return {
            **self.setting.options,
            **named,
            "task": self.words.task,
            "vocab_size": self.vocab_size,
            "checkpoint": self.target.checkpoint,
            "source": self.setting.source,
            "length": length,
            **more,
        }

    def load(self, length: int = LENGTH) -> Method:
        """A fresh instance."""
        method: Method = self.cls.load(self.params(length), "cpu")
        return method

    @property
    def method(self) -> Method:
        """The loaded instance that most checks share."""
        if self._method is None:
            self._method = self.load()
        return self._method

    def request(
        self, batch: int = BATCH, length: int = LENGTH, *, first: int = 0, seed: int = SEED, **settings: Any
    ) -> SampleRequest:
        """A request as the harness makes it."""
        from tsdfm_bench.api import SampleRequest
        from tsdfm_bench.rng import Streams

        settings.setdefault("steps", STEPS if self.info.uses_steps else None)
        settings.setdefault("source", self.setting.source)
        return SampleRequest(Streams.of(seed, "conformance", batch, first), length, **settings)

    def serve(self, request: SampleRequest, method: Method | None = None) -> SampleBatch:
        """What the method makes of a request.

        Raises:
            Refused: with its reason.
            Broke: it raised, or called exit.
        """
        import torch

        method = method or self.method
        try:
            reason = method.refuse(request)
            if reason is not None:
                raise Refused(str(reason))
            with torch.no_grad():
                batch = method.sample(request)
            return self._with_tokens(batch) if getattr(batch, "texts", None) is not None else batch
        except (Refused, KeyboardInterrupt):
            raise
        except BaseException as error:
            text = str(error) if isinstance(error, BenchError) else one_line(error)
            raise Broke(text) from error

    def _with_tokens(self, batch: SampleBatch) -> SampleBatch:
        """For a method that returns texts: bytes of their hashes as tokens, enough to tell texts apart."""
        import torch

        rows, length = batch.tokens.shape
        marks = [hashlib.shake_128(text.encode()).digest(length) for text in batch.texts or ()]
        tokens = torch.tensor([list(mark) for mark in marks], dtype=torch.int64).reshape(rows, length)
        return replace(batch, tokens=tokens % self.vocab_size, lengths=torch.full((rows,), length))

    def maybe(self, request: SampleRequest) -> SampleBatch | None:
        """The same for requests that may be refused; what breaks here is reported by the check 'refusals'."""
        try:
            return self.serve(request)
        except (Refused, Broke):
            return None

    def variations(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Requests beside the plain one that the harness can make: name and settings."""
        yield "temperature 0.7 with top-p 0.9", {"temperature": 0.7, "top_p": 0.9}
        yield "exclusive top-p 0.8", {"top_p": 0.8, "top_p_rule": "exclusive"}
        yield "temperature 0", {"temperature": 0.0}
        yield "the fp32 draw", {"draw": "legacy-fp32"}


_stirred = count(1)


def stir() -> None:
    """Bring the global generators of torch, numpy and Python into a state they were not in before."""
    import numpy as np
    import torch

    seed = next(_stirred)
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def rows_equal(a: Any, b: Any) -> Any:
    """(batch,) bool: rows of two (batch, length) tensors that are the same."""
    return (a == b).all(dim=1)


def require(condition: bool, message: str) -> None:
    """Fail the check with this message unless the condition holds."""
    if not condition:
        raise Failed(message)
