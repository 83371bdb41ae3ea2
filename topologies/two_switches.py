# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Two switches, one network: clients on the first, servers on the second.

    c1 c2 ...                     s1 s2 ...
     │  │                          │  │       10.0.0.0/24, fd00::/64
     └──┴────[lb1]─────[lb2]───────┴──┘       virtual: 10.0.0.100, fd00::100

    mn --custom topologies/two_switches.py --topo lb-two-switches --controller remote
    lbapp apply -f topologies/two_switches.yaml
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


class TwoSwitchesTopo(LoadBalancerTopo):
    """See the module. Clients are 10.0.0.1 and on, servers 10.0.0.51 and on."""

    VIP: ClassVar[str] = "10.0.0.100"
    VIP6: ClassVar[str] = "fd00::100"
    SITE: ClassVar[Path] = HERE / "two_switches.yaml"

    def build(self, clients: int = 3, servers: int = 3, bus_key: str = "") -> None:
        """Lay it out with so many clients and servers; with a key, agents put a fast path in front of the switches."""
        near, far = self.add_switch(1, bus_key), self.add_switch(2, bus_key)
        self.add_hosts(near, "c", clients, "10.0.0", "fd00:", 0)
        self.add_hosts(far, "s", servers, "10.0.0", "fd00:", 50)
        self.addLink(near, far)


topos = {"lb-two-switches": TwoSwitchesTopo}
switches = {"lb": LoadBalancerSwitch}
