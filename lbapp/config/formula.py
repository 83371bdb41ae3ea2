# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The language in which an operator says a member's share: an expression over the values that servers report.

Owns what is allowed, and what it means. A formula is read once, into closures over numbers. Nothing is ever evaluated
by Python itself: its parser gives a tree, and what is not named below is refused with its column. Length, depth and
size of a formula are bounded, numbers are floats throughout, so no formula takes long. What cannot be computed (a value
that was not reported, a division by zero, a number without bounds) is None, never a made-up figure.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

LONGEST = 512
"""Characters of a formula."""
DEEPEST = 32
LARGEST = 256
"""Operations, numbers and names in one."""
MOST_ARGUMENTS = 16
_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")
"""What values that are reported can be called."""

Values = Mapping[str, float]
Term = Callable[[Values], float]


class FormulaError(ValueError):
    """It is no formula. The message says why, and at which column (from 1)."""


class _Unknown(Exception):
    """The value of a formula cannot be told."""


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise _Unknown
    return value


_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: math.pow,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


def _round(value: float, digits: float = 0.0) -> float:
    return float(round(value, int(digits)))


FUNCTIONS: dict[str, tuple[Callable[..., float], int, int]] = {
    "min": (min, 2, MOST_ARGUMENTS), "max": (max, 2, MOST_ARGUMENTS), "abs": (abs, 1, 1), "sqrt": (math.sqrt, 1, 1),
    "log": (math.log, 1, 2), "exp": (math.exp, 1, 1), "round": (_round, 1, 2),
}
"""What can be called, with how many arguments at least and at most."""


class Formula(NamedTuple):
    """A formula that was read.

    Attributes:
        text: as it was written.
        names: the values it speaks of.
        term: computes it; may raise.
    """

    text: str
    names: frozenset[str]
    term: Term

    def value(self, values: Values) -> float | None:
        """What it comes to with these values; None: it cannot be told. Branches not taken need no values."""
        try:
            return _finite(self.term(values))
        except (_Unknown, ArithmeticError, ValueError):
            return None


def parse(text: str) -> Formula:
    """Read a formula.

    Raises:
        FormulaError: it is none.
    """
    if len(text) > LONGEST:
        raise FormulaError(f"expected at most {LONGEST} characters, got {len(text)}")
    for column, character in enumerate(text, 1):
        if not " " <= character <= "~" or character == "#":
            raise FormulaError(f"column {column}: expected printable ASCII characters without #, got {character!r}")
    shift = len(text) - len(text.lstrip()) + 1
    if not text.strip():
        raise FormulaError("expected an expression, got nothing")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of literals that run into words
            tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        column = (error.offset or 1) + shift - 1
        raise FormulaError(f"column {column}: expected an expression, {error.msg}") from None
    except (ValueError, MemoryError, RecursionError) as error:
        raise FormulaError(f"expected an expression: {error or 'too deep'}") from None
    reader = _Reader(shift)
    term = reader.read(tree.body, 1)
    return Formula(text, frozenset(reader.names), term)


class _Reader:
    """Makes closures of a tree.

    Args:
        shift: the column at which the tree begins.
    """

    def __init__(self, shift: int) -> None:
        self._shift = shift
        self._size = 0
        self.names: set[str] = set()

    def read(self, node: ast.expr, depth: int) -> Term:
        self._size += 1
        if self._size > LARGEST:
            raise self._wrong(node, f"expected at most {LARGEST} operations, numbers and names")
        if depth > DEEPEST:
            raise self._wrong(node, f"expected a depth of at most {DEEPEST}")
        kind = _KINDS.get(type(node))
        if kind is None:
            raise self._wrong(node, f"{_WORDS.get(type(node), type(node).__name__)} is not part of formulas")
        return kind(self, node, depth + 1)

    def _wrong(self, node: ast.expr, why: str) -> FormulaError:
        return FormulaError(f"column {node.col_offset + self._shift}: {why}")

    def constant(self, node: ast.Constant, _: int) -> Term:
        if type(node.value) not in (int, float):
            raise self._wrong(node, f"expected a number, got {ast.unparse(node)[:40]}")
        try:
            value = float(node.value)  # type: ignore[arg-type]
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise self._wrong(node, "expected a smaller number")
        return lambda values: value

    def name(self, node: ast.Name, _: int) -> Term:
        name = node.id
        if name in FUNCTIONS:
            raise self._wrong(node, f"expected {name}(...)")
        if not _NAME.fullmatch(name):
            raise self._wrong(node, f"expected the name of a value, small letters, digits and _, got {name[:70]!r}")
        self.names.add(name)

        def term(values: Values) -> float:
            value = values.get(name)
            if value is None:
                raise _Unknown
            return _finite(float(value))

        return term

    def binary(self, node: ast.BinOp, depth: int) -> Term:
        what = _OPERATORS.get(type(node.op))
        if what is None:
            raise self._wrong(node, f"the operator {_WORDS.get(type(node.op), '?')} is not part of formulas")
        left, right = self.read(node.left, depth), self.read(node.right, depth)
        return lambda values: _finite(what(left(values), right(values)))

    def unary(self, node: ast.UnaryOp, depth: int) -> Term:
        if isinstance(node.op, ast.Invert):
            raise self._wrong(node, "the operator ~ is not part of formulas")
        operand = self.read(node.operand, depth)
        if isinstance(node.op, ast.Not):
            return lambda values: float(not operand(values))
        return (lambda values: -operand(values)) if isinstance(node.op, ast.USub) else operand

    def logical(self, node: ast.BoolOp, depth: int) -> Term:
        terms = [self.read(one, depth) for one in node.values]
        decided = any if isinstance(node.op, ast.Or) else all
        return lambda values: float(decided(term(values) for term in terms))

    def comparison(self, node: ast.Compare, depth: int) -> Term:
        for one in node.ops:
            if type(one) not in _COMPARISONS:
                raise self._wrong(node, f"the comparison {_WORDS.get(type(one), '?')} is not part of formulas")
        whats = [_COMPARISONS[type(one)] for one in node.ops]
        terms = [self.read(one, depth) for one in (node.left, *node.comparators)]

        def term(values: Values) -> float:
            left = terms[0](values)
            for what, following in zip(whats, terms[1:], strict=True):
                right = following(values)
                if not what(left, right):
                    return 0.0
                left = right
            return 1.0

        return term

    def condition(self, node: ast.IfExp, depth: int) -> Term:
        test, yes, no = (self.read(one, depth) for one in (node.test, node.body, node.orelse))
        return lambda values: yes(values) if test(values) else no(values)

    def call(self, node: ast.Call, depth: int) -> Term:
        if not isinstance(node.func, ast.Name) or node.func.id not in FUNCTIONS:
            raise self._wrong(node, f"expected one of {', '.join(FUNCTIONS)} before the bracket")
        name = node.func.id
        what, least, most = FUNCTIONS[name]
        if node.keywords:
            raise self._wrong(node, f"expected {name} without names of arguments")
        if not least <= len(node.args) <= most:
            wanted = str(least) if least == most else f"{least} to {most}"
            raise self._wrong(node, f"expected {wanted} arguments of {name}, got {len(node.args)}")
        terms = [self.read(one, depth) for one in node.args]
        return lambda values: _finite(what(*[term(values) for term in terms]))


_KINDS: dict[type[ast.expr], Callable[[_Reader, ast.expr, int], Term]] = {
    ast.Constant: _Reader.constant, ast.Name: _Reader.name, ast.BinOp: _Reader.binary,  # type: ignore[dict-item]
    ast.UnaryOp: _Reader.unary, ast.BoolOp: _Reader.logical, ast.Compare: _Reader.comparison,  # type: ignore[dict-item]
    ast.IfExp: _Reader.condition, ast.Call: _Reader.call,  # type: ignore[dict-item]
}
_WORDS: dict[type[ast.AST], str] = {
    ast.Attribute: "an attribute", ast.Subscript: "an index", ast.Lambda: "lambda", ast.List: "a list",
    ast.Tuple: "a comma", ast.Dict: "a dictionary", ast.Set: "a set", ast.ListComp: "a comprehension",
    ast.SetComp: "a comprehension", ast.DictComp: "a comprehension", ast.GeneratorExp: "a comprehension",
    ast.Starred: "a star", ast.NamedExpr: "an assignment", ast.JoinedStr: "a text", ast.Await: "await",
    ast.Yield: "yield", ast.YieldFrom: "yield", ast.MatMult: "@", ast.LShift: "<<", ast.RShift: ">>",
    ast.BitAnd: "&", ast.BitOr: "|", ast.BitXor: "^", ast.In: "in", ast.NotIn: "not in", ast.Is: "is",
    ast.IsNot: "is not",
}
