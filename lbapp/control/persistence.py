# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Which member a client was given last, so that it meets the same one again (persistence).

Owns the table, its timeouts and bounds, and what of it has changed since somebody kept it last. Never decides whether
that member can be had: :mod:`choosing` does. No clock: ``now`` is the caller's, in seconds that only grow.

A client is known by a key: part of an address, or a value that it says. A value of more than :data:`WHOLE_MOST` bytes
is kept as its digest alone. Keys of different pools have nothing to do with each other. An entry is refreshed by each
new connection; where a pool has as many as it may, the client that was away longest makes room. Member numbers are
never used twice, so an entry of a member that is gone means nothing, and ends with its time.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import NamedTuple

from lbapp.config.pool import Persistence, PersistenceType, Pool
from lbapp.control.limits import DEFAULTS, Limits
from lbapp.control.messages import FlowSignature

WHOLE_MOST = 32
"""Bytes of the longest value that is kept as it is."""
DIGEST_BYTES = 16
ADDRESSES = frozenset({PersistenceType.SOURCE_IP, PersistenceType.DESTINATION_IP})
KEPT_SHARE = 0.1
"""An entry that was only refreshed is told of again after this share of its timeout: that much less may be left of it
after a restart."""
TABLES_PER_TICK, EXPIRED_PER_TICK = 100, 1000
CLEARED_MOST = 4096
"""Clearings that are remembered until somebody keeps them."""


class Keys:
    """How the clients of one pool are told apart.

    Attributes:
        kind: what an entry has to have been made by, so as to mean anything here.
        spoken: whether the key lies in what clients say.
    """

    __slots__ = ("_masks", "_source", "kind", "persistence", "spoken")

    def __init__(self, persistence: Persistence) -> None:
        self.persistence = persistence
        self.spoken = persistence.type not in ADDRESSES
        self._source = persistence.type is PersistenceType.SOURCE_IP
        four, six = persistence.prefix_length_v4, persistence.prefix_length_v6
        self._masks = {4: (1 << 32) - (1 << 32 - four), 16: (1 << 128) - (1 << 128 - six)}
        self.kind = f"{persistence.type.value} {persistence.key if self.spoken else f'{four} {six}'}"

    def of(self, signature: FlowSignature) -> bytes:
        """The key of who connects, where it is an address."""
        return self._network(signature.source if self._source else signature.destination)

    def _network(self, address: bytes) -> bytes:
        size = len(address)
        return (int.from_bytes(address, "big") & self._masks[size]).to_bytes(size, "big")

    def said(self, value: bytes | None) -> bytes | None:
        """The key of who says this; None: nobody in particular."""
        if not value:
            return None
        if len(value) <= WHOLE_MOST:
            return b"=" + value
        return b"#" + blake2b(value, digest_size=DIGEST_BYTES).digest()

    def typed(self, text: str) -> bytes | None:
        """The key that a text stands for: an address, or a value as clients say it; or as :meth:`shown` tells it."""
        if not self.spoken:
            try:
                return self._network(ipaddress.ip_address(text.partition("/")[0]).packed)
            except ValueError:
                return None
        prefix, _, digits = text.partition(":")
        if prefix in ("hex", "digest"):
            try:
                octets = bytes.fromhex(digits)
            except ValueError:
                return self.said(text.encode())
            if prefix == "hex":
                return self.said(octets)
            return b"#" + octets if len(octets) == DIGEST_BYTES else None
        return self.said(text.encode())

    def shown(self, key: bytes) -> str:
        """A key as people read it: a network, a value (``hex:`` where it cannot be printed), ``digest:`` of a long
        one."""
        if not self.spoken:
            mask = self._masks[len(key)]
            return f"{ipaddress.ip_address(key)}/{mask.bit_count()}"
        if key[:1] == b"#":
            return f"digest:{key[1:].hex()}"
        text = key[1:].decode("latin-1")
        ambiguous = text.startswith(("hex:", "digest:"))
        return text if text.isascii() and text.isprintable() and not ambiguous else f"hex:{key[1:].hex()}"


class Client(NamedTuple):
    """A copy of one entry. ``used``: when its client connected last."""

    pool: str
    key: bytes
    shown: str
    member: int
    used: float
    expires: float


class Kept(NamedTuple):
    """An entry as somebody keeps it. ``member`` 0: it is to be forgotten. ``age``: seconds since its client connected
    last."""

    pool: str
    key: bytes
    kind: str
    member: int
    age: float
    timeout: float


class Changes(NamedTuple):
    """What has changed: first what was cleared, (pool id, "": all; member, 0: all); then the entries that are other
    ones now."""

    cleared: tuple[tuple[str, int], ...]
    entries: tuple[Kept, ...]


class _Entry:
    __slots__ = ("kept", "member", "used")

    def __init__(self, member: int, used: float, kept: float) -> None:
        self.member = member
        self.used = used
        self.kept = kept


class _Table:
    """One pool's clients, who was away longest first."""

    __slots__ = ("entries", "keys", "persistence")

    def __init__(self, keys: Keys) -> None:
        self.persistence = keys.persistence
        self.keys = keys
        self.entries: OrderedDict[bytes, _Entry] = OrderedDict()


class Clients:
    """The clients of all pools.

    Args:
        limits: how many there may be in all, and how many changes wait to be kept.

    Attributes:
        unkept: changes that nobody fetched in time.
    """

    def __init__(self, limits: Limits = DEFAULTS) -> None:
        self._limits = limits
        self._tables: dict[str, _Table] = {}
        self._turns: deque[str] = deque()
        self._size = 0
        # A plain dictionary looks for its first key behind all that were deleted.
        self._changed: OrderedDict[tuple[str, bytes], None] = OrderedDict()
        self._cleared: OrderedDict[tuple[str, int], None] = OrderedDict()
        self.unkept = 0

    def __len__(self) -> int:
        return self._size

    def configure(self, pools: Mapping[str, Pool]) -> None:
        """Take other pools. Who is known by something else now is not known any more."""
        for pool_id in [one for one in self._tables if one not in pools or pools[one].persistence is None]:
            self._drop(pool_id)
        for pool_id, pool in pools.items():
            persistence = pool.persistence
            if persistence is None:
                continue
            table = self._tables.get(pool_id)
            if table is not None and table.persistence is persistence:
                continue
            keys = Keys(persistence)
            if table is not None and table.keys.kind != keys.kind:
                self._drop(pool_id)
                table = None
            if table is None:
                self._tables[pool_id] = _Table(keys)
                self._turns.append(pool_id)
                continue
            table.persistence, table.keys = persistence, keys
            while len(table.entries) > persistence.limit:
                self._remove(pool_id, table, next(iter(table.entries)))

    def _drop(self, pool_id: str) -> None:
        table = self._tables.pop(pool_id)
        self._turns.remove(pool_id)
        self._size -= len(table.entries)
        self._clear(pool_id, 0)

    # -------------------------------------------------------------- clients

    def keys(self, pool_id: str) -> Keys | None:
        """How a pool's clients are told apart; None where they are not."""
        table = self._tables.get(pool_id)
        return table.keys if table is not None else None

    def member(self, pool_id: str, key: bytes, now: float) -> int:
        """The member that a client was given last; 0 where nobody knows."""
        table = self._tables[pool_id]
        entry = table.entries.get(key)
        if entry is None:
            return 0
        if now - entry.used >= table.persistence.timeout:
            self._remove(pool_id, table, key)
            return 0
        return entry.member

    def bind(self, pool_id: str, key: bytes, member: int, now: float) -> None:
        """A client is given a member, the same as before or another one."""
        table = self._tables[pool_id]
        entry = table.entries.get(key)
        if entry is None:
            self._make_room(pool_id, table)
            table.entries[key] = _Entry(member, now, now)
            self._size += 1
        else:
            table.entries.move_to_end(key)
            entry.used = now
            if entry.member == member and now - entry.kept < KEPT_SHARE * table.persistence.timeout:
                return
            entry.member, entry.kept = member, now
        self._change(pool_id, key)

    def _make_room(self, pool_id: str, table: _Table) -> None:
        if len(table.entries) >= table.persistence.limit:
            self._remove(pool_id, table, next(iter(table.entries)))
        elif self._size >= self._limits.clients:
            if not table.entries:
                pool_id, table = max(self._tables.items(), key=lambda item: len(item[1].entries))
            self._remove(pool_id, table, next(iter(table.entries)))

    def _remove(self, pool_id: str, table: _Table, key: bytes) -> None:
        del table.entries[key]
        self._size -= 1
        self._change(pool_id, key)

    def tick(self, now: float) -> None:
        """Forget whose time is over: of some pools, those that were looked at longest ago."""
        left = EXPIRED_PER_TICK
        for _ in range(min(TABLES_PER_TICK, len(self._turns))):
            pool_id = self._turns[0]
            table = self._tables[pool_id]
            while table.entries and left:
                key, entry = next(iter(table.entries.items()))
                if now - entry.used < table.persistence.timeout:
                    break
                self._remove(pool_id, table, key)
                left -= 1
            if not left:
                return
            self._turns.rotate(-1)

    def clear(self, pool_id: str = "", member: int = 0, key: str = "") -> int:
        """Forget clients: of a pool, of a member, of a key as people write it; returns how many there were.

        What is left out is any; with all of it left out nobody is known any more.
        """
        removed = 0
        for one, table in list(self._tables.items()) if not pool_id else [
                (pool_id, self._tables[pool_id])] if pool_id in self._tables else []:
            if key:
                typed = table.keys.typed(key)
                entry = table.entries.get(typed) if typed is not None else None
                if typed is not None and entry is not None and member in (0, entry.member):
                    self._remove(one, table, typed)
                    removed += 1
                continue
            gone = [known for known, entry in table.entries.items() if member in (0, entry.member)]
            for known in gone:
                del table.entries[known]
            self._size -= len(gone)
            removed += len(gone)
        if not key:
            self._clear(pool_id, member)
        return removed

    def count(self, pool_id: str) -> int:
        """How many clients of a pool are remembered."""
        table = self._tables.get(pool_id)
        return len(table.entries) if table is not None else 0

    def listed(self, pool_id: str = "", member: int = 0, key: str = "") -> Iterator[Client]:
        """Copies of entries, in no order. The table may change meanwhile."""
        for one in [pool_id] if pool_id else list(self._tables):
            table = self._tables.get(one)
            if table is None:
                continue
            entries: Iterable[tuple[bytes, _Entry]]
            if key:
                typed = table.keys.typed(key)
                entry = table.entries.get(typed) if typed is not None else None
                entries = [(typed, entry)] if typed is not None and entry is not None else []
            else:
                entries = list(table.entries.items())
            shown, timeout = table.keys.shown, table.persistence.timeout
            for known, entry in entries:
                if member in (0, entry.member):
                    yield Client(one, known, shown(known), entry.member, entry.used, entry.used + timeout)

    # -------------------------------------------------------------- what somebody keeps

    def _change(self, pool_id: str, key: bytes) -> None:
        self._changed[pool_id, key] = None
        if len(self._changed) > self._limits.changes:
            self._changed.popitem(last=False)
            self.unkept += 1

    def _clear(self, pool_id: str, member: int) -> None:
        self._cleared[pool_id, member] = None
        if len(self._cleared) > CLEARED_MOST:
            self._cleared.popitem(last=False)
            self.unkept += 1

    def changes(self, now: float, most: int = 1 << 30) -> Changes:
        """What has changed since the last time this was asked: ``most`` entries, what is left the next time."""
        changed = [self._changed.popitem(last=False)[0] for _ in range(min(most, len(self._changed)))]
        cleared, self._cleared = tuple(self._cleared), OrderedDict()
        entries = []
        for pool_id, key in changed:
            table = self._tables.get(pool_id)
            if table is None:
                continue
            entry = table.entries.get(key)
            entries.append(Kept(pool_id, key, table.keys.kind, entry.member if entry is not None else 0,
                                now - entry.used if entry is not None else 0.0, table.persistence.timeout))
        return Changes(cleared, tuple(entries))

    def restore(self, kept: Iterable[Kept], now: float) -> int:
        """Take back what somebody has kept; returns how many clients that were.

        Not those whose time is over, who were known by something else, or who are known already.
        """
        found = 0
        for one in sorted(kept, key=lambda one: -one.age):
            table = self._tables.get(one.pool)
            if (table is None or table.keys.kind != one.kind or one.age >= table.persistence.timeout or not one.member
                    or one.key in table.entries):
                continue
            self._make_room(one.pool, table)
            used = now - max(one.age, 0.0)
            table.entries[one.key] = _Entry(one.member, used, used)
            self._size += 1
            found += 1
        return found
