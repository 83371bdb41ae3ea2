# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The configuration as it is in force: what operators asked for, with what is known of the members now.

Everything behind it (the control segment, switches, agents) is given such a configuration and need not know why a
member has no weight, or why a virtual server uses another pool. It is made whole beside the one in force and then takes
its place (004, configuration tables A and B), so nobody sees half a change. No I/O and no clock.

    a member that is down                  ``health: down``: no new connections; with ``on_down: reset`` it is left out,
                                           and what it had is reset
    one whose time for draining is over    left out
    of a priority that is not needed       ``draining``
    that starts slowly, or is distributed  another weight (those of its whole pool are scaled alike, so that parts of
                                           them can be said)
    a pool without any member to use       its fallback pool takes its place
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping

from lbapp.config.fields import replaced
from lbapp.config.model import Configuration, VirtualServer
from lbapp.config.pool import Member, OnDown, Override, Pool
from lbapp.control.health import Condition

MOST_WEIGHT = 256
MOST_FALLBACKS = 8
"""So many pools may fall back to one another in a row."""

Conditions = Callable[[Member], Condition]


def weights(members: Iterable[Member], own: Mapping[int, int], conditions: Conditions) -> dict[int, int]:
    """The weights of a pool's members, by number: their own or those of the distribution, and what of it a slow start
    leaves."""
    wanted = {member.number: own.get(member.number, member.weight) if member.weight else 0 for member in members}
    shares = {member.number: conditions(member).share for member in members}
    if all(share == 1.0 for share in shares.values()):
        return wanted
    scale = max(1, MOST_WEIGHT // max(1, *wanted.values()))
    return {number: max(1, round(weight * scale * shares[number])) if weight else 0
            for number, weight in wanted.items()}


def needed_priority(pool: Pool, available: Iterable[Member]) -> int:
    """The lowest priority that takes part: with those above, ``minimum_active`` members can be used."""
    if not pool.minimum_active:
        return 0
    ranks = sorted((member.priority for member in available), reverse=True)
    if len(ranks) <= pool.minimum_active:
        return 0
    return ranks[pool.minimum_active - 1]


def pool_in_force(pool: Pool, own: Mapping[int, int], conditions: Conditions) -> Pool:
    """One pool, given its members' conditions; the same object where nothing has to be said."""
    told: list[Member] = []
    weighed = weights(pool.members, own, conditions)
    for member in pool.members:
        condition = conditions(member)
        if condition.ended or (condition.down and pool.on_down is OnDown.RESET):
            continue
        changes: dict[str, object] = {}
        if condition.down:
            changes["health"] = Override.DOWN
        if weighed[member.number] != member.weight:
            changes["weight"] = weighed[member.number]
        told.append(replaced(member, changes) if changes else member)
    least = needed_priority(pool, (member for member in told if member.takes_new))
    told = [replaced(member, {"draining": True}) if member.priority < least and member.takes_new else member
            for member in told]
    if len(told) == len(pool.members) and all(map(operator.is_, told, pool.members)):
        return pool
    return replaced(pool, {"members": tuple(told)})


class Effective:
    """The configuration in force, remade pool by pool.

    Args:
        conditions: of a member, as they are when it is asked.
    """

    def __init__(self, conditions: Conditions) -> None:
        self._conditions = conditions
        self._wanted = Configuration()
        self._pools: dict[str, Pool] = {}
        self._own: dict[int, int] = {}
        self.configuration = Configuration()
        self.replacing: Mapping[str, str] = {}
        """By the id of each pool that cannot be used, that of the one used in its place. A new object with each
        change."""

    def configure(self, configuration: Configuration, touched: Iterable[str] | None = None,
                  own: Mapping[int, int] | None = None, drained: frozenset[int] = frozenset()) -> Configuration:
        """Make it anew.

        Args:
            configuration: what operators asked for.
            touched: the pools in which something may have changed, besides those that are other ones now.
            own: the weights that members have instead of their configured ones.
            drained: draining switches whose time is over.
        """
        before = self._wanted
        if own is not None:
            self._own = dict(own)
        changed = {key for key, pool in configuration.pools.items() if before.pools.get(key) is not pool}
        changed.update(touched or ())
        pools = {key: pool for key, pool in self._pools.items() if key in configuration.pools}
        for key in changed:
            pool = configuration.pools.get(key)
            if pool is None:
                continue
            made = pool_in_force(pool, self._own, self._conditions)
            # What was made before is the same, so that nobody looks for a difference.
            pools[key] = kept if (kept := pools.get(key)) is not None and kept == made else made
        same = (configuration is before and drained == self.configuration.drained and len(pools) == len(self._pools)
                and all(self._pools.get(key) is pools[key] for key in changed if key in pools))
        self._wanted = configuration
        if same:
            return self.configuration
        self._pools = pools
        servers = self._servers(configuration, pools)
        self.configuration = Configuration(
            virtual_servers=servers, pools=pools, networks=configuration.networks, switches=configuration.switches,
            drained=drained, redirected={server.number: server for key, server in configuration.virtual_servers.items()
                                         if servers[key] is not server} if self.replacing else {})
        return self.configuration

    def _servers(self, configuration: Configuration, pools: Mapping[str, Pool]) -> Mapping[str, VirtualServer]:
        self.replacing = replacing = _replacing(pools)
        if not replacing:
            return configuration.virtual_servers
        names = {pools[key].name: pools[other].name for key, other in replacing.items()}
        servers: dict[str, VirtualServer] = {}
        for key, server in configuration.virtual_servers.items():
            told = _redirected(server, replacing, names)
            if told is not server:
                # The same as the last time, if it is.
                last = self.configuration.virtual_servers.get(key)
                told = last if last == told else told
            servers[key] = told
        return servers


def _replacing(pools: Mapping[str, Pool]) -> dict[str, str]:
    """Which pool takes the place of which, by id, where members of that one can be used."""
    falling = [(key, pool) for key, pool in pools.items() if pool.fallback_pool is not None]
    if not falling:
        return {}
    by_name = {pool.name: (key, pool) for key, pool in pools.items()}
    found: dict[str, str] = {}
    for key, pool in falling:
        at, seen = pool, 0
        here = key
        while not usable(at) and at.fallback_pool is not None and at.fallback_pool in by_name and seen < MOST_FALLBACKS:
            here, at = by_name[at.fallback_pool]
            seen += 1
        if here != key and usable(at):
            found[key] = here
    return found


def usable(pool: Pool) -> bool:
    """Whether a new connection could be given to any of its members."""
    return pool.admin_state_up and any(member.takes_new for member in pool.members)


def _redirected(server: VirtualServer, replacing: Mapping[str, str], names: Mapping[str, str]) -> VirtualServer:
    changes: dict[str, object] = {}
    if server.default_pool_id is not None and server.default_pool_id in replacing:
        changes["default_pool_id"] = replacing[server.default_pool_id]
    if not names.keys().isdisjoint(server.pool_names):
        changes["l7_policies"] = tuple(
            replaced(policy, {"redirect_pool": names[policy.redirect_pool or ""]})
            if policy.redirect_pool in names else policy for policy in server.l7_policies)
    return replaced(server, changes) if changes else server
