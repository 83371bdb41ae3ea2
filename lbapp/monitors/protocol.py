# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What the controller and the process that checks members say to each other: one JSON text a line, both ways.

Owns the messages and their framing. Does no I/O: bytes in, messages out.

The process says only what changed. Each definition of a target has a serial number of the controller's, and whatever
is reported about it carries it back: so a report that crossed a new definition on its way is known for what it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated

import msgspec

from lbapp.config.fields import Port
from lbapp.config.monitor import Monitor

LINE_MOST = 4 << 20
"""Bytes of one message: a peer that says more is not one of ours."""
BATCH_BYTES = 256 << 10
"""A message is ended when it has become so long."""
TARGETS_MOST = 100_000
KEY_MOST = 512
REASON_MOST = 200

Key = Annotated[str, msgspec.Meta(min_length=1, max_length=KEY_MOST)]


class ProtocolError(Exception):
    """What came is no message; the text says why."""


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be checked, and how.

    Attributes:
        address: of the member.
        port: the member's; the monitor may name another one.
    """

    address: str
    port: Port
    monitor: Monitor

    @property
    def checked_port(self) -> int:
        """The port that checks go to."""
        return self.monitor.port or self.port


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """A target for the process.

    Attributes:
        monitor: the JSON of a Monitor.
        serial: what reports about it carry.
        up: what is known of it; None: nothing.
    """

    key: Key
    address: Annotated[str, msgspec.Meta(max_length=64)]
    port: Port
    monitor: msgspec.Raw
    serial: int = 0
    up: bool | None = None


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """What the controller says. What is removed is removed before anything is set."""

    set: list[Setting] = []
    remove: list[Key] = []


class Changed(msgspec.Struct, frozen=True, kw_only=True):
    """A target is up now, or down.

    Attributes:
        reason: for people; empty where there is nothing to say.
        seconds: the last check took, where it tells how fast the member is.
        checks: so many since the target was set.
    """

    key: str
    up: bool
    reason: str = ""
    seconds: float | None = None
    checks: int = 0
    serial: int = 0


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """What the process does, since it was started.

    Attributes:
        targets: now.
        checks: that came to a result.
        late: that began more than half a second after their time.
        running: now.
        cpu_seconds: of this process; those of external commands are not in it.
    """

    targets: int = 0
    checks: int = 0
    late: int = 0
    running: int = 0
    cpu_seconds: float = 0.0


class Report(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the process says.

    Attributes:
        latencies: key and smoothed seconds of checks that succeeded, where there are new ones.
        messages: for the log: level and text.
    """

    changed: list[Changed] = []
    latencies: list[tuple[str, float]] = []
    statistics: Statistics | None = None
    messages: list[tuple[int, str]] = []


encode = msgspec.json.Encoder().encode
_MONITOR = msgspec.json.Decoder(Monitor)
_DEFAULTS = {field.name: field.default for field in msgspec.structs.fields(Monitor)}


def encode_monitor(monitor: Monitor) -> msgspec.Raw:
    """The JSON of a monitor: what is as always is left out."""
    given = {name: getattr(monitor, name) for name in _DEFAULTS}
    return msgspec.Raw(encode({name: value for name, value in given.items() if value != _DEFAULTS[name]}))


def decode_monitor(raw: bytes) -> Monitor:
    """The monitor of a :class:`Setting`.

    Raises:
        ProtocolError: it is none.
    """
    try:
        return _MONITOR.decode(raw)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"no monitor: {error}") from None


def commands(settings: Iterable[tuple[str, Target, int, bool | None]], remove: Iterable[str]) -> Iterator[bytes]:
    """Lines that set and remove targets, each of a bounded length.

    Args:
        settings: key, target, serial number, and what is known of it.
        remove: keys.
    """
    monitors: dict[int, tuple[Monitor, msgspec.Raw]] = {}  # by identity: a pool's members share theirs
    parts: list[bytes] = []
    size = 0
    for key in remove:
        parts.append(encode(key))
        size += len(parts[-1]) + 1
        if size >= BATCH_BYTES:
            yield b'{"remove":[' + b",".join(parts) + b"]}\n"
            parts, size = [], 0
    if parts:
        yield b'{"remove":[' + b",".join(parts) + b"]}\n"
    parts, size = [], 0
    for key, target, serial, up in settings:
        known = monitors.get(id(target.monitor))
        if known is None:
            monitors[id(target.monitor)] = known = (target.monitor, encode_monitor(target.monitor))
        parts.append(encode(Setting(key=key, address=target.address, port=target.port, monitor=known[1],
                                    serial=serial, up=up)))
        size += len(parts[-1]) + 1
        if size >= BATCH_BYTES:
            yield b'{"set":[' + b",".join(parts) + b"]}\n"
            parts, size = [], 0
    if parts:
        yield b'{"set":[' + b",".join(parts) + b"]}\n"


class Lines:
    """Cuts a stream into its lines."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Take what was received; the lines that are whole now, without their ends.

        Raises:
            ProtocolError: one is too long.
        """
        if b"\n" not in data:
            self._rest += data
            self._check()
            return []
        first, *lines, rest = data.split(b"\n")
        self._rest += first
        self._check()
        whole = [bytes(self._rest), *lines]
        self._rest = bytearray(rest)
        return [line for line in whole if line]

    def _check(self) -> None:
        if len(self._rest) > LINE_MOST:
            raise ProtocolError(f"a message of more than {LINE_MOST} bytes")


_COMMAND = msgspec.json.Decoder(Command)
_REPORT = msgspec.json.Decoder(Report)


def decode_command(line: bytes) -> Command:
    """What the controller said.

    Raises:
        ProtocolError: nothing that makes sense.
    """
    try:
        return _COMMAND.decode(line)
    except msgspec.MsgspecError as error:
        raise ProtocolError(str(error)) from None


def decode_report(line: bytes) -> Report:
    """What the process said.

    Raises:
        ProtocolError: nothing that makes sense.
    """
    try:
        return _REPORT.decode(line)
    except msgspec.MsgspecError as error:
        raise ProtocolError(str(error)) from None
