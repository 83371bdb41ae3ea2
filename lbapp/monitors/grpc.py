# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The check that calls grpc.health.v1.Health/Check: HTTP/2 in clear text, with prior knowledge (RFC 9113).

One call on one connection needs no flow control and no state but that of a single stream, so the frames are read here;
headers are hpack's business. What a server may say before it answers is limited.
"""

from __future__ import annotations

import struct

import hpack

from lbapp.monitors.checks import ANSWER_MOST, Check, Surroundings
from lbapp.monitors.errors import CheckFailed, printable
from lbapp.monitors.protocol import Target
from lbapp.monitors.stream import Stream

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _CONTINUATION = 0, 1, 3, 4, 6, 7, 9
_END_STREAM, _ACK, _END_HEADERS, _PADDED, _PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
_ENABLE_PUSH = 2
_FRAME_MOST = 16_384
_HEADERS_MOST = 16 << 10
_STREAM = 1

SERVING = 1
STATES = {0: "UNKNOWN", 1: "SERVING", 2: "NOT_SERVING", 3: "SERVICE_UNKNOWN"}
CODES = {"1": "CANCELLED", "2": "UNKNOWN", "3": "INVALID_ARGUMENT", "4": "DEADLINE_EXCEEDED", "5": "NOT_FOUND",
         "7": "PERMISSION_DENIED", "8": "RESOURCE_EXHAUSTED", "12": "UNIMPLEMENTED", "13": "INTERNAL",
         "14": "UNAVAILABLE", "16": "UNAUTHENTICATED"}


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """An HTTP/2 frame."""
    return struct.pack("!I", len(payload))[1:] + struct.pack("!BBI", kind, flags, stream) + payload


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise CheckFailed("the answer is no HealthCheckResponse")
        value |= (data[at] & 0x7F) << shift
        at += 1
        if not data[at - 1] & 0x80:
            return value, at
        shift += 7


def serving_status(message: bytes) -> int:
    """Field 1 of a HealthCheckResponse; it is 0 where it is left out.

    Raises:
        CheckFailed: it is no such message.
    """
    at, found = 0, 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag & 7 == 0:
            value, at = _varint(message, at)
            if tag == 8:
                found = value
        elif tag & 7 == 2:
            length, at = _varint(message, at)
            at += length
        elif tag & 7 in (1, 5):
            at += 8 if tag & 7 == 1 else 4
        else:
            raise CheckFailed("the answer is no HealthCheckResponse")
    if at > len(message):
        raise CheckFailed("the answer is no HealthCheckResponse")
    return found


class _Call:
    """What a server answers, frame by frame.

    Attributes:
        reply: what is to be sent in return.
        done: the stream has ended.
    """

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.data = bytearray()
        self.reply = b""
        self.done = False
        self._decoder = hpack.Decoder(max_header_list_size=_HEADERS_MOST)
        self._block: bytearray | None = None
        self._last = False
        self._greeted = False

    def take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        """Take a frame.

        Raises:
            CheckFailed: the call is over, or this is no HTTP/2.
        """
        if not self._greeted and kind != _SETTINGS:
            raise CheckFailed("the answer is no HTTP/2")
        self._greeted = True
        if self._block is not None and (kind != _CONTINUATION or stream != _STREAM):
            raise CheckFailed("the answer is no HTTP/2: headers without an end")
        if kind == _SETTINGS and not flags & _ACK:
            self.reply += frame(_SETTINGS, _ACK, 0)
        elif kind == _PING and not flags & _ACK:
            self.reply += frame(_PING, _ACK, 0, payload[:8])
        elif kind == _GOAWAY:
            if len(payload) < 8 or struct.unpack_from("!I", payload)[0] & 0x7FFFFFFF < _STREAM:
                raise CheckFailed("the server is going away")
        elif kind == _RST_STREAM and stream == _STREAM:
            code = struct.unpack("!I", payload)[0] if len(payload) == 4 else 0
            raise CheckFailed(f"the call was reset, error {code}")
        elif stream == _STREAM and kind in (_HEADERS, _CONTINUATION, _DATA):
            self._take_of_stream(kind, flags, payload)

    def _take_of_stream(self, kind: int, flags: int, payload: bytes) -> None:
        if kind in (_HEADERS, _DATA) and flags & _PADDED:
            if not payload or payload[0] >= len(payload):
                raise CheckFailed("the answer is no HTTP/2: wrong padding")
            payload = payload[1:len(payload) - payload[0]]
        if kind == _DATA:
            self.data += payload
            self.done = self.done or bool(flags & _END_STREAM)
            return
        if kind == _HEADERS:
            self._block, self._last = bytearray(), bool(flags & _END_STREAM)
            if flags & _PRIORITY:
                payload = payload[5:]
        if self._block is None:
            raise CheckFailed("the answer is no HTTP/2: headers without a beginning")
        self._block += payload
        if len(self._block) > _HEADERS_MOST:
            raise CheckFailed(f"headers of more than {_HEADERS_MOST >> 10} KiB")
        if flags & _END_HEADERS:
            try:
                decoded = self._decoder.decode(bytes(self._block), raw=True)
            except hpack.HPACKError:
                raise CheckFailed("the answer is no HTTP/2: headers that cannot be read") from None
            self.headers.update((bytes(name).decode("latin-1"), bytes(value).decode("latin-1"))
                                for name, value, *_ in decoded)
            self._block = None
            self.done = self.done or self._last


class Grpc(Check):
    """See the module."""

    def __init__(self, target: Target, around: Surroundings) -> None:
        super().__init__(target, around)
        monitor = self.monitor
        host = f"[{target.address}]" if ":" in target.address else target.address
        headers = hpack.Encoder().encode([
            (":method", "POST"), (":scheme", "http"), (":path", "/grpc.health.v1.Health/Check"),
            (":authority", monitor.domain_name or f"{host}:{target.checked_port}"),
            ("content-type", "application/grpc"), ("te", "trailers"), ("user-agent", "lbapp"),
        ])
        service = monitor.grpc_service.encode()
        length = bytes([len(service)]) if len(service) < 128 else bytes([len(service) & 0x7F | 0x80, len(service) >> 7])
        message = b"\x0a" + length + service if service else b""
        self._request = (_PREFACE + frame(_SETTINGS, 0, 0, struct.pack("!HI", _ENABLE_PUSH, 0))
                         + frame(_HEADERS, _END_HEADERS, _STREAM, headers)
                         + frame(_DATA, _END_STREAM, _STREAM, struct.pack("!BI", 0, len(message)) + message))

    async def run(self) -> bool:
        """See :class:`Check`."""
        stream = Stream(self.around.loop, self.family, self.address)
        try:
            await stream.connect()
            await stream.send(self._request)
            call = await self._hear(stream)
        finally:
            stream.close()
        self._judge(call)
        return True

    async def _hear(self, stream: Stream) -> _Call:
        call, heard, total = _Call(), bytearray(), 0
        while not call.done:
            data = await stream.receive()
            if not data:
                raise CheckFailed("the answer is cut off" if total else "connection closed without an answer")
            total += len(data)
            if total > ANSWER_MOST:
                raise CheckFailed("the answer has no end")
            heard += data
            while len(heard) >= 9 and not call.done:
                length = int.from_bytes(heard[:3], "big")
                if length > _FRAME_MOST:
                    raise CheckFailed("the answer is no HTTP/2")
                if len(heard) < 9 + length:
                    break
                call.take(heard[3], heard[4], int.from_bytes(heard[5:9], "big") & 0x7FFFFFFF,
                          bytes(heard[9:9 + length]))
                del heard[:9 + length]
            if call.reply and not call.done:
                await stream.send(call.reply)
                call.reply = b""
        return call

    @staticmethod
    def _judge(call: _Call) -> None:
        if call.headers.get(":status") != "200":
            raise CheckFailed(f"status {printable(call.headers.get(':status', 'missing'), 20)}, expected 200")
        code = call.headers.get("grpc-status", "0")
        if code != "0":
            said = printable(call.headers.get("grpc-message", ""), 100)
            name = CODES.get(code, printable(code, 10))
            raise CheckFailed(f"gRPC status {name}" + (f": {said}" if said else ""))
        data = bytes(call.data)
        if len(data) < 5 or data[0] != 0 or len(data) < 5 + int.from_bytes(data[1:5], "big"):
            raise CheckFailed("the answer is no HealthCheckResponse")
        status = serving_status(data[5:5 + int.from_bytes(data[1:5], "big")])
        if status != SERVING:
            raise CheckFailed(f"{STATES.get(status, f'health {status}')}, expected SERVING")
