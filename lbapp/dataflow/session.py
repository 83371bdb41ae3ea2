# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""One connected switch: read what it holds, make that what it should hold, keep it so.

A switch that reconnects is reconciled, not wiped: rules that are right stay where they are,
with their counters; connections go on. Every change is one bundle, so that no packet ever meets
half of it. Owns the switch's :class:`SwitchProgram` and the transactions under way; never
touches a socket (``send`` is given) and never sleeps.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator, Mapping

from lbapp.config.model import Configuration, VirtualServer
from lbapp.config.routing import Routes
from lbapp.control.messages import Host
from lbapp.dataflow.carrier import oxm_field
from lbapp.dataflow.counters import ConnectionCounters, RuleCounters, request_body
from lbapp.dataflow.matches import address_text
from lbapp.dataflow.openflow import (
    BUNDLE_COMMIT,
    BUNDLE_COMMITTED,
    BUNDLE_OPEN,
    GROUP_DELETE,
    ONF,
    SelectGroup,
    add_flow,
    bundle_add,
    bundle_control,
    delete_flow,
    encode_match,
    group_mod,
    message,
)
from lbapp.dataflow.pipeline import (
    ANY_CONNECTION,
    Kind,
    Priority,
    connection_cookie,
    is_group_of_ours,
    kind_of,
    owner_of,
)
from lbapp.dataflow.program import Change, SwitchProgram

OFPT_MULTIPART_REQUEST = 18
OFPMP_FLOW, OFPMP_GROUP_DESC = 1, 7
OFPMPF_MORE = 1
GROUP_ADD_OR_MODIFY = 0x8000
"""Open vSwitch's own group command, for switches whose groups may or may not be there."""
BUNDLE_SIZE = 1000
"""Changes in one bundle where more are due (a fresh switch): bounds what the switch has to hold."""
MAX_ASKED = 4096
"""Connections asked about at the same time; the control segment asks again."""
FIRST_XID = 0x1B000000
LAST_XID = 0x1BFFFFFF
_CONNECTIONS = frozenset({Kind.CONNECTION_IN, Kind.CONNECTION_OUT})


class ProtocolError(ValueError):
    """A switch sent something that cannot be."""


class _Adopted:
    """What a switch's rules say of where somebody is, by what these rules are for."""

    def __init__(self) -> None:
        self.members: dict[int, Host] = {}
        self.next_hops: dict[int, Host] = {}
        self.gateways: dict[bool, Host] = {}
        self.routed: dict[bytes, Host] = {}

    def add(self, kind: Kind, priority: int, owner: int, match: bytes, host: Host) -> None:
        """Take a rule of FORWARD or ROUTE that leads to a host."""
        oxms = match[4:match[2] << 8 | match[3]]
        if kind is Kind.FORWARD:
            (self.next_hops if priority == Priority.SPECIAL else self.members)[owner] = host
        elif priority == Priority.GATEWAY:
            self.gateways[b"\x80\x00\x0a\x02\x86\xdd" in oxms] = host
        elif priority == Priority.HOST:
            address = oxm_field(oxms, 0x80001804) or oxm_field(oxms, 0x80003610)
            if address is not None:
                self.routed[address] = host


class SwitchSession:
    """The state of one connected switch.

    Args:
        switch: its datapath id.
        hosts: a live view of the neighbours that the control segment knows on this switch.
        send: takes bytes for the switch; may block.
        relays: see :class:`SwitchProgram`.
    """

    def __init__(self, switch: int, hosts: Mapping[str, Host], send: Callable[[bytes], object],
                 relays: Callable[[VirtualServer], bool] = lambda _: False) -> None:
        self.switch = switch
        self.program = SwitchProgram(switch, hosts, relays)
        self.ready = False
        self.flow_mods = 0
        self.failed_bundles = 0
        self.counters = RuleCounters()
        self.synchronised: Configuration | None = None
        self._send = send
        self._xids = itertools.cycle(range(FIRST_XID, LAST_XID + 1))
        self._bundles = itertools.cycle(range(1, 2**31))
        self._open: dict[int, int] = {}
        self._groups: set[int] = set()
        self._waiting: set[int] = set()
        self._counting: set[int] = set()
        self._counters = RuleCounters()
        self._asked: dict[int, ConnectionCounters] = {}
        self._answers: list[ConnectionCounters] = []
        self._held: dict[tuple[int, int, bytes], tuple[int, bytes]] = {}
        self._held_groups: dict[int, bytes] = {}
        self._adopted = _Adopted()
        self._wanted: Configuration | None = None
        self._error = False

    # -------------------------------------------------------------- reading

    def read(self) -> None:
        """Ask the switch for all rules and groups of ours."""
        # One send: what is waited for is complete before the first answer can arrive.
        self._send(self._request(OFPMP_GROUP_DESC, b"", self._waiting)
                   + self._request(OFPMP_FLOW, request_body(), self._waiting))

    def read_counters(self) -> None:
        """Ask the switch what its rules have counted; ``counters`` is new once ``counting`` is false again."""
        if not self.counting:
            self._counters = RuleCounters()
            self._send(self._request(OFPMP_FLOW, request_body(), self._counting))

    def ask_connection(self, serial: int) -> None:
        """Ask whether a connection's rules are there (REAP); :meth:`answers` tells."""
        if len(self._asked) < MAX_ASKED:
            waiting: set[int] = set()
            request = self._request(OFPMP_FLOW, request_body(connection_cookie(Kind.CONNECTION_IN, serial),
                                                             ANY_CONNECTION), waiting)
            self._asked[waiting.pop()] = ConnectionCounters(serial)
            self._send(request)

    def answers(self) -> list[ConnectionCounters]:
        """The connections whose answers have arrived since the last call."""
        answers, self._answers = self._answers, []
        return answers

    @property
    def counting(self) -> bool:
        """Whether an answer to :meth:`read_counters` is due."""
        return bool(self._counting)

    def _request(self, kind: int, body: bytes, waiting: set[int]) -> bytes:
        xid = next(self._xids)
        waiting.add(xid)
        return message(OFPT_MULTIPART_REQUEST, struct.pack("!HH4x", kind, 0) + body, xid)

    def on_multipart(self, data: bytes) -> bool:
        """Take a multipart reply; true where it was asked for here.

        Raises:
            ProtocolError: lengths that cannot be.
        """
        xid = int.from_bytes(data[4:8], "big")
        asked = self._asked.get(xid)
        if xid not in self._waiting and xid not in self._counting and asked is None:
            return False
        if len(data) < 16:
            raise ProtocolError("multipart reply too short")
        kind, flags = struct.unpack_from("!HH", data, 8)
        offset = 16
        while offset < len(data):
            if offset + 8 > len(data):
                raise ProtocolError("multipart entry too short")
            length = data[offset] << 8 | data[offset + 1]
            if length < 8 or offset + length > len(data):
                raise ProtocolError(f"multipart entry of {length} bytes")
            if kind == OFPMP_FLOW and length < 56:
                raise ProtocolError("flow entry too short")
            if asked is not None:
                asked.add(data[offset:offset + length])
            elif xid in self._counting:
                self._counters.add(data[offset:offset + length])
            elif kind == OFPMP_FLOW:
                self._read_flow(data[offset:offset + length])
            elif kind == OFPMP_GROUP_DESC:
                group = int.from_bytes(data[offset + 4:offset + 8], "big")
                if is_group_of_ours(group):
                    self._held_groups[group] = data[offset + 8:offset + length]
            offset += length
        if not flags & OFPMPF_MORE:
            self._waiting.discard(xid)
            if asked is not None:
                del self._asked[xid]
                self._answers.append(asked)
            if xid in self._counting:
                self._counting.discard(xid)
                self.counters = self._counters
        return True

    @property
    def was_read(self) -> bool:
        """Whether everything asked for by :meth:`read` has arrived."""
        return not self._waiting

    def adopted_hosts(self, configuration: Configuration) -> dict[str, Host]:
        """Where the switch's own rules say that members, next hops, gateways and routed hosts are (address -> Host)."""
        adopted = self._adopted
        routes = Routes(configuration.networks.values())
        hosts = {address_text(address): host for address, host in adopted.routed.items()}
        for six, host in adopted.gateways.items():
            gateway = routes.gateway(six)
            if gateway is not None:
                hosts[gateway] = host
        for server in configuration.virtual_servers.values() if adopted.next_hops else ():
            if server.next_hop is not None and server.number in adopted.next_hops:
                hosts[server.next_hop] = adopted.next_hops[server.number]
        for pool in configuration.pools.values():
            for member in pool.members:
                if member.number in adopted.members:
                    hosts[routes.towards(member.address)] = adopted.members[member.number]
        return hosts

    def _read_flow(self, entry: bytes) -> None:
        table = entry[2]
        priority = entry[12] << 8 | entry[13]
        cookie = int.from_bytes(entry[24:32], "big")
        match_length = entry[50] << 8 | entry[51]
        end = 48 + (match_length + 7 & ~7)
        if match_length < 4 or end > len(entry):
            raise ProtocolError("flow match length")
        kind = kind_of(cookie)
        if kind in _CONNECTIONS:
            return
        match = entry[48:end]
        self._held[table, priority, canonical_match(match)] = cookie, match
        if kind is Kind.FORWARD or kind is Kind.ROUTE:
            host = _host_of(entry[end:])
            if host is not None:
                self._adopted.add(kind, priority, owner_of(cookie), match, host)

    # -------------------------------------------------------------- writing

    def reconcile(self, configuration: Configuration) -> Iterator[int]:
        """Make the switch hold what it should, and no more of ours. Yields after each bundle (the number sent)."""
        self.program.begin(configuration)
        change = Change()
        held_groups = self._held_groups
        for number, group in enumerate(self.program.groups()):
            if not number % BUNDLE_SIZE:
                yield 0  # let others have their turn
            self._groups.add(group.group)
            if held_groups.pop(group.group, None) != b"".join([bucket.encode() for bucket in group.buckets]):
                change.groups.append((GROUP_ADD_OR_MODIFY, group))
        held = self._held
        for number, flow in enumerate(self.program.flows()):
            if not number % BUNDLE_SIZE:
                yield 0
            key = (flow.table, flow.priority, canonical_match(encode_match(flow.match)))
            if held.pop(key, (None,))[0] != flow.cookie:
                change.add.append(flow)
            if len(change) >= BUNDLE_SIZE:
                yield self._apply(change)
                change = Change()
        change.delete_groups = [SelectGroup(group, ()) for group in held_groups]
        stale = [delete_flow(table, priority, match) for (table, priority, _), (_, match) in held.items()]
        while len(stale) > BUNDLE_SIZE:
            yield self._apply(Change(), stale[:BUNDLE_SIZE])
            del stale[:BUNDLE_SIZE]
        self._held, self._held_groups, self._adopted = {}, {}, _Adopted()
        yield self._apply(change, stale)
        self._wanted = configuration
        self.ready = True

    def configure(self, configuration: Configuration) -> Iterator[int]:
        """Take over a configuration, one bundle a virtual server (small ones together)."""
        gathered = Change()
        for change in self.program.configure(configuration):
            gathered.add += change.add
            gathered.delete += change.delete
            gathered.groups += [(GROUP_ADD_OR_MODIFY, group) for _, group in change.groups]
            gathered.delete_groups += change.delete_groups
            if len(gathered) >= BUNDLE_SIZE:
                yield self._apply(gathered)
                gathered = Change()
        if gathered:
            yield self._apply(gathered)
        self._wanted = configuration
        self._settle()

    def host_changed(self, address: str) -> None:
        """A neighbour is somewhere else: change the rules that lead to it."""
        change = self.program.host_changed(address)
        if change:
            change.groups = [(GROUP_ADD_OR_MODIFY, group) for _, group in change.groups]
            self._apply(change)

    def on_bundle_reply(self, data: bytes) -> bool:
        """Take an experimenter message; true where it is an answer to a bundle of ours."""
        if len(data) < 24 or struct.unpack_from("!II", data, 8) != (ONF, 2300):
            return False
        bundle, kind = struct.unpack_from("!IH", data, 16)
        if kind == BUNDLE_COMMITTED:  # opening is answered as well, and says nothing of what is in the bundle
            self._open.pop(bundle, None)
            self._settle()
        return True

    def on_error(self, data: bytes) -> bool:
        """Take an error; true where it answers a request or bundle of ours. See :attr:`needs_repair`."""
        xid = int.from_bytes(data[4:8], "big")
        if self._asked.pop(xid, None) is not None:
            return True  # the control segment asks again
        if xid in self._counting:
            self._counting.discard(xid)
            return True  # the last reading stays
        if xid in self._waiting:
            self._error = True
            return True
        bundle = next((bundle for bundle, known in self._open.items() if known == xid), None)
        if bundle is None:
            return False
        del self._open[bundle]
        self.failed_bundles += 1
        self._error = True
        return True

    @property
    def group_count(self) -> int:
        """How many groups of ours the switch has."""
        return len(self._groups)

    @property
    def needs_repair(self) -> bool:
        """Whether a bundle or a reading failed, so that the switch has to be read and reconciled again."""
        return self._error

    def _settle(self) -> None:
        if self.ready and not self._open and not self._error:
            self.synchronised = self._wanted

    def _apply(self, change: Change, encoded: list[bytes] | None = None) -> int:
        """Send a change as one bundle: groups before the rules that name them, deletes before adds."""
        messages = [group_mod(command, group) for command, group in change.groups]
        self._groups.update(group.group for _, group in change.groups)
        self._groups.difference_update(group.group for group in change.delete_groups)
        messages += encoded or []
        messages += [delete_flow(flow.table, flow.priority, encode_match(flow.match)) for flow in change.delete]
        messages += [add_flow(flow) for flow in change.add]
        messages += [group_mod(GROUP_DELETE, group) for group in change.delete_groups]
        if messages:
            bundle, xid = next(self._bundles), next(self._xids)
            self._open[bundle] = xid
            self.flow_mods += len(messages)
            self._send(b"".join([bundle_control(bundle, BUNDLE_OPEN, xid),
                                 *[bundle_add(bundle, inner, xid) for inner in messages],
                                 bundle_control(bundle, BUNDLE_COMMIT, xid)]))
        return len(messages)


def canonical_match(match: bytes) -> bytes:
    """A match with its fields in one order, as two that mean the same may differ in it."""
    length = match[2] << 8 | match[3]
    offset, fields = 4, []
    while offset + 4 <= length:
        size = 4 + match[offset + 3]
        fields.append(match[offset:offset + size])
        offset += size
    body = b"".join(sorted(fields))
    return match[:4] + body + bytes(-length % 8)


def _host_of(instructions: bytes) -> Host | None:
    """MAC and port out of a FORWARD rule's actions: its set-field of eth_dst and its output."""
    mac = port = None
    offset = 0
    while offset + 8 <= len(instructions):
        kind, length = struct.unpack_from("!HH", instructions, offset)
        if length < 8 or offset + length > len(instructions):
            return None
        at, end = offset + 8, offset + length
        while kind == 4 and at + 8 <= end:
            action, size = struct.unpack_from("!HH", instructions, at)
            if size < 8 or at + size > end:
                return None
            if action == 25 and instructions[at + 4:at + 8] == b"\x80\x00\x06\x06":
                mac = instructions[at + 8:at + 14]
            elif action == 0:
                port = int.from_bytes(instructions[at + 4:at + 8], "big")
            at += size
        offset += length
    return Host(mac, port) if mac is not None and port is not None else None
