# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Who is known again over REST: listed, and forgotten on demand. Never changes the configuration."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

import msgspec
import webob

from lbapp.api.errors import ApiError, Problem, invalid
from lbapp.api.requests import flag_of, limit_of, next_page, query
from lbapp.api.resources import Answer, ok
from lbapp.api.views import PersistenceView, Runtime
from lbapp.config.snapshot import breathe

FILTERS = ("pool", "member", "key")
LONGEST = 4096


class Removed(msgspec.Struct, frozen=True, kw_only=True):
    """How many clients are not known any more."""

    removed: int


class Remembered:
    """Requests for who is known again."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def index(self, request: webob.Request) -> Answer:
        """GET of clients, page by page, in the order of their ids."""
        parameters = query(request, *FILTERS, "limit", "marker")
        limit, after = limit_of(parameters), parameters.get("marker", "")
        wanted = _wanted(parameters)
        found: list[PersistenceView] = heapq.nsmallest(
            limit + 1, (one for one in breathe(self.runtime.persistence(wanted)) if one.id > after),
            key=lambda one: one.id)
        following = None
        if len(found) > limit:
            del found[limit:]
            following = next_page("/v1/persistence", limit, wanted, found[-1].id)
        return ok({"persistence": found, "next": following})

    def clear(self, request: webob.Request) -> Answer:
        """DELETE of clients: those of a pool, a member, a key; all of them only if that is said."""
        parameters = query(request, *FILTERS, "all")
        wanted = _wanted(parameters)
        if flag_of(parameters, "all") == bool(wanted):
            raise invalid("expected pool, member or key; or, to forget everybody, all=true alone", "all")
        removed = self.runtime.forget(wanted)
        if removed is None:
            raise ApiError(Problem.NOT_FOUND, "no such pool or member", "pool" if "pool" in wanted else "member")
        return ok(Removed(removed=removed))


def _wanted(parameters: Mapping[str, str]) -> dict[str, str]:
    wanted = {name: parameters[name] for name in FILTERS if name in parameters}
    for name, value in wanted.items():
        if not 0 < len(value) <= LONGEST:
            raise invalid(f"expected 1 to {LONGEST} characters", name)
    return wanted
