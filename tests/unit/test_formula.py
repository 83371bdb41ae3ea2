# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""``lbapp.config.formula``: what a formula comes to, what is none, and that nothing else ever happens."""

from __future__ import annotations

import ast
import math
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbapp.config.formula import DEEPEST, FUNCTIONS, LARGEST, LONGEST, FormulaError, parse
from lbapp.config.pool import Distribution, Synthesis

VALUES = {"cpu": 0.25, "memory": 0.5, "clients": 30.0, "weight": 2.0, "zero": 0.0}


@pytest.mark.parametrize(("text", "value"), [
    ("1", 1), ("1.5e3", 1500), ("0x10 + 1_000", 1016), (" cpu ", 0.25), ("-cpu", -0.25), ("+-+1", -1),
    ("1 - cpu * 2", 0.5), ("(1 - cpu) * weight", 1.5), ("7 // 2", 3), ("-7 // 2", -4), ("7 % 4", 3), ("2 ** 10", 1024),
    ("2 ** -1", 0.5), ("1 / 4", 0.25), ("cpu < 1", 1), ("cpu > 1", 0), ("0 < cpu <= memory < 1", 1),
    ("0 < cpu < cpu", 0), ("cpu == .25", 1), ("cpu != .25", 0), ("cpu >= .25", 1),
    ("100 if cpu < .5 else 1", 100), ("100 if cpu > .5 else 1", 1), ("1 if zero else 2", 2),
    ("cpu and memory", 1), ("cpu and zero", 0), ("zero or cpu", 1), ("zero or zero", 0), ("not zero", 1),
    ("not cpu", 0),
    ("min(cpu, memory)", 0.25), ("max(cpu, memory, 3)", 3), ("abs(0 - 4)", 4), ("sqrt(16)", 4), ("exp(0)", 1),
    ("log(exp(2))", 2), ("log(8, 2)", 3), ("round(2.6)", 3), ("round(2.345, 1)", 2.3), ("round(2.3, 2e300)", 2.3),
    ("zero and nowhere", 0), ("1 if cpu < 1 else nowhere", 1)])
def test_what_a_formula_comes_to(text: str, value: float) -> None:
    found = parse(text).value(VALUES)
    assert found is not None and math.isclose(found, value)


@pytest.mark.parametrize("text", [
    "1 / zero", "1 // zero", "1 % zero", "log(zero)", "sqrt(-1)", "(-8) ** .5", "zero ** -1", "9 ** 9 ** 9",
    "exp(1000)",
    "1e308 * 10", "1e308 + 1e308", "min(1, 1e308 * 10)", "nowhere", "1 if nowhere else 2", "nowhere < 1",
    "max(1, nowhere)", "1e308 * 10 > 1"])
def test_what_cannot_be_told_is_unknown(text: str) -> None:
    assert parse(text).value(VALUES) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers_are_unknown(value: float) -> None:
    assert parse("min(1, cpu)").value({"cpu": value}) is None


def test_which_values_it_speaks_of() -> None:
    assert parse("min(cpu, 3) if clients else cpu + zebra_2").names == {"cpu", "clients", "zebra_2"}


@pytest.mark.parametrize(("text", "message"), [
    ("", "expected an expression, got nothing"), ("   ", "expected an expression, got nothing"),
    ("cpu + * 2", "column 7: expected an expression, invalid syntax"),
    ("  (cpu", r"column 3: expected an expression, '\(' was never closed"),
    ("cpu.real", "column 1: an attribute is not part of formulas"),
    ("1 + cpu[0]", "column 5: an index is not part of formulas"),
    ("  lambda: 1", "column 3: lambda is not part of formulas"),
    ("cpu, 1", "column 1: a comma is not part of formulas"), ("[1]", "column 1: a list is not part of formulas"),
    ("{1: 1}", "column 1: a dictionary"), ("{1}", "column 1: a set"), ("[x for x in y]", "column 1: a comprehension"),
    ("(x := 1)", "column 2: an assignment is not part"), ("f'{cpu}'", "column 1: a text is not part"),
    ("'cpu'", "column 1: expected a number, got 'cpu'"), ("1 + True", "column 5: expected a number, got True"),
    ("None", "column 1: expected a number"), ("...", "column 1: expected a number"), ("2j", "column 1: expected a n"),
    ("1e999", "column 1: expected a smaller number"), ("9" * 400, "column 1: expected a smaller number"),
    ("1 @ 2", "column 1: the operator @"), ("1 << 2", "column 1: the operator <<"),
    ("1 & 2", "column 1: the operator &"),
    ("~1", "column 1: the operator ~"), ("1 in cpu", "column 1: the comparison in"),
    ("1 is cpu", "column 1: the comparison is"), ("open(1)", "column 1: expected one of min, max"),
    ("__import__(1)", "column 1: expected one of min, max"), ("(1)(2)", "column 1: expected one of min"),
    ("cpu.__class__()", "column 1: expected one of min"), ("min", r"column 1: expected min\(...\)"),
    ("1 + min(2)", "column 5: expected 2 to 16 arguments of min, got 1"), ("min()", "expected 2 to 16 arguments"),
    ("abs(1, 2)", "expected 1 arguments of abs, got 2"), ("round(1, ndigits=2)", "round without names of arguments"),
    ("min(*cpu)", "expected 2 to 16 arguments"), ("max(1, *cpu)", "column 8: a star is not part of formulas"),
    ("max(" + ", ".join(["1"] * 17) + ")", "got 17"), ("cpu # well", "column 5: expected printable ASCII"),
    ("1 - CPU", "column 5: expected the name of a value"), ("a" * 65, "column 1: expected the name of a value"),
    ("cpu\n+1", "column 4: expected printable ASCII"), ("\u03bc", "column 1: expected printable ASCII"),
    ("cpu\x00", "column 4: expected printable ASCII"), ("1; 2", "column 2: expected an expression"),
    ("import os", "expected an expression"), ("yield 1", "column 1: yield is not part|expected an expression"),
    ("await x", "column 1: await is not part|expected an expression"),
    ("-" * DEEPEST + "1", f"expected a depth of at most {DEEPEST}"), ("(" * 250 + "1" + ")" * 250, "nested"),
    ("-" * 500 + "1", "depth"), ("1" + "+1" * 100, "depth"), ("1" + " " * LONGEST, f"at most {LONGEST} characters"),
    ("max(" + ", ".join([f"max({','.join('1' * 16)})"] * 14) + ")", "expected at most|operations, numbers and names")])
def test_what_is_no_formula_is_refused_with_its_column(text: str, message: str) -> None:
    with pytest.raises(FormulaError, match=message):
        parse(text)


def test_its_size_is_bounded_within_its_length() -> None:
    text = "+".join(["max(" + ",".join("1" * 16) + ")"] * 12)
    assert len(text) <= LONGEST
    assert parse(text).value({}) == 12
    wide = "max(" + ",".join(["max(" + ",".join("1" * 16) + ")"] * 13) + ")"
    assert len(wide) <= LONGEST and parse(wide).value({}) == 1 and LARGEST > 13 * 17


# Texts that are nearly formulas: their pieces, in any order.
_PIECES = st.sampled_from([
    "cpu", "memory", "zero", "nowhere", "1", "0", "2.5", "1e300", "9" * 30, "0x7f", "+", "-", "*", "/", "//", "%", "**",
    "(", ")", ",", "<", "<=", "==", "!=", " if ", " else ", " and ", " or ", " not ", " ", *FUNCTIONS, ".", "[", "]",
    "'", '"', "\\", "lambda:", ":=", "f'", "{", "}", "@", "~", "...", "await ", "yield ", "*", " in ", " for ",
    "__class__",
])


def _whole(children: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pairs = st.tuples(children, st.sampled_from([
        "+", "-", "*", "/", "//", "%", "**", "<", ">", "==", " and ", " or "]), children)
    return st.one_of(
        pairs.map(lambda three: f"({''.join(three)})"), children.map(lambda one: f"(-{one})"),
        st.tuples(children, children, children).map(lambda three: f"({three[0]} if {three[1]} else {three[2]})"),
        st.tuples(st.sampled_from(["min", "max"]), children, children).map(lambda one: f"{one[0]}({one[1]}, {one[2]})"),
        st.tuples(st.sampled_from(["abs", "sqrt", "log", "exp", "round"]), children).map(
            lambda one: f"{one[0]}({one[1]})"))


_FORMULAS = st.recursive(st.one_of(st.sampled_from(["cpu", "memory", "clients", "nowhere"]), st.floats(
    0, 1e308, allow_nan=False).map(repr)), _whole, max_leaves=20)


@settings(max_examples=400)
@given(st.one_of(st.lists(_PIECES, max_size=40).map("".join), st.text(max_size=600)))
def test_any_text_is_a_formula_or_refused(text: str) -> None:
    began = time.process_time()
    try:
        formula = parse(text)
    except FormulaError:
        pass
    else:
        value = formula.value(VALUES)
        assert value is None or (type(value) is float and math.isfinite(value))
    assert time.process_time() - began < 5


@settings(max_examples=300)
@given(_FORMULAS, st.dictionaries(st.sampled_from(["cpu", "memory", "clients"]), st.floats()))
def test_any_formula_of_any_values_is_a_number_or_unknown(text: str, values: dict[str, float]) -> None:
    began = time.process_time()
    try:
        formula = parse(text)
    except FormulaError:
        assert len(text) > LONGEST or _depth(ast.parse(text, mode="eval").body) > DEEPEST
        return
    value = formula.value(values)
    assert value is None or math.isfinite(value)
    assert formula.names <= {"cpu", "memory", "clients", "nowhere"}
    assert time.process_time() - began < 5


def _depth(node: ast.AST) -> int:
    return 1 + max((_depth(one) for one in ast.iter_child_nodes(node)), default=0)


# ------------------------------------------------------------------ in a pool


def test_a_pool_refuses_it_with_the_field() -> None:
    with pytest.raises(ValueError, match=r"formula: column 5: an attribute is not part of formulas"):
        Distribution(algorithm=Synthesis.FORMULA, formula="1 / cpu.x")
    with pytest.raises(msgspec.ValidationError, match="formula: column 1: expected one of min"):
        _converted({"algorithm": "FORMULA", "formula": "eval(1)"})
    assert _converted({"algorithm": "FORMULA", "formula": "1 - cpu"}).formula == "1 - cpu"


def _converted(values: dict[str, Any]) -> Distribution:
    return msgspec.convert(values, Distribution)
