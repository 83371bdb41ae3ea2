# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""lbapp.monitors.grpc: against a health server that speaks HTTP/2 frame by frame, well and ill."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any

import hpack
import pytest

from lbapp.monitors.errors import CheckFailed
from lbapp.monitors.grpc import serving_status
from tests.monitored import HASTY, closed_port, endless, finds, says, silent, target, tcp_server

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, CONTINUATION = 0, 1, 3, 4, 6, 7, 9
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
Fields = Sequence[tuple[str, str]]


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def message(status: int | None) -> bytes:
    body = b"" if status is None else bytes([8, status])
    return struct.pack("!BI", 0, len(body)) + body


class Server:
    """Reads a whole call, then answers.

    Attributes:
        calls: what was asked: headers, and the name of the service.
        acknowledged: kinds of frames that the client acknowledged.
    """

    def __init__(self, answer: Callable[[hpack.Encoder], bytes]) -> None:
        self.answer = answer
        self.calls: list[tuple[dict[str, str], bytes]] = []
        self.acknowledged: list[int] = []

    def __call__(self, connection: socket.socket) -> None:
        stream = connection.makefile("rb")
        assert stream.read(len(PREFACE)) == PREFACE
        connection.sendall(frame(SETTINGS, 0, 0, struct.pack("!HI", 3, 100)) + frame(PING, 0, 0, b"12345678"))
        decoder, body, ended = hpack.Decoder(), b"", False
        headers: dict[str, str] = {}
        while not ended or len(self.acknowledged) < 2:
            head = stream.read(9)
            if len(head) < 9:
                return
            payload = stream.read(int.from_bytes(head[:3], "big"))
            kind, flags = head[3], head[4]
            if kind in (SETTINGS, PING) and flags & 1:
                assert payload == (b"12345678" if kind == PING else b"")
                self.acknowledged.append(kind)
            elif kind == HEADERS:
                headers = {str(name): str(value) for name, value in decoder.decode(payload)}
            elif kind == DATA:
                body += payload
                ended = bool(flags & 1)
        assert body[0] == 0 and int.from_bytes(body[1:5], "big") == len(body) - 5
        self.calls.append((headers, body[5:]))
        connection.sendall(self.answer(hpack.Encoder()))


def health(status: int | None, head: Fields = ((":status", "200"), ("content-type", "application/grpc")),
           trailers: Fields = (("grpc-status", "0"),)) -> Callable[[hpack.Encoder], bytes]:
    def answer(encoder: hpack.Encoder) -> bytes:
        return (frame(HEADERS, 4, 1, encoder.encode(head)) + frame(DATA, 0, 1, message(status))
                + frame(HEADERS, 5, 1, encoder.encode(trailers)))

    return answer


def refusal(*fields: tuple[str, str]) -> Callable[[hpack.Encoder], bytes]:
    """An answer of trailers only."""
    return lambda encoder: frame(HEADERS, 5, 1, encoder.encode([(":status", "200"), *fields]))


def padded(encoder: hpack.Encoder) -> bytes:
    """Padding, priority, headers in pieces, frames of other streams and of unknown kinds."""
    head = encoder.encode([(":status", "200")])
    tail = encoder.encode([("grpc-status", "0"), ("x", "y" * 100)])
    return (frame(HEADERS, 4 | 8 | 0x20, 1, b"\x03" + b"\0\0\0\0\x10" + head + b"\0\0\0")
            + frame(8, 0, 0, b"\0\0\x10\0") + frame(0xF0, 0, 0, b"?") + frame(DATA, 1, 3, b"other")
            + frame(DATA, 8, 1, b"\x02" + message(1)[:4] + b"\0\0") + frame(DATA, 0, 1, message(1)[4:])
            + frame(GOAWAY, 0, 0, struct.pack("!II", 1, 0))
            + frame(HEADERS, 1, 1, tail[:10]) + frame(CONTINUATION, 0, 1, tail[10:50])
            + frame(CONTINUATION, 4, 1, tail[50:]))


@pytest.mark.parametrize(("answer", "found"), [
    (health(1), "up"),
    (padded, "up"),
    (health(2), "NOT_SERVING, expected SERVING"),
    (health(None), "UNKNOWN, expected SERVING"),
    (health(3), "SERVICE_UNKNOWN, expected SERVING"),
    (health(9), "health 9, expected SERVING"),
    (health(1, trailers=(("grpc-status", "13"), ("grpc-message", "oh\x1b no"))), "gRPC status INTERNAL: oh no"),
    (refusal(("grpc-status", "5"), ("grpc-message", "unknown service")), "gRPC status NOT_FOUND: unknown service"),
    (refusal(("grpc-status", "12")), "gRPC status UNIMPLEMENTED"),
    (refusal(("grpc-status", "99")), "gRPC status 99"),
    (refusal(("grpc-status", "0")), "the answer is no HealthCheckResponse"),
    (health(1, head=((":status", "404"),)), "status 404, expected 200"),
    (lambda _: frame(RST_STREAM, 0, 1, struct.pack("!I", 7)), "the call was reset, error 7"),
    (lambda _: frame(GOAWAY, 0, 0, struct.pack("!II", 0, 2)), "the server is going away"),
    (lambda _: frame(HEADERS, 4, 1, b"\xff" * 20), "the answer is no HTTP/2: headers that cannot be read"),
    (lambda _: frame(HEADERS, 0, 1, b"") + frame(DATA, 0, 1), "the answer is no HTTP/2: headers without an end"),
    (lambda _: frame(CONTINUATION, 4, 1, b""), "the answer is no HTTP/2: headers without a beginning"),
    (lambda _: frame(DATA, 8, 1, b"\x05abc"), "the answer is no HTTP/2: wrong padding"),
    (lambda _: frame(DATA, 8, 1, b""), "the answer is no HTTP/2: wrong padding"),
    (lambda _: frame(HEADERS, 0, 1) + 5 * frame(CONTINUATION, 0, 1, bytes(4096)), "headers of more than 16 KiB"),
    (lambda _: frame(DATA, 0, 1, bytes(16_384)) * 5, "the answer has no end"),
    (lambda _: b"\xff\xff\xff" + bytes(6), "the answer is no HTTP/2"),
    (lambda _: frame(HEADERS, 4, 1, hpack.Encoder().encode([(":status", "200")]))[:-1], "the answer is cut off"),
    (lambda encoder: frame(HEADERS, 4, 1, encoder.encode([(":status", "200")]))
     + frame(DATA, 1, 1, b"\x01" + message(1)[1:]), "the answer is no HealthCheckResponse"),
    (lambda encoder: frame(HEADERS, 4, 1, encoder.encode([(":status", "200")]))
     + frame(DATA, 1, 1, message(1)[:-1]), "the answer is no HealthCheckResponse"),
])
def test_answers(answer: Callable[[hpack.Encoder], bytes], found: str) -> None:
    server = Server(answer)
    with tcp_server(server) as port:
        assert finds(target(port, type="GRPC")) == found
        headers, asked = server.calls[0]
        assert (headers[":method"], headers[":path"], headers["te"], headers["content-type"], asked) == (
            "POST", "/grpc.health.v1.Health/Check", "trailers", "application/grpc", b"")
        assert headers[":authority"] == f"127.0.0.1:{port}"
        assert server.acknowledged == [SETTINGS, PING]


@pytest.mark.parametrize("service", ["a.B", "x" * 127, "x" * 128, "x" * 255])
def test_the_service_asked_for(service: str) -> None:
    server = Server(health(1))
    with tcp_server(server) as port:
        assert finds(target(port, type="GRPC", grpc_service=service, domain_name="grpc.example")) == "up"
    headers, asked = server.calls[0]
    assert headers[":authority"] == "grpc.example"
    length = bytes([len(service)]) if len(service) < 128 else bytes([len(service) - 128 | 128, 1])
    assert asked == b"\x0a" + length + service.encode()


@pytest.mark.parametrize(("serve", "fields", "found"), [
    (says(b"HTTP/1.1 400 Bad Request\r\n\r\n"), {}, "the answer is no HTTP/2"),
    (says(frame(PING, 0, 0, bytes(8))), {}, "the answer is no HTTP/2"),
    (says(), {}, "connection closed without an answer"),
    (endless(frame(SETTINGS, 0, 0), frame(PING, 1, 0, bytes(8))), {}, "the answer has no end"),
    (silent, HASTY, "no answer within 0.4 s"),
])
def test_servers_that_do_not_speak_it(serve: Callable[[socket.socket], None], fields: dict[str, Any],
                                      found: str) -> None:
    with tcp_server(serve) as port:
        assert finds(target(port, type="GRPC", **fields)) == found
    with closed_port() as one:
        assert finds(target(one.getsockname()[1], type="GRPC")) == "connection refused"


@pytest.mark.parametrize(("data", "status"), [
    ("", 0), ("0801", 1), ("0802", 2), ("08810a", 0x501), ("120361626308017d00000000", 1),
    ("09" + "00" * 8 + "0801", 1), ("08020801", 1),
])
def test_health_check_responses(data: str, status: int) -> None:
    assert serving_status(bytes.fromhex(data)) == status


@pytest.mark.parametrize("data", ["08", "0880", "0b", "12ff01", "09", "08" + "ff" * 12])
def test_what_is_no_health_check_response(data: str) -> None:
    with pytest.raises(CheckFailed, match="is no HealthCheckResponse"):
        serving_status(bytes.fromhex(data))
