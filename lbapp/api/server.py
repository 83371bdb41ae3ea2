# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The HTTP server in front of the REST API: sockets, TLS, and time and size limits for everyone.

Owns the listening socket and every connection. A peer that sends too slowly, too much or nonsense
loses its connection, and nothing but that. Knows nothing of what is served.

eventlet's own accept loop ends at the first failed accept and shakes TLS hands one client at a
time; hence this one. Its HTTP protocol is used as it is, with deadlines around it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import resource
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import eventlet
import eventlet.wsgi
import msgspec
from eventlet.green import socket, ssl

from lbapp.api.controller import CLOSE
from lbapp.api.errors import ErrorAnswer, ErrorBody

LOG = logging.getLogger(__name__)

SOCKET_SECONDS = 10.0
"""For one read or write, a TLS handshake, and all of a request's head."""
REQUEST_SECONDS = 300.0
"""For a request as a whole, the bulk apply of a large site included."""
URL_LIMIT = 8192
CONNECTION_LIMIT = 512
"""But half of what this process may open at most: the rest is for switches, agents, the database and commands."""
LINGER_SECONDS = 2.0
_LINGER_BYTES = 4 << 20
_BACKLOG = 128
_ACCEPT_PAUSE = 0.1

_CODES = {HTTPStatus.REQUEST_TIMEOUT: "timeout", HTTPStatus.METHOD_NOT_ALLOWED: "method_not_allowed",
          HTTPStatus.NOT_IMPLEMENTED: "method_not_allowed"}


class ServerError(Exception):
    """The server cannot start; the text says why."""


class _Protocol(eventlet.wsgi.HttpProtocol):
    """eventlet's HTTP protocol with a deadline for a request's head, and JSON errors."""

    close_connection: bool
    linger = False
    requests = 0

    def _read_request_line(self) -> bytes:
        try:
            with eventlet.Timeout(SOCKET_SECONDS):
                return super()._read_request_line()
        except (eventlet.Timeout, TimeoutError):
            # Between requests that is just the end of a kept connection, and no answer to anything.
            if self.requests == 0:
                self._too_slow()
            return b""

    def parse_request(self) -> bool:
        self.requests += 1
        try:
            with eventlet.Timeout(SOCKET_SECONDS):
                return super().parse_request()
        except (eventlet.Timeout, TimeoutError):
            self._too_slow()
            return False

    def handle_one_request(self) -> None:
        with eventlet.Timeout(REQUEST_SECONDS, False):
            super().handle_one_request()
            return
        self.close_connection = True

    def get_environ(self) -> dict[str, Any]:
        environ = super().get_environ()
        environ[CLOSE] = self._close_after
        return environ

    def finish(self) -> None:
        if self.linger:
            self._drain()
        super().finish()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        status = HTTPStatus(code)
        body = msgspec.json.encode(ErrorAnswer(error=ErrorBody(
            code=_CODES.get(status, "invalid"), message=message or status.phrase)))
        head = (f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n")
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.write(head.encode() + body)
            self.wfile.flush()

    def log_message(self, format: str, *arguments: Any) -> None:
        LOG.debug(format, *arguments)

    def _too_slow(self) -> None:
        self.send_error(HTTPStatus.REQUEST_TIMEOUT, "the request did not arrive in time")

    def _close_after(self) -> None:
        self.close_connection = True
        self.linger = True

    def _drain(self) -> None:
        """Let the client read its answer: closing with unread data would reset the connection."""
        with contextlib.suppress(OSError), eventlet.Timeout(LINGER_SECONDS, False):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_WR)
            left = _LINGER_BYTES
            while left > 0:
                part = self.connection.recv(1 << 16)
                if not part:
                    break
                left -= len(part)


def _tls(certificate: str, key: str | None) -> Any:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ValueError) as error:
        raise ServerError(f"certificate {certificate}, key {key or certificate}: {error}") from None
    return context


def _most() -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return CONNECTION_LIMIT if limit == resource.RLIM_INFINITY else max(1, min(CONNECTION_LIMIT, limit // 2))


class Server:
    """A listening socket and its connections.

    Args:
        application: WSGI.
        host, port: where to listen; port 0 takes a free one (see :attr:`port`).
        certificate, key: PEM files; with a certificate, TLS 1.2 or later is all that is spoken.

    Raises:
        ServerError: with the reason, for people.
    """

    def __init__(self, application: Callable[..., Any], host: str = "127.0.0.1", port: int = 8080,
                 certificate: str | None = None, key: str | None = None) -> None:
        self._context = _tls(certificate, key) if certificate is not None else None
        if key is not None and certificate is None:
            raise ServerError(f"key {key}: expected a certificate as well")
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._socket = eventlet.listen((host, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise ServerError(f"{host} port {port}: {error.strerror or error}") from None
        self._http = eventlet.wsgi.Server(
            self._socket, self._socket.getsockname(), application, log=LOG, log_output=False, debug=False,
            keepalive=SOCKET_SECONDS, socket_timeout=SOCKET_SECONDS, url_length_limit=URL_LIMIT,
            environ={"wsgi.url_scheme": "https", "HTTPS": "on"} if self._context else None)
        self._room = eventlet.semaphore.Semaphore(_most())
        self._open: set[Any] = set()
        self._loop: Any = None

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._socket.getsockname()[1]

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._open)

    def start(self) -> None:
        """Serve from now on, in greenlets of its own."""
        self._loop = eventlet.spawn(self._accept)

    def stop(self) -> None:
        """Stop listening and close every connection."""
        if self._loop is not None:
            self._loop.kill()
        self._socket.close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        failing = False
        while True:
            self._room.acquire()
            try:
                connection, address = self._socket.accept()
            except OSError as error:
                self._room.release()
                if error.errno in (errno.EBADF, errno.EINVAL):
                    return
                # Out of descriptors, or the peer is gone already: the next one may fare better.
                if not failing:
                    LOG.warning("cannot accept a connection: %s; trying again", error)
                failing = True
                eventlet.sleep(_ACCEPT_PAUSE)
                continue
            failing = False
            eventlet.spawn_n(self._serve, connection, address)

    def _serve(self, connection: Any, address: Any) -> None:
        self._open.add(connection)
        raw = connection
        try:
            connection.settimeout(SOCKET_SECONDS)
            if self._context is not None:
                with eventlet.Timeout(SOCKET_SECONDS):
                    connection = self._context.wrap_socket(connection, server_side=True)
                connection.settimeout(SOCKET_SECONDS)
            _Protocol([address, connection, eventlet.wsgi.STATE_IDLE], self._http)
        except (OSError, eventlet.Timeout) as error:
            LOG.debug("connection from %s ended: %s", address, error)
        except Exception:
            LOG.exception("connection from %s failed", address)
        finally:
            self._open.discard(raw)
            for one in (connection, raw):
                with contextlib.suppress(OSError):
                    one.close()
            self._room.release()


def serve(application: Callable[..., Any], host: str = "127.0.0.1", port: int = 8080,
          certificate: str | None = None, key: str | None = None) -> Server:
    """Start a server for what :func:`lbapp.api.controller.register` returned.

    Raises:
        ServerError: with the reason, for people.
    """
    server = Server(application, host, port, certificate, key)
    server.start()
    return server
