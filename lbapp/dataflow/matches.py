# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Pieces that rules are made of: protocol numbers, addresses as bytes, common matches and actions. Pure."""

from __future__ import annotations

import ipaddress

from lbapp.dataflow.openflow import CONTROLLER, Match, Output
from lbapp.dataflow.pipeline import Label

TCP, UDP, ICMP, ICMP6 = 6, 17, 1, 58
ETH_IPV4, ETH_IPV6, ETH_ARP = 0x0800, 0x86DD, 0x0806
MAX_PACKET_IN = 65535
MAX_RELAYED = 0xF000
CT_INVALID = ("ct_state", 0x30, 0x30)
CT_REPLY = ("ct_state", 0x28, 0x38)
"""+trk+inv, and +trk+rpl-inv."""
BARE_SYN, ANY_RST = ("tcp_flags", 0x02, 0x17), ("tcp_flags", 0x04, 0x04)
"""What begins a connection (FIN, SYN, RST and ACK are looked at), and what ends one."""
ANY_FRAGMENT = ("ip_frag", 1, 1)
"""The first one as well: Open vSwitch hides the ports of all fragments, unless told otherwise."""


def packed(address: str) -> bytes:
    """The bytes of an address."""
    return ipaddress.ip_address(address).packed


def address_text(data: bytes) -> str:
    """The canonical text of an address."""
    return str(ipaddress.ip_address(data))


def ip_match(address: str, side: str) -> Match:
    """A match on an IPv4 or IPv6 address; ``side`` is ``src`` or ``dst``."""
    data = packed(address)
    return (("eth_type", ETH_IPV4 if len(data) == 4 else ETH_IPV6), (f"ipv{4 if len(data) == 4 else 6}_{side}", data))


def transport_match(match: Match, protocol: int, side: str = "", port: int = 0) -> Match:
    """The match narrowed to TCP or UDP and, unless it is 0, to a port on ``side``."""
    match = (*match, ("ip_proto", protocol))
    return (*match, (f"{'tcp' if protocol == TCP else 'udp'}_{side}", port)) if port else match


def to_controller() -> Output:
    """Punt the whole frame."""
    return Output(CONTROLLER, MAX_PACKET_IN)


def to_relay() -> Output:
    """Punt the frame to be relayed; what is longer than a message can be (offload) is cut."""
    return Output(CONTROLLER, MAX_RELAYED)


def label_bit(bit: Label, value: int = 1) -> tuple[str, int, int]:
    """A match on one bit of ct_label."""
    return ("ct_label", value << bit, 1 << bit)


def of_virtual_server(number: int) -> tuple[str, int, int]:
    """A match on the virtual server that ct_label names."""
    return ("ct_label", number << Label.VIRTUAL_SERVER, ((1 << 24) - 1) << Label.VIRTUAL_SERVER)
