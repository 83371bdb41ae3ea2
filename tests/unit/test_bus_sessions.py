# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""lbapp.bus.sessions: transcripts of CSMB connections, without a socket."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbapp.bus import auth, counted, csmb
from lbapp.bus.auth import Role
from lbapp.bus.csmb import HEADER, Flag, Hello, Kind, Target, TargetFlag, Version, VirtualServer
from lbapp.bus.errors import BusError, Fault
from lbapp.bus.events import Added, Counted, Distribution, Down, Keyed, Listed, Removed, Synced, Up
from lbapp.bus.holdings import Desired, Held
from lbapp.bus.sessions import CsSession, DfsSession, Phase

KEY = b"k" * 32
V10, V11, V12, V20 = Version(1, 0), Version(1, 1), Version(1, 2), Version(2, 0)
CS_HELLO = Hello(V10, Role.CS, 77, 1, 1000, b"", 5001, 1400, csmb.HelloFlag.APP_PROXY)
DFS_HELLO = Hello(V10, Role.DFS, 0x2A, 2, 5000, b"", 5002, 1200)


def server(number, **changes):
    return VirtualServer(number, b"\x0a\x01\x00\x01", 80 + number, 6, Flag.TRANSLATE_ADDR)._replace(**changes)


def target(member):
    return Target(member, b"\x0a\x00\x00\x09", 8080, b"\x02" * 6, 4, 100, TargetFlag.TRANSLATE_ADDR)


class Pair:
    """Both ends, and the bytes between them."""

    def __init__(self, *, cs_key=KEY, dfs_key=KEY, desired=None, held=None, cs_versions=(V10,), dfs_versions=(V10,),
                 first=None, switch=None, cs_nonce=b"c" * 32, dfs_nonce=b"d" * 32, now=0.0):
        self.desired = Desired() if desired is None else desired
        self.held = Held() if held is None else held
        self.cs = CsSession(cs_key, CS_HELLO._replace(version=first or max(cs_versions)), cs_nonce, now, self.desired,
                            switch=switch, versions=cs_versions)
        self.dfs = DfsSession(dfs_key, DFS_HELLO, dfs_nonce, now, lambda identity: self.held, versions=dfs_versions)
        self.said = []
        self.now = now

    def run(self, cut=None):
        """Carry bytes both ways until both are silent; ``cut`` says where to cut them."""
        while True:
            idle = True
            for name, end, other in (("CS", self.cs, self.dfs), ("DFS", self.dfs, self.cs)):
                data = end.take()
                if data:
                    idle = False
                    self.note(name, data)
                while data:
                    size = cut() if cut else len(data)
                    other.receive(data[:size], self.now)
                    data = data[size:]
            if idle:
                return self

    def note(self, name, data):
        place = 0
        while place < len(data):
            kind, *_, length = HEADER.unpack_from(data, place)
            self.said.append(f"{name} {Kind(kind).name}")
            place += length

    def tick(self, seconds):
        self.now += seconds
        self.cs.tick(self.now)
        self.dfs.tick(self.now)

    def up(self):
        self.run()
        assert self.cs.phase is self.dfs.phase is Phase.UP
        self.cs.drain(), self.dfs.drain()
        self.said.clear()
        return self


def kinds(events):
    return [type(event) for event in events]


# ------------------------------------------------------------------ meeting


def test_hello_challenges_proofs():
    pair = Pair().run()
    assert pair.said == ["CS HELLO", "DFS HELLO", "DFS AUTH", "CS AUTH", "CS AUTH", "DFS AUTH", "CS SYNC_DONE"]
    (cs, synced), (dfs, done) = pair.cs.drain(), pair.dfs.drain()
    assert isinstance(cs, Up) and isinstance(dfs, Up)
    assert cs.keys == dfs.keys and cs.limit == dfs.limit == 1200
    assert (cs.peer.identity, dfs.peer.identity) == (0x2A, 77)
    assert synced == done == Synced(0)
    assert dfs.peer.flags is csmb.HelloFlag.APP_PROXY
    assert pair.dfs.hello.interval == 1000  # the CS configures it


@given(st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_it_does_not_matter_where_bytes_are_cut(chance):
    pair = Pair()
    pair.desired.replace([server(number) for number in range(20)], {3: [target(1)]})
    pair.run(lambda: chance.randint(1, 40))
    assert pair.dfs.phase is Phase.UP and len(pair.held.servers) == 20


@pytest.mark.parametrize(("cs", "dfs", "agreed"), [
    ((V10,), (V10,), V10), ((V10, V11), (V10,), V10), ((V10,), (V10, V11), V10), ((V10, V11, V12), (V10, V11), V11),
    ((V10, V12), (V10, V11), V10), ((V10, V11, V20), (V11, V12), V11), ((V10, V20), (V20,), V20),
])
def test_the_highest_common_version_is_agreed_on(cs, dfs, agreed):
    pair = Pair(cs_versions=cs, dfs_versions=dfs).run()
    assert pair.cs.drain()[0].version == pair.dfs.drain()[0].version == agreed


def test_a_version_too_low_is_answered_with_obsolete():
    pair = Pair(cs_versions=(V10, V12), dfs_versions=(V12,), first=V10).run()
    assert pair.said[:4] == ["CS HELLO", "DFS HELLO", "CS HELLO", "DFS HELLO"]
    assert pair.cs.drain()[0].version == V12


@pytest.mark.parametrize(("cs", "dfs"), [((V10,), (V11,)), ((V20,), (V10, V11)), ((V10, V12), (V11,))])
def test_without_a_common_version_there_is_no_session(cs, dfs):
    pair = Pair(cs_versions=cs, dfs_versions=dfs).run()
    (down,) = pair.cs.drain()
    assert down.fault is Fault.VERSION and pair.dfs.phase is Phase.HELLO


class Numbered:
    """Gives messages of one direction serials of its own: what somebody on the way can do before the proofs."""

    def __init__(self):
        self.count, self.kinds = 0, {}

    def __call__(self, data):
        out, place = b"", 0
        while place < len(data):
            kind, _, _, length = HEADER.unpack_from(data, place)
            by_type = self.kinds.get(kind, 0)
            out += HEADER.pack(kind, self.count, by_type, length) + data[place + HEADER.size:place + length]
            self.count, self.kinds[kind], place = self.count + 1, by_type + 1, place + length
        return out


def test_a_version_cannot_be_forced_down():
    """Somebody on the way hides the first HELLO, and answers it as if the DFS were old."""
    pair = Pair(cs_versions=(V10, V11), dfs_versions=(V10, V11))
    to_dfs, to_cs = Numbered(), Numbered()
    assert len(pair.cs.take()) == HEADER.size + len(HELLO_BODY)
    _, old = csmb.encode(DFS_HELLO._replace(error=csmb.Error.VERS_NEW, version=V10))
    pair.cs.receive(to_cs(message(Kind.HELLO, 0, 0, old)), 0)
    for _ in range(4):
        pair.dfs.receive(to_dfs(pair.cs.take()), 0)
        pair.cs.receive(to_cs(pair.dfs.take()), 0)
    assert pair.dfs.peer is not None and pair.dfs.peer.version == V10
    assert pair.dfs.fault is Fault.UNAUTHENTICATED
    assert Up not in kinds(pair.cs.drain() + pair.dfs.drain())


@pytest.mark.parametrize("end", ["cs_key", "dfs_key"])
def test_without_the_key_nobody_is_let_in(end):
    pair = Pair(**{end: b"w" * 32}).run()
    assert pair.dfs.fault is Fault.UNAUTHENTICATED
    assert kinds(pair.dfs.drain()) == [Down] and pair.cs.drain() == []
    # The DFS has proved nothing to one that proved nothing.
    assert "DFS AUTH" in pair.said and pair.said.count("DFS AUTH") == 1


def test_a_proof_cannot_be_sent_back():
    """Who challenges the DFS with its own nonce gets no proof that is good for the CS."""
    pair = Pair(cs_nonce=b"d" * 32)
    pair.dfs.receive(pair.cs.take(), 0)
    pair.cs.receive(pair.dfs.take(), 0)
    _, challenge = csmb.encode(csmb.Challenge(b"d" * 32))
    said = auth.transcript(pair.dfs._said)
    _, own = csmb.encode(csmb.Response(auth.proof(KEY, Role.DFS, said, b"d" * 32, b"d" * 32)))
    pair.dfs.receive(HEADER.pack(Kind.AUTH, 1, 0, 8 + len(challenge)) + challenge, 0)
    pair.dfs.receive(HEADER.pack(Kind.AUTH, 2, 1, 8 + len(own)) + own, 0)
    assert pair.dfs.fault is Fault.UNAUTHENTICATED


def test_the_expected_datapath_is_checked():
    pair = Pair(switch=1).run()
    assert pair.cs.fault is Fault.PEER


def test_a_dfs_may_refuse_a_cs():
    pair = Pair()

    def refuse(identity):
        raise BusError(Fault.LIMIT, "enough")

    pair.dfs._find = refuse
    pair.run()
    assert pair.dfs.fault is Fault.LIMIT and Up not in kinds(pair.cs.drain())


def test_authentication_takes_five_seconds_at_most():
    pair = Pair()
    pair.tick(5.0)
    assert pair.cs.phase is pair.dfs.phase is Phase.HELLO
    pair.tick(0.1)
    assert pair.cs.fault is pair.dfs.fault is Fault.LATE


def test_a_message_that_does_not_go_on_ends_the_connection():
    pair = Pair()
    for octet in message(Kind.HELLO, 0, 0, HELLO_BODY)[:8]:
        pair.tick(0.08)
        pair.dfs.receive(bytes((octet,)), pair.now)
    assert pair.dfs.phase is Phase.HELLO
    pair.tick(0.2)
    assert pair.dfs.fault is Fault.SLOW
    pair = Pair().up()
    pair.dfs.receive(b"\0", pair.now)
    pair.tick(1.0)
    assert pair.dfs.phase is Phase.UP  # here HELLOs tell


# ------------------------------------------------------------------ bad messages


def message(kind, serial, by_type, body, length=None):
    return HEADER.pack(kind, serial, by_type, HEADER.size + len(body) if length is None else length) + body


HELLO_BODY = csmb.encode(CS_HELLO)[1]


@pytest.mark.parametrize(("data", "fault"), [
    (bytes(8), Fault.SHORT),
    (message(Kind.HELLO, 0, 0, b"", 7), Fault.SHORT),
    (message(Kind.HELLO, 0, 0, b"", 257), Fault.LONG),
    (message(Kind.HELLO, 0, 0, b"", 65535), Fault.LONG),
    (message(Kind.HELLO, 0, 0, HELLO_BODY[:-1]), Fault.SHORT),
    (message(Kind.HELLO, 1, 0, HELLO_BODY), Fault.SERIAL),
    (message(Kind.HELLO, 0, 1, HELLO_BODY), Fault.SERIAL),
    (message(99, 0, 0, HELLO_BODY), Fault.KIND),
    (message(Kind.AUTH, 0, 0, b"\x01" + bytes(32)), Fault.STATE),
    (message(Kind.ADD_VS, 0, 0, csmb.encode(csmb.AddVs(server(1)))[1]), Fault.STATE),
    (message(Kind.SYNC_DONE, 0, 0, bytes(4)), Fault.STATE),
    (message(Kind.HELLO, 0, 0, csmb.encode(CS_HELLO._replace(role=Role.DFS))[1]), Fault.DIRECTION),
    (message(Kind.HELLO, 0, 0, csmb.encode(CS_HELLO._replace(interval=0))[1]), Fault.VALUE),
    (message(Kind.HELLO, 0, 0, csmb.encode(CS_HELLO._replace(limit=100))[1]), Fault.VALUE),
    (message(Kind.HELLO, 0, 0, csmb.encode(CS_HELLO._replace(incarnation=0))[1]), Fault.VALUE),
    (message(Kind.HELLO, 0, 0, HELLO_BODY) + message(Kind.HELLO, 1, 1, HELLO_BODY), Fault.STATE),
    (message(Kind.HELLO, 0, 0, HELLO_BODY) + message(Kind.AUTH, 1, 0, b"\x02" + bytes(32)), Fault.STATE),
    (b"GET / HTTP/1.1\r\n\r\n", Fault.LONG),
])
def test_a_bad_message_ends_the_connection_alone(data, fault):
    pair = Pair()
    pair.dfs.receive(data, 0)
    assert pair.dfs.fault is fault and pair.dfs.phase is Phase.DOWN
    pair.dfs.receive(b"more", 0)
    assert kinds(pair.dfs.drain()) == [Down]


@given(st.binary(max_size=400))
@settings(max_examples=300)
def test_any_bytes_do_no_harm_before_authentication(data):
    pair = Pair()
    pair.dfs.receive(data, 0)
    pair.cs.receive(data, 0)
    assert all(isinstance(event, Down) for event in pair.dfs.drain() + pair.cs.drain())
    assert len(pair.dfs._in) <= csmb.LONGEST_BEFORE_AUTH


@given(st.integers(0, 10**6), st.integers(1, 255))
@settings(max_examples=100)
def test_a_changed_bit_after_authentication_is_noticed(place, flip):
    pair = Pair().up()
    pair.desired.put(server(1))
    data = bytearray(pair.cs.take())
    data[place % len(data)] ^= flip
    pair.dfs.receive(bytes(data) + bytes(65536), 0)
    assert pair.dfs.phase is Phase.DOWN and not pair.held.servers


def test_replayed_and_missing_messages_are_noticed():
    pair = Pair().up()
    pair.desired.put(server(1))
    first = pair.cs.take()
    pair.desired.put(server(2))
    second = pair.cs.take()
    pair.dfs.receive(first, 0)
    pair.dfs.receive(first, 0)
    assert pair.dfs.fault is Fault.UNAUTHENTICATED
    pair = Pair(cs_nonce=b"x" * 32).up()
    pair.dfs.receive(second, 0)
    assert pair.dfs.fault is Fault.UNAUTHENTICATED


def test_serials_are_checked_and_wrap():
    pair = Pair().up()
    for round_ in range(66_000):
        pair.desired.put(server(1, port=round_ & 1))
        pair.dfs.receive(pair.cs.take(), 0)
        pair.dfs.drain()
    assert pair.dfs.phase is Phase.UP
    pair.cs._serial_out += 1
    pair.desired.put(server(1, port=7))
    pair.run()
    assert pair.dfs.fault is Fault.SERIAL


# ------------------------------------------------------------------ configuration


def test_virtual_servers_and_distributions_are_said_when_they_change():
    pair = Pair().up()
    pair.desired.replace([server(1), server(2)], {1: [target(1), target(2)]})
    pair.run()
    assert pair.said == ["CS ADD_VS", "CS TABLE", "CS ADD_VS"]
    assert pair.dfs.drain() == [Added(server(1)), Distribution(1, 1, (target(1), target(2))), Added(server(2))]
    pair.said.clear()
    pair.desired.replace([server(2, mode=csmb.Mode.PUNT)], {})
    pair.run()
    assert pair.said == ["CS DELETE_VS", "CS ADD_VS"]
    assert pair.dfs.drain() == [Removed(1), Added(server(2, mode=csmb.Mode.PUNT))]


def test_a_distribution_is_effective_when_it_is_whole():
    pair = Pair().up()
    targets = tuple(target(member) for member in range(1200))
    pair.desired.replace([server(1)], {1: targets})
    data = pair.cs.take()
    seen = []
    for place in range(0, len(data), 5000):
        pair.dfs.receive(data[place:place + 5000], 0)
        seen.append(len(pair.dfs.drain()))
    assert sum(seen) == 2 and seen[-1] == 1  # Added somewhere at the beginning, the distribution at the very end


@pytest.mark.parametrize(("parts", "fault"), [
    ([csmb.Table(1, 1, 1, 2, ())], Fault.STATE),
    ([csmb.Table(1, 1, 0, 2, ()), csmb.Table(1, 2, 1, 2, ())], Fault.STATE),
    ([csmb.Table(1, 1, 0, 2, ()), csmb.Table(1, 1, 0, 2, ())], Fault.STATE),
    ([csmb.Table(9, 1, 0, 1, ())], Fault.VALUE),
    ([csmb.Table(1, 1, 0, 5000, ())], Fault.LIMIT),
    ([csmb.SyncDone(1)], Fault.STATE),
    ([csmb.VsList(0, 1, ())], Fault.STATE),
    ([csmb.Challenge(bytes(32))], Fault.STATE),
    ([CS_HELLO._replace(identity=1)], Fault.STATE),
    ([CS_HELLO._replace(interval=1)], Fault.VALUE),
])
def test_order_is_checked_after_authentication(parts, fault):
    pair = Pair()
    pair.desired.put(server(1))
    pair.up()
    for part in parts:
        pair.cs._say(part)
    pair.run()
    assert pair.dfs.fault is fault


def test_what_a_dfs_counted_arrives_whole():
    pair = Pair().up()
    assert pair.dfs.idle
    rows = tuple(counted.Traffic(number, 1, 2, 3, 4, 5) for number in range(3000))
    pair.dfs.count(counted.counters(7, {"hits": 9}, rows))
    assert not pair.dfs.idle, "nothing more until that was written"
    pair.run()
    assert pair.cs.drain() == [Counted(7, {"hits": 9}, rows)]
    assert pair.said == ["DFS COUNTERS"] * 3
    pair.dfs.end(Fault.CLOSED, "over")
    pair.dfs.count(counted.counters(7, {}, rows))
    assert pair.dfs.take() == b""


@pytest.mark.parametrize(("parts", "fault"), [
    ([counted.Counters(1, 2, 0, (), ())], Fault.STATE),
    ([counted.Counters(0, 2, 0, (), ()), counted.Counters(1, 3, 0, (), ())], Fault.STATE),
    ([counted.Counters(part, 64, 0, (), (counted.Traffic(1, 2, 3, 4, 5, 6),) * 1400) for part in range(63)],
     Fault.LIMIT),
])
def test_counters_out_of_order_or_beyond_all_bounds_end_the_connection(parts, fault):
    pair = Pair().up()
    pair.dfs.count(parts)
    pair.run()
    assert pair.cs.fault is fault


def test_a_cs_counts_nothing():
    pair = Pair().up()
    pair.cs._say(counted.Counters(0, 1, 0, (), ()))
    pair.run()
    assert pair.dfs.fault is Fault.STATE


def test_after_a_reconnect_everything_is_said_and_the_rest_is_dropped():
    pair = Pair()
    pair.desired.replace([server(1), server(2), server(3)], {})
    pair.run()
    assert len(pair.held.servers) == 3
    # While nothing is connected, 2 goes, 3 changes, 4 comes.
    pair.desired.replace([server(1), server(3, port=9), server(4)], {1: [target(1)]})
    again = Pair(desired=pair.desired, held=pair.held, cs_nonce=b"x" * 32).run()
    assert again.said[6:] == ["CS ADD_VS", "CS TABLE", "CS ADD_VS", "CS ADD_VS", "CS SYNC_DONE"]
    assert again.dfs.drain()[1:] == [Distribution(1, 1, (target(1),)), Added(server(3, port=9)), Added(server(4)),
                                     Removed(2), Synced(3)]
    assert set(pair.held.servers) == {1, 3, 4}


def test_the_list_of_virtual_servers_repairs_what_differs():
    pair = Pair()
    pair.desired.replace([server(number) for number in range(300)], {7: [target(1)]})
    pair.up()
    pair.cs.ask()
    pair.run()
    assert pair.said == ["CS VS_LIST", "DFS VS_LIST", "DFS VS_LIST", "DFS VS_LIST"]
    assert pair.cs.drain() == [Listed(300, 0)]
    del pair.held.servers[7]
    pair.held.servers[8] = server(8, port=1)
    pair.held.servers[999] = server(999)
    pair.cs.ask()
    pair.run()
    assert pair.cs.drain() == [Listed(300, 3)]
    assert pair.held.servers == pair.desired.servers
    assert set(map(type, pair.dfs.drain())) == {Added, Removed, Distribution}


def test_much_is_said_in_portions():
    pair = Pair()
    pair.desired.replace([server(number) for number in range(10_000)], {})
    pair.run()
    assert len(pair.held.servers) == 10_000
    first = Pair(desired=pair.desired)
    first.dfs.receive(first.cs.take(), 0)
    first.cs.receive(first.dfs.take(), 0)
    first.dfs.receive(first.cs.take(), 0)
    first.cs.receive(first.dfs.take(), 0)
    assert 0 < len(first.cs.take()) < 300_000


# ------------------------------------------------------------------ the beat


def test_hello_is_repeated_and_answered():
    pair = Pair().up()
    for _ in range(30):
        pair.tick(0.5)
        pair.run()
    assert pair.said == ["CS HELLO", "DFS HELLO"] * 15
    assert pair.cs.phase is pair.dfs.phase is Phase.UP


def test_who_is_not_heard_three_times_is_given_up():
    pair = Pair().up()
    for _ in range(6):
        pair.tick(0.5)
        pair.cs.take()
    assert pair.dfs.phase is Phase.UP
    pair.tick(0.1)
    assert pair.dfs.fault is pair.cs.fault is Fault.SILENT


def test_a_peer_that_reads_nothing_is_given_up():
    pair = Pair()
    pair.desired.replace([server(number, app_data=bytes(255)) for number in range(10_000)], {})
    pair.up()
    pair.cs._events.clear()
    for _ in range(10):
        pair.cs._asked = None
        pair.cs.ask()
        pair.dfs.receive(pair.cs.take(), 0)
    assert pair.dfs.fault is Fault.SLOW


def test_random_changes_end_in_the_same_state():
    """Whatever changes and whenever the connection breaks: what is held is what was wanted."""
    chance = random.Random(1)
    desired, held = Desired(), Held()
    for turn in range(12):
        pair = Pair(desired=desired, held=held, cs_nonce=turn.to_bytes(32, "big"))
        for _ in range(chance.randint(1, 5)):
            some = [number for number in range(30) if chance.random() < 0.5]
            desired.replace([server(number, port=chance.randint(1, 2)) for number in some], {})
            if chance.random() < 0.3:
                pair.dfs.receive(pair.cs.take(), 0)  # and then it breaks
                break
            pair.run()
    Pair(desired=desired, held=held).run()
    assert held.servers == desired.servers


# ------------------------------------------------------------------ keys of cookies

FIRST, SECOND = bytes(range(16)), bytes(range(100, 116))
BOTH = (V10, V11)
PROXY = server(5, mode=csmb.Mode.PROXY, flags=Flag.RAW_PROXY, greeting=csmb.Greeting(1460, 7, True, 10_000))


def proxying(**more):
    """A pair whose DFS shakes hands with clients."""
    made = Pair(cs_versions=BOTH, dfs_versions=BOTH, **more)
    made.dfs.hello = made.dfs.hello._replace(flags=csmb.HelloFlag.APP_PROXY)
    return made


def heard(pair, kind):
    return [event for event in pair.dfs.drain() if isinstance(event, kind)]


def test_keys_arrive_before_anything_else_is_said_and_nobody_who_watches_has_them():
    pair = proxying()
    pair.desired.greet((FIRST, None), 0)
    pair.desired.put(PROXY)
    wire = b""
    while data := pair.cs.take():
        wire += data
        pair.note("CS", data)
        pair.dfs.receive(data, 0.0)
        answer = pair.dfs.take()
        wire += answer
        pair.cs.receive(answer, 0.0)
    assert pair.said[3:] == ["CS KEYS", "CS ADD_VS", "CS SYNC_DONE"]
    assert heard(pair, (Keyed, Added)) == [Keyed((FIRST, None), 0), Added(PROXY)]
    pair.desired.greet((FIRST, SECOND), 1)
    said = pair.cs.take()
    pair.dfs.receive(said, 0.0)
    assert heard(pair, Keyed) == [Keyed((FIRST, SECOND), 1)]
    for key in (FIRST, SECOND):
        assert not any(key[at:at + 8] in wire + said for at in (0, 8))


def test_the_same_keys_look_different_each_time_they_are_said():
    said = []
    for nonce in (b"c" * 32, b"e" * 32):
        pair = proxying(cs_nonce=nonce)
        pair.up()
        for _ in range(2):
            pair.desired.greet((FIRST, SECOND), 0)
            said.append(pair.cs.take())
            pair.dfs.receive(said[-1], 0.0)
        assert heard(pair, Keyed) == [Keyed((FIRST, SECOND), 0)] * 2
    concealed = [data[HEADER.size + 2:HEADER.size + 34] for data in said]
    assert len(set(concealed)) == 4


@pytest.mark.parametrize("spoiled", ["again", "another session", "one bit"])
def test_keys_cannot_be_replayed_or_changed(spoiled):
    first = proxying()
    first.up()
    first.desired.greet((FIRST, SECOND), 0)
    data = first.cs.take()
    victim = first
    if spoiled == "again":
        first.dfs.receive(data, 0.0)
    elif spoiled == "another session":
        victim = proxying(cs_nonce=b"e" * 32)
        victim.up()
    else:
        data = data[:20] + bytes((data[20] ^ 1,)) + data[21:]
    victim.dfs.drain()
    victim.dfs.receive(data, 0.0)
    assert victim.dfs.fault is Fault.UNAUTHENTICATED
    assert heard(victim, Keyed) == []


def test_an_older_peer_gets_neither_keys_nor_what_needs_them():
    for pair in (Pair(cs_versions=BOTH), Pair(cs_versions=BOTH, dfs_versions=BOTH)):
        pair.desired.greet((FIRST, None), 0)
        pair.desired.put(PROXY)
        pair.run()
        assert not pair.cs.proxies
        assert "CS KEYS" not in pair.said
        (added,) = heard(pair, Added)
        old = pair.cs.hello.version == V10
        assert added.server.mode is (csmb.Mode.PASS if old else csmb.Mode.PROXY)
        pair.cs.ask()
        pair.run()
        assert [event.repaired for event in pair.cs.drain() if isinstance(event, Listed)] == [0], "as it was told"


@pytest.mark.parametrize("message", [csmb.Keys(0, 3, bytes(32)), csmb.AddVs(PROXY)])
def test_what_a_version_does_not_have_ends_the_connection(message):
    pair = Pair()
    pair.up()
    pair.cs._say(message)
    pair.run()
    assert pair.dfs.fault in (Fault.STATE, Fault.VALUE)
