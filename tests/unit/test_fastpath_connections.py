# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The life of a connection in the fast path: decided or asked about, entered, closed, told of, used again.

Programs: ``lbapp/dataflow/fastpath/fastpath.bpf.c`` wire, install.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from lbapp.dataflow.fastpath import kernel, layout
from lbapp.dataflow.fastpath.layout import FlowKey, Hash, Mode, Reason, Result, Service, ServiceKey
from lbapp.dataflow.pipeline import VIRTUAL_MAC
from lbapp.values import astuple
from tests.fastpath_packets import (
    ACK,
    CLIENT_MAC,
    FIN,
    MEMBER_MAC,
    RST,
    SHOT,
    SYN,
    TCP,
    UDP,
    WIRE,
    Bench,
    entries,
    frame,
    packed,
    require_programs,
    segment,
    wrap,
)

pytest_plugins = ["tests.fastpath_packets"]

CLIENT, VIRTUAL, MEMBER = "10.0.0.1", "10.0.0.100", "10.0.1.7"
MEMBERS = ["10.0.1.1", "10.0.1.2", "10.0.1.3", "10.0.1.4"]
THERE = FlowKey(packed(CLIENT), packed(VIRTUAL), 40000, 80, TCP)
BACK = FlowKey(packed(MEMBER), packed(CLIENT), 8080, 40000, TCP)


def request(flags: int, **more: Any) -> bytes:
    return frame(CLIENT, VIRTUAL, flags=flags, **more)


def answer(flags: int) -> bytes:
    return frame(MEMBER, CLIENT, TCP, 8080, 40000, flags=flags, eth_dst=VIRTUAL_MAC, eth_src=MEMBER_MAC)


def states(tables: Bench) -> tuple[int, int]:
    there, back = tables.lookup(THERE), tables.lookup(BACK)
    assert there is not None and back is not None
    return there.state & ~layout.ESTABLISHED, back.state & ~(layout.OUTBOUND | layout.ESTABLISHED)


# ------------------------------------------------------------------ its end

OVER = layout.CLOSED | layout.REPORTED
ENDS = {
    "client first": ([request(FIN | ACK), answer(FIN | ACK)],
                     layout.FIN | layout.PEER_FIN | OVER, layout.FIN | layout.PEER_FIN | layout.CLOSED),
    "member first": ([answer(FIN | ACK), request(FIN | ACK)],
                     layout.FIN | layout.PEER_FIN | OVER, layout.FIN | layout.PEER_FIN | layout.CLOSED),
    "client resets": ([request(RST)], layout.RST | OVER, layout.RST | layout.CLOSED),
    "member resets": ([answer(RST | ACK)], layout.RST | OVER, layout.RST | layout.CLOSED),
    "reset after a FIN": ([answer(FIN | ACK), request(RST)],
                          layout.PEER_FIN | layout.RST | OVER, layout.FIN | layout.RST | layout.CLOSED),
}


@pytest.mark.parametrize(("packets", "there", "back"), ENDS.values(), ids=ENDS)
def test_its_end_is_told_once(tables: Bench, packets: list[bytes], there: int, back: int) -> None:
    tables.connect(CLIENT, VIRTUAL, MEMBER, serial=99)
    tables.walk(request(ACK, payload=b"question"))
    tables.walk(answer(ACK))
    for packet in packets[:-1]:
        tables.walk(packet)
        tables.walk(packet)  # again: it was lost
        assert tables.closed() == []
    tables.walk(packets[-1])
    assert states(tables) == (there, back)
    (told,) = tables.closed()
    assert (told.key, told.serial, told.virtual_server, told.member) == (THERE, 99, 5, 77)
    assert (told.reason, told.state & layout.CLOSED) == (Reason.SHUTDOWN, layout.CLOSED)
    flow, way = tables.lookup(THERE), tables.lookup(BACK)
    assert flow is not None and way is not None
    assert (told.packets_in, told.bytes_in) == (flow.packets, flow.bytes)
    assert (told.packets_out, told.bytes_out) == (way.packets, way.bytes)
    assert 0 <= told.duration_ms < 5000
    # What comes late is still translated, and nobody is told again.
    for packet in (request(ACK), answer(ACK), request(RST), answer(RST), request(FIN | ACK), answer(FIN | ACK)):
        tables.walk(packet)
    assert tables.closed() == []
    assert tables.service_stats() == {(5, 77): layout.Traffic(1, 1, told.packets_in + told.packets_out,
                                                              told.bytes_in + told.bytes_out)}


def test_one_fin_is_no_end(tables: Bench) -> None:
    tables.connect(CLIENT, VIRTUAL, MEMBER)
    for _ in range(3):
        tables.walk(request(FIN | ACK))
    assert states(tables) == (layout.FIN, layout.PEER_FIN)
    assert tables.closed() == []


def test_a_syn_for_an_open_connection_changes_nothing(tables: Bench) -> None:
    """It was lost, or the client forgot: the member is the one who knows."""
    tables.connect(CLIENT, VIRTUAL, MEMBER)
    tables.serve(VIRTUAL, MEMBERS)
    assert tables.walk(request(SYN)).destination == MEMBER
    assert len(tables.flows(10)) == 2


def test_a_port_used_again_is_a_new_connection(tables: Bench) -> None:
    """A new decision, a new serial; the old connection was told of before, and is not again."""
    tables.connect(CLIENT, VIRTUAL, MEMBER, serial=1)
    tables.walk(request(ACK))
    tables.walk(answer(RST))
    assert len(tables.closed()) == 1
    tables.serve(VIRTUAL, MEMBERS[:1])
    assert tables.walk(request(SYN)).destination == MEMBERS[0]
    assert tables.lookup(BACK) is None
    flow = tables.lookup(THERE)
    assert flow is not None
    assert flow.serial != 1 and flow.state & layout.DECIDED and not flow.state & layout.CLOSED
    assert (flow.packets, tables.closed()) == (1, [])


def test_a_port_used_again_after_a_bare_syn_ack_is_none(tables: Bench) -> None:
    tables.connect(CLIENT, VIRTUAL, MEMBER)
    tables.walk(request(RST))
    tables.serve(VIRTUAL, MEMBERS[:1])
    assert tables.walk(request(SYN | ACK)).destination == MEMBER


def test_a_port_used_again_towards_nobody(tables: Bench) -> None:
    tables.connect(CLIENT, VIRTUAL, MEMBER)
    tables.walk(request(RST))
    assert tables.miss(request(SYN)) == "service"
    assert tables.flows(10) == []


# ------------------------------------------------------------------ decided here


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize("routed", [False, True])
def test_decide(tables: Bench, family: int, protocol: int, routed: bool) -> None:
    client, virtual, member = (CLIENT, VIRTUAL, MEMBER) if family == 4 else ("fd00::1", "fd00::100", "fd00:1::7")
    tables.serve(virtual, [member], protocol=protocol, routed=routed)
    first = tables.walk(frame(client, virtual, protocol))
    assert (first.source, first.destination, first.sport, first.dport) == (client, member, 40000, 8080)
    assert first.ttl == (63 if routed else 64)
    assert first.eth_src == (VIRTUAL_MAC if routed else CLIENT_MAC)
    back = tables.walk(frame(member, client, protocol, 8080, 40000, flags=SYN | ACK, eth_dst=VIRTUAL_MAC,
                             eth_src=MEMBER_MAC))
    assert (back.source, back.destination, back.sport, back.dport) == (virtual, client, 80, 40000)
    assert (back.eth_dst, back.eth_src, back.ttl) == (CLIENT_MAC, VIRTUAL_MAC, 63 if routed else 64)
    flow = tables.lookup(FlowKey(packed(client), packed(virtual), 40000, 80, protocol))
    assert flow is not None
    assert flow.state & layout.DECIDED and flow.virtual_server == 5 and flow.member == 101 and flow.idle_seconds == 100
    assert tables.counted()["opened_here"] == 1
    assert tables.service_stats()[5, 101].opened == 1


def test_decide_without_translation(tables: Bench) -> None:
    """The members have the virtual address themselves."""
    tables.set_targets({1: layout.Target(None, 0, MEMBER_MAC, WIRE, 101)})
    tables.set_services({ServiceKey(packed(VIRTUAL), 80, TCP): Service(5, Mode.DECIDE, Hash.TURN, 100, (1,))})
    seen = tables.walk(request(SYN))
    assert (seen.destination, seen.dport, seen.eth_dst) == (VIRTUAL, 80, MEMBER_MAC)


@pytest.mark.parametrize("flags", [ACK, SYN | ACK, SYN | RST, SYN | FIN, FIN, RST, 0, 0xFF])
def test_nothing_but_a_syn_begins_a_connection(tables: Bench, flags: int) -> None:
    tables.serve(VIRTUAL, MEMBERS)
    assert tables.miss(request(flags)) == "flow"
    assert tables.flows(10) == []


def _chosen(tables: Bench, clients: int, ports: int = 1) -> Counter[str]:
    return Counter(tables.walk(frame(f"10.1.{index >> 8}.{index & 255}", VIRTUAL, sport=1024 + port)).destination
                   for index in range(clients) for port in range(ports))


def test_taking_turns_keeps_to_the_weights(tables: Bench) -> None:
    tables.serve(VIRTUAL, MEMBERS[:2], slots=(1, 1, 2, 1))
    assert _chosen(tables, 400) == {MEMBERS[0]: 300, MEMBERS[1]: 100}


def test_a_hash_of_the_client_keeps_clients_where_they_are(tables: Bench) -> None:
    tables.serve(VIRTUAL, MEMBERS, pick=Hash.SOURCE, slots=(1, 2, 3, 4) * 255)
    found = _chosen(tables, 200, ports=3)
    assert len(found) == 4 and all(count % 3 == 0 for count in found.values())
    assert min(found.values()) > 600 / 4 / 2


def test_a_hash_of_the_connection_spreads_one_client(tables: Bench) -> None:
    tables.serve(VIRTUAL, MEMBERS, pick=Hash.FLOW, slots=(1, 2, 3, 4) * 255)
    found = _chosen(tables, 1, ports=600)
    assert len(found) == 4 and min(found.values()) > 600 / 4 / 2


ROUNDS = ((13, 16, 32), (17, 21, 0))


def siphash(seed: tuple[int, int], words: list[int], length: int) -> int:
    """SipHash-1-3 of whole words (Aumasson, Bernstein: "SipHash: a fast short-input PRF")."""
    mask = (1 << 64) - 1
    a, b, c, d = (seed[0] ^ 0x736F6D6570736575, seed[1] ^ 0x646F72616E646F6D, seed[0] ^ 0x6C7967656E657261,
                  seed[1] ^ 0x7465646279746573)

    def turn(value: int, bits: int) -> int:
        return (value << bits | value >> 64 - bits) & mask

    def rounds(count: int) -> None:
        nonlocal a, b, c, d
        for _ in range(count):
            a = a + b & mask
            b = turn(b, 13) ^ a
            a = turn(a, 32)
            c = c + d & mask
            d = turn(d, 16) ^ c
            a = a + d & mask
            d = turn(d, 21) ^ a
            c = c + b & mask
            b = turn(b, 17) ^ c
            c = turn(c, 32)

    for word in [*words, length << 56]:
        d ^= word
        rounds(1)
        a ^= word
    c ^= 0xFF
    rounds(3)
    return a ^ b ^ c ^ d


@pytest.mark.parametrize("pick", [Hash.SOURCE, Hash.FLOW])
def test_the_hash_is_siphash_keyed_by_the_seed(tables: Bench, pick: Hash) -> None:
    tables.serve(VIRTUAL, MEMBERS, pick=pick, slots=(1, 2, 3, 4) * 255)
    seed = layout.Layout.unpack(tables.maps["layout"].lookup(bytes(4)) or b"").seed
    for index in range(20):
        client = f"10.2.0.{index}"
        key = FlowKey(packed(client), packed(VIRTUAL), 40000, 80, TCP).pack()
        data = key[:16] if pick is Hash.SOURCE else key
        words = [int.from_bytes(data[at:at + 8], "little") for at in range(0, len(data), 8)]
        slot = (siphash(seed, words, len(data)) >> 32) % 1020
        assert tables.walk(frame(client, VIRTUAL)).destination == MEMBERS[slot % 4]


def test_a_table_is_replaced_under_established_connections(tables: Bench) -> None:
    key = tables.serve(VIRTUAL, MEMBERS[:1])
    assert tables.walk(request(SYN)).destination == MEMBERS[0]
    tables.set_services({key: Service(5, Mode.DECIDE, Hash.TURN, 100, (9,))})
    tables.serve(VIRTUAL, MEMBERS[1:2], first=9)
    assert tables.walk(request(ACK)).destination == MEMBERS[0]
    assert tables.walk(frame("10.0.0.2", VIRTUAL)).destination == MEMBERS[1]


def test_a_table_told_again_does_not_begin_anew(tables: Bench) -> None:
    key = tables.serve(VIRTUAL, MEMBERS[:2])
    assert tables.walk(frame("10.0.0.2", VIRTUAL)).destination == MEMBERS[0]
    tables.set_services({key: Service(5, Mode.DECIDE, Hash.TURN, 100, (1, 2))})
    assert tables.walk(frame("10.0.0.3", VIRTUAL)).destination == MEMBERS[1]


def test_nobody_to_select(tables: Bench) -> None:
    key = tables.serve(VIRTUAL, [])
    assert tables.miss(request(SYN)) == "target"
    tables.set_services({key: Service(5, Mode.DECIDE, Hash.TURN, 100, (42,))})
    assert tables.miss(request(SYN)) == "target"
    tables.set_targets({42: layout.Target(packed(MEMBER), 0, MEMBER_MAC, 0, 1)})  # nobody knows where it is
    assert tables.miss(request(SYN)) == "target"
    tables.set_targets({42: layout.Target(packed("fd00::7"), 0, MEMBER_MAC, WIRE, 1)})
    assert tables.miss(request(SYN)) == "target"
    assert tables.flows(10) == []


def test_the_switch_decides_where_it_is_told_to(tables: Bench) -> None:
    tables.serve(VIRTUAL, MEMBERS, mode=Mode.PASS)
    assert tables.miss(request(SYN)) == "pass"


def test_a_source_that_is_the_virtual_server(tables: Bench) -> None:
    tables.serve(VIRTUAL, MEMBERS)
    assert tables.miss(frame(VIRTUAL, VIRTUAL)) == "malformed"


def test_a_way_back_that_is_taken(tables: Bench) -> None:
    """Another virtual server's connection has it: the next member, and if there is none, the switch."""
    tables.connect(CLIENT, "10.0.0.200", MEMBERS[0])
    tables.serve(VIRTUAL, MEMBERS[:2])
    assert tables.walk(request(SYN)).destination == MEMBERS[1]
    tables.reset()
    tables.connect(CLIENT, "10.0.0.200", MEMBERS[0])
    tables.serve(VIRTUAL, MEMBERS[:1])
    assert tables.miss(request(SYN)) == "taken"
    assert len(tables.flows(10)) == 2
    back = FlowKey(packed(MEMBERS[0]), packed(CLIENT), 8080, 40000, TCP)
    assert tables.lookup(back) is not None


def test_a_way_back_that_was_a_closed_connections(tables: Bench) -> None:
    tables.connect(CLIENT, "10.0.0.200", MEMBERS[0], serial=3)
    assert tables.walk(frame(CLIENT, "10.0.0.200", flags=RST)).destination == MEMBERS[0]
    tables.serve(VIRTUAL, MEMBERS[:1])
    assert tables.walk(request(SYN)).destination == MEMBERS[0]
    assert len(tables.flows(10)) == 2
    assert [one.serial for one in tables.closed()] == [3]


def test_another_connections_way_back_is_left_alone(tables: Bench) -> None:
    """What stands where one's own way back was, is not one's own."""
    tables.connect(CLIENT, VIRTUAL, MEMBER, serial=1)
    tables.walk(request(RST))
    tables._flows.delete(BACK.pack())
    tables.connect(CLIENT, "10.0.0.200", MEMBER, serial=2)
    tables.serve(VIRTUAL, MEMBERS[:1])
    assert tables.walk(request(SYN)).destination == MEMBERS[0]
    back = tables.lookup(BACK)
    assert back is not None and back.serial == 2 and not back.state & layout.CLOSED


def test_a_first_fragment_may_begin_a_connection(tables: Bench) -> None:
    tables.serve(VIRTUAL, MEMBERS[:1], protocol=UDP)
    body = segment(CLIENT, VIRTUAL, UDP, payload=bytes(1000))
    for part, fragment in ((body[:512], 1), (body[512:], 512)):
        _, out, _ = kernel.run(tables.programs["wire"], wrap(CLIENT, VIRTUAL, UDP, part, fragment=fragment), room=1000)
        assert out[30:34] == packed(MEMBERS[0])


# ------------------------------------------------------------------ asked about


@pytest.mark.parametrize("size", [0, 40, 104 - 54, 105 - 54, 1460, 2048 - 54])
def test_punt(tables: Bench, size: int) -> None:
    tables.serve(VIRTUAL, [], mode=Mode.PUNT, number=12)
    data = request(SYN, payload=b"p" * size)
    assert kernel.run(tables.programs["wire"], data)[0] == SHOT
    assert tables.queries() == [layout.QueryRecord(WIRE, 12, data, layout.Ask.FIRST, 0)]
    assert tables.counted() == {"queries": 1}
    assert tables.flows(10) == []


def test_what_cannot_be_punted_goes_into_the_switch(tables: Bench) -> None:
    tables.serve(VIRTUAL, [], mode=Mode.PUNT, protocol=UDP)
    assert tables.miss(frame(CLIENT, VIRTUAL, UDP, payload=bytes(2048 - 42 + 1))) == "query"
    body = segment(CLIENT, VIRTUAL, UDP, payload=bytes(1000))
    assert tables.miss(wrap(CLIENT, VIRTUAL, UDP, body[:512], fragment=1)) == "fragment"
    assert tables.queries() == []


def test_a_full_ring_of_queries(tables: Bench) -> None:
    """The switch asks instead; nothing that waits is lost or damaged."""
    tables.serve(VIRTUAL, [], mode=Mode.PUNT)
    data = request(SYN, payload=b"p" * 40)
    room = tables.maps["queries"].max_entries // 128 - 1  # a ring is never quite full
    kernel.run(tables.programs["wire"], data, repeat=room + 100)
    counted = tables.counted()
    assert counted == {"queries": room, "miss_query": 100}
    assert tables.miss(data) == "query"
    found = 0
    while some := tables.queries(999):
        assert all(one == layout.QueryRecord(WIRE, 5, data, layout.Ask.FIRST, 0) for one in some)
        found += len(some)
    assert found == room
    kernel.run(tables.programs["wire"], data)
    assert len(tables.queries()) == 1


# ------------------------------------------------------------------ installed


def test_install_leaves_what_is_there(tables: Bench) -> None:
    assert tables.connect(CLIENT, VIRTUAL, MEMBER, serial=1) is Result.OPENED
    assert tables.connect(CLIENT, VIRTUAL, MEMBERS[0], serial=2) is Result.EXISTS
    assert tables.connect(CLIENT, "10.0.0.200", MEMBER, serial=3) is Result.TAKEN
    assert tables.walk(request(ACK)).destination == MEMBER
    assert len(tables.flows(10)) == 2
    tables.walk(request(RST))
    assert tables.connect(CLIENT, VIRTUAL, MEMBERS[0], serial=4) is Result.OPENED
    assert tables.walk(request(ACK)).destination == MEMBERS[0]
    assert tables.counted()["opened_installed"] == 2


def test_install_many(tables: Bench) -> None:
    """More than one batch, each with its own result, in order."""
    client, member = packed(CLIENT), packed(MEMBER)
    flows = []
    for port in range(1, 2601):
        flows += [
            (FlowKey(client, packed(VIRTUAL), port, 80, TCP),
             layout.Flow(client, member, port, 8080, MEMBER_MAC, layout.KEEP_MAC, WIRE, 0, port, 5, 77, 100)),
            (FlowKey(member, client, 8080, port, TCP),
             layout.Flow(packed(VIRTUAL), client, 80, port, CLIENT_MAC, VIRTUAL_MAC, WIRE, 1, port, 5, 77, 100))]
    tables.install(entries(flows[2000:2002]))
    results = tables.install(entries(flows))
    assert [index for index, result in enumerate(results) if result is not Result.OPENED] == [1000]
    assert results[1000] is Result.EXISTS
    for index in (0, 1, 2047, 2048, 5199):
        found = tables.lookup(flows[index][0])
        assert found is not None and astuple(found)[:10] == astuple(flows[index][1])[:10]
    pages: list[FlowKey] = []
    while page := tables.flows(1000, pages[-1] if pages else None):
        pages += [key for key, _ in page]
    assert sorted(map(astuple, pages)) == sorted(astuple(key) for key, _ in flows)


def test_a_full_table() -> None:
    require_programs()
    bench = Bench(max_connections=100)
    try:
        bench.serve(VIRTUAL, MEMBERS[:1])
        clients = [f"10.3.0.{index}" for index in range(150)]
        reasons: Counter[str] = Counter()
        for client in clients:
            hits = bench.counters()["hits"]
            kernel.run(bench.programs["wire"], frame(client, VIRTUAL))
            reasons["hit" if bench.counters()["hits"] > hits else "miss"] += 1
        assert reasons == {"hit": 100, "miss": 50}
        assert bench.counted() == {"hits": 100, "opened_here": 100, "miss_full": 50}
        assert len(bench.flows(1000)) == 200
        assert bench.connect(CLIENT, VIRTUAL, MEMBER) is Result.FULL
        assert bench.walk(frame(clients[0], VIRTUAL, flags=ACK)).destination == MEMBERS[0]
        assert bench.miss(frame("10.3.1.1", VIRTUAL)) == "full"
        bench.delete(serial=bench.flows(1)[0][1].serial)
        assert bench.walk(frame("10.3.1.1", VIRTUAL)).destination == MEMBERS[0]
    finally:
        bench.close()


def test_a_table_full_by_half_a_connection() -> None:
    """One direction fitted: it does not stay behind."""
    require_programs()
    bench = Bench(max_connections=2)
    try:
        bench.serve(VIRTUAL, MEMBERS[:1])
        bench.walk(frame("10.3.0.1", VIRTUAL))
        lonely = FlowKey(packed("10.9.9.9"), packed(VIRTUAL), 1, 1, TCP)
        assert bench._flows.update(lonely.pack(), bench.flows(1)[0][1].pack())
        assert bench.miss(frame("10.3.0.2", VIRTUAL)) == "full"
        assert len(bench.flows(10)) == 3
    finally:
        bench.close()


def test_serials_of_what_is_decided_here_are_marked(tables: Bench) -> None:
    tables.serve(VIRTUAL, MEMBERS)
    for index in range(4):
        tables.walk(frame(f"10.1.0.{index}", VIRTUAL))
    serials = sorted({flow.serial for _, flow in tables.flows(10)})
    assert len(serials) == 4 and all(serial >> 31 for serial in serials)
    assert all(one < other for one, other in pairwise(serials))
