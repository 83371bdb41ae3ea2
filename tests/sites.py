# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Configurations for tests: small builders, a set that covers all features, and a hypothesis strategy."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from hypothesis import strategies as st

from lbapp.config.model import Algorithm, Configuration, Decision, Member, Network, Pool, Protocol, State, VirtualServer
from lbapp.control.messages import Host


def members(count: int = 5, six: bool = False, port: int = 8080, weights: Sequence[int] = (), first: int = 1,
            prefix: str = "") -> tuple[Member, ...]:
    """Members 10.0.0.11 (fd00::11) and on, numbered from ``first``."""
    prefix = prefix or ("fd00::" if six else "10.0.0.")
    return tuple(Member(address=f"{prefix}{10 + first + n}", protocol_port=port, number=first + n, id=f"m{first + n}",
                        weight=weights[n % len(weights)] if weights else 1) for n in range(count))


def pool(name: str = "p", algorithm: Algorithm = Algorithm.ROUND_ROBIN, of: Iterable[Member] | None = None,
         **more: Any) -> Pool:
    return Pool(name=name, id=name, lb_algorithm=algorithm, members=tuple(members() if of is None else of), **more)


def server(name: str = "v", number: int = 1, vip: str = "10.0.0.100", port: int = 80, protocol: Protocol = Protocol.TCP,
           use: str | None = "p", **more: Any) -> VirtualServer:
    return VirtualServer(name=name, id=name, number=number, vip_address=vip, protocol_port=port, protocol=protocol,
                         default_pool_id=use, **more)


def network(name: str, cidr: str, address: str, gateway: str | None = None) -> Network:
    return Network(name=name, id=name, cidr=cidr, address=address, gateway=gateway)


def configuration(servers: Iterable[VirtualServer] = (), pools: Iterable[Pool] = (),
                  networks: Iterable[Network] = ()) -> Configuration:
    return Configuration(virtual_servers={s.id: s for s in servers}, pools={p.id: p for p in pools},
                         networks={n.id: n for n in networks})


LAN = (network("lan", "10.0.0.0/24", "10.0.0.254"), network("lan6", "fd00::/64", "fd00::254"))
OUTSIDE = (network("out", "192.168.1.0/24", "192.168.1.254", "192.168.1.1"),
           network("out6", "fd01::/64", "fd01::254", "fd01::1"))


def host(number: int) -> Host:
    return Host(bytes((10, 0, 0, 0)) + number.to_bytes(2, "big"), number)


def covering() -> dict[str, Configuration]:
    """Every feature, at least once, by name."""
    sites: dict[str, Configuration] = {}
    for six, protocol, algorithm in itertools.product((False, True), Protocol, Algorithm):
        weights = (0, 1, 256, 3, 17)
        sites[f"{algorithm.value} {protocol.value} {6 if six else 4}"] = configuration(
            [server(vip="fd00::100" if six else "10.0.0.100", protocol=protocol)],
            [pool(algorithm=algorithm, of=members(six=six, weights=weights))])
    for six in (False, True):
        vip, any_, hop = ("fd00::100", "::", "fd00::1") if six else ("10.0.0.100", "0.0.0.0", "10.0.0.1")
        kinds: dict[str, tuple[dict[str, Any], bool]] = {
            "wildcard port": ({"port": 0}, False), "wildcard address": ({"vip": any_}, False),
            "wildcard both": ({"vip": any_, "port": 0}, False), "no address": ({"translate_address": False}, False),
            "no port": ({"translate_port": False}, False),
            "transparent": ({"vip": any_, "port": 0, "translate_address": False, "translate_port": False}, True),
            "next hop": ({"translate_address": False, "route_by_destination": False, "next_hop": hop}, False),
            "snat": ({"snat": True}, True), "snat switch": ({"snat": True, "decision": Decision.SWITCH}, True),
            "rules": ({"state": State.RULES}, False), "rules any port": ({"state": State.RULES, "port": 0}, True),
            "no arp": ({"arp": False}, False), "maintenance": ({"maintenance": True}, False),
            "limit": ({"connection_limit": 10}, False), "down": ({"admin_state_up": False}, False),
            "no pool": ({"use": None}, False), "switch": ({"decision": Decision.SWITCH}, False),
            "routed": ({"vip": "fd01::100" if six else "192.168.1.100"}, True),
        }
        for name, (more, networks) in kinds.items():
            sites[f"{name} {6 if six else 4}"] = configuration(
                [server(**{"vip": vip, **more})], [pool(of=members(six=six))], (*LAN, *OUTSIDE) if networks else ())
    sites["shared pool, both sides"] = configuration(
        [server(), server("w", 2, "192.168.1.100"), server("r", 3, port=81, state=State.RULES),
         server("s", 4, port=82, snat=True), server("any", 5, "0.0.0.0", 0)], [pool()], (*LAN, *OUTSIDE))
    sites["nothing"] = configuration()
    return sites


def reachable(site: Configuration) -> dict[str, Host]:
    """A host for every next hop a site can need."""
    addresses = {member.address for pool in site.pools.values() for member in pool.members}
    addresses |= {server.next_hop for server in site.virtual_servers.values() if server.next_hop is not None}
    addresses |= {network.gateway for network in site.networks.values() if network.gateway is not None}
    return {address: host(2 + index) for index, address in enumerate(sorted(addresses))}


# ------------------------------------------------------------------ arbitrary ones

_POOLS = ("p", "q")
_ADDRESSES = {4: ("10.0.0.100", "192.168.1.100", "0.0.0.0"), 6: ("fd00::100", "::")}
HOPS = ("10.0.0.11", "10.0.0.12", "10.0.0.13", "10.0.0.1", "fd00::a211", "fd00::a212", "192.168.1.1", "192.168.2.1")


def _valid(**fields: Any) -> VirtualServer | None:
    try:
        return server(**fields)
    except ValueError:
        return None


@st.composite
def configurations(draw: st.DrawFn) -> Configuration:
    """Any small site of which resources share what can be shared."""
    pools = []
    for name in _POOLS:
        # Numbers belong to (pool, member) for ever; addresses are shared between pools.
        first = 1 if name == "p" else 101
        chosen = draw(st.lists(st.sampled_from((0, 1, 2)), unique=True, max_size=3))
        pools.append(pool(name, draw(st.sampled_from(Algorithm)), [
            Member(address=f"10.0.0.{11 + n}", protocol_port=draw(st.sampled_from((80, 8080))), number=first + n,
                   id=f"{name}{n}", weight=draw(st.sampled_from((0, 1, 5))), draining=draw(st.booleans()))
            for n in sorted(chosen)], admin_state_up=draw(st.sampled_from((True, True, False))),
            fallback_pool=draw(st.sampled_from((None, None, *(other for other in _POOLS if other != name))))))
    pools.append(pool("six", draw(st.sampled_from(Algorithm)), members(2, six=True, first=201, prefix="fd00::a")))
    servers: list[VirtualServer] = []
    for number in draw(st.lists(st.integers(1, 5), unique=True, max_size=4)):
        version = draw(st.sampled_from((4, 4, 6)))
        hop = draw(st.sampled_from((None, None, "10.0.0.1")))
        made = _valid(
            name=f"v{number}", number=number, vip=draw(st.sampled_from(_ADDRESSES[version])),
            port=draw(st.sampled_from((0, 80, 81))), protocol=draw(st.sampled_from(Protocol)),
            use=draw(st.sampled_from((None, *_POOLS))) if version == 4 else "six",
            admin_state_up=draw(st.sampled_from((True, True, True, False))), maintenance=draw(st.booleans()),
            translate_address=draw(st.sampled_from((True, True, False))), translate_port=draw(st.booleans()),
            route_by_destination=hop is None, next_hop=hop, arp=draw(st.booleans()), snat=draw(st.booleans()),
            state=draw(st.sampled_from((State.CONNTRACK, State.CONNTRACK, State.RULES))),
            decision=draw(st.sampled_from(Decision)))
        if made is not None and made.key not in {other.key for other in servers}:
            servers.append(made)
    networks = [LAN[0], OUTSIDE[0], network("more", "192.168.2.0/24", "192.168.2.254", "192.168.2.1"), LAN[1]]
    return configuration(servers, pools, draw(st.lists(st.sampled_from(networks), unique=True)))
