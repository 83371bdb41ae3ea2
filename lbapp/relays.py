# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Proxied connections on switches whose fast path does not proxy, or is not there: bindings ``relay`` and ``hybrid``.

A link (:class:`lbapp.fastpaths.Link`) to an agent whose fast path is :mod:`lbapp.dataflow.relay`. Owns that agent and
the packet-outs it makes; decides nothing.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from lbapp.control.messages import AppReply, Failed, FlowSignature, Host, NewFlow, Query, Reap, Reply, Translation
from lbapp.dataflow import frames
from lbapp.dataflow.agent import Agent
from lbapp.dataflow.carrier import Answered, Held, PacketIn
from lbapp.dataflow.distribution import Distribution
from lbapp.dataflow.fastpath import layout
from lbapp.dataflow.openflow import CONTROLLER, Conntrack, Nat, Output, encode_actions, packet_out
from lbapp.dataflow.pipeline import Table, owner_of, zones
from lbapp.dataflow.relay import Relay, Relayed
from lbapp.dataflow.splicing import divided
from lbapp.fastpaths import FastPaths, MemberTraffic, Reading

LOG = logging.getLogger("lbapp.relay")

BATCH = 1024
MOST_ROUNDS = 8
"""A packet may lead to a question, its answer to a packet, and so on: so often at once, the rest at the next tick."""
SWEEP_SECONDS = 1.0


class RelayLink:
    """The relayed connections of one switch.

    Args:
        switch: its datapath id.
        relays: who is asked and told.
        send: takes OpenFlow messages for the switch that answer no packet-in.
        hand_over: gives a fast path a connection; false where it does not take it.
        hybrid: whether connections of a virtual server are to be handed over.
    """

    proxies = True
    limits = False
    lossy = False

    def __init__(self, switch: int, relays: FastPaths, send: Callable[[bytes], object],
                 hand_over: Callable[[NewFlow], bool], hybrid: Callable[[int], bool]) -> None:
        self.switch = switch
        self.relay = Relay(time.monotonic)
        self.agent = Agent(self.relay, switch, itertools.count(secrets.randbits(31) * 2 + 1, 2))
        self._relays = relays
        self._send = send
        self._hand_over = hand_over
        self._hybrid = hybrid
        self._swept = 0.0
        self._on = encode_actions((Conntrack(zones(switch).service, table=Table.RETURN, nat=Nat()),))

    # -------------------------------------------------------------- packets

    def packet_in(self, punted: PacketIn) -> tuple[int, bytes]:
        """A packet of a rule of kind RELAY.

        Returns:
            The virtual server, 0 if it belongs to none; and the messages that it leads to.
        """
        number = self.relay.packet(punted.in_port, punted.frame)
        if number is None:
            if owner_of(punted.cookie):
                return 0, b""  # to a virtual server that this relay was not told of yet, or any more
            return 0, self._let_go(punted)
        self._work()
        return number, self._out()

    def _let_go(self, punted: PacketIn) -> bytes:
        """A member's packet that belongs to no relayed connection goes on as it would have without this."""
        try:
            frame, packet = frames.whole(punted.frame)
        except frames.MalformedError:
            return packet_out(punted.in_port, self._on, punted.frame)
        return b"".join([packet_out(punted.in_port, self._on, part) for part in divided(frame, packet)])

    def _work(self) -> None:
        for _ in range(MOST_ROUNDS):
            queries = self.agent.queries(time.monotonic())
            if not queries:
                break
            self._relays.asked(self.switch, queries)
        for serial in self.relay.there():
            number = self.relay.virtual_server(serial)
            if number is not None and self._hybrid(number) and self.relay.part(serial):
                self._offer(serial)

        for relayed in self.relay.finishing():
            self._hand_over(_new_flow(self.switch, relayed))

    def _offer(self, serial: int) -> bool:
        """Have a fast path take a connection over."""
        relayed = self.relay.hand_over(serial)
        if relayed is None:
            return False
        if self._hand_over(_new_flow(self.switch, relayed)):
            return True
        self.relay.take_back(serial)
        return False

    def offer_all(self) -> int:
        """Have a fast path that has come take over what it can; returns how many connections that were."""
        return sum(self._offer(serial) for serial in self.relay.serials())

    def _out(self) -> bytes:
        going, self.relay.out = self.relay.out, []
        return b"".join([packet_out(CONTROLLER, encode_actions((Output(port),)), frame)
                         for port, frame in going])

    def tick(self, now: float) -> None:
        """What is to be done because time has passed; to be called ten times a second."""
        asking = self.agent.tick(now)
        if asking:
            self._relays.asked(self.switch, asking)
        self._work()
        if now - self._swept >= SWEEP_SECONDS:
            self._swept = now
            self.agent.sweep()
        self._ended()
        out = self._out()
        if out:
            self._send(out)

    def _ended(self) -> None:
        while True:
            closed, alive = self.agent.ended(BATCH)
            if closed:
                self._relays.closed(self.switch, closed)
            if alive:
                self._relays.heard(alive)
            if len(closed) + len(alive) < BATCH:
                break
        errors = self.relay.errors()
        if errors:
            self._relays.heard([Failed(self.switch, *one) for one in errors])

    # -------------------------------------------------------------- the link

    def configure(self, changed: Mapping[int, Distribution | None], *, whole: bool = False) -> None:
        """See :class:`lbapp.fastpaths.Link`."""
        self.agent.configure(changed, whole=whole)

    def greet(self, keys: tuple[bytes | None, bytes | None], current: int) -> None:
        """See :class:`lbapp.fastpaths.Link`."""
        self.relay.set_cookies(keys, current)

    def reply(self, replies: Sequence[Reply | AppReply]) -> None:
        """See :class:`lbapp.fastpaths.Link`."""
        self._relays.heard(self.agent.reply(replies, time.monotonic()))

    def deliver(self, answered: Sequence[Answered]) -> Sequence[Answered]:
        """See :class:`lbapp.fastpaths.Link`."""
        return answered

    def take_over(self, flow: NewFlow) -> bool:
        """See :class:`lbapp.fastpaths.Link`."""
        return False

    def reap(self, reaps: Sequence[Reap]) -> None:
        """See :class:`lbapp.fastpaths.Link`."""
        self._relays.heard(self.agent.reap(reaps))

    def holds(self, serial: int) -> bool:
        """Whether a connection is relayed, and nobody else has it."""
        return self.relay.holds(serial)

    def live(self) -> Sequence[tuple[int, int, int]]:
        """See :class:`lbapp.fastpaths.Link`."""
        return self.relay.tracked()

    def read(self) -> Reading:
        """See :class:`lbapp.fastpaths.Link`."""
        return Reading(len(self.relay), self.agent.told(),
                       {key: MemberTraffic(*traffic) for key, traffic in self.relay.service_stats().items()})

    def connections(self, limit: int) -> Iterator[Held]:
        """See :class:`lbapp.fastpaths.Link`."""
        return self.agent.connections(limit, layout.ticks(1000 * time.monotonic()))

    def close(self) -> None:
        """See :class:`lbapp.fastpaths.Link`. Its connections end with the controller."""


def _new_flow(switch: int, relayed: Relayed) -> NewFlow:
    """A relayed connection as NEWFLOW with offsets (003, ADD_TCP_OFFSETS)."""
    key, flow, back = relayed.key, relayed.flow, relayed.back
    query = Query(flow.serial, switch, back.ifindex, back.destination_mac,
                  FlowSignature(key.source, key.source_port, key.destination, key.destination_port, key.protocol),
                  flow.virtual_server, 0)
    translation = Translation(flow.destination, flow.destination_port, Host(flow.destination_mac, flow.ifindex),
                              bool(flow.state & layout.ROUTED))
    tracked, splice = bool(flow.state & layout.TRACKED), relayed.splice
    made = NewFlow(query, flow.member, translation, tracked, client_finished=bool(relayed.finished & 1),
                   member_finished=bool(relayed.finished & 2))
    if splice is None:
        return made
    return made._replace(seq_offset=0, ack_offset=splice.offset, window_shift=splice.shift)
