# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The members of one pool over REST.

A member's address and port are its identity: they cannot be changed, as connections that the
switches hold name the member by its number.
"""

from __future__ import annotations

from typing import Any

import msgspec
import webob

from lbapp.api.errors import ApiError, Problem, invalid
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
from lbapp.api.resources import Answer, apply, lookup, member_view, ok, page
from lbapp.api.views import Runtime
from lbapp.config.fields import canonical_address
from lbapp.config.model import Member, Pool
from lbapp.config.rows import with_members
from lbapp.config.store import Change, Expect, Snapshot, Store, Update, new_id

_DIGITS = 8
_IDENTITY = ("address", "protocol_port")


def find_member(pool: Pool, reference: str) -> Member:
    """A member by UUID, by ``address:port`` or by name.

    Raises:
        ApiError: 404, or 409 where several have the name.
    """
    address, _, port = reference.rpartition(":")
    try:
        address = canonical_address(address.removeprefix("[").removesuffix("]"))
    except ValueError:
        address = ""
    for member in pool.members:
        if member.id == reference.lower() or (member.address == address and str(member.protocol_port) == port):
            return member
    named = [member for member in pool.members if reference and member.name == reference]
    if len(named) > 1:
        raise ApiError(Problem.CONFLICT, f"{len(named)} members of pool {pool.name} are named {reference}; "
                                         "use address:port or the id")
    if not named:
        raise ApiError(Problem.NOT_FOUND, f"no member {reference} in pool {pool.name}")
    return named[0]


class Members:
    """Requests to the members of a pool."""

    def __init__(self, store: Store, runtime: Runtime) -> None:
        self.store = store
        self.runtime = runtime

    def index(self, request: webob.Request, pool_reference: str) -> Answer:
        """GET of all, page by page, the oldest first."""
        parameters = query(request, "name", "limit", "marker")
        limit = limit_of(parameters)
        snapshot = self.store.snapshot
        pool = lookup(snapshot, Pool, pool_reference)
        name, marker = parameters.get("name"), parameters.get("marker")
        members = [member for member in pool.members if name is None or member.name == name]
        after = None
        if marker is not None:
            position = marker.isascii() and marker.isdigit() and len(marker) <= _DIGITS
            after = _sortable(marker) if position else _sortable(find_member(pool, marker).number)
        chosen, more = page([(_sortable(member.number), member) for member in members], after, limit,
                            f"/v1/pools/{pool.id}/members?limit={limit}")
        return ok({"members": [member_view(snapshot, self.runtime, pool, member) for member in chosen], "next": more})

    def show(self, request: webob.Request, pool_reference: str, reference: str) -> Answer:
        """GET of one."""
        query(request)
        snapshot = self.store.snapshot
        pool = lookup(snapshot, Pool, pool_reference)
        return self._one(snapshot, pool, find_member(pool, reference))

    def create(self, request: webob.Request, pool_reference: str) -> Answer:
        """POST."""
        query(request)
        member = resource_of(json_object(request), Member)
        msgspec.structs.force_setattr(member, "id", new_id())
        pool_id = ""

        def changes(snapshot: Snapshot) -> list[Change]:
            nonlocal pool_id
            pool = lookup(snapshot, Pool, pool_reference)
            pool_id = pool.id
            if any(one.address == member.address and one.protocol_port == member.protocol_port
                   for one in pool.members):
                raise ApiError(Problem.CONFLICT, f"{member.address} with port {member.protocol_port} is already a "
                                                 f"member of pool {pool.name}", "address")
            return [Update(with_members(pool, (*pool.members, member)))]

        snapshot = self._apply(changes, "")
        pool = lookup(snapshot, Pool, pool_id)
        answer = self._one(snapshot, pool, find_member(pool, member.id))
        return answer._replace(status=201, headers={
            **answer.headers, "Location": f"/v1/pools/{pool_id}/members/{member.id}"})

    def replace(self, request: webob.Request, pool_reference: str, reference: str) -> Answer:
        """PUT: what is left out gets its default, but for address and port."""
        query(request)
        return self._update(request, pool_reference, reference, json_object(request), patch=False)

    def patch(self, request: webob.Request, pool_reference: str, reference: str) -> Answer:
        """PATCH (JSON Merge Patch, RFC 7396)."""
        query(request)
        return self._update(request, pool_reference, reference, json_object(request), patch=True)

    def delete(self, request: webob.Request, pool_reference: str, reference: str) -> Answer:
        """DELETE."""
        query(request)

        def changes(snapshot: Snapshot) -> list[Change]:
            pool = lookup(snapshot, Pool, pool_reference)
            member = find_member(pool, reference)
            check_if_match(request, snapshot.revisions[member.id])
            return [Expect(member.id, snapshot.revisions[member.id]),
                    Update(with_members(pool, tuple(one for one in pool.members if one.id != member.id)))]

        apply(self.store, changes)
        return Answer(204, None, {})

    def _update(self, request: webob.Request, pool_reference: str, reference: str, values: dict[str, Any],
                patch: bool) -> Answer:
        reject_read_only(values)
        pool_id = identifier = ""

        def changes(snapshot: Snapshot) -> list[Change]:
            nonlocal pool_id, identifier
            pool = lookup(snapshot, Pool, pool_reference)
            current = find_member(pool, reference)
            pool_id, identifier = pool.id, current.id
            check_if_match(request, snapshot.revisions[current.id])
            known = values_of(current)
            full = merged(known, values) if patch else values
            member = resource_of({**{key: known[key] for key in _IDENTITY}, **full}, Member)
            for field in _IDENTITY:
                if getattr(member, field) != getattr(current, field):
                    raise invalid(f"cannot be changed; expected {getattr(current, field)!r} or none "
                                  "(create another member instead)", field)
            msgspec.structs.force_setattr(member, "id", current.id)
            return [Update(with_members(pool, tuple(member if one.id == current.id else one for one in pool.members)))]

        snapshot = self._apply(changes, "")
        pool = lookup(snapshot, Pool, pool_id)
        return self._one(snapshot, pool, find_member(pool, identifier))

    def _apply(self, changes: Any, path: str) -> Snapshot:
        try:
            return apply(self.store, changes)
        except ApiError as error:
            # The store names the member within its pool; the request was about that member alone.
            if error.field is not None and error.field.startswith("members["):
                error.field = error.field.partition("].")[2] or None
            raise

    def _one(self, snapshot: Snapshot, pool: Pool, member: Member) -> Answer:
        return ok(member_view(snapshot, self.runtime, pool, member),
                  ETag=entity_tag(snapshot.revisions.get(member.id, 0)))


def _sortable(number: int | str) -> str:
    return f"{int(number):0{_DIGITS}d}"
