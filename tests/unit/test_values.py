# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What is made for every packet: values."""

from __future__ import annotations

import gc

import pytest

from lbapp.control.messages import FlowSignature
from lbapp.dataflow.frames import Segment
from lbapp.values import Value, astuple

ONE = FlowSignature(b"abcd", 1, b"efgh", 2, 6)


class Pair(Value, frozen=True):
    first: int
    second: str = "b"


def test_it_is_what_it_holds() -> None:
    assert Pair(1) == Pair(1, "b") != Pair(2)
    assert astuple(Pair(1)) == (1, "b")
    assert {ONE: "found"}[FlowSignature(b"abcd", 1, b"efgh", 2, 6)] == "found"
    assert Segment(1, 2, 3, 4, b"", b"") != ONE


def test_it_stays_what_it_is() -> None:
    pair = Pair(1)
    with pytest.raises(AttributeError):
        pair.first = 2  # type: ignore[misc]
    assert (pair._replace(second="c"), pair) == (Pair(1, "c"), Pair(1))
    with pytest.raises(TypeError, match="third"):
        pair._replace(third=3)


def test_the_collector_of_garbage_does_not_look_at_it() -> None:
    assert not gc.is_tracked(ONE)
    assert not gc.is_tracked(Pair(1))
