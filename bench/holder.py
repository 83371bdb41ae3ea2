# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Both ends of very many TCP connections that stay open: a program, run inside hosts' namespaces.

``python bench/holder.py serve PORT`` accepts as much as it may and sends back what it gets.
``python bench/holder.py hold ADDRESS PORT COUNT`` opens COUNT connections, says how many it has,
then obeys lines on its standard input: ``check`` sends a byte over every connection and counts
the ones that come back; anything else, or the end of input, closes all and ends. Every answer is
one JSON object on a line. Imports nothing of the project.
"""

from __future__ import annotations

import contextlib
import json
import resource
import select
import socket
import sys
import time

PENDING = 200
"""Connections being opened, or checked, at the same time."""
IDLE_SECONDS = 10.0
"""Without any progress for so long, what is missing has failed."""
SPARE_FILES = 64


def open_files() -> int:
    """Use all the open files this process may have; returns how many connections that leaves."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard - SPARE_FILES


def serve(port: int) -> None:
    """Accept and echo until killed. Several processes may share the port."""
    room = open_files()
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("", port))
    listener.listen(8192)
    listener.setblocking(False)
    poll = select.epoll()
    poll.register(listener, select.EPOLLIN)
    held: dict[int, socket.socket] = {}
    while True:
        for number, _ in poll.poll():
            if number != listener.fileno():
                connection = held[number]
                try:
                    data = connection.recv(64)
                    if data:
                        connection.send(data)
                        continue
                except BlockingIOError:
                    continue
                except OSError:
                    pass
                if len(held) == room:
                    poll.register(listener, select.EPOLLIN)
                del held[number]
                connection.close()
            else:
                with contextlib.suppress(BlockingIOError):
                    for _ in range(min(64, room - len(held))):
                        connection, _address = listener.accept()
                        connection.setblocking(False)
                        held[connection.fileno()] = connection
                        poll.register(connection, select.EPOLLIN)
                if len(held) >= room:
                    poll.unregister(listener)


class Holder:
    """The client's end."""

    def __init__(self, address: str, port: int) -> None:
        self._target = (address, port)
        self._poll = select.epoll()
        self.held: dict[int, socket.socket] = {}

    def fill(self, count: int) -> int:
        """Open ``count`` connections and see each of them carry a byte and back; returns how many failed."""
        failed = started = 0
        waiting: dict[int, socket.socket] = {}
        moved = time.monotonic()
        while started < count or waiting:
            while started < count and len(waiting) < PENDING:
                connection = socket.socket()
                connection.setblocking(False)
                started += 1
                moved = time.monotonic()
                try:
                    connection.connect(self._target)
                except BlockingIOError:
                    pass
                except OSError:
                    failed += 1
                    connection.close()
                    continue
                waiting[connection.fileno()] = connection
                self._poll.register(connection, select.EPOLLOUT)
            for number, _ in self._poll.poll(1.0):
                moved = time.monotonic()
                connection = waiting.pop(number)
                self._poll.unregister(number)
                if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    failed += 1
                    connection.close()
                else:
                    self.held[number] = connection
            if time.monotonic() - moved > IDLE_SECONDS:
                for number, connection in waiting.items():
                    self._poll.unregister(number)
                    connection.close()
                    failed += 1
                waiting.clear()
        return failed

    def check(self) -> int:
        """Send a byte over every connection; returns how many brought it back."""
        alive = 0
        todo = list(self.held.items())
        waiting: dict[int, socket.socket] = {}
        moved = time.monotonic()
        while todo or waiting:
            while todo and len(waiting) < PENDING:
                number, connection = todo.pop()
                with contextlib.suppress(OSError):
                    connection.send(b"x")
                    waiting[number] = connection
                    self._poll.register(number, select.EPOLLIN)
                moved = time.monotonic()
            for number, _ in self._poll.poll(1.0):
                moved = time.monotonic()
                self._poll.unregister(number)
                with contextlib.suppress(OSError):
                    alive += waiting.pop(number).recv(64) == b"x"
            if time.monotonic() - moved > IDLE_SECONDS:
                for number in waiting:
                    self._poll.unregister(number)
                waiting.clear()
        return alive


def hold(address: str, port: int, count: int) -> None:
    """See the module."""
    open_files()
    holder = Holder(address, port)
    failed = holder.fill(count)
    print(json.dumps({"held": len(holder.held), "failed": failed}), flush=True)
    for line in sys.stdin:
        if line.strip() != "check":
            break
        print(json.dumps({"alive": holder.check()}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        hold(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
