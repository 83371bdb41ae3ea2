# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What the fast path is told of each virtual server: who decides, and the table it decides by.

A distribution (004, "configuration table") is a whole new value each time; the fast path replaces
the old one at once. Pure: configuration and neighbours in, values out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from lbapp.config.model import Algorithm, Application, Configuration, Member, Pool, Protocol, State, VirtualServer
from lbapp.config.routing import Routes
from lbapp.control.messages import FlowSignature, Host
from lbapp.control.selection import Candidate, WeightedRoundRobin, maglev_table
from lbapp.control.statistics import Counts
from lbapp.dataflow.fastpath.layout import SLOTS, Hash, Mode
from lbapp.dataflow.matches import packed
from lbapp.dataflow.ovs import CONNTRACK_TIMEOUTS

_ANY = FlowSignature(b"", 0, b"", 0, 0)


class Target(NamedTuple):
    """A member, and where it is. ``weight`` 0: it has established connections at most.

    ``address`` None, ``port`` 0: as the client sent it.
    """

    member: int
    weight: int
    address: bytes | None
    port: int
    host: Host
    routed: bool


class Greeting(NamedTuple):
    """How the clients of a virtual server are shaken hands with (APP_PROXY).

    ``mss`` is what all its members take, as configured. ``window_scale`` and ``sack`` are offered to clients that offer
    them, whatever members do: windows are translated. ``seconds`` is how long clients may take to say enough.
    """

    mss: int = 1460
    window_scale: int = 7
    sack: bool = True
    seconds: float = 10.0


class Limits(NamedTuple):
    """Limits on new connections, as the configuration has them: so many a second, and so many at once (0: a second's
    worth), of the virtual server and of each client network of ``prefix`` bits; -1: there is no limit."""

    rate: int
    burst: int
    client_rate: int
    client_burst: int
    prefix: int


class Distribution(NamedTuple):
    """One virtual server as the fast path sees it. ``idle`` is in seconds; ``greeting`` only with mode PROXY;
    ``limits`` where there are any and the fast path keeps them."""

    number: int
    address: bytes
    port: int
    protocol: int
    mode: Mode
    hash: Hash
    idle: int
    targets: tuple[Target, ...]
    greeting: Greeting | None = None
    limits: Limits | None = None


Eligible = Callable[[VirtualServer, Pool | None], Sequence[Member]]
"""The members that can have new connections; see :meth:`lbapp.control.engine.ControlSegment.eligible`."""


def idle_seconds(protocol: Protocol) -> int:
    """How long an established connection may be silent: what the switch's conntrack gives it."""
    return CONNTRACK_TIMEOUTS["tcp_established" if protocol is Protocol.TCP else "udp_multiple"]


def distribution(virtual_server: VirtualServer, pool: Pool | None, eligible: Sequence[Member], routes: Routes,
                 hosts: Mapping[str, Host], *, queries: bool, pools: Sequence[Pool] = (),
                 limits: bool = False) -> Distribution | None:
    """What the fast path does with a virtual server; None where it leaves all of it to the switch.

    Wildcards, translated sources and rule pairs are the switch's: it finds the most specific virtual server,
    allocates ports, and keeps a rule a connection.

    Args:
        virtual_server: the virtual server.
        pool: its pool.
        eligible: members that take new connections.
        routes: the balancer's networks.
        hosts: where next hops are, seen from this switch.
        queries: whether the agent asks the control segment itself; else by packet-in.
        pools: where what clients say decides, all pools it may decide for.
        limits: whether the fast path keeps limits on new connections; else whoever is asked does.
    """
    if (not virtual_server.admin_state_up or virtual_server.wildcard_address or virtual_server.wildcard_port
            or virtual_server.snat or virtual_server.state is State.RULES):
        return None
    if virtual_server.application is not Application.L4:
        return _proxied(virtual_server, pools, routes, hosts, limits)
    targets = tuple(_targets(virtual_server, pool, eligible, routes, hosts)) if pool is not None else ()
    takers = sum(1 for target in targets if target.weight)
    mode = Mode.PASS
    if not virtual_server.maintenance and takers:
        if virtual_server.switch_decides(pool, limits):
            mode = Mode.DECIDE if takers <= SLOTS else Mode.PASS
        elif queries:
            mode = Mode.PUNT
    how = Hash.TURN
    if pool is not None and pool.lb_algorithm is Algorithm.SOURCE_IP:
        how = Hash.SOURCE
    elif pool is not None and pool.lb_algorithm is Algorithm.CONSISTENT_HASH:
        how = Hash.FLOW
    return Distribution(virtual_server.number, packed(virtual_server.vip_address), virtual_server.protocol_port,
                        virtual_server.protocol.number, mode, how, idle_seconds(virtual_server.protocol), targets,
                        limits=_limits(virtual_server) if limits else None)


def _limits(virtual_server: VirtualServer) -> Limits | None:
    if not virtual_server.limited:
        return None
    prefix = virtual_server.client_prefix_v4 if virtual_server.version == 4 else virtual_server.client_prefix_v6
    return Limits(virtual_server.rate_limit, virtual_server.rate_burst, virtual_server.client_rate_limit,
                  virtual_server.client_rate_burst, prefix)


def _proxied(virtual_server: VirtualServer, pools: Sequence[Pool], routes: Routes, hosts: Mapping[str, Host],
             limits: bool) -> Distribution:
    """Its clients are answered by a cookie whatever state its members are in: how to refuse is a matter of the
    application as well."""
    targets = {target.member: target for pool in pools for target in _targets(virtual_server, pool, (), routes, hosts)}
    mss = min([1460 if virtual_server.version == 4 else 1440, *(pool.mss for pool in pools if pool.mss)])
    greeting = Greeting(mss=mss, seconds=virtual_server.inspect_timeout)
    return Distribution(virtual_server.number, packed(virtual_server.vip_address), virtual_server.protocol_port,
                        virtual_server.protocol.number, Mode.PROXY, Hash.TURN, idle_seconds(virtual_server.protocol),
                        tuple(targets.values()), greeting, _limits(virtual_server) if limits else None)


def _targets(virtual_server: VirtualServer, pool: Pool, eligible: Sequence[Member], routes: Routes,
             hosts: Mapping[str, Host]) -> Iterator[Target]:
    even = pool.lb_algorithm is Algorithm.ROUND_ROBIN
    takers = {member.number for member in eligible}
    for member in pool.members:
        host = hosts.get(routes.next_hop(virtual_server, member)) if routes.reaches(virtual_server, member) else None
        if host is not None:
            weight = 0 if member.number not in takers else 1 if even else member.weight
            yield Target(member.number, weight, packed(member.address) if virtual_server.translate_address else None,
                         member.protocol_port if virtual_server.translate_port else 0,
                         host, routes.routed(virtual_server, member))


def distributions(configuration: Configuration, routes: Routes, hosts: Mapping[str, Host], eligible: Eligible, *,
                  queries: bool, limits: bool = False) -> Iterator[Distribution]:
    """The distributions of all virtual servers of a configuration, for one switch."""
    for virtual_server in configuration.virtual_servers.values():
        pool = configuration.pool_of(virtual_server)
        made = distribution(virtual_server, pool, eligible(virtual_server, pool), routes, hosts, queries=queries,
                            pools=tuple(configuration.pools_of(virtual_server).values()), limits=limits)
        if made is not None:
            yield made


def slots(made: Distribution) -> tuple[int, ...]:
    """The table of a distribution: for each slot the index of a target.

    Hashes get Maglev's table, so that a member that goes leaves nearly all clients where they were. Taking turns
    gets one smooth round: exact in proportion where the weights' sum fits, else rounded down, but to one at least.
    """
    weights = [target.weight for target in made.targets]
    if not any(weights):
        return ()
    if made.hash is not Hash.TURN:
        places = {target.member: index for index, target in enumerate(made.targets)}
        table = maglev_table([(target.member, target.weight) for target in made.targets], SLOTS)
        return tuple(places[member] for member in table)
    takers = [index for index, weight in enumerate(weights) if weight]
    turns = _turns([weights[index] for index in takers])
    selector = WeightedRoundRobin()
    selector.update([Candidate(index, share, Counts()) for index, share in zip(takers, turns, strict=True)])
    return tuple(takers[selector.pick(_ANY, 0)] for _ in range(min(SLOTS, sum(turns))))


def _turns(weights: Sequence[int]) -> list[int]:
    """How many turns of a round of at most ``SLOTS`` each of these weights has."""
    divisor, total = math.gcd(*weights), sum(weights)
    if total // divisor <= SLOTS:
        return [weight // divisor for weight in weights]
    room = SLOTS - sum(weight * SLOTS < total for weight in weights)  # the lightest have one each
    return [max(1, weight * room // total) for weight in weights]
