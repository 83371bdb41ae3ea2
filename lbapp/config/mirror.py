# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Makes snapshots of what the database reports, row by row.

A row that does not validate is left out, with one line in the log, until it changes. Does no
I/O and changes nothing in the database.
"""

from __future__ import annotations

import logging
from typing import Any

from lbapp.config import ovsdb, rows
from lbapp.config.changes import settings_of
from lbapp.config.model import Member, Network, Pool, Switch, VirtualServer
from lbapp.config.rows import AnyResource, Resource
from lbapp.config.snapshot import Draft, Fitting, Settings, Snapshot, breathe, matters

LOG = logging.getLogger(__name__)

_WORDS = {"Virtual_Server": "virtual server", "Pool": "pool", "Member": "member", "Network": "network",
          "Switch": "switch"}


class Mirror:
    """Follows the database's rows.

    Attributes:
        expected: row id to (resource, revision, pool id) of the transaction in flight; a row
            that comes back just so need not be validated again.
        rejected: row id to the reason why it is left out.
    """

    def __init__(self) -> None:
        self.expected: dict[str, tuple[AnyResource, int, str | None]] = {}
        self.rejected: dict[str, str] = {}
        self._unfit: dict[str, VirtualServer] = {}
        """Virtual servers that are valid by themselves but do not fit their pool."""
        self._orphans: dict[str, dict[str, Member]] = {}
        """Members of pools that are left out, by pool."""
        self._used = (0, 0)

    def take(self, snapshot: Snapshot, updates: ovsdb.Updates, whole: bool = False) -> Snapshot:
        """The snapshot after an update.

        Args:
            whole: the update is a first dump; what is not in it does not exist any more.
        """
        draft = Draft(snapshot)
        if whole:
            self._forget_missing(draft, updates)
        for kind in (Network, Switch):
            table = rows.TABLES[kind]
            for identifier, raw in breathe(updates.get(table, {}).items()):
                self._alone(draft, kind, table, identifier, ovsdb.decode_row(raw))
        heads = self._heads(draft, updates)
        members = self._members(draft, updates)
        remade = self._pools(draft, heads, members)
        servers = self._servers(draft, updates)
        self._admit(draft, servers, remade)
        for resource, key, owner in draft.reindex():
            LOG.error("%s of %s belongs to %s as well", key.text, resource.id, owner)
        self._settings(draft, updates)
        return draft.finished()

    # -------------------------------------------------------------- rows to resources

    def _resource(self, draft: Draft, table: str, identifier: str, row: dict[str, Any]) -> Any:
        """The resource of a row; None where it is left out."""
        draft.set_revision(identifier, row["revision"])
        expected = self.expected.get(identifier)
        if expected is not None and rows.encode(*expected) == row:
            self.rejected.pop(identifier, None)
            return expected[0]
        try:
            resource = rows.decode(table, identifier, row)
        except ValueError as error:
            self._reject(identifier, f"{_WORDS[table]} {row.get('name') or identifier}: {error}")
            draft.set_revision(identifier, None)
            return None
        self.rejected.pop(identifier, None)
        return resource

    def _reject(self, identifier: str, reason: str) -> None:
        if self.rejected.get(identifier) != reason:
            LOG.error("left out of the configuration: %s", reason)
        self.rejected[identifier] = reason

    def _gone(self, draft: Draft, identifier: str) -> None:
        draft.set_revision(identifier, None)
        self.rejected.pop(identifier, None)

    def _alone(self, draft: Draft, kind: type[Network | Switch], table: str, identifier: str,
               update: ovsdb.RowUpdate) -> None:
        """A row that has to do with no other."""
        resource = None
        if update.new is None:
            self._gone(draft, identifier)
        else:
            resource = self._resource(draft, table, identifier, update.new)
        _store(draft, kind, identifier, resource)

    def _heads(self, draft: Draft, updates: ovsdb.Updates) -> dict[str, Pool | None]:
        """Pools without their members, as far as their rows changed."""
        heads: dict[str, Pool | None] = {}
        for identifier, raw in breathe(updates.get("Pool", {}).items()):
            update = ovsdb.decode_row(raw)
            if update.new is None:
                self._gone(draft, identifier)
                heads[identifier] = None
            else:
                heads[identifier] = self._resource(draft, "Pool", identifier, update.new)
        return heads

    def _members(self, draft: Draft, updates: ovsdb.Updates) -> dict[str, dict[str, Member | None]]:
        """By pool: the members whose rows changed; None for those that are gone from it."""
        changed: dict[str, dict[str, Member | None]] = {}
        highest = self._used[1]
        for identifier, raw in breathe(updates.get("Member", {}).items()):
            update = ovsdb.decode_row(raw)
            before = rows.uuid_of(update.old.get("pool_id"))
            if before is not None:
                changed.setdefault(before, {}).setdefault(identifier, None)
            if update.new is None:
                self._gone(draft, identifier)
                continue
            highest = max(highest, update.new["number"])
            pool_id = rows.uuid_of(update.new["pool_id"])
            assert pool_id is not None  # the schema says so
            changed.setdefault(pool_id, {})[identifier] = self._resource(draft, "Member", identifier, update.new)
        self._used = (self._used[0], highest)
        return changed

    def _pools(self, draft: Draft, heads: dict[str, Pool | None],
               members: dict[str, dict[str, Member | None]]) -> list[str]:
        """Put together the pools that changed in any way; returns their ids."""
        touched = list(dict.fromkeys([*heads, *members]))
        for identifier in breathe(touched):
            current = draft.get(Pool, identifier)
            head = heads.get(identifier, current)
            # ``pop`` first: whatever becomes of the pool, its members are noted in one place only.
            inside = self._orphans.pop(identifier, {})
            if current is not None:
                inside = {member.id: member for member in current.members}
            for member_id, member in members.get(identifier, {}).items():
                if member is None:
                    inside.pop(member_id, None)
                else:
                    inside[member_id] = member
            if head is None:
                if inside:
                    self._orphans[identifier] = inside
                _store(draft, Pool, identifier, None)
                continue
            ordered = tuple(sorted(inside.values(), key=lambda member: member.number))
            _store(draft, Pool, identifier, rows.with_members(head, ordered))
        return touched

    def _servers(self, draft: Draft, updates: ovsdb.Updates) -> dict[str, VirtualServer]:
        """Virtual servers whose rows changed and validate."""
        found = {}
        highest = self._used[0]
        for identifier, raw in breathe(updates.get("Virtual_Server", {}).items()):
            update = ovsdb.decode_row(raw)
            self._unfit.pop(identifier, None)
            server = None
            if update.new is None:
                self._gone(draft, identifier)
            else:
                highest = max(highest, update.new["number"])
                server = self._resource(draft, "Virtual_Server", identifier, update.new)
            if server is None:
                _store(draft, VirtualServer, identifier, None)
            else:
                found[identifier] = server
        self._used = (highest, self._used[1])
        return found

    def _admit(self, draft: Draft, servers: dict[str, VirtualServer], remade: list[str]) -> None:
        """Let in the virtual servers that fit their pools, put out those that do not any more."""
        before = draft.base.configuration.pools
        changed = {pool_id for pool_id in remade if matters(before.get(pool_id), draft.get(Pool, pool_id))}
        asked = {server.id: server for server in draft.users(changed)}
        asked.update((identifier, server) for identifier, server in self._unfit.items()
                     if server.default_pool_id in changed or server.l7_policies)
        asked.update(servers)
        fitting = Fitting(draft)
        for identifier, server in breathe(asked.items()):
            reason = self._misfit(draft, server, fitting)
            if reason is None:
                if self._unfit.pop(identifier, None) is not None:
                    self.rejected.pop(identifier, None)
                _store(draft, VirtualServer, identifier, server)
            else:
                self._unfit[identifier] = server
                self._reject(identifier, f"virtual server {server.name}: {reason}")
                _store(draft, VirtualServer, identifier, None)

    @staticmethod
    def _misfit(draft: Draft, server: VirtualServer, fitting: Fitting) -> str | None:
        pools: list[tuple[str, str, Pool | None]] = list(fitting.named(server))
        if server.default_pool_id is not None:
            pools.append(("default_pool_id", server.default_pool_id, draft.get(Pool, server.default_pool_id)))
        for field, name, pool in pools:
            if pool is None:
                return f"{field}: pool {name} is left out"
            clash = fitting.clash(server, pool, field)
            if clash is not None:
                return f"{clash.server_field}: {clash.message}"
        return None

    # -------------------------------------------------------------- the rest

    def _settings(self, draft: Draft, updates: ovsdb.Updates) -> None:
        for identifier, raw in updates.get(rows.SETTINGS, {}).items():
            row = ovsdb.decode_row(raw).new
            draft.settings = Settings() if row is None else settings_of(identifier, row, self._used)
        servers, members = self._used
        draft.settings = draft.settings._replace(
            next_virtual_server_number=max(draft.settings.next_virtual_server_number, servers + 1),
            next_member_number=max(draft.settings.next_member_number, members + 1))

    def _forget_missing(self, draft: Draft, updates: ovsdb.Updates) -> None:
        """Before a whole dump: drop what it does not have, and start the rest of the book-keeping anew."""
        self._orphans.clear()
        self._unfit.clear()
        present = {identifier for table in updates.values() for identifier in table}
        self.rejected = {identifier: why for identifier, why in self.rejected.items() if identifier in present}
        if not updates.get(rows.SETTINGS):
            draft.settings = Settings()
        kinds: tuple[type[Resource], ...] = (Network, Switch, VirtualServer)
        for kind in kinds:
            for identifier in [one for one in draft.all(kind) if one not in present]:
                draft.remove(kind, identifier)
        for pool in list(draft.all(Pool).values()):
            kept = tuple(member for member in pool.members if member.id in updates.get("Member", {}))
            if pool.id not in present:
                draft.remove(Pool, pool.id)
            elif len(kept) < len(pool.members):
                draft.put(rows.with_members(pool, kept))
        for identifier in [one for one in draft.base.revisions if one not in present]:
            draft.set_revision(identifier, None)


def _store(draft: Draft, kind: Any, identifier: str, resource: Any) -> None:
    """Put or remove, unless that changes nothing: who compares configurations should see that."""
    current = draft.get(kind, identifier)
    if current == resource:
        return
    if resource is None:
        draft.remove(kind, identifier)
    else:
        draft.put(resource)
