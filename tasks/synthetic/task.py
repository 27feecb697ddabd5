"""The tasks `product`, `markov`, `hmm` and `grammar`: text drawn from exact laws (see `recipe` for the parameters).

`real` is an exact draw from the law, as are prompts and training streams; canaries are those that the law itself is
not. Text is symbols separated by blanks: numbers, or brackets and letters. Because the law is known, every generated
text has an exact NLL (scorer `oracle`), and every denoiser-based method can be run without a network
(`--checkpoint oracle`).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from tsdfm_bench.api import OracleForm, SampleBatch, TaskInfo, TrainingStreams
from tsdfm_bench.errors import UsageError, unknown_name
from tsdfm_bench.tasks.options import read_options

if TYPE_CHECKING:
    from torch import Tensor

    from tsdfm_bench.rng import Streams
    from tsdfm_bench.tasks.synthetic.law import Law
    from tsdfm_bench.tasks.synthetic.oracle import OracleCausal, OracleDenoiser, OracleEnergy

VALIDATION_SHARE = 20
LONG_ROWS = 64
CITATION = "generated here: tasks/synthetic/recipe.py"


class Synthetic(ABC):
    """A task with an exact law. Subclasses name their options and make the law."""

    name: ClassVar[str]
    description: ClassVar[str]
    defaults: ClassVar[Mapping[str, int]]
    references: ClassVar[tuple[str, ...]]
    training_tokens: ClassVar[int] = 400_000
    stationary: ClassVar[bool] = False

    def __init__(self, options: Mapping[str, int]) -> None:
        self.law = self.make_law(options)
        self.symbols = self.symbols_of(options)
        self._ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        symbols = hashlib.sha256("\n".join(self.symbols).encode()).hexdigest()
        self.info = TaskInfo(
            name=self.name,
            tokenizer=f"{self.name}-{len(self.symbols)}@{symbols[:8]}",
            vocab_size=len(self.symbols),
            length=options["length"],
            data_hash=self.law.identity,
            references=self.references,
            description=self.description,
            citation=CITATION,
            law=self.law.identity,
            scorers=("oracle",),
        )

    @classmethod
    def load(cls, params: Mapping[str, object]) -> Synthetic:
        """Make the task.

        Raises:
            UsageError: unknown option, or a size that is not possible.
        """
        options = read_options(f"task '{cls.name}'", params, cls.defaults)
        for key, value in options.items():
            if value < 1:
                raise UsageError(f"option '{key}' of task '{cls.name}' is at least 1, not {value}")
        return cls(options)

    @staticmethod
    @abstractmethod
    def make_law(options: Mapping[str, int]) -> Law:
        """The law that the options describe."""

    @staticmethod
    def symbols_of(options: Mapping[str, int]) -> list[str]:
        """How the tokens are written."""
        return [str(i) for i in range(options["vocab"])]

    def oracle(self, form: OracleForm, source: str | None) -> OracleDenoiser | OracleCausal | OracleEnergy:
        """Exact predictions of the law; see `tsdfm_bench.api.ExactHook`."""
        from tsdfm_bench.tasks.synthetic.oracle import make_oracle

        return make_oracle(self.law, form, source)

    def data_card(self) -> Mapping[str, object]:
        """Exact numbers of the law, as printed by `tsdfm-bench tasks NAME`."""
        length = self.info.length
        unigram = self.law.ngrams(1, length)
        return {
            "entropy_nats_per_token": self.law.entropy_nats(length) / length,
            "unigram_entropy_nats": float(-(unigram[unigram > 0] * np.log(unigram[unigram > 0])).sum()),
        }

    # ----------------------------------------------------------------------------------------------------- text

    def decode(self, tokens: np.ndarray, lengths: np.ndarray) -> list[str]:
        """Symbols separated by blanks, one text a row of (n, length) ids."""
        return [
            " ".join(self.symbols[token] for token in row[:length]) for row, length in zip(tokens, lengths, strict=True)
        ]

    def encode(self, text: str) -> list[int]:
        """Ids of symbols separated by blanks; raises UsageError for something that is no symbol."""
        for symbol in text.split():
            if symbol not in self._ids:
                raise UsageError(
                    f"'{symbol}' is no symbol of task '{self.name}': write symbols separated by blanks, for example "
                    f"'{' '.join(self.symbols[:3])}'"
                )
        return [self._ids[symbol] for symbol in text.split()]

    def reference(self, name: str, streams: Streams, length: int) -> SampleBatch:
        """Sequences (batch, length) of a reference row; raises UsageError for an unknown one."""
        if name not in self.references:
            raise unknown_name(f"reference of task '{self.name}'", name, self.references)
        if name in ("unigram", "bigram"):
            tokens = self._ngram_law(name, length).sample(streams, length, name)
        else:
            tokens = self.law.sample(streams, length, "real")
            if name == "shuffled":
                tokens = tokens.gather(1, streams.uniform("shuffle", 0, length).argsort(dim=1, stable=True))
            elif name == "loop":
                from tsdfm_bench.tasks.canaries import LOOP_TOKENS

                tokens = tokens[:, :LOOP_TOKENS].repeat(1, -(-length // LOOP_TOKENS))[:, :length]
        return SampleBatch(tokens, tokens.new_full((len(streams),), length))

    def prompts(self, streams: Streams, length: int) -> Tensor:
        """Exact draws (batch, length) int64 to take prompts from."""
        return self.law.sample(streams, length, "prompt")

    def training_streams(self) -> TrainingStreams:
        """Exact draws, one after another.

        `product` and `markov` are stationary: their streams are a few long sequences; all windows but those over
        the joins have the law. Windows of `hmm` and `grammar` may start anywhere in a sequence.
        """
        return self._training_streams

    @cached_property
    def _training_streams(self) -> TrainingStreams:  # drawn once: every row of a run is compared with them
        return TrainingStreams(
            self._stream("train", self.training_tokens),
            self._stream("validation", self.training_tokens // VALIDATION_SHARE),
            self.info.data_hash,
        )

    def _stream(self, split: str, tokens: int) -> np.ndarray:
        from tsdfm_bench.rng import Streams

        length = max(self.info.length, tokens // LONG_ROWS if self.stationary else 0)
        rows = -(-tokens // length)
        drawn = self.law.sample(Streams.of(0, f"training {self.info.data_hash}", rows), length, split)
        return np.asarray(drawn.numpy().reshape(-1))

    @cached_property
    def _ngram_law(self):  # type: ignore[no-untyped-def]
        from tsdfm_bench.tasks.synthetic.chain import HiddenMarkov

        @lru_cache(maxsize=8)
        def law(name: str, length: int) -> HiddenMarkov:
            unigram = self.law.ngrams(1, length)
            if name == "unigram" or length < 2:
                return HiddenMarkov("unigram", np.ones(1), np.ones((1, 1)), unigram[None] / unigram.sum())
            pairs = self.law.ngrams(2, length)
            before = pairs.sum(axis=1, keepdims=True)
            follow = np.where(before > 0, pairs / np.where(before > 0, before, 1.0), unigram)
            return HiddenMarkov("bigram", unigram / unigram.sum(), follow / follow.sum(axis=1, keepdims=True))

        return law


class Product(Synthetic):
    """Independent tokens: the law that parallel samplers have no trouble with. Options: vocab, length."""

    name = "product"
    description = "independent tokens with fixed frequencies"
    defaults: ClassVar[Mapping[str, int]] = {"vocab": 16, "length": 32}
    references = ("real", "loop")
    stationary = True

    @staticmethod
    def make_law(options: Mapping[str, int]) -> Law:
        """See `recipe.product_law`."""
        from tsdfm_bench.tasks.synthetic.recipe import product_law

        return product_law(options["vocab"])


class Markov(Synthetic):
    """A stationary first-order Markov chain. Options: vocab, length."""

    name = "markov"
    description = "a stationary first-order Markov chain; posterior by forward-backward"
    defaults: ClassVar[Mapping[str, int]] = {"vocab": 32, "length": 64}
    references = ("real", "unigram", "loop")
    stationary = True

    @staticmethod
    def make_law(options: Mapping[str, int]) -> Law:
        """See `recipe.markov_chain`."""
        from tsdfm_bench.tasks.synthetic.recipe import markov_chain

        return markov_chain(options["vocab"])


class HMM(Synthetic):
    """A hidden Markov model whose text has no finite order. Options: vocab, states, length."""

    name = "hmm"
    description = "a hidden Markov model (unifilar machine, no finite order); posterior by forward-backward"
    defaults: ClassVar[Mapping[str, int]] = {"vocab": 16, "states": 4, "length": 64}
    references = ("real", "unigram", "bigram", "loop")

    @staticmethod
    def make_law(options: Mapping[str, int]) -> Law:
        """See `recipe.machine`."""
        from tsdfm_bench.tasks.synthetic.recipe import machine

        return machine(options["vocab"], options["states"])


class BracketGrammar(Synthetic):
    """Well-nested brackets and letters of a probabilistic grammar. Options: kinds, letters, length."""

    name = "grammar"
    description = (
        "nested brackets and letters of a probabilistic grammar, at a fixed length; posterior by inside-outside"
    )
    defaults: ClassVar[Mapping[str, int]] = {"kinds": 3, "letters": 4, "length": 24}
    references = ("real", "unigram", "bigram", "shuffled", "loop")
    training_tokens = 60_000  # a text of a grammar is derived node by node

    @staticmethod
    def make_law(options: Mapping[str, int]) -> Law:
        """See `grammar.brackets`."""
        from tsdfm_bench.tasks.synthetic.grammar import LETTERS, OPEN, brackets

        for key, most in (("kinds", len(OPEN)), ("letters", len(LETTERS))):
            if options[key] > most:
                raise UsageError(f"option '{key}' of task 'grammar' is at most {most}, not {options[key]}")
        return brackets(options["kinds"], options["letters"])

    @staticmethod
    def symbols_of(options: Mapping[str, int]) -> list[str]:
        """Brackets, then letters."""
        from tsdfm_bench.tasks.synthetic.grammar import symbols

        return symbols(options["kinds"], options["letters"])
