# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""One switch, one network: clients and servers side by side.

    c1 c2 ...            s1 s2 ...
     │  │                 │  │       10.0.0.0/24, fd00::/64
     └──┴─────[lb1]───────┴──┘       virtual: 10.0.0.100, fd00::100

    mn --custom topologies/single.py --topo lb-single,clients=3,servers=3 --controller remote
    lbapp apply -f topologies/single.yaml

With a fast path: ``--topo lb-single,bus_key=/var/lib/lbapp/bus.key``, and ``lbapp run --agent 127.0.0.1:6654``.
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


class SingleTopo(LoadBalancerTopo):
    """See the module. Clients are 10.0.0.1 and on, servers 10.0.0.51 and on."""

    VIP: ClassVar[str] = "10.0.0.100"
    VIP6: ClassVar[str] = "fd00::100"
    SITE: ClassVar[Path] = HERE / "single.yaml"

    def build(self, clients: int = 3, servers: int = 3, bus_key: str = "") -> None:
        """Lay it out with so many clients and servers; with a key, agents put a fast path in front of the switches."""
        switch = self.add_switch(1, bus_key)
        self.add_hosts(switch, "c", clients, "10.0.0", "fd00:", 0)
        self.add_hosts(switch, "s", servers, "10.0.0", "fd00:", 50)


topos = {"lb-single": SingleTopo}
switches = {"lb": LoadBalancerSwitch}
