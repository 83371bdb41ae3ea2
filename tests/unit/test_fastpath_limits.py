# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Limits on new connections, packet in, packet out: ``lbapp/dataflow/fastpath/limits.bpf.h``.

The programs look at the kernel's clock, which no test can set. So here a token costs hours, and time passes by what
lies in the buckets: a bucket that is full an hour earlier is the same bucket an hour later.
"""

from __future__ import annotations

import struct
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lbapp.config.model import UNLIMITED
from lbapp.control.buckets import SECOND, Buckets, Ration, Shape, mask, ration
from lbapp.control.statistics import Refusal
from lbapp.dataflow.fastpath import cookies, kernel, layout
from lbapp.dataflow.fastpath.cookies import Options
from lbapp.dataflow.fastpath.layout import Hash, Mode, Service, ServiceKey
from tests.fastpath_packets import (
    ACK,
    REDIRECT,
    RST,
    SHOT,
    SYN,
    TCP,
    UDP,
    Bench,
    frame,
    packed,
    read,
)

pytest_plugins = ["tests.fastpath_packets"]

HOUR = 3600 * SECOND
NUMBER = 5
FAMILIES = {4: ("10.0.0.1", "10.0.0.100", "10.0.1.7"), 6: ("fd00::1", "fd00::100", "fd01::7")}
CLIENT, VIRTUAL, MEMBER = FAMILIES[4]
BOTH = pytest.mark.parametrize("family", [4, 6])
KEYS = (bytes(range(16)), bytes(range(100, 116)))
PLAIN = Options(536, None, False)


def few(server: int = 0, client: int = 0, prefix: int = 32, size: int = 4) -> Ration:
    """So many at once, and then one an hour; 0: no limit."""
    return Ration(Shape(HOUR, server * HOUR) if server else None, Shape(HOUR, client * HOUR) if client else None,
                  mask(prefix, size))


def later(tables: Bench, by: int) -> None:
    """Let time pass for all buckets."""
    for name, size in (("rates", layout.RATE.size), ("clients", 8)):
        for key, value in list(tables.maps[name].items()):
            full = struct.unpack_from("=Q", value)[0]
            tables.maps[name].update(key, struct.pack("=Q", max(0, full - by)) + value[8:size])


def verdict(tables: Bench, data: bytes) -> str:
    """What became of a new connection's packet."""
    result, out, _ = kernel.run(tables.programs["wire"], data, room=len(data) + 256)
    if result == SHOT:
        return "dropped"
    assert result == REDIRECT
    if out == data:
        return "miss"
    seen = read(out)
    return "reset" if seen.flags & RST else "forwarded"


def opened(tables: Bench, ports: range, client: str = CLIENT, protocol: int = TCP, virtual: str = VIRTUAL) -> list[str]:
    return [verdict(tables, frame(client, virtual, protocol, port)) for port in ports]


# ------------------------------------------------------------------ decided here


@BOTH
def test_a_syn_beyond_the_limit_is_reset(tables: Bench, family: int) -> None:
    client, virtual, member = FAMILIES[family]
    tables.serve(virtual, [member], ration=few(server=3))
    assert opened(tables, range(1, 6), client, virtual=virtual) == ["forwarded"] * 3 + ["reset"] * 2
    assert tables.counted() == {"hits": 3, "opened_here": 3, "over_rate": 2, "reset_sent": 2}
    assert tables.refusals() == {NUMBER: (2, 0)}
    data = frame(client, virtual, sport=77, seq=0xFFFFFFFF, tcp_options=b"\x02\x04\x05\xb4\x01\x03\x03\x07")
    seen = tables.answered(data)
    assert (seen.source, seen.sport, seen.destination, seen.dport) == (virtual, 80, client, 77)
    assert (seen.flags, seen.seq, seen.ack, seen.window, seen.payload) == (RST | ACK, 0, 0, 0, b"")
    assert len(kernel.run(tables.programs["wire"], data, room=256)[1]) <= len(data), "no more bytes than came"
    assert len(tables.flows(100)) == 6


def test_established_connections_need_no_token(tables: Bench) -> None:
    tables.serve(VIRTUAL, [MEMBER], ration=few(server=1))
    assert opened(tables, range(1, 3)) == ["forwarded", "reset"]
    full = tables.maps["rates"].lookup(NUMBER.to_bytes(4, "little"))
    for _ in range(10):
        tables.walk(frame(CLIENT, VIRTUAL, sport=1, flags=ACK, payload=b"x"))
        tables.walk(frame(MEMBER, CLIENT, TCP, 8080, 1, flags=ACK))
        tables.walk(frame(CLIENT, VIRTUAL, sport=1, flags=SYN))
    assert tables.maps["rates"].lookup(NUMBER.to_bytes(4, "little")) == full
    # The same port again, after its end, is a new connection.
    tables.walk(frame(CLIENT, VIRTUAL, sport=1, flags=RST))
    assert opened(tables, range(1, 2)) == ["reset"]


def test_udp_beyond_the_limit_is_dropped(tables: Bench) -> None:
    tables.serve(VIRTUAL, [MEMBER], protocol=UDP, ration=few(server=2))
    assert opened(tables, range(1, 5), protocol=UDP) == ["forwarded"] * 2 + ["dropped"] * 2
    assert tables.counted() == {"hits": 2, "opened_here": 2, "over_rate": 2}


@pytest.mark.parametrize("client", ["224.0.0.1", "0.0.0.5"])
def test_who_cannot_be_answered_is_not(tables: Bench, client: str) -> None:
    tables.serve(VIRTUAL, [MEMBER], ration=ration(0, 0, UNLIMITED, 0, mask(32, 4)))
    assert opened(tables, range(1, 2), client) == ["dropped"]
    assert verdict(tables, frame(CLIENT, VIRTUAL, fragment=1, payload=bytes(32))) == "dropped"


def test_tokens_come_back_with_time(tables: Bench) -> None:
    tables.serve(VIRTUAL, [MEMBER], ration=few(server=2))
    assert opened(tables, range(1, 4)) == ["forwarded"] * 2 + ["reset"]
    later(tables, HOUR // 2)
    assert opened(tables, range(11, 12)) == ["reset"]
    later(tables, HOUR // 2)
    assert opened(tables, range(21, 23)) == ["forwarded", "reset"]
    later(tables, 50 * HOUR)
    assert opened(tables, range(31, 34)) == ["forwarded"] * 2 + ["reset"], "never more than fit in"


def test_the_clock_is_the_kernels(tables: Bench) -> None:
    """Between two looks at the same clock from outside; and it is in the unit that the shapes are in."""
    tables.serve(VIRTUAL, [MEMBER], ration=few(server=5))
    before = time.monotonic_ns() << 4
    assert opened(tables, range(1, 2)) == ["forwarded"]
    after = time.monotonic_ns() << 4
    full = layout.RATE.unpack(tables.maps["rates"].lookup(NUMBER.to_bytes(4, "little")) or b"")[0]
    assert before + HOUR <= full <= after + HOUR


def test_a_rate_in_real_time(tables: Bench) -> None:
    """Asked without a pause for a while: what was there, and what was made meanwhile, give or take what a slow machine
    does not get round to ask for."""
    tables.serve(VIRTUAL, [MEMBER], ration=ration(2000, 100, UNLIMITED, 0, mask(32, 4)))
    begun, got, asked = time.monotonic(), 0, 0
    while time.monotonic() - begun < 0.5:
        asked += 1
        got += opened(tables, range(asked, asked + 1))[0] == "forwarded"
    took = time.monotonic() - begun
    assert got <= 100 + 2000 * took + 1
    assert got >= min(asked, 100)


def test_processors_that_race_get_no_more_than_there_is(tables: Bench) -> None:
    """Threads of this process, whose packets the kernel lets walk at the same time where it has processors for them."""
    tables.serve(VIRTUAL, [MEMBER], ration=few(server=300, client=200, prefix=24))
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda index: opened(tables, range(1, 301), f"10.1.{index % 2}.{index}"), range(4)))
    seen = Counter(one for some in found for one in some)
    assert seen["forwarded"] + seen["reset"] == 1200
    assert 290 <= seen["forwarded"] <= 300
    assert sum(tables.refusals()[NUMBER]) == seen["reset"]


# ------------------------------------------------------------------ clients' networks


def test_one_network_does_not_take_the_others_tokens(tables: Bench) -> None:
    tables.serve(VIRTUAL, [MEMBER], ration=few(server=6, client=2, prefix=24))
    assert opened(tables, range(1, 101), "10.1.1.1").count("forwarded") == 2
    assert opened(tables, range(1, 4), "10.1.1.200") == ["reset"] * 3, "of the same network"
    for other in range(2):
        assert opened(tables, range(1, 4), f"10.1.{other + 2}.9") == ["forwarded"] * 2 + ["reset"]
    # The virtual server has none left: that is nothing that a client has had.
    assert opened(tables, range(1, 6), "10.1.9.9") == ["reset"] * 5
    assert tables.refusals() == {NUMBER: (5, 103)}
    assert tables.counted()["over_client"] == 103
    for _ in range(2):
        later(tables, HOUR)
        assert opened(tables, range(7, 9), "10.1.9.9") == ["forwarded", "reset"]
        tables.maps["flows"].delete_all([key for key, _ in tables.maps["flows"].items()])


def test_networks_of_ipv6(tables: Bench) -> None:
    _, virtual, member = FAMILIES[6]
    tables.serve(virtual, [member], ration=few(client=1, prefix=56, size=16))
    seen = [opened(tables, range(1, 2), one, virtual=virtual)[0] for one in
            ("fd00:0:0:1::1", "fd00:0:0:ff::2", "fd00:0:0:100::1", "fd00:0:0:1ff::1", "fd01::1")]
    assert seen == ["forwarded", "reset", "forwarded", "reset", "forwarded"]
    assert {layout.CLIENT_KEY.unpack(key)[1] for key, _ in tables.maps["clients"].items()} == {
        packed("fd00::"), packed("fd00:0:0:100::"), packed("fd01::")}


def test_two_virtual_servers_have_buckets_of_their_own(tables: Bench) -> None:
    tables.serve(VIRTUAL, [MEMBER], ration=few(server=1, client=1))
    tables.serve("10.0.0.101", [MEMBER], ration=few(server=1, client=1), number=6, first=9)
    assert opened(tables, range(1, 3)) == ["forwarded", "reset"]
    assert opened(tables, range(11, 13), virtual="10.0.0.101") == ["forwarded", "reset"]
    assert tables.refusals() == {5: (0, 1), 6: (0, 1)}


def test_a_flood_of_networks_is_bounded(tables: Bench) -> None:
    """More than are remembered: the virtual server's own limit holds all the same."""
    tables.serve(VIRTUAL, [MEMBER], ration=few(server=10, client=1))
    most = tables.maps["clients"].max_entries
    got = 0
    for index in range(most + 3000):
        got += opened(tables, range(1, 2), f"10.{1 + (index >> 16)}.{index >> 8 & 255}.{index & 255}") == ["forwarded"]
    assert got == 10
    assert len(list(tables.maps["clients"].items())) <= most


# ------------------------------------------------------------------ asked about


def test_a_query_takes_a_token(tables: Bench) -> None:
    tables.serve(VIRTUAL, [], mode=Mode.PUNT, ration=few(server=2))
    assert opened(tables, range(1, 5)) == ["dropped"] * 2 + ["reset"] * 2
    assert tables.counted() == {"queries": 2, "over_rate": 2, "reset_sent": 2}
    assert len(tables.queries()) == 2


def test_a_udp_flow_takes_one_token_until_it_is_answered(tables: Bench) -> None:
    tables.serve(VIRTUAL, [], mode=Mode.PUNT, protocol=UDP, ration=few(server=1))
    for _ in range(5):
        assert opened(tables, range(1, 2), protocol=UDP) == ["dropped"]
    assert tables.counted() == {"queries": 5}
    assert opened(tables, range(2, 3), protocol=UDP) == ["dropped"]
    assert tables.counted() == {"over_rate": 1}
    key = layout.FlowKey(packed(CLIENT), packed(VIRTUAL), 1, 80, UDP).pack()
    since = struct.unpack("=I", tables.maps["lately"].lookup(key) or b"")[0]
    tables.maps["lately"].update(key, struct.pack("=I", since - layout.ticks(3100) & 0xFFFFFFFF))
    assert opened(tables, range(1, 2), protocol=UDP) == ["dropped"]
    assert tables.counted() == {"over_rate": 1}, "nobody answered for three seconds: it is asked about anew"


@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_what_goes_into_the_switch_gets_its_token_back(tables: Bench, protocol: int) -> None:
    tables.serve(VIRTUAL, [MEMBER], slots=(9,), protocol=protocol, ration=few(server=1, client=1))
    assert opened(tables, range(1, 6), protocol=protocol) == ["miss"] * 5
    tables.serve(VIRTUAL, [], mode=Mode.PUNT, protocol=protocol, ration=few(server=1, client=1))
    for port in range(1, 6):
        assert tables.miss(frame(CLIENT, VIRTUAL, protocol, port, payload=bytes(3000))) == "query"
    assert list(tables.maps["lately"].items()) == []
    assert opened(tables, range(1, 3), protocol=protocol) == ["dropped", "reset" if protocol == TCP else "dropped"]
    assert tables.refusals() == {NUMBER: (0, 1)}


def test_without_a_mode_that_opens_nothing_is_taken(tables: Bench) -> None:
    tables.serve(VIRTUAL, [MEMBER], mode=Mode.PASS, ration=few(server=1))
    assert opened(tables, range(1, 4)) == ["miss"] * 3
    assert tables.refusals() == {NUMBER: (0, 0)}


# ------------------------------------------------------------------ proxied handshakes


def said(client: str, virtual: str, port: int, payload: bytes = b"GET / HTTP/1.1\r\n\r\n", isn: int = 999) -> bytes:
    made = cookies.make(KEYS, 0, packed(client), port, isn, PLAIN)
    return frame(client, virtual, sport=port, flags=ACK, payload=payload, seq=isn + 1, ack=made + 1 & 0xFFFFFFFF)


def proxied(tables: Bench, virtual: str, rationed: Ration) -> None:
    tables.set_cookies(KEYS, 0)
    tables.set_services({ServiceKey(packed(virtual), 80, TCP): Service(
        NUMBER, Mode.PROXY, Hash.TURN, 100, (), 1400, 9, True, rationed)})


@BOTH
def test_a_handshake_takes_no_token_but_its_first_data_does(tables: Bench, family: int) -> None:
    client, virtual, _ = FAMILIES[family]
    proxied(tables, virtual, few(server=2, client=2, prefix=32 if family == 4 else 64, size=4 if family == 4 else 16))
    for port in range(1, 101):
        assert tables.answered(frame(client, virtual, sport=port)).flags == SYN | ACK
        verdict(tables, frame(client, virtual, sport=port, flags=ACK, payload=b"forged", ack=port))
    assert tables.refusals() == {NUMBER: (0, 0)} and list(tables.maps["clients"].items()) == []
    assert [verdict(tables, said(client, virtual, port)) for port in (1, 2, 3)] == ["dropped", "dropped", "reset"]
    assert verdict(tables, said(client, virtual, 1)) == "dropped", "the same once more: it has its token"
    assert tables.refusals() == {NUMBER: (0, 1)}
    assert len(tables.queries()) == 3
    seen = tables.answered(said(client, virtual, 4))
    made = cookies.make(KEYS, 0, packed(client), 4, 999, PLAIN)
    assert (seen.flags, seen.seq, seen.ack, seen.window) == (RST, made + 1 & 0xFFFFFFFF, 0, 0)


def test_a_full_ring_gives_the_token_back(tables: Bench) -> None:
    proxied(tables, VIRTUAL, few(server=5000))
    port = 0
    while not tables.drop(said(CLIENT, VIRTUAL, port := port + 1, bytes(3000))).get("ask_lost"):
        pass
    taken = port - 1
    for _ in range(20):
        assert tables.drop(said(CLIENT, VIRTUAL, port, bytes(3000))) == {"ask_lost": 1}
    full = layout.RATE.unpack(tables.maps["rates"].lookup(NUMBER.to_bytes(4, "little")) or b"")[0]
    assert round((full - (time.monotonic_ns() << 4)) / HOUR) == taken


# ------------------------------------------------------------------ what it is told


def test_a_change_keeps_the_buckets(tables: Bench) -> None:
    tables.serve(VIRTUAL, [MEMBER], ration=few(server=2, client=2))
    assert opened(tables, range(1, 4)) == ["forwarded"] * 2 + ["reset"]
    tables.serve(VIRTUAL, [MEMBER, "10.0.1.8"], ration=few(server=2, client=2))
    assert opened(tables, range(4, 5)) == ["reset"], "another member is no reason to begin anew"
    tables.serve(VIRTUAL, [MEMBER])
    assert opened(tables, range(5, 15)) == ["forwarded"] * 10
    tables.serve(VIRTUAL, [MEMBER], ration=few(server=3))
    assert opened(tables, range(15, 17)) == ["forwarded", "reset"]
    assert tables.refusals() == {NUMBER: (1, 2)}


def test_a_virtual_server_that_goes_takes_its_bucket_along(tables: Bench) -> None:
    key = tables.serve(VIRTUAL, [MEMBER], ration=few(server=1))
    tables.set_services({key: None})
    assert tables.refusals() == {}
    key = tables.serve(VIRTUAL, [MEMBER], ration=few(server=1))
    moved = ServiceKey(packed("10.0.0.101"), 80, TCP)
    tables.set_services({key: None, moved: Service(NUMBER, Mode.DECIDE, Hash.TURN, 100, (1,), ration=few(server=1))})
    assert tables.refusals() == {NUMBER: (0, 0)}, "the same one, at another address"


# ------------------------------------------------------------------ the twin

STEPS = st.lists(st.tuples(st.sampled_from(["10.1.0.1", "10.1.0.2", "10.1.1.1", "10.2.0.1"]), st.integers(0, 3)),
                 min_size=1, max_size=60)


@pytest.fixture(scope="module")
def twins(loaded: Bench) -> Iterator[Bench]:
    yield loaded


@given(STEPS, st.one_of(st.none(), st.integers(0, 6)), st.one_of(st.none(), st.integers(0, 3)),
       st.sampled_from([8, 16, 24, 32]), st.sampled_from([TCP, UDP]))
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_the_control_segment_would_have_said_the_same(twins: Bench, steps: list[tuple[str, int]], server: int | None,
                                                      client: int | None, prefix: int, protocol: int) -> None:
    """Trains of packets with pauses of half hours, which real time does not come near."""
    shapes = [None if most is None else Shape(HOUR, most * HOUR) for most in (server, client)]
    rationed = Ration(shapes[0], shapes[1], mask(prefix, 4)) if server is not None or client is not None else None
    twins.reset()
    twins.serve(VIRTUAL, [MEMBER], protocol=protocol, ration=rationed)
    twin, passed = Buckets(), 0
    counts = {Refusal.RATE: 0, Refusal.CLIENT_RATE: 0}
    for port, (source, halves) in enumerate(steps, 1):
        later(twins, halves * HOUR // 2)
        passed += halves * HOUR // 2
        over = twin.take(NUMBER, rationed, packed(source), passed + 10**15) if rationed is not None else None
        if over is not None:
            counts[over] += 1
        expected = "forwarded" if over is None else "reset" if protocol == TCP else "dropped"
        assert verdict(twins, frame(source, VIRTUAL, protocol, port)) == expected, (port, source)
    assert twins.refusals() == ({NUMBER: tuple(counts.values())} if rationed is not None else {})

