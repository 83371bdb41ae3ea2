# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The Ryu application: OpenFlow in, OpenFlow out. It decides nothing.

A packet-in takes this way: ``receive`` → ``carrier.decode_packet_in`` → ``ControlSegment.query``
→ ``ReplyEncoder.encode`` → the socket. Everything slower (configuration, neighbours, reading a
switch) is queued for the switch's own worker, one job at a time.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

from ryu.app.wsgi import WSGIApplication
from ryu.base import app_manager
from ryu.controller import ofp_event
from ryu.controller.handler import DEAD_DISPATCHER, MAIN_DISPATCHER, set_ev_cls
from ryu.lib import hub
from ryu.ofproto import ofproto_v1_3

from lbapp.config.model import Application, Binding, Configuration, VirtualServer
from lbapp.config.routing import Routes
from lbapp.control.engine import ControlSegment
from lbapp.control.master import Master
from lbapp.control.messages import (
    AppReply,
    Closed,
    Delete,
    Error,
    FlowSignature,
    FromSwitch,
    Host,
    HostChanged,
    Live,
    NeighbourSeen,
    NewFlow,
    PortDown,
    Probe,
    Reap,
    Reason,
    Refused,
    Reply,
    Stats,
    SwitchDown,
    SwitchUp,
    ToSwitch,
)
from lbapp.control.switch_draining import OnSwitches
from lbapp.dataflow import carrier, frames, ryu_shim
from lbapp.dataflow.matches import address_text
from lbapp.dataflow.openflow import delete_by_cookie
from lbapp.dataflow.pipeline import ANY_CONNECTION, COOKIE_MAGIC, EVERY_CONNECTION, Kind, connection_cookie
from lbapp.dataflow.session import SwitchSession
from lbapp.fastpaths import FastPaths
from lbapp.handoffs import Handoffs
from lbapp.jobs import Jobs
from lbapp.relays import RelayLink
from lbapp.reports import Reports

LOG = logging.getLogger("lbapp")

TICK = 0.1
BATCH_SIZE = 256
"""Closed connections reach the control segment together: at each tick, or this many."""
HELD_HOSTS, HELD_PACKETS, HELD_SECONDS = 64, 4, 3.0
"""Packets that wait for their host's address to be found (routing): for how many hosts of a switch (the oldest
makes room), how many of each, and for how long they are of use."""
RECENT_RULES = 4096
"""Connections whose rules may still turn out not to fit in the switch's table."""
LINED_PACKETS = 16_384
"""Packets that are held for connections that stand in line, of each switch; the oldest makes room."""
WORK_QUEUE = 100_000
LAST_REPAIR_SECONDS = 60.0
"""A switch that keeps refusing a rule is read again after 1, 2, 4, ... seconds, at most this."""

FLOW_MOD_FAILED, TABLE_FULL = 5, 1


class Hosts(Mapping[str, Host]):
    """The neighbours that the control segment knows on one switch, as they are at each look."""

    def __init__(self, control: ControlSegment, switch: int) -> None:
        self._control, self._switch = control, switch

    def __getitem__(self, address: str) -> Host:
        return self._control.hosts(self._switch)[address]

    def __iter__(self) -> Iterator[str]:
        return iter(self._control.hosts(self._switch))

    def __len__(self) -> int:
        return len(self._control.hosts(self._switch))


class Switch:
    """A connected switch: its connection, its session, and what waits for either."""

    def __init__(self, datapath: Any, control: ControlSegment, configuration: Configuration,
                 relayed: Callable[[int, VirtualServer], bool] = lambda *_: False) -> None:
        self.datapath = datapath
        self.id: int = datapath.id
        self.connected = time.monotonic()
        self.session = SwitchSession(self.id, Hosts(control, self.id), datapath.send,
                                     lambda server: relayed(self.id, server))
        self.encoder = carrier.ReplyEncoder(self.id, configuration, Routes(configuration.networks.values()))
        self.work = Jobs(WORK_QUEUE)
        self.worker: Any = None
        self.reconciling = False
        self.counters: Counter[str] = Counter()
        self.punts: Counter[int] = Counter()
        self.closed: list[Closed] = []
        self.held: OrderedDict[str, deque[tuple[float, bytes]]] = OrderedDict()
        self.recent: OrderedDict[int, tuple[carrier.PacketIn, frames.Packet]] = OrderedDict()
        self.lined: OrderedDict[FlowSignature, tuple[carrier.PacketIn, bytes, frames.Packet]] = OrderedDict()


class LoadBalancer(app_manager.RyuApp):
    """lbapp beside, or without, other Ryu applications."""

    OFP_VERSIONS: ClassVar = [ofproto_v1_3.OFP_VERSION]
    _CONTEXTS: ClassVar = {"wsgi": WSGIApplication}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.name = "lbapp"
        self.wsgi = kwargs["wsgi"]
        self.control = ControlSegment()
        self.configuration = Configuration()
        self._by_number: dict[int, VirtualServer] = {}
        self._on_switches = OnSwitches()
        self.fastpaths = FastPaths(self.control, self.perform, self.relayed, on_switches=self._on_switches)
        self.fastpaths.changed = self._fastpath_changed
        self.relays = FastPaths(self.control, self.perform, self.relayed, relaying=True,
                                cookies=self.fastpaths.cookies, on_switches=self._on_switches)
        self.handoffs = Handoffs()
        self.master = Master()
        self.reports = Reports(self.master)
        self._configured = hub.Event()
        self.switches: dict[int, Switch] = {}
        self.reconnects: Counter[int] = Counter()
        self.repairs: Counter[int] = Counter()
        self._ticker: Any = None
        self.on_connect: Callable[[int], None] = lambda _: None
        self.on_ready: Callable[[int], None] = lambda _: None
        self.on_change: Callable[[str], None] = lambda _: None
        """Told in a line when a switch comes or goes."""
        # A restarted controller must not give a living connection's serial away again. Agents' serials are odd.
        self._serials = itertools.count(secrets.randbits(31) * 2, 2)
        self._punts: dict[int, Callable[[Switch, carrier.PacketIn], bytes]] = {
            Kind.QUERY: self._query, Kind.DENIED: self._query, Kind.FULL: self._no_room, Kind.GONE: self._no_room,
            Kind.CLOSE: self._close, Kind.NEIGHBOUR: self._neighbour, Kind.LOOKUP: self._lookup,
            Kind.RELAY: self._relay,
        }
        ryu_shim.install(self)

    def start(self) -> None:
        """Called by Ryu once all applications are there."""
        super().start()
        self._ticker = hub.spawn(self._ticks)

    def stop(self) -> None:
        """Called by Ryu at the end: end the greenlets that would go on for ever."""
        hub.kill(self._ticker)
        for switch in self.switches.values():
            hub.kill(switch.worker)
        super().stop()

    # -------------------------------------------------------------- configuration

    def configure(self, configuration: Configuration) -> None:
        """Take over a new configuration; called whenever the store changed, in order."""
        self.configuration = configuration
        self._by_number = {server.number: server for server in configuration.virtual_servers.values()}
        self._configured.set()
        commands = self.control.configure(configuration, time.monotonic())
        self.fastpaths.configure(configuration)
        self.relays.configure(configuration)
        routes = Routes(configuration.networks.values())
        for switch in self.switches.values():
            switch.encoder = carrier.ReplyEncoder(switch.id, configuration, routes)
            self._queue(switch, ("configure", self.in_force(switch.id)))
        self.perform(commands)

    def in_force(self, switch: int) -> Configuration:
        """The configuration that a switch is to have: another one while it is draining."""
        return self._on_switches.of(self.configuration, switch)

    # -------------------------------------------------------------- the short path

    def receive(self, datapath: Any, kind: int, data: bytes) -> bytes | None:
        """See :class:`lbapp.dataflow.ryu_shim.Receiver`."""
        switch = self.switches.get(datapath.id)
        if switch is None or switch.datapath is not datapath:
            return None
        if kind == ryu_shim.PACKET_IN:
            if len(data) < 32 or data[16] != COOKIE_MAGIC:
                return None
            switch.counters["packet_ins"] += 1
            punted = carrier.decode_packet_in(data)
            handler = self._punts.get(data[17])
            return handler(switch, punted) if handler is not None else b""
        if kind == ryu_shim.FLOW_REMOVED:
            return self._flow_removed(switch, data)
        if kind == ryu_shim.MULTIPART_REPLY:
            return self._multipart(switch, data)
        if kind == ryu_shim.EXPERIMENTER:
            return b"" if switch.session.on_bundle_reply(data) else None
        return self._error(switch, data)

    def _query(self, switch: Switch, punted: carrier.PacketIn) -> bytes:
        if not switch.session.ready:
            switch.counters["queries_before_ready"] += 1
            return b""
        try:
            packet = frames.parse(punted.frame)
            frame = frames.with_checksum(punted.frame, packet)
        except frames.MalformedError:
            switch.counters["malformed"] += 1
            return b""
        query = carrier.query(punted, packet, switch.id, next(self._serials) & 0xFFFFFFFF)
        if frames.odd(packet) and self.fastpaths.serves(switch.id, query.virtual_server):
            return b""  # of a connection that the fast path may have: a refusal would end it
        if query.virtual_server:
            switch.punts[query.virtual_server] += 1
        reply = self.control.query(query, time.monotonic())
        if reply is None:
            switch.lined[packet.signature] = punted, frame, packet
            if len(switch.lined) > LINED_PACKETS:
                switch.lined.popitem(last=False)
            return b""
        return self._answer(switch, reply, punted, frame, packet)

    def _answer(self, switch: Switch, reply: Reply, punted: carrier.PacketIn, frame: bytes,
                packet: frames.Packet) -> bytes:
        if self.fastpaths.takes(switch.id, reply, frame, packet):
            return b""
        answer = switch.encoder.encode(reply, frame, packet)
        if answer is None:
            return b""
        switch.counters["packet_outs"] += 1
        rules = switch.encoder.is_rules(reply.query.virtual_server)
        if switch.work and not (rules or reply.error or switch.session.program.leads_to(
                *switch.encoder.ends(reply), switch.work.moving)):
            if not switch.work.hold(answer):  # behind the rules that it needs
                switch.counters["queries_before_ready"] += 1
            return b""
        if reply.install and rules and not reply.error:
            switch.counters["flow_mods"] += 2
            switch.recent[reply.query.serial] = punted, packet
            if len(switch.recent) > RECENT_RULES:
                switch.recent.popitem(last=False)
        return answer

    def flush(self, datapath: Any) -> bytes:
        """See :class:`lbapp.dataflow.ryu_shim.Receiver`: fast paths get their flows many at a time."""
        left = self.fastpaths.flush(datapath.id)
        if not left:
            return b""
        switch = self.switches[datapath.id]
        switch.counters["packet_outs"] += len(left)
        return b"".join([switch.encoder.encode(*one) or b"" for one in left])

    def _late(self, switch: Switch, reply: Reply | AppReply) -> None:
        """One that stood in line is answered."""
        server = self._by_number.get(reply.query.virtual_server)
        if reply.query.serial & 1 or isinstance(reply, AppReply):
            relayed = isinstance(reply, AppReply) and server is not None and self.relayed(switch.id, server)
            (self.relays if relayed else self.fastpaths).late(reply)
            return
        held = switch.lined.pop(reply.query.signature, None)
        if held is not None:  # else its client repeats what had to make room
            switch.datapath.send(self._answer(switch, reply, *held) + self.flush(switch.datapath))

    def _no_room(self, switch: Switch, punted: carrier.PacketIn) -> bytes:
        """Conntrack took no more, or a connection's member is gone: refuse at once."""
        mark = carrier.connection_mark(punted)
        full = punted.cookie >> 48 & 0xFF == Kind.FULL
        switch.counters["conntrack_full" if full else "member_gone"] += 1
        if full:
            self.perform(self.control.handle(Refused(switch.id, mark.serial, mark.virtual_server), time.monotonic()))
        try:
            packet = frames.parse(punted.frame)
        except frames.MalformedError:
            return b""
        answer = carrier.refuse(punted, packet) or b""
        switch.counters["packet_outs"] += bool(answer)
        return answer if full else carrier.forget(punted, packet, switch.id) + answer

    def _relay(self, switch: Switch, punted: carrier.PacketIn) -> bytes:
        link = self.relays.link(switch.id)
        if not isinstance(link, RelayLink) or not switch.session.ready:
            switch.counters["queries_before_ready"] += 1
            return b""
        number, out = link.packet_in(punted)
        if number:
            switch.punts[number] += 1
        switch.counters["packet_outs"] += bool(out)
        return out

    def _close(self, switch: Switch, punted: carrier.PacketIn) -> bytes:
        mark = carrier.connection_mark(punted)
        switch.punts[mark.virtual_server] += 1
        self._closed(switch, carrier.closed_by_shutdown(mark))
        return b""

    def _closed(self, switch: Switch, closed: Closed) -> None:
        switch.closed.append(closed)
        if len(switch.closed) >= BATCH_SIZE:
            self._flush(switch)

    def _flush(self, switch: Switch) -> None:
        if switch.closed:
            batch, switch.closed = tuple(switch.closed), []
            switch.counters["delete_batches"] += 1
            self.perform(self.control.handle(Delete(switch.id, batch), time.monotonic()))

    def _flow_removed(self, switch: Switch, data: bytes) -> bytes | None:
        removed = carrier.decode_flow_removed(data)
        if removed is None:
            return None
        switch.counters["flow_removeds"] += 1
        switch.punts[self.control.virtual_server_of(switch.id, removed.serial)] += 1
        self._closed(switch, Closed(removed.serial, 0, 0, removed.reason, removed.outbound, True, removed.packets,
                                    removed.bytes, removed.duration))
        return b""

    # -------------------------------------------------------------- neighbours and routing

    def _neighbour(self, switch: Switch, punted: carrier.PacketIn) -> bytes:
        seen = frames.neighbour(punted.frame, punted.in_port)
        if seen is not None and switch.session.ready:
            address, host = seen
            self.perform(self.control.handle(NeighbourSeen(switch.id, address_text(address), host),
                                              time.monotonic()))
        return b""

    def _lookup(self, switch: Switch, punted: carrier.PacketIn) -> bytes:
        """A packet for a host of our networks that was not looked up yet: hold it, and ask."""
        address = frames.destination(punted.frame)
        if address is None or not switch.session.ready:
            return b""
        text = address_text(address)
        host = self.control.host(switch.id, text)
        if host is not None:
            return carrier.forward_to(host, punted.frame)
        now = time.monotonic()
        if text not in switch.held and len(switch.held) >= HELD_HOSTS:
            switch.counters["lookups_dropped"] += len(switch.held.popitem(last=False)[1])
        switch.held.setdefault(text, deque(maxlen=HELD_PACKETS)).append((now, punted.frame))
        self.perform(self.control.want(switch.id, text, now))
        return b""

    def _release(self, switch: Switch, change: HostChanged) -> None:
        for held, frame in switch.held.pop(change.address, ()):
            if change.host is not None and time.monotonic() - held < HELD_SECONDS:
                switch.datapath.send(carrier.forward_to(change.host, frame))

    # -------------------------------------------------------------- switches

    @set_ev_cls(ofp_event.EventOFPStateChange, [MAIN_DISPATCHER, DEAD_DISPATCHER])
    def _state_changed(self, event: Any) -> None:
        datapath = event.datapath
        if event.state == MAIN_DISPATCHER:
            old = self.switches.get(datapath.id)
            if old is not None:
                self._forget(old)
            self.reconnects[datapath.id] += datapath.id in self.reconnects
            switch = self.switches[datapath.id] = Switch(datapath, self.control, self.configuration, self.relayed)
            LOG.info("switch %016x connected from %s", switch.id, datapath.address[0])
            self.on_change(f"switch {switch.id:016x} connected")
            switch.worker = hub.spawn(self._work, switch)
            switch.session.read()
        elif datapath.id is not None:
            gone = self.switches.get(datapath.id)
            if gone is not None and gone.datapath is datapath:
                LOG.info("switch %016x disconnected; it goes on forwarding", gone.id)
                self.on_change(f"switch {gone.id:016x} disconnected; it goes on forwarding")
                del self.switches[datapath.id]
                self._forget(gone)

    def _forget(self, switch: Switch) -> None:
        self._flush(switch)
        hub.kill(switch.worker)
        self.perform(self.control.handle(SwitchDown(switch.id), time.monotonic()))

    @set_ev_cls(ofp_event.EventOFPPortStatus, MAIN_DISPATCHER)
    def _port_status(self, event: Any) -> None:
        message = event.msg
        down = message.reason == ofproto_v1_3.OFPPR_DELETE or message.desc.state & ofproto_v1_3.OFPPS_LINK_DOWN
        if down and message.datapath.id in self.switches:
            self.perform(self.control.handle(PortDown(message.datapath.id, message.desc.port_no), time.monotonic()))

    def _multipart(self, switch: Switch, data: bytes) -> bytes | None:
        if not switch.session.on_multipart(data):
            return None
        if switch.session.was_read and not switch.session.ready and not switch.reconciling:
            switch.reconciling = True
            self._queue(switch, ("reconcile", None))
        for answer in switch.session.answers():
            # REAP of a live flow is answered CONNALIVE (003, FIGURE 19); of a dead one with what deletes it.
            message: FromSwitch = Stats(switch.id, answer.serial, Error.CONNALIVE, answer.packets, answer.octets)
            if not answer.rules:
                message = Delete(switch.id, tuple(Closed(answer.serial, 0, 0, Reason.DELETED, outbound)
                                                  for outbound in (False, True)))
            self.perform(self.control.handle(message, time.monotonic()))
        return b""

    def _error(self, switch: Switch, data: bytes) -> bytes | None:
        if switch.session.on_error(data):
            if not switch.session.needs_repair:
                return b""
            LOG.error("switch %016x refused a change of rules (error type %d code %d); it will be read again",
                      switch.id, data[8] << 8 | data[9], data[10] << 8 | data[11])
            self._queue(switch, ("repair", None))
            return b""
        cookie = int.from_bytes(data[20:28], "big") if len(data) >= 28 and data[13] == 14 else 0
        serial = cookie & 0xFFFFFFFF
        if cookie >> 48 not in (COOKIE_MAGIC << 8 | Kind.CONNECTION_IN, COOKIE_MAGIC << 8 | Kind.CONNECTION_OUT):
            return None
        known = switch.recent.pop(serial, None)
        if known is None:
            return b""  # its other direction was refused before
        full = data[8:12] == bytes((0, FLOW_MOD_FAILED, 0, TABLE_FULL))
        switch.counters["table_full" if full else "flow_mods_failed"] += 1
        self.perform(self.control.handle(Refused(switch.id, serial, carrier.owner_of(known[0].cookie)),
                                          time.monotonic()))
        return delete_by_cookie(connection_cookie(Kind.CONNECTION_IN, serial), ANY_CONNECTION) + (
            carrier.refuse(*known) or b"")

    def _queue(self, switch: Switch, job: tuple[str, Any]) -> None:
        if not switch.work.put(*job):
            LOG.error("switch %016x: too much work queued; it is disconnected to be read again", switch.id)
            switch.datapath.close()

    def _work(self, switch: Switch) -> None:
        """A switch's jobs, one at a time, so that no change overtakes another."""
        while True:
            job, argument = switch.work.next()
            try:
                self._do(switch, job, argument)
                switch.work.done(job, argument)
            except Exception:
                LOG.exception("switch %016x: %s failed; it is disconnected to be read again", switch.id, job)
                switch.datapath.close()
                return

    def _do(self, switch: Switch, job: str, argument: Any) -> None:
        session = switch.session
        if job == "reconcile":
            self._configured.wait()  # a switch must not be held against a configuration that was not read yet
            self.on_connect(switch.id)
            hosts = session.adopted_hosts(self.configuration)
            configuration = self.in_force(switch.id)
            commands = self.control.handle(SwitchUp(switch.id, hosts), time.monotonic())
            sent = 0
            for count in session.reconcile(configuration):
                sent += count
                hub.sleep(0)
            LOG.info("switch %016x reconciled: %d changes", switch.id, sent)
            self.perform(commands)
            # Not here: rules for members that are found meanwhile must not wait for it.
            hub.spawn(self._ready, switch.id)
            self._queue(switch, ("configure", self.in_force(switch.id)))
        elif job == "configure" and session.ready:
            if switch.id in self.configuration.drained:
                switch.datapath.send(delete_by_cookie(connection_cookie(Kind.CONNECTION_IN, 0), EVERY_CONNECTION))
            for _ in session.configure(argument):
                hub.sleep(0)
            if session.synchronised is not None:
                self.repairs.pop(switch.id, None)
            self._refresh(switch.id)
        elif job == "host" and session.ready:
            session.host_changed(argument)
            self._refresh(switch.id, self.control.users(argument))
        elif job == "packet":
            switch.datapath.send(argument)
        elif job == "repair":
            self.repairs[switch.id] += 1
            hub.sleep(min(LAST_REPAIR_SECONDS, 2.0 ** (self.repairs[switch.id] - 1)))
            switch.datapath.close()

    def _refresh(self, switch: int, numbers: Iterable[int] | None = None) -> None:
        if switch not in self.relays:
            self.relays.add(switch, RelayLink(switch, self.relays, lambda out: self._send(switch, out),
                                              lambda flow: self._take_over(switch, flow), self._hybrid))
        numbers = None if numbers is None else tuple(numbers)
        self.fastpaths.refresh(switch, numbers)
        self.relays.refresh(switch, numbers)

    def _send(self, number: int, out: bytes) -> None:
        switch = self.switches.get(number)
        if switch is not None:
            switch.counters["packet_outs"] += 1
            switch.datapath.send(out)

    def _ready(self, switch: int) -> None:
        try:
            self.on_ready(switch)
        except Exception:
            LOG.exception("switch %016x: no fast path", switch)

    # -------------------------------------------------------------- relaying

    def relayed(self, switch: int, server: VirtualServer) -> bool:
        """Whether a virtual server's connections go through the controller on a switch: they are to, or nobody else
        there can shake hands with clients."""
        return server.application is not Application.L4 and (
            server.binding in (Binding.HYBRID, Binding.RELAY) or not self.fastpaths.proxies(switch))

    def _fastpath_changed(self, number: int) -> None:
        """A fast path came or went: who shakes hands may be somebody else now."""
        switch, relay = self.switches.get(number), self.relays.link(number)
        if switch is None:
            return
        if isinstance(relay, RelayLink) and self.fastpaths.proxies(number):
            relay.offer_all()
        if switch.session.ready:
            self._queue(switch, ("configure", self.in_force(number)))

    def _take_over(self, switch: int, flow: NewFlow) -> bool:
        link = self.fastpaths.link(switch)
        return link is not None and link.take_over(flow)

    def _hybrid(self, number: int) -> bool:
        server = self._by_number.get(number)
        return server is not None and server.binding is Binding.HYBRID

    # -------------------------------------------------------------- commands and time

    def perform(self, commands: Iterable[ToSwitch]) -> None:
        """Do what the control segment says.

        Raises:
            TypeError: a command that nobody here knows how to do.
        """
        for command in commands:
            switch = self.switches.get(command.query.switch if isinstance(command, (Reply, AppReply)) else
                                       command.switch)
            if switch is None:
                continue
            if isinstance(command, (Reply, AppReply)):
                self._late(switch, command)
            elif isinstance(command, Probe):
                switch.counters["probes"] += 1
                # No sender address: hosts would take the balancer's address to be at the probe's MAC.
                switch.datapath.send(carrier.probe(switch.id, command.address, None))
            elif isinstance(command, HostChanged):
                self._release(switch, command)
                self._queue(switch, ("host", command.address))
            elif isinstance(command, Reap):
                if command.final:
                    switch.datapath.send(delete_by_cookie(connection_cookie(Kind.CONNECTION_IN, command.serial),
                                                          ANY_CONNECTION))
                    (self.relays if self._relays_it(command) else self.fastpaths).reap(command)
                elif switch.encoder.is_rules(command.virtual_server):
                    switch.session.ask_connection(command.serial)
                elif self._relays_it(command):
                    self.relays.reap(command)
                else:
                    self.fastpaths.reap(command)
            else:
                raise TypeError(f"cannot do {type(command).__name__}")

    def live(self, switch: int, connections: tuple[tuple[int, int, int], ...], agents: bool = True) -> None:
        """Tell the control segment which followed connections a switch's conntrack holds (``agents``: and its fast
        path)."""
        self.perform(self.control.handle(Live(switch, connections, agents), time.monotonic()))

    def _ticks(self) -> None:
        while True:
            hub.sleep(TICK)
            try:
                for switch in list(self.switches.values()):
                    self._flush(switch)
                self.perform(self.control.tick(time.monotonic()))
                self.fastpaths.tick()
                self._tick_relays()
                self.control.adopting = self.handoffs.adopting(time.monotonic())
            except Exception:
                LOG.exception("tick failed")

    def _relays_it(self, command: Reap) -> bool:
        link = self.relays.link(command.switch)
        return isinstance(link, RelayLink) and link.holds(command.serial)

    def _tick_relays(self) -> None:
        self.relays.greet()
        self.relays.tick()
        for number in list(self.switches):
            link = self.relays.link(number)
            if isinstance(link, RelayLink):
                link.tick(time.monotonic())
