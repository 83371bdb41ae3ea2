# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What tests of monitors share: servers on loopback that behave as a test says, and one check of them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from lbapp.config.monitor import Monitor
from lbapp.monitors.checks import Surroundings
from lbapp.monitors.process import Checker
from lbapp.monitors.protocol import Changed, Command, Lines, Target, commands, decode_command

PATIENT = {"interval": 3600.0, "timeout": 30.0}
"""A check that is to succeed may take as long as the machine likes, and is not made again."""
HASTY = {"interval": 0.5, "timeout": 0.4}


def target(port: int, address: str = "127.0.0.1", /, **fields: Any) -> Target:
    """A target whose monitor has these fields."""
    return Target(address=address, port=port, monitor=msgspec.convert({**PATIENT, **fields}, Monitor))


def command(*settings: tuple[str, Target], remove: tuple[str, ...] = ()) -> Command:
    """A command as the process hears it, in one piece."""
    lines = b"".join(commands([(key, one, index, None) for index, (key, one) in enumerate(settings)], remove))
    heard = [decode_command(line) for line in Lines().feed(lines)]
    return Command(set=[one for each in heard for one in each.set],
                   remove=[one for each in heard for one in each.remove])


def check(of: Target, scripts: Path | None = None, within: float = 60.0) -> Changed:
    """What the first check of a target finds."""
    async def once() -> Changed:
        checker = Checker(Surroundings(asyncio.get_running_loop(), scripts), 10)
        checker.take(command(("it", of)))
        try:
            async with asyncio.timeout(within):
                await checker.news.wait()
            return checker.changed["it"]
        finally:
            checker.close()
            await asyncio.sleep(0)  # what was cancelled cleans up

    return asyncio.run(once())


def finds(of: Target, scripts: Path | None = None) -> str:
    """``up``, or why not."""
    found = check(of, scripts)
    assert found.up == (not found.reason)
    return found.reason or "up"


def family_of(address: str) -> socket.AddressFamily:
    """Of an address."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@contextlib.contextmanager
def tcp_server(serve: Callable[[socket.socket], None], address: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """A server that does this with each connection, in a thread of its own; yields its port."""
    connections: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def one(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(60)
            serve(connection)

    def listen() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connections.append(connection)
                threads.append(threading.Thread(target=one, args=(connection,), daemon=True))
                threads[-1].start()

    with socket.create_server((address, port), family=family_of(address), backlog=100) as listener:
        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            for connection in connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            for each in [thread, *threads]:
                each.join(10)


@contextlib.contextmanager
def udp_server(answer: Callable[[bytes], bytes | None], address: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """A server that answers datagrams, or does not where ``answer`` gives None; yields its port."""
    def listen() -> None:
        with contextlib.suppress(OSError):
            while True:
                data, source = server.recvfrom(65_536)
                if data == b"over":
                    return
                reply = answer(data)
                if reply is not None:
                    server.sendto(reply, source)

    with socket.socket(family_of(address), socket.SOCK_DGRAM) as server:
        server.bind((address, port))
        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            with socket.socket(family_of(address), socket.SOCK_DGRAM) as end:
                end.sendto(b"over", (address, server.getsockname()[1]))
            thread.join(10)


def closed_port(address: str = "127.0.0.1") -> contextlib.closing[socket.socket]:
    """A bound socket that does not listen: its port refuses, and nobody is given it who does not ask for it.

    Who does, with SO_REUSEADDR, can listen there meanwhile.
    """
    one = socket.socket(family_of(address))
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.bind((address, 0))
    return contextlib.closing(one)


def closed_udp_port(address: str = "127.0.0.1") -> int:
    """A port that nobody has, and that nobody is given who does not ask for it."""
    for port in range(10_007, 30_000, 101):
        with contextlib.suppress(OSError), socket.socket(family_of(address), socket.SOCK_DGRAM) as one:
            one.bind((address, port))
            return port
    raise AssertionError("no free UDP port")


def says(*parts: bytes, hear: bool = True) -> Callable[[socket.socket], None]:
    """A server that hears something, and then says these parts."""
    def serve(connection: socket.socket) -> None:
        if hear:
            connection.recv(65_536)
        for part in parts:
            connection.sendall(part)

    return serve


def endless(first: bytes, then: bytes) -> Callable[[socket.socket], None]:
    """A server that says something, and then something again and again until nobody listens any more."""
    def serve(connection: socket.socket) -> None:
        connection.recv(65_536)
        connection.sendall(first)
        while True:
            connection.sendall(then)

    return serve


def silent(connection: socket.socket) -> None:
    """A server that says nothing until the client has gone."""
    while connection.recv(65_536):
        pass
