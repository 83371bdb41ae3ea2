# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The whole configuration as one document, and the difference that applying one makes.

A document names things, it has no ids: ``networks``, ``pools`` with their members, and
``virtual_servers`` whose ``pool`` is a pool's name. What is not in it is removed. What is in it
already stays untouched, so that applying a document twice changes nothing the second time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec
import webob

from lbapp.api.errors import ApiError, editable, from_store, invalid
from lbapp.api.requests import check_if_match, entity_tag, flag_of, json_object, query, resource_of, values_of
from lbapp.api.resources import Answer, apply, ok
from lbapp.config.model import Configuration, Member, Network, Pool, VirtualServer
from lbapp.config.rows import Resource, identified, with_members
from lbapp.config.snapshot import breathe
from lbapp.config.store import Change, Create, Delete, Snapshot, Store, StoreError, Update, new_id

SECTIONS: dict[str, type[Resource]] = {"networks": Network, "pools": Pool, "virtual_servers": VirtualServer}
LABELS: dict[type, str] = {Network: "network", Pool: "pool", VirtualServer: "virtual-server"}


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """What applying a document changes, as ``kind/name``; kinds: ``network``, ``pool``, ``virtual-server``."""

    created: list[str] = []
    updated: list[str] = []
    deleted: list[str] = []


class SitePool(msgspec.Struct, frozen=True, kw_only=True):
    """A pool's place in a parsed document."""

    pool: Pool
    path: str


class Site:
    """A parsed document.

    Args:
        document: the JSON object.

    Raises:
        ApiError: 400, with the path of the value to blame.
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        for section in document:
            if section not in SECTIONS:
                raise invalid(f"unknown field; expected one of {', '.join(SECTIONS)}", section)
        self.networks = self._named(document, "networks")
        self.pools = self._named(document, "pools")
        self._pool_names: dict[str, str | None] = {}
        self.virtual_servers = self._named(document, "virtual_servers")

    def _named(self, document: Mapping[str, Any], section: str) -> dict[str, tuple[str, Any]]:
        entries = document.get(section)
        if entries is None:
            entries = []
        if not isinstance(entries, list):
            raise invalid("expected an array", section)
        found: dict[str, tuple[str, Any]] = {}
        for index, values in breathe(enumerate(entries)):
            path = f"{section}[{index}]"
            if section == "virtual_servers" and isinstance(values, dict):
                values = self._without_pool(values, path)
            resource = resource_of(values, SECTIONS[section], path)
            if resource.name in found:
                raise invalid(f"expected a name that {found[resource.name][0]} does not have already, "
                              f"got {resource.name!r}", f"{path}.name")
            found[resource.name] = (path, resource)
        return found

    def _without_pool(self, values: dict[str, Any], path: str) -> dict[str, Any]:
        values = dict(values)
        name = values.pop("pool", None)
        if "default_pool_id" in values:
            raise invalid("unknown field; expected pool, a pool's name", f"{path}.default_pool_id")
        if name is not None and (not isinstance(name, str) or name not in self.pools):
            raise invalid(f"expected the name of a pool in this document, got {name!r}", f"{path}.pool")
        self._pool_names[path] = name
        return values

    def changes(self, snapshot: Snapshot, prefixes: dict[int, str]) -> tuple[list[Change], Difference]:
        """What leads from a snapshot to this document; fills ``prefixes`` with the paths of the changes."""
        self._snapshot = snapshot
        self._changes: list[Change] = []
        self._prefixes = prefixes
        self._difference = Difference()
        prefixes.clear()
        for path, network in breathe(self.networks.values()):
            self._compare(path, network)
        pool_ids = {}
        for name, (path, pool) in breathe(self.pools.items()):
            pool_ids[name] = self._compare(path, pool)
        for path, server in breathe(self.virtual_servers.values()):
            named = self._pool_names[path]
            msgspec.structs.force_setattr(server, "default_pool_id", None if named is None else pool_ids[named])
            self._compare(path, server)
        for kind, wanted in ((VirtualServer, self.virtual_servers), (Pool, self.pools), (Network, self.networks)):
            self._remove_others(kind, wanted)
        return self._changes, self._difference

    def _compare(self, path: str, resource: Any) -> str:
        """Note what is to be done about one resource; returns the id it has or gets."""
        kind = type(resource)
        current = self._snapshot.all(kind).get(self._snapshot.index.get((kind, "name"), {}).get(resource.name, ""))
        label = f"{LABELS[kind]}/{resource.name}"
        if current is None:
            identifier = new_id()
            self._note(path, Create(identified(resource, identifier)))
            self._difference.created.append(label)
            return identifier
        number = getattr(current, "number", 0)
        resource = identified(resource, current.id, number)
        if isinstance(resource, Pool):
            resource = _as_known(resource, current.members)
        if resource != current:
            self._note(path, Update(resource))
            self._difference.updated.append(label)
        return current.id

    def _remove_others(self, kind: Any, wanted: Mapping[str, Any]) -> None:
        others = [one for one in breathe(self._snapshot.all(kind).values()) if one.name not in wanted]
        for current in sorted(others, key=lambda one: one.name):
            self._note("", Delete(kind, current.id))
            self._difference.deleted.append(f"{LABELS[kind]}/{current.name}")

    def _note(self, path: str, change: Change) -> None:
        self._prefixes[len(self._changes)] = path
        self._changes.append(change)


def _as_known(pool: Pool, current: tuple[Member, ...]) -> Pool:
    """The same pool with the ids, numbers and order of members that are there already."""
    known = {(member.address, member.protocol_port): member for member in current}
    matched = []
    for member in pool.members:
        old = known.get((member.address, member.protocol_port))
        matched.append(member if old is None else identified(member, old.id, old.number))
    # Those without a number yet come last, in the document's order.
    return with_members(pool, tuple(sorted(matched, key=lambda member: member.number or 2**24)))


def document_of(configuration: Configuration) -> dict[str, Any]:
    """The document of a configuration, in the order of names, without what has its default."""
    pools = configuration.pools
    servers = []
    for server in breathe(sorted(configuration.virtual_servers.values(), key=lambda one: one.name)):
        values = _brief(server)
        pool_id = values.pop("default_pool_id", None)
        if pool_id is not None:
            values["pool"] = pools[pool_id].name
        servers.append(values)
    return {
        "networks": [_brief(one) for one in sorted(configuration.networks.values(), key=lambda one: one.name)],
        "pools": [_brief(one) for one in breathe(sorted(pools.values(), key=lambda one: one.name))],
        "virtual_servers": servers,
    }


def _brief(resource: Any) -> dict[str, Any]:
    values = values_of(resource)
    _drop_defaults(type(resource), values)
    if "members" in values and not values["members"]:
        del values["members"]
    for member in values.get("members", ()):
        _drop_defaults(Member, member)
    return values


def _drop_defaults(kind: Any, values: dict[str, Any]) -> None:
    for field, default in DEFAULTS[kind].items():
        if values.get(field) == default:
            values.pop(field, None)


def _defaults(kind: Any) -> dict[str, Any]:
    return {field.name: msgspec.to_builtins(field.default) for field in msgspec.structs.fields(kind)
            if field.default is not msgspec.NODEFAULT and field.name in editable(kind) and field.name != "members"}


DEFAULTS: dict[type, dict[str, Any]] = {kind: _defaults(kind) for kind in (Network, Pool, Member, VirtualServer)}


class Sites:
    """Requests to the whole configuration."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def show(self, request: webob.Request) -> Answer:
        """GET."""
        query(request)
        text = msgspec.json.encode(document_of(self.store.configuration))
        return ok(text, ETag=entity_tag(_digest(text)))

    def replace(self, request: webob.Request) -> Answer:
        """PUT: one transaction, or with ``dry_run=true`` only the difference."""
        dry_run = flag_of(query(request, "dry_run"), "dry_run")
        site = Site(json_object(request))
        prefixes: dict[int, str] = {}
        difference = Difference()

        def changes(snapshot: Snapshot) -> list[Change]:
            nonlocal difference
            if "If-Match" in request.headers:
                check_if_match(request, _digest(msgspec.json.encode(document_of(snapshot.configuration))))
            wanted, difference = site.changes(snapshot, prefixes)
            return wanted

        if dry_run:
            try:
                self.store.check(changes)
            except StoreError as error:
                raise from_store(error, prefixes) from None
        else:
            _reworded(lambda: apply(self.store, changes, prefixes))
        return ok(difference)


def _digest(text: bytes) -> str:
    """Tells documents apart: the whole configuration has no revision of its own that rows written by hand count in."""
    return hashlib.sha256(text).hexdigest()[:32]


def _reworded(action: Any) -> None:
    """Documents have ``pool`` where resources have ``default_pool_id``."""
    try:
        action()
    except ApiError as error:
        if error.field is not None and error.field.endswith(".default_pool_id"):
            error.field = error.field.removesuffix("default_pool_id") + "pool"
        raise
