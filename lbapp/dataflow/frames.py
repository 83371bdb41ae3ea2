# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Ethernet frames as the controller meets and makes them: parse, complete, refuse, probe.

Lengths are checked before anything is read. Pure: bytes in, bytes or values out.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from lbapp.control.messages import FlowSignature, Host
from lbapp.values import Value

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
TCP, _UDP, _ICMP, _ICMP6 = 6, 17, 1, 58
_ALL_ONES = b"\xff" * 6


class Packet(Value, frozen=True):
    """An IPv4 or IPv6 packet that carries TCP or UDP.

    ``offset`` is where the transport header starts, ``end`` where the IP packet ends in the frame.
    """

    signature: FlowSignature
    source_mac: bytes
    tcp_flags: int
    offset: int
    end: int


class MalformedError(ValueError):
    """A frame that is not what its own headers say."""


def parse(frame: bytes) -> Packet:
    """Read an untagged TCP or UDP frame.

    Raises:
        MalformedError: too short, another protocol, a later fragment, or lengths that do not agree.
    """
    size = len(frame)
    if size < 34:
        raise MalformedError("frame too short")
    ether = frame[12] << 8 | frame[13]
    if ether == 0x0800:
        first = frame[14]
        offset = 14 + (first & 15) * 4
        end = 14 + (frame[16] << 8 | frame[17])
        if first >> 4 != 4 or offset < 34 or end > size or offset > end:
            raise MalformedError("IPv4 header length")
        if (frame[20] & 0x1F) << 8 | frame[21]:
            raise MalformedError("later fragment")
        protocol, tos, source, destination = frame[23], frame[15], frame[26:30], frame[30:34]
    elif ether == 0x86DD and size >= 54:
        offset = 54
        end = 54 + (frame[18] << 8 | frame[19])
        if frame[14] >> 4 != 6 or end > size:
            raise MalformedError("IPv6 header length")
        protocol, tos = frame[20], (frame[14] & 15) << 4 | frame[15] >> 4
        source, destination = frame[22:38], frame[38:54]
    else:
        raise MalformedError("not IP")
    if protocol == TCP:
        if end - offset < 20 or not 20 <= (frame[offset + 12] >> 4) * 4 <= end - offset:
            raise MalformedError("TCP header length")
        flags = frame[offset + 13]
    elif protocol == _UDP:
        if end - offset < 8 or not 8 <= (frame[offset + 4] << 8 | frame[offset + 5]) <= end - offset:
            raise MalformedError("UDP length")
        flags = 0
    else:
        raise MalformedError("neither TCP nor UDP")
    signature = FlowSignature(source, frame[offset] << 8 | frame[offset + 1], destination,
                              frame[offset + 2] << 8 | frame[offset + 3], protocol, tos)
    return Packet(signature, frame[6:12], flags, offset, end)


def odd(packet: Packet) -> bool:
    """Whether a segment in the middle of a connection has IPv4 options: fast paths leave those to the switch."""
    it = packet.signature
    return (packet.offset > 34 and len(it.source) == 4 and it.protocol == TCP
            and packet.tcp_flags & (SYN | ACK | RST | FIN) != SYN)


def ones_sum(data: bytes) -> int:
    """The 16-bit one's complement sum of some bytes (not inverted), padded with a zero byte."""
    if len(data) & 1:
        data += b"\0"
    # Big integers of bytes are a sum in base 65536: its residue modulo 65535 is the folded sum.
    total = int.from_bytes(data, "big")
    return total % 0xFFFF or (0xFFFF if total else 0)


def pseudo_sum(source: bytes, destination: bytes, protocol: int, length: int) -> int:
    """The sum of what TCP, UDP and ICMPv6 checksums cover besides their own bytes."""
    total = int.from_bytes(source, "big") + int.from_bytes(destination, "big") + protocol + length
    return total % 0xFFFF or 0xFFFF


def with_checksum(frame: bytes, packet: Packet) -> bytes:
    """The frame with the whole transport checksum.

    With userspace TSO a host leaves only the pseudo-header's sum in the field; a checksum that is
    neither that nor right is an error of the wire and must not be made right.

    Raises:
        MalformedError: the checksum is wrong.
    """
    signature, offset, end = packet.signature, packet.offset, packet.end
    at = offset + (16 if signature.protocol == TCP else 6)
    field = frame[at] << 8 | frame[at + 1]
    if signature.protocol == _UDP and not field and len(signature.source) == 4:
        return frame  # a UDP sender over IPv4 may leave it out
    pseudo = pseudo_sum(signature.source, signature.destination, signature.protocol, end - offset)
    whole = (pseudo + ones_sum(frame[offset:end])) % 0xFFFF
    if whole == 0:
        return frame
    if field != pseudo:
        raise MalformedError("transport checksum")
    checksum = (0xFFFF - (whole - field) % 0xFFFF) & 0xFFFF or 0xFFFF
    return frame[:at] + checksum.to_bytes(2, "big") + frame[at + 2:]


def whole(frame: bytes) -> tuple[bytes, Packet]:
    """A TCP or UDP frame, parsed, with the whole transport checksum; one that was cut on its way here as the shorter
    TCP segment that is left of it.

    Raises:
        MalformedError: see :func:`parse` and :func:`with_checksum`.
    """
    at, head = (16, 14) if frame[12:14] == b"\x08\x00" else (18, 54)
    length = int.from_bytes(frame[at:at + 2], "big")
    if len(frame) < 74 or head + length <= len(frame):
        packet = parse(frame)
        return with_checksum(frame, packet), packet
    packet = parse(frame[:at] + (len(frame) - head).to_bytes(2, "big") + frame[at + 2:])
    if packet.signature.protocol != TCP:
        raise MalformedError("a datagram that was cut")
    offset, it = packet.offset, packet.signature
    flags = packet.tcp_flags & ~FIN  # what it ends with has not come
    content = bytearray(frame[offset:])
    content[13], content[16:18] = flags, b"\0\0"
    packet = packet._replace(tcp_flags=flags)
    return with_tcp(frame[:offset], it.source, it.destination, bytes(content)), packet


def with_destination(frame: bytes, packet: Packet, address: bytes, port: int) -> tuple[bytes, Packet]:
    """The frame as it was before its destination was translated; its transport checksum is left as it is."""
    at, size = (30, 4) if len(address) == 4 else (38, 16)
    header = frame[14:at] + address + frame[at + size:packet.offset]
    if size == 4:
        header = header[:10] + b"\0\0" + header[12:]
        header = header[:10] + (0xFFFF - ones_sum(header)).to_bytes(2, "big") + header[12:]
    ports = frame[packet.offset:packet.offset + 2] + port.to_bytes(2, "big")
    signature = packet.signature._replace(destination=address, destination_port=port)
    return frame[:14] + header + ports + frame[packet.offset + 4:], packet._replace(signature=signature)


def _ip_header(source: bytes, destination: bytes, protocol: int, payload: int) -> bytes:
    if len(source) == 16:
        return struct.pack("!IHBB", 6 << 28, payload, protocol, 64) + source + destination
    length, hops = 20 + payload, 64 << 8 | protocol
    total = 0x4500 + length + 0x4000 + hops + int.from_bytes(source, "big") + int.from_bytes(destination, "big")
    return struct.pack("!HHHHHH", 0x4500, length, 0, 0x4000, hops, -total % 0xFFFF) + source + destination


def _transport(source: bytes, destination: bytes, protocol: int, segment: bytes, at: int) -> bytes:
    total = pseudo_sum(source, destination, protocol, len(segment)) + ones_sum(segment)
    return segment[:at] + (-total % 0xFFFF).to_bytes(2, "big") + segment[at + 2:]


def refusal(frame: bytes, packet: Packet, mac: bytes) -> bytes | None:
    """What tells a client at once that it is refused: TCP RST, or ICMP port unreachable for UDP.

    Args:
        frame: the client's own frame.
        packet: the same, parsed.
        mac: the MAC that answers.

    Returns:
        A whole frame to the client; None where no answer is allowed (a RST is never answered).
    """
    signature, offset = packet.signature, packet.offset
    source, destination = signature.destination, signature.source
    if signature.protocol == TCP:
        flags = packet.tcp_flags
        if flags & RST:
            return None
        part = segment(frame, packet)
        after = part.seq + len(part.payload) + bool(flags & SYN) + bool(flags & FIN)
        reset = (part.ack, 0, RST) if flags & ACK else (0, after, RST | ACK)
        return tcp(frame[6:12], mac, (source, signature.destination_port), (destination, signature.source_port),
                   Segment(*reset, 0, b"", b""))
    if len(source) == 4:
        body = struct.pack("!BBHI", 3, 3, 0, 0) + frame[14:min(packet.end, offset + 8)]
        protocol, told = _ICMP, body[:2] + (0xFFFF - ones_sum(body)).to_bytes(2, "big") + body[4:]
    else:
        body = struct.pack("!BBHI", 1, 4, 0, 0) + frame[14:min(packet.end, 14 + 1232)]
        protocol, told = _ICMP6, _transport(source, destination, _ICMP6, body, 2)
    return frame[6:12] + mac + frame[12:14] + _ip_header(source, destination, protocol, len(told)) + told


class Segment(Value, frozen=True):
    """The TCP part of a packet. ``window`` is as on the wire."""

    seq: int
    ack: int
    flags: int
    window: int
    options: bytes
    payload: bytes


def segment(frame: bytes, packet: Packet) -> Segment:
    """Read the TCP header of a parsed packet."""
    offset = packet.offset
    seq, ack, start, flags, window = struct.unpack_from("!IIBBH", frame, offset + 4)
    payload = offset + (start >> 4) * 4
    return Segment(seq, ack, flags, window, frame[offset + 20:payload], frame[payload:packet.end])


def tcp_options(packed: bytes) -> Iterator[tuple[int, int, int]]:
    """Where each of some TCP options begins, its kind and its length; up to the first that is malformed."""
    at = 0
    while at < len(packed):
        kind = packed[at]
        if kind == 0:
            return
        if kind == 1:
            at += 1
            continue
        length = packed[at + 1] if at + 1 < len(packed) else 0
        if length < 2 or at + length > len(packed):
            return
        yield at, kind, length
        at += length


def with_tcp(head: bytes, source: bytes, destination: bytes, content: bytes) -> bytes:
    """A frame with this Ethernet and IP header, but for its length and checksum, and this TCP segment.

    Args:
        head: as the frame begins; it has these addresses.
        source, destination: packed addresses.
        content: the whole segment; its checksum is filled in.
    """
    made = bytearray(head)
    if len(source) == 16:
        made[18:20] = (len(made) - 54 + len(content)).to_bytes(2, "big")
    else:
        made[16:18] = (len(made) - 14 + len(content)).to_bytes(2, "big")
        made[24:26] = b"\0\0"
        made[24:26] = (0xFFFF - ones_sum(bytes(made[14:]))).to_bytes(2, "big")
    return bytes(made) + _transport(source, destination, TCP, content, 16)


_TCP_OVER_IPV4 = struct.Struct("!6s6sHHHHHHH8sHHIIHHHH").pack
_TCP_OVER_IPV6 = struct.Struct("!6s6sHIHBB32sHHIIHHHH").pack


def tcp(destination_mac: bytes, source_mac: bytes, source: tuple[bytes, int], destination: tuple[bytes, int],
        content: Segment) -> bytes:
    """A whole frame with one TCP segment.

    Args:
        destination_mac, source_mac: of the frame.
        source, destination: packed address and port.
        content: options padded to a multiple of four bytes.
    """
    (here, port), (there, other), more = source, destination, content.options + content.payload
    seq, ack, size = content.seq & 0xFFFFFFFF, content.ack & 0xFFFFFFFF, 20 + len(more)
    shape, addresses = 20 + len(content.options) << 10 | content.flags, here + there
    both = int.from_bytes(addresses, "big")
    checksum = -(both + TCP + size + port + other + seq + ack + shape + content.window + ones_sum(more)) % 0xFFFF
    if len(here) == 4:
        hops = 64 << 8 | TCP
        return _TCP_OVER_IPV4(
            destination_mac, source_mac, 0x0800, 0x4500, 20 + size, 0, 0x4000, hops,
            -(0x4500 + 20 + size + 0x4000 + hops + both) % 0xFFFF, addresses,
            port, other, seq, ack, shape, content.window, checksum, 0) + more
    return _TCP_OVER_IPV6(destination_mac, source_mac, 0x86DD, 6 << 28, size, TCP, 64, addresses,
                          port, other, seq, ack, shape, content.window, checksum, 0) + more


def probe(address: bytes, mac: bytes, sender: bytes | None = None) -> bytes:
    """A frame that asks who has an address: ARP request, or neighbour solicitation.

    Args:
        address: 4 or 16 bytes.
        mac: the asking MAC.
        sender: the asking IPv4 address; without one the request is an ARP probe (RFC 5227).
    """
    if len(address) == 4:
        return (_ALL_ONES + mac + struct.pack("!HHHBBH", 0x0806, 1, 0x0800, 6, 4, 1) + mac + (sender or bytes(4))
                + bytes(6) + address)
    source = b"\xfe\x80" + bytes(6) + bytes([mac[0] ^ 2]) + mac[1:3] + b"\xff\xfe" + mac[3:]
    group = b"\xff\x02" + bytes(9) + b"\x01\xff" + address[13:]
    body = struct.pack("!BBHI", 135, 0, 0, 0) + address + b"\x01\x01" + mac
    segment = _transport(source, group, _ICMP6, body, 2)
    header = struct.pack("!IHBB", 6 << 28, len(segment), _ICMP6, 255) + source + group
    return b"\x33\x33\xff" + address[13:] + mac + b"\x86\xdd" + header + segment


def destination(frame: bytes) -> bytes | None:
    """The destination address of an IP frame; None where it is not one."""
    if len(frame) >= 34 and frame[12:14] == b"\x08\x00":
        return frame[30:34]
    if len(frame) >= 54 and frame[12:14] == b"\x86\xdd":
        return frame[38:54]
    return None


def neighbour(frame: bytes, port: int) -> tuple[bytes, Host] | None:
    """Who an ARP packet or a neighbour advertisement says is where; None where it says nothing of use."""
    if len(frame) >= 42 and frame[12:14] == b"\x08\x06":
        if frame[14:20] != b"\x00\x01\x08\x00\x06\x04" or frame[22] & 1 or frame[28:32] == bytes(4):
            return None
        return frame[28:32], Host(frame[22:28], port)
    if len(frame) >= 78 and frame[12:14] == b"\x86\xdd" and frame[20] == _ICMP6 and frame[54] == 136:
        if frame[21] != 255:  # came through a router (RFC 4861, 7.1.2)
            return None
        length = frame[18] << 8 | frame[19]
        if length < 24 or 54 + length > len(frame):
            return None
        total = pseudo_sum(frame[22:38], frame[38:54], _ICMP6, length) + ones_sum(frame[54:54 + length])
        if total % 0xFFFF:
            return None
        mac = frame[80:86] if length >= 32 and frame[78:80] == b"\x02\x01" else frame[6:12]
        return (frame[62:78], Host(mac, port)) if not mac[0] & 1 else None
    return None
