# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What the REST API shows and clears of clients that are known again, and shows of those that stand in line.

Turns names into ids and numbers, and back. Owns nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lbapp.api.views import PersistenceView, PoolStatistics, WaitingView
from lbapp.config.model import Configuration, Member, Pool
from lbapp.control.engine import ControlSegment
from lbapp.dataflow.matches import address_text


def endpoint(address: str, port: int) -> str:
    """``address:port``, an IPv6 address in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _pools(configuration: Configuration, wanted: Mapping[str, str]) -> dict[str, Pool]:
    name = wanted.get("pool")
    return {key: pool for key, pool in configuration.pools.items()
            if pool.persistence is not None and name in (None, key, pool.name)}


def _numbers(pools: Mapping[str, Pool], wanted: Mapping[str, str]) -> dict[int, tuple[str, Member]]:
    """The members that are meant, by number, with the id of their pool."""
    name = wanted.get("member")
    return {member.number: (key, member) for key, pool in pools.items() for member in pool.members
            if name in (None, member.id, member.endpoint)
            or (name and name in (member.name, member.address))}


def clients(control: ControlSegment, configuration: Configuration, wanted: Mapping[str, str],
            now: float) -> Iterator[PersistenceView]:
    """Clients that are known, in no order.

    Args:
        control: knows them.
        configuration: in which pools and members have names.
        wanted: ``pool`` (name or id), ``member`` (``address:port``, name or id), ``key`` (as clients say it, or as it
            is shown): only such.
        now: seconds.
    """
    pools = _pools(configuration, wanted)
    members = _numbers(pools, wanted)
    for key, pool in pools.items():
        assert pool.persistence is not None
        for one in control.clients.listed(key, 0, wanted.get("key", "")):
            known = members.get(one.member)
            if known is None or known[0] != key or one.expires <= now:
                continue
            yield PersistenceView(
                id=f"{key}:{one.key.hex()}", pool=pool.name, type=pool.persistence.type.value, key=one.shown,
                member=endpoint(known[1].address, known[1].protocol_port), member_name=known[1].name,
                idle_seconds=round(now - one.used, 1), expires_in=round(one.expires - now, 1))


def forget(control: ControlSegment, configuration: Configuration, wanted: Mapping[str, str]) -> int | None:
    """Forget clients; returns how many there were, None where no pool or member is meant.

    Args:
        control: knows them.
        configuration: in which pools and members have names.
        wanted: as for :func:`clients`; empty: all.
    """
    if not wanted:
        return control.clients.clear()
    key = wanted.get("key", "")
    if "pool" not in wanted and "member" not in wanted:
        return control.clients.clear(key=key)
    pools = _pools(configuration, wanted)
    if "member" not in wanted:
        return sum(control.clients.clear(one, key=key) for one in pools) if pools else None
    members = _numbers(pools, wanted)
    if not members:
        return None
    return sum(control.clients.clear(pool, number, key) for number, (pool, _) in members.items())


def pools(control: ControlSegment, configuration: Configuration, now: float) -> list[PoolStatistics]:
    """Of each pool that remembers clients, or has a line, how many there are."""
    found = []
    servers = {server.number: server.name for server in configuration.virtual_servers.values()}
    for key, pool in configuration.pools.items():
        line = control.line(key, now)
        if pool.persistence is None and pool.waiting is None and not line.waited:
            continue
        found.append(PoolStatistics(
            id=key, name=pool.name, clients=control.clients.count(key) if pool.persistence is not None else None,
            waiting=line.now, longest_seconds=round(line.longest, 3), waited=line.waited, timed_out=line.timed_out,
            refused_full=line.refused, line=[WaitingView(
                position=one.position, virtual_server=servers.get(one.query.virtual_server, ""),
                client=endpoint(address_text(one.query.signature.source), one.query.signature.source_port),
                seconds=round(one.seconds, 3)) for one in line.foremost]))
    return found
