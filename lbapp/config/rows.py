# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Resources as database rows and back.

Columns are named like the model's fields and hold the same values, so there is one mapping for
every table. An empty optional column means the model's default: rows may be written by hand,
and a column that a schema upgrade adds needs no migration. Does no I/O.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
import netaddr

from lbapp.config.model import Member, Network, Pool, Switch, VirtualServer

Resource = VirtualServer | Pool | Network | Switch
AnyResource = Resource | Member
Row = dict[str, Any]
R = TypeVar("R", bound=VirtualServer | Pool | Network | Switch | Member)

SETTINGS = "Settings"
TABLES: dict[type, str] = {
    VirtualServer: "Virtual_Server",
    Pool: "Pool",
    Member: "Member",
    Network: "Network",
    Switch: "Switch",
}
CLASSES: dict[str, Any] = {table: cls for cls, table in TABLES.items()}

NOT_COLUMNS = frozenset({"id", "members"})
"""The row's own UUID, and rows of another table."""
REFERENCES = frozenset({"default_pool_id", "pool_id"})
DOCUMENTS = frozenset({"l7_policies", "monitors", "passive", "damping", "sorry", "persistence", "distribution",
                       "waiting"})
"""Columns that hold JSON: what belongs to one resource alone, in an order, and is never looked for."""
EMPTY: list[Any] = ["set", []]

COLUMNS: dict[str, tuple[str, ...]] = {
    table: tuple(field for field in cls.__struct_fields__ if field not in NOT_COLUMNS)
    for table, cls in CLASSES.items()
}
MONITORED: dict[str, list[str]] = {
    **{table: [*columns, "revision"] for table, columns in COLUMNS.items()},
    SETTINGS: ["generation", "next_virtual_server_number", "next_member_number"],
}
MONITORED["Member"].append("pool_id")

_CANONICAL = {"Virtual_Server": ("vip_address", "next_hop"), "Pool": (), "Member": ("address", "monitor_address"),
              "Network": ("address", "gateway", "monitor_address", "cidr"), "Switch": ("name",)}


def reference(identifier: str) -> list[str]:
    """A UUID in OVSDB's notation."""
    return ["uuid", identifier]


def encode(resource: AnyResource, revision: int, pool_id: str | None = None) -> Row:
    """The row of a resource; ``pool_id`` is a member's pool."""
    row: Row = {"revision": revision}
    for column in COLUMNS[TABLES[type(resource)]]:
        value = getattr(resource, column)
        if isinstance(value, enum.Enum):
            value = value.value
        elif value is None or (column in DOCUMENTS and not value):
            value = EMPTY
        elif column in DOCUMENTS:
            value = msgspec.json.encode(value).decode()
        elif column in REFERENCES:
            value = reference(value)
        row[column] = value
    if pool_id is not None:
        row["pool_id"] = reference(pool_id)
    return row


def uuid_of(value: Any) -> str | None:
    """What a reference column points at."""
    return value[1] if isinstance(value, list) and value[0] == "uuid" else None


def decode(table: str, identifier: str, row: Mapping[str, Any]) -> Any:
    """The resource of a row; a pool comes without its members.

    Raises:
        ValueError: the row does not validate; the text names the column.
    """
    values: dict[str, Any] = {"id": identifier}
    for column in COLUMNS[table]:
        value = row.get(column, EMPTY)
        if value == EMPTY:
            continue
        if column in DOCUMENTS:
            try:
                value = msgspec.json.decode(value)
            except msgspec.DecodeError as error:
                raise ValueError(f"{column}: expected JSON: {error}") from None
        values[column] = uuid_of(value) if column in REFERENCES else value
    try:
        resource = msgspec.convert(values, CLASSES[table])
    except (msgspec.ValidationError, netaddr.AddrFormatError) as error:
        raise ValueError(str(error)) from None
    for column in _CANONICAL[table]:
        # The indexes compare text: two spellings of one address would be two virtual servers.
        canonical = getattr(resource, column)
        if values.get(column) != canonical:
            raise ValueError(f"{column}: expected the canonical text {canonical!r}, got {values.get(column)!r}")
    return resource


def identified(resource: R, identifier: str, number: int = 0) -> R:
    """The same resource with the id and number the store gave it (without validating it again)."""
    copied = copy.copy(resource)
    msgspec.structs.force_setattr(copied, "id", identifier)
    if isinstance(copied, VirtualServer | Member):
        msgspec.structs.force_setattr(copied, "number", number)
    return copied


def with_members(pool: Pool, members: tuple[Member, ...]) -> Pool:
    """The same pool with other members, whose addresses are known to differ."""
    copied = copy.copy(pool)
    msgspec.structs.force_setattr(copied, "members", members)
    return copied
