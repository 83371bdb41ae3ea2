# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Virtual servers, pools, members and networks over REST: what each request means for the store.

Knows neither routes nor sockets. Each change is one transaction of the store; a request that
was answered with an error changed nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec
import webob

from lbapp.api.errors import ApiError, Problem, from_store, invalid
from lbapp.api.requests import (
    check_if_match,
    entity_tag,
    json_object,
    limit_of,
    merged,
    query,
    reject_read_only,
    resource_of,
    values_of,
)
from lbapp.api.views import Runtime
from lbapp.config.model import Member, Network, Pool, VirtualServer
from lbapp.config.rows import with_members
from lbapp.config.snapshot import WORDS, breathe
from lbapp.config.store import Change, Create, Delete, Snapshot, Store, StoreError, Update, new_id

R = TypeVar("R", bound=VirtualServer | Pool | Network)

PATHS: dict[type, str] = {VirtualServer: "virtual-servers", Pool: "pools", Network: "networks"}


class Answer(NamedTuple):
    """A successful answer: status, what becomes the JSON body, headers."""

    status: int
    body: Any
    headers: dict[str, str]


def ok(body: Any, **headers: str) -> Answer:
    """A 200."""
    return Answer(200, body, {name.replace("_", "-"): value for name, value in headers.items()})


def lookup(snapshot: Snapshot, kind: type[R], reference: str) -> R:
    """A resource by UUID or name.

    Raises:
        ApiError: 404.
    """
    found = snapshot.find(kind, reference)
    if found is None:
        raise ApiError(Problem.NOT_FOUND, f"no {WORDS[kind]} {reference}")
    return found


def apply(store: Store, changes: Sequence[Change] | Callable[[Snapshot], Sequence[Change]],
          prefixes: dict[int, str] | None = None) -> Snapshot:
    """Have the store make changes; its refusals become the API's."""
    try:
        return store.apply(changes)
    except StoreError as error:
        raise from_store(error, prefixes) from None


def page(items: list[tuple[str, Any]], after: str | None, limit: int, href: str) -> tuple[list[Any], str | None]:
    """One page of sorted (key, value) pairs, and where the next one is."""
    if after is not None:
        items = [item for item in items if item[0] > after]
    chosen = items[:limit]
    more = f"{href}&marker={chosen[-1][0]}" if len(items) > limit else None
    return [value for _, value in chosen], more


class Collection(Generic[R]):
    """Requests to one kind of resource.

    Args:
        kind: the model's class.
        store: where they are.
        runtime: asked for their statuses.
    """

    def __init__(self, kind: type[R], store: Store, runtime: Runtime) -> None:
        self.kind = kind
        self.store = store
        self.runtime = runtime
        self.path = f"/v1/{PATHS[kind]}"
        self.key = PATHS[kind].replace("-", "_")

    # -------------------------------------------------------------- requests

    def index(self, request: webob.Request) -> Answer:
        """GET of all, page by page, in the order of their names."""
        parameters = query(request, "name", "limit", "marker")
        limit = limit_of(parameters)
        snapshot = self.store.snapshot
        name = parameters.get("name")
        if name is not None:
            only = snapshot.all(self.kind).get(snapshot.index.get((self.kind, "name"), {}).get(name, ""))
            found = [only] if only is not None else []
        else:
            found = list(snapshot.all(self.kind).values())
        marker = parameters.get("marker")
        if marker is not None:
            last = snapshot.find(self.kind, marker)
            marker = last.name if last is not None else marker
        chosen, more = page(sorted((one.name, one) for one in found), marker, limit, f"{self.path}?limit={limit}")
        return ok({self.key: [self.view(snapshot, one) for one in breathe(chosen)], "next": more})

    def show(self, request: webob.Request, reference: str) -> Answer:
        """GET of one."""
        query(request)
        snapshot = self.store.snapshot
        return self._one(snapshot, lookup(snapshot, self.kind, reference))

    def create(self, request: webob.Request) -> Answer:
        """POST."""
        query(request)
        values = json_object(request)
        identifier = new_id()
        prefixes: dict[int, str] = {}

        def changes(snapshot: Snapshot) -> list[Change]:
            return self.creation(snapshot, dict(values), identifier, prefixes)

        snapshot = apply(self.store, changes, prefixes)
        answer = self._one(snapshot, lookup(snapshot, self.kind, identifier))
        return answer._replace(status=201, headers={**answer.headers, "Location": f"{self.path}/{identifier}"})

    def replace(self, request: webob.Request, reference: str) -> Answer:
        """PUT: what is left out gets its default."""
        query(request)
        return self._update(request, reference, json_object(request))

    def patch(self, request: webob.Request, reference: str) -> Answer:
        """PATCH (JSON Merge Patch, RFC 7396)."""
        query(request)
        change = json_object(request)
        reject_read_only(change)
        return self._update(request, reference, change, patch=True)

    def delete(self, request: webob.Request, reference: str) -> Answer:
        """DELETE."""
        query(request)

        def changes(snapshot: Snapshot) -> list[Change]:
            resource = lookup(snapshot, self.kind, reference)
            check_if_match(request, snapshot.revisions[resource.id])
            return [Delete(self.kind, resource.id, snapshot.revisions[resource.id])]

        apply(self.store, changes)
        return Answer(204, None, {})

    # -------------------------------------------------------------- what kinds differ in

    def creation(self, snapshot: Snapshot, values: dict[str, Any], identifier: str,
                 prefixes: dict[int, str]) -> list[Change]:
        """The changes of a POST."""
        return [Create(self.identified(resource_of(values, self.kind), identifier))]

    def refined(self, snapshot: Snapshot, values: dict[str, Any], current: R) -> dict[str, Any]:
        """The values of a PUT or merged PATCH, ready to be validated."""
        return values

    def status(self, resource: R) -> tuple[str, str]:
        """Provisioning and operating status."""
        return ("ACTIVE", "ONLINE")

    def view(self, snapshot: Snapshot, resource: R) -> dict[str, Any]:
        """What a client sees of a resource."""
        view = self.body(snapshot, resource)
        view["revision"] = snapshot.revisions.get(resource.id, 0)
        view["provisioning_status"], view["operating_status"] = self.status(resource)
        return {"id": view.pop("id"), **view}

    def body(self, snapshot: Snapshot, resource: R) -> dict[str, Any]:
        """The resource's own fields as JSON values."""
        return msgspec.to_builtins(resource)

    # -------------------------------------------------------------- common

    @staticmethod
    def identified(resource: R, identifier: str) -> R:
        """The resource with its id."""
        msgspec.structs.force_setattr(resource, "id", identifier)
        return resource

    def _one(self, snapshot: Snapshot, resource: R) -> Answer:
        return ok(self.view(snapshot, resource), ETag=entity_tag(snapshot.revisions.get(resource.id, 0)))

    def _update(self, request: webob.Request, reference: str, values: dict[str, Any], patch: bool = False) -> Answer:
        identifier = ""

        def changes(snapshot: Snapshot) -> list[Change]:
            nonlocal identifier
            current = lookup(snapshot, self.kind, reference)
            identifier = current.id
            check_if_match(request, snapshot.revisions[current.id])
            full = self.refined(snapshot, dict(values), current)
            if patch:
                full = merged(values_of(current), full)
            return [Update(self.identified(resource_of(full, self.kind), current.id))]

        snapshot = apply(self.store, changes)
        return self._one(snapshot, lookup(snapshot, self.kind, identifier))


class VirtualServers(Collection[VirtualServer]):
    """Requests to virtual servers. A pool may be given by its name, or whole, in ``pool``."""

    def __init__(self, store: Store, runtime: Runtime) -> None:
        super().__init__(VirtualServer, store, runtime)

    def status(self, resource: VirtualServer) -> tuple[str, str]:
        """Provisioning and operating status."""
        return self.runtime.virtual_server_status(resource)

    def creation(self, snapshot: Snapshot, values: dict[str, Any], identifier: str,
                 prefixes: dict[int, str]) -> list[Change]:
        """The changes of a POST; with an inline pool, that pool is created as well."""
        inline = values.get("pool")
        if not isinstance(inline, dict):
            return super().creation(snapshot, self._named_pool(snapshot, values), identifier, prefixes)
        del values["pool"]
        _one_pool(values)
        pool = resource_of(inline, Pool, "pool")
        msgspec.structs.force_setattr(pool, "id", new_id())
        values["default_pool_id"] = pool.id
        prefixes.update({0: "pool", 1: ""})
        return [Create(pool), Create(self.identified(resource_of(values, VirtualServer), identifier))]

    def refined(self, snapshot: Snapshot, values: dict[str, Any], current: VirtualServer) -> dict[str, Any]:
        """A pool's name becomes its id."""
        return self._named_pool(snapshot, values)

    @staticmethod
    def _named_pool(snapshot: Snapshot, values: dict[str, Any]) -> dict[str, Any]:
        if "pool" not in values:
            return values
        name = values.pop("pool")
        _one_pool(values)
        if name is None:
            return {**values, "default_pool_id": None}
        if not isinstance(name, str):
            raise invalid("expected the name of a pool (a whole one only in POST)", "pool")
        pool = snapshot.find(Pool, name)
        if pool is None:
            raise invalid(f"expected the name of a pool that exists, got {name!r}", "pool")
        return {**values, "default_pool_id": pool.id}


def _one_pool(values: dict[str, Any]) -> None:
    if values.get("default_pool_id") is not None:
        raise invalid("expected either pool or default_pool_id", "default_pool_id")


class Pools(Collection[Pool]):
    """Requests to pools as a whole."""

    def __init__(self, store: Store, runtime: Runtime) -> None:
        super().__init__(Pool, store, runtime)

    def status(self, resource: Pool) -> tuple[str, str]:
        """Provisioning and operating status."""
        return self.runtime.pool_status(resource)

    def body(self, snapshot: Snapshot, resource: Pool) -> dict[str, Any]:
        """A pool's own fields, and its members with their statuses."""
        values = super().body(snapshot, with_members(resource, ()))
        values["members"] = [member_view(snapshot, self.runtime, resource, member) for member in resource.members]
        return values


def member_view(snapshot: Snapshot, runtime: Runtime, pool: Pool, member: Member) -> dict[str, Any]:
    """What a client sees of a member."""
    view = msgspec.to_builtins(member)
    view["revision"] = snapshot.revisions.get(member.id, 0)
    view["provisioning_status"], view["operating_status"] = runtime.member_status(pool, member)
    view["health_status"] = runtime.member_health(member)
    view["effective_weight"] = runtime.effective_weight(pool, member)
    return {"id": view.pop("id"), **view}
