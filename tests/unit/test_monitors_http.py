# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""lbapp.monitors.http, and TLS of lbapp.monitors.stream: against nginx, openssl s_server, and servers that mean ill."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.monitors import nginx
from lbapp.monitors.http import HEADERS_MOST
from lbapp.monitors.stream import tls_context
from tests.monitored import HASTY, closed_port, endless, finds, says, silent, target, tcp_server
from topologies.namespace import end, wait_until

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


def test_nginx(tmp_path: Path) -> None:
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed")
    with closed_port() as kept:
        port = kept.getsockname()[1]
        server = nginx(tmp_path, port)
        try:
            assert finds(target(port, type="HTTP", body_regex="^f.ne$")) == "up"
            assert finds(target(port, type="HTTP", http_method="HEAD", url_path="/x")) == "up"
            assert finds(target(port, type="HTTP", body_regex="awful")) == "body does not match"
            assert finds(target(port, type="HTTP", expected_codes="201,300-399")) == (
                "status 200, expected 201,300-399")
            assert finds(target(port, type="HTTPS")).startswith("TLS: ")
        finally:
            end(server)
        assert finds(target(port, type="HTTP")) == "connection refused"


@pytest.mark.parametrize(("serve", "fields", "found"), [
    (says(OK), {"body_regex": "hell"}, "up"),
    (says(b"HTTP/1.1 200 OK\r\nContent-Le", b"ngth: 5\r\n\r\nhe", b"llo"), {"body_regex": "^hello$"}, "up"),
    (says(b"HTTP/1.0 200 OK\r\n\r\nuntil the end"), {"body_regex": "end$"}, "up"),
    (says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"),
     {"body_regex": "^hello$"}, "up"),
    (says(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK), {}, "up"),
    (says(b"HTTP/1.1 204 No Content\r\n\r\n"), {"expected_codes": "204"}, "up"),
    (says(b"HTTP/1.1 304 Not Modified\r\n\r\n"), {"expected_codes": "304"}, "up"),
    (says(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nzzz"),
     {"expected_codes": "101"}, "up"),
    (says(OK + b"garbage behind the end"), {}, "up"),
    (says(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"), {"http_method": "HEAD"}, "up"),
    (says(b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n"), {}, "status 500, expected 200"),
    (says(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhe"), {}, "the answer is cut off"),
    (says(b"HTTP/1.1 200 OK\r\nContent-"), {}, "the answer is cut off"),
    (says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n"), {}, "the answer is cut off"),
    (says(), {}, "connection closed without an answer"),
    (says(b"SSH-2.0-OpenSSH_9.2\r\n"), {}, "the answer is no HTTP"),
    (says(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00"), {}, "the answer is no HTTP"),
    (says(b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n"), {}, "the answer is no HTTP"),
    (endless(b"HTTP/1.1 200 OK\r\n", b"X-More: " + b"x" * 1000 + b"\r\n"), {}, "headers of more than 32 KiB"),
    (endless(b"HTTP/1.1 200 OK\r\nX: ", b"x" * 1000), {}, "headers of more than 32 KiB"),
    (endless(b"HTTP/1.1 ", b"1"), {}, "the answer is no HTTP"),
    (endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), {}, "headers of more than 32 KiB"),
    (endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1;" + b"x" * 90 + b"\r\nx\r\n"), {},
     "the answer has no end"),
    (endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X: " + b"x" * 500 + b"\r\n"), {},
     "the answer has no end"),
    (endless(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 4096), {}, "up"),  # the first 64 KiB are enough
    (endless(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 4096), {"body_regex": "y"}, "body does not match"),
    (says(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 65_535 + b"yz"), {"body_regex": "y"}, "up"),
    (says(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 65_536 + b"yz"), {"body_regex": "y"}, "body does not match"),
    (silent, HASTY, "no answer within 0.4 s"),
])
def test_answers(serve: Callable[[socket.socket], None], fields: dict[str, Any], found: str) -> None:
    with tcp_server(serve) as port:
        assert finds(target(port, type="HTTP", **fields)) == found


def test_an_answer_that_drips_is_no_answer_in_time() -> None:
    def drip(connection: socket.socket) -> None:
        connection.recv(65_536)
        connection.settimeout(0.05)
        for octet in OK * 100:
            connection.sendall(bytes([octet]))
            try:
                if not connection.recv(1):
                    return
            except TimeoutError:
                continue

    with tcp_server(drip) as port:
        assert finds(target(port, type="HTTP", **HASTY)) == "no answer within 0.4 s"


def asked(**fields: Any) -> list[bytes]:
    """The lines of the request."""
    heard: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        heard.append(connection.recv(65_536))
        connection.sendall(OK)

    address = fields.pop("address", "127.0.0.1")
    with tcp_server(serve, address) as port:
        assert finds(target(port, address, type="HTTP", **fields)) == "up"
        return [line.replace(b":%d" % port, b":PORT") for line in heard[0].split(b"\r\n")]


def test_the_request() -> None:
    assert asked() == [b"GET / HTTP/1.1", b"Host: 127.0.0.1:PORT", b"User-Agent: lbapp", b"Accept: */*",
                       b"Connection: close", b"", b""]
    assert asked(url_path="/a?b=c", domain_name="www.example:8080", http_method="POST",
                 headers=[{"name": "X-One", "value": "1"}, {"name": "accept", "value": "text/plain"}]) == [
        b"POST /a?b=c HTTP/1.1", b"Host: www.example:8080", b"User-Agent: lbapp", b"Connection: close",
        b"Content-Length: 0", b"X-One: 1", b"accept: text/plain", b"", b""]


def test_the_request_by_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 on this machine")
    assert asked(address="::1")[1] == b"Host: [::1]:PORT"


def test_headers_may_be_as_long_as_that() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX: "
    with tcp_server(says(head + b"x" * (HEADERS_MOST - len(head) - 4) + b"\r\n\r\n")) as port:
        assert finds(target(port, type="HTTP")) == "up"


# ------------------------------------------------------------------ TLS


def certificate(directory: Path, name: str) -> tuple[Path, Path]:
    """A self-signed one, and its key."""
    made, key = directory / "certificate.pem", directory / "key.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-keyout", str(key), "-out", str(made), "-subj", f"/CN={name}", "-addext",
                    f"subjectAltName=DNS:{name},IP:127.0.0.1", "-days", "30"],
                   check=True, capture_output=True, timeout=60)
    return made, key


class TlsServer:
    """``openssl s_server``, and what it says."""

    def __init__(self, directory: Path, name: str, port: int) -> None:
        self.certificate, key = certificate(directory, name)
        self.port = port
        self.process = subprocess.Popen(
            ["openssl", "s_server", "-accept", f"127.0.0.1:{self.port}", "-cert", str(self.certificate), "-key",
             str(key), "-servername", name, "-cert2", str(self.certificate), "-key2", str(key), "-www", "-quiet"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def listening() -> bool:
            with socket.socket() as one:
                return one.connect_ex(("127.0.0.1", self.port)) == 0

        wait_until(listening, 20, "s_server listens")


@pytest.fixture
def tls(tmp_path: Path) -> Iterator[Callable[[str], TlsServer]]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    with contextlib.ExitStack() as cleanup:
        def make(name: str) -> TlsServer:
            server = TlsServer(tmp_path, name, cleanup.enter_context(closed_port()).getsockname()[1])
            cleanup.callback(end, server.process)
            return server

        tls_context.cache_clear()
        cleanup.callback(tls_context.cache_clear)
        yield make


def test_https_whose_certificate_nobody_asks_for(tls: Callable[[str], TlsServer]) -> None:
    server = tls("www.example")
    assert finds(target(server.port, type="HTTPS")) == "up"
    assert finds(target(server.port, type="HTTPS", domain_name="other.example", expected_codes="404")) == (
        "status 200, expected 404")


def test_https_whose_certificate_must_be_valid(tls: Callable[[str], TlsServer],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    server = tls("www.example")
    verified = {"type": "HTTPS", "tls_verify": True}
    assert finds(target(server.port, **verified, domain_name="www.example")) in (
        "certificate: self-signed certificate", "certificate: self signed certificate")
    monkeypatch.setenv("SSL_CERT_FILE", str(server.certificate))
    tls_context.cache_clear()
    assert finds(target(server.port, **verified, domain_name="www.example")) == "up"
    assert finds(target(server.port, **verified, domain_name="127.0.0.1")) == "up"
    found = finds(target(server.port, **verified, domain_name="other.example"))
    assert found.startswith("certificate: Hostname mismatch"), found


def test_the_name_is_said_in_the_greeting() -> None:
    heard: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        heard.append(connection.recv(65_536))

    with tcp_server(serve) as port:
        assert finds(target(port, type="HTTPS", domain_name="www.example:443")) == "TLS: the connection was closed"
    assert b"\0\x0bwww.example" in heard[0] and b"http/1.1" in heard[0]


@pytest.mark.parametrize(("serve", "fields", "found"), [
    (says(), {}, "TLS: the connection was closed"),
    (says(b"HTTP/1.1 400 Bad Request\r\n\r\n"), {}, "TLS: "),
    (says(b"\x15\x03\x03\x00\x02\x02\x28"), {}, "TLS: "),
    (endless(b"", b"\x16\x03\x03\x3f\xff" + b"x" * 4096), {}, "TLS: "),
    (silent, HASTY, "no answer within 0.4 s"),
])
def test_what_is_no_tls(serve: Callable[[socket.socket], None], fields: dict[str, Any], found: str) -> None:
    with tcp_server(serve) as port:
        assert finds(target(port, type="HTTPS", **fields)).startswith(found)
    with closed_port() as one:
        assert finds(target(one.getsockname()[1], type="HTTPS")) == "connection refused"
