# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""External and internal network, and the balancer as the gateway of both (003, FIGURE 2).

    c1 c2 ...                                   s1 s2 ...
     │  │   192.0.2.0/24       10.0.1.0/24       │  │
     └──┴── 2001:db8:1::/64 [lb1] fd00:1::/64 ───┴──┘
             .1, virtual: .100     .1

The two networks are VLANs 10 and 20 on the switch, so that its ordinary switching keeps them
apart; only what the balancer routes goes from one to the other.

    mn --custom topologies/two_networks.py --topo lb-two-networks --controller remote
    lbapp apply -f topologies/two_networks.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

# mn reads this file with exec() and sets no __file__; the code object knows where it came from.
HERE = Path(sys._getframe().f_code.co_filename).resolve().parent
if str(HERE.parent) not in sys.path:
    sys.path.append(str(HERE.parent))

from topologies.nodes import LoadBalancerSwitch, LoadBalancerTopo  # noqa: E402

EXTERNAL_TAG = 10
INTERNAL_TAG = 20


class TwoNetworksTopo(LoadBalancerTopo):
    """See the module. Clients are 192.0.2.11 and on, servers 10.0.1.11 and on."""

    VIP: ClassVar[str] = "192.0.2.100"
    VIP6: ClassVar[str] = "2001:db8:1::100"
    SITE: ClassVar[Path] = HERE / "two_networks.yaml"

    def build(self, clients: int = 3, servers: int = 3, bus_key: str = "") -> None:
        """Lay it out with so many clients and servers; with a key, agents put a fast path in front of the switches."""
        switch = self.add_switch(1, bus_key)
        self.add_hosts(switch, "c", clients, "192.0.2", "2001:db8:1:", 10, gateway=1, tag=EXTERNAL_TAG)
        self.add_hosts(switch, "s", servers, "10.0.1", "fd00:1:", 10, gateway=1, tag=INTERNAL_TAG)


topos = {"lb-two-networks": TwoNetworksTopo}
switches = {"lb": LoadBalancerSwitch}
