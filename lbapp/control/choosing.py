# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Which member of a pool gets a connection: the one its client is known to, or whom the algorithm selects.

Owns, for each switch, virtual server and pool, the members that can be reached and the state of selection among them.
Never answers a query: it is the engine that does. In this order:

    who is known (persistence) and whose member can be had    that member
    that member is full                                       its line, if the pool has one
    otherwise                                                 the algorithm, among those with room
    nobody has room                                           the line, if the pool has one

A known client's member can be had if it can be reached and is not disabled; while it is draining (or weighs nothing)
only with ``while_draining``, while it is down only with ``while_down``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable
from typing import NamedTuple

from lbapp.config.model import UNLIMITED, Algorithm, Member, Persistence, Pool, VirtualServer
from lbapp.config.pool import Override
from lbapp.control.messages import Binding, Closed, Query, Translation
from lbapp.control.neighbours import Neighbours
from lbapp.control.persistence import Clients, Keys
from lbapp.control.selection import ALGORITHMS, Candidate, Selector
from lbapp.control.services import Service, Services, Way
from lbapp.control.statistics import Counts, Ledger
from lbapp.values import Value

Choice = tuple[int, Translation, Way, tuple[Counts, Counts, Counts]]


class Full(NamedTuple):
    """There is no room: at this member, which it has to be; 0: at any."""

    member: int


class Chosen(Value, frozen=True):
    """Why a connection went where it went: the policy that matched ("": none), what was read, and the binding."""

    policy: str
    key: str
    binding: Binding


class Group:
    """The members of a pool that one virtual server can reach from one switch, and the selection among them.

    ``stale``: something changed; to be filled again when the next connection needs it. ``special``: clients are known
    again, or members have limits.
    """

    __slots__ = ("algorithm", "choices", "keys", "known", "limited", "pool", "selector", "special", "stale")

    def __init__(self) -> None:
        self.stale = True
        self.special = self.limited = False
        self.choices: list[Choice] = []
        self.algorithm: Algorithm | None = None
        self.selector: Selector | None = None
        self.pool: Pool | None = None
        self.keys: Keys | None = None
        self.known: dict[int, Choice] = {}


class SwitchState:
    """What the engine keeps for a switch. ``draining``: it takes no new connections."""

    __slots__ = ("chosen", "counts", "draining", "groups")

    def __init__(self, counts: Counts, draining: bool = False) -> None:
        self.counts = counts
        self.draining = draining
        self.groups: dict[int, dict[str, Group]] = {}
        self.chosen: OrderedDict[int, Chosen] = OrderedDict()

    def note(self, serial: int, chosen: Chosen, most: int) -> None:
        """Remember why a connection went where it went; of more than ``most`` the oldest makes room."""
        self.chosen[serial] = chosen
        if len(self.chosen) > most:
            self.chosen.popitem(last=False)

    def ended(self, closed: Iterable[Closed]) -> None:
        """Forget the reasons of connections that have ended. Kept until others make room, they would scatter in memory
        what is made for the next ones."""
        forget = self.chosen.pop
        for one in closed:
            forget(one.serial, None)

    def stale(self, number: int) -> None:
        """What a virtual server selects from has changed."""
        for group in self.groups.get(number, {}).values():
            group.stale = True


def full(choice: Choice) -> bool:
    """Whether a member has as many connections as it may."""
    return 0 <= choice[2].member.connection_limit <= choice[3][1].active


def admits(persistence: Persistence, member: Member) -> bool:
    """Whether clients that are known to a member are let in there."""
    if not member.admin_state_up or (member.health is Override.DOWN and not persistence.while_down):
        return False
    return persistence.while_draining or (member.weight > 0 and not member.draining)


class Choosing:
    """See the module's text.

    Args:
        neighbours: where next hops are.
        ledger: how many connections members have.
        clients: who is known.
    """

    def __init__(self, neighbours: Neighbours, ledger: Ledger, clients: Clients) -> None:
        self._neighbours = neighbours
        self._ledger = ledger
        self._clients = clients

    def fill(self, switch: SwitchState, switch_id: int, service: Service, pool_id: str) -> Group:
        """Find out again which members of a pool can be reached, and tell the selection."""
        group = switch.groups.setdefault(service.number, {}).setdefault(pool_id, Group())
        group.stale = False
        farm = service.farms.get(pool_id)
        pool = group.pool = farm.pool if farm is not None and farm.pool.admin_state_up else None
        persistence = pool.persistence if pool is not None else None
        group.keys = self._clients.keys(pool_id) if persistence is not None else None
        hosts = self._neighbours.hosts(switch_id)
        here = self._ledger.virtual_server(service.number)
        group.choices = []
        group.known = {}
        group.limited = False
        candidates = []
        for way in farm.ways if farm is not None and pool is not None else ():
            member = way.member
            host = hosts.get(way.next_hop)
            if host is None:
                continue
            known = persistence is not None and admits(persistence, member)
            if not member.takes_new and not known:
                continue
            load = self._ledger.member(member.number)
            choice = (member.number, way.translation(host), way, (here, load, switch.counts))
            group.limited = group.limited or member.connection_limit != UNLIMITED
            if known:
                group.known[member.number] = choice
            if member.takes_new:
                candidates.append(Candidate(member.number, member.weight, load))
                group.choices.append(choice)
        group.special = group.limited or group.keys is not None
        if pool is not None and (group.selector is None or group.algorithm is not pool.lb_algorithm):
            group.algorithm = pool.lb_algorithm
            group.selector = ALGORITHMS[pool.lb_algorithm]()
        if group.selector is not None and candidates:
            # Nobody to be reached is no reason to forget whose turn it is.
            group.selector.update(candidates)
        return group

    def eligible(self, services: Services, switch_id: int, virtual_server: VirtualServer,
                 pool: Pool | None) -> tuple[Member, ...]:
        """The members, in the pool's order, that take new connections and can be reached from a switch."""
        if pool is None or not pool.admin_state_up:
            return ()
        hosts = self._neighbours.hosts(switch_id)
        service = services.by_number.get(virtual_server.number)
        if service is not None and service.virtual_server is virtual_server and service.pool is pool:
            return tuple(way.member for way in service.ways if way.member.takes_new and way.next_hop in hosts)
        routes = services.routes
        return tuple(member for member in pool.members if member.takes_new and routes.reaches(virtual_server, member)
                     and routes.next_hop(virtual_server, member) in hosts)

    def choose(self, group: Group, pool_id: str, query: Query, said: bytes | None, now: float,
               failed: Container[int] = ()) -> Choice | Full | None:
        """The member of a connection; None: there is nobody.

        Args:
            group: of the pool, filled.
            pool_id: the pool.
            query: what was asked.
            said: the key of what its client said, where that is what it is known by.
            now: seconds.
            failed: members that it must not be.
        """
        found: Choice | Full | None = None
        keys = group.keys
        key = None if keys is None else said if keys.spoken else keys.of(query.signature)
        if key is not None:
            found = group.known.get(self._clients.member(pool_id, key, now))
            if found is not None and found[0] in failed:
                found = None
            if found is not None and group.limited and full(found):
                if group.pool is not None and group.pool.waiting is not None and not failed:
                    return Full(found[0])
                found = None
        if found is None:
            found = self._another(group, query, failed) if failed else self._selected(group, query)
        if key is not None and found is not None and not isinstance(found, Full):
            self._clients.bind(pool_id, key, found[0], now)
        return found

    @staticmethod
    def _selected(group: Group, query: Query) -> Choice | Full | None:
        choices = group.choices
        if not choices or group.selector is None:
            return None
        at = first = group.selector.pick(query.signature, query.serial)
        if not group.limited or not full(choices[at]):
            return choices[at]
        # Those who take turns are passed over; whoever would be selected again and again is not asked for ever.
        for _ in choices:
            at = group.selector.pick(query.signature, query.serial)
            if at == first:
                break
            if not full(choices[at]):
                return choices[at]
        return _lightest(choices) or Full(0)

    @staticmethod
    def _another(group: Group, query: Query, failed: Container[int]) -> Choice | Full | None:
        """Another member than those that failed: the pool's next one that has room."""
        left = [choice for choice in group.choices if choice[0] not in failed]
        if not left:
            return None
        at = query.serial // 2 % len(left)
        return next((choice for choice in (*left[at:], *left[:at]) if not full(choice)), Full(0))


def _lightest(choices: Iterable[Choice]) -> Choice | None:
    """Of those that have room the one with fewest connections for its weight."""
    return min((choice for choice in choices if not full(choice)),
               key=lambda choice: choice[3][1].active / choice[2].member.weight, default=None)
