# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""``lbapp show``: what is fetched for each kind, and which columns it has.

How a table looks is :mod:`lbapp.display`'s. A figure the controller does not know is shown as "-".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from lbapp import display
from lbapp.client import ApiError, Client, ClientError, Json
from lbapp.display import console, duration, endpoint, size
from lbapp.site import from_config

OVERVIEW = 40
"""Resources of a kind in the overview."""
CONNECTIONS = 50
EVENTS = 50
"""The latest ones."""

Row = Sequence[Any]


def show(client: Client, kind: str | None, name: str | None, output: str, limit: int | None,
         filters: dict[str, str]) -> None:
    """Carry out the command; ``kind`` is None for the overview.

    Raises:
        ClientError: with what to tell.
    """
    if kind is None:
        _overview(client, output)
    elif kind == "stats":
        _one_or_dump(_stats(client, name), output, _show_stats)
    elif kind == "config":
        display.dump(from_config(client.config().document).document(), "yaml" if output == "table" else output)
    elif kind in ("switches", "connections", "events", "persistence"):
        _observed(client, kind, name, output, limit, filters)
    elif kind == "members":
        _members(client, name, output, limit, filters)
    elif name is not None:
        resource = client.get(kind, name)
        _one_or_dump(resource, output, lambda one: _detail(client, kind, one))
    else:
        _listed(client, kind, output, limit, filters)


def done(message: str, resource: Json | None = None) -> None:
    """Tell that a command did what it should; with the id of what was made."""
    identifier = f" ({resource['id']})" if resource and resource.get("id") else ""
    console().print(f"{message}{identifier}", style="green")


def _one_or_dump(value: Any, output: str, printed: Callable[[Any], None]) -> None:
    if output == "table":
        printed(value)
    else:
        display.dump(value, output)


# ------------------------------------------------------------------ rows


class Table(NamedTuple):
    """Columns, and how a resource becomes a row."""

    columns: Sequence[str]
    row: Callable[[Json, Json], Row]


def _pool_name(server: Json, context: Json) -> Any:
    pool = server.get("default_pool_id")
    return server.get("pool") or context.get("pools", {}).get(pool, pool)


def _active(resource: Json, context: Json) -> Any:
    return context.get("active", {}).get(resource.get("id"))


def _limit(server: Json) -> Any:
    return None if server.get("connection_limit", -1) < 0 else server["connection_limit"]


TABLES = {
    "virtual-servers": Table(
        ("name", "address", "protocol", "pool", "status", "provisioning", "state", ">active", ">limit"),
        lambda one, context: (
            one.get("name"), endpoint(one.get("vip_address"), one.get("protocol_port")), one.get("protocol"),
            _pool_name(one, context), one.get("operating_status"), one.get("provisioning_status"), one.get("state"),
            _active(one, context), _limit(one))),
    "pools": Table(
        ("name", "algorithm", "status", ">members up", "members"),
        lambda one, context: (
            one.get("name"), one.get("lb_algorithm"), one.get("operating_status"), members_up(one),
            _shortened(endpoint(member.get("address"), member.get("protocol_port")) for member in one["members"]))),
    "networks": Table(
        ("name", "cidr", "address", "gateway"),
        lambda one, context: tuple(one.get(field) for field in ("name", "cidr", "address", "gateway"))),
    "members": Table(
        ("pool", "member", "name", ">weight", ">in force", "status", "health", "admin up", "draining", ">active"),
        lambda one, context: (
            one.get("pool"), endpoint(one.get("address"), one.get("protocol_port")), one.get("name") or None,
            one.get("weight"), one.get("effective_weight"), one.get("operating_status"), health(one),
            one.get("admin_state_up"), one.get("draining"),
            _active(one, context))),
    "switches": Table(
        ("datapath", "address", "status", "for", ">rules", ">groups", ">hosts", "draining", ">left", "features"),
        lambda one, context: (
            one.get("dpid"), one.get("address") or None, "connected" if one.get("connected") else "disconnected",
            duration(one.get("connected_seconds")), one.get("flows"), one.get("groups"), len(one.get("hosts") or ()),
            one.get("draining"), one.get("connections"), one.get("features"))),
    "events": Table(
        (">number", "time (UTC)", "kind", "pool", "member", "what"),
        lambda one, context: (
            one.get("number"), str(one.get("at", ""))[:23].replace("T", " "), one.get("kind"), one.get("pool") or None,
            one.get("member") or None, one.get("text"))),
    "persistence": Table(
        ("pool", "by", "client", "member", "name", ">idle", ">expires in"),
        lambda one, context: (
            one.get("pool"), one.get("type"), one.get("key"), one.get("member"), one.get("member_name") or None,
            duration(one.get("idle_seconds")), duration(one.get("expires_in")))),
    "connections": Table(
        ("virtual server", "client", "destination", "member", "state", ">age", ">idle", ">packets", ">bytes", "by"),
        lambda one, context: (
            one.get("virtual_server"), one.get("client"), one.get("destination"), one.get("member"), one.get("state"),
            duration(one.get("age_seconds")), duration(one.get("idle_seconds")), one.get("packets"),
            size(one.get("bytes")), one.get("decided_by"))),
}


def health(member: Json) -> str | None:
    """What is known of a member's health, in a line; None where nobody watches it."""
    if member.get("health", "auto") != "auto":
        return f"{member['health']} (an operator's word)"
    known = member.get("health_status")
    if not known:
        return None
    words = [known.get("state", "")]
    if known.get("state") == "down":
        words.append(known.get("reason", ""))
    if known.get("share", 1) < 1:
        words.append(f"slow start {known['share']:.0%}")
    return ", ".join(word for word in words if word)


def members_up(pool: Json) -> str:
    """How many of a pool's members take connections, of all.

    A member nobody monitors counts as up: it is used.
    """
    members = pool.get("members") or []
    up = sum(member.get("operating_status") in ("ONLINE", "NO_MONITOR", "DEGRADED") for member in members)
    return f"{up}/{len(members)}"


def _shortened(words: Iterable[str], most: int = 4) -> str:
    listed = list(words)
    return ", ".join(listed[:most]) + (f", ... {len(listed) - most} more" if len(listed) > most else "")


def _print(kind: str, title: str, resources: Sequence[Json], context: Json | None = None) -> None:
    table = TABLES[kind]
    display.table(title, table.columns, (table.row(one, context or {}) for one in resources))


# ------------------------------------------------------------------ kinds


def _active_counts(client: Client) -> dict[str, Any]:
    """Active connections by id of virtual server or member; empty where statistics are not to be had."""
    try:
        stats = client.stats()
    except ApiError as error:
        if error.status == 401:
            raise
        return {}
    return {one["id"]: one.get("active") for key in ("virtual_servers", "members") for one in stats.get(key, ())}


def _context(client: Client, kind: str) -> Json:
    context: Json = {}
    if kind in ("virtual-servers", "members"):
        context["active"] = _active_counts(client)
    if kind == "virtual-servers":
        context["pools"] = {pool["id"]: pool["name"] for pool in client.list("pools")}
    return context


def _listed(client: Client, kind: str, output: str, limit: int | None, filters: dict[str, str]) -> None:
    resources = client.list(kind, limit=limit, filters=filters)
    if output != "table":
        display.dump(resources, output)
        return
    _print(kind, "", resources, _context(client, kind))


def _members(client: Client, pool: str | None, output: str, limit: int | None, filters: dict[str, str]) -> None:
    if pool is None:
        pools = client.list("pools", filters=filters)
        found = [{"pool": one["name"], **member} for one in pools for member in one["members"]]
    else:
        name = client.get("pools", pool)["name"]
        found = [{"pool": name, **member} for member in client.list("members", name, limit, filters)]
    found = found if limit is None else found[:limit]
    if output != "table":
        display.dump(found, output)
        return
    _print("members", "", found, _context(client, "members"))


def _observed(client: Client, kind: str, name: str | None, output: str, limit: int | None,
              filters: dict[str, str]) -> None:
    """Nothing that was configured. A name is a datapath, or a virtual server, or a pool."""
    if kind == "switches" and name is not None:
        matching = [one for one in client.list(kind) if one.get("dpid") == name.lower().removeprefix("0x").zfill(16)]
        if not matching:
            raise ClientError(f"no switch {name} was seen")
        _one_or_dump(matching[0], output, _switch)
        return
    if kind == "events":
        found = client.list(kind, filters={**filters, **({"pool": name} if name else {})})
        found = found[-(limit or (EVENTS if output == "table" else len(found) or 1)):]
        _show_or_dump(kind, found, output)
        return
    if kind in ("connections", "persistence"):
        named = "virtual_server" if kind == "connections" else "pool"
        filters = {**filters, **({named: name} if name else {})}
        limit = limit or (CONNECTIONS if output == "table" else None)
    found = client.list(kind, limit=limit, filters=filters)
    _show_or_dump(kind, found, output)
    if output == "table" and kind in ("connections", "persistence") and len(found) == limit:
        console().print(f"the first {limit}; --limit shows more", style="dim")


def _show_or_dump(kind: str, found: Sequence[Json], output: str) -> None:
    if output == "table":
        _print(kind, "", found)
    else:
        display.dump(found, output)


def _plainly(value: Any) -> Any:
    """What lies within a resource, a line each."""
    parts = value if isinstance(value, list) else [value]
    if not parts or not all(isinstance(part, dict) for part in parts):
        return value
    return "\n".join(", ".join(f"{field} {one}" for field, one in part.items() if one not in ("", [], None))
                     for part in parts)


def _detail(client: Client, kind: str, resource: Json) -> None:
    context = _context(client, kind)
    values = [(field, _plainly(value)) for field, value in resource.items() if field != "members"]
    if kind == "virtual-servers":
        values = [("pool", _pool_name(resource, context)) if field == "default_pool_id" else (field, value)
                  for field, value in values]
        values.append(("active connections", _active(resource, context)))
    display.fields("", values)
    if "members" in resource:
        members = [{"pool": resource["name"], **member} for member in resource["members"]]
        _print("members", "members", members, {"active": _active_counts(client)})


def _switch(switch: Json) -> None:
    display.fields("", [(field, value) for field, value in switch.items() if field != "hosts"])
    hosts = switch.get("hosts") or {}
    display.table("hosts", ("address", "mac", ">port"),
                  ((address, host.get("mac"), host.get("port")) for address, host in hosts.items()))


def _stats(client: Client, name: str | None) -> Json:
    stats = client.stats()
    if name is None:
        return stats
    servers = [one for one in stats.get("virtual_servers", ()) if name in (one.get("name"), one.get("id"))]
    if not servers:
        raise ClientError(f"no statistics of a virtual server {name}")
    return {**stats, "virtual_servers": servers, "members": [], "switches": [], "pools": [],
            "monitors": []}


def _show_stats(stats: Json) -> None:
    if "uptime_seconds" in stats:
        console().print(f"since the controller started, {duration(stats['uptime_seconds'])} ago")
    display.table(
        "virtual servers", ("name", ">opened", ">closed", ">active", ">packets", ">bytes", ">messages",
                            ">per connection", "refused"),
        ((one.get("name"), one.get("opened"), one.get("closed"), one.get("active"), one.get("packets"),
          size(one.get("bytes")), one.get("messages_to_controller"),
          None if one.get("messages_per_connection") is None else f"{one['messages_per_connection']:.2f}",
          one.get("refused") or None) for one in stats.get("virtual_servers", ())))
    if stats.get("members"):
        display.table("members", ("pool", "member", ">opened", ">closed", ">active", ">packets", ">bytes"),
                      ((one.get("pool"), one.get("member"), one.get("opened"), one.get("closed"), one.get("active"),
                        one.get("packets"), size(one.get("bytes"))) for one in stats["members"]))
    _show_measured(stats.get("members", ()))
    if stats.get("pools"):
        display.table("pools", ("name", ">clients known", ">waiting", ">longest", ">waited", ">timed out",
                                ">refused, line full"),
                      ((one.get("name"), one.get("clients"), one.get("waiting"), duration(one.get("longest_seconds")),
                        one.get("waited"), one.get("timed_out"), one.get("refused_full"))
                       for one in stats["pools"]))
    if stats.get("monitors"):
        display.table("checks of members", ("from", ">targets", ">checks", ">late", ">running", ">CPU seconds"),
                      ((", ".join(one.get("addresses") or ()) or "the controller's network", one.get("targets"),
                        one.get("checks"), one.get("late"), one.get("running"), one.get("cpu_seconds"))
                       for one in stats["monitors"]))
    if stats.get("switches"):
        names = list(dict.fromkeys(field for one in stats["switches"] for field in one if field != "dpid"))
        display.table("switches", ("datapath", *(">" + field.replace("_", " ") for field in names)),
                      ((one.get("dpid"), *(one.get(field) for field in names)) for one in stats["switches"]))


def _show_measured(members: Iterable[Json]) -> None:
    """What the algorithms that measure go by, of those members of whom anything is known."""
    rows = [one for one in members
            if one.get("response_seconds") is not None or one.get("bytes_lately") is not None]
    if rows:
        display.table("measured", ("pool", "member", ">response", "by", ">ago", ">bytes lately", ">ago", ">active"),
                      ((one.get("pool"), one.get("member"),
                        None if one.get("response_seconds") is None else f"{one['response_seconds'] * 1000:.1f} ms",
                        one.get("response_by"), duration(one.get("response_age_seconds")),
                        size(one.get("bytes_lately")), duration(one.get("bytes_lately_age_seconds")),
                        one.get("active")) for one in rows))


def _overview(client: Client, output: str) -> None:
    servers, pools, switches = client.list("virtual-servers"), client.list("pools"), client.list("switches")
    active = _active_counts(client)
    by_id = {pool["id"]: pool for pool in pools}
    rows: list[Json] = []
    for server in servers:
        pool = by_id.get(server.get("default_pool_id") or "")
        rows.append({
            "name": server.get("name"), "address": endpoint(server.get("vip_address"), server.get("protocol_port")),
            "protocol": server.get("protocol"), "status": server.get("operating_status"),
            "pool": pool["name"] if pool else None, "members_up": members_up(pool) if pool else None,
            "active": active.get(server["id"]),
        })
    if output != "table":
        display.dump({"virtual_servers": rows, "switches": switches}, output)
        return
    display.table("virtual servers", ("name", "address", "protocol", "status", "pool", ">members up", ">active"),
                  (tuple(row.values()) for row in rows[:OVERVIEW]))
    if len(rows) > OVERVIEW:
        console().print(f"... and {len(rows) - OVERVIEW} more\n", style="dim")
    used = {server.get("default_pool_id") for server in servers}
    unused = [pool["name"] for pool in pools if pool["id"] not in used]
    if unused:
        console().print(f"pools without a virtual server: {_shortened(unused)}\n", style="dim")
    _print("switches", "switches", switches[:OVERVIEW])
