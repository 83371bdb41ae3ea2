# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A relay with a connection or two, and what its ends say."""

from __future__ import annotations

from typing import Any

import pytest

from lbapp.dataflow.fastpath import layout
from lbapp.dataflow.fastpath.layout import Flow, FlowKey, Hash, Mode, Service, ServiceKey
from lbapp.dataflow.pipeline import VIRTUAL_MAC
from lbapp.dataflow.relay import Relay
from tests.fastpath_packets import CLIENT_MAC, FAMILIES, MEMBER_MAC, TCP, WIRE, packed

KEYS = (bytes(range(16)), bytes(range(100, 116)))
SERIAL, SERVICE, MEMBER = 9, 12, 3
ISN = 0xFFFFFFF0
LINUX = b"\x02\x04\x05\xb4\x04\x02\x08\x0a\0\0\0\x01\0\0\0\0\x01\x03\x03\x07"
WORD = 0xFFFFFFFF


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def here(clock: Clock) -> Relay:
    made = Relay(clock)
    offer(made)
    return made


def offer(paths: Any) -> None:
    paths.set_cookies(KEYS, 0)
    paths.set_services({ServiceKey(packed(virtual), 80, TCP): Service(SERVICE, Mode.PROXY, Hash.TURN, 100, (), 1400, 9,
                                                                      True) for _, virtual, _ in FAMILIES.values()})


def pair(family: int = 4, state: int = layout.SPLICE, serial: int = SERIAL, port: int = 40000,
         routed: bool = False) -> list[tuple[FlowKey, Flow]]:
    """Both directions of a connection, as an agent installs them."""
    client, virtual, member = map(packed, FAMILIES[family])
    state |= layout.ROUTED if routed else 0
    return [(FlowKey(client, virtual, port, 80, TCP),
             Flow(client, member, port, 8080, MEMBER_MAC, VIRTUAL_MAC if routed else layout.KEEP_MAC, WIRE, state,
                  serial, SERVICE, MEMBER, 100)),
            (FlowKey(member, client, 8080, port, TCP),
             Flow(virtual, client, 80, port, CLIENT_MAC, VIRTUAL_MAC, WIRE, state | layout.OUTBOUND, serial, SERVICE,
                  MEMBER, 100))]


def walked(here: Relay, data: bytes) -> list[bytes]:
    here.packet(WIRE, data)
    out, here.out = here.out, []
    assert all(port == WIRE for port, _ in out)
    return [made for _, made in out]
