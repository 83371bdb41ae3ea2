# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What only the switches know, read when somebody asks or when the control segment needs it.

With ``state: conntrack`` a connection lives in the switch alone. Its rules' counters come over
OpenFlow; its conntrack entries through Open vSwitch's control socket, and only where the switch
runs on this host. Owns the short-lived copies of both; decides nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

from ryu.lib import hub

from lbapp.control.limits import DEFAULTS
from lbapp.dataflow import conntrack
from lbapp.dataflow.ovs import Ovs, OvsError
from lbapp.dataflow.pipeline import zones

LOG = logging.getLogger("lbapp.readings")

FRESH_SECONDS = 1.0
ANSWER_SECONDS = 3.0
CLOSING = frozenset({"CLOSING", "TIME_WAIT", "CLOSED", "LAST_ACK", "FIN_WAIT_2"})
"""States of connections that have been reported closed, or are about to be."""
BREATH = 500
"""Lines of a dump that are read before other greenlets get their turn."""


class Readings:
    """Readings of the connected switches.

    Args:
        application: the Ryu application (``switches``, ``control``, ``live``).
    """

    def __init__(self, application: Any) -> None:
        self._application = application
        self._ovs = Ovs()
        self._local: dict[int, bool] = {}
        self._counted = 0.0
        self._drops: int | None = None

    def watch(self) -> None:
        """Tell the control segment what lives, for as long as the controller does."""
        while True:
            hub.sleep(DEFAULTS.live_interval)
            for switch in list(self._application.switches):
                try:
                    if self._application.control.counting and self.is_local(switch):
                        # Of what the fast path has, conntrack knows nothing, and an agent elsewhere is asked itself.
                        application = self._application
                        tracked = [(entry.serial, entry.virtual_server, entry.member)
                                   for entry in self.conntrack(switch) if entry.tracked and entry.state not in CLOSING]
                        # Others had their turn until here: what has ended meanwhile must not be among these.
                        fast, relayed = application.fastpaths.live(switch), application.relays.live(switch)
                        application.live(switch, (*(fast or ()), *(relayed or ()), *tracked), fast is not None)
                except OvsError as error:
                    LOG.warning("switch %016x: conntrack cannot be read: %s", switch, error)
                except Exception:
                    LOG.exception("switch %016x: conntrack reading failed", switch)

    def is_local(self, switch: int) -> bool:
        """Whether a switch is a bridge of this host's Open vSwitch; looked up once a connection."""
        known = self._local.get(switch)
        if known is None:
            try:
                known = self._ovs.bridge_of(switch) is not None
            except OvsError:
                return False  # to be asked again
            self._local[switch] = known
        return known

    def prepare(self, switch: int) -> None:
        """Give a local switch's conntrack zones their timeouts.

        A client that uses its port again within conntrack's default timeouts would meet its old entry.
        """
        self._local.pop(switch, None)
        if not self.is_local(switch):
            LOG.info("switch %016x is not on this host: set its conntrack timeouts there (docs/architecture.md)",
                     switch)
            return
        try:
            if self._drops is None:
                self._drops = self._ovs.controller_queue_drops()
            self._ovs.set_conntrack_timeouts(zones(switch))
        except OvsError as error:
            LOG.warning("switch %016x: conntrack timeouts not set: %s", switch, error)

    def conntrack(self, switch: int) -> Iterator[conntrack.Entry]:
        """The connections in a local switch's conntrack.

        Raises:
            OvsError: Open vSwitch does not answer.
        """
        zone = zones(switch).service
        lines = self._ovs.appctl("dpctl/dump-conntrack", f"zone={zone}").splitlines()
        for start in range(0, len(lines), BREATH):
            yield from conntrack.parse(lines[start:start + BREATH], zone)
            hub.sleep(0)

    def count(self) -> None:
        """Bring every switch's rule counters up to date (at most once a second)."""
        if time.monotonic() - self._counted < FRESH_SECONDS:
            return
        sessions = [switch.session for switch in self._application.switches.values() if switch.session.ready]
        if not sessions:
            return
        for session in sessions:
            session.read_counters()
        until = time.monotonic() + ANSWER_SECONDS
        while any(session.counting for session in sessions) and time.monotonic() < until:
            hub.sleep(0.005)
        self._counted = time.monotonic()

    def queue_drops(self, switch: int) -> int:
        """Packets that found the queue to the controller full since a switch of this host connected for the first time.

        (A controller that stands still loses its switches, and is to tell of what was lost.) Open vSwitch counts them
        for all bridges of this host together; 0 for a switch elsewhere.
        """
        if not self.is_local(switch):
            return 0
        try:
            total = self._ovs.controller_queue_drops()
        except OvsError:
            return 0
        if self._drops is None:
            self._drops = total
        elif total < self._drops:
            self._drops = 0  # Open vSwitch was started anew, and counts from there
        return total - self._drops
