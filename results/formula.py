"""A small formula language over rows of results: arithmetic, a dozen functions, nothing else.

    100 * (1 - ppl(student) / ppl(teacher))
    ppl(student) / min(ppl(baselines))
    ppl_at_entropy(student, entropy(teacher))

A formula is read with Python's parser and then walked: numbers, + - * /, parentheses, comparisons and calls of the
functions below are all there is. No name is looked up anywhere, nothing is evaluated as code, and its length is
bounded. Row names stand for rows that a claims file selects; a quantity of a selection of several rows is a list, which
min, max, mean, median or count make one number. Every value is carried with its bootstrap replicates, and so is the
result.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

LONGEST = 600
DEEPEST = 30

QUANTITIES: Mapping[str, str] = {
    "ppl": "generative perplexity, pooled, under the claim's scorer; a second argument names another convention",
    "bits_per_byte": "bits per byte under the claim's scorer",
    "entropy": "unigram entropy in nats",
    "mauve": "MAUVE under the claim's scorer",
    "distinct": "distinct-2",
    "repetition": "repetition of 4-grams",
    "calls": "network calls per batch, counted",
    "sequence_calls": "network calls per sequence, counted",
    "seconds": "measured seconds of sampling per sequence",
    "steps": "steps asked for",
    "length": "tokens per sequence",
    "n": "sequences",
    "metric": 'any metric of the summary by name: metric(rows, "total_variation")',
    "training_seconds": "measured seconds of one training step, from training_cost.json",
    "training_flops": "floating-point operations of one training step, from training_cost.json",
}
CURVES: Mapping[str, str] = {
    "ppl_at_entropy": "perplexity of rows that differ in temperature, read off at an entropy: "
    "ppl_at_entropy(rows, entropy(other))",
}
REDUCTIONS: Mapping[str, Callable[..., np.ndarray]] = {
    "count": lambda values, axis: np.full(values.shape[1:], float(len(values))),
    "min": np.min,
    "max": np.max,
    "mean": np.mean,
    "median": np.median,
}
FUNCTIONS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "abs": np.abs,
    "log": np.log,
    "exp": np.exp,
    "sqrt": np.sqrt,
}
_BINARY: Mapping[type, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    ast.Add: np.add,
    ast.Sub: np.subtract,
    ast.Mult: np.multiply,
    ast.Div: np.divide,
}
_COMPARE: Mapping[type, str] = {ast.GtE: ">=", ast.Gt: ">", ast.LtE: "<=", ast.Lt: "<"}
_CALLS = (*QUANTITIES, *CURVES, *REDUCTIONS, *FUNCTIONS)


class FormulaError(ValueError):
    """A formula that cannot be read."""


class NotOne(ValueError):
    """A list where one number is needed, or the other way round."""


@dataclass(frozen=True)
class Quantity:
    """One quantity that a formula asks for: function, row name and its text argument."""

    function: str
    rows: str
    argument: str = ""


# A quantity is (k, 1 + resamples): of each of k rows the value, then its replicates; a number (1 + resamples,) or ().
Lookup = Callable[[Quantity], np.ndarray]
Read = Callable[[str, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Formula:
    """A formula that was read.

    Args:
        text: as written.
        tree: of the permitted kinds of nodes only.
        relation: ">=", ">", "<=", "<" of a comparison, whose tree is left minus right; "" for a plain formula.
    """

    text: str
    tree: ast.expr
    relation: str = ""

    @property
    def quantities(self) -> list[Quantity]:
        """What it needs, each once."""
        found = [
            _quantity(node)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Call) and _called(node) in (*QUANTITIES, *CURVES)
        ]
        return list(dict.fromkeys(found))

    @property
    def rows(self) -> list[str]:
        """Names of the row selections it uses, each once."""
        return list(dict.fromkeys(quantity.rows for quantity in self.quantities))

    def evaluate(self, lookup: Lookup, read: Read) -> np.ndarray:
        """The value and its replicates, (1 + resamples,) or () for a formula without rows.

        Args:
            lookup: gives a quantity.
            read: gives `ppl_at_entropy` of a row name at entropies.

        Raises:
            NotOne: a list was used as a number.
        """
        with np.errstate(all="ignore"):
            result = _evaluate(self.tree, lookup, read)
        return _one(result, self.tree)


def parse(text: str, rows: Mapping[str, Any] | None = None, *, comparison: bool | None = None) -> Formula:
    """Read a formula.

    Args:
        text: see the module's text.
        rows: known row names; None = any.
        comparison: whether it must (True) or must not (False) be a comparison.

    Raises:
        FormulaError: what is wrong, with the nearest permitted name.
    """
    if len(text) > LONGEST:
        raise FormulaError(f"a formula has at most {LONGEST} characters, this one {len(text)}")
    try:
        tree: ast.expr = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise FormulaError(f"'{text}' is no formula: {reason}") from None
    relation = ""
    if isinstance(tree, ast.Compare):
        if len(tree.ops) != 1 or type(tree.ops[0]) not in _COMPARE:
            raise FormulaError(f"'{text}': a comparison has one of >=, >, <=, < between two formulas")
        relation = _COMPARE[type(tree.ops[0])]
        tree = ast.BinOp(tree.left, ast.Sub(), tree.comparators[0])
    if comparison is True and not relation:
        raise FormulaError(f"'{text}' is no comparison: write for example ppl(student) <= 0.68 * ppl(teacher)")
    if comparison is False and relation:
        raise FormulaError(f"'{text}' is a comparison; a value is wanted here")
    _check(tree, text, rows, 0)
    return Formula(text, tree, relation)


def _check(node: ast.expr, text: str, rows: Mapping[str, Any] | None, depth: int) -> None:
    if depth > DEEPEST:
        raise FormulaError(f"'{text[:40]}...' is nested too deeply")
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        return _check(node.operand, text, rows, depth + 1)
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        _check(node.left, text, rows, depth + 1)
        return _check(node.right, text, rows, depth + 1)
    if isinstance(node, ast.Call):
        return _check_call(node, text, rows, depth)
    if isinstance(node, ast.Name):
        raise FormulaError(f"'{text}': '{node.id}' stands alone; write a quantity of it, for example ppl({node.id})")
    raise FormulaError(
        f"'{text}': {_described(node)} is not part of the language (numbers, + - * /, parentheses and "
        f"{', '.join(_CALLS)})"
    )


def _check_call(node: ast.Call, text: str, rows: Mapping[str, Any] | None, depth: int) -> None:
    name = _called(node)
    if name not in _CALLS or node.keywords:
        near = difflib.get_close_matches(name, _CALLS, n=2, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise FormulaError(f"'{text}': unknown function '{name}'{hint} Known: {', '.join(_CALLS)}.")
    if name in FUNCTIONS or name in REDUCTIONS:
        if len(node.args) != 1:
            raise FormulaError(f"'{text}': {name} takes one argument")
        return _check(node.args[0], text, rows, depth + 1)
    first = node.args[0] if node.args else None
    if not isinstance(first, ast.Name):
        raise FormulaError(f"'{text}': {name} takes the name of a selection of rows")
    if rows is not None and first.id not in rows:
        near = difflib.get_close_matches(first.id, rows, n=2, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise FormulaError(f"'{text}': no rows are called '{first.id}'{hint} Known: {', '.join(rows) or 'none'}.")
    rest = node.args[1:]
    if name in CURVES:
        if len(rest) != 1:
            raise FormulaError(f"'{text}': {name} takes rows and an entropy, for example entropy(teacher)")
        return _check(rest[0], text, rows, depth + 1)
    texts = [arg.value for arg in rest if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    if len(texts) != len(rest) or len(rest) > 1 or ((name == "metric") != (len(rest) == 1) and name != "ppl"):
        wanted = 'the name of a metric in quotes: metric(rows, "mauve")' if name == "metric" else "only rows"
        raise FormulaError(f"'{text}': {name} takes {wanted}")


def _described(node: ast.expr) -> str:
    kinds = {ast.Pow: "**", ast.FloorDiv: "//", ast.Mod: "%", ast.MatMult: "@"}
    if isinstance(node, ast.BinOp):
        return f"the operator {kinds.get(type(node.op), type(node.op).__name__)}"
    if isinstance(node, ast.Constant):
        return f"{node.value!r}"
    return type(node).__name__.lower()


def _called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)[:40]


def _quantity(node: ast.Call) -> Quantity:
    rows = node.args[0]
    assert isinstance(rows, ast.Name)
    rest = node.args[1] if len(node.args) > 1 else None
    argument = str(rest.value) if isinstance(rest, ast.Constant) and isinstance(rest.value, str) else ""
    return Quantity(_called(node), rows.id, argument)


def _evaluate(node: ast.expr, lookup: Lookup, read: Read) -> np.ndarray:
    if isinstance(node, ast.Constant):
        return np.asarray(float(node.value))  # type: ignore[arg-type]
    if isinstance(node, ast.UnaryOp):
        value = _evaluate(node.operand, lookup, read)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = (_one(_evaluate(side, lookup, read), side) for side in (node.left, node.right))
        return _BINARY[type(node.op)](left, right)
    assert isinstance(node, ast.Call)
    name = _called(node)
    if name in REDUCTIONS:
        value = _evaluate(node.args[0], lookup, read)
        if value.ndim != 2:
            raise NotOne(f"{name} takes a quantity of several rows, not '{ast.unparse(node.args[0])}'")
        return np.asarray(REDUCTIONS[name](value, axis=0))
    if name in FUNCTIONS:
        return FUNCTIONS[name](_one(_evaluate(node.args[0], lookup, read), node.args[0]))
    quantity = _quantity(node)
    if name in CURVES:
        return read(quantity.rows, _one(_evaluate(node.args[1], lookup, read), node.args[1]))
    return lookup(quantity)


def _one(value: np.ndarray, node: ast.expr) -> np.ndarray:
    if value.ndim == 2:
        if len(value) == 1:
            return np.asarray(value[0])
        raise NotOne(f"'{ast.unparse(node)}' is a list of {len(value)} numbers: use min, max, mean or median of it")
    return value
