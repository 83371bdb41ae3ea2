# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a message of a bus: one word each, so that it can be counted.

Owns the words and the two exceptions of the codecs. Never decides what happens to the peer: that is the
sessions' (CSMB: the connection is closed) and the channel's business (SSMB: the datagram is ignored).
"""

from __future__ import annotations

import enum


class Fault(enum.Enum):
    """Why a message was not honoured, or why a connection ended. Values are the names of counters."""

    SHORT = "short"
    LONG = "long"
    LENGTH = "length"
    KIND = "kind"
    DIRECTION = "direction"
    VALUE = "value"
    VERSION = "version"
    SESSION = "session"
    UNAUTHENTICATED = "unauthenticated"
    REPLAYED = "replayed"
    SERIAL = "serial"
    STATE = "state"
    SILENT = "silent"
    LATE = "late"
    LIMIT = "limit"
    SLOW = "slow"
    REPLACED = "replaced"
    PEER = "peer"
    CLOSED = "closed"


class BusError(ValueError):
    """Something on a bus that cannot be honoured.

    Args:
        fault: the word it is counted under.
        text: what was found and what was expected, for a log.
    """

    def __init__(self, fault: Fault, text: str) -> None:
        super().__init__(f"{fault.value}: {text}")
        self.fault = fault


class DecodeError(BusError):
    """Received bytes that are no message."""


class EncodeError(BusError):
    """A value that no message can carry: an error of the caller."""
