# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""lbapp.bus.transport and lbapp.bus.links on loopback sockets: good peers, bad peers, and good ones beside bad ones."""

from __future__ import annotations

import contextlib
import logging
import os
import time

import eventlet
import pytest
from eventlet.green import socket

from lbapp.bus import auth, counted, csmb, links, ssmb, transport
from lbapp.bus.auth import Role
from lbapp.bus.csmb import HEADER, Flag, Hello, Kind, Target, VirtualServer
from lbapp.bus.errors import Fault
from lbapp.bus.events import Added, Counted, Distribution, Down, Listed, Removed, Synced, Up
from lbapp.bus.transport import CsClient, DfsServer
from lbapp.control.messages import (
    AppQuery,
    Closed,
    Delete,
    Error,
    FlowSignature,
    Host,
    NewFlow,
    Query,
    Reap,
    Reason,
    Refused,
    Reply,
    Reset,
    Stats,
    Timeout,
    Translation,
)
from tests.green import until

KEY = os.urandom(32)
SWITCH = 0x2A


def query(serial, switch=SWITCH):
    return Query(serial, switch, 3, bytes(6), FlowSignature(b"\x0a\0\0\1", 1, b"\x0a\1\0\1", 80, 6), 5, 2)


def server(number, **changes):
    return VirtualServer(number, b"\x0a\x01\x00\x01", 80 + number, 6, Flag.TRANSLATE_ADDR)._replace(**changes)


TARGET = Target(9, b"\x0a\x00\x00\x09", 8080, b"\x02" * 6, 4, 100)


class Site:
    """DFSs and CSs that end with the test; ``log`` has what each was told."""

    def __init__(self):
        self.ends = []

    def dfs(self, identity=SWITCH, key=KEY, listen=("127.0.0.1", 0), **more):
        log = []
        end = DfsServer(listen, key, identity, lambda peer, event: log.append((peer.identity, event)),
                        lambda peer, messages: log.extend((peer.identity, message) for message in messages), **more)
        end.log = log  # type: ignore[attr-defined]
        self.ends.append(end)
        return end

    def cs(self, dfs, identity=77, key=KEY, address=None, answer=None, **more):
        log = []

        def messages(peer, some):
            log.extend(some)
            if answer is not None:
                answer(peer, some)

        end = CsClient(address or dfs.address, key, identity, lambda peer, event: log.append(event), messages, **more)
        end.log = log  # type: ignore[attr-defined]
        self.ends.append(end)
        return end

    def pair(self, **more):
        dfs = self.dfs()
        cs = self.cs(dfs, **more)
        until(lambda: cs.connected and 77 in dfs.peers and dfs.peers[77].connected)
        return dfs, cs


@pytest.fixture
def site():
    made = Site()
    yield made
    for end in made.ends:
        end.close()


def echo(peer, messages):
    """A CS that answers each query at once."""
    asked = [message for message in messages if isinstance(message, Query)]
    if asked:
        peer.send_replies([Reply(one, Error.OK, 9, Translation(b"\x0a\0\0\x09", 8080, Host(bytes(6), 4)))
                           for one in asked])


# ------------------------------------------------------------------ good peers


def test_every_message_crosses(site):
    dfs, cs = site.pair()
    peer = dfs.peers[77]
    translation = Translation(b"\x0a\0\0\x09", 8080, Host(bytes(6), 4))
    asked = [query(1), AppQuery(query(2), 1, 2, b"", b"GET /"), Stats(SWITCH, 3, Error.CONNALIVE, 1, 2),
             Refused(SWITCH, 4, 5), Delete(SWITCH, (Closed(5, 5, 9, Reason.IDLE, False, True, 1, 2, 0.5),))]
    peer.send_queries([asked[0]])
    peer.send_app_queries([asked[1]])
    peer.send_stats([asked[2]])
    peer.send_refused([asked[3]])
    peer.send_deletes(asked[4].closed)
    until(lambda: all(message in cs.log for message in asked))
    said = [Reply(query(1), Error.OK, 9, translation), NewFlow(query(6), 9, translation, False, 5, 6),
            Reap(SWITCH, 7, 5, 9), Timeout(SWITCH, 8, 60)]
    cs.send_replies(said[:1])
    cs.send_newflows(said[1:2])
    cs.send_reaps(said[2:3])
    cs.send_timeouts(said[3:])
    until(lambda: all((77, message) in dfs.log for message in said))
    cs.send_reset()
    peer.send_reset()
    until(lambda: (77, Reset(SWITCH)) in dfs.log and Reset(SWITCH) in cs.log)
    until(lambda: not peer.channel.backlog and not cs.channel.backlog)
    for message in asked + said:
        assert (cs.log + [one for _, one in dfs.log]).count(message) == 1


def test_configuration_crosses_and_survives_a_restart_of_the_agent(site):
    dfs, cs = site.pair()
    cs.replace([server(1), server(2)], {1: [TARGET]})
    until(lambda: (77, Distribution(1, 1, (TARGET,))) in dfs.log and (77, Added(server(2))) in dfs.log)
    cs.remove(2)
    cs.put(server(3))
    cs.distribute(3, [TARGET._replace(weight=5)])
    until(lambda: (77, Removed(2)) in dfs.log and dfs.log[-1] == (77, Distribution(3, 2, (TARGET._replace(weight=5),))))
    cs.check()
    until(lambda: Listed(2, 0) in cs.log)
    address = dfs.address
    dfs.close()
    until(lambda: not cs.connected)
    again = site.dfs(listen=address)
    until(lambda: (77, Synced(2)) in again.log)
    assert set(again.peers[77].held.servers) == {1, 3}
    assert (77, Distribution(1, 1, (TARGET,))) in again.log
    assert [type(event) for event in cs.log].count(Up) == 2


def test_another_switch_at_the_same_address_gets_nothing_that_waited(site):
    dfs, cs = site.pair()
    address = dfs.address
    dfs.close()
    until(lambda: not cs.connected)
    flow = NewFlow(query(6), 9, Translation(None, 0, Host(bytes(6), 4)))
    cs.send_newflows([flow] * 100)
    assert cs.channel.backlog
    other = site.dfs(0x2B, listen=address)
    until(lambda: cs.connected and cs.identity == 0x2B)
    cs.send_newflows([flow._replace(member=10)])
    until(lambda: any(isinstance(one, NewFlow) for _, one in other.log))
    assert [one.member for _, one in other.log if isinstance(one, NewFlow)] == [10]


def test_a_dfs_drops_what_a_returning_cs_no_longer_has(site):
    dfs, cs = site.pair()
    cs.replace([server(1), server(2)], {})
    until(lambda: len(dfs.peers[77].held.servers) == 2)
    cs.close()
    until(lambda: not dfs.peers[77].connected)
    assert len(dfs.peers[77].held.servers) == 2  # it goes on serving
    back = site.cs(dfs)
    back.replace([server(2)], {})
    until(lambda: (77, Synced(1)) in dfs.log)
    assert (77, Removed(1)) in dfs.log


def test_deletes_of_an_outage_arrive_later_and_queries_do_not(site):
    dfs, cs = site.pair()
    peer = dfs.peers[77]
    cs.close()
    until(lambda: not peer.connected)
    peer.send_deletes([Closed(serial, 5, 9, Reason.IDLE) for serial in range(1000)])
    peer.send_queries([query(1)])
    back = site.cs(dfs)
    until(lambda: sum(len(one.closed) for one in back.log if isinstance(one, Delete)) == 1000)
    assert not [one for one in back.log if isinstance(one, Query)]
    assert peer.channel.counts["dropped_query"] == 1


def test_one_cs_with_several_dfss_and_one_dfs_with_several_css(site):
    first, second = site.dfs(1), site.dfs(2)
    clients = {(name, dfs._hello.identity): site.cs(dfs, identity=name, answer=echo)
               for name in (77, 88) for dfs in (first, second)}
    until(lambda: all(client.connected for client in clients.values()))
    for (name, switch), client in clients.items():
        assert client.identity == switch
        client.put(server(name, port=switch))
    for dfs, switch in ((first, 1), (second, 2)):
        until(lambda dfs=dfs: all(len(peer.held.servers) == 1 for peer in dfs.peers.values()))
        assert {name: list(peer.held.servers.values()) for name, peer in dfs.peers.items()} == {
            name: [server(name, port=switch)] for name in (77, 88)}
        for name, peer in dfs.peers.items():
            peer.send_queries([query(name, switch)])
    for dfs, switch in ((first, 1), (second, 2)):
        until(lambda dfs=dfs: len([one for _, one in dfs.log if isinstance(one, Reply)]) == 2)
        answers = {(name, one.query.serial, one.query.switch) for name, one in dfs.log if isinstance(one, Reply)}
        assert answers == {(77, 77, switch), (88, 88, switch)}
    clients[77, 1].close()
    until(lambda: not first.peers[77].connected)
    assert first.peers[88].connected and second.peers[77].connected


def test_the_same_cs_twice_replaces_itself(site):
    dfs, cs = site.pair()
    cs._greenlets[0].kill()  # it does not come back, and its last connection was closed with it
    second = site.cs(dfs)
    until(lambda: second.connected)
    third = CsClient(dfs.address, KEY, 77, lambda *_: None, lambda *_: None)
    site.ends.append(third)
    until(lambda: third.connected)
    assert dfs.complaints.counts["replaced"] == 1


def test_counters_cross_while_there_is_a_session(site):
    dfs, cs = site.pair()
    peer = dfs.peers[77]
    row = counted.Traffic(5, 9, 4, 1, 40, 4000)
    assert peer.send_counters(3, {"hits": 258}, [row])
    until(lambda: Counted(3, {"hits": 258}, (row,)) in cs.log)
    cs.close()
    until(lambda: not peer.connected)
    assert not peer.send_counters(3, {"hits": 258}, [row])


def test_flushing_what_is_urgent_leaves_deletes_gathering(site):
    dfs, cs = site.pair()
    peer = dfs.peers[77]
    peer.send_deletes([Closed(1, 5, 9, Reason.IDLE)])
    peer.send_queries([query(1)])
    peer.flush(urgent=True)
    peer.send_deletes([Closed(2, 5, 9, Reason.IDLE)])
    until(lambda: any(isinstance(one, Delete) for one in cs.log))
    assert [type(one) for one in cs.log if isinstance(one, (Query, Delete))] == [Query, Delete]
    assert [len(one.closed) for one in cs.log if isinstance(one, Delete)] == [2]


def test_a_cs_reconnects_with_growing_pauses(site):
    dfs = site.dfs()
    address = dfs.address
    dfs.close()
    began = time.monotonic()
    cs = site.cs(None, address=address)
    until(lambda: cs.complaints.counts["closed"] == 3)
    assert time.monotonic() - began >= 3 * transport.BACK_OFF[0] and not cs.log, "once, and twice as long"
    site.dfs(listen=address)
    until(lambda: cs.connected)


def test_a_silent_peer_is_given_up(site, monkeypatch):
    dfs, cs = site.pair(interval=0.2)
    for greenlet in cs._greenlets[1:]:
        greenlet.kill()  # no HELLO any more
    until(lambda: not dfs.peers[77].connected)
    assert dfs.complaints.counts["silent"] >= 1


def test_ipv6(site):
    dfs = site.dfs(listen=("::1", 0))
    cs = site.cs(dfs, answer=echo)
    until(lambda: cs.connected and dfs.peers and dfs.peers[77].connected)
    dfs.peers[77].send_queries([query(1)])
    until(lambda: [one for _, one in dfs.log if isinstance(one, Reply)])


def test_a_forgotten_cs_may_come_back(site):
    dfs, cs = site.pair()
    dfs.peers[77].send_deletes([Closed(1, 5, 9, Reason.IDLE)])
    until(lambda: any(isinstance(one, Delete) for one in cs.log))
    dfs.forget(77)
    until(lambda: not cs.connected)
    until(lambda: cs.connected and 77 in dfs.peers and dfs.peers[77].connected)
    dfs.peers[77].send_deletes([Closed(2, 5, 9, Reason.IDLE)])
    until(lambda: sum(isinstance(one, Delete) for one in cs.log) == 2)


def test_a_handler_that_fails_harms_nobody_else(site, caplog):
    dfs = site.dfs()
    calls = []

    def fail(peer, messages):
        calls.append(messages)
        raise RuntimeError("boom")

    cs = CsClient(dfs.address, KEY, 77, fail, fail)
    site.ends.append(cs)
    until(lambda: cs.connected and dfs.peers and dfs.peers[77].connected)
    for _ in range(3):
        dfs.peers[77].send_queries([query(1)])
        dfs.peers[77].flush()
        eventlet.sleep(0.01)
    until(lambda: len(calls) == 5)  # Up, Synced, and three times QUERY
    assert "boom" in caplog.text and "Traceback" not in caplog.text


# ------------------------------------------------------------------ bad peers (faults, row 15)


def message(kind, serial, by_type, body, length=None):
    return HEADER.pack(kind, serial, by_type, HEADER.size + len(body) if length is None else length) + body


GOOD_HELLO = csmb.encode(Hello(csmb.VERSIONS[0], Role.CS, 66, 1, 1000, b"", 9, 1400))[1]
OTHER_VERSION = csmb.encode(Hello(csmb.Version(9, 9), Role.CS, 66, 1, 1000, b"", 9, 1400))[1]

BAD = {
    "zero length": (message(Kind.HELLO, 0, 0, b"", 0), Fault.SHORT),
    "zeros": (bytes(64), Fault.SHORT),
    "cut short": (message(Kind.HELLO, 0, 0, GOOD_HELLO[:40]), Fault.SHORT),
    "truncated": (message(Kind.HELLO, 0, 0, GOOD_HELLO)[:40], Fault.SLOW),
    "truncated header": (b"\0", Fault.SLOW),
    "too long": (message(Kind.HELLO, 0, 0, GOOD_HELLO, 65535), Fault.LONG),
    "no such type": (message(99, 0, 0, GOOD_HELLO), Fault.KIND),
    "wrong serial": (message(Kind.HELLO, 5, 5, GOOD_HELLO), Fault.SERIAL),
    "unauthenticated ADD_VS": (message(Kind.HELLO, 0, 0, GOOD_HELLO) + message(
        Kind.ADD_VS, 1, 0, csmb.encode(csmb.AddVs(server(1)))[1]), Fault.STATE),
    "wrong proof": (message(Kind.HELLO, 0, 0, GOOD_HELLO) + message(Kind.AUTH, 1, 0, b"\x01" + bytes(32)) + message(
        Kind.AUTH, 2, 1, b"\x02" + bytes(32)), Fault.UNAUTHENTICATED),
    "wrong version, over and over": (b"".join(message(Kind.HELLO, n, n, OTHER_VERSION) for n in range(20)),
                                     Fault.LIMIT),
    "HTTP": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", Fault.LONG),
    "TLS": (bytes.fromhex("1603010200010001fc0303") + os.urandom(500), Fault.SHORT),
}


@contextlib.contextmanager
def busy(site):
    """A good CS whose queries are answered all the time; at the end: all were, and its session never broke."""
    dfs, cs = site.pair(answer=echo)
    peer, asked, running = dfs.peers[77], [0], [True]

    def ask():
        while running[0]:
            asked[0] += 1
            peer.send_queries([query(asked[0])])
            peer.flush()
            eventlet.sleep(0.01)

    greenlet = eventlet.spawn(ask)
    yield dfs, cs
    until(lambda: asked[0] > 5)
    running[0] = False
    greenlet.wait()
    until(lambda: len([one for _, one in dfs.log if isinstance(one, Reply)]) == asked[0])
    assert [type(event) for event in cs.log if isinstance(event, (Up, Down))] == [Up]
    assert set(dfs.peers) == {77} and not dfs.peers[77].held.servers


@pytest.mark.parametrize("what", BAD)
def test_a_bad_peer_is_closed_at_once_and_a_good_one_goes_on(site, what):
    data, fault = BAD[what]
    with busy(site) as (dfs, _), contextlib.closing(socket.create_connection(dfs.address)) as stream:
        stream.sendall(data)
        with eventlet.Timeout(10), contextlib.suppress(ConnectionResetError):
            while stream.recv(65536):
                pass
        assert dfs.complaints.counts == {fault.value: 1}, "by what it said, not because it was late"
        assert dfs.unauthenticated == 0


def test_a_whole_connection_cannot_be_replayed(site):
    """A recording of everything a good CS said is of no use: the DFS's nonce is another."""
    dfs = site.dfs()
    recorded = []
    relay = eventlet.listen(("127.0.0.1", 0))

    def pump(source, sink, keep):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if keep:
                    recorded.append(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def serve():
        stream, _ = relay.accept()
        onwards = socket.create_connection(dfs.address)
        eventlet.spawn_n(pump, onwards, stream, False)
        pump(stream, onwards, True)

    eventlet.spawn_n(serve)
    cs = site.cs(None, address=relay.getsockname())
    cs.put(server(1))
    until(lambda: dfs.peers and dfs.peers[77].held.servers)
    cs.remove(1)
    until(lambda: not dfs.peers[77].held.servers)
    cs.close()
    relay.close()
    until(lambda: not dfs.peers[77].connected)
    with contextlib.closing(socket.create_connection(dfs.address)) as stream:
        stream.sendall(b"".join(recorded))
        with eventlet.Timeout(10), contextlib.suppress(ConnectionResetError):
            while stream.recv(65536):
                pass
    assert not dfs.peers[77].connected and not dfs.peers[77].held.servers
    assert dfs.complaints.counts["unauthenticated"] == 1


def test_who_says_nothing_is_closed_after_five_seconds(site, monkeypatch):
    monkeypatch.setattr("lbapp.bus.sessions.AUTHENTICATE_WITHIN", 0.3)
    dfs = site.dfs()
    with contextlib.closing(socket.create_connection(dfs.address)) as stream, eventlet.Timeout(10):
        stream.sendall(b"\0")
        assert stream.recv(1) == b""
    assert dfs.complaints.counts["late"] == 1


def test_idle_connections_are_bounded_and_keep_nobody_out(site):
    dfs = site.dfs()
    idle = [socket.create_connection(dfs.address) for _ in range(500)]
    until(lambda: dfs.unauthenticated == transport.UNAUTHENTICATED)
    cs = site.cs(dfs)
    until(lambda: cs.connected)
    assert dfs.unauthenticated <= transport.UNAUTHENTICATED
    for stream in idle:
        stream.close()
    until(lambda: dfs.unauthenticated == 0)
    until(lambda: len(dfs._connections) == 1)  # they are let go of a moment after they have ended


def test_bad_datagrams_are_ignored_counted_and_logged_once(site, caplog):
    with caplog.at_level(logging.WARNING, "lbapp.bus"), busy(site) as (dfs, cs):
        session = cs.channel.session
        body = ssmb.pack(ssmb.Kind.TIMEOUT, [Timeout(SWITCH, 1, 1)], 1000)[0]
        forged = ssmb.seal(b"x" * 32, Role.CS, body, 0x10, session, 10**9)
        stale = ssmb.seal(b"x" * 32, Role.CS, body, 0x10, 1, 1)
        with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as stream:
            for target in (dfs._link.address, cs._link.address):
                for datagram in (b"", b"\0", bytes(60), forged, forged[:-1], stale, os.urandom(1400), bytes(20000)):
                    for _ in range(20):
                        stream.sendto(datagram, target)
                    eventlet.sleep(0.01)
        until(lambda: dfs.complaints.counts["unauthenticated"] == 40 and dfs.complaints.counts["short"] == 40)
        until(lambda: cs.complaints.counts["unauthenticated"] == 40 and cs.complaints.counts["short"] == 40)
        assert (77, Timeout(SWITCH, 1, 1)) not in dfs.log
    assert len([record for record in caplog.records if "(SSMB)" in record.message]) <= 2


def test_a_recorded_datagram_is_ignored_the_second_time(site):
    dfs, cs = site.pair()
    datagrams = cs.channel.send(ssmb.Kind.TIMEOUT, [Timeout(SWITCH, 1, 1)], 0.0) + cs.channel.flush(0.0)
    for _ in range(3):
        cs._link.send(datagrams[0], dfs._link.address)
    until(lambda: dfs.complaints.counts["replayed"] == 2)
    assert dfs.log.count((77, Timeout(SWITCH, 1, 1))) == 1


def test_a_wrong_key_never_gets_in_and_does_not_hammer(site):
    dfs = site.dfs()
    cs = site.cs(dfs, key=os.urandom(32))
    eventlet.sleep(1.0)
    until(lambda: dfs.complaints.counts["unauthenticated"])
    assert not cs.log and not dfs.log and not dfs.peers
    assert dfs.complaints.counts["unauthenticated"] <= 4


def test_a_cs_closes_a_bad_dfs_and_keeps_its_others(site):
    """What answers at the address is no DFS, or one that says what it must not."""
    dfs = site.dfs()
    good = site.cs(dfs)
    until(lambda: good.connected)
    # The HELLO before ADD_VS is of another version than was offered.
    for data, fault in (BAD["zero length"], BAD["zeros"], BAD["HTTP"], BAD["truncated header"], (b"", Fault.CLOSED),
                        (BAD["unauthenticated ADD_VS"][0], Fault.VERSION)):
        listener = eventlet.listen(("127.0.0.1", 0))

        def serve(listener=listener, data=data):
            stream, _ = listener.accept()
            stream.recv(65536)
            if data:
                stream.sendall(data)
                with contextlib.suppress(ConnectionResetError):
                    while stream.recv(65536):
                        pass
            stream.close()

        greenlet = eventlet.spawn(serve)
        bad = site.cs(None, address=listener.getsockname())
        until(lambda bad=bad: bad.complaints.counts)
        assert bad.complaints.counts == {fault.value: 1} and not bad.log
        with eventlet.Timeout(10):
            greenlet.wait()
        bad.close()
        listener.close()
    assert [type(event) for event in good.log if isinstance(event, (Up, Down))] == [Up]


def test_a_port_that_is_taken_is_an_error_at_once(site):
    dfs = site.dfs()
    with pytest.raises(OSError, match="in use"):
        site.dfs(listen=dfs.address)


def test_complaints_are_bounded(caplog):
    complaints = links.Complaints()
    with caplog.at_level(logging.WARNING, "lbapp.bus"):
        for number in range(3000):
            complaints.note(f"10.0.{number >> 8}.{number & 255}", Fault.SHORT, "short")
        complaints.note("10.0.11.183", Fault.SHORT, "short")
    assert len(complaints._last) == links.Complaints.PEERS
    assert len(caplog.records) == 3000 and complaints.counts["short"] == 3001


def test_addresses():
    assert links.pack_address("0.0.0.0") == links.pack_address("::") == b""
    assert links.unpack_address(links.pack_address("10.0.0.1")) == "10.0.0.1"
    assert links.unpack_address(links.pack_address("fd00::1")) == "fd00::1"
    assert auth.NONCE_BYTES == 32 and transport.draw() != transport.draw()
