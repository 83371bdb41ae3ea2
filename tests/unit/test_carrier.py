# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""003's messages to and from OpenFlow bytes."""

from __future__ import annotations

import struct
import types

import msgspec
import netaddr
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ryu.ofproto import ofproto_v1_3 as ofp
from ryu.ofproto import ofproto_v1_3_parser as parser

from lbapp.config.model import Protocol, State
from lbapp.config.routing import Routes
from lbapp.control.messages import Closed, Error, Host, Reason, Reply, Translation
from lbapp.dataflow import carrier, frames
from lbapp.dataflow.openflow import FIELDS, FinTimeout
from lbapp.dataflow.pipeline import Kind, Label, Table, connection_cookie, cookie, kind_of, probe_mac
from tests import sites
from tests.fake_frames import frame, packet_in, parse
from tests.fake_switch import decode_actions

DATAPATH = types.SimpleNamespace(ofproto=ofp, ofproto_parser=parser)
SYN = frame("10.0.0.1", "10.0.0.100")
HOST = Host(bytes.fromhex("020000000009"), 9)


def punt(data: bytes = SYN, kind: Kind = Kind.QUERY, owner: int = 1, **metadata: int) -> bytes:
    return packet_in(cookie(kind, owner) | 0xABC, 20, parse(data) | {"in_port": 7} | metadata)


def encoder(*servers, **more) -> carrier.ReplyEncoder:
    site = sites.configuration(servers, [sites.pool(of=more.pop("of", None))], **more)
    return carrier.ReplyEncoder(1, site, Routes(site.networks.values()))


def reply(data: bytes = SYN, error: Error = Error.OK, member: int = 3, serial: int = 0xA1B2C3D4, number: int = 1, *,
          install: bool = True, port: int = 8080, address: str | None = "10.0.0.13") -> tuple[Reply, frames.Packet]:
    known = frames.parse(data)
    query = carrier.query(carrier.decode_packet_in(punt(data, owner=number)), known, 1, serial)
    translation = Translation(None if address is None else netaddr.IPAddress(address).packed, port, HOST)
    return Reply(query, error, member, None if error else translation, install, False), known


# ------------------------------------------------------------------ DFS -> CS


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**128 - 1), st.integers(1, 0xFFFFFF))
def test_a_packet_in_is_read(mark, label, owner):
    data = packet_in(cookie(Kind.CLOSE, owner), 3, parse(SYN) | {"in_port": 7, "ct_mark": mark, "ct_label": label})
    punted = carrier.decode_packet_in(data)
    assert (punted.cookie, punted.in_port, punted.frame) == (cookie(Kind.CLOSE, owner), 7, SYN)
    known = carrier.connection_mark(punted)
    assert known == (mark, label >> 64 & 0xFFFFFFFF, label >> 96 & 0xFFFFFF)


def test_ryu_reads_the_same_packet_in():
    theirs = parser.OFPPacketIn.parser(DATAPATH, 4, 10, len(punt()), 0, punt(reg2=5))
    punted = carrier.decode_packet_in(punt(reg2=5))
    assert (theirs.cookie, theirs.match["in_port"], theirs.data) == punted[:3]
    assert theirs.match["reg2"] == 5


def test_the_port_is_found_wherever_it_stands():
    oxm = FIELDS["reg2"].tlv(5) + FIELDS["in_port"].tlv(9)
    match = struct.pack("!HH", 1, 4 + len(oxm)) + oxm + bytes(-(4 + len(oxm)) % 8)
    data = punt()[:24] + match + b"\0\0" + SYN
    assert carrier.decode_packet_in(data).in_port == 9
    assert carrier.decode_packet_in(data).frame == SYN


@given(st.integers(0, 60))
def test_a_truncated_packet_in_is_refused_or_read(cut):
    data = punt()[:cut]
    if cut < 42:
        with pytest.raises(carrier.TruncatedError):
            carrier.decode_packet_in(data)
    else:
        assert SYN.startswith(carrier.decode_packet_in(data).frame)


def test_a_packet_in_without_a_port_is_refused():
    oxm = FIELDS["reg2"].tlv(5)
    data = punt()[:24] + struct.pack("!HH", 1, 4 + len(oxm)) + oxm + bytes(4) + b"\0\0" + SYN
    with pytest.raises(carrier.TruncatedError, match="in_port"):
        carrier.decode_packet_in(data)


def test_a_field_that_is_cut_short_is_not_there():
    oxm = FIELDS["ct_mark"].tlv(5)
    assert carrier.oxm_field(oxm, 0x0001D604) == b"\0\0\0\5"
    assert carrier.oxm_field(oxm[:-1], 0x0001D604) is None
    assert carrier.oxm_field(FIELDS["ct_mark"].tlv(5, 0xFF), 0x0001D604) == b"\0\0\0\5"


def test_query():
    known = frames.parse(SYN)
    asked = carrier.query(carrier.decode_packet_in(punt()), known, 1, 99)
    assert (asked.serial, asked.switch, asked.in_port, asked.virtual_server, asked.tcp_flags) == (99, 1, 7, 1, 2)
    assert asked.client_mac == SYN[6:12] and asked.signature == known.signature
    denied = carrier.query(carrier.decode_packet_in(punt(kind=Kind.DENIED)), known, 1, 99)
    assert denied.virtual_server == 0


def test_where_the_label_is_empty_the_register_names_the_virtual_server():
    assert carrier.connection_mark(carrier.decode_packet_in(punt(reg2=8))) == (0, 0, 8)


def flow_removed(reason: int, idle: int = 60, value: int | None = None) -> bytes:
    match = parser.OFPMatch(eth_type=0x800)
    message = bytearray()
    value = connection_cookie(Kind.CONNECTION_OUT, 0xA1B2C3D4) if value is None else value
    message += struct.pack("!BBHI", 4, 11, 56, 0)
    message += struct.pack("!QHBBIIHHQQ", value, 401, reason, 1, 12, 500_000_000, idle, 0, 34, 5600)
    match.serialize(message, len(message))
    return bytes(message)


@pytest.mark.parametrize(("reason", "idle", "expected"), [
    (ofp.OFPRR_IDLE_TIMEOUT, 60, Reason.IDLE), (ofp.OFPRR_HARD_TIMEOUT, 60, Reason.HARD),
    (ofp.OFPRR_DELETE, 60, Reason.DELETED), (ofp.OFPRR_GROUP_DELETE, 60, Reason.DELETED), (5, 60, Reason.OVERFLOW),
    (ofp.OFPRR_IDLE_TIMEOUT, 2, Reason.SHUTDOWN), (ofp.OFPRR_HARD_TIMEOUT, 2, Reason.SHUTDOWN),
    (77, 1, Reason.DELETED)])
def test_flow_removed(reason, idle, expected):
    removed = carrier.decode_flow_removed(flow_removed(reason, idle))
    assert removed == (0xA1B2C3D4, True, expected, 34, 5600, 12.5)


def test_flow_removed_of_others_is_not_ours():
    assert carrier.decode_flow_removed(flow_removed(0, value=77)) is None
    assert carrier.decode_flow_removed(flow_removed(0, value=cookie(Kind.BASE))) is None
    with pytest.raises(carrier.TruncatedError):
        carrier.decode_flow_removed(flow_removed(0)[:47])


def test_closed_by_shutdown():
    closed = carrier.closed_by_shutdown(carrier.ConnectionMark(4, 5, 6))
    assert closed == Closed(5, 6, 4, Reason.SHUTDOWN, counted=False)


# ------------------------------------------------------------------ CS -> DFS


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.booleans())
def test_a_patched_commit_is_the_readable_one(serial, member, tracked):
    made = encoder(sites.server())
    before, after = made.commit_template(1, member, tracked)
    assert before + serial.to_bytes(4, "big") + after == made.commit_actions(1, member, tracked, serial)


def test_a_reply_is_ryus_packet_out():
    made = encoder(sites.server())
    answer, known = reply()
    data = made.encode(answer, SYN, known)
    theirs = parser.OFPPacketOut(DATAPATH, ofp.OFP_NO_BUFFER, 7, [], SYN)
    theirs.xid = 0
    theirs.serialize()
    actions = made.commit_actions(1, 3, False, answer.query.serial)
    expected = bytes(theirs.buf[:24]) + actions + SYN
    lengths = [len(data).to_bytes(2, "big") for data in (expected, actions)]
    assert data == expected[:2] + lengths[0] + expected[4:16] + lengths[1] + expected[18:]


def test_a_commit_says_all_of_a_connection():
    made = encoder(sites.server(snat=True, number=0xABCDE), networks=sites.LAN)
    load, (name, commit, _, table, nested) = decode_actions(made.commit_actions(0xABCDE, 3, True, 0xA1B2C3D4))
    assert load == ("load", "reg2", 0, 32, 0xABCDE)
    assert (name, commit, table) == ("ct", True, Table.BOUND)
    assert nested == [
        ("nat", 2, int(netaddr.IPAddress("10.0.0.13")), (8080, 8080)), ("load", "ct_mark", 0, 32, 3),
        ("move", "eth_src", 0, "ct_label", Label.CLIENT_MAC, 48),
        ("move", "in_port", 0, "ct_label", Label.CLIENT_PORT, 16),
        ("load", "ct_label", Label.SERIAL, 32, 0xA1B2C3D4),
        ("load", "ct_label", Label.VIRTUAL_SERVER, 32, 0xABCDE | 1 << 24 | 1 << 25)]


@pytest.mark.parametrize(("more", "nat"), [
    ({"translate_port": False}, ("nat", 2, 0x0A00000D, (0, 0))),
    ({"translate_address": False}, ("nat", 2, 0x0A000064, (8080, 8080))),
    ({"translate_address": False, "translate_port": False}, None)])
def test_translations(more, nat):
    nested = decode_actions(encoder(sites.server(**more)).commit_actions(1, 3, False, 0))[1][4]
    assert next((action for action in nested if action[0] == "nat"), None) == nat


@pytest.mark.parametrize("error", [Error.UNKNOWN, Error.NOTAVAIL, Error.CONNLIMIT])
def test_an_error_is_a_refusal(error):
    answer, known = reply(error=error, number=0)
    data = encoder(sites.server()).encode(answer, SYN, known)
    assert data is not None
    assert decode_actions(data[24:40]) == [("output", 7, 0)]
    assert parse(data[40:])["tcp_flags"] == 0x14
    rst = frame("10.0.0.1", "10.0.0.100", flags=4)
    answer, known = reply(rst, error)
    assert encoder(sites.server()).encode(answer, rst, known) is None


def test_a_frame_that_fits_in_no_packet_out_is_let_go():
    big = frame("10.0.0.1", "10.0.0.100", flags=0x10, payload=bytes(65535 - 42 - 54))
    answer, known = reply(big)
    assert encoder(sites.server()).encode(answer, big, known) is None
    assert encoder(sites.server(state=State.RULES)).encode(answer._replace(install=False), big, known) == b""
    assert carrier.forward_to(HOST, big) == b""


def messages(data: bytes | None) -> list[bytes]:
    assert data is not None
    parts = []
    while data:
        length = data[2] << 8 | data[3]
        parts.append(data[:length])
        data = data[length:]
    return parts


@pytest.mark.parametrize("protocol", Protocol)
def test_rules_pair_both_directions(protocol):
    data = frame("10.0.0.1", "10.0.0.100", protocol.number)
    made = encoder(sites.server(state=State.RULES, protocol=protocol, idle_timeout=30, hard_timeout=300))
    answer, known = reply(data)
    inbound, outbound = made.connection_rules(answer)
    name = protocol.value.lower()
    for flow, kind in ((inbound, Kind.CONNECTION_IN), (outbound, Kind.CONNECTION_OUT)):
        assert (flow.idle_timeout, flow.hard_timeout, flow.flags) == (30, 300, 1)
        assert flow.cookie == connection_cookie(kind, 0xA1B2C3D4)
        assert any(isinstance(action, FinTimeout) for action in flow.actions) == (protocol is Protocol.TCP)
    assert (inbound.table, outbound.table) == (Table.RULES, Table.RULES_RETURN)
    client, vip, member = (netaddr.IPAddress(text).packed for text in ("10.0.0.1", "10.0.0.100", "10.0.0.13"))
    common = (("eth_type", 0x800), ("ip_proto", protocol.number))
    assert inbound.match == (*common, ("ipv4_src", client), ("ipv4_dst", vip), (f"{name}_src", 40000),
                             (f"{name}_dst", 80))
    assert outbound.match == (*common, ("ipv4_src", member), ("ipv4_dst", client), (f"{name}_src", 8080),
                              (f"{name}_dst", 40000))
    first, second, out = messages(made.encode(answer, data, known))
    # The way back is there before the packet can be answered.
    assert (first[24], second[24], out[1]) == (Table.RULES_RETURN, Table.RULES, 13)
    # It goes by its rule: where a full table refused that, the packet goes nowhere.
    assert decode_actions(out[24:24 + (out[16] << 8 | out[17])]) == [("resubmit", Table.RULES)]
    (only,) = messages(made.encode(answer._replace(install=False), data, known))
    actions = decode_actions(only[24:24 + (only[16] << 8 | only[17])])
    assert len(actions) == len([action for action in inbound.actions if not isinstance(action, FinTimeout)])
    assert not any(action[0] == "fin_timeout" for action in actions)


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("stands_in", [False, True])
def test_a_connection_stays_with_a_member_of_a_pool_that_is_not_used_now(state, stands_in):
    """It is asked about again (its rules have gone), and answered as before."""
    asked, instead = sites.server(state=state), sites.server(state=state, use="q")
    site = sites.configuration([instead if stands_in else asked], [
        sites.pool(of=sites.members(3), fallback_pool="q"), sites.pool("q", of=sites.members(3, first=4))])
    if stands_in:
        site = msgspec.structs.replace(site, redirected={1: asked})
    made = carrier.ReplyEncoder(1, site, Routes(site.networks.values()))
    for member in (2, 5):
        answer, known = reply(member=member)
        assert messages(made.encode(answer, SYN, known))


def test_rules_of_a_routed_connection_count_hops():
    made = encoder(sites.server(state=State.RULES, vip="192.168.1.100"), networks=(*sites.LAN, *sites.OUTSIDE))
    data = frame("192.168.1.5", "192.168.1.100")
    inbound, outbound = made.connection_rules(reply(data)[0])
    assert all("DecrementTtl()" in repr(flow.actions) for flow in (inbound, outbound))


def test_refuse_answers_for_whom_the_client_meant():
    translated = frame("10.0.0.1", "10.0.0.13", dport=8080, flags=0x10, ack=77)
    punted = carrier.decode_packet_in(
        punt(translated, Kind.GONE, ct_mark=3, ct_nw_dst=0x0A000064, ct_tp_dst=80, ct_nw_proto=6))
    data = carrier.refuse(punted, frames.parse(punted.frame))
    assert data is not None
    sent = parse(data[40:])
    assert (sent["ipv4_src"], sent["tcp_src"], sent["tcp_seq"], sent["tcp_flags"]) == (0x0A000064, 80, 77, 4)
    plain = carrier.decode_packet_in(punt(SYN, Kind.FULL))
    data = carrier.refuse(plain, frames.parse(SYN))
    assert data is not None and parse(data[40:])["ipv4_src"] == 0x0A000064
    # What "ovs-ofctl ct-flush br zone=2,'ct_nw_src=10.0.0.1,ct_nw_dst=10.0.0.100,...'" sends.
    assert carrier.forget(punted, frames.parse(punted.frame), 1).hex() == (
        "0404006800000000000023200000002006000000000000000000004800000000"
        "0000001400000000000000000000ffff0a00000100000000" "0001001400000000000000000000ffff0a00006400000000"
        f"00020008{frames.parse(punted.frame).signature.source_port:04x}0000" "0003000800500000" "0002000800020000")
    hidden = frame("10.0.0.254", "10.0.0.13", eth_src="02:6c:62:00:00:01")
    assert carrier.forget(carrier.decode_packet_in(punt(hidden, Kind.GONE)), frames.parse(hidden), 1) == b""
    assert carrier.refuse(carrier.decode_packet_in(punt(hidden, Kind.GONE)), frames.parse(hidden)) is None


def test_refuse_over_ipv6():
    translated = frame("fd00::1", "fd00::13", 17, dport=8080)
    vip = int(netaddr.IPAddress("fd00::100"))
    punted = carrier.decode_packet_in(punt(translated, Kind.GONE, ct_ipv6_dst=vip, ct_tp_dst=80))
    data = carrier.refuse(punted, frames.parse(translated))
    assert data is not None
    sent = parse(data[40:])
    assert (sent["ipv6_src"], sent["icmpv6_type"], sent["icmpv6_code"]) == (vip, 1, 4)


def test_probe_and_forward():
    data = carrier.probe(1, "10.0.0.5", "10.0.0.254")
    assert decode_actions(data[24:40]) == [("output", ofp.OFPP_FLOOD, 0)]
    assert parse(data[40:])["eth_src"] == int.from_bytes(probe_mac(1), "big")
    actions = decode_actions(carrier.forward_to(HOST, SYN)[24:24 + 16 + 16 + 8 + 16])
    assert actions == [("set_field", "eth_src", 0x026C62000001), ("set_field", "eth_dst", 0x020000000009), ("dec_ttl",),
                       ("output", 9, 0)]
    assert kind_of(cookie(Kind.BASE)) is Kind.BASE and kind_of(5) is None
