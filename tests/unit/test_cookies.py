# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""When the keys of cookies change (:mod:`lbapp.control.cookies`)."""

from __future__ import annotations

import itertools

from lbapp.control.cookies import AHEAD_SECONDS, ROTATE_SECONDS, VALID_SECONDS, CookieKeys


def test_everybody_knows_a_key_before_it_is_used_and_a_cookie_holds_long_enough() -> None:
    numbers = itertools.count(1)
    keys = CookieKeys(lambda: next(numbers).to_bytes(16, "big"), 0.0)
    assert (keys.keys, keys.current) == ((b"\0" * 15 + b"\1", None), 0)
    told = [(0.0, keys.keys, keys.current)]
    for tenth in range(1, 4000):
        if keys.tick(tenth / 10):
            told.append((tenth / 10, keys.keys, keys.current))
    assert [at for at, _, _ in told] == [0, 50, 60, 110, 120, 170, 180, 230, 240, 290, 300, 350, 360]
    used = [(at, known[current]) for at, known, current in told]
    for at, key in used:
        assert key is not None
        first = next(when for when, known, _ in told if key in known)
        last = max(when for when, one in used if one == key)
        gone = next((when for when, known, _ in told if when > last and key not in known), None)
        assert at == 0 or key == told[0][1][0] or first <= next(w for w, one in used if one == key) - AHEAD_SECONDS
        end_of_use = next((when for when, one in used if when > last and one != key), None)
        if gone is not None and end_of_use is not None:
            assert gone - end_of_use >= VALID_SECONDS


def test_late_ticks_change_nothing_twice() -> None:
    keys = CookieKeys(lambda: b"k" * 16, 0.0)
    assert keys.tick(10 * ROTATE_SECONDS)
    assert keys.current == 0
    assert keys.tick(10 * ROTATE_SECONDS)
    assert keys.current == 1
    assert not keys.tick(10 * ROTATE_SECONDS)
