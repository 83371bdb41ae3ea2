# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A small OpenFlow switch in memory: takes the bytes a switch would get, and walks packets through its tables.

Owns decoding (independent of ``lbapp.dataflow.openflow``'s encoders, but for the names of fields), tables,
groups, bundles, multipart replies, and models of conntrack and of select groups. It is strict where Open
vSwitch is (prerequisites of fields, bundles that fail as a whole) and stricter where that finds mistakes:
two rules of equal priority that both match a packet are an error. It knows nothing of the pipeline.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

from lbapp.dataflow.openflow import FIELDS
from tests.fake_frames import Headers, build, packet_in, parse

IN_PORT, NORMAL, FLOOD, CONTROLLER = 0xFFFFFFF8, 0xFFFFFFFA, 0xFFFFFFFB, 0xFFFFFFFD
NICIRA, ONF = 0x2320, 0x4F4E4600
TRK, INV, RPL, EST, NEW = 0x20, 0x10, 0x08, 0x02, 0x01
PREREQUISITES = {
    "arp": ({"eth_type": {0x806}}), "ipv4": {"eth_type": {0x800}}, "ipv6": {"eth_type": {0x86DD}},
    "ip": {"eth_type": {0x800, 0x86DD}}, "tcp": {"ip_proto": {6}}, "udp": {"ip_proto": {17}},
    "icmpv4": {"ip_proto": {1}, "eth_type": {0x800}}, "icmpv6": {"ip_proto": {58}, "eth_type": {0x86DD}},
    "nd": {"icmpv6_type": {135, 136}},
}
_NAMES = {(f.header >> 9, f.experimenter): name for name, f in FIELDS.items()}
ALIASES = {"nxm_in_port": "in_port"}


class RefusedError(Exception):
    """What the switch answers with an OpenFlow error."""

    def __init__(self, kind: int, code: int, why: str) -> None:
        super().__init__(f"error {kind}/{code}: {why}")
        self.kind, self.code = kind, code


class AmbiguousError(AssertionError):
    """Two rules of one priority match the same packet, and do not do the same."""


Match = dict[str, tuple[int, int]]
Action = tuple[Any, ...]


@dataclass(slots=True)
class Rule:
    """A rule as the switch holds it."""

    table: int
    priority: int
    match: Match
    match_bytes: bytes
    actions: list[Action]
    goto: int | None
    cookie: int
    instructions: bytes
    idle: int = 0
    hard: int = 0
    flags: int = 0
    packets: int = 0
    octets: int = 0

    @property
    def key(self) -> tuple[int, int, tuple[tuple[str, tuple[int, int]], ...]]:
        return self.table, self.priority, tuple(sorted(self.match.items()))


@dataclass(slots=True)
class Connection:
    """An entry of conntrack. Tuples: protocol, source, source port, destination, destination port."""

    original: tuple[int, ...]
    reply: tuple[int, ...]
    mark: int = 0
    label: int = 0


@dataclass(slots=True)
class Sent:
    """A packet that left."""

    port: int
    headers: Headers

    @property
    def frame(self) -> bytes:
        return build(self.headers)


@dataclass
class FakeSwitch:
    """See the module's text. ``choose`` gives a hash for a packet (select groups, multipath)."""

    choose: Callable[[Headers], int] = lambda h: crc32(repr(sorted(h.items())).encode())
    max_rules: int = 1 << 30
    max_connections: int = 1 << 30
    rules: dict[Any, Rule] = field(default_factory=dict)
    groups: dict[int, list[tuple[int, list[Action], bytes]]] = field(default_factory=dict)
    conntrack: dict[int, list[Connection]] = field(default_factory=dict)
    outbox: list[bytes] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    bundles: dict[int, list[bytes]] = field(default_factory=dict)
    trace: list[int] = field(default_factory=list)

    # -------------------------------------------------------------- OpenFlow

    def receive(self, data: bytes) -> bool:
        """Take the bytes of any number of messages; answers go to ``outbox``."""
        while data:
            length = data[2] << 8 | data[3]
            assert data[0] == 4 and 8 <= length <= len(data), "not an OpenFlow 1.3 message"
            message, data = data[:length], data[length:]
            try:
                self._message(message)
            except RefusedError as error:
                self._answer(1, struct.pack("!HH", error.kind, error.code) + message[:64], message)
        return True

    def _answer(self, kind: int, body: bytes, asked: bytes) -> None:
        self.outbox.append(struct.pack("!BBH", 4, kind, 8 + len(body)) + asked[4:8] + body)

    def _message(self, data: bytes) -> None:
        kind = data[1]
        if kind == 14:
            self._flow_mod(data)
        elif kind == 15:
            self._group_mod(data)
        elif kind == 13:
            self._packet_out(data)
        elif kind == 18:
            self._multipart(data)
        elif kind == 4:
            self._experimenter(data)
        else:
            raise AssertionError(f"message type {kind}")

    def _flush(self, data: bytes) -> None:
        """NXT_CT_FLUSH: forget the connection of a client's tuple."""
        protocol, kind, length = struct.unpack_from("!B7xHH", data, 16)
        assert (kind, length) == (0, 72) and len(data) == 104, "the original tuple, then the zone"
        values = [data[36 + offset:36 + offset + 16] for offset in (0, 24)]
        source, destination = (int.from_bytes(value[12:] if value.startswith(bytes(10) + b"\xff\xff") else value, "big")
                               for value in values)
        (source_port,), (destination_port,), (zone,) = (struct.unpack_from("!H", data, at) for at in (84, 92, 100))
        gone = (protocol, source, source_port, destination, destination_port)
        self.conntrack[zone] = [entry for entry in self.conntrack.get(zone, ()) if entry.original != gone]

    def _experimenter(self, data: bytes) -> None:
        if struct.unpack_from("!II", data, 8) == (NICIRA, 32):
            self._flush(data)
            return
        experimenter, what, bundle, kind, flags = struct.unpack_from("!IIIHH", data, 8)
        assert experimenter == ONF and flags == 3, "bundles are atomic and ordered"
        if what == 2301:
            inner = data[24:]
            assert inner[4:8] == data[4:8], "a bundled message has its bundle's transaction id"
            assert inner[2] << 8 | inner[3] == len(inner) and inner[1] in (14, 15), "only rules and groups"
            if bundle not in self.bundles:
                raise RefusedError(2300, 4, "no such bundle")
            self.bundles[bundle].append(inner)
            return
        assert what == 2300
        if kind == 0:
            self.bundles[bundle] = []
        elif kind == 4:
            before = ({key: dataclasses.replace(rule) for key, rule in self.rules.items()}, dict(self.groups),
                      list(self.outbox))
            for inner in self.bundles.pop(bundle):
                try:
                    self._message(inner)
                except RefusedError as error:
                    self.rules, self.groups, self.outbox = before
                    self._answer(1, struct.pack("!HH", error.kind, error.code) + inner[:64], inner)
                    raise RefusedError(2300, 13, "a message of the bundle failed") from error
        else:
            raise AssertionError(f"bundle control {kind}")
        self._answer(4, struct.pack("!IIIHH", ONF, 2300, bundle, kind + 1, flags), data)

    def _flow_mod(self, data: bytes) -> None:
        (cookie, mask, table, command, idle, hard, priority, _, _, _, flags) = struct.unpack_from(
            "!QQBBHHHIIIH", data, 8)
        padded = _padded(data[50] << 8 | data[51])
        match_bytes, rest = data[48:48 + padded], data[48 + padded:]
        match = decode_match(match_bytes)
        if command == 0:
            actions, goto = decode_instructions(rest)
            rule = Rule(table, priority, match, match_bytes, actions, goto, cookie, rest, idle, hard, flags)
            _check_prerequisites(rule)
            for group in (action[1] for action in actions if action[0] == "group"):
                if group not in self.groups:
                    raise RefusedError(2, 9, f"no group {group}")
            if goto is not None and goto <= table:
                raise RefusedError(3, 4, "goto goes back")
            if rule.key not in self.rules and len(self.rules) >= self.max_rules:
                raise RefusedError(5, 1, "table full")
            self.rules[rule.key] = rule
        elif command in (3, 4):
            for key, rule in list(self.rules.items()):
                strict = key == (table, priority, tuple(sorted(match.items())))
                if (command == 4 and not strict) or (command == 3 and (match or table not in (rule.table, 0xFF))):
                    continue
                if not (rule.cookie ^ cookie) & mask:
                    self._remove(key, 2)
        else:
            raise AssertionError(f"flow-mod command {command}")

    def _remove(self, key: Any, reason: int) -> None:
        rule = self.rules.pop(key)
        if rule.flags & 1:
            body = struct.pack("!QHBBIIHHQQ", rule.cookie, rule.priority, reason, rule.table, 1, 0, rule.idle,
                               rule.hard, rule.packets, rule.octets) + rule.match_bytes
            self._answer(11, body, bytes(8))

    def expire(self, cookie: int, reason: int = 0) -> None:
        """End a rule's life by its time-out."""
        for key, rule in list(self.rules.items()):
            if rule.cookie == cookie:
                self._remove(key, reason)

    def _group_mod(self, data: bytes) -> None:
        command, kind, group = struct.unpack_from("!HBxI", data, 8)
        if command == 2:
            self.groups.pop(group, None)
            for key, rule in list(self.rules.items()):
                if ("group", group) in rule.actions:
                    self._remove(key, 3)
            return
        assert command in (0, 1, 0x8000) and kind == 1
        if command == 0 and group in self.groups:
            raise RefusedError(6, 0, "group exists")
        if command == 1 and group not in self.groups:
            raise RefusedError(6, 8, "no such group")
        buckets, rest = [], data[16:]
        while rest:
            length, weight = struct.unpack_from("!HH", rest)
            buckets.append((weight, decode_actions(rest[16:length]), rest[:length]))
            rest = rest[length:]
        if sum(weight for weight, _, _ in buckets) > 0xFFFFFFFF or any(not weight for weight, _, _ in buckets):
            raise RefusedError(6, 1, "weights")
        self.groups[group] = buckets

    def _multipart(self, data: bytes) -> None:
        kind = data[8] << 8 | data[9]
        entries = []
        if kind == 1:
            table, cookie, mask = struct.unpack_from("!B11x4xQQ", data, 16)
            for rule in self.rules.values():
                if table in (0xFF, rule.table) and not (rule.cookie ^ cookie) & mask:
                    body = struct.pack("!BxIIHHHH4xQQQ", rule.table, 1, 0, rule.priority, rule.idle, rule.hard,
                                       rule.flags, rule.cookie, rule.packets, rule.octets)
                    body += rule.match_bytes + rule.instructions
                    entries.append(struct.pack("!H", 2 + len(body)) + body)
        elif kind == 7:
            for group, buckets in self.groups.items():
                body = struct.pack("!BxI", 1, group) + b"".join(raw for _, _, raw in buckets)
                entries.append(struct.pack("!H", 2 + len(body)) + body)
        else:
            raise AssertionError(f"multipart {kind}")
        chunks = [b"".join(entries[i:i + 10]) for i in range(0, len(entries), 10)] or [b""]
        for index, chunk in enumerate(chunks):
            self._answer(19, struct.pack("!HH4x", kind, index < len(chunks) - 1) + chunk, data)

    # -------------------------------------------------------------- packets

    def inject(self, port: int, frame: bytes) -> list[Sent]:
        """A frame arrives on a port; returns what leaves for other ports. Packet-ins go to ``outbox``."""
        self.sent, self.trace = [], []
        headers = parse(frame)
        headers["in_port"] = port
        self._table(0, headers)
        return self.sent

    def _packet_out(self, data: bytes) -> None:
        port, length = struct.unpack_from("!IH", data, 12)
        headers = parse(data[24 + length:])
        headers["in_port"] = port
        self.sent, self.trace = [], []
        self._actions(decode_actions(data[24:24 + length]), headers, 0, None)

    def _table(self, table: int, headers: Headers) -> None:
        self.trace.append(table)
        assert len(self.trace) < 64, "a loop of tables"
        found = [rule for rule in self.rules.values() if rule.table == table and matches(rule.match, headers)]
        if not found:
            return
        top = max(rule.priority for rule in found)
        best = [rule for rule in found if rule.priority == top]
        if len({rule.instructions for rule in best}) > 1:
            raise AmbiguousError(f"table {table}, priority {top}: {[rule.match for rule in best]}")
        rule = best[0]
        rule.packets += 1
        rule.octets += len(headers.get("payload", b""))
        self._actions(rule.actions, headers, table, rule)
        if rule.goto is not None:
            self._table(rule.goto, headers)

    def _actions(self, actions: list[Action], headers: Headers, table: int, rule: Rule | None) -> None:
        for action in actions:
            name, *arguments = action
            if name == "output":
                self._output(arguments[0], headers, table, rule)
            elif name == "output_reg":
                self._output(headers.get(arguments[0], 0) & 0xFFFF, headers, table, rule)
            elif name == "set_field":
                target, value = arguments
                if target not in headers and not target.startswith("nd_"):
                    raise AssertionError(f"set of {target}, which the packet has not")
                headers[target] = value
            elif name == "set_ttl":
                headers["ip_ttl"] = arguments[0]
            elif name == "dec_ttl":
                if headers["ip_ttl"] <= 1:
                    return
                headers["ip_ttl"] -= 1
            elif name == "load":
                _store(headers, *arguments)
            elif name == "move":
                source, source_offset, target, offset, bits = arguments
                _store(headers, target, offset, bits, headers.get(source, 0) >> source_offset & (1 << bits) - 1)
            elif name == "resubmit":
                self._table(arguments[0], headers)
            elif name == "group":
                self._group(arguments[0], headers, table)
            elif name == "multipath":
                target, slots, names = arguments
                chosen = {key: value for key, value in headers.items() if key.endswith(names) and key[:3] != "eth"}
                headers[target] = self.choose(chosen) % slots
            elif name == "ct":
                self._conntrack(headers, *arguments)
            else:
                assert name == "fin_timeout", action

    def _group(self, group: int, headers: Headers, table: int) -> None:
        buckets = self.groups[group]
        total = sum(weight for weight, _, _ in buckets)
        point = self.choose({key: value for key, value in headers.items() if "_src" in key or "_dst" in key}) % total
        for weight, actions, _ in buckets:
            if point < weight:
                self._actions(actions, dict(headers), table, None)
                return
            point -= weight

    def _output(self, port: int, headers: Headers, table: int, rule: Rule | None) -> None:
        if port == CONTROLLER:
            assert rule is not None
            self.outbox.append(packet_in(rule.cookie, table, headers))
        elif port == IN_PORT:
            self.sent.append(Sent(headers["in_port"], dict(headers)))
        elif port != headers["in_port"]:
            self.sent.append(Sent(port, dict(headers)))

    # -------------------------------------------------------------- conntrack

    def _conntrack(self, headers: Headers, commit: bool, zone: int, table: int | None, nested: list[Action]) -> None:
        entries = self.conntrack.setdefault(zone, [])
        nat = next((action[1:] for action in nested if action[0] == "nat"), None)
        seen = _tuple(headers)
        entry, state = None, TRK
        if seen is None:
            state |= INV
        else:
            entry = next((e for e in entries if seen in (e.original, e.reply)), None)
        if entry is not None:
            state |= EST | (RPL if seen != entry.original else 0)
        elif seen is not None:
            state |= NEW
            if commit and sum(map(len, self.conntrack.values())) >= self.max_connections:
                state = TRK | INV
            elif commit:
                entry = Connection(seen, _reversed(self._translated(zone, seen, nat)))
                entries.append(entry)
        if entry is not None and nat is not None and seen is not None:
            _put(headers, _reversed(entry.reply) if not state & RPL else _reversed(entry.original))
        headers["ct_state"], headers["ct_zone"] = state, zone
        headers["ct_mark"] = entry.mark if entry is not None else 0
        headers["ct_label"] = entry.label if entry is not None else 0
        if commit and entry is not None:
            for action in nested:
                if action[0] != "nat":
                    self._actions([action], headers, 0, None)
            entry.mark, entry.label = headers["ct_mark"], headers["ct_label"]
        if entry is not None:
            family = "ct_nw_" if headers["eth_type"] == 0x800 else "ct_ipv6_"
            names = ("ct_nw_proto", f"{family}src", "ct_tp_src", f"{family}dst", "ct_tp_dst")
            headers.update(zip(names, entry.original, strict=True))
        if table is not None:
            self._table(table, dict(headers))

    def _translated(self, zone: int, seen: tuple[int, ...], nat: tuple[Any, ...] | None) -> tuple[int, ...]:
        if nat is None or not nat[0]:
            return seen
        direction, address, (low, high) = nat
        protocol, source, source_port, destination, port = seen
        if direction == 2:
            return protocol, source, source_port, address, low or port
        taken = {entry.reply for entry in self.conntrack[zone]}
        for candidate in (source_port, *range(low, high + 1)):
            if low <= candidate <= high:
                wanted = (protocol, address, candidate, destination, port)
                if _reversed(wanted) not in taken:
                    return wanted
        raise AssertionError("no port is free")


# ------------------------------------------------------------------ decoding


def _padded(length: int) -> int:
    return length + 7 & ~7


def oxms(data: bytes) -> Iterator[tuple[str, int, int]]:
    """Fields of a list of TLVs: name, value, mask (all ones where there is none)."""
    while data:
        header, data = int.from_bytes(data[:4], "big"), data[4:]
        size = header & 0xFF
        body, data = data[:size], data[size:]
        assert len(body) == size, "field cut short"
        experimenter = None
        if header >> 16 == 0xFFFF:
            experimenter, body = int.from_bytes(body[:4], "big"), body[4:]
        name = _NAMES[header >> 9, experimenter]
        if header & 0x100:
            half = len(body) // 2
            value, mask = int.from_bytes(body[:half], "big"), int.from_bytes(body[half:], "big")
            assert half == FIELDS[name].size and not value & ~mask, f"{name}: bits outside of the mask"
        else:
            assert len(body) == FIELDS[name].size
            value, mask = int.from_bytes(body, "big"), (1 << 8 * len(body)) - 1
        yield name, value, mask


def decode_match(data: bytes) -> Match:
    """An ofp_match with its padding."""
    kind, length = struct.unpack_from("!HH", data)
    assert kind == 1 and len(data) == _padded(length) and not any(data[length:]), "padding"
    fields = list(oxms(data[4:length]))
    assert len({name for name, _, _ in fields}) == len(fields), "a field twice"
    return {name: (value, mask) for name, value, mask in fields}


def decode_instructions(data: bytes) -> tuple[list[Action], int | None]:
    """Apply-actions and goto-table."""
    actions: list[Action] = []
    goto = None
    while data:
        kind, length = struct.unpack_from("!HH", data)
        if kind == 4:
            actions += decode_actions(data[8:length])
        else:
            assert kind == 1 and length == 8 and goto is None
            goto = data[4]
        data = data[length:]
    return actions, goto


def _nxm_name(header: int) -> str:
    name = _NAMES[header >> 9, None]
    assert header & 0xFF == FIELDS[name].size and not header & 0x100
    return ALIASES.get(name, name)


def decode_actions(data: bytes) -> list[Action]:
    """An action list."""
    actions: list[Action] = []
    while data:
        kind, length = struct.unpack_from("!HH", data)
        assert length >= 8 and not length % 8 and length <= len(data), f"action of {length} bytes"
        body, data = data[4:length], data[length:]
        if kind == 0:
            actions.append(("output", *struct.unpack_from("!IH", body)))
        elif kind == 22:
            actions.append(("group", struct.unpack("!I", body)[0]))
        elif kind == 23:
            actions.append(("set_ttl", body[0]))
        elif kind == 24:
            actions.append(("dec_ttl",))
        elif kind == 25:
            size = body[3] + 4
            assert not any(body[size:]), "padding"
            ((name, value, _),) = oxms(body[:size])
            actions.append(("set_field", ALIASES.get(name, name), value))
        else:
            assert kind == 0xFFFF and struct.unpack_from("!I", body)[0] == NICIRA
            actions.append(_nicira(struct.unpack_from("!H", body, 4)[0], body[6:]))
    return actions


def _nicira(subtype: int, body: bytes) -> Action:
    if subtype == 7:
        where, header, value = struct.unpack("!HIQ", body)
        offset, bits = where >> 6, (where & 63) + 1
        assert value < 1 << bits and offset + bits <= (header & 0xFF) * 8, "load out of bounds"
        return ("load", _nxm_name(header), offset, bits, value)
    if subtype == 6:
        bits, source_offset, offset, source, target = struct.unpack("!HHHII", body)
        assert source_offset + bits <= (source & 0xFF) * 8 and offset + bits <= (target & 0xFF) * 8
        return ("move", _nxm_name(source), source_offset, _nxm_name(target), offset, bits)
    if subtype == 14:
        assert body[:2] == b"\xff\xf8"
        return ("resubmit", body[2])
    if subtype == 15:
        where, header = struct.unpack_from("!HI", body)
        assert where == 15, "16 bits from 0 on"
        return ("output_reg", _nxm_name(header))
    if subtype == 19:
        return ("fin_timeout", *struct.unpack_from("!HH", body))
    if subtype == 10:
        fields, _, algorithm, links, _, where, header = struct.unpack("!HH2xHHI2xHI", body)
        assert (algorithm, where) == (0, 31), "modulo, a whole register"
        return ("multipath", _nxm_name(header), links + 1, {3: ("_src", "_dst"), 4: ("ipv4_src", "ipv6_src")}[fields])
    if subtype == 35:
        flags, source, zone, table, algorithm = struct.unpack_from("!HIHB3xH", body)
        assert source == 0 and algorithm == 0
        return ("ct", bool(flags & 1), zone, None if table == 0xFF else table, decode_actions(body[14:]))
    assert subtype == 36, f"Nicira action {subtype}"
    direction, present = struct.unpack_from("!2xHH", body)
    rest, address, ports = body[6:], None, (0, 0)
    for bit, size in ((1, 4), (2, 4), (4, 16), (8, 16)):
        if present & bit:
            address, rest = int.from_bytes(rest[:size], "big"), rest[size:]
    if present & 16:
        low = high = int.from_bytes(rest[:2], "big")
        if present & 32:
            high = int.from_bytes(rest[2:4], "big")
        ports = (low, high)
    return ("nat", direction, address, ports)


def _check_prerequisites(rule: Rule) -> None:
    for name in rule.match:
        if name.startswith("ipv6_nd_") or name.startswith("nd_"):
            needs = {**PREREQUISITES["icmpv6"], **PREREQUISITES["nd"]}
        else:
            family = name.split("_")[0]
            needs = PREREQUISITES.get(family, {})
        if name in ("tcp_src", "tcp_dst", "udp_src", "udp_dst", "tcp_flags", "ip_proto"):
            needs = {**needs, **PREREQUISITES["ip"]}
        for need, values in needs.items():
            if rule.match.get(need, (None, 0))[0] not in values:
                raise RefusedError(4, 9, f"{name} without {need}")


# ------------------------------------------------------------------ packets


def matches(match: Match, headers: Headers) -> bool:
    """Whether a packet has all the fields and they agree."""
    for name, (value, mask) in match.items():
        present = headers.get(ALIASES.get(name, name))
        if present is None:
            if name[:3] not in ("ct_", "reg") and name != "ip_frag":
                return False
            present = 0
        if name in ("tcp_src", "tcp_dst", "udp_src", "udp_dst") and headers.get("ip_frag"):
            present = 0  # Open vSwitch's default way with fragments
        if present & mask != value:
            return False
    return True


def _store(headers: Headers, name: str, offset: int, bits: int, value: int) -> None:
    mask = ((1 << bits) - 1) << offset
    headers[name] = headers.get(name, 0) & ~mask | value << offset


def _prefixes(headers: Headers) -> tuple[str, str] | None:
    family = {0x800: "ipv4", 0x86DD: "ipv6"}.get(headers["eth_type"])
    transport = {6: "tcp", 17: "udp"}.get(headers.get("ip_proto", 0))
    return (family, transport) if family is not None and transport is not None else None


def _tuple(headers: Headers) -> tuple[int, ...] | None:
    names = _prefixes(headers)
    if names is None or headers["ip_frag"]:
        return None  # fragments are not put together here
    family, transport = names
    return (headers["ip_proto"], headers[f"{family}_src"], headers[f"{transport}_src"], headers[f"{family}_dst"],
            headers[f"{transport}_dst"])


def _put(headers: Headers, value: tuple[int, ...]) -> None:
    names = _prefixes(headers)
    assert names is not None
    family, transport = names
    (_, headers[f"{family}_src"], headers[f"{transport}_src"], headers[f"{family}_dst"],
     headers[f"{transport}_dst"]) = value


def _reversed(value: tuple[int, ...]) -> tuple[int, ...]:
    protocol, source, source_port, destination, port = value
    return protocol, destination, port, source, source_port
