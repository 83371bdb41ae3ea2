# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""lbapp.bus.channel: batches, replay, loss, duplication and reordering, without a socket or a clock."""

from __future__ import annotations

import heapq
import random

import pytest

from lbapp.bus import auth, ssmb
from lbapp.bus.auth import Role
from lbapp.bus.channel import FLIGHT, Channel, Timing
from lbapp.bus.errors import BusError, DecodeError, EncodeError, Fault
from lbapp.bus.ssmb import Kind, Lost
from lbapp.control.messages import (
    AppQuery,
    Closed,
    Delete,
    Error,
    FlowSignature,
    Host,
    NewFlow,
    Query,
    Reason,
    Refused,
    Reply,
    Reset,
    Timeout,
    Translation,
)

SWITCH = 0x2A
VERSION = 0x11


def keys(number=1):
    return auth.derive(b"k" * 32, b"", number.to_bytes(32, "big"), bytes(32))


def query(serial):
    return Query(serial, SWITCH, 3, bytes(6), FlowSignature(bytes(4), 1, bytes(4), 80, 6), 5, 2)


def closed(serial):
    return Closed(serial, 5, 9, Reason.SHUTDOWN, False, True, 6, 900, 0.25)


def newflow(serial):
    return NewFlow(query(serial), 9, Translation(None, 0, Host(bytes(6), 4)))


class Pair:
    """A DFS's channel and a CS's, and time."""

    def __init__(self, **timing):
        self.now = 100.0
        self.timing = Timing(**timing)
        self.dfs = Channel(Role.DFS, SWITCH, self.timing)
        self.cs = Channel(Role.CS, 0, self.timing)
        self.sessions = 0

    def open(self, dfs_life=1, cs_life=2):
        self.sessions += 1
        out = self.dfs.open(keys(self.sessions), cs_life, VERSION, self.now)
        back = self.cs.open(keys(self.sessions), dfs_life, VERSION, self.now, switch=SWITCH)
        return out, back

    def carry(self, datagrams, to):
        """Deliver, and whatever that causes; the messages that ``to`` got."""
        got = []
        queue = [(to, datagram) for datagram in datagrams]
        while queue:
            end, datagram = queue.pop(0)
            messages, out = end.receive(datagram, self.now)
            if end is to:
                got += messages
            queue += [(self.cs if end is self.dfs else self.dfs, answer) for answer in out]
        return got

    def later(self, seconds):
        """Time passes at both ends; what they say then is delivered. What each got: (dfs, cs)."""
        self.now += seconds
        from_dfs, from_cs = self.dfs.tick(self.now), self.cs.tick(self.now)
        return self.carry(from_cs, self.dfs), self.carry(from_dfs, self.cs)


@pytest.fixture
def pair():
    made = Pair()
    made.open()
    return made


# ------------------------------------------------------------------ gathering


def test_urgent_messages_wait_a_millisecond_at_most(pair):
    assert pair.dfs.send(Kind.QUERY, [query(1)], pair.now) == []
    assert pair.dfs.due == pytest.approx(pair.now + 0.001)
    pair.dfs.send(Kind.QUERY, [query(2)], pair.now)
    assert pair.later(0.0009) == ([], [])
    assert pair.later(0.0002) == ([], [query(1), query(2)])
    assert pair.dfs.due is None and pair.dfs.counts["sent"] == 1


def test_a_full_datagram_goes_at_once(pair):
    full = ssmb.full(Kind.QUERY)
    (first,) = pair.dfs.send(Kind.QUERY, [query(serial) for serial in range(full + 3)], pair.now)
    assert len(pair.carry([first], pair.cs)) == full
    assert len(pair.carry(pair.dfs.flush(pair.now), pair.cs)) == 3
    (exactly,) = pair.dfs.send(Kind.QUERY, [query(serial) for serial in range(full)], pair.now)
    assert len(exactly) <= ssmb.LIMIT and pair.dfs.due is None


def test_patient_messages_are_gathered_longer(pair):
    for serial in range(200):
        assert pair.dfs.send(Kind.DELETE, [closed(serial)], pair.now) == []
    assert pair.later(0.09) == ([], [])
    _, got = pair.later(0.02)
    assert sum(len(delete.closed) for delete in got) == 200 and pair.dfs.counts["sent"] <= 3


def test_under_load_a_batch_holds_64_connections_at_least(pair):
    out = []
    for serial in range(0, 6400, 10):
        both = [closed(number)._replace(outbound=way) for number in range(serial, serial + 10) for way in (False, True)]
        out += pair.dfs.send(Kind.DELETE, both, pair.now)
    assert len(out) and all(len(datagram) <= ssmb.LIMIT for datagram in out)
    records = sum(len(delete.closed) for delete in pair.carry(out, pair.cs))
    assert records / len(out) >= 128


def test_an_application_query_goes_at_once(pair):
    message = AppQuery(query(1), 1, 2, b"", b"GET / HTTP/1.1\r\n\r\n")
    assert pair.carry(pair.dfs.send(Kind.APP_QUERY, [message], pair.now), pair.cs) == [message]


def test_only_what_a_role_sends_can_be_sent(pair):
    with pytest.raises(ValueError, match="DFS does not send REPLY"):
        pair.dfs.send(Kind.REPLY, [Reply(query(1), Error.OK)], pair.now)
    with pytest.raises(EncodeError):
        pair.cs.send(Kind.REPLY, [Reply(query(1), Error.OK, 2**32)] * 30, pair.now)


# ------------------------------------------------------------------ what is ignored


def refused(channel, datagram, now, fault):
    with pytest.raises(BusError) as caught:
        channel.receive(datagram, now)
    assert caught.value.fault is fault
    assert channel.counts[f"ignored_{fault.value}"] >= 1


def sealed(body, *, key=None, role=Role.DFS, version=VERSION, session=None, sequence=50, **more):
    own = keys()
    return ssmb.seal(key or own.ssmb(role), role, body, version, session or own.session, sequence, **more)


def test_bad_datagrams_are_ignored_and_counted(pair):
    ask = ssmb.pack(Kind.QUERY, [query(1)], 1000)[0]
    delete = ssmb.pack(Kind.DELETE, [closed(1)], 1000)[0]
    cs, now = pair.cs, pair.now
    for size in (0, 1, ssmb.OVERHEAD - 1):
        refused(cs, bytes(size), now, Fault.SHORT)
    refused(cs, bytes(9000), now, Fault.LONG)
    refused(cs, sealed(ask, session=77), now, Fault.SESSION)
    refused(cs, sealed(ask, key=b"x" * 32), now, Fault.UNAUTHENTICATED)
    refused(cs, sealed(ask)[:-1], now, Fault.UNAUTHENTICATED)
    refused(cs, sealed(ask) + b"\0", now, Fault.UNAUTHENTICATED)
    refused(cs, sealed(ask, sequence=0), now, Fault.REPLAYED)
    refused(cs, sealed(ask, version=0x20), now, Fault.VERSION)
    refused(cs, sealed(ask, sequence=51, batch=1), now, Fault.VALUE)
    refused(cs, sealed(delete, sequence=52), now, Fault.VALUE)
    refused(cs, sealed(delete, sequence=53, batch=5, back=5), now, Fault.VALUE)
    refused(cs, sealed(ask, sequence=54, ack=1), now, Fault.VALUE)
    refused(cs, sealed(ask._replace(kind=Kind.REPLY), sequence=55), now, Fault.DIRECTION)
    refused(cs, sealed(ssmb.Body(77, 0, 1, b""), sequence=56), now, Fault.KIND)  # type: ignore[arg-type]
    refused(cs, sealed(ask._replace(number=2), sequence=57), now, Fault.LENGTH)
    # One of our own, sent back; sealed with a key that is not the sender's.
    own = cs.send(Kind.TIMEOUT, [Timeout(SWITCH, 1, 1)], now) + cs.flush(now)
    refused(cs, own[0], now, Fault.UNAUTHENTICATED)
    # The good one still comes through, once.
    assert cs.receive(sealed(ask, sequence=58), now)[0] == [query(1)]
    refused(cs, sealed(ask, sequence=58), now, Fault.REPLAYED)
    refused(pair.dfs, sealed(ask, role=Role.CS)[:-16] + bytes(16), now, Fault.UNAUTHENTICATED)


def test_a_stale_session_is_refused(pair):
    old = pair.dfs.send(Kind.QUERY, [query(1)], pair.now) + pair.dfs.flush(pair.now)
    pair.open()
    refused(pair.cs, old[0], pair.now, Fault.SESSION)
    pair.cs.close()
    refused(pair.cs, old[0], pair.now, Fault.SESSION)


def test_a_numbered_batch_that_is_no_batch_takes_its_turn_empty(pair):
    body = ssmb.pack(Kind.DELETE, [closed(1)], 1000)[0]
    bad = body._replace(payload=body.payload + b"\0")
    assert pair.cs.receive(sealed(bad, batch=1), pair.now)[0] == []
    assert pair.cs.counts["ignored_length"] == 1
    assert pair.cs.receive(sealed(body, sequence=51, batch=2, back=1), pair.now)[0] == [Delete(SWITCH, (closed(1),))]


# ------------------------------------------------------------------ what must not be lost


def deletes(pair, serials):
    out = pair.dfs.send(Kind.DELETE, [closed(serial) for serial in serials], pair.now)
    return out + pair.dfs.flush(pair.now)


def test_a_lost_batch_is_sent_again_and_a_duplicate_counted_once(pair):
    deletes(pair, [1])  # lost
    assert pair.dfs.backlog == 1
    _, got = pair.later(0.051)
    assert got == [Delete(SWITCH, (closed(1),))]
    assert pair.dfs.counts["resent"] == 1
    again = pair.dfs.tick(pair.now + 10)  # the acknowledgement has not been sent yet
    assert pair.carry(again, pair.cs) == []
    assert pair.cs.counts["duplicates"] == 1 and pair.dfs.backlog == 0


def test_acknowledgements_ride_along_or_come_soon(pair):
    pair.carry(deletes(pair, [1]), pair.cs)
    assert pair.dfs.backlog == 1
    pair.later(0.021)
    assert pair.dfs.backlog == 0 and pair.cs.counts["sent"] == 1
    pair.carry(deletes(pair, [2]), pair.cs)
    pair.cs.send(Kind.TIMEOUT, [Timeout(SWITCH, 1, 1)], pair.now)
    pair.carry(pair.cs.flush(pair.now), pair.dfs)
    assert pair.dfs.backlog == 0 and pair.cs.due is None


def test_batches_come_in_order(pair):
    first, second = deletes(pair, [1]), deletes(pair, [2])
    assert pair.carry(second, pair.cs) == []
    assert pair.carry(first, pair.cs) == [Delete(SWITCH, (closed(1),)), Delete(SWITCH, (closed(2),))]


def test_a_batch_survives_the_session_and_is_not_counted_twice(pair):
    arrived, lost = deletes(pair, [1]), deletes(pair, [2])
    assert len(lost) == 1
    pair.carry(arrived, pair.cs)  # its acknowledgement never leaves
    pair.dfs.close()
    pair.cs.close()
    assert deletes(pair, [3]) == []
    out, _ = pair.open()
    assert pair.carry(out, pair.cs) == [Delete(SWITCH, (closed(2),)), Delete(SWITCH, (closed(3),))]
    assert pair.cs.counts["duplicates"] == 1
    pair.later(0.05)
    assert pair.dfs.backlog == 0


def test_a_peer_that_forgot_everything_takes_the_stream_from_where_it_is(pair):
    pair.carry(deletes(pair, [1]), pair.cs)
    pair.later(0.05)
    deletes(pair, [2])
    pair.cs = Channel(Role.CS, 0, pair.timing)
    out, _ = pair.open(cs_life=3)
    assert pair.carry(out, pair.cs) == [Delete(SWITCH, (closed(2),))]


def test_a_sender_that_forgot_everything_begins_anew(pair):
    for serial in range(5):
        pair.carry(deletes(pair, [serial]), pair.cs)
    pair.dfs = Channel(Role.DFS, SWITCH, pair.timing)
    pair.open(dfs_life=9)
    assert pair.carry(deletes(pair, [7]), pair.cs) == [Delete(SWITCH, (closed(7),))]


def test_without_a_session_what_repeats_itself_is_dropped(pair):
    pair.dfs.send(Kind.QUERY, [query(1)], pair.now)
    pair.dfs.close()
    assert pair.dfs.send(Kind.QUERY, [query(2), query(3)], pair.now) == []
    assert pair.dfs.counts["dropped_query"] == 3 and pair.dfs.due is None


def test_what_does_not_fit_is_counted_and_told():
    pair = Pair(queue=10)
    for serial in range(0, 255 * 40, 255):
        pair.dfs.send(Kind.DELETE, [closed(number) for number in range(serial, serial + 255)], pair.now)
    assert pair.dfs.backlog == 10
    got = []
    for _ in range(3):
        out, _ = pair.open()
        got += pair.carry(out, pair.cs)
        got += pair.later(0.2)[1]
    lost = [message for message in got if isinstance(message, Lost)]
    arrived = sum(len(message.closed) for message in got if isinstance(message, Delete))
    assert len(lost) == 1 and lost[0].records == pair.dfs.counts["lost_records"] > 0
    assert arrived + lost[0].records == 255 * 40
    assert pair.dfs.backlog == 0


def test_no_more_than_a_window_is_under_way(pair):
    out = []
    for serial in range(FLIGHT + 50):
        out += deletes(pair, [serial])
    assert len(out) == FLIGHT and pair.dfs.backlog == FLIGHT + 50
    pair.carry(out, pair.cs)
    pair.later(0.05)
    pair.later(0.05)
    assert pair.dfs.backlog == 0


# ------------------------------------------------------------------ RESET


def test_reset_forgets_what_was_before_it_and_nothing_after(pair):
    before = pair.cs.send(Kind.REPLY, [Reply(query(1), Error.OK)], pair.now) + pair.cs.flush(pair.now)
    flow = pair.cs.send(Kind.NEWFLOW, [newflow(2)], pair.now) + pair.cs.flush(pair.now)
    reset = pair.cs.reset(pair.now)
    after = pair.cs.send(Kind.NEWFLOW, [newflow(3)], pair.now) + pair.cs.flush(pair.now)
    held = pair.cs.send(Kind.REPLY, [Reply(query(4), Error.OK)], pair.now) + pair.cs.flush(pair.now)
    assert held == [] and pair.cs.counts["dropped_reply"] == 1
    # They arrive in the worst order.
    assert pair.carry(after, pair.dfs) == []
    assert pair.carry(reset, pair.dfs) == []
    assert pair.carry(flow, pair.dfs) == [newflow(2), Reset(SWITCH), newflow(3)]
    refused(pair.dfs, before[0], pair.now, Fault.REPLAYED)
    pair.later(0.03)  # acknowledged: replies flow again
    again = pair.cs.send(Kind.REPLY, [Reply(query(5), Error.OK)], pair.now) + pair.cs.flush(pair.now)
    assert pair.carry(again, pair.dfs) == [Reply(query(5), Error.OK)]


def test_reset_without_a_session_waits_in_its_place(pair):
    pair.cs.close(), pair.dfs.close()
    for serial in (1, 2):
        pair.cs.send(Kind.NEWFLOW, [newflow(serial)], pair.now)
        pair.cs.reset(pair.now)
        pair.cs.reset(pair.now)
    pair.cs.send(Kind.NEWFLOW, [newflow(3)], pair.now)
    _, back = pair.open()
    got = pair.carry(back, pair.dfs) + pair.later(0.1)[0]
    assert got == [newflow(1), Reset(SWITCH), newflow(2), Reset(SWITCH), newflow(3)]


# ------------------------------------------------------------------ a bad network


@pytest.mark.parametrize("seed", range(6))
def test_loss_duplication_and_reordering(seed):
    """30 % lost, 20 % twice, all in any order, sessions that break: each DELETE and NEWFLOW once and in order."""
    chance = random.Random(seed)
    pair = Pair(queue=100_000)
    pair.open()
    network: list[tuple[float, int, Channel, bytes]] = []
    got: dict[int, list] = {id(pair.dfs): [], id(pair.cs): []}
    tie, faults = 0, set()

    def throw(datagrams, to):
        nonlocal tie
        for datagram in datagrams:
            for _ in range(0 if chance.random() < 0.3 else 2 if chance.random() < 0.2 else 1):
                tie += 1
                heapq.heappush(network, (pair.now + chance.random() * 0.05, tie, to, datagram))

    sent = 0
    for step in range(6000):
        pair.now += 0.002
        if step < 1500:
            throw(pair.dfs.send(Kind.DELETE, [closed(step)], pair.now), pair.cs)
            throw(pair.cs.send(Kind.NEWFLOW, [newflow(step)], pair.now), pair.dfs)
            throw(pair.dfs.send(Kind.QUERY, [query(step)], pair.now), pair.cs)
            sent += 1
        if step % 400 == 399 and step < 1500:
            pair.dfs.close()
            pair.cs.close()
            out, back = pair.open()
            throw(out, pair.cs)
            throw(back, pair.dfs)
        while network and network[0][0] <= pair.now:
            _, _, to, datagram = heapq.heappop(network)
            try:
                messages, out = to.receive(datagram, pair.now)
            except DecodeError as error:
                faults.add(error.fault)
                continue
            got[id(to)] += messages
            throw(out, pair.dfs if to is pair.cs else pair.cs)
        throw(pair.dfs.tick(pair.now), pair.cs)
        throw(pair.cs.tick(pair.now), pair.dfs)
        if step > 1500 and not pair.dfs.backlog and not pair.cs.backlog and not network:
            break
    arrived = [one.serial for message in got[id(pair.cs)] if isinstance(message, Delete) for one in message.closed]
    assert arrived == list(range(sent))
    assert [message.query.serial for message in got[id(pair.dfs)]] == list(range(sent))
    asked = [message.serial for message in got[id(pair.cs)] if isinstance(message, Query)]
    assert len(set(asked)) == len(asked) < sent
    assert faults <= {Fault.REPLAYED, Fault.SESSION}
    assert pair.dfs.counts["resent"] and pair.cs.counts["duplicates"]


def test_refused_flows_are_not_lost(pair):
    pair.dfs.send(Kind.REFUSED, [Refused(SWITCH, 1, 5)], pair.now)
    pair.dfs.flush(pair.now)  # lost
    assert pair.later(0.06)[1] == [Refused(SWITCH, 1, 5)]


# ------------------------------------------------------------------ longer than a datagram


def asking(serial, size):
    return AppQuery(query(serial), 1, 2, b"", bytes((serial,)) * size)


def test_a_long_message_comes_in_parts_that_are_sent_again_where_they_are_lost():
    pair = Pair()
    pair.open()
    out = pair.dfs.send(Kind.APP_QUERY, [asking(1, 68 << 10), asking(2, 100), asking(3, 68 << 10)], pair.now)
    assert len(out) > 100 and all(len(datagram) <= ssmb.LIMIT for datagram in out)
    got = pair.carry([datagram for number, datagram in enumerate(out) if number % 10 != 5], pair.cs)
    for _ in range(40):
        got += pair.later(0.06)[1]
    assert sorted(message.query.serial for message in got) == [1, 2, 3], "each once"
    assert {len(message.data) for message in got} == {100, 68 << 10}
    assert pair.dfs.backlog == 0


def test_parts_leave_room_for_what_nothing_repeats():
    pair = Pair(queue=600)
    pair.open()
    out = []
    for serial in range(1, 30):
        out += pair.dfs.send(Kind.APP_QUERY, [asking(serial, 68 << 10)], pair.now)
    dropped = pair.dfs.counts["dropped_app_query"]
    assert 0 < dropped < 29, "whole ones, and it is counted"
    out += pair.dfs.send(Kind.DELETE, [closed(serial) for serial in range(100)], pair.now)
    got = pair.carry(out, pair.cs)
    for _ in range(60):
        got += pair.later(0.06)[1]
    assert [message for message in got if isinstance(message, AppQuery)] == [
        asking(serial, 68 << 10) for serial in range(1, 30 - dropped)]
    assert sum(len(message.closed) for message in got if isinstance(message, Delete)) == 100
    assert pair.dfs.counts["lost_records"] == 0


def test_parts_do_not_outlive_their_session():
    pair = Pair()
    pair.open()
    out = []
    for serial in range(1, 10):
        out += pair.dfs.send(Kind.APP_QUERY, [asking(serial, 68 << 10)], pair.now)
    waiting = pair.dfs.backlog - len(out)
    assert waiting > 0
    pair.dfs.close()
    pair.cs.close()
    assert pair.dfs.backlog == len(out), "those that have a number keep their places"
    again, _ = pair.open()
    got = pair.carry(again, pair.cs)
    for _ in range(40):
        got += pair.later(0.06)[1]
    assert [message.query.serial for message in got] == list(range(1, 1 + len(got))) and 0 < len(got) < 9
    assert pair.dfs.backlog == 0


def test_an_older_peer_is_not_told_what_it_does_not_know():
    pair = Pair()
    pair.open()
    pair.dfs.send(Kind.APP_QUERY, [asking(1, 5000)], pair.now)
    pair.dfs.send(Kind.DELETE, [closed(1)], pair.now)
    pair.dfs.flush(pair.now)
    pair.dfs.close()
    pair.cs.close()
    # An older controller takes the place of the one that was there.
    pair.cs = Channel(Role.CS, 0, pair.timing)
    pair.sessions += 1
    out = pair.dfs.open(keys(pair.sessions), 3, 0x10, pair.now)
    pair.cs.open(keys(pair.sessions), 1, 0x10, pair.now, switch=SWITCH)
    got = pair.carry(out, pair.cs)
    assert {message.records for message in got if isinstance(message, ssmb.Lost)} == {1}
    assert sum(len(message.closed) for message in got if isinstance(message, Delete)) == 1
    assert pair.dfs.send(Kind.APP_QUERY, [asking(2, 100)], pair.now) == []
    assert pair.dfs.counts["dropped_app_query"] == 1
    # And what such a peer should not know is not taken from it.
    body = ssmb.pack(Kind.APP_QUERY, [asking(2, 100)], ssmb.room())[0]
    with pytest.raises(DecodeError) as caught:
        pair.cs.receive(ssmb.seal(keys(pair.sessions).ssmb_dfs, Role.DFS, body, 0x10, pair.cs.session, 900), pair.now)
    assert caught.value.fault is Fault.KIND


def test_a_long_message_that_is_none_is_ignored_and_those_after_it_are_not(pair):
    whole = ssmb.pack(Kind.APP_QUERY, [asking(1, 3000)], ssmb.room())
    broken = [body._replace(payload=body.payload[:-1]) for body in whole]
    for batch, body in enumerate([*broken, *whole], 1):
        got, _ = pair.cs.receive(ssmb.seal(keys(pair.sessions).ssmb_dfs, Role.DFS, body, VERSION, pair.cs.session,
                                           batch, batch=batch), pair.now)
    assert got == [asking(1, 3000)]
    assert pair.cs.counts["ignored_short"] == 1
