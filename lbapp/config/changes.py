# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Changes to the configuration: what can be asked for, why it is refused, and the transaction it makes.

Pure: a snapshot and changes in, database operations out. All checks that span resources are
here; those of one resource are the model's.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from lbapp.config import rows
from lbapp.config.model import Member, Pool, VirtualServer
from lbapp.config.rows import AnyResource, Resource
from lbapp.config.snapshot import WORDS, Draft, Fitting, Settings, Snapshot, breathe, is_uuid, matters

_LAST_NUMBER = 2**24 - 1


class StoreError(Exception):
    """A change that was not made.

    Attributes:
        message: for people.
        field: the path of the field to blame within its resource, where there is one.
        change: which of the changes asked for, where it is one of them.
    """

    def __init__(self, message: str, field: str | None = None, change: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.change = change


class Invalid(StoreError):
    """A value that cannot be."""


class NotFound(StoreError):
    """What is to be changed does not exist."""


class Conflict(StoreError):
    """Not unique, in use, or changed by someone else in the meantime."""


class Unavailable(StoreError):
    """The database cannot be reached, or cannot write."""


class Create(NamedTuple):
    """Add a resource, a pool with its members. Preset its ``id`` (:func:`new_id`) to refer to it."""

    resource: Resource


class Update(NamedTuple):
    """Replace a resource by one with the same ``id``; its number stays.

    A pool's members are those given: a member keeps its number (and its connections) when its
    ``id``, or else its address and port, is one that the pool has.
    """

    resource: Resource
    revision: int | None = None


class Delete(NamedTuple):
    """Remove a resource, a pool with its members."""

    kind: type[Any]
    id: str
    revision: int | None = None


class Expect(NamedTuple):
    """Go on only if a resource or member still has this revision."""

    id: str
    revision: int


Change = Create | Update | Delete | Expect


class Plan(NamedTuple):
    """One transaction.

    Attributes:
        operations: JSON texts; none where nothing changes.
        expected: row id to (resource, revision, pool id): what the rows will be.
        generation: the settings' after it.
    """

    operations: list[msgspec.Raw]
    expected: dict[str, tuple[AnyResource, int, str | None]]
    generation: int


def new_id() -> str:
    """A fresh resource id."""
    return str(uuid.uuid4())


def plan(snapshot: Snapshot, changes: Sequence[Change]) -> Plan:
    """Check changes against a snapshot and put them into one transaction.

    They take effect together: checks that span resources see the outcome only, so two
    resources may swap names, and a virtual server may come before its pool.

    Raises:
        Invalid, NotFound, Conflict: nothing is to be changed.
    """
    planner = _Planner(snapshot)
    for index, change in breathe(enumerate(changes)):
        planner.take(index, change)
    planner.check()
    return planner.transaction()


class _Planner:
    def __init__(self, snapshot: Snapshot) -> None:
        self._base = snapshot
        self._draft = Draft(snapshot)
        self._settings = snapshot.settings
        self._blame: dict[str, int] = {}

    # -------------------------------------------------------------- taking changes

    def take(self, index: int, change: Change) -> None:
        if isinstance(change, Expect):
            self._expect(index, "resource", change.id, change.revision)
        elif isinstance(change, Create):
            self._create(index, change.resource)
        elif isinstance(change, Update):
            self._update(index, change)
        else:
            if self._draft.get(change.kind, change.id) is None:
                raise NotFound(f"no {WORDS[change.kind]} {change.id}", change=index)
            self._expect(index, WORDS[change.kind], change.id, change.revision)
            self._draft.remove(change.kind, change.id)
            self._blame[change.id] = index

    def _create(self, index: int, resource: Resource) -> None:
        identifier = resource.id or new_id()
        if self._draft.get(type(resource), identifier) is not None:
            raise Conflict(f"{WORDS[type(resource)]} {identifier} exists", "id", index)
        self._put(index, resource, identifier, None)

    def _update(self, index: int, change: Update) -> None:
        resource = change.resource
        current = self._draft.get(type(resource), resource.id)
        if current is None:
            raise NotFound(f"no {WORDS[type(resource)]} {resource.id}", change=index)
        self._expect(index, WORDS[type(resource)], resource.id, change.revision)
        self._put(index, resource, resource.id, current)

    def _put(self, index: int, resource: Resource, identifier: str, current: Resource | None) -> None:
        if is_uuid(resource.name):
            raise Invalid(f"name: expected something else than a UUID, got {resource.name!r}", "name", index)
        number = 0
        if isinstance(resource, VirtualServer):
            number = current.number if isinstance(current, VirtualServer) else self._server_number()
        resource = rows.identified(resource, identifier, number)
        if isinstance(resource, Pool):
            resource = self._numbered(resource, current.members if isinstance(current, Pool) else ())
        self._draft.put(resource)
        self._blame[identifier] = index

    def _numbered(self, pool: Pool, current: tuple[Member, ...]) -> Pool:
        by_id = {member.id: member for member in current}
        by_address = {(member.address, member.protocol_port): member for member in current}
        members = []
        for member in pool.members:
            known = by_id.get(member.id) if member.id else by_address.get((member.address, member.protocol_port))
            if known is None:
                members.append(rows.identified(member, member.id or new_id(), self._member_number()))
            else:
                members.append(rows.identified(member, known.id, known.number))
        # The order of their numbers is the one they will be read back in.
        return rows.with_members(pool, tuple(sorted(members, key=lambda member: member.number)))

    def _server_number(self) -> int:
        number = self._settings.next_virtual_server_number
        self._settings = self._settings._replace(next_virtual_server_number=number + 1)
        return self._in_range(number, "virtual server")

    def _member_number(self) -> int:
        number = self._settings.next_member_number
        self._settings = self._settings._replace(next_member_number=number + 1)
        return self._in_range(number, "member")

    @staticmethod
    def _in_range(number: int, word: str) -> int:
        if number > _LAST_NUMBER:
            raise Conflict(f"all {_LAST_NUMBER} {word} numbers have been used; they are never used again")
        return number

    def _expect(self, index: int, word: str, identifier: str, revision: int | None) -> None:
        if revision is None:
            return
        current = self._base.revisions.get(identifier)
        if current is None:
            raise NotFound(f"no {word} {identifier}", change=index)
        if current != revision:
            raise Conflict(f"the {word} was changed in the meantime: expected revision {revision}, "
                           f"it is {current} now", change=index)

    # -------------------------------------------------------------- checks that span resources

    def check(self) -> None:
        fitting = Fitting(self._draft)
        for server in breathe(self._affected()):
            self._check_server(server, fitting)
        self._check_fallbacks(fitting)
        for resource, key, owner in self._draft.reindex():
            other = self._draft.get(key.kind, owner)
            raise Conflict(f"{key.text} belongs to {WORDS[key.kind]} {other.name if other else owner} already",
                           key.field, self._blame.get(resource.id))

    def _affected(self) -> list[VirtualServer]:
        """Virtual servers that changed, or whose pool changed in what they depend on."""
        found: dict[str, VirtualServer] = {}
        pools = []
        for (kind, identifier), before in self._draft.touched.items():
            after = self._draft.get(kind, identifier)
            if isinstance(after, VirtualServer):
                found[identifier] = after
            elif isinstance(before, Pool) and (after is None or (isinstance(after, Pool) and matters(before, after))):
                pools.append(identifier)
        found.update((server.id, server) for server in self._draft.users(pools))
        return list(found.values())

    def _check_server(self, server: VirtualServer, fitting: Fitting) -> None:
        pool_id = server.default_pool_id
        if pool_id is not None:
            pool = self._draft.get(Pool, pool_id)
            if pool is None:
                removed = self._base.configuration.pools.get(pool_id)
                if removed is not None and server.id not in self._blame:
                    raise Conflict(f"pool {removed.name} is in use by virtual server {server.name}",
                                   change=self._blame.get(pool_id))
                raise Invalid(f"default_pool_id: expected the id of a pool that exists, got {pool_id!r}",
                              "default_pool_id", self._blame.get(server.id))
            self._check_fit(server, pool, fitting, "default_pool_id")
        for field, name, named in fitting.named(server):
            if named is None:
                renamed = self._base.find(Pool, name)
                if renamed is not None and server.id not in self._blame:
                    raise Conflict(f"pool {name} is in use by a policy of virtual server {server.name}",
                                   change=self._blame.get(renamed.id))
                raise Invalid(f"{field}: expected the name of a pool that exists, got {name!r}", field,
                              self._blame.get(server.id))
            self._check_fit(server, named, fitting, field)

    def _check_fallbacks(self, fitting: Fitting) -> None:
        """A pool that another one falls back to exists, and does not go away."""
        lost: set[str] = set()
        for (kind, identifier), before in self._draft.touched.items():
            after = self._draft.get(kind, identifier)
            if isinstance(before, Pool) and (after is None or after.name != before.name):
                lost.add(before.name)
            if isinstance(after, Pool) and after.fallback_pool is not None and (
                    fitting.pool(after.fallback_pool) is None):
                raise Invalid(f"fallback_pool: expected the name of a pool that exists, got {after.fallback_pool!r}",
                              "fallback_pool", self._blame.get(identifier))
        lost = {name for name in lost if fitting.pool(name) is None}
        for pool in breathe(self._draft.all(Pool).values()) if lost else ():
            if pool.fallback_pool in lost:
                removed = self._base.find(Pool, pool.fallback_pool)
                raise Conflict(f"pool {pool.fallback_pool} is the fallback_pool of pool {pool.name}",
                               change=self._blame.get(removed.id) if removed is not None else None)

    def _check_fit(self, server: VirtualServer, pool: Pool, fitting: Fitting, named_in: str) -> None:
        clash = fitting.clash(server, pool, named_in)
        if clash is None:
            return
        field = clash.pool_field if pool.id in self._blame else clash.server_field
        blamed = self._blame.get(pool.id, self._blame.get(server.id))
        raise Invalid(f"{field}: {clash.message}", field, blamed)

    # -------------------------------------------------------------- the transaction

    def transaction(self) -> Plan:
        self._operations: list[msgspec.Raw] = []
        self._expected: dict[str, tuple[AnyResource, int, str | None]] = {}
        for (kind, identifier), before in breathe(self._draft.touched.items()):
            after = self._draft.get(kind, identifier)
            if before == after:
                continue
            members = self._members(before, after)
            self._row(before, after, None)
            for old, new in members:
                self._row(old, new, identifier)
        generation = self._base.settings.generation + 1
        if not self._operations:
            return Plan([], {}, generation - 1)
        return Plan([*self._begin(generation), *self._operations, _json({"op": "commit", "durable": True})],
                    self._expected, generation)

    @staticmethod
    def _members(before: Resource | None, after: Resource | None) -> list[tuple[Member | None, Member | None]]:
        old = {member.id: member for member in before.members} if isinstance(before, Pool) else {}
        new = {member.id: member for member in after.members} if isinstance(after, Pool) else {}
        pairs: list[tuple[Member | None, Member | None]] = [
            (member, new.get(identifier)) for identifier, member in old.items() if new.get(identifier) != member]
        pairs += [(None, member) for identifier, member in new.items() if identifier not in old]
        return pairs

    def _row(self, before: AnyResource | None, after: AnyResource | None, pool_id: str | None) -> None:
        resource = before if after is None else after
        assert resource is not None
        table = rows.TABLES[type(resource)]
        where = [["_uuid", "==", rows.reference(resource.id)]]
        revision = self._base.revisions.get(resource.id, 0)
        if before is not None:
            self._add({"op": "wait", "table": table, "where": where, "timeout": 0, "until": "==",
                       "columns": ["revision"], "rows": [{"revision": revision}]})
        if after is None:
            self._add({"op": "delete", "table": table, "where": where})
            return
        row = rows.encode(after, revision + 1, pool_id)
        self._expected[after.id] = (after, revision + 1, pool_id)
        if before is None:
            self._add({"op": "insert", "table": table, "uuid": after.id, "row": row})
            return
        was = rows.encode(before, revision, pool_id)
        self._add({"op": "update", "table": table, "where": where,
                   "row": {column: value for column, value in row.items() if was[column] != value}})

    def _add(self, operation: dict[str, Any]) -> None:
        self._operations.append(_json(operation))

    def _begin(self, generation: int) -> list[msgspec.Raw]:
        """Fail unless this transaction follows the snapshot; that makes the checks above hold.

        Resources checked together may lie in different rows, so each transaction takes the one
        settings row: two that know nothing of each other cannot both be committed.
        """
        old, new = self._base.settings, self._settings
        row = {"generation": generation,
               "next_virtual_server_number": new.next_virtual_server_number,
               "next_member_number": new.next_member_number}
        if old.id is None:
            return [_json({"op": "insert", "table": rows.SETTINGS, "row": row})]
        where = [["_uuid", "==", rows.reference(old.id)]]
        return [
            _json({"op": "wait", "table": rows.SETTINGS, "where": where, "timeout": 0, "until": "==",
                   "columns": ["generation"], "rows": [{"generation": old.generation}]}),
            _json({"op": "update", "table": rows.SETTINGS, "where": where, "row": row}),
        ]


def settings_of(identifier: str, row: dict[str, Any], used: tuple[int, int]) -> Settings:
    """The settings row, with numbers above those in use (rows can be written by hand)."""
    return Settings(identifier, row["generation"],
                    max(1, row["next_virtual_server_number"], used[0] + 1),
                    max(1, row["next_member_number"], used[1] + 1))


def _json(operation: dict[str, Any]) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(operation))
