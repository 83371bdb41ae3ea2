# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The REST interface in memory, as much of it as its clients need: for tests of the client and the command.

Speaks the same paths, pages, errors and documents as lbapp/api, and validates with the same model.
"""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import unquote

import httpx
import msgspec

from lbapp.config.model import Member, Network, Pool, VirtualServer
from lbapp.site import from_config

TOKEN = "secret-token"
KINDS: dict[str, type[Any]] = {"virtual-servers": VirtualServer, "pools": Pool, "networks": Network}
LABELS = {"virtual-servers": "virtual-server", "pools": "pool", "networks": "network"}


class Refused(Exception):
    def __init__(self, status: int, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.field = status, field


class FakeApi:
    """Hand ``transport`` to a client; look at ``requests`` and ``resources`` afterwards."""

    def __init__(self) -> None:
        self.resources: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in KINDS}
        self.requests: list[httpx.Request] = []
        self.revision = 0
        self.serial = 0
        self.switches: list[dict[str, Any]] = []
        self.connections: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.draining: list[list[dict[str, Any]]] = []
        """What is answered, one after the other; the last one again and again."""
        self.stats: dict[str, Any] = {"uptime_seconds": 61.0, "virtual_servers": [], "members": [], "switches": []}
        self.transport = httpx.MockTransport(self.answer)

    @property
    def asked(self) -> list[str]:
        return [f"{request.method} {request.url.path}" for request in self.requests]

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        try:
            if request.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise Refused(401, "expected a valid bearer token")
            status, body, headers = self._route(request)
            return httpx.Response(status, json=body, headers=headers) if body is not None else httpx.Response(status)
        except Refused as error:
            return httpx.Response(error.status, json={"error": {
                "code": "refused", "message": str(error), "field": error.field}})

    def _route(self, request: httpx.Request) -> tuple[int, Any, dict[str, str]]:
        parts = [unquote(part) for part in request.url.raw_path.decode().partition("?")[0].split("/")[2:]]
        body = json.loads(request.content) if request.content else None
        query = dict(request.url.params)
        if parts == ["config"]:
            return self._config(request, body, query)
        if parts == ["stats"]:
            return 200, self.stats, {}
        if parts == ["switches"]:
            if query:
                raise Refused(400, "unknown query parameter", next(iter(query)))
            return 200, {"switches": self.switches}, {}
        if len(parts) == 2 and parts[0] == "switches":
            dpid = parts[1].lower().removeprefix("0x").zfill(16)
            known = next((one for one in self.switches if one["dpid"] == dpid), None)
            if known is None:
                raise Refused(404, f"no switch {dpid} is connected, and nothing is asked of it")
            if request.method == "PATCH":
                known.update(body or {})
            return 200, known, {}
        if parts == ["events"]:
            wanted = [one for one in self.events if query.get("pool") in (None, one["pool"])]
            return self._page("/v1/events", "events", wanted, query)
        if parts == ["draining"]:
            return 200, {"draining": self.draining.pop(0) if len(self.draining) > 1 else self.draining[0]}, {}
        if parts == ["connections"]:
            found = [one for one in self.connections
                     if all(one[key] == value for key, value in query.items() if key not in ("limit", "marker"))]
            return self._page("/v1/connections", "connections", found, query)
        if parts[0] not in KINDS:
            raise Refused(404, "no such path")
        if len(parts) >= 3 and parts[2] == "members":
            return self._members(request.method, self._find("pools", parts[1]), parts[3:], body, query)
        return self._resource(request.method, parts[0], parts[1:], body, query)

    def _resource(self, method: str, kind: str, rest: list[str], body: Any,
                  query: dict[str, str]) -> tuple[int, Any, dict[str, str]]:
        if not rest and method == "GET":
            found = sorted(self.resources[kind].values(), key=lambda one: one["name"])
            return self._page(f"/v1/{kind}", kind.replace("-", "_"), found, query)
        if not rest:
            if isinstance(body.get("pool"), dict):
                body["default_pool_id"] = self._store("pools", body.pop("pool"))["id"]
            return 201, self._store(kind, body), {}
        found_one = self._find(kind, rest[0])
        if method == "DELETE":
            if any(one.get("default_pool_id") == found_one["id"] for one in self.resources["virtual-servers"].values()):
                raise Refused(409, "a virtual server uses it", "default_pool_id")
            del self.resources[kind][found_one["name"]]
            return 204, None, {}
        if method == "PATCH":
            kept = {key: value for key, value in found_one.items() if key in KINDS[kind].__struct_fields__}
            if "members" in kept:
                kept["members"] = [{key: value for key, value in member.items() if key in Member.__struct_fields__}
                                   for member in kept["members"]]
            return 200, self._store(kind, {**kept, **body}, found_one["id"]), {}
        return 200, found_one, {}

    def _members(self, method: str, pool: dict[str, Any], rest: list[str], body: Any,
                 query: dict[str, str]) -> tuple[int, Any, dict[str, str]]:
        members = pool["members"]
        if not rest and method == "GET":
            return self._page(f"/v1/pools/{pool['id']}/members", "members", members, query)
        if not rest:
            members.append(self._member(body))
            return 201, members[-1], {}
        index = next((index for index, one in enumerate(members) if rest[0] in (
            one["id"], f"{one['address']}:{one['protocol_port']}", f"[{one['address']}]:{one['protocol_port']}")), None)
        if index is None:
            raise Refused(404, f"no member {rest[0]} in pool {pool['name']}")
        if method == "DELETE":
            del members[index]
            return 204, None, {}
        if method == "PATCH":
            kept = {key: value for key, value in members[index].items() if key in Member.__struct_fields__}
            members[index] = self._member({**kept, **body})
        return 200, members[index], {}

    def _page(self, path: str, key: str, found: list[Any], query: dict[str, str]) -> tuple[int, Any, dict[str, str]]:
        limit, start = int(query.get("limit", 100)), int(query.get("marker", 0))
        if not 1 <= limit <= 1000:
            raise Refused(400, "expected 1 to 1000", "limit")
        more = f"{path}?limit={limit}&marker={start + limit}" if len(found) > start + limit else None
        return 200, {key: found[start:start + limit], "next": more}, {}

    def _config(self, request: httpx.Request, body: Any, query: dict[str, str]) -> tuple[int, Any, dict[str, str]]:
        current = from_config({kind.replace("-", "_"): list(found.values())
                               for kind, found in self.resources.items()}).document()
        if request.method == "GET":
            return 200, current, {"ETag": f'"{self.revision}"'}
        if request.headers.get("If-Match", f'"{self.revision}"') != f'"{self.revision}"':
            raise Refused(409, "changed in the meantime", "If-Match")
        result: dict[str, list[str]] = {"created": [], "updated": [], "deleted": []}
        for kind in KINDS:
            section = kind.replace("-", "_")
            old = {one["name"]: one for one in current[section]}
            new = {one["name"]: one for one in body.get(section, [])}
            result["created"] += [f"{LABELS[kind]}/{name}" for name in new if name not in old]
            result["updated"] += [f"{LABELS[kind]}/{name}" for name in new if name in old and old[name] != new[name]]
            result["deleted"] += [f"{LABELS[kind]}/{name}" for name in old if name not in new]
        if query.get("dry_run") != "true":
            self.resources = {kind: {} for kind in KINDS}
            for kind in ("networks", "pools", "virtual-servers"):
                for one in body.get(kind.replace("-", "_"), []):
                    self._store(kind, dict(one))
        return 200, result, {}

    def _find(self, kind: str, reference: str) -> dict[str, Any]:
        for one in self.resources[kind].values():
            if reference in (one["id"], one["name"]):
                return one
        raise Refused(404, f"no {LABELS[kind].replace('-', ' ')} {reference}")

    def _identifier(self) -> str:
        self.serial += 1
        return f"00000000-0000-0000-0000-{self.serial:012d}"

    def _member(self, values: dict[str, Any]) -> dict[str, Any]:
        member = {**self._checked(values, Member), "operating_status": "ONLINE"}
        return {**member, "id": member["id"] or self._identifier()}

    def _store(self, kind: str, values: dict[str, Any], identifier: str | None = None) -> dict[str, Any]:
        if "pool" in values:
            name = values.pop("pool")
            values["default_pool_id"] = None if name is None else self._find("pools", name)["id"]
        stored = self._checked(values, KINDS[kind])
        if kind == "pools":
            stored["members"] = [self._member(member) for member in stored["members"]]
        if identifier is None and stored["name"] in self.resources[kind]:
            raise Refused(409, f"{stored['name']} is there already", "name")
        stored = {**stored, "id": identifier or self._identifier(), "operating_status": "ONLINE",
                  "provisioning_status": "ACTIVE"}
        self.resources[kind][stored["name"]] = stored
        self.revision += 1
        return stored

    @staticmethod
    def _checked(values: dict[str, Any], cls: type[Any]) -> dict[str, Any]:
        try:
            found: dict[str, Any] = msgspec.to_builtins(msgspec.convert(values, cls))
            return found
        except msgspec.ValidationError as error:
            named = re.match(r"([a-z_]+): (.*)", str(error))
            raise Refused(400, named[2] if named else str(error), named[1] if named else None) from None
