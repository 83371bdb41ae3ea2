# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""``make shell``: Mininet's command line in a running laboratory, with a site applied.

    python mininet/shell.py [single|two-networks|two-switches] [--clients N] [--servers N] [RYU_APP ...]
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

# This directory has the name of Mininet's package, but is none; the project's root is one up.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mininet.cli import CLI  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.markup import escape  # noqa: E402

from lbapp.dataflow.ovs import OvsError  # noqa: E402
from topologies.controller import API, RestError  # noqa: E402
from topologies.lab import Lab, unavailable  # noqa: E402
from topologies.namespace import CommandError  # noqa: E402
from topologies.nodes import LoadBalancerTopo  # noqa: E402
from topologies.single import SingleTopo  # noqa: E402
from topologies.two_networks import TwoNetworksTopo  # noqa: E402
from topologies.two_switches import TwoSwitchesTopo  # noqa: E402

TOPOLOGIES: dict[str, type[LoadBalancerTopo]] = {
    "single": SingleTopo, "two-networks": TwoNetworksTopo, "two-switches": TwoSwitchesTopo}
SITE_SERVERS = 3
"""What the sites name as members."""


def _ended(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _hints(lab: Lab, console: Console) -> None:
    console.print(f"""
[bold]{', '.join(lab.bridges)}[/], clients {lab.clients[0].name} to {lab.clients[-1].name}, \
servers {lab.servers[0].name} to {lab.servers[-1].name}; site: {lab.topo.SITE.name}

  c1 curl {lab.topo.VIP}                     a virtual server; :8080 is decided by the controller, :8081 by rules
  c1 curl -g 'http://{escape(f"[{lab.topo.VIP6}]")}/'
  sh lbapp show
  sh curl -H "Authorization: Bearer $(lbapp token)" {API}/v1/virtual-servers
  dpctl dump-flows
  sh tail {lab.controller.log}
  exit

From another terminal: LBAPP_STATE_DIR={lab.controller.state} nsenter --net=/proc/{lab.root.pid}/ns/net COMMAND
""", highlight=False, soft_wrap=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make shell", description="Mininet's command line in a running laboratory")
    parser.add_argument("topology", nargs="?", choices=sorted(TOPOLOGIES), default="single")
    parser.add_argument("--clients", type=int, default=3, help="how many (1-40, default 3)")
    parser.add_argument("--servers", type=int, default=SITE_SERVERS, help="how many (3-40, default 3)")
    parser.add_argument("applications", nargs="*", metavar="RYU_APP", help="Ryu applications beside lbapp")
    arguments = parser.parse_args()
    if not 1 <= arguments.clients <= LoadBalancerTopo.MOST:
        parser.error(f"--clients: expected 1 to {LoadBalancerTopo.MOST}")
    if not SITE_SERVERS <= arguments.servers <= LoadBalancerTopo.MOST:
        parser.error(f"--servers: expected {SITE_SERVERS} to {LoadBalancerTopo.MOST}")
    return arguments


def main() -> int:
    """Bring it up, give the terminal to Mininet, and take all of it down again."""
    arguments = _arguments()
    console = Console(stderr=True, highlight=False)
    reason = unavailable()
    if reason:
        console.print(f"[red]the laboratory cannot run here:[/] {reason}")
        return 1
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _ended)
    topo = TOPOLOGIES[arguments.topology](clients=arguments.clients, servers=arguments.servers)
    try:
        with Lab(topo, applications=arguments.applications) as lab:
            lab.make_file()
            lab.start_servers()
            lab.start_controller()
            lab.apply(topo.SITE)
            # From here on this process is inside, so that "sh" is.
            lab.root.enter()
            os.environ.update(lab.ovs.environment, LBAPP_STATE_DIR=str(lab.controller.state),
                              PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
            _hints(lab, console)
            CLI(lab.net)
    except KeyboardInterrupt:
        return 130
    except (CommandError, RestError, OvsError, TimeoutError, RuntimeError, OSError) as problem:
        console.print(f"[bold red]the laboratory did not come up:[/] {escape(str(problem))}", soft_wrap=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
