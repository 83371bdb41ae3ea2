# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What passes the checks of lengths comes to an end in Ryu's parsers."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import struct
import time
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ryu.ofproto import ofproto_parser, ofproto_v1_3, ofproto_v1_3_parser

from lbapp.dataflow.counters import request_body
from lbapp.dataflow.lengths import LengthError, check_match, check_multipart, check_queues
from lbapp.dataflow.openflow import GROUP_ADD, add_flow, group_mod, message
from lbapp.dataflow.program import SwitchProgram
from tests import sites
from tests.fake_switch import FakeSwitch

DATAPATH = types.SimpleNamespace(ofproto=ofproto_v1_3, ofproto_parser=ofproto_v1_3_parser, id=1)
SITE = sites.covering()["snat switch 4"]


def ends(data: bytes, seconds: float = 30.0) -> bool:
    """Whether Ryu's parser comes to an end; in a process of its own, for it catches all exceptions."""
    child = os.fork()
    if not child:
        logging.disable(logging.CRITICAL)
        with contextlib.suppress(BaseException):
            ofproto_parser.msg(DATAPATH, 4, data[1], len(data), 0, data)
        os._exit(0)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def replies() -> list[bytes]:
    """What a switch with rules and groups of ours answers."""
    switch, program = FakeSwitch(), SwitchProgram(1, sites.reachable(SITE))
    program.begin(SITE)
    switch.receive(b"".join([*(group_mod(GROUP_ADD, group) for group in program.groups()),
                             *map(add_flow, program.flows())]))
    switch.receive(message(18, struct.pack("!HH4x", 7, 0))
                   + message(18, struct.pack("!HH4x", 1, 0) + request_body()))
    return switch.outbox


REPLIES = replies()
FEATURES = message(19, struct.pack("!HH4x", 12, 0) + struct.pack("!HB5x32sQQII", 64 + 16 + 8, 0, b"t", 0, 0, 0, 0)
                   + struct.pack("!HHHHHH", 0, 12, 1, 4, 4, 4) + bytes(4) + struct.pack("!HHI", 8, 8, 0x80000004))
METER_CONFIG = message(19, struct.pack("!HH4x", 10, 0) + struct.pack("!HHIHHII4x", 24, 1, 1, 1, 16, 100, 10))
QUEUES = message(23, struct.pack("!I4xII", 1, 1, 1) + struct.pack("!H6xHH4xH6x", 32, 1, 16, 10))


def check(data: bytes) -> None:
    (check_queues if data[1] == 23 else check_multipart)(data)


@pytest.mark.parametrize("data", [*REPLIES, FEATURES, METER_CONFIG, QUEUES,
                                  *(message(19, struct.pack("!HH4x", kind, 0)) for kind in range(14))])
def test_what_is_right_passes(data):
    check(data)
    assert ends(data)


@pytest.mark.parametrize("kind", [1, 6, 7, 9, 10, 12])
def test_entries_of_no_length_are_refused(kind):
    with pytest.raises(LengthError, match="multipart entry of 0 bytes"):
        check_multipart(message(19, struct.pack("!HH4x", kind, 0) + bytes(128)))


@pytest.mark.parametrize("data", [
    message(19, bytes(4)), message(23, bytes(4)), message(23, bytes(8) + bytes(16)),
    message(23, bytes(16) + b"\0\x20" + bytes(22)), METER_CONFIG[:26] + b"\0\0" + METER_CONFIG[28:],
    FEATURES[:82] + b"\0\0" + FEATURES[84:], FEATURES[:86] + b"\0\0" + FEATURES[88:]])
def test_lists_within_are_checked(data):
    with pytest.raises(LengthError):
        check(data)


def test_a_match_must_fit():
    with pytest.raises(LengthError):
        check_match(b"\0\1\0\x20" + bytes(12), 0, 16, "rule")
    with pytest.raises(LengthError):
        check_match(b"", 0, 0, "rule")
    assert check_match(b"\0\1\0\4" + bytes(4), 0, 8, "rule") == 8


@given(st.sampled_from([*REPLIES[:6], FEATURES, METER_CONFIG, QUEUES]), st.data())
@settings(max_examples=150)
def test_what_passes_comes_to_an_end(data, draw):
    mangled = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 3))):
        mangled[draw.draw(st.integers(16, min(len(mangled), 400) - 1))] = draw.draw(st.sampled_from((0, 1, 4, 8, 255)))
    try:
        check(bytes(mangled))
    except LengthError:
        return
    assert ends(bytes(mangled))
