# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Switches over REST: what the controller knows of them, and what operators ask of one.

A switch is there by connecting; what is asked of it is a resource of the store, which exists as long as it says
anything, whether the switch is connected or not. It is no part of the site document: draining is an act of operation,
and whoever applies a site meanwhile does not end it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import webob

from lbapp.api.errors import ApiError, Problem
from lbapp.api.requests import (
    check_if_match,
    dpid_of,
    entity_tag,
    json_object,
    merged,
    query,
    reject_read_only,
    resource_of,
    values_of,
)
from lbapp.api.resources import Answer, apply, ok
from lbapp.api.views import Runtime, SwitchView
from lbapp.config.model import Switch
from lbapp.config.snapshot import Snapshot
from lbapp.config.store import Change, Create, Delete, Store, Update, new_id


class Switches:
    """Requests to switches; see the module."""

    def __init__(self, store: Store, runtime: Runtime) -> None:
        self.store = store
        self.runtime = runtime

    def index(self, request: webob.Request) -> Answer:
        """GET of all."""
        query(request)
        return ok({"switches": sorted(self.runtime.switches(), key=lambda switch: switch.dpid)})

    def show(self, request: webob.Request, reference: str) -> Answer:
        """GET of one."""
        query(request)
        return self._one(self.store.snapshot, dpid_of(reference, "id"))

    def replace(self, request: webob.Request, reference: str) -> Answer:
        """PUT of what is asked of one: what is left out gets its default."""
        values = json_object(request)
        return self._ask(request, reference, lambda _: values)

    def patch(self, request: webob.Request, reference: str) -> Answer:
        """PATCH (JSON Merge Patch, RFC 7396) of the same."""
        change = json_object(request)
        reject_read_only(change)
        return self._ask(request, reference, lambda current: merged(current, change))

    def delete(self, request: webob.Request, reference: str) -> Answer:
        """DELETE: nothing is asked of it any more."""
        query(request)
        dpid = dpid_of(reference, "id")

        def changes(snapshot: Snapshot) -> list[Change]:
            current = snapshot.find(Switch, dpid)
            if current is None:
                raise ApiError(Problem.NOT_FOUND, f"nothing is asked of switch {dpid}")
            check_if_match(request, snapshot.revisions[current.id])
            return [Delete(Switch, current.id, snapshot.revisions[current.id])]

        apply(self.store, changes)
        return Answer(204, None, {})

    def _ask(self, request: webob.Request, reference: str,
             fields: Callable[[dict[str, Any]], dict[str, Any]]) -> Answer:
        query(request)
        dpid, identifier = dpid_of(reference, "id"), new_id()

        def changes(snapshot: Snapshot) -> list[Change]:
            current = snapshot.find(Switch, dpid)
            values = values_of(current) if current is not None else {"name": dpid}
            wanted = resource_of({"name": dpid, **fields(values)}, Switch)
            if wanted.name != dpid:
                raise ApiError(Problem.INVALID, f"expected the switch of the path, {dpid}", "name")
            check_if_match(request, snapshot.revisions[current.id] if current is not None else 0)
            idle = wanted == Switch(name=dpid)
            if current is None:
                return [] if idle else [Create(msgspec.structs.replace(wanted, id=identifier))]
            return [Delete(Switch, current.id) if idle else Update(msgspec.structs.replace(wanted, id=current.id))]

        return self._one(apply(self.store, changes), dpid, asked=True)

    def _one(self, snapshot: Snapshot, dpid: str, asked: bool = False) -> Answer:
        known = next((one for one in self.runtime.switches() if one.dpid == dpid), None)
        if known is None:
            if not asked:
                raise ApiError(Problem.NOT_FOUND, f"no switch {dpid} is connected, and nothing is asked of it")
            known = SwitchView(dpid=dpid, address="", connected=False)
        current = snapshot.find(Switch, dpid)
        return ok(known, ETag=entity_tag(snapshot.revisions.get(current.id, 0) if current is not None else 0))
