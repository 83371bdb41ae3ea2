# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Packet in, packet out: translation, checksums, and what goes into the switch untouched.

Programs: ``lbapp/dataflow/fastpath/fastpath.bpf.c`` wire, again, out.
"""

from __future__ import annotations

import struct
from typing import Any

import pytest

from lbapp.dataflow.fastpath import kernel, layout
from lbapp.dataflow.fastpath.layout import FlowKey
from lbapp.dataflow.pipeline import VIRTUAL_MAC
from tests.fastpath_packets import (
    ACK,
    CHECKSUM_COMPLETE,
    CLIENT_MAC,
    FAMILIES,
    FIN,
    MEMBER_MAC,
    PASS,
    REDIRECT,
    SHOT,
    SYN,
    TCP,
    UDP,
    WIRE,
    Bench,
    frame,
    packed,
    run_marked,
    segment,
    wrap,
)

pytest_plugins = ["tests.fastpath_packets"]

EVERY = pytest.mark.parametrize(("family", "protocol"), [(4, TCP), (4, UDP), (6, TCP), (6, UDP)],
                                ids=["tcp4", "udp4", "tcp6", "udp6"])
HOSTS: dict[str, Any] = {"eth_dst": VIRTUAL_MAC, "eth_src": MEMBER_MAC}


@EVERY
@pytest.mark.parametrize("size", [0, 1, 7, 1000, 1400])
def test_inbound(tables: Bench, family: int, protocol: int, size: int) -> None:
    client, virtual, member = FAMILIES[family]
    tables.connect(client, virtual, member, protocol)
    seen = tables.walk(frame(client, virtual, protocol, flags=ACK, payload=b"\xa5" * size))
    assert (seen.source, seen.destination, seen.sport, seen.dport) == (client, member, 40000, 8080)
    assert (seen.eth_dst, seen.eth_src, seen.ttl) == (MEMBER_MAC, CLIENT_MAC, 64)
    assert seen.payload == b"\xa5" * size


@EVERY
def test_return(tables: Bench, family: int, protocol: int) -> None:
    client, virtual, member = FAMILIES[family]
    tables.connect(client, virtual, member, protocol)
    seen = tables.walk(frame(member, client, protocol, 8080, 40000, flags=ACK, payload=b"answer", **HOSTS))
    assert (seen.source, seen.destination, seen.sport, seen.dport) == (virtual, client, 80, 40000)
    assert (seen.eth_dst, seen.eth_src, seen.ttl) == (CLIENT_MAC, VIRTUAL_MAC, 64)
    assert seen.payload == b"answer"


@EVERY
def test_without_translation_of_the_address_or_of_the_port(tables: Bench, family: int, protocol: int) -> None:
    client, virtual, member = FAMILIES[family]
    tables.connect(client, virtual, virtual, protocol, mport=80)
    seen = tables.walk(frame(client, virtual, protocol, flags=ACK))
    assert (seen.destination, seen.dport, seen.eth_dst) == (virtual, 80, MEMBER_MAC)
    tables.reset()
    tables.connect(client, virtual, member, protocol, mport=80)
    assert tables.walk(frame(client, virtual, protocol, flags=ACK)).dport == 80


@EVERY
@pytest.mark.parametrize("ttl", [2, 64, 255])
def test_a_router_decrements_the_ttl(tables: Bench, family: int, protocol: int, ttl: int) -> None:
    client, virtual, member = FAMILIES[family]
    tables.connect(client, virtual, member, protocol, state=layout.ROUTED)
    seen = tables.walk(frame(client, virtual, protocol, flags=ACK, ttl=ttl))
    assert (seen.ttl, seen.eth_src, seen.eth_dst) == (ttl - 1, VIRTUAL_MAC, MEMBER_MAC)
    assert tables.walk(frame(member, client, protocol, 8080, 40000, flags=ACK, ttl=ttl, **HOSTS)).ttl == ttl - 1


@EVERY
@pytest.mark.parametrize("ttl", [0, 1])
def test_a_router_forwards_nothing_whose_ttl_has_run_out(tables: Bench, family: int, protocol: int, ttl: int) -> None:
    client, virtual, member = FAMILIES[family]
    tables.connect(client, virtual, member, protocol, state=layout.ROUTED)
    assert tables.miss(frame(client, virtual, protocol, flags=ACK, ttl=ttl)) == "ttl"
    tables.reset()
    tables.connect(client, virtual, member, protocol)
    assert tables.walk(frame(client, virtual, protocol, flags=ACK, ttl=max(ttl, 1))).ttl == 1


@EVERY
def test_every_carry_of_the_checksum(tables: Bench, family: int, protocol: int) -> None:
    """Incremental checksums go wrong at their edges: walk through many values of the sum."""
    client, virtual, member = FAMILIES[family]
    tables.connect(client, virtual, member, protocol, state=layout.ROUTED)
    for value in (*range(0, 0x10000, 4099), 0xFFFF, 0xFFFE, 0x8000, 0x7FFF):
        tables.walk(frame(client, virtual, protocol, flags=ACK, payload=struct.pack("!H", value), tos=value & 0xFF))


@EVERY
def test_what_a_card_summed_up_stays_true(tables: Bench, family: int, protocol: int) -> None:
    """CHECKSUM_COMPLETE: the kernel itself compares after the run."""
    client, virtual, member = FAMILIES[family]
    tables.connect(client, virtual, member, protocol, state=layout.ROUTED)
    data = frame(client, virtual, protocol, flags=ACK, payload=b"abcdefg")
    try:
        verdict, _, _ = kernel.run(tables.programs["wire"], data, room=256, flags=CHECKSUM_COMPLETE)
    except kernel.KernelError as error:
        if error.errno == 22:
            pytest.skip("this kernel cannot test it")
        raise
    assert verdict == REDIRECT
    assert tables.counted()["hits"] == 1


def test_a_wrong_checksum_stays_wrong(tables: Bench) -> None:
    """It must not be made whole on the way: the receiver is to notice."""
    client, virtual, member = FAMILIES[4]
    tables.connect(client, virtual, member)
    good = tables.walk(frame(client, virtual, flags=ACK, payload=b"x"))
    bad = frame(client, virtual, flags=ACK, payload=b"y", checksum=0x1234)
    seen = tables.walk(bad, verify=False)
    with pytest.raises(AssertionError, match="checksum"):
        tables.walk(bad)
    assert seen.payload == b"y" and good.payload == b"x"


def test_a_wrong_header_checksum_stays_wrong(tables: Bench) -> None:
    client, virtual, member = FAMILIES[4]
    tables.connect(client, virtual, member)
    with pytest.raises(AssertionError, match="header checksum"):
        tables.walk(frame(client, virtual, flags=ACK, check=0x1111))


def test_udp_without_a_checksum_stays_without(tables: Bench) -> None:
    client, virtual, member = FAMILIES[4]
    tables.connect(client, virtual, member, UDP)
    assert tables.walk(frame(client, virtual, UDP, checksum=0, payload=b"data")).checksum == 0


@pytest.mark.parametrize("family", [4, 6])
def test_a_udp_checksum_never_becomes_0(tables: Bench, family: int) -> None:
    """0 would say that there is none: the sum 0 is written as 0xffff (RFC 768)."""
    client, virtual, member = FAMILIES[family]
    tables.connect(client, virtual, member, UDP, mport=80)
    found = False
    base = frame(client, member, UDP, 40000, 80, payload=b"\0\0")
    sum_without = struct.unpack_from("!H", base, len(base) - 4)[0]
    for value in range(sum_without - 2, sum_without + 3):
        seen = tables.walk(frame(client, virtual, UDP, payload=struct.pack("!H", value & 0xFFFF)))
        assert seen.checksum != 0
        found = found or seen.checksum == 0xFFFF
    assert found, "the edge was not met"


def test_counters_of_a_flow(tables: Bench) -> None:
    client, virtual, member = FAMILIES[4]
    tables.connect(client, virtual, member)
    data = frame(client, virtual, flags=ACK, payload=b"x" * 100)
    for _ in range(3):
        tables.walk(data)
    flow = tables.lookup(FlowKey(packed(client), packed(virtual), 40000, 80, TCP))
    back = tables.lookup(FlowKey(packed(member), packed(client), 8080, 40000, TCP))
    assert flow is not None and back is not None
    assert (flow.packets, flow.bytes, back.packets) == (3, 3 * len(data), 0)
    assert flow.state & layout.ESTABLISHED and not back.state & layout.ESTABLISHED


# ------------------------------------------------------------------ what is not ours

ONE, OTHER = FAMILIES[4][0], FAMILIES[4][1]
ONE6, OTHER6 = FAMILIES[6][0], FAMILIES[6][1]
TAG = b"\x81\x00\x00\x05"


def _tagged(data: bytes) -> bytes:
    return data[:12] + TAG + data[12:]


def _extension(data: bytes, kind: int) -> bytes:
    """An IPv6 frame with an extension header in front of its payload."""
    length = struct.unpack_from("!H", data, 18)[0] + 8
    return (data[:18] + struct.pack("!H", length) + bytes([kind]) + data[21:54] + bytes([data[20], 0, 1, 4, 0, 0, 0, 0])
            + data[54:])


MISSES = {
    "arp": (bytes(6) + CLIENT_MAC + b"\x08\x06" + bytes(28), "other"),
    "length field instead of a type": (VIRTUAL_MAC + CLIENT_MAC + b"\x00\x2e" + bytes(46), "other"),
    "icmp": (wrap(ONE, OTHER, 1, bytes(8)), "other"),
    "icmpv6": (wrap(ONE6, OTHER6, 58, bytes(8)), "other"),
    "sctp": (wrap(ONE, OTHER, 132, bytes(12)), "other"),
    "multicast": (frame(ONE, OTHER, flags=ACK, eth_dst=bytes.fromhex("01005e000001")), "other"),
    "broadcast": (frame(ONE, OTHER, flags=ACK, eth_dst=b"\xff" * 6), "other"),
    "mapped in IPv6": (frame("::ffff:10.0.0.1", "::ffff:10.0.0.100", flags=ACK), "other"),
    "tagged": (_tagged(frame(ONE, OTHER, flags=ACK)), "other"),
    "options": (frame(ONE, OTHER, flags=ACK, options=b"\x94\x04\0\0"), "options"),
    "header of 16 bytes": (frame(ONE, OTHER, flags=ACK)[:14] + b"\x44" + frame(ONE, OTHER, flags=ACK)[15:], "options"),
    "hop-by-hop": (_extension(frame(ONE6, OTHER6, flags=ACK), 0), "options"),
    "routing": (_extension(frame(ONE6, OTHER6, flags=ACK), 43), "options"),
    "destination options": (_extension(frame(ONE6, OTHER6, flags=ACK), 60), "options"),
    "longer than the frame": (frame(ONE, OTHER, flags=ACK, length=41), "malformed"),
    "shorter than a header": (frame(ONE, OTHER, flags=ACK, length=19), "malformed"),
    "too short for TCP": (frame(ONE, OTHER, flags=ACK, length=39), "malformed"),
    "IPv6 longer than the frame": (frame(ONE6, OTHER6, flags=ACK, length=21), "malformed"),
    "IPv6 too short for TCP": (frame(ONE6, OTHER6, flags=ACK, length=19), "malformed"),
    "IPv6 that says 4": (frame(ONE6, OTHER6)[:14] + b"\x40" + frame(ONE6, OTHER6)[15:], "malformed"),
    "doff 4": (frame(ONE, OTHER, flags=ACK, doff=4), "malformed"),
    "doff 0": (frame(ONE, OTHER, flags=ACK, doff=0), "malformed"),
    "doff beyond the packet": (frame(ONE, OTHER, flags=ACK, doff=6)[:-4], "malformed"),
    "udp length too long": (frame(ONE, OTHER, UDP, payload=b"abc", udp_length=12), "malformed"),
    "udp length too short": (frame(ONE, OTHER, UDP, payload=b"abc", udp_length=10), "malformed"),
    "udp length below its header": (frame(ONE, OTHER, UDP, payload=b"abc", udp_length=7), "malformed"),
    "source port 0": (frame(ONE, OTHER, sport=0, flags=ACK), "malformed"),
    "destination port 0": (frame(ONE, OTHER, dport=0, flags=ACK), "malformed"),
    "cut in TCP": (frame(ONE, OTHER, flags=ACK)[:50], "malformed"),
    "unknown flow": (frame("10.0.0.2", OTHER, flags=ACK), "flow"),
    "no virtual server": (frame("10.0.0.2", OTHER, flags=SYN), "service"),
    "no virtual server, UDP": (frame("10.0.0.2", OTHER, UDP), "service"),
}


@pytest.mark.parametrize(("data", "reason"), MISSES.values(), ids=MISSES)
def test_goes_into_the_switch_untouched(tables: Bench, data: bytes, reason: str) -> None:
    """Whatever its addresses say: here they are those of connections that are there."""
    for family, protocol in ((4, TCP), (4, UDP), (6, TCP), (6, UDP)):
        client, virtual, member = FAMILIES[family]
        assert tables.connect(client, virtual, member, protocol) is layout.Result.OPENED
    assert tables.miss(data) == reason
    assert not any(flow.packets for _, flow in tables.flows(100))


def test_trailing_bytes_of_a_short_frame_are_left_alone(tables: Bench) -> None:
    """Ethernet pads to 60 bytes."""
    client, virtual, member = FAMILIES[4]
    tables.connect(client, virtual, member)
    seen = tables.walk(frame(client, virtual, flags=ACK) + b"\xee" * 6)
    assert seen.payload == b""


def test_every_tcp_option_passes(tables: Bench) -> None:
    client, virtual, member = FAMILIES[4]
    tables.connect(client, virtual, member)
    seen = tables.walk(frame(client, virtual, flags=ACK, doff=15, payload=b"after"))
    assert seen.payload == b"after"


# ------------------------------------------------------------------ fragments


def _fragments(client: str, virtual: str, protocol: int, payload: bytes, cut: int, **ip: Any) -> list[bytes]:
    body = segment(client, virtual, protocol, flags=ACK, payload=payload)
    return [wrap(client, virtual, protocol, body[:cut], fragment=1, **ip),
            wrap(client, virtual, protocol, body[cut:], fragment=cut, **ip)]


@EVERY
def test_fragments(tables: Bench, family: int, protocol: int) -> None:
    """Put together again, they are the translated packet, with a whole checksum."""
    client, virtual, member = FAMILIES[family]
    tables.connect(client, virtual, member, protocol, state=layout.ROUTED)
    payload = bytes(range(256)) * 4
    outs = []
    for one in _fragments(client, virtual, protocol, payload, 512):
        verdict, out, _ = kernel.run(tables.programs["wire"], one, room=2048)
        assert verdict == REDIRECT
        outs.append(out)
    assert tables.counted()["hits"] == 2
    start = 34 if family == 4 else 62
    body = b"".join(out[start:] for out in outs)
    whole = frame(client, member, protocol, 40000, 8080, flags=ACK, payload=payload, eth_dst=MEMBER_MAC,
                  eth_src=VIRTUAL_MAC, ttl=63)
    assert body == whole[34 if family == 4 else 54:]
    for out in outs:
        assert out[:12] == MEMBER_MAC + VIRTUAL_MAC
        if family == 4:
            assert out[26:34] == packed(client) + packed(member) and out[22] == 63
            head = struct.unpack("!10H", out[14:34])
            total = sum(head)
            assert (total & 0xFFFF) + (total >> 16) == 0xFFFF
        else:
            assert out[22:54] == packed(client) + packed(member) and out[21] == 63


@EVERY
def test_a_later_fragment_before_the_first_one(tables: Bench, family: int, protocol: int) -> None:
    client, virtual, member = FAMILIES[family]
    tables.connect(client, virtual, member, protocol)
    first, later = _fragments(client, virtual, protocol, bytes(1000), 512)
    assert tables.miss(later) == "fragment"
    assert kernel.run(tables.programs["wire"], first, room=2048)[0] == REDIRECT
    assert tables.counted() == {"hits": 1, "miss_fragment": 1, "opened_installed": 1}


def test_a_later_fragment_of_another_packet(tables: Bench) -> None:
    client, virtual, member = FAMILIES[4]
    tables.connect(client, virtual, member, UDP)
    first, _ = _fragments(client, virtual, UDP, bytes(1000), 512, identification=1)
    _, other = _fragments(client, virtual, UDP, bytes(1000), 512, identification=2)
    kernel.run(tables.programs["wire"], first, room=2048)
    assert tables.miss(other) == "fragment"


def test_an_identification_used_again_by_a_packet_that_is_not_ours(tables: Bench) -> None:
    """Its fragments must not be translated as those of the one before."""
    client, virtual, member = FAMILIES[4]
    tables.connect(client, virtual, member, UDP)
    first, _ = _fragments(client, virtual, UDP, bytes(1000), 512)
    kernel.run(tables.programs["wire"], first, room=2048)
    body = segment(client, virtual, UDP, 5, 9, payload=bytes(1000))
    assert tables.miss(wrap(client, virtual, UDP, body[:512], fragment=1)) == "service"
    assert tables.miss(wrap(client, virtual, UDP, body[512:], fragment=512)) == "fragment"


def test_a_fragment_that_would_overwrite_the_header(tables: Bench) -> None:
    """RFC 1858: somebody who has read the first fragment must not be deceived by the second."""
    client, virtual, member = FAMILIES[4]
    tables.connect(client, virtual, member)
    body = segment(client, virtual, TCP, flags=ACK, payload=bytes(100))
    assert kernel.run(tables.programs["wire"], wrap(client, virtual, TCP, body[:48], fragment=1), room=256)[0]
    assert tables.miss(wrap(client, virtual, TCP, body[8:], fragment=8)) == "malformed"
    assert tables.miss(wrap(client, virtual, TCP, body[:16], fragment=1, identification=8)) == "malformed"


def test_an_old_first_fragment_is_forgotten(tables: Bench) -> None:
    client, virtual, member = FAMILIES[4]
    tables.connect(client, virtual, member, UDP)
    first, later = _fragments(client, virtual, UDP, bytes(1000), 512)
    kernel.run(tables.programs["wire"], first, room=2048)
    known = tables.maps["fragments"]
    ((key, value),) = known.items()
    seen = struct.unpack_from("=I", value, len(value) - 4)[0]
    known.update(key, value[:-4] + struct.pack("=I", (seen - 5000) & 0xFFFFFFFF))
    assert tables.miss(later) == "fragment"


def test_an_atomic_fragment(tables: Bench) -> None:
    """IPv6: a fragment header on a whole packet (RFC 6946)."""
    client, virtual, member = FAMILIES[6]
    tables.connect(client, virtual, member, UDP)
    body = segment(client, virtual, UDP, payload=b"whole")
    assert tables.walk(wrap(client, virtual, UDP, body, fragment=0)).payload == b"whole"


def test_a_fin_in_a_first_fragment_counts(tables: Bench) -> None:
    client, virtual, member = FAMILIES[4]
    tables.connect(client, virtual, member)
    body = segment(client, virtual, TCP, flags=ACK | FIN, payload=bytes(100))
    kernel.run(tables.programs["wire"], wrap(client, virtual, TCP, body[:48], fragment=1), room=256)
    flow = tables.lookup(FlowKey(packed(client), packed(virtual), 40000, 80, TCP))
    assert flow is not None and flow.state & layout.FIN


# ------------------------------------------------------------------ where it goes


def test_a_wire_that_nobody_told_of(tables: Bench) -> None:
    """While it is set up or taken down, nobody but the switch must see its frames: here nobody does."""
    index = WIRE.to_bytes(4, "little")
    tables.maps["inner"].delete(index)
    try:
        data = frame(ONE, OTHER, flags=ACK)
        verdict, _, _ = kernel.run(tables.programs["wire"], data, room=256)
        assert verdict == SHOT
        assert tables.counted() == {"miss_flow": 1, "shot": 1}
    finally:
        tables.maps["inner"].update(index, index)


def test_a_switch_that_reads_the_wire_itself(tables: Bench) -> None:
    """Open vSwitch's kernel datapath needs no pair: a miss passes."""
    index = WIRE.to_bytes(4, "little")
    tables.maps["inner"].update(index, bytes(4))
    try:
        data = frame(ONE, OTHER, flags=ACK)
        verdict, out, _ = kernel.run(tables.programs["wire"], data, room=256)
        assert (verdict, out) == (PASS, data)
    finally:
        tables.maps["inner"].update(index, index)


def test_again_knows_the_wire_by_the_mark(tables: Bench) -> None:
    client, virtual, member = FAMILIES[4]
    tables.connect(client, virtual, member)
    data = frame(client, virtual, flags=ACK)
    verdict, out = run_marked(tables, data, WIRE)
    assert verdict == REDIRECT and out[30:34] == packed(member)
    verdict, out = run_marked(tables, frame("10.0.0.9", virtual, flags=ACK), WIRE)
    assert verdict == REDIRECT and out[30:34] == packed(virtual)
    verdict, _ = run_marked(tables, frame("10.0.0.9", virtual, flags=ACK), 4711)
    assert verdict == SHOT


def test_out_leads_to_the_wire(tables: Bench) -> None:
    data = frame(ONE, OTHER, flags=ACK)
    assert kernel.run(tables.programs["out"], data, room=256)[0] == SHOT
    tables.maps["outer"].update(WIRE.to_bytes(4, "little"), WIRE.to_bytes(4, "little"))
    try:
        verdict, out, _ = kernel.run(tables.programs["out"], data, room=256)
        assert (verdict, out) == (REDIRECT, data)
    finally:
        tables.maps["outer"].delete(WIRE.to_bytes(4, "little"))
