"""Against transformers: generation with its key-value cache, and scoring one sequence after the other.

Both run on random weights of the size's geometry: a GPT-NeoX network is the same transformer as our autoregressive one
(rotary positions, layer norms, an MLP of four times the width, untied output) up to biases.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from typing import Any

import torch

from tsdfm_bench.api import SampleRequest, Scorer
from tsdfm_bench.registry import Registry
from tsdfm_bench.rng import Streams
from tsdfm_bench.speed.cases import Case, Size, load_method
from tsdfm_bench.speed.clock import Clock, Ratio


@dataclass(frozen=True)
class OtherRow:
    """One comparison with transformers.

    Args:
        size, what: names.
        batch, length: sequences, and tokens of each.
        seconds: ours, median.
        ratio: theirs / ours.
    """

    size: str
    what: str
    batch: int
    length: int
    seconds: float
    ratio: Ratio


def neox(size: Size) -> Any:
    """A random GPT-NeoX network of the size's geometry, in eval mode."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    width = size.network["width"]
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=size.vocab_size,
        hidden_size=width,
        num_hidden_layers=size.network["blocks"],
        num_attention_heads=size.network["heads"],
        intermediate_size=4 * width,
        hidden_act="gelu_new",
        rope_parameters={"partial_rotary_factor": 1.0},
        max_position_embeddings=size.length + 1,
        use_parallel_residual=False,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return GPTNeoXForCausalLM(config).eval()


def generation(registry: Registry, size: Size, batch: int, clock: Clock, repeats: int) -> OtherRow:
    """The sampler `ar` against `generate`: as many tokens, pure sampling, both with their cache."""
    method = load_method(registry, Case("ar"), size, clock.device)
    request = SampleRequest(Streams.of(0, "speed", batch, 0, clock.device), size.length, None)
    other = neox(size).to(clock.device)
    first = torch.zeros(batch, 1, dtype=torch.int64, device=clock.device)

    def generate() -> None:
        other.generate(
            first,
            attention_mask=torch.ones_like(first),
            do_sample=True,
            top_k=0,
            max_new_tokens=size.length,
            min_new_tokens=size.length,
            use_cache=True,
        )

    def ours() -> None:
        method.sample(request)

    for warm in (ours, generate):
        warm()
    own, theirs = clock.alternate([ours, generate], repeats)
    return OtherRow(size.name, "ar against generate", batch, size.length, statistics.median(own), Ratio.of(theirs, own))


def scoring(registry: Registry, size: Size, texts: int, clock: Clock, repeats: int) -> OtherRow:
    """The scorer `hf` against a forward pass of each text, full logits and cross-entropy."""
    written = random_texts(texts, size.length)
    scorer, model = scorer_and_model(registry, size, clock.device)
    tokens = [[0, *map(int, units)] for units in scorer.score(written).units]

    @torch.no_grad()
    def one_by_one() -> None:
        for ids in tokens:
            row = torch.tensor([ids], device=clock.device)
            float(model(input_ids=row, labels=row, use_cache=False).loss)

    def ours() -> None:
        scorer.score(written)

    one_by_one()
    own, theirs = clock.alternate([ours, one_by_one], repeats)
    return OtherRow(
        size.name, "scoring against one by one", texts, size.length, statistics.median(own), Ratio.of(theirs, own)
    )


def scorer_and_model(registry: Registry, size: Size, device: str) -> tuple[Scorer, Any]:
    """The scorer `hf` around a random network, and the network in transformers; both read one token a byte."""
    with tempfile.TemporaryDirectory(prefix="tsdfm-bench-speed-") as folder:
        model = neox(size)
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        settings = {"path": folder, "window": size.length + 1, "stride": size.length}
        scorer: Scorer = registry.load("scorers", "hf").load(settings, device)
    return scorer, model.to(device)


def random_texts(count: int, length: int) -> list[str]:
    """Different texts of so many letters, one token each."""
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (count, length), generator=generator)
    return ["".join(map(chr, row)) for row in letters.tolist()]


def byte_tokenizer() -> Any:
    """A tokenizer with one token a byte; id 0 is end-of-text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    table = {"<|endoftext|>": 0, **{symbol: i + 1 for i, symbol in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=table, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
