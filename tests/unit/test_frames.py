# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Frames against Ryu's packet library."""

from __future__ import annotations

import contextlib
import struct

import netaddr
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ryu.lib.packet import arp, ethernet, icmp, icmpv6, ipv4, ipv6, packet, packet_utils, tcp

from lbapp.control.messages import FlowSignature, Host
from lbapp.dataflow import frames
from tests.fake_frames import build, frame, mac_number, parse, transport

MAC = bytes.fromhex("026c62000001")
PAIRS = [("10.0.0.1", "10.0.0.100"), ("fd00::1", "fd00::100")]
protocols = pytest.mark.parametrize("protocol", [6, 17])
families = pytest.mark.parametrize("pair", PAIRS)


def decoded(data: bytes) -> packet.Packet:
    return packet.Packet(data)


def partial(data: bytes) -> bytes:
    """The frame as a host with checksum offload leaves it: the pseudo-header's sum alone."""
    known = frames.parse(data)
    s = known.signature
    length = known.end - known.offset
    pseudo = s.source + s.destination + (struct.pack("!HH", s.protocol, length) if len(s.source) == 4 else struct.pack(
        "!II", length, s.protocol))
    at = known.offset + (16 if s.protocol == 6 else 6)
    return data[:at] + (packet_utils.checksum(pseudo) ^ 0xFFFF).to_bytes(2, "big") + data[at + 2:]


@families
@protocols
def test_parse_reads_what_was_written(pair, protocol):
    known = frames.parse(frame(*pair, protocol, 40000, 80, flags=0x12, tos=0x28, payload=b"abc"))
    source, destination = (netaddr.IPAddress(text).packed for text in pair)
    assert known.signature == FlowSignature(source, 40000, destination, 80, protocol, 0x28)
    assert known.tcp_flags == (0x12 if protocol == 6 else 0)
    assert known.source_mac == bytes.fromhex("0a0000000001")


@families
@protocols
@given(payload=st.binary(max_size=120), padding=st.integers(0, 20))
def test_partial_checksums_are_completed_and_whole_ones_left(pair, protocol, payload, padding):
    whole = frame(*pair, protocol, payload=payload) + bytes(padding)
    assert frames.with_checksum(whole, frames.parse(whole)) == whole
    half = partial(whole)
    done = frames.with_checksum(half, frames.parse(half))
    # 0 and ffff are the same number, and UDP has a meaning for 0.
    assert frames.with_checksum(done, frames.parse(done)) == done
    known = frames.parse(done)
    at = known.offset + (16 if protocol == 6 else 6)
    assert int.from_bytes(done[at:at + 2], "big") % 0xFFFF == int.from_bytes(whole[at:at + 2], "big") % 0xFFFF
    assert done[at:at + 2] != b"\0\0" or protocol == 6


@families
@protocols
def test_a_wrong_checksum_is_not_made_right(pair, protocol):
    data = bytearray(frame(*pair, protocol, payload=b"abcdef"))
    data[-1] ^= 1
    with pytest.raises(frames.MalformedError, match="checksum"):
        frames.with_checksum(bytes(data), frames.parse(bytes(data)))


def test_udp_may_leave_its_checksum_out_over_ipv4_only():
    for pair, at in zip(PAIRS, (40, 60), strict=True):
        data = frame(*pair, 17, payload=b"x")
        data = data[:at] + b"\0\0" + data[at + 2:]
        if ":" in pair[0]:
            with pytest.raises(frames.MalformedError):
                frames.with_checksum(data, frames.parse(data))
        else:
            assert frames.with_checksum(data, frames.parse(data)) == data


@pytest.mark.parametrize(("at", "value", "why"), [
    (12, b"\x81\x00", "not IP"), (14, b"\x55", "header length"), (14, b"\x44", "header length"),
    (14, b"\x4f", "header length"),
    (16, b"\xff\xff", "header length"), (16, b"\x00\x10", "header length"), (20, b"\x00\x01", "later fragment"),
    (23, b"\x01", "neither"), (46, b"\x40", "TCP header"), (46, b"\xf0", "TCP header"),
    (16, b"\x00\x27", "TCP header")])
def test_what_contradicts_itself_is_malformed(at, value, why):
    data = frame(*PAIRS[0])
    with pytest.raises(frames.MalformedError, match=why):
        frames.parse(data[:at] + value + data[at + len(value):])


@pytest.mark.parametrize("length", [0, 7, 9, 65535])
def test_a_udp_length_that_cannot_be_is_malformed(length):
    data = frame(*PAIRS[0], 17)
    with pytest.raises(frames.MalformedError, match="UDP length"):
        frames.parse(data[:38] + length.to_bytes(2, "big") + data[40:])


@given(st.sampled_from([frame(*pair, protocol, payload=b"hello") for pair in PAIRS for protocol in (6, 17)]),
       st.integers(0, 80), st.lists(st.tuples(st.integers(0, 79), st.integers(0, 255)), max_size=4))
def test_anything_is_a_packet_or_malformed(data, cut, changes):
    changed = bytearray(data[:cut])
    for at, value in changes:
        if at < len(changed):
            changed[at] = value
    mangled = bytes(changed)
    frames.neighbour(mangled, 1)
    frames.destination(mangled)
    with contextlib.suppress(frames.MalformedError):
        known = frames.parse(mangled)
        answer = frames.refusal(mangled, known, MAC)
        assert answer is None or frames.destination(answer) == known.signature.source
        with contextlib.suppress(frames.MalformedError):
            frames.with_checksum(mangled, known)


@given(st.binary(max_size=120))
def test_noise_is_malformed_or_understood(data):
    frames.neighbour(data, 1)
    with contextlib.suppress(frames.MalformedError):
        frames.refusal(data, frames.parse(data), MAC)


# ------------------------------------------------------------------ refusal


def refused(data: bytes) -> packet.Packet:
    answer = frames.refusal(data, frames.parse(data), MAC)
    assert answer is not None
    read = decoded(answer)
    assert read.get_protocol(ethernet.ethernet).src == "02:6c:62:00:00:01"
    assert read.get_protocol(ethernet.ethernet).dst == "0a:00:00:00:00:01"
    ip = read.get_protocol(ipv4.ipv4) or read.get_protocol(ipv6.ipv6)
    assert (ip.src, ip.dst) == tuple(reversed(next(p for p in PAIRS if ip.dst == p[0])))
    if isinstance(ip, ipv4.ipv4):
        assert packet_utils.checksum(answer[14:34]) == 0
        assert ip.total_length == len(answer) - 14
    else:
        assert ip.payload_length == len(answer) - 54
    return read


@families
@pytest.mark.parametrize(("flags", "payload", "expected"), [
    (2, b"", (0, 1001, 0x14)),          # SYN: RFC 9293 3.5.2 group 1: SEQ=0, ACK=SEG.SEQ+SEG.LEN
    (2, b"early", (0, 1006, 0x14)),
    (1, b"ab", (0, 1003, 0x14)),        # FIN counts as well
    (0, b"abc", (0, 1003, 0x14)),
    (0x10, b"abc", (555, 0, 0x04)),     # with ACK: SEQ=SEG.ACK
    (0x12, b"", (555, 0, 0x04)),
    (0x11, b"", (555, 0, 0x04)),
])
def test_a_refused_tcp_client_gets_the_rst_of_rfc_9293(pair, flags, payload, expected):
    data = frame(*pair, flags=flags, seq=1000, ack=555, payload=payload)
    read = refused(data)
    segment = read.get_protocol(tcp.tcp)
    assert (segment.seq, segment.ack, segment.bits) == expected
    assert (segment.src_port, segment.dst_port) == (80, 40000)
    frames.with_checksum(bytes(read.data), frames.parse(bytes(read.data)))


def test_sequence_numbers_wrap():
    assert refused(frame(*PAIRS[0], flags=2, seq=2**32 - 1)).get_protocol(tcp.tcp).ack == 0


@families
@pytest.mark.parametrize("flags", [4, 0x14, 0x06])
def test_a_rst_is_never_answered(pair, flags):
    data = frame(*pair, flags=flags)
    assert frames.refusal(data, frames.parse(data), MAC) is None


def test_a_refused_udp_client_gets_port_unreachable():
    data = frame(*PAIRS[0], 17, payload=b"some payload")
    answer = refused(data)
    message = answer.get_protocol(icmp.icmp)
    assert (message.type, message.code) == (3, 3)
    assert packet_utils.checksum(answer.data[34:]) == 0
    assert bytes(answer.data[42:]) == data[14:42]


def test_a_refused_udp_client_gets_port_unreachable_over_ipv6():
    data = frame(*PAIRS[1], 17, payload=bytes(1400))
    answer = refused(data)
    message = answer.get_protocol(icmpv6.icmpv6)
    assert (message.type_, message.code) == (1, 4)
    assert len(answer.data) == 14 + 1280
    body = bytes(answer.data[54:])
    pseudo = bytes(answer.data[22:54]) + struct.pack("!II", len(body), 58)
    assert packet_utils.checksum(pseudo + body) == 0
    assert data[14:].startswith(body[8:])


@families
@protocols
def test_a_destination_is_put_back(pair, protocol):
    meant = frame(*pair, protocol, payload=b"abc")
    other = "10.0.0.11" if "." in pair[0] else "fd00::11"
    translated = frame(pair[0], other, protocol, dport=8080, payload=b"abc")
    back, known = frames.with_destination(translated, frames.parse(translated), netaddr.IPAddress(pair[1]).packed, 80)
    assert known == frames.parse(meant)
    assert parse(back) == parse(meant)
    if "." in other:
        assert packet_utils.checksum(back[14:34]) == 0


# ------------------------------------------------------------------ probes and neighbours


def test_an_arp_probe():
    data = frames.probe(bytes((10, 0, 0, 5)), MAC)
    request = decoded(data).get_protocol(arp.arp)
    assert (request.opcode, request.src_ip, request.dst_ip, request.src_mac) == (1, "0.0.0.0", "10.0.0.5",
                                                                                 "02:6c:62:00:00:01")
    assert decoded(data).get_protocol(ethernet.ethernet).dst == "ff:ff:ff:ff:ff:ff"
    asked = decoded(frames.probe(bytes((10, 0, 0, 5)), MAC, bytes((10, 0, 0, 254)))).get_protocol(arp.arp)
    assert asked.src_ip == "10.0.0.254"


def test_a_neighbour_solicitation():
    target = netaddr.IPAddress("fd00::ab:cdef").packed
    read = decoded(frames.probe(target, MAC))
    assert read.get_protocol(ethernet.ethernet).dst == "33:33:ff:ab:cd:ef"
    ip = read.get_protocol(ipv6.ipv6)
    assert (ip.src, ip.dst, ip.hop_limit) == ("fe80::6c:62ff:fe00:1", "ff02::1:ffab:cdef", 255)
    asked = read.get_protocol(icmpv6.icmpv6)
    assert asked.type_ == 135 and asked.data.dst == "fd00::ab:cdef"
    assert asked.data.option.hw_src == "02:6c:62:00:00:01"
    body = bytes(read.data[54:])
    assert packet_utils.checksum(bytes(read.data[22:54]) + struct.pack("!II", len(body), 58) + body) == 0


ARP = {"eth_dst": mac_number("02:6c:63:00:00:01"), "eth_src": 5, "eth_type": 0x806, "arp_op": 2, "arp_sha": 5,
       "arp_spa": 0x0A000005, "arp_tha": 0, "arp_tpa": 0}
NA = transport("fd00::5", "fe80::1", 17) | {
    "ip_proto": 58, "ip_ttl": 255, "icmpv6_type": 136, "icmpv6_code": 0, "nd_reserved": 0,
    "ipv6_nd_target": int(netaddr.IPAddress("fd00::5")), "nd_options_type": 2, "ipv6_nd_tll": 9}


def test_neighbours_are_heard():
    assert frames.neighbour(build(ARP), 3) == (bytes((10, 0, 0, 5)), Host(bytes(5) + b"\5", 3))
    assert frames.neighbour(build(ARP | {"arp_op": 1}), 3) is not None
    assert frames.neighbour(build(NA), 4) == (netaddr.IPAddress("fd00::5").packed, Host(bytes(5) + b"\x09", 4))
    without = build(NA | {"nd_options_type": 0})
    assert frames.neighbour(without, 4) == (netaddr.IPAddress("fd00::5").packed, Host(bytes.fromhex("0a0000000001"), 4))


@pytest.mark.parametrize("change", [{"arp_spa": 0}, {"arp_sha": 0x010000000000}])
def test_an_arp_packet_of_no_use(change):
    assert frames.neighbour(build(ARP | change), 3) is None


@pytest.mark.parametrize("change", [{"ip_ttl": 254}, {"icmpv6_type": 135}, {"ipv6_nd_tll": 0x330000000001}])
def test_an_advertisement_of_no_use(change):
    assert frames.neighbour(build(NA | change), 3) is None


def test_an_advertisement_with_a_wrong_checksum():
    data = bytearray(build(NA))
    data[70] ^= 1
    assert frames.neighbour(bytes(data), 3) is None


def test_destinations():
    assert frames.destination(frame(*PAIRS[0])) == bytes((10, 0, 0, 100))
    assert frames.destination(frame(*PAIRS[1])) == netaddr.IPAddress("fd00::100").packed
    assert frames.destination(build(ARP)) is None


@families
@given(seq=st.integers(0, 2**33), ack=st.integers(0, 2**33), flags=st.integers(0, 255), window=st.integers(0, 65535),
       options=st.sampled_from([b"", b"\x02\x04\x05\xb4", b"\x02\x04\x05\xb4\x01\x01\x04\x02\x01\x03\x03\x07"]),
       payload=st.binary(max_size=200))
def test_a_segment_is_written_as_ryu_reads_it(pair, seq, ack, flags, window, options, payload):
    ends = [netaddr.IPAddress(one).packed for one in pair]
    wanted = frames.Segment(seq, ack, flags, window, options, payload)
    made = frames.tcp(MAC, bytes(6), (ends[0], 40000), (ends[1], 80), wanted)
    seen = decoded(made)
    (segment,) = seen.get_protocols(tcp.tcp)
    assert (segment.src_port, segment.dst_port, segment.window_size) == (40000, 80, window)
    (network,) = seen.get_protocols(ipv4.ipv4) or seen.get_protocols(ipv6.ipv6)
    assert (network.src, network.dst) == pair
    parsed = frames.parse(made)
    assert frames.with_checksum(made, parsed) == made
    assert frames.segment(made, parsed) == wanted._replace(seq=seq & 0xFFFFFFFF, ack=ack & 0xFFFFFFFF)
