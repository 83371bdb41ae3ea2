# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Lines of ``dpctl/dump-conntrack`` as Open vSwitch 3.1.0 writes them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lbapp.dataflow.conntrack import parse
from lbapp.dataflow.pipeline import Label

LABEL = (0x0A0000000001 | 7 << Label.CLIENT_PORT | 0xA1B2C3D4 << Label.SERIAL | 5 << Label.VIRTUAL_SERVER
         | 1 << Label.TRACKED)
TCP = (f"tcp,orig=(src=10.0.0.1,dst=10.0.0.100,sport=40000,dport=80),reply=(src=10.0.0.2,dst=10.0.0.1,sport=8080,"
       f"dport=40000),zone=2,mark=3,labels={LABEL:#x},protoinfo=(state=ESTABLISHED)")
UDP = ("udp,orig=(src=fd00::1,dst=fd00::100,sport=40000,dport=53),reply=(src=fd00::2,dst=fd00::1,sport=53,dport=40000),"
       "zone=2,mark=3")


def test_tcp():
    (entry,) = parse([TCP], 2)
    assert entry.original == ("10.0.0.1", "10.0.0.100", 40000, 80)
    assert entry.reply == ("10.0.0.2", "10.0.0.1", 8080, 40000)
    assert (entry.protocol, entry.zone, entry.member) == ("tcp", 2, 3)
    assert (entry.serial, entry.virtual_server) == (0xA1B2C3D4, 5)
    assert entry.tracked and entry.state == "ESTABLISHED"


def test_udp_without_a_label():
    (entry,) = parse([UDP], 2)
    assert (entry.protocol, entry.original[0], entry.serial, entry.virtual_server) == ("udp", "fd00::1", 0, 0)
    assert not entry.tracked and entry.state == ""


def test_others_are_passed_over():
    icmp = ("icmp,orig=(src=10.0.0.1,dst=10.0.0.100,id=5,type=8,code=0),"
            "reply=(src=10.0.0.100,dst=10.0.0.1,id=5,type=0,code=0),zone=2,mark=3")
    lines = ["", "tcp", icmp, TCP.replace("zone=2", "zone=3"), TCP.replace("mark=3,", ""), TCP.replace("zone=2,", ""),
             TCP.replace("mark=3", "mark=0"), "sctp" + TCP[3:]]
    assert list(parse(lines, 2)) == []


def test_without_a_zone_it_is_zone_0():
    assert len(list(parse([UDP.replace("zone=2,", "")], 0))) == 1


@given(st.text(max_size=200), st.integers(0, len(TCP)))
def test_anything_else_is_no_entry_or_a_whole_one(noise, cut):
    for line in (noise, TCP[:cut], TCP[:cut] + noise):
        for entry in parse([line], 2):
            assert entry.member == 3 or entry.member > 0
