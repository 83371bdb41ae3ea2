# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A report of an agent beside servers, as it travels: its fields, its canonical bytes, its signature.

Owns the encoding that is signed, which both ends make of the values they have. JSON carries the report; but whoever
signs JSON signs one of its many spellings. Pure; sends nothing, and judges no values.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

MOST_VALUES = 64
MOST_ENDPOINTS = 256
RUN_BYTES = 16
SIGNATURE_BYTES = 32
MOST_SEQUENCE = 2**53 - 1
"""What every JSON library carries as a whole number."""
NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")

_PURPOSE = b"lbapp server report 1"
_U16, _NUMBERS, _DOUBLE = struct.Struct(">H"), struct.Struct(">Qd"), struct.Struct(">d")


class Told(NamedTuple):
    """What an agent reports.

    Attributes:
        run: 16 bytes, others each time that the agent starts.
        sequence: from 1, greater in each report of a run.
        time: the agent's clock, seconds since 1970.
        endpoints: addresses and ports of the servers; port 0: whatever serves at that address.
        values: what was measured. What could not be is not there.
    """

    run: bytes
    sequence: int
    time: float
    endpoints: tuple[tuple[str, int], ...]
    values: Mapping[str, float]


def canonical(agent: str, told: Told) -> bytes:
    """The bytes that are signed: every part with its length or of a fixed one, in one order."""
    parts = [_texts(agent), told.run, _NUMBERS.pack(told.sequence, told.time), _U16.pack(len(told.endpoints))]
    for address, port in told.endpoints:
        packed = ipaddress.ip_address(address).packed
        parts += [bytes((len(packed),)), packed, _U16.pack(port)]
    parts.append(_U16.pack(len(told.values)))
    for name in sorted(told.values):
        parts += [_texts(name), _DOUBLE.pack(told.values[name])]
    return b"".join(parts)


def sign(key: bytes, agent: str, told: Told) -> bytes:
    """The signature, 32 bytes: HMAC-SHA256 under a key that is derived from the buses' for this purpose alone."""
    return hmac.digest(hmac.digest(key, _PURPOSE, "sha256"), canonical(agent, told), "sha256")


def signed(given: bytes, key: bytes, agent: str, told: Told) -> bool:
    """Whether that is its signature; compared in constant time."""
    return hmac.compare_digest(given, sign(key, agent, told))


def document(told: Told, signature: bytes | None) -> dict[str, Any]:
    """As JSON carries it."""
    return {"run": told.run.hex(), "sequence": told.sequence, "time": told.time,
            "servers": [{"address": address, "port": port} for address, port in told.endpoints],
            "values": dict(told.values), "signature": None if signature is None else signature.hex()}


def _texts(text: str) -> bytes:
    encoded = text.encode()
    return _U16.pack(len(encoded)) + encoded
