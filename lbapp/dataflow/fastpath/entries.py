# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Connections that are to be entered, and what goes with each: as values, and as the program ``install`` reads them.

What goes with a connection, that program sends as soon as it has entered it, by the door that
:mod:`lbapp.dataflow.fastpath.injector` says: one system call for a whole batch.
"""

from __future__ import annotations

import enum
import struct
from mmap import mmap
from typing import NamedTuple

from lbapp.dataflow.fastpath import layout
from lbapp.dataflow.fastpath.layout import DEPARTURE, DEPARTURE_FRAME, DEPARTURE_SIZE, INSTALL, Flow, FlowKey
from lbapp.dataflow.pipeline import VIRTUAL_MAC


class FirstFrame(NamedTuple):
    """The frame that waited for it walks as if it had come in on this interface. Its checksums have to be whole."""

    ifindex: int
    frame: bytes


class Syn(NamedTuple):
    """A SYN to its member, with this initial sequence number and these options (at most 40 bytes, padded to words)."""

    isn: int
    options: bytes


Departure = FirstFrame | Syn


class Entry(NamedTuple):
    """A connection.

    Attributes:
        key: its packets as the client sends them.
        flow: the way there. Its state says who has finished (FIN, PEER_FIN), also of one that is there already.
        client_mac, client_ifindex: where the client is.
        departure: what is to go, soon, once it is entered.
    """

    key: FlowKey
    flow: Flow
    client_mac: bytes
    client_ifindex: int
    departure: Departure | None = None

    def back(self) -> tuple[FlowKey, Flow]:
        """The way back, which follows from all that (``enter_both``, ``connections.bpf.h``)."""
        key, flow = self.key, self.flow
        return (FlowKey(flow.destination, flow.source, flow.destination_port, flow.source_port, key.protocol),
                Flow(key.destination, key.source, key.destination_port, key.source_port, self.client_mac, VIRTUAL_MAC,
                     self.client_ifindex, flow.state | layout.OUTBOUND, flow.serial,
                     flow.virtual_server, flow.member, flow.idle_seconds))


class Departs(enum.IntEnum):
    """As ``fp_departs`` (``fastpath.h``)."""

    NOTHING = 0
    FRAME_GOES = 1
    SYN_GOES = 2


_NOTHING, _FRAME_GOES, _SYN_GOES = map(int, Departs)


class Batch:
    """Connections that are entered together. Not for several threads.

    Args:
        installs, departures: memory of the arrays of these names.
    """

    def __init__(self, installs: mmap | bytearray, departures: mmap | bytearray) -> None:
        self._installs = installs
        self._departures = departures

    def put(self, index: int, one: Entry, now: int) -> None:
        """Put it into a place. Nothing goes with it where its departure is longer than there is room for.

        Args:
            index: the place.
            one: the connection.
            now: in ticks.
        """
        key, flow, mac, ifindex, departure = one
        swapped, prefix = layout.SWAPPED, layout.MAPPED if len(key.source) == 4 else b""
        INSTALL.pack_into(
            self._installs, index * INSTALL.size, prefix + key.source, prefix + key.destination,
            swapped[key.source_port], swapped[key.destination_port], key.protocol, prefix + flow.source,
            prefix + flow.destination, swapped[flow.source_port], swapped[flow.destination_port], flow.destination_mac,
            flow.source_mac, flow.ifindex, flow.state, now, now, 0, 0, flow.serial, flow.virtual_server, flow.member,
            min(flow.idle_seconds, 0xFFFF), flow.request, mac, ifindex)
        at, memory = index * DEPARTURE_SIZE, self._departures
        if departure.__class__ is Syn:
            isn, options = departure
            DEPARTURE.pack_into(memory, at, 0, isn, len(options), _SYN_GOES, options)
        elif departure.__class__ is FirstFrame and len(departure.frame) <= DEPARTURE_FRAME:
            size, start = len(departure.frame), at + DEPARTURE.size
            DEPARTURE.pack_into(memory, at, departure.ifindex, 0, size, _FRAME_GOES, b"")
            memory[start:start + size] = departure.frame
        else:
            DEPARTURE.pack_into(memory, at, 0, 0, 0, _NOTHING, b"")

    def result(self, index: int) -> layout.Result:
        """What became of it."""
        at = index * INSTALL.size + layout.INSTALL_RESULT
        return _RESULTS[_U32.unpack_from(self._installs, at)[0]]


_RESULTS = tuple(layout.Result)
_U32 = struct.Struct("=I")

__all__ = ["Batch", "Departs", "Departure", "Entry", "FirstFrame", "Syn"]
