# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What the store knows at one moment, and the next such value in the making.

A snapshot is never changed. A :class:`Draft` copies only the maps it writes to, so that one
change among tens of thousands of resources stays cheap. Does no I/O.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from lbapp.config.model import SWITCH_ALGORITHMS, Configuration, Decision, Network, Pool, Switch, VirtualServer
from lbapp.config.pool import READ_PERSISTENCE
from lbapp.config.rows import Resource

T = TypeVar("T")
R = TypeVar("R", bound=Resource)

KINDS: tuple[type[Any], ...] = (Network, Pool, VirtualServer, Switch)
WORDS: dict[type, str] = {VirtualServer: "virtual server", Pool: "pool", Network: "network", Switch: "switch"}

_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_BREATH = 128


def is_uuid(text: str) -> bool:
    """Whether a text has the form of a UUID."""
    return _UUID.fullmatch(text) is not None


def breathe(items: Iterable[T]) -> Iterator[T]:
    """The same items, letting other greenlets and threads run every now and then."""
    for index, item in enumerate(items):
        if index % _BREATH == _BREATH - 1:
            time.sleep(0)
        yield item


class Settings(NamedTuple):
    """The one-row table: counts every transaction, and hands out numbers never used before."""

    id: str | None = None
    generation: int = 0
    next_virtual_server_number: int = 1
    next_member_number: int = 1


class UniqueKey(NamedTuple):
    """Something that only one resource may have. ``field`` is what to name when two want it."""

    kind: type
    field: str
    value: Hashable
    text: str


def unique_keys(resource: Resource) -> tuple[UniqueKey, ...]:
    """Everything that must be a resource's own; the schema's indexes say the same."""
    kind = type(resource)
    keys = [UniqueKey(kind, "name", resource.name, f"name {resource.name}")]
    if isinstance(resource, VirtualServer):
        keys.append(UniqueKey(kind, "vip_address", resource.key,
                              f"address {resource.vip_address}, {resource.protocol.value} "
                              f"and port {resource.protocol_port}"))
    elif isinstance(resource, Network):
        keys.append(UniqueKey(kind, "cidr", resource.cidr, f"cidr {resource.cidr}"))
    return tuple(keys)


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """A configuration, with what the model does not carry.

    Attributes:
        configuration: what subscribers get.
        revisions: of every resource and member, by id; counts its changes.
        index: (kind, field) to value to id, see :func:`unique_keys`.
        settings: generation and numbers.
    """

    configuration: Configuration = dataclasses.field(default_factory=Configuration)
    revisions: Mapping[str, int] = dataclasses.field(default_factory=dict)
    index: Mapping[tuple[type, str], Mapping[Hashable, str]] = dataclasses.field(default_factory=dict)
    settings: Settings = dataclasses.field(default_factory=Settings)

    def all(self, kind: type[R]) -> Mapping[str, R]:
        """The resources of one kind, by id."""
        return resources(self.configuration, kind)

    def find(self, kind: type[R], reference: str) -> R | None:
        """A resource by UUID or by name."""
        found = self.all(kind)
        resource = found.get(reference) or found.get(reference.lower())
        if resource is None:
            resource = found.get(self.index.get((kind, "name"), {}).get(reference, ""))
        return resource


def resources(configuration: Configuration, kind: type[R]) -> Mapping[str, R]:
    """The resources of one kind, by id."""
    if kind is VirtualServer:
        return configuration.virtual_servers  # type: ignore[return-value]
    if kind is Switch:
        return configuration.switches  # type: ignore[return-value]
    return configuration.pools if kind is Pool else configuration.networks  # type: ignore[return-value]


def _key(kind: Any) -> Hashable:
    return kind


class Draft:
    """The next snapshot in the making."""

    def __init__(self, base: Snapshot) -> None:
        self.base = base
        self.settings = base.settings
        self._maps: dict[Hashable, dict[Any, Any]] = {}
        self.touched: dict[tuple[type, str], Resource | None] = {}
        """(kind, id) of everything put or removed, with what it was before."""

    def get(self, kind: type[R], identifier: str) -> R | None:
        """A resource as it stands now."""
        return self.all(kind).get(identifier)

    def all(self, kind: type[R]) -> Mapping[str, R]:
        """The resources of one kind as they stand now, by id."""
        mine: Mapping[str, R] | None = self._maps.get(_key(kind))
        return self.base.all(kind) if mine is None else mine

    def put(self, resource: Resource) -> None:
        """Add a resource or replace the one of the same id."""
        kind = type(resource)
        self.touched.setdefault((kind, resource.id), self.base.all(kind).get(resource.id))
        self._writable(kind, self.base.all(kind))[resource.id] = resource

    def remove(self, kind: type[R], identifier: str) -> None:
        """Take a resource out, if it is there."""
        self.touched.setdefault((kind, identifier), self.base.all(kind).get(identifier))
        self._writable(_key(kind), self.base.all(kind)).pop(identifier, None)

    def set_revision(self, identifier: str, revision: int | None) -> None:
        """Note a revision; None forgets it."""
        if revision is None:
            self._writable("revisions", self.base.revisions).pop(identifier, None)
        elif self.base.revisions.get(identifier) != revision:
            self._writable("revisions", self.base.revisions)[identifier] = revision

    def reindex(self) -> Iterator[tuple[Resource, UniqueKey, str]]:
        """Bring the index up to date; yields each touched resource whose key another (its id) has.

        Only once all is put: two resources may swap their names.
        """
        for (kind, identifier), before in breathe(self.touched.items()):
            if before is not None:
                for key in unique_keys(before):
                    index = self._writable((kind, key.field), self.base.index.get((kind, key.field), {}))
                    if index.get(key.value) == identifier:
                        del index[key.value]
        for kind, identifier in breathe(self.touched):
            resource = self.get(kind, identifier)
            if resource is None:
                continue
            for key in unique_keys(resource):
                index = self._writable((kind, key.field), self.base.index.get((kind, key.field), {}))
                owner = index.setdefault(key.value, identifier)
                if owner != identifier:
                    yield resource, key, owner

    def users(self, pool_ids: Iterable[str]) -> list[VirtualServer]:
        """The virtual servers that use any of these pools."""
        wanted = set(pool_ids)
        if not wanted:
            return []
        names = {pool.name for where in (self, self.base) for pool in map(where.all(Pool).get, wanted)
                 if pool is not None}
        return [one for one in self.all(VirtualServer).values() if one.default_pool_id in wanted
                or (one.l7_policies and not names.isdisjoint(one.pool_names))]

    def finished(self) -> Snapshot:
        """The new snapshot. Maps that nothing was written to are the old ones."""
        old = self.base.configuration
        configuration = old
        if any(kind in self._maps for kind in KINDS):
            configuration = Configuration(
                virtual_servers=self._maps.get(VirtualServer, old.virtual_servers),
                pools=self._maps.get(Pool, old.pools),
                networks=self._maps.get(Network, old.networks),
                switches=self._maps.get(Switch, old.switches),
            )
        index = dict(self.base.index)
        index.update({key: value for key, value in self._maps.items() if isinstance(key, tuple)})
        return Snapshot(configuration, self._maps.get("revisions", self.base.revisions), index, self.settings)

    def _writable(self, name: Hashable, original: Mapping[Any, Any]) -> dict[Any, Any]:
        found = self._maps.get(name)
        if found is None:
            found = self._maps[name] = dict(original)
        return found


class Clash(NamedTuple):
    """Why a virtual server and its pool do not fit: the field to name on either side, and the reason."""

    server_field: str
    pool_field: str
    message: str


def matters(before: Pool | None, after: Pool | None) -> bool:
    """Whether a pool changed in something that its virtual servers have to fit."""
    if before is None or after is None:
        return before is not after
    return (before.lb_algorithm is not after.lb_algorithm or before.name != after.name
            or before.persistence != after.persistence or before.needs_controller != after.needs_controller
            or {":" in member.address for member in before.members}
            != {":" in member.address for member in after.members})


class Fitting:
    """Checks virtual servers against the pools of a draft; looks at each pool's members once."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._foreign: dict[tuple[str, int], int | None] = {}
        self._named: dict[str, Pool] | None = None

    def named(self, server: VirtualServer) -> Iterator[tuple[str, str, Pool | None]]:
        """The pools that a virtual server's policies name: (field, name, pool; None: there is none of that name)."""
        for index, policy in enumerate(server.l7_policies):
            if policy.redirect_pool is None:
                continue
            yield f"l7_policies[{index}].redirect_pool", policy.redirect_pool, self.pool(policy.redirect_pool)

    def pool(self, name: str) -> Pool | None:
        """A pool of the draft by its name."""
        if self._named is None:
            self._named = {pool.name: pool for pool in self._draft.all(Pool).values()}
        return self._named.get(name)

    def clash(self, server: VirtualServer, pool: Pool, field: str = "default_pool_id") -> Clash | None:
        """What is wrong between the two, if anything; ``field`` is what names the pool."""
        if server.decision is Decision.SWITCH and pool.lb_algorithm not in SWITCH_ALGORITHMS:
            able = ", ".join(sorted(algorithm.value for algorithm in SWITCH_ALGORITHMS))
            return Clash("decision", "lb_algorithm",
                         f"expected a pool's lb_algorithm that the switch can do ({able}) with decision switch; "
                         f"virtual server {server.name}, pool {pool.name} with {pool.lb_algorithm.value}")
        persistence = pool.persistence
        wanted = None if persistence is None else READ_PERSISTENCE.get(persistence.type)
        if persistence is not None and wanted not in (None, server.application.value):
            return Clash("application", "persistence.type",
                         f"expected {wanted} with a pool's persistence of type {persistence.type.value}; virtual "
                         f"server {server.name} with {server.application.value}, pool {pool.name}")
        if server.decision is Decision.SWITCH and pool.needs_controller:
            return Clash("decision", "persistence", "expected auto or controller with a pool that has persistence or "
                         f"members of a connection_limit; virtual server {server.name}, pool {pool.name}")
        if not server.translate_address:
            return None
        index = self._first_foreign(pool, server.version)
        if index is None:
            return None
        return Clash(field, f"members[{index}].address",
                     f"expected IPv{server.version} members for virtual server {server.name} while "
                     f"translate_address is true; pool {pool.name} has {pool.members[index].address}")

    def _first_foreign(self, pool: Pool, version: int) -> int | None:
        key = (pool.id, version)
        if key not in self._foreign:
            self._foreign[key] = next((index for index, member in enumerate(pool.members)
                                       if (":" in member.address) != (version == 6)), None)
        return self._foreign[key]
