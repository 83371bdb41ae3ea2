# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Agents on other hosts, as the controller reaches them: CSMB and SSMB on one side, fast path links on the other.

Owns the connections. What an agent is told while it is away is said when it is back; decides nothing.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lbapp.bus import keyfile
from lbapp.bus.sessions import Down, Up
from lbapp.bus.ssmb import Lost
from lbapp.bus.transport import CsClient
from lbapp.control.messages import Delete, Query, Reap, Refused, Reply, Reset, Stats
from lbapp.control_segments import announce
from lbapp.dataflow.carrier import Answered, Held
from lbapp.dataflow.distribution import Distribution
from lbapp.fastpaths import FastPaths, Reading

LOG = logging.getLogger("lbapp.agents")


def own_identity(path: Path) -> int:
    """This control segment's number, the same after a restart: kept in a file, drawn on the first run.

    Raises:
        OSError: the file cannot be read or made.
    """
    try:
        return int(path.read_text(), 16) or 1
    except FileNotFoundError:
        pass
    except ValueError:
        LOG.warning("%s held no number; a new one is drawn", path)
    number = secrets.randbits(63) | 1
    path.write_text(f"{number:016x}\n")
    return number


class RemoteLink:
    """See :class:`lbapp.fastpaths.Link`: the agent is at the other end of a :class:`CsClient`."""

    def __init__(self, client: CsClient) -> None:
        self.client = client

    def configure(self, changed: Mapping[int, Distribution | None], *, whole: bool = False) -> None:
        """See :class:`lbapp.fastpaths.Link`. Said at once, and again after each reconnection."""
        said = {number: announce(made) for number, made in changed.items() if made is not None}
        if whole:
            self.client.replace([server for server, _ in said.values()],
                                {number: targets for number, (_, targets) in said.items()})
            return
        for number in changed.keys() - said.keys():
            self.client.remove(number)
        for number, (server, targets) in said.items():
            self.client.put(server)
            self.client.distribute(number, targets)

    def reply(self, replies: Sequence[Reply]) -> None:
        """See :class:`lbapp.fastpaths.Link`."""
        self.client.send_replies(replies)
        self.client.flush()

    def deliver(self, answered: Sequence[Answered]) -> Sequence[Answered]:
        """See :class:`lbapp.fastpaths.Link`. Nobody here knows when these flows would be there, and a short connection
        is over by then: the switch has them in conntrack, and the fast path never hears of them."""
        return answered

    def reap(self, reaps: Sequence[Reap]) -> None:
        """See :class:`lbapp.fastpaths.Link`."""
        self.client.send_reaps(reaps)

    def live(self) -> None:
        """See :class:`lbapp.fastpaths.Link`: an agent elsewhere is asked connection by connection (REAP)."""

    def read(self) -> Reading:
        """See :class:`lbapp.fastpaths.Link`: of an agent elsewhere, what its bus has counted."""
        return Reading(None, {f"bus_{name}": count for name, count in self.client.channel.counts.items()}, {})

    def connections(self, limit: int) -> Iterator[Held]:
        """See :class:`lbapp.fastpaths.Link`: its own host knows them."""
        return iter(())

    def close(self) -> None:
        """See :class:`lbapp.fastpaths.Link`."""
        self.client.close()


class RemoteAgents:
    """All agents that this controller was told of.

    Args:
        fastpaths: where their links belong.
        key: the shared key.
        identity: this control segment's number.
    """

    def __init__(self, fastpaths: FastPaths, key: bytes, identity: int) -> None:
        self._fastpaths = fastpaths
        self._key = key
        self._identity = identity
        self._clients: dict[tuple[str, int], CsClient] = {}

    def connect(self, address: tuple[str, int]) -> None:
        """Connect to an agent, for as long as this controller runs."""
        self._clients[address] = CsClient(address, self._key, self._identity, self._event, self._messages)

    def close(self) -> None:
        """End all connections; the fast paths go on."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    def _event(self, client: CsClient, event: Any) -> None:
        switch = client.identity
        if isinstance(event, Up):
            link = self._fastpaths.link(switch)
            if isinstance(link, RemoteLink) and link.client is client:
                self._fastpaths.refresh(switch)
            elif link is None:
                self._fastpaths.add(switch, RemoteLink(client))
            else:
                LOG.error("switch %016x has a fast path agent already; the one at %s is left alone", switch,
                          client.hello.ssmb_address.hex() if client.hello is not None else "?")
        elif isinstance(event, Down):
            LOG.info("switch %016x: its agent is away (%s); the fast path goes on", switch, event.text)

    def _messages(self, client: CsClient, messages: list[Any]) -> None:
        switch = client.identity
        link = self._fastpaths.link(switch)
        if not isinstance(link, RemoteLink) or link.client is not client:
            return
        queries = [message for message in messages if isinstance(message, Query)]
        if queries:
            self._fastpaths.asked(switch, queries)
        for message in messages:
            if isinstance(message, Delete):
                self._fastpaths.closed(switch, message.closed)
            elif isinstance(message, (Stats, Refused)):
                self._fastpaths.heard((message,))
            elif isinstance(message, Lost):
                LOG.warning("switch %016x: its agent had to drop %d messages; they are asked about", switch,
                            message.records)
            elif isinstance(message, Reset):
                LOG.info("switch %016x: its fast path has forgotten every connection", switch)


def shared_key(path: Path) -> bytes:
    """The key of the buses; made on the first run.

    Raises:
        OSError: it cannot be used; the text says why.
    """
    try:
        return keyfile.ensure(path)
    except keyfile.KeyFileError as error:
        raise OSError(0, str(error), str(path)) from None
