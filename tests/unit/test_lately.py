# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""``lbapp.dataflow.lately``: what is remembered, and how much of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lbapp.dataflow.lately import Lately


@given(st.integers(1, 8), st.lists(st.integers(0, 12), max_size=60))
def test_the_last_ones_and_no_more_than_twice_as_many(most: int, keys: list[int]) -> None:
    lately: Lately[int, int] = Lately(most)
    for at, key in enumerate(keys):
        lately.put(key, at)
        assert lately.get(key) == at and len(lately) <= 2 * most
    last = list(dict.fromkeys(reversed(keys)))
    for key in last[:most]:
        assert lately.get(key) == max(at for at, one in enumerate(keys) if one == key), "the last that was put"
    assert all(lately.get(key) is None for key in last[2 * most:])


def test_nobody_was_put() -> None:
    lately: Lately[str, int] = Lately(2)
    assert lately.get("nobody") is None and len(lately) == 0
    lately.put("one", 0)
    assert lately.get("one") == 0, "false, but something"
