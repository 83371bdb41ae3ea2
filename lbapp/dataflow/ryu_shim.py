# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Ryu's connection to a switch, with a short path for the messages that come once a connection.

Ryu makes some 80 Python calls of a packet-in before an application sees it. Here the receive loop
reads large chunks and hands the bytes of our own packet-ins, flow-removeds and multipart replies
straight to one :class:`Receiver`; everything else goes Ryu's ordinary way, so that other Ryu
applications work beside this one. Lengths inside a message are checked before Ryu parses it:
some of Ryu's parsers never end on a length of zero.

Owns the socket loops; decides nothing.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import ssl
import struct
from typing import Any, Protocol

import eventlet
from ryu.controller import controller, ofp_event
from ryu.controller.handler import DEAD_DISPATCHER
from ryu.lib import hub
from ryu.ofproto import ofproto_parser

from lbapp.dataflow.lengths import LengthError, check_match, check_multipart, check_queues

LOG = logging.getLogger("lbapp.openflow")

CHUNK = 262144
HELLO, ERROR, EXPERIMENTER, PACKET_IN, FLOW_REMOVED, PORT_STATUS, MULTIPART_REPLY = 0, 1, 4, 10, 11, 12, 19
QUEUE_CONFIG_REPLY = 23
OURS_FIRST = frozenset({ERROR, EXPERIMENTER, PACKET_IN, FLOW_REMOVED, MULTIPART_REPLY})
HANDSHAKE_SECONDS = 5.0
MAX_CONNECTIONS = 256
ACCEPT_PAUSE = 0.1
YIELD_EVERY = 2048
YIELD_BYTES = 65536
"""A switch that reports all its rules must not keep others waiting."""


class Receiver(Protocol):
    """Gets the bytes of messages before Ryu does."""

    def receive(self, datapath: Any, kind: int, data: bytes) -> bytes | None:
        """Handle a message; returns what to send at once (or empty bytes), None to leave it to Ryu.

        Raises:
            ValueError: the message cannot be; the connection is closed.
        """

    def flush(self, datapath: Any) -> bytes:
        """What was received at once was handled; returns what is to be sent behind its answers."""


def check_lengths(kind: int, data: bytes) -> None:
    """Refuse what would make Ryu's parsers read beyond the message or loop for ever.

    Raises:
        LengthError: naming the message and the length.
    """
    if kind == HELLO:
        _check_list(data, 8, "hello element", pad=True)
    elif kind == PACKET_IN:
        check_match(data, 24, len(data), "packet-in")
    elif kind == FLOW_REMOVED:
        check_match(data, 48, len(data), "flow-removed")
    elif kind == MULTIPART_REPLY:
        check_multipart(data)
    elif kind == QUEUE_CONFIG_REPLY:
        check_queues(data)
    elif len(data) < {6: 32, PORT_STATUS: 80, ERROR: 12, EXPERIMENTER: 16}.get(kind, 8):
        raise LengthError(f"message type {kind} of {len(data)} bytes")


def _check_list(data: bytes, offset: int, what: str, *, pad: bool) -> None:
    while offset < len(data):
        if offset + 4 > len(data):
            raise LengthError(f"{what} cut short")
        length = data[offset + 2] << 8 | data[offset + 3]
        if length < 4 or offset + length > len(data):
            raise LengthError(f"{what} of {length} bytes")
        offset += length + 7 & ~7 if pad else length


def datapath_class(receiver: Receiver) -> type[controller.Datapath]:
    """A Datapath for Ryu that hands messages to ``receiver`` first."""

    class FastDatapath(controller.Datapath):
        """See the module's docstring."""

        send_q: Any

        def __init__(self, connection: Any, address: Any) -> None:
            super().__init__(connection, address)
            self._writing = hub.Semaphore()

        def serve(self) -> None:
            guard = hub.spawn_after(HANDSHAKE_SECONDS, self._close_unless_greeted)
            try:
                super().serve()
            finally:
                hub.kill(guard)

        def _close_unless_greeted(self) -> None:
            if self.id is None:
                LOG.warning("%s: no OpenFlow handshake within %.0f s, closed", self.address, HANDSHAKE_SECONDS)
                self.state = DEAD_DISPATCHER
                self._close_write()
                self.socket.close()

        def _recv_loop(self) -> None:
            try:
                self._receive()
            except (ValueError, OSError) as error:
                LOG.warning("%s: %s; connection closed", self.address, error)
            except Exception:
                LOG.exception("%s: message could not be handled; connection closed", self.address)
            finally:
                with contextlib.suppress(OSError):
                    self.socket.close()

        def _receive(self) -> None:
            pending, handled = b"", 0
            while self.state != DEAD_DISPATCHER:
                try:
                    chunk = self.socket.recv(CHUNK)
                except (TimeoutError, ssl.SSLError):
                    continue
                except (EOFError, OSError):
                    return
                if not chunk:
                    return
                pending = pending + chunk if pending else chunk
                offset, size, answers = 0, len(pending), []
                while size - offset >= 8:
                    version, kind = pending[offset], pending[offset + 1]
                    length = pending[offset + 2] << 8 | pending[offset + 3]
                    if length < 8:
                        raise LengthError(f"OpenFlow message of {length} bytes")
                    if kind > 35 or not 1 <= version <= 6:
                        raise LengthError(f"not OpenFlow (version {version}, type {kind})")
                    if size - offset < length:
                        break
                    data = pending[offset:offset + length]
                    offset += length
                    handled += 1
                    answer = receiver.receive(self, kind, data) if kind in OURS_FIRST and self.id is not None else None
                    if answer is None:
                        self._ordinary(version, kind, data)
                    elif answer:
                        answers.append(answer)
                pending = pending[offset:]
                answers.append(receiver.flush(self))
                answer = b"".join(answers)
                if answer:
                    self._send_now(answer)
                if handled > YIELD_EVERY or size > YIELD_BYTES:
                    handled = 0
                    hub.sleep(0)

        def _ordinary(self, version: int, kind: int, data: bytes) -> None:
            """Ryu's own way: parse, then events and handlers."""
            check_lengths(kind, data)
            message = ofproto_parser.msg(self, version, kind, len(data), struct.unpack_from("!I", data, 4)[0], data)
            if not message:
                return
            event = ofp_event.ofp_msg_to_ev(message)
            self.ofp_brick.send_event_to_observers(event, self.state)
            for handler in self.ofp_brick.get_handlers(event):
                if self.state in handler.callers[event.__class__].dispatchers:
                    handler(event)

        def _send_now(self, data: bytes) -> None:
            """Send past the queue where it is empty: a punt then costs no switch of greenlets."""
            if self.send_q is None:
                return
            if self._writing.locked() or self.send_q.qsize():
                self.send(data)
                return
            with self._writing:
                self.socket.sendall(data)

        def _send_loop(self) -> None:
            """Join what is queued: one system call for many messages."""
            queue = self.send_q
            try:
                while self.state != DEAD_DISPATCHER:
                    data, close = queue.get()
                    self._send_q_sem.release()
                    parts = [bytes(data)]
                    while not close and queue.qsize():
                        data, close = queue.get()
                        self._send_q_sem.release()
                        parts.append(bytes(data))
                    with self._writing:
                        self.socket.sendall(b"".join(parts))
                    if close:
                        break
            except OSError as error:
                LOG.debug("%s: sending failed: %s", self.address, error)
            finally:
                self.send_q = None
                while queue.qsize():
                    queue.get()
                    self._send_q_sem.release()
                self._close_write()

    return FastDatapath


def install(receiver: Receiver) -> None:
    """Make Ryu use the fast Datapath, and a listener of ours, for every switch that connects from now on."""
    fast = datapath_class(receiver)

    def serve(connection: Any, address: Any) -> None:
        with contextlib.closing(fast(connection, address)) as datapath:
            datapath.serve()

    controller.datapath_connection_factory = serve
    controller.OpenFlowController.server_loop = _listen


def tls_context(certificate: str, key: str, ca: str | None) -> ssl.SSLContext:
    """What switches are greeted with; with ``ca`` they have to show a certificate of it.

    Raises:
        OSError: a file is missing or not what it should be.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    if ca is not None:
        context.load_verify_locations(ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _listen(_controller: Any, tcp_port: int, tls_port: int) -> None:
    """Ryu's server loop, bounded; its own fails at the second switch that comes with TLS."""
    conf = controller.CONF
    context = None
    if conf.ctl_privkey is not None and conf.ctl_cert is not None:
        context = tls_context(conf.ctl_cert, conf.ctl_privkey, conf.ca_certs)
    host = conf.ofp_listen_host
    listener = eventlet.listen((host, tls_port if context else tcp_port),
                               family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    room = hub.Semaphore(MAX_CONNECTIONS)

    def handle(connection: Any, address: Any) -> None:
        try:
            if context is not None:
                connection.settimeout(HANDSHAKE_SECONDS)
                connection = context.wrap_socket(connection, server_side=True)
            controller.datapath_connection_factory(connection, address)
        except OSError as error:
            LOG.warning("%s: no connection: %s", address, error)
            with contextlib.suppress(OSError):
                connection.close()
        finally:
            room.release()

    failing = False
    while True:
        try:
            connection, address = listener.accept()
        except OSError as error:
            if error.errno in (errno.EBADF, errno.EINVAL):
                raise
            # Out of descriptors, or the peer is gone already: those that are connected go on.
            if not failing:
                LOG.warning("cannot accept a switch: %s; trying again", error)
            failing = True
            hub.sleep(ACCEPT_PAUSE)
            continue
        failing = False
        if room.locked():
            LOG.warning("%s: refused, %d switches are connected already", address, MAX_CONNECTIONS)
            connection.close()
            continue
        room.acquire()
        hub.spawn(handle, connection, address)
