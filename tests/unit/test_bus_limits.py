# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Limits on new connections over CSMB, between versions: ``lbapp.bus.csmb``, ``lbapp.bus.sessions``."""

from __future__ import annotations

import pytest

from lbapp.bus import csmb
from lbapp.bus.csmb import AddVs, Flag, Limits, Mode, Version
from lbapp.bus.errors import DecodeError, Fault
from lbapp.bus.events import Added, Listed
from tests.unit.test_bus_sessions import Pair, heard, server

V10, V11, V12 = Version(1, 0), Version(1, 1), Version(1, 2)
LIMITED = server(6, mode=Mode.DECIDE, flags=Flag.LIMITED, limits=Limits(100, 0, 5, 9, 24))


@pytest.mark.parametrize(("version", "mode", "limits"), [
    (V10, Mode.PUNT, None), (V11, Mode.PUNT, None), (V12, Mode.DECIDE, LIMITED.limits)])
def test_a_peer_that_keeps_no_limits_asks(version, mode, limits):
    pair = Pair(cs_versions=csmb.VERSIONS, dfs_versions=(version,))
    pair.desired.put(LIMITED)
    pair.run()
    assert pair.cs.limits == (limits is not None)
    (added,) = heard(pair, Added)
    assert (added.server.mode, added.server.limits, Flag.LIMITED in added.server.flags) == (
        mode, limits, limits is not None)
    pair.cs.ask()
    pair.run()
    assert [event.repaired for event in pair.cs.drain() if isinstance(event, Listed)] == [0], "as it was told"


def test_limits_in_a_version_without_them_end_the_connection():
    pair = Pair(cs_versions=(V11,), dfs_versions=(V11,)).run()
    pair.cs._say(AddVs(LIMITED))
    pair.run()
    assert pair.dfs.fault is Fault.VALUE


@pytest.mark.parametrize("limits", [(-2, 0, 1, 0, 24), (1, 0, -2, 0, 24), (1, 0, 1, 0, 33)])
def test_limits_that_cannot_be(limits):
    kind, body = csmb.encode(AddVs(LIMITED._replace(limits=Limits(*limits))))
    with pytest.raises(DecodeError) as caught:
        csmb.decode(kind, body)
    assert caught.value.fault is Fault.VALUE
