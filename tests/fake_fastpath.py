# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A fast path that only remembers what it was told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lbapp.dataflow.fastpath import layout
from lbapp.dataflow.fastpath.entries import Entry, FirstFrame

CLIENT_WIRE, MEMBER_WIRE = 101, 104


class Wire(NamedTuple):
    ifindex: int


class FakeFastPath:
    """Remembers. With a ``door``, what is to go with a connection goes as it is entered, as far as there is room."""

    def __init__(self, door: bool = False) -> None:
        self.queue = 1000 if door else 0
        self.ports = {1: Wire(CLIENT_WIRE), 4: Wire(MEMBER_WIRE)}
        self.told: list[tuple[str, Any]] = []
        self.soon: list[bool] = []
        self.kept_targets: dict[int, Any] = {}
        self.kept_services: dict[Any, Any] = {}
        self.arrived: list[layout.QueryRecord] = []
        self.ending: list[layout.Closed] = []
        self.missing: set[int] = set()
        self.max_flows = 1000
        self.found = layout.Swept(0, 10, 2, 0, 0, 0, 0, 0, 0, (0,) * 32)
        self.port_change = False
        self.held: list[Any] = []
        self.room = layout.Result.OPENED
        self.pairs = True

    def targets(self) -> Any:
        return dict.fromkeys(self.kept_targets).keys()

    def services(self) -> dict[Any, int]:
        return {key: service.number for key, service in self.kept_services.items()}

    def set_targets(self, targets: Mapping[int, Any]) -> None:
        self._keep(self.kept_targets, targets)

    def set_services(self, services: Mapping[Any, Any]) -> None:
        for service in services.values():
            # No packet may meet a table that leads nowhere.
            assert service is None or set(service.slots) <= self.kept_targets.keys()
        self._keep(self.kept_services, services)

    @staticmethod
    def _keep(kept: dict[Any, Any], changed: Mapping[Any, Any]) -> None:
        for key, value in changed.items():
            kept.pop(key, None)
            if value is not None:
                kept[key] = value

    def port_of(self, ifindex: int) -> int | None:
        return next((port for port, wire in self.ports.items() if wire.ifindex == ifindex), None)

    def queries(self, limit: int) -> list[layout.QueryRecord]:
        arrived, self.arrived = self.arrived[:limit], self.arrived[limit:]
        return arrived

    def closed(self, limit: int) -> list[layout.Closed]:
        now, self.ending = self.ending[:limit], self.ending[limit:]
        return now

    def install(self, entries: Sequence[Entry]) -> list[layout.Result]:
        self.told.append(("install", list(entries)))
        results = []
        for one in entries:
            gone = self.room is layout.Result.OPENED and one.departure is not None and self.queue > 0
            results.append(layout.Result.GONE if gone else self.room)
            if gone:
                assert isinstance(one.departure, FirstFrame)
                self.queue -= 1
                self.inject(*one.departure, soon=True)
        return results

    def inject(self, ifindex: int, data: bytes, soon: bool = False) -> None:
        self.told.append(("inject", (ifindex, data)))
        self.soon.append(soon)

    def send(self, ifindex: int, data: bytes) -> None:
        self.told.append(("send", (ifindex, data)))

    def give(self, ifindex: int, data: bytes) -> bool:
        self.told.append(("give", (ifindex, data)))
        return self.pairs

    def delete(self, **what: Any) -> None:
        self.told.append(("delete", what))

    def relocate(self, member: int, mac: bytes, ifindex: int, virtual_server: int) -> None:
        self.told.append(("relocate", (member, mac, ifindex, virtual_server)))

    def reap(self, wanted: Any) -> tuple[Any, set[int]]:
        self.told.append(("reap", dict(wanted)))
        return self.found, self.missing

    def flows(self, limit: int) -> list[Any]:
        return self.held[:limit]

    def lookup(self, key: Any) -> Any:
        return dict(self.held).get(key)

    def sweep(self, linger_ms: float, evict_ms: float = 0, **more: Any) -> layout.Swept:
        self.told.append(("sweep", (evict_ms > 0, more)))
        return self.found

    def sync_ports(self) -> bool:
        return self.port_change

    def did(self, what: str) -> list[Any]:
        return [value for kind, value in self.told if kind == what]


def ways(fast: FakeFastPath) -> list[tuple[layout.FlowKey, layout.Flow]]:
    """Both directions of what was installed first."""
    return [way for one in fast.did("install")[0] for way in ((one.key, one.flow), one.back())]
