# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What Open vSwitch's database says about bridges' ports, and how one interface takes another's place in a port.

Owns the columns that are read and carried over, and the transaction. Never touches an interface
of the kernel. The Port record stays as it is, with its name, VLAN, queues and whatever else
stands there; only the Interface in it is exchanged, and takes the OpenFlow port number over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lbapp.dataflow.ovs import Ovs

WIRE = "lbapp_wire"
"""Interface external_ids: the interface in whose place this one stands."""
UNREQUESTED = "lbapp_ofport"
"""Interface external_ids, with the value ``unrequested``: nobody had asked for the OpenFlow port number."""
MTU_REQUEST = "lbapp_mtu_request"
"""Interface external_ids: the MTU that somebody wants for the interface in front."""

_CARRIED = ("bfd", "cfm_mpid", "ingress_policing_burst", "ingress_policing_kpkts_burst", "ingress_policing_kpkts_rate",
            "ingress_policing_rate", "lldp", "mac", "options", "other_config", "type")


@dataclass(frozen=True)
class Record:
    """An Interface record, in its port and bridge.

    Attributes:
        ofport: its OpenFlow port number; None while or because Open vSwitch cannot open it.
        requested: the number asked for, if one was.
        wire: the interface in whose place it stands; None for others.
        bonded: whether its port has further interfaces.
    """

    bridge: str
    datapath_type: str
    port: str
    name: str
    type: str
    ofport: int | None
    requested: int | None
    error: str
    external_ids: Mapping[str, str]
    columns: Mapping[str, Any]
    bonded: bool

    @property
    def wire(self) -> str | None:
        """See the class."""
        return self.external_ids.get(WIRE)


def read(ovs: Ovs) -> list[Record]:
    """Every interface of every bridge.

    Raises:
        OvsError: the database does not answer.
    """
    printed = ovs.vsctl("--format=json", "--columns=name,ports,datapath_type", "list", "Bridge",
                        "--", "--columns=_uuid,interfaces", "list", "Port", "--", "list", "Interface", wait=False)
    bridges, ports, interfaces = (_rows(line) for line in printed.splitlines() if line.strip())
    of_port = {row["_uuid"][1]: [uuid[1] for uuid in _set(row["interfaces"])] for row in ports}
    by_uuid = {row["_uuid"][1]: row for row in interfaces}
    return [_record(bridge, port, by_uuid[uuid], len(of_port[port]) > 1)
            for bridge in bridges for port in (uuid[1] for uuid in _set(bridge["ports"]))
            for uuid in of_port.get(port, ()) if uuid in by_uuid]


def _rows(line: str) -> list[dict[str, Any]]:
    table = json.loads(line)
    return [dict(zip(table["headings"], row, strict=True)) for row in table["data"]]


def _set(value: Any) -> list[Any]:
    """The elements of a column: OVSDB prints a set of one as that one."""
    if isinstance(value, list) and value[0] == "set":
        return list(value[1])
    return [value]


def _optional(value: Any) -> Any:
    found = _set(value)
    return found[0] if found else None


def _record(bridge: dict[str, Any], port: str, row: dict[str, Any], bonded: bool) -> Record:
    ofport = _optional(row["ofport"])
    return Record(
        bridge=bridge["name"], datapath_type=bridge["datapath_type"], port=port, name=row["name"], type=row["type"],
        ofport=ofport if ofport is not None and ofport > 0 else None, requested=_optional(row["ofport_request"]),
        error=_optional(row["error"]) or "", external_ids=dict(row["external_ids"][1]), columns=row, bonded=bonded)


def in_order(ovs: Ovs, records: Iterable[Record]) -> list[Record]:
    """Records in an order in which interfaces can be exchanged, one after the other, under traffic.

    A new port gets the lowest number free in the datapath (not OpenFlow's). Flows that it has cached go by these
    numbers until they have been looked through again, and what they count teaches the bridge where a host is: were
    a number another port's at once, the bridge would look for that host there. Beginning with the highest, each
    gets the number of the one it replaces, or one that was free before.

    Raises:
        OvsError: ovs-vswitchd does not answer.
    """
    shown = ovs.appctl("dpif/show")
    numbers = {name: int(number) for name, number in re.findall(r"^ +(\S+) \d+/(\d+): ", shown, re.MULTILINE)}
    return sorted(records, key=lambda record: numbers.get(record.name, 0), reverse=True)


# ---------------------------------------------------------------- exchanging


def put_in_front(record: Record, name: str) -> list[str]:
    """The transaction after which a record's place is taken by the interface named."""
    identifiers = {**record.external_ids, WIRE: record.name}
    if record.requested is None:
        identifiers[UNREQUESTED] = "unrequested"
    wanted = _optional(record.columns["mtu_request"])
    if wanted is not None:
        # Not a wish for the one that comes: it follows the one it stands for.
        identifiers[MTU_REQUEST] = str(wanted)
    return _exchange(record, name, record.ofport, identifiers)


def give_back(record: Record) -> list[str]:
    """The transaction after which the interface that was there before has its place again."""
    assert record.wire is not None
    identifiers = {key: value for key, value in record.external_ids.items()
                   if key not in (WIRE, UNREQUESTED, MTU_REQUEST)}
    number = record.ofport if record.ofport is not None else record.requested
    more = [f"mtu_request={record.external_ids[MTU_REQUEST]}"] if MTU_REQUEST in record.external_ids else []
    return _exchange(record, record.wire, number, identifiers, more)


def forget_requests(records: Iterable[Record]) -> list[str]:
    """The transaction after :func:`give_back`: requests for numbers that only that one had made."""
    transaction: list[str] = []
    for record in records:
        if UNREQUESTED in record.external_ids and record.wire is not None:
            transaction += ["--", "--if-exists", "clear", "Interface", record.wire, "ofport_request"]
    return transaction


def _exchange(record: Record, name: str, number: int | None, identifiers: Mapping[str, str],
              more: Iterable[str] = ()) -> list[str]:
    carried = [f"{column}={_value(record.columns[column])}" for column in _CARRIED if column in record.columns]
    request = [f"ofport_request={number}"] if number is not None else []
    return ["--", "--id=@new", "create", "Interface", f"name={json.dumps(name)}", *request, *carried, *more,
            f"external_ids={_value(['map', list(identifiers.items())])}",
            "--", "set", "Port", record.port, "interfaces=@new"]


def _value(value: Any) -> str:
    """A value as ovs-vsctl reads it, from what it printed as JSON."""
    if isinstance(value, list):
        kind, content = value
        if kind == "map":
            return "{" + ",".join(f"{_value(key)}={_value(item)}" for key, item in content) + "}"
        if kind == "set":
            return "[" + ",".join(map(_value, content)) + "]"
        return str(content)
    return json.dumps(value)
