# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Rules and policies, compiled into functions of what was read.

Owns: which values a rule looks at, how it compares them, and in which order policies are asked. Never: parses.

A rule may have several values before it (two headers of one name, a list of ALPN protocols): it holds where one of them
compares well. With ``invert`` it holds where none does, hence also where there is no value at all. All rules of a
policy must hold; one without rules always matches; the first policy that matches decides; ``admin_state_up: false``
skips one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import re2

from lbapp.config.fields import REGEX
from lbapp.config.model import CompareType, L7Policy, L7Rule, RuleType
from lbapp.control.l7.outcomes import printable
from lbapp.control.l7.request import Request
from lbapp.control.l7.tls import ClientHello

Holds = Callable[[Any], bool]
Compare = Callable[[bytes], bool]
Values = Callable[[Any], Sequence[bytes]]

LOWERED = frozenset({RuleType.HOST_NAME, RuleType.SNI, RuleType.FILE_TYPE})
"""What is compared in lower case: the values of such rules are lowered as well, regular expressions are not."""


class RuleTrace(NamedTuple):
    """One rule, and how it fared.

    Attributes:
        rule: as configured.
        held: after ``invert``.
        compared: the values it looked at, printable; empty: there were none.
    """

    rule: L7Rule
    held: bool
    compared: tuple[str, ...]


class PolicyTrace(NamedTuple):
    """One policy, and how it fared.

    Attributes:
        policy: as configured.
        asked: false with ``admin_state_up: false``.
        matched: whether all its rules held.
        decided: whether it is the first that matched.
        rules: each rule, also behind one that did not hold.
    """

    policy: L7Policy
    asked: bool
    matched: bool
    decided: bool
    rules: tuple[RuleTrace, ...]


class Compiled(NamedTuple):
    """A rule with what it looks at."""

    rule: L7Rule
    holds: Holds
    values: Values


def _expected(rule: L7Rule) -> bytes:
    """The bytes that a rule compares with."""
    if rule.type is RuleType.DATA and rule.value.startswith("hex:"):
        return bytes.fromhex(rule.value[4:])
    value = rule.value.encode()
    if rule.type in LOWERED:
        value = value.lower()
        if rule.type is RuleType.FILE_TYPE and rule.compare_type in (CompareType.EQUAL_TO, CompareType.STARTS_WITH):
            value = value.removeprefix(b".")  # ".png" means what "png" does
        if rule.type is not RuleType.FILE_TYPE and rule.compare_type in (CompareType.EQUAL_TO, CompareType.ENDS_WITH):
            value = value.removesuffix(b".")  # names are compared without their last dot
    return value


def _compare(rule: L7Rule) -> Compare:
    if rule.compare_type is CompareType.REGEX:
        search = re2.compile(rule.value.encode(), REGEX).search
        return lambda value: search(value) is not None
    expected = _expected(rule)
    if rule.compare_type is CompareType.EQUAL_TO:
        return expected.__eq__
    if rule.compare_type is CompareType.STARTS_WITH:
        return lambda value: value.startswith(expected)
    if rule.compare_type is CompareType.ENDS_WITH:
        return lambda value: value.endswith(expected)
    return lambda value: expected in value


def field(data: bytes, key: str) -> Sequence[bytes]:
    """What a DATA rule looks at: from an offset to the end of what was read, or a field behind its length.

    Nothing where the offset, the length or the field's end lies behind what was read.
    """
    kind, _, place = key.rpartition(":")
    at = int(place or 0)
    if not kind:
        return (data[at:],) if at <= len(data) else ()
    size = 1 if kind == "lp8" else 2
    begin = at + size
    end = begin + int.from_bytes(data[at:begin], "big")
    return (data[begin:end],) if begin <= len(data) and end <= len(data) else ()


def _values(rule: L7Rule) -> Values:
    name = rule.key.encode()
    lowered = name.lower()
    table: dict[RuleType, Values] = {
        RuleType.METHOD: lambda request: (request.method,),
        RuleType.HOST_NAME: lambda request: (request.host,),
        RuleType.PATH: lambda request: (request.path,),
        RuleType.FILE_TYPE: lambda request: (request.file_type,),
        RuleType.QUERY: lambda request: request.parameter(name),
        RuleType.HEADER: lambda request: request.values(lowered),
        RuleType.COOKIE: lambda request: request.cookie(name),
        RuleType.SNI: lambda hello: () if hello.sni is None else (hello.sni.encode(),),
        RuleType.ALPN: lambda hello: hello.alpn,
        RuleType.SESSION_ID: lambda hello: (hello.session_id.hex().encode(),) if hello.session_id else (),
        RuleType.DATA: lambda data: field(data, rule.key),
    }
    return table[rule.type]


_SINGLE = frozenset({RuleType.PATH, RuleType.HOST_NAME, RuleType.METHOD})


def _single(rule: L7Rule, compare: Compare) -> Holds:
    """The shortest way of a rule whose one value is an attribute: almost every request is asked about these."""
    expected = _expected(rule)
    if rule.compare_type is CompareType.EQUAL_TO:
        equal: dict[RuleType, Holds] = {
            RuleType.PATH: lambda request: request.path == expected,
            RuleType.HOST_NAME: lambda request: request.host == expected,
            RuleType.METHOD: lambda request: request.method == expected,
        }
        return equal[rule.type]
    if rule.compare_type is CompareType.STARTS_WITH and rule.type is RuleType.PATH:
        return lambda request: request.path.startswith(expected)
    other: dict[RuleType, Holds] = {
        RuleType.PATH: lambda request: compare(request.path),
        RuleType.HOST_NAME: lambda request: compare(request.host),
        RuleType.METHOD: lambda request: compare(request.method),
    }
    return other[rule.type]


def compile_rule(rule: L7Rule) -> Compiled:
    """Make a function of a rule."""
    compare, values = _compare(rule), _values(rule)
    holds: Holds
    expected = _expected(rule)
    if rule.type is RuleType.SNI and rule.compare_type is CompareType.EQUAL_TO:
        name = expected.decode()

        def holds(hello: ClientHello) -> bool:
            return hello.sni == name
    elif rule.type in _SINGLE:
        holds = _single(rule, compare)
    elif rule.type in (RuleType.HEADER, RuleType.COOKIE) and expected and rule.compare_type is not CompareType.REGEX:
        def holds(request: Request) -> bool:
            head = request.head
            if head is not None and expected not in head:
                return False  # most rules do not hold; what nowhere occurs need not be looked for
            for value in values(request):  # noqa: SIM110  (a generator costs more than what it calls)
                if compare(value):
                    return True
            return False
    else:
        def holds(subject: Any) -> bool:
            for value in values(subject):  # noqa: SIM110  (a generator costs more than what it calls)
                if compare(value):
                    return True
            return False
    if rule.invert:
        plain = holds

        def holds(subject: Any) -> bool:
            return not plain(subject)
    return Compiled(rule, holds, values)


def matcher(rules: Sequence[Compiled]) -> Holds:
    """One function that tells whether all rules hold."""
    each = tuple(one.holds for one in rules)
    if not each:
        return lambda subject: True
    if len(each) == 1:
        return each[0]
    if len(each) == 2:
        first, second = each
        return lambda subject: first(subject) and second(subject)

    def every(subject: Any) -> bool:
        for holds in each:  # noqa: SIM110  (a generator costs more than what it calls)
            if not holds(subject):
                return False
        return True
    return every


def trace(policies: Iterable[tuple[L7Policy, Sequence[Compiled]]],
          subject: Request | ClientHello | bytes) -> list[PolicyTrace]:
    """Ask every rule of every policy, and tell what was compared."""
    found: list[PolicyTrace] = []
    decided = False
    for policy, rules in policies:
        traces = tuple(RuleTrace(one.rule, one.holds(subject), tuple(
            printable(value.decode("latin-1")) for value in one.values(subject))) for one in rules)
        matched = policy.admin_state_up and all(one.held for one in traces)
        found.append(PolicyTrace(policy, policy.admin_state_up, matched, matched and not decided, traces))
        decided = decided or matched
    return found
