# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What one switch should hold, and what to change when the configuration or a neighbour changes.

Owns the counts of facts that virtual servers share, and which members each switch-decided group
has. Keeps no rules: a rule that must go is computed again from what it was made of. Pure: the
caller sends the changes, as one bundle each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from lbapp.config.model import Configuration, Member, Pool, VirtualServer
from lbapp.config.routing import Routes
from lbapp.control.messages import Host
from lbapp.dataflow.facts import Fact, Forward, Gateway, facts_of, network_facts
from lbapp.dataflow.flows import base_flows, flows_of, host_route
from lbapp.dataflow.openflow import GROUP_ADD, GROUP_MODIFY, Flow, SelectGroup
from lbapp.dataflow.pipeline import probe_mac, zones
from lbapp.dataflow.serving import virtual_server_flows

_NOWHERE = Host(bytes(6), 0)
"""Stands in for a neighbour where only a rule's match matters (to delete it)."""


@dataclass(slots=True)
class Change:
    """What to do to a switch, to be applied as one: groups, rules deleted, rules added, groups deleted."""

    add: list[Flow] = field(default_factory=list)
    delete: list[Flow] = field(default_factory=list)
    groups: list[tuple[int, SelectGroup]] = field(default_factory=list)
    delete_groups: list[SelectGroup] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.add or self.delete or self.groups or self.delete_groups)

    def __len__(self) -> int:
        return len(self.add) + len(self.delete) + len(self.groups) + len(self.delete_groups)


def _reached(configuration: Configuration, server: VirtualServer) -> tuple[Member, ...]:
    """The members that may have connections of a virtual server."""
    if configuration.several(server):
        return tuple(member for pool in configuration.pools_reached(server).values() for member in pool.members)
    pool = configuration.pool_of(server)
    return pool.members if pool is not None else ()


@dataclass(slots=True, frozen=True)
class _Installed:
    """What a virtual server's own rules were made of."""

    virtual_server: VirtualServer
    pool: Pool | None
    reached: tuple[Member, ...]
    eligible: tuple[Member, ...]
    relayed: bool


class SwitchProgram:
    """The wanted content of one switch.

    Args:
        switch: its datapath id.
        hosts: a live view of the neighbours known on this switch (address -> Host).
        relays: whether the controller has the connections of a virtual server on this switch, at each change.
    """

    def __init__(self, switch: int, hosts: Mapping[str, Host],
                 relays: Callable[[VirtualServer], bool] = lambda _: False) -> None:
        self.switch = switch
        self._relays = relays
        self.zones = zones(switch)
        self._hosts = hosts
        self._configuration = Configuration()
        self._routes = Routes()
        self._wildcards: frozenset[int] = frozenset()
        self._facts: dict[Fact, int] = {}
        self._by_hop: dict[str, set[Fact]] = defaultdict(set)
        self._by_member: dict[int, set[Forward]] = defaultdict(set)
        self._installed: dict[str, _Installed] = {}
        self._decided_by_hop: dict[str, set[str]] = defaultdict(set)
        self._routed_hosts: dict[str, Host] = {}

    # -------------------------------------------------------------- changes

    def configure(self, configuration: Configuration) -> Iterator[Change]:
        """Take over a configuration; yields a change for each virtual server that it touches."""
        old = self._configuration
        routes = self._routes
        if old.networks is not configuration.networks and dict(old.networks) != dict(configuration.networks):
            routes = Routes(configuration.networks.values())
        wildcards = _wildcards(configuration)
        rebuild = routes is not self._routes or wildcards != self._wildcards
        self._configuration = configuration
        changed = [
            identifier for identifier in {**self._installed, **configuration.virtual_servers}
            if rebuild or self._differs(identifier)
        ]
        if rebuild:
            change = Change()
            was, now = old.networks.values(), configuration.networks.values()
            self._replace_facts([f for n in was for f in network_facts(n, self._routes)],
                                [f for n in now for f in network_facts(n, routes)], change)
            if change:
                yield change
        previous = (self._routes, self._wildcards)
        contested = self._contested(changed)
        for together in ([contested] if contested else []) + [[one] for one in changed if one not in contested]:
            change = Change()
            for identifier in together:
                self._change_virtual_server(identifier, previous, (routes, wildcards), change)
            if change:
                yield change
        self._routes, self._wildcards = routes, wildcards
        if rebuild:
            for address in list(self._hosts):
                change = self._route_to(address)
                if change:
                    yield change

    def _contested(self, changed: list[str]) -> dict[str, None]:
        """Virtual servers one of which takes the address and port that another gives up: to be changed as one,
        for what the one deletes may be what the other adds."""
        servers = self._configuration.virtual_servers
        old = {one: self._installed[one].virtual_server.key for one in changed if one in self._installed}
        new = {one: servers[one].key for one in changed if one in servers}
        moved = {one for one in changed if old.get(one) != new.get(one)}
        keys = {old[one] for one in moved if one in old} & {new[one] for one in moved if one in new}
        return {one: None for one in changed if old.get(one) in keys or new.get(one) in keys} if keys else {}

    def begin(self, configuration: Configuration) -> None:
        """Take over the first configuration without saying what changed: the caller compares :meth:`flows`."""
        self._configuration = configuration
        self._routes = Routes(configuration.networks.values())
        self._wildcards = _wildcards(configuration)
        for network in configuration.networks.values():
            self._count_facts(network_facts(network, self._routes))
        for identifier, server in configuration.virtual_servers.items():
            installed = self._made(server, self._routes)
            self._installed[identifier] = installed
            self._index(identifier, installed, self._routes, present=True)
            self._count_facts(facts_of(server, installed.reached, self._routes, self._wildcards, installed.relayed))
        for address in self._hosts:
            self._route_to(address)

    def host_changed(self, address: str) -> Change:
        """A neighbour is somewhere else now, or nowhere: the rules that lead to it."""
        change = Change()
        host = self._hosts.get(address)
        for fact in self._by_hop.get(address, ()):
            change.add += flows_of(fact, self.zones, host)
            if host is None:
                change.delete += flows_of(fact, self.zones, _NOWHERE)
        for identifier in sorted(self._decided_by_hop.get(address, ())):
            self._change_own(identifier, change)
        routed = self._route_to(address)
        change.add += routed.add
        change.delete += routed.delete
        return change

    def _route_to(self, address: str) -> Change:
        """The change of the rule by which a host of one of our networks is routed to."""
        host, known = self._hosts.get(address), self._routed_hosts.pop(address, None)
        if host is not None and self._configuration.networks and self._routes.network_of(address) is not None:
            self._routed_hosts[address] = host
            return Change(add=[host_route(address, host)])
        return Change(delete=[host_route(address, known)] if known is not None else [])

    def leads_to(self, server: VirtualServer, member: Member, moving: Collection[str]) -> bool:
        """Whether all rules are there that lead from a virtual server to a member and back, and none of these hosts is
        on the way."""
        needed = facts_of(server, (member,), self._routes, self._wildcards, self._relays(server))
        return all(fact in self._facts and not (isinstance(fact, Forward) and fact.next_hop in moving)
                   for fact in needed)

    # -------------------------------------------------------------- the whole

    def flows(self) -> Iterator[Flow]:
        """Every rule that the switch should hold now."""
        yield from base_flows(self.zones, probe_mac(self.switch))
        for fact in self._facts:
            yield from flows_of(fact, self.zones, self._host_of(fact))
        for installed in self._installed.values():
            yield from self._own(installed)[0]
        for address, host in self._routed_hosts.items():
            yield host_route(address, host)

    def groups(self) -> Iterator[SelectGroup]:
        """Every group that the switch should hold now."""
        for installed in self._installed.values():
            group = self._own(installed)[1]
            if group is not None:
                yield group

    # -------------------------------------------------------------- inside

    def _differs(self, identifier: str) -> bool:
        installed = self._installed.get(identifier)
        server = self._configuration.virtual_servers.get(identifier)
        if installed is None or server is None:
            return installed is not server
        if installed.virtual_server is not server or installed.relayed != self._relays(server):
            return True
        return (installed.pool is not self._configuration.pool_of(server)
                or installed.reached != _reached(self._configuration, server))

    def _made(self, server: VirtualServer, routes: Routes) -> _Installed:
        pool = self._configuration.pool_of(server)
        return _Installed(server, pool, _reached(self._configuration, server), self._eligible(server, pool, routes),
                          self._relays(server))

    def _host_of(self, fact: Fact) -> Host | None:
        if isinstance(fact, Forward):
            return self._hosts.get(fact.next_hop)
        return self._hosts.get(fact.address) if isinstance(fact, Gateway) else None

    def _eligible(self, server: VirtualServer, pool: Pool | None, routes: Routes) -> tuple[Member, ...]:
        if pool is None or not pool.admin_state_up or not server.switch_decides(pool):
            return ()
        return tuple(member for member in pool.members if member.takes_new and routes.reaches(server, member)
                     and routes.next_hop(server, member) in self._hosts)

    def _own(self, installed: _Installed, routes: Routes | None = None) -> tuple[list[Flow], SelectGroup | None]:
        return virtual_server_flows(installed.virtual_server, installed.pool, installed.eligible,
                                    routes or self._routes, self.zones, installed.relayed)

    def _change_virtual_server(self, identifier: str, previous: tuple[Routes, frozenset[int]],
                               current: tuple[Routes, frozenset[int]], change: Change) -> None:
        old = self._installed.pop(identifier, None)
        server = self._configuration.virtual_servers.get(identifier)
        new = None
        if server is not None:
            new = self._made(server, current[0])
            self._installed[identifier] = new
        self._replace_facts(
            facts_of(old.virtual_server, old.reached, *previous, old.relayed) if old is not None else [],
            facts_of(new.virtual_server, new.reached, *current, new.relayed) if new is not None else [], change)
        if old is not None:
            self._index(identifier, old, previous[0], present=False)
        if new is not None:
            self._index(identifier, new, current[0], present=True)
        _difference(self._own(old, previous[0]) if old is not None else ([], None),
                    self._own(new, current[0]) if new is not None else ([], None), change)

    def _change_own(self, identifier: str, change: Change) -> None:
        old = self._installed[identifier]
        new = replace(old, eligible=self._eligible(old.virtual_server, old.pool, self._routes))
        if new.eligible != old.eligible:
            self._installed[identifier] = new
            _difference(self._own(old), self._own(new), change)

    def _index(self, identifier: str, installed: _Installed, routes: Routes, *, present: bool) -> None:
        server, pool = installed.virtual_server, installed.pool
        if pool is None or not server.switch_decides(pool):
            return
        for member in pool.members:
            hop = routes.next_hop(server, member)
            if present:
                self._decided_by_hop[hop].add(identifier)
            else:
                self._decided_by_hop[hop].discard(identifier)
                if not self._decided_by_hop[hop]:
                    del self._decided_by_hop[hop]

    def _replace_facts(self, old: Iterable[Fact], new: Iterable[Fact], change: Change) -> None:
        fresh = self._count_facts(new)
        for fact in old:
            count = self._facts[fact] - 1
            if count:
                self._facts[fact] = count
                continue
            del self._facts[fact]
            self._index_fact(fact, present=False)
            change.delete += self._abandoned(fact)
        for fact in fresh:
            change.add += flows_of(fact, self.zones, self._host_of(fact))

    def _count_facts(self, facts: Iterable[Fact]) -> list[Fact]:
        """Count facts in; returns those that are new."""
        fresh = []
        for fact in facts:
            count = self._facts.get(fact, 0)
            self._facts[fact] = count + 1
            if not count:
                fresh.append(fact)
                self._index_fact(fact, present=True)
        return fresh

    def _abandoned(self, fact: Fact) -> list[Flow]:
        """The rules of a fact that is gone, but for those that another fact has taken over in their place."""
        flows = list(flows_of(fact, self.zones, _NOWHERE))
        if not isinstance(fact, Forward):
            return flows
        taken = {_place(flow) for other in self._by_member.get(fact.member, ())
                 for flow in flows_of(other, self.zones, self._host_of(other))}
        return [flow for flow in flows if _place(flow) not in taken]

    def _index_fact(self, fact: Fact, *, present: bool) -> None:
        if not isinstance(fact, Forward | Gateway):
            return
        if isinstance(fact, Forward) and fact.member:
            if present:
                self._by_member[fact.member].add(fact)
            else:
                self._by_member[fact.member].discard(fact)
                if not self._by_member[fact.member]:
                    del self._by_member[fact.member]
        hop = fact.next_hop if isinstance(fact, Forward) else fact.address
        if present:
            self._by_hop[hop].add(fact)
        else:
            self._by_hop[hop].discard(fact)
            if not self._by_hop[hop]:
                del self._by_hop[hop]


def _wildcards(configuration: Configuration) -> frozenset[int]:
    return frozenset(server.version for server in configuration.virtual_servers.values()
                     if server.wildcard_address and server.admin_state_up)


def _place(flow: Flow) -> tuple[int, int, tuple[object, ...]]:
    return flow.table, flow.priority, flow.match


def _difference(old: tuple[list[Flow], SelectGroup | None], new: tuple[list[Flow], SelectGroup | None],
                change: Change) -> None:
    was = {_place(flow): flow for flow in old[0]}
    for flow in new[0]:
        known = was.pop(_place(flow), None)
        if known is None or known.cookie != flow.cookie:
            change.add.append(flow)
    change.delete += was.values()
    if new[1] is not None and new[1] != old[1]:
        change.groups.append((GROUP_ADD if old[1] is None else GROUP_MODIFY, new[1]))
    if old[1] is not None and new[1] is None:
        change.delete_groups.append(old[1])

