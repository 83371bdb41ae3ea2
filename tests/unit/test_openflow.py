# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Our OpenFlow bytes against Ryu 4.34's own serialization, and against ovs-ofctl's where Ryu has no words."""

from __future__ import annotations

import struct
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ryu.ofproto import ofproto_v1_3 as ofp
from ryu.ofproto import ofproto_v1_3_parser as parser

import tests.fake_frames  # noqa: F401  (prepares eventlet for Ryu)
from lbapp.dataflow import openflow as of

# Ryu's names where they differ from ours; what it has no name for is held against ovs-ofctl's bytes.
RYU_NAMES = {"nxm_in_port": "in_port_nxm"}
DATAPATH = types.SimpleNamespace(ofproto=ofp, ofproto_parser=parser)


def ryu_bytes(message) -> bytes:
    message.xid = message.xid or 0
    message.serialize()
    return bytes(message.buf)


def ryu_actions(*actions) -> bytes:
    data = bytearray()
    for action in actions:
        action.serialize(data, len(data))
    return bytes(data)


EXPRESSIBLE = sorted(name for name in of.FIELDS if RYU_NAMES.get(name, name) in {f.name for f in ofp.oxm_types})


def ryu_value(name: str, value: int):
    size = of.FIELDS[name].size
    kind = next(f.type for f in ofp.oxm_types if f.name == RYU_NAMES.get(name, name))
    return kind.to_user(value.to_bytes(size, "big"))


def test_ryu_knows_all_fields_but_these():
    assert set(of.FIELDS) - set(EXPRESSIBLE) == {
        "nd_reserved", "nd_options_type", "ct_nw_proto", "ct_nw_src", "ct_nw_dst", "ct_ipv6_src", "ct_ipv6_dst",
        "ct_tp_src", "ct_tp_dst"}


@given(st.data())
def test_a_match_is_ryus(data):
    names = data.draw(st.lists(st.sampled_from(EXPRESSIBLE), unique=True, max_size=6))
    ours: list[tuple] = []
    theirs: list[tuple] = []
    for name in names:
        size = of.FIELDS[name].size
        value = data.draw(st.integers(0, 256**size - 1))
        if data.draw(st.booleans()):
            mask = data.draw(st.integers(0, 256**size - 2))
            ours.append((name, value & mask, mask))
            theirs.append((RYU_NAMES.get(name, name), (ryu_value(name, value & mask), ryu_value(name, mask))))
        else:
            ours.append((name, value))
            theirs.append((RYU_NAMES.get(name, name), ryu_value(name, value)))
    match = parser.OFPMatch(_ordered_fields=theirs)
    expected = bytearray()
    match.serialize(expected, 0)
    assert of.encode_match(tuple(ours)) == bytes(expected)


def test_a_full_mask_is_no_mask():
    assert of.encode_match((("ip_proto", 6, 0xFF),)) == of.encode_match((("ip_proto", 6),))


def test_a_value_of_another_size_is_refused():
    with pytest.raises(ValueError, match="expected 4 bytes, got 16"):
        of.encode_match((("ipv4_src", bytes(16)),))


ACTIONS = [
    (of.Output(5), lambda: parser.OFPActionOutput(5, 0)),
    (of.Output(of.CONTROLLER, 65535), lambda: parser.OFPActionOutput(ofp.OFPP_CONTROLLER, 65535)),
    (of.OutputRegister("reg3"), lambda: parser.NXActionOutputReg(15, "reg3", 0)),
    (of.Group(77), lambda: parser.OFPActionGroup(77)),
    (of.SetField("eth_src", bytes.fromhex("026c62000001")),
     lambda: parser.OFPActionSetField(eth_src="02:6c:62:00:00:01")),
    (of.SetField("ipv4_dst", bytes((10, 0, 0, 1))), lambda: parser.OFPActionSetField(ipv4_dst="10.0.0.1")),
    (of.SetField("ipv6_src", bytes(15) + b"\1"), lambda: parser.OFPActionSetField(ipv6_src="::1")),
    (of.SetField("icmpv4_type", 0), lambda: parser.OFPActionSetField(icmpv4_type=0)),
    (of.SetField("tcp_dst", 8080), lambda: parser.OFPActionSetField(tcp_dst=8080)),
    (of.SetField("udp_src", 53), lambda: parser.OFPActionSetField(udp_src=53)),
    (of.SetField("arp_op", 2), lambda: parser.OFPActionSetField(arp_op=2)),
    (of.SetTtl(64), lambda: parser.OFPActionSetNwTtl(64)),
    (of.DecrementTtl(), lambda: parser.OFPActionDecNwTtl()),
    (of.Load("reg2", 9), lambda: parser.NXActionRegLoad(0 << 6 | 31, "reg2", 9)),
    (of.Load("ct_label", 0xABCDEF, 96, 24), lambda: parser.NXActionRegLoad(96 << 6 | 23, "ct_label", 0xABCDEF)),
    (of.Load("nxm_in_port", 0), lambda: parser.NXActionRegLoad(15, "in_port_nxm", 0)),
    (of.Move("eth_src", "eth_dst", 48), lambda: parser.NXActionRegMove("eth_src", "eth_dst", 48)),
    (of.Move("ct_label", "reg3", 16, 48, 0), lambda: parser.NXActionRegMove("ct_label", "reg3", 16, 48, 0)),
    (of.Move("nxm_in_port", "ct_label", 16, 0, 48),
     lambda: parser.NXActionRegMove("in_port_nxm", "ct_label", 16, 0, 48)),
    (of.Resubmit(30), lambda: parser.NXActionResubmitTable(0xFFF8, 30)),
    (of.FinTimeout(2, 10), lambda: parser.NXActionFinTimeout(2, 10)),
    (of.MultipathSource("reg4", 256), lambda: parser.NXActionMultipath(4, 0, 0, 255, 0, 31, "reg4")),
    (of.Conntrack(7), lambda: parser.NXActionCT(0, "", 7, 255, 0, [])),
    (of.Conntrack(7, table=20, nat=of.Nat()), lambda: parser.NXActionCT(0, "", 7, 20, 0, [parser.NXActionNAT(0)])),
    (of.Conntrack(1, True, 40, of.Nat(of.NAT_SOURCE, bytes((10, 0, 0, 9)), (1024, 65535)),
                  (of.Load("ct_mark", 4), of.Move("eth_src", "ct_label", 48))),
     lambda: parser.NXActionCT(1, "", 1, 40, 0, [
         parser.NXActionNAT(1, range_ipv4_min="10.0.0.9", range_proto_min=1024, range_proto_max=65535),
         parser.NXActionRegLoad(31, "ct_mark", 4), parser.NXActionRegMove("eth_src", "ct_label", 48)])),
    (of.Conntrack(1, True, 40, of.Nat(of.NAT_DESTINATION, bytes(15) + b"\1")),
     lambda: parser.NXActionCT(1, "", 1, 40, 0, [parser.NXActionNAT(2, range_ipv6_min="::1")])),
]


@pytest.mark.parametrize(("ours", "theirs"), ACTIONS, ids=[repr(a)[:60] for a, _ in ACTIONS])
def test_an_action_is_ryus(ours, theirs):
    assert ours.encode() == ryu_actions(theirs())


# What `ovs-ofctl -O OpenFlow13 --no-names add-flow` (3.1.0) sent to a listening socket for
# set_field:2->nd_options_type, set_field:0x60000000->nd_reserved
OVS_ND_OPTIONS_TYPE = "00190010100004010200000000000000"
OVS_ND_RESERVED = "00190010100002046000000000000000"


# ct(commit,zone=65535,table=31,nat(dst=10.0.0.2:8080),exec(load:4->NXM_NX_CT_MARK[])). (Ryu does not pad a NAT action
# with one port, which Open vSwitch then refuses.)
OVS_COMMIT = ("ffff0048000023200023000100000000ffff1f0000000000ffff00180000232000240000000200110a0000021f900000"
              "ffff0018000023200007001f0001d6040000000000000004")


@pytest.mark.parametrize(("ours", "ovs"), [
    (of.Conntrack(65535, True, 31, of.Nat(of.NAT_DESTINATION, bytes((10, 0, 0, 2)), (8080, 8080)),
                  (of.Load("ct_mark", 4),)), OVS_COMMIT),
    (of.SetField("nd_options_type", 2), OVS_ND_OPTIONS_TYPE),
    (of.SetField("nd_reserved", 0x60000000), OVS_ND_RESERVED)])
def test_an_action_that_ryu_cannot_express_is_open_vswitchs(ours, ovs):
    assert ours.encode().hex() == ovs


# ct_nw_proto=6,ct_nw_src=..., the original tuple: ovs-ofctl's match bytes
OVS_MATCH = ("0001003c80000a02080080001401060001d30800000020000000200001f0040a0000010001f2040a000002"
             "0001ee01060001f8029c400001fa02005000000000")


def test_a_match_on_the_original_tuple_is_open_vswitchs():
    match = of.encode_match((("eth_type", 0x800), ("ip_proto", 6), ("ct_state", 0x20, 0x20), ("ct_nw_proto", 6),
                             ("ct_nw_src", bytes((10, 0, 0, 1))), ("ct_nw_dst", bytes((10, 0, 0, 2))),
                             ("ct_tp_src", 40000), ("ct_tp_dst", 80)))
    assert sorted_fields(match) == sorted_fields(bytes.fromhex(OVS_MATCH))


def sorted_fields(match: bytes) -> list[bytes]:
    length, at, fields = match[2] << 8 | match[3], 4, []
    while at < length:
        fields.append(match[at:at + 4 + match[at + 3]])
        at += 4 + match[at + 3]
    return sorted(fields)


# ------------------------------------------------------------------ messages

FLOW = of.Flow(30, 10, (("eth_type", 0x800), ("reg2", 5), ("reg1", 6)),
               (of.Load("reg1", 3), of.Output(of.CONTROLLER, 65535)), 0x1B03000005ABCDEF, 31, 60, 600, 1)


def ryu_flow_mod(**kwargs):
    return parser.OFPFlowMod(DATAPATH, buffer_id=ofp.OFP_NO_BUFFER, **kwargs)


def with_xid(message, xid: int):
    message.set_xid(xid)
    return message


def test_add_flow_is_ryus():
    expected = with_xid(ryu_flow_mod(
        cookie=FLOW.cookie, table_id=30, command=ofp.OFPFC_ADD, idle_timeout=60, hard_timeout=600, priority=10, flags=1,
        match=parser.OFPMatch(_ordered_fields=[("eth_type", 0x800), ("reg2", 5), ("reg1", 6)]), instructions=[
            parser.OFPInstructionActions(ofp.OFPIT_APPLY_ACTIONS, [
                parser.NXActionRegLoad(31, "reg1", 3), parser.OFPActionOutput(ofp.OFPP_CONTROLLER, 65535)]),
            parser.OFPInstructionGotoTable(31)]), 0x1B000001)
    assert of.add_flow(FLOW, 0x1B000001) == ryu_bytes(expected)


def test_delete_flow_is_ryus():
    expected = with_xid(ryu_flow_mod(
        table_id=30, command=ofp.OFPFC_DELETE_STRICT, priority=10, out_port=ofp.OFPP_ANY, out_group=ofp.OFPG_ANY,
        match=parser.OFPMatch(_ordered_fields=[("eth_type", 0x800), ("reg2", 5), ("reg1", 6)])), 9)
    assert of.delete_flow(30, 10, of.encode_match(FLOW.match), 9) == ryu_bytes(expected)


def test_delete_by_cookie_is_ryus():
    expected = with_xid(ryu_flow_mod(
        cookie=0x1B08000000000007, cookie_mask=0xFFFEFFFFFFFFFFFF, table_id=ofp.OFPTT_ALL, command=ofp.OFPFC_DELETE,
        priority=0, out_port=ofp.OFPP_ANY, out_group=ofp.OFPG_ANY, match=parser.OFPMatch()), 9)
    assert of.delete_by_cookie(0x1B08000000000007, 0xFFFEFFFFFFFFFFFF, 9) == ryu_bytes(expected)


@pytest.mark.parametrize("command", [of.GROUP_ADD, of.GROUP_MODIFY, of.GROUP_DELETE])
def test_group_mod_is_ryus(command):
    group = of.SelectGroup(5, (of.Bucket(3, (of.Load("reg1", 8), of.Resubmit(30))),
                               of.Bucket(256, (of.Load("reg1", 9),))))
    buckets = [parser.OFPBucket(3, ofp.OFPP_ANY, ofp.OFPG_ANY, [parser.NXActionRegLoad(31, "reg1", 8),
                                                               parser.NXActionResubmitTable(0xFFF8, 30)]),
               parser.OFPBucket(256, ofp.OFPP_ANY, ofp.OFPG_ANY, [parser.NXActionRegLoad(31, "reg1", 9)])]
    expected = parser.OFPGroupMod(DATAPATH, command, ofp.OFPGT_SELECT, 5, buckets if command != of.GROUP_DELETE else [])
    assert of.group_mod(command, group, 3) == ryu_bytes(with_xid(expected, 3))


@given(st.binary(max_size=200), st.integers(0, 2**32 - 1))
def test_packet_out_is_ryus(frame, port):
    actions = [parser.OFPActionOutput(2, 0)]
    expected = parser.OFPPacketOut(DATAPATH, ofp.OFP_NO_BUFFER, port, actions, frame)
    assert of.packet_out(port, of.Output(2).encode(), frame, 4) == ryu_bytes(with_xid(expected, 4))


def test_bundles_are_ryus():
    flags = ofp.ONF_BF_ATOMIC | ofp.ONF_BF_ORDERED
    for kind, theirs in ((of.BUNDLE_OPEN, ofp.ONF_BCT_OPEN_REQUEST), (of.BUNDLE_COMMIT, ofp.ONF_BCT_COMMIT_REQUEST),
                         (of.BUNDLE_DISCARD, ofp.ONF_BCT_DISCARD_REQUEST)):
        expected = with_xid(parser.ONFBundleCtrlMsg(DATAPATH, 6, theirs, flags, []), 12)
        assert of.bundle_control(6, kind, 12) == ryu_bytes(expected)
    assert ofp.ONF_BCT_COMMIT_REPLY == of.BUNDLE_COMMITTED
    inner = parser.OFPGroupMod(DATAPATH, ofp.OFPGC_DELETE, ofp.OFPGT_SELECT, 5, [])
    expected = with_xid(parser.ONFBundleAddMsg(DATAPATH, 6, flags, inner, []), 12)
    assert of.bundle_add(6, of.group_mod(of.GROUP_DELETE, of.SelectGroup(5, ()), 999), 12) == ryu_bytes(expected)


def test_a_digest_tells_content_but_not_cookie():
    assert of.digest(FLOW) == of.digest(FLOW._replace(cookie=0))
    changed = [FLOW._replace(goto=40), FLOW._replace(actions=FLOW.actions[:1]), FLOW._replace(idle_timeout=61),
               FLOW._replace(hard_timeout=1), FLOW._replace(flags=0)]
    assert len({of.digest(flow) for flow in [FLOW, *changed]}) == 6


def test_a_message_has_its_length_and_transaction():
    assert struct.unpack("!BBHI", of.message(18, b"12345", 77)[:8]) == (4, 18, 13, 77)
