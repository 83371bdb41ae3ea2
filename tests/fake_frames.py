# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Frames for tests: between bytes and a dict of fields by their OpenFlow names, by way of Ryu's packet library.

Addresses are numbers; ``payload`` is what follows the last header; checksums come from Ryu.
"""

from __future__ import annotations

import struct
import warnings
from typing import Any

import netaddr

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import eventlet.wsgi

    eventlet.wsgi.ALREADY_HANDLED = []
    from ryu.lib import packet as _  # noqa: F401  (Ryu's own imports warn)
    from ryu.lib.packet import packet_utils

from lbapp.dataflow.openflow import FIELDS

Headers = dict[str, Any]


def mac(number: int) -> str:
    """A locally administered MAC with a number."""
    return f"0a:00:00:00:00:{number:02x}"


def mac_number(text: str) -> int:
    return int(netaddr.EUI(text))


def address_number(text: str) -> int:
    return int(netaddr.IPAddress(text))


def transport(source: str, destination: str, protocol: int = 6, sport: int = 40000, dport: int = 80, *,
              eth_src: str = mac(1), eth_dst: str = "02:6c:62:00:00:01", flags: int = 2, seq: int = 1000, ack: int = 0,
              payload: bytes = b"", ttl: int = 64, tos: int = 0) -> Headers:
    """The fields of a TCP or UDP frame."""
    version = 6 if ":" in source else 4
    name = "tcp" if protocol == 6 else "udp"
    fields: Headers = {
        "eth_dst": mac_number(eth_dst), "eth_src": mac_number(eth_src), "eth_type": 0x800 if version == 4 else 0x86DD,
        f"ipv{version}_src": address_number(source), f"ipv{version}_dst": address_number(destination),
        "ip_proto": protocol, "ip_ttl": ttl, "ip_tos": tos, "ip_frag": 0, f"{name}_src": sport, f"{name}_dst": dport,
        "payload": payload}
    if protocol == 6:
        fields |= {"tcp_flags": flags, "tcp_seq": seq, "tcp_ack": ack}
    return fields


def frame(*args: Any, **kwargs: Any) -> bytes:
    """The bytes of a TCP or UDP frame; arguments as :func:`transport`."""
    return build(transport(*args, **kwargs))


def build(h: Headers) -> bytes:
    """The bytes of a frame, with right lengths and checksums."""
    ethernet = h["eth_dst"].to_bytes(6, "big") + h["eth_src"].to_bytes(6, "big") + h["eth_type"].to_bytes(2, "big")
    if h["eth_type"] == 0x806:
        return ethernet + struct.pack("!HHBBH", 1, 0x800, 6, 4, h["arp_op"]) + h["arp_sha"].to_bytes(6, "big") + h[
            "arp_spa"].to_bytes(4, "big") + h["arp_tha"].to_bytes(6, "big") + h["arp_tpa"].to_bytes(4, "big")
    if h["eth_type"] not in (0x800, 0x86DD):
        return ethernet + h["payload"]
    six = h["eth_type"] == 0x86DD
    size, family = (16, "ipv6") if six else (4, "ipv4")
    source, destination = (h[f"{family}_{side}"].to_bytes(size, "big") for side in ("src", "dst"))
    protocol, at = h["ip_proto"], None
    if h.get("ip_frag", 0) & 2:
        body = h["payload"]
    elif protocol == 6:
        body, at = struct.pack("!HHIIHHHH", h["tcp_src"], h["tcp_dst"], h["tcp_seq"], h["tcp_ack"],
                               5 << 12 | h["tcp_flags"], 65535, 0, 0) + h["payload"], 16
    elif protocol == 17:
        body, at = struct.pack("!HHHH", h["udp_src"], h["udp_dst"], 8 + len(h["payload"]), 0) + h["payload"], 6
    elif protocol == 1:
        body = struct.pack("!BBH", h["icmpv4_type"], h["icmpv4_code"], 0) + h["payload"]
        body = body[:2] + packet_utils.checksum(body).to_bytes(2, "big") + body[4:]
    elif protocol == 58:
        body, at = struct.pack("!BBH", h["icmpv6_type"], h["icmpv6_code"], 0), 2
        if "ipv6_nd_target" in h:
            body += struct.pack("!I", h["nd_reserved"]) + h["ipv6_nd_target"].to_bytes(16, "big")
            if h.get("nd_options_type"):
                side = "ipv6_nd_sll" if h["nd_options_type"] == 1 else "ipv6_nd_tll"
                body += bytes((h["nd_options_type"], 1)) + h[side].to_bytes(6, "big")
        else:
            body += h["payload"]
    else:
        body = h["payload"]
    if at is not None:
        pseudo = source + destination + (struct.pack("!II", len(body), protocol) if six else struct.pack(
            "!HH", protocol, len(body)))
        value = packet_utils.checksum(pseudo + body)
        body = body[:at] + (value or 0xFFFF).to_bytes(2, "big") + body[at + 2:]
    if six:
        return ethernet + struct.pack("!IHBB", 6 << 28 | h["ip_tos"] << 20, len(body), protocol, h["ip_ttl"]) + (
            source + destination + body)
    offset = {0: 0x4000, 1: 0x2000, 3: 100}[h.get("ip_frag", 0)]
    header = struct.pack("!BBHHHBBH", 0x45, h["ip_tos"], 20 + len(body), 7, offset, h["ip_ttl"], protocol,
                         0) + source + destination
    return ethernet + header[:10] + packet_utils.checksum(header).to_bytes(2, "big") + header[12:] + body


def _number(data: bytes) -> int:
    return int.from_bytes(data, "big")


def parse(data: bytes) -> Headers:
    """The fields of a frame that was made by :func:`build`, or by the balancer."""
    h: Headers = {"eth_dst": _number(data[:6]), "eth_src": _number(data[6:12]), "eth_type": _number(data[12:14])}
    if h["eth_type"] == 0x806:
        return h | {"arp_op": _number(data[20:22]), "arp_sha": _number(data[22:28]), "arp_spa": _number(data[28:32]),
                    "arp_tha": _number(data[32:38]), "arp_tpa": _number(data[38:42])}
    if h["eth_type"] == 0x800:
        end, at = 14 + _number(data[16:18]), 14 + (data[14] & 15) * 4
        fragment = _number(data[20:22])
        h |= {"ip_proto": data[23], "ip_ttl": data[22], "ip_tos": data[15], "ipv4_src": _number(data[26:30]),
              "ipv4_dst": _number(data[30:34]), "ip_frag": 3 if fragment & 0x1FFF else 1 if fragment & 0x2000 else 0}
    elif h["eth_type"] == 0x86DD:
        end, at = 54 + _number(data[18:20]), 54
        h |= {"ip_proto": data[20], "ip_ttl": data[21], "ip_tos": _number(data[14:16]) >> 4 & 255,
              "ipv6_src": _number(data[22:38]), "ipv6_dst": _number(data[38:54]), "ip_frag": 0}
    else:
        return h | {"payload": data[14:]}
    body = data[at:end]
    if h["ip_frag"] & 2:
        return h | {"payload": body}
    if h["ip_proto"] == 6:
        return h | {"tcp_src": _number(body[:2]), "tcp_dst": _number(body[2:4]), "tcp_seq": _number(body[4:8]),
                    "tcp_ack": _number(body[8:12]), "tcp_flags": _number(body[12:14]) & 0xFFF,
                    "payload": body[(body[12] >> 4) * 4:]}
    if h["ip_proto"] == 17:
        return h | {"udp_src": _number(body[:2]), "udp_dst": _number(body[2:4]), "payload": body[8:]}
    if h["ip_proto"] == 1:
        return h | {"icmpv4_type": body[0], "icmpv4_code": body[1], "payload": body[4:]}
    if h["ip_proto"] == 58:
        h |= {"icmpv6_type": body[0], "icmpv6_code": body[1]}
        if body[0] not in (135, 136):
            return h | {"payload": body[4:]}
        h |= {"nd_reserved": _number(body[4:8]), "ipv6_nd_target": _number(body[8:24])}
        if len(body) >= 32:
            h |= {"nd_options_type": body[24], "ipv6_nd_sll": _number(body[26:32]), "ipv6_nd_tll": _number(body[26:32])}
        return h
    return h | {"payload": body}

def packet_in(cookie: int, table: int, headers: Headers, data: bytes | None = None) -> bytes:
    """An OFPT_PACKET_IN with the metadata that Open vSwitch sends along; ``data``: the frame, where headers cannot say
    it all."""
    frame = build(headers) if data is None else data
    oxm = FIELDS["in_port"].tlv(headers["in_port"])
    for name in (*(f"reg{n}" for n in range(8)), "ct_state", "ct_zone", "ct_mark", "ct_label", "ct_nw_proto",
                 "ct_nw_src", "ct_nw_dst", "ct_ipv6_src", "ct_ipv6_dst", "ct_tp_src", "ct_tp_dst"):
        if headers.get(name):
            oxm += FIELDS[name].tlv(headers[name])
    match = struct.pack("!HH", 1, 4 + len(oxm)) + oxm + bytes(-(4 + len(oxm)) % 8)
    body = struct.pack("!IHBBQ", 0xFFFFFFFF, len(frame), 1, table, cookie) + match + b"\0\0" + frame
    return struct.pack("!BBHI", 4, 10, 8 + len(body), 0) + body
