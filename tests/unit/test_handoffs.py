# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Announcements of agents beside servers (:mod:`lbapp.handoffs`)."""

from __future__ import annotations

import pytest

from lbapp import handoffs
from lbapp.handoffs import LEASE_SECONDS, Handoffs

ONE, TWO = ("10.0.0.51", 80), ("fd00::52", 8080)


def test_an_announcement_counts_for_its_time_unless_it_is_repeated() -> None:
    known = Handoffs()
    assert known.announce("s1", [ONE], 0.0)
    assert known.announce("s2", [ONE, TWO], 5.0)
    assert known.adopting(LEASE_SECONDS - 0.1) == {ONE, TWO}
    assert known.announce("s1", [ONE], 9.0)
    assert known.adopting(LEASE_SECONDS + 5.0) == {ONE}
    assert set(known.agents()) == {"s1"}
    assert known.withdraw("s1") and not known.withdraw("s1")
    assert known.adopting(16.0) == frozenset()


def test_what_is_announced_last_is_all(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Handoffs()
    known.announce("s1", [ONE, TWO], 0.0)
    known.announce("s1", [TWO], 1.0)
    assert known.adopting(1.0) == {TWO}
    monkeypatch.setattr(handoffs, "MOST_AGENTS", 2)
    assert known.announce("s2", [], 1.0)
    assert not known.announce("s3", [ONE], 1.0)
    assert known.announce("s1", [ONE], 2.0)
