# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The connection to a switch: what Ryu must not be given, and messages over a pair of sockets."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import struct
import types

import eventlet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tests.fake_frames  # noqa: F401  (prepares eventlet for Ryu)

# isort: split
from ryu.base import app_manager
from ryu.controller import ofp_handler
from ryu.controller.handler import DEAD_DISPATCHER
from ryu.lib import hub
from ryu.ofproto import ofproto_v1_3, ofproto_v1_3_parser

from lbapp.dataflow import ryu_shim
from lbapp.dataflow.lengths import LengthError
from lbapp.dataflow.openflow import message
from lbapp.dataflow.ryu_shim import check_lengths
from tests.fake_frames import frame, packet_in, parse
from tests.unit.test_lengths import ends

PUNT = packet_in(0x1B10000001000000, 20, parse(frame("10.0.0.1", "10.0.0.100")) | {"in_port": 1, "reg2": 1})
HELLO = message(0, struct.pack("!HHI", 1, 8, 0x10), 1)


def hello(element: bytes) -> bytes:
    return message(0, element)


@pytest.mark.parametrize("data", [
    hello(b"\0\1\0\0"), hello(b"\0\1\0\3"), hello(b"\0\1\0\x09\0\0\0\x10"), hello(b"\0\1"),
    PUNT[:26] + b"\0\0" + PUNT[28:], PUNT[:26] + b"\0\3" + PUNT[28:], PUNT[:26] + b"\xff\xff" + PUNT[28:], PUNT[:30],
    PUNT[:31] + b"\0" + PUNT[32:], PUNT[:31] + b"\xff" + PUNT[32:],
    message(11, bytes(40)), message(11, bytes(40) + b"\0\1\0\0" + bytes(4)), message(19, bytes(4)),
    message(6, bytes(20)), message(12, bytes(60)), message(1, bytes(2)), message(4, bytes(4)),
    message(19, struct.pack("!HH4x", 1, 0) + bytes(64))])
def test_lengths_that_contradict_each_other_are_refused(data):
    with pytest.raises(LengthError):
        check_lengths(data[1], data)


@pytest.mark.parametrize("data", [HELLO, message(0, b""), PUNT, message(2, b"echo"), message(21, b"")])
def test_what_is_right_passes(data):
    check_lengths(data[1], data)


DATAPATH = types.SimpleNamespace(ofproto=ofproto_v1_3, ofproto_parser=ofproto_v1_3_parser, id=1)


@given(st.sampled_from([HELLO, PUNT]),
       st.lists(st.tuples(st.integers(8, 60), st.integers(0, 255)), min_size=1, max_size=3))
@settings(max_examples=50)
def test_what_passes_is_parsed_in_finite_time(data, changes):
    mangled = bytearray(data)
    for at, value in changes:
        if at < len(mangled):
            mangled[at] = value
    try:
        check_lengths(mangled[1], bytes(mangled))
    except LengthError:
        return
    assert ends(bytes(mangled))


# ------------------------------------------------------------------ over sockets


class Receiver:
    """Takes what is ours (packet-ins), answers each with a barrier of the same number."""

    def __init__(self) -> None:
        self.got: list[tuple[int, bytes]] = []
        self.flushed: list[int] = []

    def flush(self, datapath):
        self.flushed.append(len(self.got))
        return b""

    def receive(self, datapath, kind, data):
        self.got.append((kind, data))
        if data[8:12] == b"BAD!":
            raise ValueError("this cannot be")
        return message(20, b"", int.from_bytes(data[4:8], "big")) if kind == ryu_shim.PACKET_IN else None


def tcp_pair():
    """Two ends of a connection over loopback."""
    with contextlib.closing(eventlet.listen(("127.0.0.1", 0))) as listener:
        ours = eventlet.connect(listener.getsockname())
        theirs, _ = listener.accept()
    return ours, theirs


@pytest.fixture
def link():
    manager = app_manager.AppManager.get_instance()
    brick = app_manager.lookup_service_brick("ofp_event")
    made = None
    if brick is None:
        made = brick = manager.instantiate(ofp_handler.OFPHandler)
    receiver = Receiver()
    ours, theirs = tcp_pair()
    datapath = ryu_shim.datapath_class(receiver)(theirs, ("127.0.0.1", 1))
    thread = eventlet.spawn(datapath.serve)
    ours.settimeout(3)
    yield types.SimpleNamespace(socket=ours, datapath=datapath, receiver=receiver, brick=brick)
    datapath.close()
    ours.close()
    with contextlib.suppress(BaseException), eventlet.Timeout(2):
        thread.wait()
    if made is not None:
        app_manager.SERVICE_BRICKS.pop("ofp_event", None)
        manager.applications.pop("ofp_event", None)


class Reader:
    """Whole messages off a socket."""

    def __init__(self, connection) -> None:
        self.connection, self.pending = connection, b""

    def next(self) -> bytes:
        while len(self.pending) < 8 or len(self.pending) < self.pending[2] << 8 | self.pending[3]:
            chunk = self.connection.recv(65536)
            if not chunk:
                return b""
            self.pending += chunk
        length = self.pending[2] << 8 | self.pending[3]
        data, self.pending = self.pending[:length], self.pending[length:]
        return data

    def until(self, kind: int) -> bytes:
        while True:
            data = self.next()
            if not data or data[1] == kind:
                return data


def handshake(link) -> Reader:
    reader = Reader(link.socket)
    link.socket.sendall(HELLO)
    features = reader.until(5)
    link.socket.sendall(message(6, struct.pack("!QIBB2xII", 1, 0, 254, 0, 0, 0), int.from_bytes(features[4:8], "big")))
    description = reader.until(18)
    link.socket.sendall(message(19, struct.pack("!HH4x", 13, 0), int.from_bytes(description[4:8], "big")))
    for _ in range(100):
        if link.datapath.state == "main":
            return reader
        eventlet.sleep(0.01)
    raise AssertionError(f"state {link.datapath.state}")


def punt(number: int) -> bytes:
    return PUNT[:4] + number.to_bytes(4, "big") + PUNT[8:]


def test_a_switch_shakes_hands_and_is_listened_to(link):
    reader = handshake(link)
    for number in range(100, 110):
        link.socket.sendall(punt(number))
        assert reader.until(21 - 1)[4:8] == number.to_bytes(4, "big")


def test_messages_in_pieces_and_many_in_one(link):
    reader = handshake(link)
    many = b"".join(punt(number) for number in range(500))
    for at in range(0, len(many), 997):
        link.socket.sendall(many[at:at + 997])
        if at % 7 == 0:
            eventlet.sleep(0)
    answers = [int.from_bytes(reader.until(20)[4:8], "big") for _ in range(500)]
    assert answers == list(range(500))
    # What the receiver has to do before answers are sent, it is told once for each batch of them.
    assert 0 < len(link.receiver.flushed) < 500
    assert link.receiver.flushed[-1] == len(link.receiver.got)


def test_what_the_receiver_leaves_goes_to_ryu(link):
    reader = handshake(link)
    link.socket.sendall(message(2, b"hello?", 99))
    assert reader.until(3) == message(3, b"hello?", 99)


def test_what_is_queued_and_what_is_sent_at_once_are_whole(link):
    reader = handshake(link)
    for number in range(50):
        link.datapath.send(message(2, bytes(200), 1000 + number))
    link.socket.sendall(punt(7))
    kinds = [reader.next()[1] for _ in range(51)]
    assert sorted(kinds) == [2] * 50 + [20]


@pytest.mark.parametrize("garbage", [
    b"GET / HTTP/1.1\r\n\r\n", bytes(64), message(99, b""), b"\x04\x0a\x00\x04\x00\x00\x00\x00",
    message(10, b"BAD!" + bytes(60)), hello(b"\0\1\0\0")])
def test_garbage_closes_the_connection(link, garbage):
    reader = handshake(link)
    link.socket.sendall(garbage)
    while reader.next():
        pass
    assert link.datapath.state == DEAD_DISPATCHER or link.datapath.send_q is None


def test_the_listener_outlives_a_lack_of_descriptors(monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(ryu_shim, "ACCEPT_PAUSE", 0.0)
    lacks = [OSError(code, os.strerror(code)) for code in (errno.EMFILE, errno.EMFILE, errno.ECONNABORTED)]
    served: list[object] = []

    class Listener:
        def accept(self):
            if lacks:
                raise lacks.pop(0)
            if not served:
                return "connection", ("127.0.0.1", 1)
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(eventlet, "listen", lambda *_, **__: Listener())
    monkeypatch.setattr(hub, "spawn", lambda _handle, *arguments: served.append(arguments))
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        ryu_shim._listen(None, 6653, 6653)
    assert served == [("connection", ("127.0.0.1", 1))]
    assert [one.getMessage() for one in caplog.records] == [
        "cannot accept a switch: [Errno 24] Too many open files; trying again"]


def test_who_does_not_shake_hands_is_closed(monkeypatch):
    monkeypatch.setattr(ryu_shim, "HANDSHAKE_SECONDS", 0.05)
    manager = app_manager.AppManager.get_instance()
    made = app_manager.lookup_service_brick("ofp_event") or manager.instantiate(ofp_handler.OFPHandler)
    assert made
    ours, theirs = tcp_pair()
    datapath = ryu_shim.datapath_class(Receiver())(theirs, ("127.0.0.1", 1))
    thread = eventlet.spawn(datapath.serve)
    ours.settimeout(3)
    reader = Reader(ours)
    while reader.next():
        pass
    assert datapath.state == DEAD_DISPATCHER
    thread.kill()
    ours.close()
