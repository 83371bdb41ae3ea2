# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The virtual servers of several control segments in one data flow segment: who announced what, who is asked.

Each control segment numbers its virtual servers and members itself; the fast path needs numbers of virtual servers
of its own. One address, protocol and port is one virtual server here, whoever announced it: the first one to do so
that is connected is asked about its new connections, and all who announced it are told of those that ended (003,
"redundant CS"). A member's number means something only together with its virtual server. Pure: no sockets, no clock.

Cookies are one fast path's, whoever is asked about the virtual server, because a SYN has to be answered before anybody
is asked. Their keys are those of the control segment that has been connected longest and told any: its members' hosts,
and other switches of its own, have them too. Connections are handed to a member's host as they are only where these are
the keys of the control segment that wants it; otherwise the host could not check the cookie, and they are spliced.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from lbapp.bus import csmb
from lbapp.control.messages import AppQuery, AppReply, Binding, Closed, Host, NewFlow, Query, Reap, Reply, Timeout
from lbapp.dataflow.distribution import Distribution, Greeting, Limits, Target
from lbapp.dataflow.fastpath.layout import Hash, Mode

T = TypeVar("T")

Cookies = tuple[tuple[bytes | None, bytes | None], int]
"""Keys of cookies, and which of them makes new ones."""

_READING = csmb.Flag.SSL_PROXY | csmb.Flag.COOKIE_PROXY | csmb.Flag.HTTP_PROXY
_UNSERVED = csmb.Flag.WILDCARD_ADDR | csmb.Flag.WILDCARD_PORT | _READING
"""What is not this fast path's: the most specific match, and reading what clients say. It passes that up as it came
(RAW_PROXY), whatever the application is."""

_MEMBERS = 65_536
"""Members whose virtual servers are remembered, for REAP of all their flows."""


class Key(NamedTuple):
    """What tells virtual servers apart, whoever announces them."""

    address: bytes
    port: int
    protocol: int


class _Announced(NamedTuple):
    """What one control segment says of a virtual server."""

    server: csmb.VirtualServer
    targets: tuple[csmb.Target, ...]


class ControlSegments:
    """All control segments of one data flow segment, by their identity.

    Args:
        before: local numbers that an agent before this one gave, by address, port and protocol: connections that go
            on carry them.
        used: the highest local number that anything there carries.
    """

    def __init__(self, before: Mapping[Key, int] | None = None, used: int = 0) -> None:
        self._before = dict(before or {})
        self._numbers = itertools.count(max([used, *self._before.values()]) + 1)
        self._local: dict[Key, int] = {}
        self._keys: dict[int, Key] = {}
        self._announced: dict[Key, dict[int, _Announced]] = {}
        self._by_number: dict[tuple[int, int], Key] = {}
        self._used_by: dict[tuple[int, int], set[int]] = {}
        self._connected: dict[int, None] = {}
        self._cookies: dict[int, Cookies] = {}
        self._cookies_of: int | None = None

    def __len__(self) -> int:
        return len(self._keys)

    # -------------------------------------------------------------- who is there

    def connected(self, identity: int) -> Iterable[int]:
        """A control segment is there. Returns the virtual servers (local numbers) that are to be told anew."""
        self._connected[identity] = None
        return self._of(identity)

    def disconnected(self, identity: int) -> Iterable[int]:
        """A control segment went. What it announced goes on being served, but it cannot be asked."""
        self._connected.pop(identity, None)
        self._cookies.pop(identity, None)
        return self._of(identity)

    def _of(self, identity: int) -> list[int]:
        return [self._local[key] for key, by in self._announced.items() if identity in by]

    def keyed(self, identity: int, cookies: Cookies) -> Iterable[int]:
        """KEYS. Returns the virtual servers that are to be told anew, once :meth:`cookies` are used."""
        new = identity not in self._cookies
        self._cookies[identity] = cookies
        return self._of(identity) if new else ()

    def cookies(self) -> Cookies | None:
        """The keys to be used from now on; None: those that are used already, for nobody is there who has told any."""
        self._cookies_of = next((identity for identity in self._connected if identity in self._cookies),
                                self._cookies_of)
        return self._cookies.get(self._cookies_of) if self._cookies_of is not None else None

    # -------------------------------------------------------------- what they announce

    def added(self, identity: int, server: csmb.VirtualServer) -> list[int]:
        """ADD_VS. Returns the local numbers that are to be told anew."""
        key = Key(server.address, server.port, server.protocol)
        before = self._by_number.get((identity, server.number))
        changed = [] if before is None or before == key else self.removed(identity, server.number)
        if key not in self._local:
            number = self._before.pop(key, 0) or next(self._numbers)
            self._local[key], self._keys[number] = number, key
        by = self._announced.setdefault(key, {})
        known = by.get(identity)
        by[identity] = _Announced(server, known.targets if known is not None and known.server.number == server.number
                                  else ())
        self._by_number[identity, server.number] = key
        return [*changed, self._local[key]]

    def distributed(self, identity: int, number: int, targets: tuple[csmb.Target, ...]) -> list[int]:
        """TABLE, whole. Returns the local numbers that are to be told anew."""
        key = self._by_number.get((identity, number))
        if key is None:
            return []
        self._announced[key][identity] = self._announced[key][identity]._replace(targets=targets)
        for target in targets:
            if len(self._used_by) < _MEMBERS or (identity, target.member) in self._used_by:
                self._used_by.setdefault((identity, target.member), set()).add(self._local[key])
        return [self._local[key]]

    def removed(self, identity: int, number: int) -> list[int]:
        """DELETE_VS. Returns the local numbers that are to be told anew."""
        key = self._by_number.pop((identity, number), None)
        if key is None:
            return []
        by = self._announced[key]
        if by[identity].server.number != number:
            return []  # another one has taken its address
        del by[identity]
        local = self._local[key]
        if not by:
            del self._announced[key], self._local[key], self._keys[local]
        return [local]

    # -------------------------------------------------------------- what follows

    def _asked(self, key: Key) -> int | None:
        """Who is asked: the first that announced it and is connected."""
        return next((identity for identity in self._announced[key] if identity in self._connected), None)

    def distribution(self, number: int) -> Distribution | None:
        """What the fast path is told of a virtual server (local number); None: it is gone."""
        key = self._keys.get(number)
        if key is None:
            return None
        asked = self._asked(key)
        said = self._announced[key][self._leading(key)]
        server = said.server
        mode, greeting = Mode(server.mode), None
        if server.flags & _UNSERVED or server.assist is not csmb.Assist.DFS_ASSIST:
            mode = Mode.PASS
        elif mode in (Mode.PUNT, Mode.PROXY) and asked is None:
            mode = Mode.PASS  # nobody would answer: perhaps Open vSwitch has a controller
        elif mode is Mode.PROXY:
            assert server.greeting is not None
            if server.flags & csmb.Flag.RAW_PROXY and asked in self._cookies:
                mss, scale, sack, milliseconds = server.greeting
                greeting = Greeting(mss, scale, sack, milliseconds / 1000)
            else:
                mode = Mode.PASS  # a SYN cannot be answered before there are keys
        return Distribution(number, server.address, server.port, server.protocol, mode, Hash(server.hash),
                            server.idle_seconds, tuple(_target(target) for target in said.targets), greeting,
                            None if server.limits is None else Limits(*server.limits))

    def numbers(self) -> Iterable[int]:
        """All local numbers."""
        return self._keys.keys()

    def forget_before(self) -> None:
        """Whoever is going to has announced its virtual servers: numbers of others mean nothing any more."""
        self._before.clear()

    # -------------------------------------------------------------- messages

    def queries(self, queries: Sequence[Query | AppQuery]) -> Iterator[tuple[int, list[Query | AppQuery]]]:
        """Queries with local numbers, as (who is asked, queries with that one's numbers)."""
        batches: dict[int, list[Query | AppQuery]] = {}
        for one in queries:
            query = one if isinstance(one, Query) else one.query
            key = self._keys.get(query.virtual_server)
            asked = self._asked(key) if key is not None else None
            if key is not None and asked is not None:
                server = self._announced[key][asked].server
                query = query._replace(virtual_server=server.number)
                batches.setdefault(asked, []).append(query if isinstance(one, Query) else one._replace(query=query))
        yield from batches.items()

    def local(self, identity: int, virtual_server: int) -> int:
        """The local number of a control segment's virtual server; 0 where it has announced none such."""
        key = self._by_number.get((identity, virtual_server))
        return self._local[key] if key is not None else 0

    def replies(self, identity: int,
                replies: Sequence[Reply | NewFlow | AppReply]) -> list[Reply | NewFlow | AppReply]:
        """Replies of a control segment, with local numbers."""
        found: list[Reply | NewFlow | AppReply] = []
        for one in replies:
            query = one.query._replace(virtual_server=self.local(identity, one.query.virtual_server))
            if not isinstance(one, AppReply):
                found.append(one._replace(query=query))
                continue
            binding = one.binding if identity == self._cookies_of else Binding.SPLICE
            found.append(one._replace(query=query, reply=one.reply and one.reply._replace(query=query),
                                      binding=binding))
        return found

    def reaps(self, identity: int, reaps: Iterable[Reap | Timeout]) -> Iterator[Reap | Timeout]:
        """REAP and TIMEOUT of a control segment, with local numbers. All flows of a member (serial 0) are those of
        the virtual servers that it was a member of, for another control segment may mean another by its number."""
        for one in reaps:
            if not isinstance(one, Reap) or one.serial:
                yield one  # serials are this agent's own
                continue
            used = self._used_by.pop((identity, one.member), None)
            for number in sorted(used if used is not None else self._of(identity)):
                if number in self._keys and self._leading(self._keys[number]) == identity:
                    yield one._replace(virtual_server=number)

    def led(self, identity: int) -> list[int]:
        """The local numbers of the virtual servers that are served as this control segment says."""
        return [self._local[key] for key in self._announced if self._leading(key) == identity]

    def closed(self, closed: Sequence[Closed]) -> Iterator[tuple[int, list[Closed]]]:
        """Closed connections with local numbers, as (who is told, the same with that one's numbers)."""
        batches: dict[int, list[Closed]] = {}
        for one in closed:
            key = self._keys.get(one.virtual_server)
            by = self._announced[key] if key is not None else {}
            for identity, said in by.items():
                member = one.member if len(by) == 1 else self._member(key, identity, one.member)
                batches.setdefault(identity, []).append(one._replace(virtual_server=said.server.number, member=member))
        yield from batches.items()

    def traffic(self, identity: int, counted: Mapping[tuple[int, int], T]) -> dict[tuple[int, int], T]:
        """What was counted by (virtual server, member), with a control segment's numbers."""
        found: dict[tuple[int, int], T] = {}
        for (number, member), value in counted.items():
            key = self._keys.get(number)
            said = self._announced[key].get(identity) if key is not None else None
            if said is not None:
                found[said.server.number, self._member(key, identity, member)] = value
        return found

    def _leading(self, key: Key) -> int:
        """Whose distribution is in force, and whose numbers of members with it."""
        asked = self._asked(key)
        return asked if asked is not None else next(iter(self._announced[key]))

    def _member(self, key: Key | None, identity: int, member: int) -> int:
        """Another one's number of the same address and port; the number itself where that cannot be told (control
        segments with one configuration have the same numbers)."""
        assert key is not None
        by = self._announced[key]
        leading = self._leading(key)
        if leading == identity:
            return member
        place = next(((one.address, one.port) for one in by[leading].targets if one.member == member), None)
        if place is None:
            return member
        return next((one.member for one in by[identity].targets if (one.address, one.port) == place), 0)


def _target(target: csmb.Target) -> Target:
    flags = target.flags
    return Target(target.member, target.weight, target.address if flags & csmb.TargetFlag.TRANSLATE_ADDR else None,
                  target.port if flags & csmb.TargetFlag.TRANSLATE_PORT else 0, Host(target.mac, target.out_port),
                  bool(flags & csmb.TargetFlag.ROUTED))


def announce(made: Distribution) -> tuple[csmb.VirtualServer, tuple[csmb.Target, ...]]:
    """A distribution as ADD_VS and TABLE say it (the control segment's side)."""
    flags, greeting = csmb.Flag.ROUTE_BY_DST_IP, None
    if made.mode is Mode.PROXY and made.greeting is not None:
        flags |= csmb.Flag.RAW_PROXY
        mss, scale, sack, seconds = made.greeting
        greeting = csmb.Greeting(mss, scale, sack, round(seconds * 1000))
    targets = []
    for target in made.targets:
        bits = csmb.TargetFlag(0)
        if target.address is not None:
            bits |= csmb.TargetFlag.TRANSLATE_ADDR
            flags |= csmb.Flag.TRANSLATE_ADDR
        if target.port:
            bits |= csmb.TargetFlag.TRANSLATE_PORT
            flags |= csmb.Flag.TRANSLATE_PORT
        if target.routed:
            bits |= csmb.TargetFlag.ROUTED
        address = target.address if target.address is not None else made.address
        targets.append(csmb.Target(target.member, address, target.port, target.host.mac, target.host.port,
                                   target.weight, bits))
    if made.limits is not None:
        flags |= csmb.Flag.LIMITED
    server = csmb.VirtualServer(made.number, made.address, made.port, made.protocol, flags,
                                mode=csmb.Mode(made.mode), hash=csmb.Hash(made.hash), idle_seconds=made.idle,
                                greeting=greeting,
                                limits=None if made.limits is None else csmb.Limits(*made.limits))
    return server, tuple(targets)
