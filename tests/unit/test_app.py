# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The application without Ryu's machinery: bytes in, bytes out, commands done."""

from __future__ import annotations

import itertools
import struct
import time
import types
from typing import Any

import msgspec
import pytest

import tests.fake_frames  # noqa: F401  (prepares eventlet for Ryu)

# isort: split
from ryu.controller.handler import DEAD_DISPATCHER, MAIN_DISPATCHER
from ryu.lib import hub

from lbapp import app as module
from lbapp.app import LoadBalancer, Switch
from lbapp.config.model import Algorithm, Application, Binding, Configuration, Decision, State
from lbapp.control.messages import Host, HostChanged, NeighbourSeen, NewFlow, Reap, SwitchDown, SwitchUp
from lbapp.dataflow import ryu_shim
from lbapp.dataflow.openflow import message
from lbapp.dataflow.pipeline import ANY_CONNECTION, VIRTUAL_MAC, Kind, connection_cookie, cookie
from lbapp.fastpaths import Reading
from lbapp.jobs import Jobs
from tests import fastpath_packets as packets
from tests import sites
from tests.fake_frames import build, frame, packet_in, parse
from tests.fake_switch import FakeSwitch, decode_actions
from tests.green import until

SYN = frame("10.0.0.1", "10.0.0.100")
RULES = sites.configuration([sites.server(state=State.RULES)], [sites.pool()])


class Bench:
    """An application with one switch, of which everything that is sent is kept."""

    def __init__(self, site: Configuration, ready: bool = True) -> None:
        self.app = LoadBalancer(wsgi=None)
        self.sent: list[bytes] = []
        self.closed = 0
        self.app.configure(site)
        self.datapath = types.SimpleNamespace(id=1, send=self.sent.append, address=("127.0.0.1", 1), close=self._close)
        self.switch = Switch(self.datapath, self.app.control, site)
        self.app.switches[1] = self.switch
        self.app.control.handle(SwitchUp(1, {}), time.monotonic())
        for address, host in sites.reachable(site).items():
            self.app.control.handle(NeighbourSeen(1, address, host), time.monotonic())
        if ready:
            for _ in self.switch.session.reconcile(site):
                pass
        self.sent.clear()

    def _close(self) -> None:
        self.closed += 1

    def receive(self, data: bytes) -> bytes | None:
        return self.app.receive(self.datapath, data[1], data)

    def punt(self, data: bytes = SYN, kind: Kind = Kind.QUERY, number: int = 1, **metadata: int) -> bytes | None:
        return self.receive(packet_in(cookie(kind, number), 20, parse(data) | {"in_port": 7} | metadata))


def messages(data: bytes | None) -> list[bytes]:
    assert data is not None
    parts = []
    while data:
        length = data[2] << 8 | data[3]
        parts.append(data[:length])
        data = data[length:]
    return parts


def serial_of(answer: bytes | None) -> int:
    """The serial in the cookie of the first rule."""
    return int.from_bytes(messages(answer)[0][12:16], "big")


def outward(data: bytes | None) -> tuple[list, dict]:
    """The actions and the frame of a packet-out."""
    assert data is not None
    length = data[16] << 8 | data[17]
    return decode_actions(data[24:24 + length]), parse(data[24 + length:])


def test_a_query_is_answered_with_one_packet_out():
    bench = Bench(sites.configuration([sites.server()], [sites.pool()]))
    answer = bench.punt()
    assert answer is not None and len(messages(answer)) == 1
    actions, packet = outward(answer)
    assert [action[0] for action in actions] == ["load", "ct"] and packet["tcp_flags"] == 2
    assert (bench.switch.counters["packet_ins"], bench.switch.counters["packet_outs"]) == (1, 1)
    assert bench.switch.punts == {1: 1}


def work(bench: Bench) -> list[tuple[str, Any]]:
    """Do all that is queued for the switch; returns what that was."""
    jobs = []
    while bench.switch.work:
        jobs.append(bench.switch.work.next())
        bench.app._do(bench.switch, *jobs[-1])
        bench.switch.work.done(*jobs[-1])
    return jobs


def test_no_packet_comes_before_the_rules_of_its_member():
    """A new member is selected at once; the worker that sends its rules may be busy."""
    server = sites.server(decision=Decision.CONTROLLER)
    bench = Bench(sites.configuration([server], [sites.pool(of=sites.members(1))]))
    more = sites.configuration([server], [sites.pool(of=sites.members(2))])
    bench.app.configure(more)
    for address, host in sites.reachable(more).items():
        bench.app.perform(bench.app.control.handle(NeighbourSeen(1, address, host), time.monotonic()))
    clients = [frame("10.0.0.1", "10.0.0.100", sport=5000 + port) for port in range(2)]
    bench.sent.clear()
    assert sorted(bool(bench.punt(data)) for data in clients) == [False, True], "one of them is for the new member"
    assert bench.sent == []
    work(bench)
    kinds = [data[1] for sent in bench.sent for data in messages(sent)]
    assert kinds.index(13) > max(at for at, kind in enumerate(kinds) if kind == 4), "behind the bundle"
    assert kinds.count(13) == 1 and all(bench.punt(data) for data in clients)


def test_no_packet_comes_before_the_rules_of_a_member_that_moves():
    site = sites.configuration([sites.server(decision=Decision.CONTROLLER)], [sites.pool(of=sites.members(1))])
    bench = Bench(site)
    ((address, host),) = sites.reachable(site).items()
    assert bench.punt()
    bench.app.perform(bench.app.control.handle(
        NeighbourSeen(1, address, Host(host.mac, host.port + 1)), time.monotonic()))
    assert bench.switch.work.moving and bench.punt() == b"" and bench.sent == []
    work(bench)
    assert [data[1] for sent in bench.sent for data in messages(sent)][-1] == 13 and bench.punt()


def test_a_query_of_a_rules_virtual_server_installs_a_pair():
    bench = Bench(RULES)
    kinds = [data[1] for data in messages(bench.punt())]
    assert kinds == [14, 14, 13]
    assert bench.switch.counters["flow_mods"] == 2 and len(bench.switch.recent) == 1


def test_queries_before_the_switch_is_ready_are_dropped():
    bench = Bench(sites.configuration([sites.server()], [sites.pool()]), ready=False)
    assert bench.punt() == b""
    assert bench.punt(kind=Kind.LOOKUP) == b""
    assert bench.switch.counters["queries_before_ready"] == 1


def test_a_denied_port_is_refused_and_malformed_frames_are_dropped():
    bench = Bench(sites.configuration([sites.server()], [sites.pool()]))
    actions, packet = outward(bench.punt(frame("10.0.0.1", "10.0.0.100", dport=9), Kind.DENIED, 0))
    assert actions == [("output", 7, 0)] and packet["tcp_flags"] == 0x14
    assert bench.punt(frame("10.0.0.1", "10.0.0.100", flags=4), Kind.DENIED, 0) == b""
    broken = packet_in(cookie(Kind.QUERY, 1), 20, parse(SYN) | {"in_port": 7})[:-3]
    assert bench.receive(broken[:2] + len(broken).to_bytes(2, "big") + broken[4:]) == b""
    assert bench.switch.counters["malformed"] == 1


def test_others_messages_go_to_ryu():
    bench = Bench(sites.configuration())
    foreign = packet_in(0x77, 0, parse(SYN) | {"in_port": 7})
    assert bench.receive(foreign) is None
    assert bench.receive(message(19, struct.pack("!HH4x", 13, 0), 5)) is None
    assert bench.receive(message(4, struct.pack("!IIII", 1, 2, 3, 4))) is None
    assert bench.receive(message(1, bytes(20))) is None
    assert bench.receive(message(11, bytes(40))) is None
    other = types.SimpleNamespace(id=1)
    assert bench.app.receive(other, 10, packet_in(cookie(Kind.QUERY, 1), 20, parse(SYN) | {"in_port": 7})) is None
    assert bench.punt(kind=Kind.BASE) == b""


def test_what_is_cut_short_closes_the_connection():
    bench = Bench(sites.configuration())
    punt = packet_in(cookie(Kind.QUERY, 1), 20, parse(SYN) | {"in_port": 7})
    for data in (message(11, bytes(10)), punt[:26] + b"\xff\xff" + punt[28:]):
        with pytest.raises(ValueError, match=r"short|length"):
            bench.receive(data)


def error_for(flow_mod: bytes, kind: int = 5, code: int = 1) -> bytes:
    return message(1, struct.pack("!HH", kind, code) + flow_mod[:64], 0)


def test_a_full_table_refuses_the_connection_and_takes_its_rules_back():
    bench = Bench(RULES)
    first, second, _ = messages(bench.punt())
    answer = bench.receive(error_for(second))
    delete, refusal = messages(answer)
    serial = int.from_bytes(first[8:16], "big") & 0xFFFFFFFF
    deleted = connection_cookie(Kind.CONNECTION_IN, serial)
    assert struct.unpack_from("!QQB", delete, 8) == (deleted, ANY_CONNECTION, 0xFF)
    assert outward(refusal)[1]["tcp_flags"] == 0x14
    assert bench.switch.counters["table_full"] == 1
    assert bench.receive(error_for(first)) == b""
    assert not bench.switch.recent and len(list(bench.app.control.connections())) == 0
    bench.receive(error_for(messages(bench.punt())[0], 5, 3))
    assert bench.switch.counters["flow_mods_failed"] == 1


def test_rules_that_may_fail_are_remembered_within_bounds(monkeypatch):
    monkeypatch.setattr(module, "RECENT_RULES", 10)
    bench = Bench(RULES)
    for sport in range(2000, 2030):
        bench.punt(frame("10.0.0.1", "10.0.0.100", sport=sport))
    assert len(bench.switch.recent) == 10


def flow_removed(bench: Bench, serial: int, kind: Kind, reason: int = 0) -> bytes:
    return message(11, struct.pack("!QHBBIIHHQQ", connection_cookie(kind, serial), 401, reason, 1, 1, 0, 60, 0, 3, 300)
                   + b"\0\1\0\4" + bytes(4))


def test_closed_connections_reach_the_control_segment_in_batches(monkeypatch):
    monkeypatch.setattr(module, "BATCH_SIZE", 6)
    bench = Bench(RULES)
    serials = [serial_of(bench.punt(frame("10.0.0.1", "10.0.0.100", sport=sport))) for sport in range(2000, 2004)]
    for serial in serials:
        for kind in (Kind.CONNECTION_IN, Kind.CONNECTION_OUT):
            assert bench.receive(flow_removed(bench, serial, kind)) == b""
    assert bench.switch.counters["delete_batches"] == 1 and len(bench.switch.closed) == 2
    assert len(list(bench.app.control.connections())) == 1
    bench.app._flush(bench.switch)
    bench.app._flush(bench.switch)
    assert bench.switch.counters["delete_batches"] == 2
    assert list(bench.app.control.connections()) == []
    assert bench.switch.counters["flow_removeds"] == 8
    assert bench.switch.punts == {1: 12}
    assert bench.app.control.member_counters(1).packets == 6


def test_a_packet_for_a_host_that_must_be_looked_up_waits_for_it():
    site = sites.configuration([sites.server()], [sites.pool()], sites.LAN)
    bench = Bench(site)
    data = frame("192.168.7.7", "10.0.0.77")
    assert bench.punt(data, Kind.LOOKUP, 0) == b""
    assert parse(bench.sent[-1][24 + 16:])["arp_tpa"] == 0x0A00004D
    assert bench.switch.held.keys() == {"10.0.0.77"}
    answer = build({"eth_dst": 5, "eth_src": 6, "eth_type": 0x806, "arp_op": 2, "arp_sha": 6, "arp_spa": 0x0A00004D,
                    "arp_tha": 5, "arp_tpa": 0})
    assert bench.punt(answer, Kind.NEIGHBOUR, 0) == b""
    actions, packet = outward(bench.sent[-1])
    assert ("set_field", "eth_dst", 6) in actions and ("output", 7, 0) in actions and packet["ipv4_dst"] == 0x0A00004D
    assert not bench.switch.held
    actions, _ = outward(bench.punt(data, Kind.LOOKUP, 0))
    assert ("set_field", "eth_src", int.from_bytes(VIRTUAL_MAC, "big")) in actions


def test_held_packets_are_bounded(monkeypatch):
    monkeypatch.setattr(module, "HELD_HOSTS", 5)
    bench = Bench(sites.configuration([], [], sites.LAN))
    for number in range(1, 30):
        for _ in range(6):
            bench.punt(frame("192.168.7.7", f"10.0.0.{number}"), Kind.LOOKUP, 0)
    assert list(bench.switch.held) == [f"10.0.0.{number}" for number in range(25, 30)]
    assert {len(held) for held in bench.switch.held.values()} == {module.HELD_PACKETS}
    assert bench.switch.counters["lookups_dropped"] == 24 * module.HELD_PACKETS
    bench.app._release(bench.switch, HostChanged(1, "10.0.0.29", None))
    assert "10.0.0.29" not in bench.switch.held


def test_a_packet_that_was_held_too_long_is_let_go(monkeypatch):
    monkeypatch.setattr(module, "HELD_SECONDS", 0.0)
    bench = Bench(sites.configuration([], [], sites.LAN))
    bench.punt(frame("192.168.7.7", "10.0.0.77"), Kind.LOOKUP, 0)
    sent = len(bench.sent)
    bench.app._release(bench.switch, HostChanged(1, "10.0.0.77", Host(bytes((2, 0, 0, 0, 0, 9)), 7)))
    assert len(bench.sent) == sent and not bench.switch.held


def test_a_final_reap_deletes_and_another_asks():
    bench = Bench(RULES)
    bench.app.perform([Reap(1, 5, 1, 1, final=True)])
    deleted = connection_cookie(Kind.CONNECTION_IN, 5)
    assert struct.unpack_from("!QQB", bench.sent[-1], 8) == (deleted, ANY_CONNECTION, 0xFF)
    bench.app.perform([Reap(1, 5, 1, 1)])
    assert bench.sent[-1][1] == 18
    count = len(bench.sent)
    bench.app.perform([Reap(2, 5, 1, 1, final=True)])  # a switch that is gone
    assert len(bench.sent) == count
    with pytest.raises(TypeError):
        bench.app.perform([SwitchDown(1)])  # type: ignore[list-item]


def test_reap_of_a_dead_connection_ends_it_and_of_a_live_one_keeps_it():
    bench = Bench(RULES)
    serial = serial_of(bench.punt())
    bench.app.perform([Reap(1, serial, 1, 1)])
    xid = int.from_bytes(bench.sent[-1][4:8], "big")
    assert bench.receive(message(19, struct.pack("!HH4x", 1, 0), xid)) == b""
    assert list(bench.app.control.connections()) == []


def test_a_failing_bundle_queues_a_repair():
    bench = Bench(sites.configuration([sites.server()], [sites.pool()]))
    (xid,) = bench.switch.session._open.values()
    assert bench.receive(message(1, struct.pack("!HH", 5, 1) + bytes(64), xid)) == b""
    assert bench.switch.work.next() == ("repair", None)
    assert bench.switch.session.needs_repair


def test_a_queue_of_work_that_is_full_disconnects(monkeypatch):
    bench = Bench(sites.configuration())
    monkeypatch.setattr(bench.switch, "work", Jobs(1))
    bench.app._queue(bench.switch, ("host", "10.0.0.1"))
    assert not bench.closed
    bench.app._queue(bench.switch, ("host", "10.0.0.1"))
    assert bench.closed == 1


def test_counting_connections_that_close():
    site = sites.configuration([sites.server()], [sites.pool(algorithm=Algorithm.LEAST_CONNECTIONS)])
    bench = Bench(site)
    bench.punt()
    (connection,) = bench.app.control.connections()
    label = connection.serial << 64 | 1 << 96
    fin = frame("10.0.0.11", "10.0.0.1", flags=0x11)
    assert bench.punt(fin, Kind.CLOSE, 0, ct_mark=connection.member, ct_label=label) == b""
    bench.app._flush(bench.switch)
    assert bench.app.control.active(connection.member) == 0


def test_serials_begin_anywhere_and_stay_within_32_bits():
    bench = Bench(RULES)
    bench.app._serials = itertools.count(2**32 - 1)
    serials = [serial_of(bench.punt(frame("10.0.0.1", "10.0.0.100", sport=n))) for n in (2000, 2001)]
    assert serials == [2**32 - 1, 0]


# ------------------------------------------------------------------ a switch's life


def event(switch: FakeSwitch, state: str, app: LoadBalancer, identifier: int = 1, outbox=None):
    return types.SimpleNamespace(state=state, datapath=types.SimpleNamespace(
        id=identifier, send=switch.receive, address=("127.0.0.1", 5), close=lambda: None))


def settle(app: LoadBalancer, switch: FakeSwitch, datapath) -> None:
    """Let the switch's worker and the answers have their turns."""
    for _ in range(200):
        while switch.outbox:
            data = switch.outbox.pop(0)
            app.receive(datapath, data[1], data)
        hub.sleep(0)


def test_a_switch_comes_and_goes_and_comes_again():
    app, switch = LoadBalancer(wsgi=None), FakeSwitch()
    site = sites.configuration([sites.server()], [sites.pool()])
    connected = event(switch, MAIN_DISPATCHER, app)
    app._state_changed(connected)
    settle(app, switch, connected.datapath)
    assert not switch.rules  # a switch must not be held against a configuration that was not read
    app.configure(site)
    settle(app, switch, connected.datapath)
    state = app.switches[1]
    assert state.session.ready and state.session.synchronised is site and switch.rules
    before = dict(switch.rules)
    app._state_changed(types.SimpleNamespace(state=DEAD_DISPATCHER, datapath=connected.datapath))
    assert app.switches == {} and switch.rules == before
    again = event(switch, MAIN_DISPATCHER, app)
    app._state_changed(again)
    settle(app, switch, again.datapath)
    assert switch.rules == before and app.reconnects[1] == 1
    # Another connection with the same datapath id takes the place of the first.
    third = event(switch, MAIN_DISPATCHER, app)
    app._state_changed(third)
    app._state_changed(types.SimpleNamespace(state=DEAD_DISPATCHER, datapath=again.datapath))
    assert app.switches[1].datapath is third.datapath
    settle(app, switch, third.datapath)
    app.configure(sites.configuration())
    settle(app, switch, third.datapath)
    assert len(switch.rules) < len(before) and app.switches[1].session.synchronised is app.configuration
    for state in app.switches.values():
        hub.kill(state.worker)


def test_setting_up_a_fast_path_holds_up_no_rules():
    """Members that are found meanwhile have theirs at once; and what fails there costs the switch nothing."""
    site = sites.configuration([sites.server()], [sites.pool()])
    bench = Bench(site, ready=False)
    bench.app._configured.set()
    order, configured = [], hub.Event()

    def slow(switch):
        order.append(("begun", switch))
        configured.wait()
        order.append(("ready", switch))
        raise RuntimeError("no fast path after all")

    bench.app.on_ready = slow
    bench.app.on_connect = lambda switch: None
    bench.app._do(bench.switch, "reconcile", None)
    hub.sleep(0)
    job, argument = bench.switch.work.next()
    bench.app._do(bench.switch, job, argument)
    order.append((job, bench.switch.session.ready))
    configured.set()
    until(lambda: len(order) == 3)
    assert order == [("begun", 1), ("configure", True), ("ready", 1)]
    assert bench.closed == 0


def test_a_port_that_goes_down_is_asked_behind():
    bench = Bench(sites.configuration([sites.server()], [sites.pool()]))
    port = next(iter(sites.reachable(bench.app.configuration).values())).port
    description = types.SimpleNamespace(state=1, port_no=port)
    bench.app._port_status(types.SimpleNamespace(msg=types.SimpleNamespace(
        reason=2, desc=description, datapath=bench.datapath)))
    assert len(bench.sent) == 1 and bench.sent[0][1] == ryu_shim.PACKET_IN + 3


# ------------------------------------------------------------------ relaying


class Proxying:
    """A fast path whose agent shakes hands with clients."""

    def __init__(self, proxies: bool = True) -> None:
        self.proxies = self.limits = proxies
        self.taken: list[NewFlow] = []
        self.reaped: list[Reap] = []

    def configure(self, changed, *, whole=False) -> None:
        pass

    def greet(self, keys, current) -> None:
        pass

    def read(self) -> Reading:
        return Reading(0, {}, {})

    def take_over(self, flow) -> bool:
        self.taken.append(flow)
        return True

    def reap(self, reaps) -> None:
        self.reaped += reaps


def proxied(binding: Binding = Binding.AUTO) -> Bench:
    site = sites.configuration([sites.server(application=Application.HTTP, binding=binding)], [sites.pool()])
    bench = Bench(site)
    bench.app._do(bench.switch, "configure", site)
    return bench


def relay_of(bench: Bench) -> Any:
    return bench.app.relays.link(1)


def has(bench: Bench, fast: Any) -> None:
    """Switch 1 gets this link to a fast path."""
    bench.app.fastpaths.add(1, fast)


def test_who_relays():
    bench = proxied()
    (server,) = bench.app.configuration.virtual_servers.values()
    assert bench.app.relayed(1, server) and bench.app.relays.serves(1, server.number)
    has(bench, Proxying(proxies=False))
    assert bench.app.relayed(1, server), "nobody else can"
    queued = len(bench.switch.work)
    has(bench, Proxying())
    assert not bench.app.relayed(1, server)
    assert len(bench.switch.work) == queued + 1, "the switch's rules follow"
    bench.app._do(bench.switch, "configure", bench.app.configuration)
    assert not bench.app.relays.serves(1, server.number) and bench.app.fastpaths.serves(1, server.number)
    for binding in (Binding.RELAY, Binding.HYBRID):
        assert bench.app.relayed(1, msgspec.structs.replace(server, binding=binding))
    assert not bench.app.relayed(1, msgspec.structs.replace(server, application=Application.L4))


def test_a_relayed_client_is_answered_by_packet_out():
    bench = proxied()
    answer = bench.punt(kind=Kind.RELAY)
    actions, packet = outward(answer)
    assert actions[0][0] == "output" and len(actions) == 1
    assert packet["tcp_flags"] == 0x12 and packet["tcp_ack"] == 1001
    assert bench.switch.punts == {1: 1}
    other = proxied()
    other.switch.session.ready = False
    assert other.punt(kind=Kind.RELAY) == b""


def test_a_fast_path_that_comes_takes_over_what_is_relayed():
    bench = proxied()
    link = relay_of(bench)
    offered = []
    link.offer_all = lambda: offered.append(1)
    has(bench, Proxying())
    assert offered == [1]
    flow: Any = object()
    assert bench.app._take_over(1, flow) and not bench.app._take_over(99, flow)
    assert not bench.app._hybrid(1) and proxied(Binding.HYBRID).app._hybrid(1)


def test_reaps_go_to_whoever_has_the_connection():
    bench = proxied()
    fast, link = Proxying(proxies=False), relay_of(bench)
    has(bench, fast)
    reaped: list[Reap] = []
    link.reap, link.holds = reaped.extend, lambda serial: serial == 5
    bench.app.perform([Reap(1, 5, 1, 1), Reap(1, 7, 1, 1), Reap(1, 5, 1, 1, final=True)])
    bench.app.fastpaths.tick()
    bench.app._tick_relays()
    assert [one.serial for one in reaped] == [5, 5] and [one.serial for one in fast.reaped] == [7]


@pytest.mark.parametrize("flags", [0x10, 0x18, 0x11, 0x04])
def test_what_a_fast_path_may_know_is_not_refused(flags):
    """Options go into the switch, which has never heard of the connection."""
    bench = Bench(sites.configuration([sites.server()], [sites.pool()]))
    plain, odd = (packets.frame("10.0.0.1", "10.0.0.100", flags=flags, options=options)
                  for options in (b"", b"\x07\x03\x04\x00"))

    def answer(data: bytes) -> bytes | None:
        return bench.receive(packet_in(cookie(Kind.QUERY, 1), 20, parse(SYN) | {"in_port": 7}, data))

    assert bool(answer(plain)) is bool(answer(odd)) is (flags != 0x04), "without a fast path all are strangers"
    has(bench, Proxying())
    bench.app._refresh(1)
    assert bool(answer(plain)) is (flags != 0x04)
    assert answer(odd) == b""
    asked = bench.switch.punts[1]
    answer(packets.frame("10.0.0.1", "10.0.0.100", flags=2, options=b"\x07\x03\x04\x00"))
    assert bench.switch.punts[1] == asked + 1, "a new one is new"
