# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The configuration, compiled for answering queries.

Owns which virtual server has which number, how each reaches its members, and which of them
depend on a next hop. Never knows about connections or where a neighbour is. A new
configuration is compared with the old one by identity first, so a change costs what changed.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lbapp.config.model import UNLIMITED, Configuration, Member, Pool, Protocol, State, VirtualServer
from lbapp.config.routing import Routes
from lbapp.control.connections import CONNTRACK_IDLE, GRACE
from lbapp.control.l7 import Reader
from lbapp.control.messages import Host, Translation
from lbapp.control.selection import COUNTING


class Way:
    """How one virtual server reaches one member."""

    __slots__ = ("_address", "_routed", "member", "next_hop", "port")

    def __init__(self, virtual_server: VirtualServer, member: Member, next_hop: str, routed: bool) -> None:
        self.member = member
        self._routed = routed
        self.next_hop = next_hop
        self.port = member.protocol_port if virtual_server.translate_port else 0
        # Packed when first needed: most of ten thousand virtual servers wait long for a client.
        self._address: bytes | str | None = member.address if virtual_server.translate_address else None

    def translation(self, host: Host) -> Translation:
        """What to rewrite, the next hop being at ``host``."""
        if isinstance(self._address, str):
            self._address = ipaddress.ip_address(self._address).packed
        return Translation(self._address, self.port, host, self._routed)


class Farm(NamedTuple):
    """A pool, and how one virtual server reaches its members."""

    pool: Pool
    ways: tuple[Way, ...]


class Service:
    """A virtual server with its pools, ready to answer for.

    Attributes:
        farms: the pools it reaches by id: the default one, those that its L7 policies name, and those that take one
            another's place.
        endpoints: where its members are, by number, where it reads what clients say.
        reader: reads what clients say first; None where it does not matter.
        counts: whether its connections are to be counted (`tracked` in a REPLY).
        sorries: what its pools have HTTP clients told while no member can take them, by the pool's id.
        waits: whether one of its pools has a line to wait in.
        follows: whether the control segment has to know its connections at all.
        accepts: whether it takes new connections.
        idle: seconds without news after which to ask about a connection.
    """

    __slots__ = ("accepts", "counts", "endpoints", "farms", "follows", "id", "idle", "limit", "names", "next_hops",
                 "number", "pool", "reader", "rules", "sorries", "tcp", "virtual_server", "waits", "ways")

    def __init__(self, resource_id: str, virtual_server: VirtualServer, configuration: Configuration,
                 next_hops: Mapping[str, str], routes: Routes) -> None:
        pools, chosen = configuration.pools_reached(virtual_server), configuration.pools_of(virtual_server).values()
        pool = pools.get(virtual_server.default_pool_id or "")
        self.id = resource_id
        self.virtual_server = virtual_server
        self.pool = pool
        self.number = virtual_server.number
        self.tcp = virtual_server.protocol is Protocol.TCP
        self.rules = virtual_server.state is State.RULES
        self.limit = virtual_server.connection_limit
        self.reader = Reader.of(virtual_server)
        self.counts = self.limit != UNLIMITED or any(
            one.lb_algorithm in COUNTING or any(member.connection_limit != UNLIMITED for member in one.members)
            for one in chosen)
        self.sorries = {} if self.reader is None else {
            key: said for key, one in pools.items() if (said := self.reader.sorry(one))}
        self.waits = any(one.waiting is not None for one in chosen)
        self.follows = self.rules or self.counts
        self.accepts = (virtual_server.admin_state_up and not virtual_server.maintenance
                        and (self.reader is not None or (pool is not None and pool.admin_state_up)))
        self.idle = CONNTRACK_IDLE
        if self.rules:
            self.idle = (virtual_server.idle_timeout or virtual_server.hard_timeout) + GRACE
        self.farms = {key: Farm(one, tuple(
            Way(virtual_server, member, next_hops.get(member.address) or routes.next_hop(virtual_server, member),
                routes.routed(virtual_server, member))
            for member in one.members if routes.reaches(virtual_server, member))) for key, one in pools.items()}
        self.endpoints = {member.number: (member.address, member.protocol_port)
                          for one in pools.values() for member in one.members} if self.reader is not None else {}
        self.names = {one.name: key for key, one in pools.items()}
        default = self.farms.get(virtual_server.default_pool_id or "")
        self.ways = default.ways if default is not None else ()
        self.next_hops = frozenset(way.next_hop for farm in self.farms.values() for way in farm.ways)


class Change(NamedTuple):
    """What a new configuration changed. ``uncounted``: numbers whose connections need not be counted any more."""

    removed: list[int]
    changed: list[int]
    uncounted: set[int]
    gone_members: set[int]
    wanted: list[str]
    unwanted: list[str]


def _changed(old: Mapping[str, object], new: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
    """(what is new or different, the ids that are gone)."""
    get = old.get
    changed: dict[str, object] = {}
    kept = 0
    for key, value in new.items():
        before = get(key)
        if before is not None:
            kept += 1
        if before is not value and before != value:
            changed[key] = value
    gone = [key for key in old if key not in new] if kept != len(old) else []
    return changed, gone


class Services:
    """All virtual servers of the running configuration."""

    def __init__(self) -> None:
        self.configuration = Configuration()
        self.routes = Routes()
        self.by_number: dict[int, Service] = {}
        self.members: dict[int, str] = {}
        self.counting: set[int] = set()
        """The numbers of those whose connections are counted while conntrack holds them."""
        self._users: dict[str, dict[int, None]] = {}

    def users(self, address: str) -> Iterable[int]:
        """The numbers of the virtual servers that reach members by way of an address."""
        return self._users.get(address, ())

    def update(self, new: Configuration) -> Change:
        """Take a new configuration over.

        Raises:
            ValueError: a virtual server or member has no number, or one that another one has;
                the old configuration stays.
        """
        old = self.configuration
        networks = new.networks is not old.networks and new.networks != old.networks
        pools, gone_pools = _changed(old.pools, new.pools)
        servers, gone_servers = _changed(old.virtual_servers, new.virtual_servers)
        members, gone_members = self._members(new, pools, gone_pools)
        if networks or pools or gone_pools:
            touched = {*pools, *gone_pools}
            for key, server in new.virtual_servers.items():
                if networks or server.default_pool_id in touched or (
                        new.several(server) and not touched.isdisjoint(new.pools_reached(server))):
                    servers.setdefault(key, server)
        changing: list[tuple[str, VirtualServer]] = [(key, new.virtual_servers[key]) for key in servers]
        removed = [old.virtual_servers[key].number for key in gone_servers]
        for key, server in changing:
            before = old.virtual_servers.get(key)
            if before is not None and before.number != server.number:
                removed.append(before.number)
        self._check_numbers(changing, set(removed))

        # Nothing above changed anything; nothing below fails.
        self.configuration = new
        self.members = members
        if networks:
            self.routes = Routes(new.networks.values())
        before_hops: set[str] = set()
        after_hops: list[str] = []
        uncounted: set[int] = set()
        for number in removed:
            self._release(self.by_number.pop(number), before_hops)
        next_hops: dict[str, str] = {}
        for key, server in changing:
            if server.route_by_destination:
                for pool in new.pools_reached(server).values():
                    for member in pool.members:
                        if member.address not in next_hops:
                            next_hops[member.address] = self.routes.towards(member.address)
            service = Service(key, server, new, next_hops if server.route_by_destination else {}, self.routes)
            earlier = self.by_number.get(server.number)
            if earlier is not None:
                self._release(earlier, before_hops)
                if earlier.counts and not service.counts:
                    uncounted.add(service.number)
            self.by_number[service.number] = service
            if service.counts and not service.rules:
                self.counting.add(service.number)
            for address in service.next_hops:
                if address not in self._users:
                    after_hops.append(address)
                self._users.setdefault(address, {})[service.number] = None
        return Change(removed, [server.number for _, server in changing], uncounted, gone_members,
                      sorted(address for address in after_hops if address not in before_hops),
                      sorted(address for address in before_hops if address not in self._users))

    def _release(self, service: Service, addresses: set[str]) -> None:
        self.counting.discard(service.number)
        for address in service.next_hops:
            addresses.add(address)
            users = self._users[address]
            del users[service.number]
            if not users:
                del self._users[address]

    def _members(self, new: Configuration, pools: Iterable[str],
                 gone_pools: list[str]) -> tuple[dict[int, str], set[int]]:
        """(pool id by member number, the numbers that are gone)."""
        pools = list(pools)
        if not pools and not gone_pools:
            return self.members, set()
        old = self.configuration
        gone = {member.number for key in [*pools, *gone_pools] if key in old.pools
                for member in old.pools[key].members}
        members = dict(self.members)
        for number in gone:
            del members[number]
        for key in pools:
            for member in new.pools[key].members:
                if not member.number:
                    raise ValueError(f"pool {new.pools[key].name}: member {member.address} has no number")
                if member.number in members:
                    raise ValueError(f"pool {new.pools[key].name}: member number {member.number} is taken")
                members[member.number] = key
                gone.discard(member.number)
        return members, gone

    def _check_numbers(self, changing: list[tuple[str, VirtualServer]], removed: set[int]) -> None:
        taken: dict[int, str] = {}
        for key, server in changing:
            if not server.number:
                raise ValueError(f"virtual server {server.name} has no number")
            holder = self.by_number.get(server.number)
            if taken.setdefault(server.number, key) != key or (
                    holder is not None and holder.id != key and server.number not in removed):
                raise ValueError(f"virtual server {server.name}: number {server.number} is taken")
