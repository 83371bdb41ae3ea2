# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Relayed connections that a fast path takes over, and what is under way meanwhile."""

from __future__ import annotations

import pytest

from lbapp.dataflow import relay
from lbapp.dataflow.fastpath.layout import Splice
from lbapp.dataflow.frames import ACK, FIN, RST, SYN
from lbapp.dataflow.relay import Relay
from tests.fastpath_packets import (
    WIRE,
    answer,
    entries,
    read,
    request,
)
from tests.relay_world import (
    MEMBER,
    SERIAL,
    SERVICE,
    Clock,
    pair,
    walked,
)

pytest_plugins = ["tests.relay_world"]


def test_a_fast_path_takes_over(here: Relay, clock: Clock) -> None:
    assert here.hand_over(SERIAL) is None
    here.install(entries(pair()))
    assert here.hand_over(SERIAL) is None, "its member is not there"
    here.set_splices({SERIAL: Splice(7, 2)})
    assert here.there() == [SERIAL] and here.there() == []
    taken = here.hand_over(SERIAL)
    assert taken is not None and taken.splice == Splice(7, 2) and taken.key == pair()[0][0]
    assert not here.holds(SERIAL) and here.serials() == [SERIAL]
    assert here.hand_over(SERIAL) is None, "once"
    assert len(walked(here, request(payload=b"late"))) == 1, "what was on its way is still translated"
    here.packet(WIRE, request(flags=RST))
    assert here.closed() == [], "somebody else tells of it"
    assert here.service_stats()[SERVICE, MEMBER][:2] == (0, 0)
    clock.now += 6
    here.sweep(5000)
    assert len(here) == 0
    here.install(entries(pair()))
    here.set_splices({SERIAL: Splice(7)})
    here.hand_over(SERIAL)
    here.take_back(SERIAL)
    assert here.holds(SERIAL) and here.service_stats()[SERVICE, MEMBER][:2] == (1, 0)
    here.packet(WIRE, request(flags=RST))
    assert len(here.closed()) == 1


def test_a_fast_path_is_told_who_has_finished(here: Relay) -> None:
    """What said so was on its way here when the fast path took over, or came before it did."""
    here.install(entries(pair()))
    here.set_splices({SERIAL: Splice(7)})
    taken = here.hand_over(SERIAL)
    assert taken is not None and taken.finished == 0
    here.packet(WIRE, answer(seq=508, payload=b"answer"))
    assert here.finishing() == []
    for _ in range(2):
        here.packet(WIRE, answer(seq=514, flags=FIN | ACK))
    assert here.finishing() == [taken._replace(finished=2)] and here.finishing() == [], "once"
    here.packet(WIRE, request(flags=RST))
    assert here.finishing() == [taken._replace(finished=3)], "nobody says any more"


def test_what_has_half_ended_is_handed_over_as_that(here: Relay) -> None:
    here.install(entries(pair()))
    here.set_splices({SERIAL: Splice(7)})
    here.packet(WIRE, request(flags=FIN | ACK))
    assert here.finishing() == [], "nobody else has it"
    taken = here.hand_over(SERIAL)
    assert taken is not None and taken.finished == 1


@pytest.mark.parametrize("delivered", [True, False])
def test_a_port_that_comes_back_after_a_fast_path_had_it(here: Relay, delivered: bool) -> None:
    """Whose SYN the fast path lets pass has no connection there any more: it is another one. Also where nothing of the
    client has been seen here, for others have delivered what it said."""
    isn = 0x7FFFFFF0
    here.install(entries(pair()))
    here.set_splices({SERIAL: Splice(7)})
    walked(here, answer(seq=500, ack=isn + 101) if delivered else request(seq=isn + 1, payload=bytes(100)))
    assert here.hand_over(SERIAL) is not None
    (late,) = walked(here, request(flags=SYN, seq=isn))
    assert read(late).seq == isn and here.serials() == [SERIAL], "its own, which was long on its way"
    (made,) = walked(here, request(flags=SYN, seq=isn + 200_000))
    assert read(made).flags == SYN | ACK and read(made).ack == isn + 200_001, "it is greeted"
    assert here.serials() == [] and here.closed() == [], "who had it tells of the other's end"
    assert here.service_stats()[SERVICE, MEMBER][:2] == (0, 0)


def test_what_is_under_way_is_not_overtaken(here: Relay) -> None:
    """Acknowledgments are kept back; with the last one, before any goes on, a fast path may have it."""
    here.install(entries(pair()))
    here.set_splices({SERIAL: Splice(7)})
    assert here.there() == [SERIAL] and here.virtual_server(SERIAL) == SERVICE
    for at in (0, 1000, 2000):
        assert len(walked(here, request(seq=1 + at, ack=500, payload=bytes(1000)))) == 1
    assert not here.part(SERIAL) and here.there() == []
    assert walked(here, answer(seq=507, ack=1001)) == [] == here.there()
    assert len(walked(here, answer(seq=507, ack=1001))) == 1, "the same again tells of a loss, and goes on"
    assert len(walked(here, request(seq=3001, ack=500, payload=b"more"))) == 1
    assert len(walked(here, answer(seq=507, ack=3001, payload=b"data"))) == 1, "data goes on"
    assert walked(here, answer(seq=511, ack=3003)) == [] == here.there()
    assert len(walked(here, answer(seq=511, ack=3005))) == 0 and here.there() == [], "the client has not got all"
    here.packet(WIRE, request(seq=3005, ack=504))
    assert here.there() == [SERIAL] and here.part(SERIAL), "before it goes on"
    assert here.hand_over(SERIAL) is not None
    assert [read(made).ack for _, made in here.out] == [3005, 511], "the last of each side"


def test_one_packet_under_way_is_not_waited_for(here: Relay) -> None:
    here.install(entries(pair()))
    here.set_splices({SERIAL: Splice(7)})
    walked(here, request(seq=1, ack=500, payload=bytes(1000)))
    assert here.part(SERIAL) and here.virtual_server(99) is None


def test_what_is_never_acknowledged_is_not_waited_for_for_ever(here: Relay) -> None:
    here.install(entries(pair()))
    here.set_splices({SERIAL: Splice(7)})
    here.there()
    for at in range(2):
        walked(here, request(seq=1 + 1000 * at, ack=500, payload=bytes(1000)))
    assert not here.part(SERIAL)
    for _ in range(relay.PARTING_MOST):
        assert len(walked(here, request(seq=1, ack=500, payload=bytes(1000)))) == 1
    assert here.there() == [SERIAL] and here.part(SERIAL)
