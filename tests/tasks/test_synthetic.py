"""Exact laws against enumeration and closed forms; the synthetic tasks keep the task contract."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from tsdfm_bench.api import CellData, Task
from tsdfm_bench.errors import UsageError
from tsdfm_bench.rng import Streams
from tsdfm_bench.tasks.metrics.exact import Exact
from tsdfm_bench.tasks.scorers.oracle import OracleScorer
from tsdfm_bench.tasks.synthetic.chain import HiddenMarkov
from tsdfm_bench.tasks.synthetic.grammar import Grammar, brackets
from tsdfm_bench.tasks.synthetic.law import Evidence
from tsdfm_bench.tasks.synthetic.oracle import make_oracle
from tsdfm_bench.tasks.synthetic.recipe import machine, markov_chain, product_law, shares, stationary
from tsdfm_bench.tasks.synthetic.task import HMM, BracketGrammar, Markov, Product, Synthetic

L = 4
TASKS = {"product": Product, "markov": Markov, "hmm": HMM, "grammar": BracketGrammar}


def generic_hmm() -> HiddenMarkov:
    """Two states that emit every token: the text does not show the path."""
    generator = np.random.default_rng(1)
    return HiddenMarkov(
        "generic", generator.dirichlet([1, 1]), generator.dirichlet([1, 1], 2), generator.dirichlet([1, 1, 1], 2)
    )


def ambiguous() -> Grammar:
    """S -> S S | A S | a | b, A -> b: several derivations of a text, sums over all of them."""
    binary = {(0, 0, 0): 0.2, (0, 1, 0): 0.3}
    return Grammar("ambiguous", binary, np.array([[0.3, 0.2], [0.0, 1.0]]))


LAWS = {
    "product": lambda: product_law(3),
    "markov": lambda: markov_chain(3),
    "machine": lambda: machine(3, 2),
    "generic hmm": generic_hmm,
    "brackets": lambda: brackets(1, 2),
    "ambiguous": ambiguous,
}


@pytest.fixture(params=list(LAWS))
def law(request):
    return LAWS[request.param]()


def texts(law, length=L) -> np.ndarray:
    return np.array(list(itertools.product(range(law.vocab_size), repeat=length)))


def probabilities(law, length=L) -> np.ndarray:
    return np.exp(-law.token_nll(texts(law, length)).sum(axis=1))


def written_out(law) -> np.ndarray:
    """Probabilities of all texts, from the definition and not from a recursion of the law's own."""
    if isinstance(law, HiddenMarkov):
        paths = np.array(list(itertools.product(range(law.states), repeat=L)))
        weight = law.initial.numpy()[paths[:, 0]]
        emitted = np.ones((len(paths), len(texts(law))))
        for i in range(L):
            weight = weight * (law.transition.numpy()[paths[:, i - 1], paths[:, i]] if i else 1.0)
            emitted *= law.emission.numpy()[paths[:, i]][:, texts(law)[:, i]]
        return weight @ emitted

    def derived(symbol: int, text: tuple[int, ...]) -> float:
        if len(text) == 1:
            return law.terminal[symbol, text[0]].item()
        return sum(
            p * derived(b, text[:k]) * derived(c, text[k:])
            for (a, b, c), p in law.binary.items()
            if a == symbol
            for k in range(1, len(text))
        )

    p = np.array([derived(0, tuple(text)) for text in texts(law)])
    return p / p.sum()


def test_probabilities_are_those_of_the_definition(law):
    assert np.allclose(probabilities(law), written_out(law), atol=1e-13)


def noised(law, kind: str, kappa: float) -> tuple[torch.Tensor, Evidence, np.ndarray]:
    """All noised states, what they tell, and P(state | text) as a (states, texts) matrix written out."""
    size = law.vocab_size
    states = np.array(list(itertools.product(range(size + (kind == "mask")), repeat=L)))
    same = states[:, None, :] == texts(law)[None]
    if kind == "mask":
        chance = np.where((states == size)[:, None, :], 1 - kappa, kappa * same)
        evidence = Evidence.masked(torch.tensor(states), size)
    else:
        chance = kappa * same + (1 - kappa) / size
        evidence = Evidence.uniform(torch.tensor(states), torch.full((len(states),), kappa), size)
    return torch.tensor(states), evidence, chance.prod(axis=2)


@pytest.mark.parametrize("kappa", [0.001, 0.4, 0.999])
@pytest.mark.parametrize("kind", ["mask", "uniform"])
def test_posterior_and_score_against_enumeration(law, kind, kappa):
    """Wherever the state is possible: P(x_i = v | x_t) and p_t(y at i) / p_t(x), summed over all texts."""
    states, _, chance = noised(law, kind, kappa)
    p = written_out(law)
    joint = chance * p
    possible = joint.sum(axis=1) > 1e-280
    size, outputs = law.vocab_size, law.vocab_size + (kind == "mask")
    rows, positions = torch.ones(len(states), L).nonzero(as_tuple=True)
    condition = SimpleNamespace(kappa=torch.full((len(states),), kappa, dtype=torch.float64))
    posterior, score = (make_oracle(law, form, kind) for form in ("posterior", "score"))
    found = posterior.predict(states, condition, rows, positions).exp().view(-1, L, outputs).numpy()
    ratios = score.predict(states, condition, rows, positions).exp().view(-1, L, outputs).numpy()
    place = {tuple(state): i for i, state in enumerate(states.tolist())}
    marginal = joint.sum(axis=1)
    for i in range(L):
        at = np.stack([joint @ (texts(law)[:, i] == v) for v in range(size)], axis=1)
        expected = at[possible] / marginal[possible, None]
        assert np.allclose(found[possible, i, :size], expected, atol=1e-10)
        for y in range(outputs):
            other = states.clone()
            other[:, i] = y
            expected_ratio = marginal[[place[tuple(z)] for z in other.tolist()]][possible] / marginal[possible]
            assert np.allclose(ratios[possible, i, y], expected_ratio, rtol=1e-8, atol=1e-12)
    if kind == "mask":
        assert (found[..., size] == 0).all()


def test_impossible_states_still_give_a_distribution():
    """Brackets that do not match, revealed together: the answer is that of the fewest wrong tokens."""
    law = brackets(2, 1)
    state = torch.tensor([[0, 5, 5, 3]])  # ( ? ? ]
    places = torch.arange(4)
    p = make_oracle(law, "posterior", "mask").predict(
        state, SimpleNamespace(kappa=torch.tensor([0.5])), torch.zeros_like(places), places
    )
    p = p.exp()
    assert torch.allclose(p.sum(dim=1), torch.ones(4).double())
    assert p[0, 0] == 1
    assert p[3, 3] == 1


def test_next_token_law(law):
    """The conditional of every prefix, by enumeration."""
    p = written_out(law)
    oracle = make_oracle(law, "causal", None)
    everything = texts(law)[p > 0]
    memory = oracle.begin(len(everything), L)
    tokens = torch.tensor(everything)
    for place in range(L):
        found = oracle.next_logits(memory, tokens[:, :place] if place == 0 else tokens[:, place - 1 : place]).exp()
        for row, text in enumerate(everything):
            prefix = (texts(law)[:, :place] == text[:place]).all(axis=1)
            expected = [p[prefix & (texts(law)[:, place] == v)].sum() / p[prefix].sum() for v in range(law.vocab_size)]
            assert np.allclose(found[row], expected, atol=1e-12)


def test_entropy_is_that_of_all_texts(law):
    p = written_out(law)
    entropy = -np.sum(p[p > 0] * np.log(p[p > 0]))
    if law.name == "ambiguous":
        assert law.entropy_nats(L) > entropy + 1e-3  # of derivations: more than of texts, as documented
    else:
        assert law.entropy_nats(L) == pytest.approx(entropy, rel=1e-12)


def test_entropy_rates():
    """A two-state chain in closed form; H(L) - H(L - 1) is the rate of a stationary chain and tends to a machine's."""
    a, b = 0.1, 0.3
    matrix = np.array([[1 - a, a], [b, 1 - b]])
    chain = HiddenMarkov("two", stationary(matrix), matrix)

    def h(x):
        return -x * math.log(x) - (1 - x) * math.log(1 - x)

    assert chain.initial.tolist() == pytest.approx([0.75, 0.25])
    assert chain.entropy_rate_nats() == pytest.approx(0.75 * h(a) + 0.25 * h(b))
    assert chain.entropy_nats(9) - chain.entropy_nats(8) == pytest.approx(chain.entropy_rate_nats())
    hidden = machine(8, 3)
    assert hidden.determined
    assert hidden.entropy_nats(400) - hidden.entropy_nats(399) == pytest.approx(hidden.entropy_rate_nats(), rel=1e-9)
    with pytest.raises(UsageError, match="no closed form"):
        generic_hmm().entropy_nats(40)


def test_ngrams_are_marginals_averaged_over_places(law):
    p = written_out(law)
    for n in (1, 2):
        expected = np.zeros((law.vocab_size,) * n)
        for text, weight in zip(texts(law), p, strict=True):
            for i in range(L - n + 1):
                expected[tuple(text[i : i + n])] += weight / (L - n + 1)
        assert np.allclose(law.ngrams(n, L), expected, atol=1e-12)


def test_draws_have_the_law_and_their_own_streams(law):
    n = 20000
    drawn = law.sample(Streams.of(5, "draws", n), L, "real")
    codes = (drawn * law.vocab_size ** torch.arange(L - 1, -1, -1)).sum(dim=1)
    counts = torch.bincount(codes, minlength=law.vocab_size**L).numpy()
    expected = written_out(law) * n
    assert counts[expected == 0].sum() == 0
    usual = expected > 5
    counts, expected = (
        np.append(counts[usual], counts[~usual].sum()),
        np.append(expected[usual], expected[~usual].sum()),
    )
    keep = expected > 0
    assert stats.chisquare(counts[keep], expected[keep]).pvalue > 1e-4
    assert torch.equal(drawn[7:9], law.sample(Streams.of(5, "draws", 2, first=7), L, "real"))


def test_parameters_are_fixed():
    """The laws are part of the results: a change of recipe must be seen."""
    assert {name: TASKS[name].load({}).info.law[7:19] for name in TASKS} == IDENTITIES
    assert markov_chain(5).identity == markov_chain(5).identity != markov_chain(6).identity
    assert shares(np.array([[1, 3]])).tolist() == [[0.25, 0.75]]


IDENTITIES = {"product": "b61a2cf9da0a", "markov": "5c05975bd561", "hmm": "b15b2af2a99d", "grammar": "dcebae71d37a"}


# ------------------------------------------------------------------------------------------------------- tasks


@pytest.fixture(params=list(TASKS))
def task(request) -> Synthetic:
    return TASKS[request.param].load({"length": "12"})


def test_contract(task):
    assert isinstance(task, Task)
    assert task.info.length == 12
    assert task.info.scorers == ("oracle",)
    for name in task.info.references:
        batch = task.reference(name, Streams.of(0, name, 6), 12)
        assert batch.tokens.shape == (6, 12)
        assert batch.tokens.dtype == torch.int64
        assert 0 <= int(batch.tokens.min()) <= int(batch.tokens.max()) < task.info.vocab_size
        assert torch.equal(batch.tokens[2:4], task.reference(name, Streams.of(0, name, 2, first=2), 12).tokens)
    real = task.reference("real", Streams.of(0, "x", 5), 12).tokens
    prompts = task.prompts(Streams.of(0, "x", 5), 12)
    assert not torch.equal(real, prompts)
    texts_ = task.decode(real.numpy(), np.full(5, 12))
    assert [task.encode(text) for text in texts_] == real.tolist()
    assert np.isfinite(task.law.token_nll(real.numpy())).all()
    streams = task.training_streams()
    assert len(streams.train) > 10 * len(streams.validation) > 12
    assert streams.data_hash == task.info.law
    with pytest.raises(UsageError, match="is no symbol"):
        task.encode("?")
    with pytest.raises(UsageError, match="unknown reference"):
        task.reference("nothing", Streams.of(0, "x", 1), 12)


@pytest.mark.parametrize(
    ("params", "said"),
    [({"vocabulary": "3"}, "vocab"), ({"vocab": "0"}, "at least 1"), ({"vocab": "x"}, "whole number")],
)
def test_options(params, said):
    with pytest.raises(UsageError, match=said):
        Markov.load(params)
    with pytest.raises(UsageError, match="at most 4"):
        BracketGrammar.load({"kinds": 5})


def test_oracle_forms():
    law = markov_chain(3)
    with pytest.raises(UsageError, match="mask and uniform"):
        make_oracle(law, "posterior", "unigram")
    with pytest.raises(UsageError, match="form of an oracle"):
        make_oracle(law, "energetic", "mask")  # type: ignore[arg-type]


def test_scorer_leaves_out_what_is_impossible():
    task = BracketGrammar.load({"kinds": 1, "letters": 1, "length": 3})
    scorer = OracleScorer.of_task(task, {}, "cpu")
    scores = scorer.score([np.array(task.encode(text)) for text in ("( a )", "( a a", "a a a", "a a")])
    assert [len(nll) for nll in scores.nll] == [3, 0, 3, 2]
    assert scorer.info.input == "ids"
    with pytest.raises(UsageError, match="has no exact law"):
        OracleScorer.of_task(SimpleNamespace(info=SimpleNamespace(name="sotu", law="")), {}, "cpu")  # type: ignore[arg-type]


def cell(task, tokens) -> CellData:
    n, length = tokens.shape
    return CellData(tokens.astype(np.int32), np.full(n, length), [""] * n, task.info.vocab_size, {}, {}, law=task.law)


def test_metric_is_zero_for_the_law_itself_and_sees_faults():
    task = Markov.load({"vocab": "4", "length": "16"})
    exact = task.reference("real", Streams.of(0, "metric", 3000), 16).tokens.numpy()
    shuffled = exact[:, np.random.default_rng(0).permutation(16)]

    def numbers(tokens):
        found = {m.metric: m for m in Exact().compute(cell(task, tokens))}
        return {k: m.value if m.statistic is None else float(m.statistic(*m.columns)) for k, m in found.items()}

    right, wrong = numbers(exact), numbers(shuffled)
    assert abs(right["excess_nll"]) < 0.03
    assert right["tv_2"] < 0.02
    assert right["kl_2"] < 0.002
    assert right["valid"] == 1
    assert wrong["excess_nll"] > 0.3
    assert wrong["tv_1"] < 0.02  # the same tokens, in another order
    assert wrong["tv_2"] > 5 * right["tv_2"]
    assert wrong["kl_2"] > 0.1
    nested = BracketGrammar.load({"kinds": 1, "letters": 1, "length": 4})
    rows = np.array([nested.encode(text) for text in ("( a a )", "a a a a", "( ( a a", ") a a (")])
    assert numbers_of(nested, rows)["valid"] == 0.5
    assert Exact().compute(CellData(rows.astype(np.int32), np.full(4, 4), [""] * 4, 3, {}, {})) == []


def test_after_a_typed_prompt_only_what_is_possible_is_known():
    """Its entropy is not that of the law's own beginnings, so nothing can be in excess of it."""
    task = Markov.load({})
    streams = Streams.of(0, "x", 64)
    rows = task.reference("real", streams, 16).tokens.numpy()
    rows[:, :4] = rows[:1, :4]
    given = replace(cell(task, rows[:, 4:]), prompt=rows[:, :4], typed=True)
    found = {m.metric: m for m in Exact().compute(given)}
    assert {name for name, m in found.items() if m.reason} == {"excess_nll", "tv_1", "tv_2", "kl_1", "kl_2"}
    assert all(np.isnan(m.value) and not m.columns for m in found.values() if m.reason)
    assert found["valid"].statistic is not None
    assert not any(m.reason for m in Exact().compute(replace(given, typed=False)))


def numbers_of(task, tokens) -> dict[str, float]:
    found = Exact().compute(cell(task, tokens))
    return {m.metric: float(m.statistic(*m.columns)) for m in found if m.statistic is not None}
