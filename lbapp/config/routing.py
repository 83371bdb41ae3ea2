# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Who is next on the way to a member: pure look-ups in a configuration.

003's ROUTE_BY_DST_IP: by the member's own address, or by the virtual server's ``next_hop``.
"""

from __future__ import annotations

from collections.abc import Iterable

import netaddr

from lbapp.config.model import Member, Network, VirtualServer


class Routes:
    """The balancer's networks, compiled for look-ups.

    Args:
        networks: the networks in which the balancer has an address.
    """

    def __init__(self, networks: Iterable[Network] = ()) -> None:
        self._networks = tuple(
            (netaddr.IPNetwork(network.cidr), network)
            for network in sorted(networks, key=lambda n: (-netaddr.IPNetwork(n.cidr).prefixlen, n.cidr))
        )

    def network_of(self, address: str) -> Network | None:
        """The network that contains an address; None where no configured one does."""
        if not self._networks:
            return None
        parsed = netaddr.IPAddress(address)
        return next((network for cidr, network in self._networks if parsed in cidr), None)

    def towards(self, address: str) -> str:
        """The address to look for on the wire so as to reach ``address``.

        Without networks, or inside one, that is the address itself; else the gateway of the
        first network of the family that has one.
        """
        if not self._networks or self.network_of(address) is not None:
            return address
        return self.gateway(":" in address) or address

    def gateway(self, six: bool) -> str | None:
        """The router to everywhere that no network contains: the first network's of the family that has one."""
        return next((network.gateway for _, network in self._networks
                     if network.gateway is not None and (":" in network.gateway) == six), None)

    def next_hop(self, virtual_server: VirtualServer, member: Member) -> str:
        """The neighbour that gets a virtual server's packets for a member."""
        if not virtual_server.route_by_destination:
            assert virtual_server.next_hop is not None  # the model says so
            return virtual_server.next_hop
        return self.towards(member.address)

    def routed(self, virtual_server: VirtualServer, member: Member) -> bool:
        """Whether the balancer stands between two networks here, and acts as a router would (TTL, source MAC)."""
        there = self.network_of(self.next_hop(virtual_server, member))
        if there is None:
            return False
        return virtual_server.wildcard_address or self.network_of(virtual_server.vip_address) is not there

    def reaches(self, virtual_server: VirtualServer, member: Member) -> bool:
        """Whether packets can be translated to a member: within one address family, and with ``snat`` only
        from a network in which the balancer has an address to stand in for the client's."""
        if virtual_server.translate_address and (":" in member.address) != (virtual_server.version == 6):
            return False
        return not virtual_server.snat or self.source_address(member) is not None

    def source_address(self, member: Member) -> str | None:
        """The balancer's own address towards a member, for ``snat``; None where it has none."""
        network = self.network_of(self.towards(member.address))
        return network.address if network is not None else None
