"""The contract between the harness and everything that is compared: methods, tasks, scorers and metrics.

A plug-in author needs this module, `tsdfm_bench.rng` and `tsdfm_bench.errors`, and nothing else. Conventions:

* time runs from t = 0 (noise) to t = 1 (data);
* shapes are written (batch, length); token ids are int64 in [0, vocab_size); a mask id is never part of a sample;
* one random stream per sequence: what a sequence draws does not depend on batch size, order, shard or resume;
* the harness counts network calls itself, by forward hooks on `networks()`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from tsdfm_bench.rng import Streams

API_VERSION = 1
PLAIN_VARIABLE = "TSDFM_BENCH_PLAIN"
ALONE_LEASE_S, ALONE_LOOK_S = 60.0, 1.0


def plain() -> bool:
    """Whether samplers and scorers are to leave their optimisations out: TSDFM_BENCH_PLAIN is set, and not to 0.

    The one switch of all of them, read where each would begin. Laws and scores are the same without; what is the same
    to the token, and what only in law, is said in `methods/README.md`.
    """
    return os.environ.get(PLAIN_VARIABLE, "0") not in ("", "0")


@contextmanager
def alone(folder: Path, unit: str, wait: Callable[[str], None] = lambda holder: None) -> Iterator[None]:
    """Run the block in one process at a time, of all that see a folder: the others wait, without a limit.

    For files in a cache that many jobs need and one should make; look for them (again) inside the block. It is a lease
    (`tsdfm_bench.launch.leases`), so it holds between machines. If its process dies or gives no sign of life for a
    minute, the next one begins: what the block does must be harmless twice.

    Args:
        folder: of the lease's file.
        unit: what is made: a plain file name.
        wait: told who is at it, once, before waiting.

    Raises:
        OSError: the folder cannot be written.
    """
    from tsdfm_bench.launch.leases import Lease, Leases

    leases, told = Leases(folder, ALONE_LEASE_S), False
    try:
        while not isinstance(found := leases.take(unit), Lease):
            if not told:
                wait(str(found))
            told = True
            time.sleep(ALONE_LOOK_S)
        with found:
            yield
    finally:
        leases.close()


Draw = Literal["fp64", "legacy-fp32"]
TopPRule = Literal["inclusive", "exclusive"]


# ---------------------------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class MethodInfo:
    """What a method is, known before any weight is loaded.

    Args:
        name: the name it is registered under.
        family: "autoregressive", "masked diffusion", "score entropy", "flow matching", ...
        tokenizer: identifier of its vocabulary ("task" = whatever the task uses); equal identifiers mean equal ids.
        vocab_size: number of real tokens V, mask excluded; None = the task's.
        sources: source distributions it can start from ("mask", "uniform", "unigram"); empty if it has none.
        citation: arXiv id or BibTeX.
        uses_steps: False for methods without a step count (autoregressive, file): one cell, steps = None.
        options: option name -> allowed values, or a one-line description; shown by `tsdfm-bench methods NAME`.
        api_version: version of this contract the method was written for.
        argument: what follows the colon in NAME:ARGUMENT, in words; "" = it takes none. `load` gets it as `name`.
        stored: the samples were made before: sequence i is always the same one, whatever the seed and settings.
    """

    name: str
    family: str
    tokenizer: str = "task"
    vocab_size: int | None = None
    sources: tuple[str, ...] = ()
    citation: str = ""
    uses_steps: bool = True
    options: Mapping[str, tuple[str, ...] | str] = field(default_factory=dict)
    api_version: int = API_VERSION
    argument: str = ""
    stored: bool = False


@dataclass(frozen=True)
class SampleRequest:
    """One batch to sample.

    Args:
        streams: one random stream per sequence, (batch,).
        length: tokens per sequence, >= 1.
        steps: number of sampling steps, or None for methods without steps.
        temperature: divides the logits before softmax; 0 means argmax.
        top_p: nucleus mass in (0, 1], or None.
        top_p_rule: "inclusive" keeps the token that crosses the mass (SDTT, DUO, transformers); "exclusive" drops it
            but always keeps the most likely token (ReMDM, BD3-LM).
        source: source distribution, or None for methods without one.
        draw: "fp64" (default) or "legacy-fp32", the published fp32 exponential race.
        prefix: (batch, length) int64 with the pinned tokens in place, or None.
        pinned: (batch, length) bool, True where `prefix` must be kept, or None.
        trace: keep the state after every step.
    """

    streams: Streams
    length: int
    steps: int | None
    temperature: float = 1.0
    top_p: float | None = None
    top_p_rule: TopPRule = "inclusive"
    source: str | None = None
    draw: Draw = "fp64"
    prefix: Tensor | None = None
    pinned: Tensor | None = None
    trace: bool = False

    @property
    def batch(self) -> int:
        """Number of sequences asked for."""
        return len(self.streams)


@dataclass(frozen=True)
class SampleBatch:
    """What a method returns.

    Args:
        tokens: (batch, length) int64 in [0, vocab_size).
        lengths: (batch,) int64, how many leading tokens of each row count.
        trace: (batch, recorded_steps, length) integer tokens after each recorded step (a mask id may appear here),
            or None.
        texts: one text per row, for a method whose samples are texts and not the task's ids; scorers read them as they
            are, the harness encodes them for measures on tokens, and `tokens` and `lengths` are not read (but their
            shapes are). Texts longer than the run's length are cut to it. None = the tokens are the sample.
    """

    tokens: Tensor
    lengths: Tensor
    trace: Tensor | None = None
    texts: tuple[str, ...] | None = None


@runtime_checkable
class Method(Protocol):
    """A text generator. Optional hook: `identify` (see below)."""

    info: ClassVar[MethodInfo]

    @classmethod
    def load(cls, params: Mapping[str, object], device: str) -> Method:
        """Make a ready sampler.

        Args:
            params: the method's options as the user gave them, plus the harness's own keys: `task` (name), `vocab_size`
                (int, of the task), `checkpoint` (str or None), `source` (str or None) and `length` (int). An unknown
                option must raise `tsdfm_bench.errors.UsageError`.
            device: a torch device string.
        """
        ...

    def networks(self) -> Mapping[str, nn.Module]:
        """The networks whose forward calls are counted, by role: "denoiser", "energy", "teacher", ..."""
        ...

    def refuse(self, request: SampleRequest) -> str | None:
        """A reason why this request cannot be served (shown as a row), or None."""
        ...

    def sample(self, request: SampleRequest) -> SampleBatch:
        """Sample one batch; tokens must depend on `request.streams` only through each sequence's own stream."""
        ...


@dataclass(frozen=True)
class Identity:
    """Which weights a (method, params) pair means, found without loading a network.

    Args:
        checkpoint: readable name, for example "sotu/mdlm"; "none" for a method without weights.
        weights: "sha256:..." of the weight files, or "none".
    """

    checkpoint: str
    weights: str


OracleForm = Literal["posterior", "score", "causal", "energy"]


class OracleSource(Protocol):
    """What a task with an exact law hands to `FromOracleHook.from_oracle` (see `ExactHook.oracle`)."""

    def __call__(self, form: OracleForm, source: str | None) -> Any:
        """An oracle denoiser; raises UsageError for a form or source it has not."""
        ...


class FromOracleHook(Protocol):
    """Optional classmethod of a method that samples from any denoiser: it takes part in `--checkpoint oracle`."""

    def from_oracle(self, oracle: OracleSource, params: Mapping[str, object], device: str) -> Method:
        """The method around the task's exact predictions instead of a network.

        Args:
            oracle: oracle("posterior", source) gives clean-token logits and oracle("score", source) log scores, both
                of the protocol `methods.core.Denoiser`; oracle("causal", None) gives next-token logits, a
                `CausalDenoiser`. Forward calls are counted as those of a network. (oracle("energy", source) is for
                training: (states, times, origins) -> token energies, the exact NLL of noised states.)
            params, device: as for `load`.
        """
        ...


class StoredHook(Protocol):
    """Optional classmethod of a method with `MethodInfo.stored`."""

    def stored_sequences(self, params: Mapping[str, object]) -> int:
        """How many samples there are; a run that asks for more is skipped with that reason."""
        ...


class IdentifyHook(Protocol):
    """Optional classmethod of a method. Without it the harness hashes the file or folder named by `checkpoint`."""

    def identify(self, params: Mapping[str, object]) -> Identity:
        """The identity of the weights `load(params)` would read; raises CheckpointError if they do not exist."""
        ...


# ------------------------------------------------------------------------------------------------------ tasks


@dataclass(frozen=True)
class TaskInfo:
    """What text is to be imitated.

    Args:
        name: the name it is registered under.
        tokenizer: identifier of the vocabulary, with a hash: "sotu-bpe-2048@1a2b3c4d".
        vocab_size: number of real tokens V.
        length: default tokens per sequence.
        data_hash: "sha256:..." over the data split that references are drawn from.
        references: reference rows it offers: "real" first, then canaries.
        description: one line.
        citation: source and licence of the text.
        law: "sha256:..." over the parameters of its exact law (see `ExactHook`), or "" if it has none.
        scorers: the scorers a run asks if none are named; empty = the program's own default.
        public: where the text can be read by anyone ("public domain, on the web"), if it can: a scorer trained on such
            text may know it, and is flagged; "" = it cannot, or it was made up.
        api_version: version of this contract.
    """

    name: str
    tokenizer: str
    vocab_size: int
    length: int
    data_hash: str
    references: tuple[str, ...]
    description: str = ""
    citation: str = ""
    law: str = ""
    scorers: tuple[str, ...] = ()
    public: str = ""
    api_version: int = API_VERSION


@runtime_checkable
class Task(Protocol):
    """A text distribution with held-out references, canaries, prompts and (for synthetic ones) an exact law."""

    info: TaskInfo

    @classmethod
    def load(cls, params: Mapping[str, object]) -> Task:
        """Make the task; raises `AssetError` if its data cannot be obtained."""
        ...

    def decode(self, tokens: np.ndarray, lengths: np.ndarray) -> list[str]:
        """Texts of (n, length) int token ids, n strings."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of one text."""
        ...

    def reference(self, name: str, streams: Streams, length: int) -> SampleBatch:
        """Reference sequences: "real" held-out windows or a zero-parameter canary, (batch, length)."""
        ...

    def prompts(self, streams: Streams, length: int) -> Tensor:
        """Held-out sequences (batch, length) int64 to take prompts from; the harness pins the positions it wants."""
        ...


@dataclass(frozen=True)
class TrainingStreams:
    """The text a task offers for training.

    Args:
        train, validation: (n,) int64 token streams, documents joined, each followed by its end-of-text id.
        data_hash: "sha256:..." of the training split, recorded in every checkpoint.
        end_of_text: the id that ends a document.
        block: the streams are packed blocks of this length, to be read from their starts; 0 = plain text.
    """

    train: np.ndarray
    validation: np.ndarray
    data_hash: str
    end_of_text: int = 0
    block: int = 0


class TrainableHook(Protocol):
    """Optional methods of a task: without the first `tsdfm-bench train` refuses the task with that reason.

    Metrics see the training text through `training_at_hand` where a task has it, else through `training_streams`:
    judging samples should not begin with the download of a large corpus.
    """

    def training_streams(self) -> TrainingStreams:
        """Training and validation tokens; raises `AssetError` if the text cannot be obtained."""
        ...

    def training_at_hand(self) -> TrainingStreams | None:
        """The same if they are ready to be read, else None."""
        ...


class ExactLaw(Protocol):
    """The law a synthetic task draws its sequences from, as metrics and the scorer `oracle` see it.

    `name` and `vocab_size` (V) describe it; lengths are fixed, every sequence of a length belongs to one law.
    """

    name: str
    vocab_size: int

    def token_nll(self, tokens: np.ndarray) -> np.ndarray:
        """-log p(x_i | x_1 .. x_{i-1}) in nats, (n, length) int -> (n, length) float64; inf where impossible."""
        ...

    def entropy_nats(self, length: int) -> float:
        """Exact entropy of a sequence of this length, in nats; divided by the length, the rate a sampler can reach."""
        ...

    def ngrams(self, n: int, length: int) -> np.ndarray:
        """Exact n-gram law, n = 1 or 2, averaged over the places of a sequence: (V,) * n float64."""
        ...


class ExactHook(Protocol):
    """Optional attributes of a task with an exact law; `TaskInfo.law` is its hash.

    Args:
        law: scores text exactly.
    """

    law: ExactLaw

    def oracle(self, form: OracleForm, source: str | None) -> Any:
        """Exact predictions in place of a network, for `--checkpoint oracle`; see `FromOracleHook`."""
        ...


# ---------------------------------------------------------------------------------------------------- scorers


@dataclass(frozen=True)
class ScorerInfo:
    """A judge: a language model that gives token negative log-likelihoods.

    Args:
        name: short name used in columns, for example "smollm2".
        title: full name printed under tables, for example "SmolLM2-135M-Instruct, Q4_1 GGUF".
        revision: "sha256:..." of the weights, or a hub revision.
        unit: what one NLL belongs to: "token" or "character".
        dtype: arithmetic of the network, for example "float32".
        window: longest context in units; 0 = the whole text.
        stride: step of the sliding window in units.
        context: what is put before the first unit, for example "<|endoftext|>".
        parameters: number of parameters.
        licence: licence of the weights.
        input: "text" (decoded and re-tokenised) or "ids" (the task's own tokens, see `IdScorer`).
        features: what `ScoreBatch.features` are, for definitions; "" if there are none.
        trained_on: public text it was trained on, in a word ("text of the web"), as far as is known; "" = none that a
            task could hold.
        api_version: version of this contract.
    """

    name: str
    title: str
    revision: str
    unit: str
    dtype: str
    window: int
    stride: int
    context: str = ""
    parameters: int = 0
    licence: str = ""
    input: str = "text"
    features: str = ""
    trained_on: str = ""
    api_version: int = API_VERSION


@dataclass(frozen=True)
class ScoreBatch:
    """Scores of n texts.

    Args:
        nll: n arrays, NLL in nats of every scored unit, in order.
        units: n int arrays of the same lengths, the scorer's own ids of the scored units.
        special: n bool arrays of the same lengths, True where the unit is an end-of-text token.
        bytes: (n,) number of UTF-8 bytes of each text.
        features: (n, d) float32 mean-pooled hidden states, or None.
        spans: n int arrays (units, 2), begin and end of every scored unit in its text, in characters (`IdScorer`: in
            tokens); they may overlap, where a character is split. None = the scorer cannot say, and rows whose tokens
            were filled in between given ones have no number from it.
    """

    nll: list[np.ndarray]
    units: list[np.ndarray]
    special: list[np.ndarray]
    bytes: np.ndarray
    features: np.ndarray | None = None
    spans: list[np.ndarray] | None = None


@runtime_checkable
class Scorer(Protocol):
    """A judge. `fetch` obtains its files (with a progress bar) and may raise `AssetError`; `load` reads them.

    An optional classmethod `check(params)` is called in place of `fetch` before anything is sampled, and also raises
    `UsageError` if the files say that it cannot judge.
    """

    info: ScorerInfo

    @classmethod
    def load(cls, params: Mapping[str, object], device: str) -> Scorer:
        """Make a ready scorer. `params` has the user's options; `name` is what followed the colon in "hf:NAME"."""
        ...

    def networks(self) -> Mapping[str, nn.Module]:
        """The networks whose forward calls are counted."""
        ...

    def score(self, texts: Sequence[str]) -> ScoreBatch:
        """NLLs of each text; a text's scores do not depend on the others in the batch beyond float rounding."""
        ...


class IdScorer(Protocol):
    """A judge of token ids: `ScorerInfo.input` is "ids"; everything else is as in `Scorer`."""

    info: ScorerInfo

    def networks(self) -> Mapping[str, nn.Module]:
        """The networks whose forward calls are counted."""
        ...

    def score(self, texts: Sequence[np.ndarray]) -> ScoreBatch:
        """NLLs of n id sequences, each (length,) int64."""
        ...


class OfTaskHook(Protocol):
    """Optional classmethod of a scorer that judges by the task's own law instead of by weights."""

    def of_task(self, task: Task, params: Mapping[str, object], device: str) -> Scorer | IdScorer:
        """Called in place of `load`; raises UsageError if the task has nothing to judge by. It must be cheap."""
        ...


# ---------------------------------------------------------------------------------------------------- metrics


@dataclass(frozen=True)
class Infilling:
    """The sequences whose free places were filled in.

    Args:
        sequences: (n, length) int32, what was given and what was filled in.
        lengths: (n,) int64, how many leading tokens of each row count.
        places: (n, length) int64; token j of row i of `CellData.tokens` stands at places[i, j] of its sequence.
    """

    sequences: np.ndarray
    lengths: np.ndarray
    places: np.ndarray


@dataclass(frozen=True)
class CellData:
    """Everything stored about one cell, as a metric sees it. Arrays are numpy, and read-only; n sequences.

    Args:
        tokens: (n, length) int32 task token ids.
        lengths: (n,) int64.
        texts: n decoded texts.
        vocab_size: number of real tokens.
        scores: scorer name -> ScoreBatch of these texts.
        scorer_info: scorer name -> ScorerInfo.
        reference: the same record for held-out real text of equal n and length, or None.
        reference_other: a second, disjoint set of real text (the ceiling for distances between samples), or None.
        cost: measured cost of sampling (see `CostRecord`), or None for reference rows.
        seed: root seed, for metrics that need randomness of their own.
        law: the exact law of the task's text, or None if it has none.
        training: gives the task's training text, or None if it offers none or has none at hand.
        prompt: (n, given) the tokens that every sequence was given to continue, or None. Everything above is about the
            continuation alone; scorers have read both, and features are of both.
        typed: the prompt is a text of the user's, the same for all, and not held-out text.
        infilling: the whole sequences, where scattered places were given, or None. Everything above is then about the
            tokens filled in alone, moved together to the left (`pieces` tells which are neighbours); of a scorer's
            units, those with at least one character that was filled in, and `bytes` are theirs.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    texts: list[str]
    vocab_size: int
    scores: Mapping[str, ScoreBatch]
    scorer_info: Mapping[str, ScorerInfo]
    reference: CellData | None = None
    reference_other: CellData | None = None
    cost: CostRecord | None = None
    seed: int = 0
    law: ExactLaw | None = None
    training: Callable[[], TrainingStreams] | None = None
    prompt: np.ndarray | None = None
    typed: bool = False
    infilling: Infilling | None = None

    def pieces(self) -> list[list[np.ndarray]]:
        """The tokens of each of the n sequences, (length,) each, in pieces whose tokens are neighbours in the text."""
        import numpy as np

        rows = [row[:length] for row, length in zip(self.tokens, self.lengths, strict=True)]
        if self.infilling is None:
            return [[row] for row in rows]
        steps = [np.diff(at[: len(row)]) for row, at in zip(rows, self.infilling.places, strict=True)]
        return [np.split(row, np.flatnonzero(step != 1) + 1) for row, step in zip(rows, steps, strict=True)]


@dataclass(frozen=True)
class CostRecord:
    """What sampling a cell cost.

    Args:
        sequences: number of sequences measured (warm-up batch excluded).
        calls: role -> forward calls per batch, averaged over batches.
        sequence_calls: role -> forward calls per sequence (rows that went through the network / sequences).
        seconds: wall-clock seconds of sampling, device synchronised.
        peak_memory_bytes: peak resident or device memory during sampling.
        batch_size: sequences per batch.
        device: name of the device.
        threads: CPU threads used.
    """

    sequences: int
    calls: Mapping[str, float]
    sequence_calls: Mapping[str, float]
    seconds: float
    peak_memory_bytes: int
    batch_size: int
    device: str
    threads: int


@dataclass(frozen=True)
class Measurement:
    """One number with what is needed to give it an interval.

    Either `columns` are given with a `form` or a `statistic`, and the harness computes value and interval over
    sequences, or `value` is given, with `low` and `high` when the metric knows its own interval.

    Args:
        metric: column name, for example "gen_ppl"; a convention is appended after a slash: "gen_ppl/mdlm".
        unit: "perplexity", "nats", "bits", "bits/byte", "1", "s", "calls", "bytes", ...
        definition: one line: convention, scorer, what is counted, what the interval is over.
        scorer: scorer name, or "" if none is involved.
        columns: per-sequence arrays, each (n,).
        statistic: maps the columns, each (..., n) with axis=-1, to the value (...); vectorised for the bootstrap.
        value, low, high: a value that is not bootstrapped.
        n: number of sequences behind the value; None = length of the columns.
        better: "lower", "higher" or "" (neither is better).
        form: how the columns are reduced, if it is one of the usual ways: "mean" (x), "ratio" (sum a / sum b),
            "exp-ratio" (exp(sum a / sum b)), "mean-exp-ratio" (mean of exp(a / b) where b > 0) or "exp-mean-ratio"
            (exp of the mean of a / b where b > 0). The columns are then stored, so that rows can be compared sequence
            by sequence later. Any other reduction is a `statistic`; if both are given they must agree.
        reason: why there is no value (value NaN); shown in the table.
    """

    metric: str
    unit: str
    definition: str
    scorer: str = ""
    columns: tuple[np.ndarray, ...] = ()
    statistic: Callable[..., np.ndarray] | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    better: str = ""
    form: str = ""
    reason: str = ""


@dataclass(frozen=True)
class MetricInfo:
    """What a metric measures.

    Args:
        name: the name it is registered under.
        description: one line.
        needs: any of "scores", "reference", "features", "cost".
        citation: arXiv id.
        api_version: version of this contract.
    """

    name: str
    description: str
    needs: frozenset[str] = frozenset()
    citation: str = ""
    api_version: int = API_VERSION


@runtime_checkable
class Metric(Protocol):
    """A pure function of stored results."""

    info: ClassVar[MetricInfo]

    @classmethod
    def load(cls, params: Mapping[str, object]) -> Metric:
        """Make the metric."""
        ...

    def compute(self, cell: CellData) -> list[Measurement]:
        """Measurements of one cell; an empty list where the metric does not apply."""
        ...
