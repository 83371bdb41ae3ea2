# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Who may speak on the buses: proofs, the keys of a session, the window against replay.

Pure: nonces are given, files are read elsewhere (``keyfile.py``). Never sends anything.

Theory of operation. Both segments hold one shared key. Each sends a nonce of its own, and each proves that it
holds the key by a MAC over both nonces, everything said so far on the connection (the HELLOs: so a version
cannot be forced down) and its own role (so a proof cannot be sent back to who made it). The keys of the session
are derived from the same: four of them, one a bus and direction, and the number of the session, which an SSMB
datagram carries. No key is used for two purposes, and none outlives its TCP connection.

What watchers must not read is concealed besides: it is added (exclusive or) to what a pseudo-random function, HMAC
under a fifth key, makes of its place among the messages of its direction. No place comes twice in a session, no key in
two sessions: each such stream is used once. The message's tag, under another key, covers the concealed bytes and the
place, so that nothing of it can be changed, moved or repeated.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
from typing import NamedTuple

KEY_BYTES = 32
"""The least that a shared key has."""
NONCE_BYTES = 32
PROOF_BYTES = 32
TAG_BYTES = 16
"""A truncated HMAC-SHA256: what every message of a session ends with."""
WINDOW = 1024
_WINDOW_MASK = (1 << WINDOW) - 1

_PROOF = b"lbapp bus proof 1"
_SESSION = b"lbapp bus session 1"


class Role(enum.IntEnum):
    """Who speaks."""

    CS = 1
    DFS = 2

    @property
    def other(self) -> Role:
        """Who listens."""
        return Role.DFS if self is Role.CS else Role.CS


class SessionKeys(NamedTuple):
    """What both segments derive from a shared key and two nonces. ``session`` is never 0."""

    session: int
    ssmb_cs: bytes
    ssmb_dfs: bytes
    csmb_cs: bytes
    csmb_dfs: bytes
    concealing: bytes

    def ssmb(self, role: Role) -> bytes:
        """The key of the datagrams that ``role`` sends."""
        return self.ssmb_cs if role is Role.CS else self.ssmb_dfs

    def csmb(self, role: Role) -> bytes:
        """The key of the CSMB messages that ``role`` sends."""
        return self.csmb_cs if role is Role.CS else self.csmb_dfs


def transcript(messages: list[bytes]) -> bytes:
    """The digest of everything that was said before the challenges, in its order."""
    digest = hashlib.sha256()
    for message in messages:
        digest.update(len(message).to_bytes(4, "big"))
        digest.update(message)
    return digest.digest()


def proof(key: bytes, role: Role, said: bytes, cs_nonce: bytes, dfs_nonce: bytes) -> bytes:
    """What ``role`` answers to a challenge: 32 bytes.

    Args:
        key: the shared key.
        said: :func:`transcript` of the HELLOs.
    """
    return hmac.digest(key, b"".join((_PROOF, bytes((role,)), cs_nonce, dfs_nonce, said)), "sha256")


def proves(given: bytes, key: bytes, role: Role, said: bytes, cs_nonce: bytes, dfs_nonce: bytes) -> bool:
    """Whether ``given`` is the proof of ``role``; compared in constant time."""
    return hmac.compare_digest(given, proof(key, role, said, cs_nonce, dfs_nonce))


def derive(key: bytes, said: bytes, cs_nonce: bytes, dfs_nonce: bytes) -> SessionKeys:
    """The keys of a session (extract, then expand, as HKDF does)."""
    secret = hmac.digest(key, b"".join((_SESSION, cs_nonce, dfs_nonce, said)), "sha256")

    def expand(label: bytes) -> bytes:
        return hmac.digest(secret, label, "sha256")

    session = int.from_bytes(expand(b"session number")[:8], "big") or 1
    return SessionKeys(session, expand(b"ssmb cs"), expand(b"ssmb dfs"), expand(b"csmb cs"), expand(b"csmb dfs"),
                       expand(b"csmb concealed cs"))


def conceal(key: bytes, place: int, data: bytes) -> bytes:
    """At most 32 bytes concealed; or, of what was concealed, those bytes.

    Args:
        key: ``SessionKeys.concealing``, with which the CS alone conceals.
        place: the message's, among those of its direction that are tagged.
    """
    stream = hmac.digest(key, place.to_bytes(8, "big"), "sha256")
    return bytes(octet ^ other for octet, other in zip(data, stream[:len(data)], strict=True))


def tag(key: bytes, data: bytes) -> bytes:
    """The tag of one message of a session."""
    return hmac.digest(key, data, "sha256")[:TAG_BYTES]


class Window:
    """Which sequence numbers were seen: the last 1024, and everything older counts as seen.

    Ask :meth:`fresh` before the tag is checked (it is cheap), :meth:`mark` after it was found right: so nobody
    without the key moves the window.
    """

    __slots__ = ("_seen", "floor", "top")

    def __init__(self) -> None:
        self.top = 0
        self.floor = 0
        self._seen = 0

    def fresh(self, sequence: int) -> bool:
        """Whether a sequence number was not seen yet. 0 is none."""
        behind = self.top - sequence
        if behind < 0:
            return sequence > self.floor
        return behind < WINDOW and sequence > self.floor and not self._seen >> behind & 1

    def mark(self, sequence: int) -> None:
        """Remember a sequence number that is fresh."""
        ahead = sequence - self.top
        if ahead > 0:
            self._seen = (self._seen << ahead | 1) & _WINDOW_MASK if ahead < WINDOW else 1
            self.top = sequence
        else:
            self._seen |= 1 << -ahead

    def raise_floor(self, sequence: int) -> None:
        """Refuse everything up to ``sequence``: it was sent before a RESET."""
        self.floor = max(self.floor, sequence)
