# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Events and progress over REST: what happened to members, pools and switches, and who is draining. Changes nothing."""

from __future__ import annotations

import webob

from lbapp.api.errors import invalid
from lbapp.api.requests import dpid_of, limit_of, next_page, query
from lbapp.api.resources import Answer, ok
from lbapp.api.views import EventView, Runtime

FILTERS = ("kind", "pool", "member")


class Happenings:
    """Requests for what happened, and for what is under way."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def events(self, request: webob.Request) -> Answer:
        """GET of events, oldest first; ``marker`` is the number of the last one that is known already."""
        parameters = query(request, *FILTERS, "limit", "marker")
        limit = limit_of(parameters)
        marker = parameters.get("marker", "0")
        if not marker.isascii() or not marker.isdigit() or len(marker) > 18:
            raise invalid(f"expected the number of an event, got {marker!r}", "marker")
        wanted = {name: parameters[name] for name in FILTERS if name in parameters}
        found: list[EventView] = []
        for event in self.runtime.events(int(marker)):
            if all(getattr(event, name) == value for name, value in wanted.items()):
                found.append(event)
                if len(found) > limit:
                    break
        following = None
        if len(found) > limit:
            del found[limit:]
            following = next_page("/v1/events", limit, wanted, found[-1].number)
        return ok({"events": found, "next": following})

    def draining(self, request: webob.Request) -> Answer:
        """GET of all members and switches that are draining, with what they still have."""
        parameters = query(request, "pool", "switch")
        pool, switch = parameters.get("pool"), parameters.get("switch")
        if switch is not None:
            switch = dpid_of(switch)
        return ok({"draining": [one for one in self.runtime.draining()
                                if pool in (None, one.pool) and switch in (None, one.switch)]})
