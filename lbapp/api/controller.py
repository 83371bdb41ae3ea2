# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The REST API's routes, as a Ryu controller, and the guard in front of every request.

Owns which path and method lead where, who may call at all, and that a body is complete and not
too large before anything looks at it. Import ``eventlet.wsgi`` with ``ALREADY_HANDLED`` set
before this module: Ryu wants it (the launcher does).
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterable
from typing import Any

import eventlet
import msgspec
import webob
from ryu.app.wsgi import ControllerBase, WSGIApplication, route

from lbapp.api.auth import Tokens
from lbapp.api.errors import ApiError, Problem, from_store, invalid
from lbapp.api.happenings import Happenings
from lbapp.api.live import Live
from lbapp.api.members import Members
from lbapp.api.openapi import document
from lbapp.api.remembered import Remembered
from lbapp.api.resources import Answer, Collection, Pools, VirtualServers, ok
from lbapp.api.sites import Sites
from lbapp.api.switches import Switches
from lbapp.api.views import Runtime
from lbapp.config.model import Network
from lbapp.config.store import Store, StoreError

LOG = logging.getLogger(__name__)

BODY_LIMIT = 16 << 20
BULK_BODY_LIMIT = 64 << 20
BULK_PATH = "/v1/config"
HEALTH_PATH = "/healthz"
BODY_SECONDS = 10.0
BODY_RATE = 1 << 20
"""Bytes a second that a body must come in with, after its first ``BODY_SECONDS``."""
_CHUNK = 1 << 16
_AUTHORIZED = "lbapp.authorized"
CLOSE = "lbapp.close"
"""In a request's environment: call it to have the connection closed after the answer."""

Handlers = dict[str, Callable[..., Answer]]


class Api:
    """What the routes lead to.

    Args:
        store: the configuration.
        runtime: the running controller.
        tokens: who may.
    """

    def __init__(self, store: Store, runtime: Runtime, tokens: Tokens) -> None:
        self.store = store
        self.tokens = tokens
        self.virtual_servers = VirtualServers(store, runtime)
        self.pools = Pools(store, runtime)
        self.networks = Collection(Network, store, runtime)
        self.members = Members(store, runtime)
        self.switches = Switches(store, runtime)
        self.sites = Sites(store)
        self.live = Live(runtime)
        self.happenings = Happenings(runtime)
        self.remembered = Remembered(runtime)
        self.openapi = msgspec.json.encode(document())


def _answered(request: webob.Request, handlers: Handlers, *arguments: str) -> webob.Response:
    """Carry out a request; whatever happens, the answer is JSON."""
    try:
        if not request.environ.get(_AUTHORIZED):
            raise _unauthorized()
        handler = handlers.get("GET" if request.method == "HEAD" else request.method)
        if handler is None:
            allowed = ", ".join([*handlers, *(["HEAD"] if "GET" in handlers else [])])
            raise ApiError(Problem.METHOD_NOT_ALLOWED, f"expected one of {allowed}", headers={"Allow": allowed})
        answer = handler(request, *arguments)
    except ApiError as error:
        return error.response()
    except StoreError as error:
        return from_store(error).response()
    except Exception:
        LOG.exception("%s %s failed", request.method, request.path)
        return ApiError(Problem.INTERNAL, "internal error, see the log").response()
    response = webob.Response(status=answer.status, content_type="application/json", charset=None)
    for name, value in answer.headers.items():
        response.headers[name] = value
    if answer.body is None:
        response.headers.pop("Content-Type", None)
    else:
        response.body = answer.body if isinstance(answer.body, bytes) else msgspec.json.encode(answer.body)
    return response


def _crud(collection: Any) -> Handlers:
    return {"GET": collection.show, "PUT": collection.replace, "PATCH": collection.patch,
            "DELETE": collection.delete}


def _all(collection: Any) -> Handlers:
    return {"GET": collection.index, "POST": collection.create}


class ApiController(ControllerBase):
    """Ryu's view of the API: one method a path. Methods are told apart in :func:`_answered`, for its 405."""

    @property
    def api(self) -> Api:
        """What :func:`register` was given."""
        return self.data

    @route("lbapp", "/v1/virtual-servers")
    def virtual_servers(self, req: webob.Request, **_: str) -> webob.Response:
        """All virtual servers."""
        return _answered(req, _all(self.api.virtual_servers))

    @route("lbapp", "/v1/virtual-servers/{reference}")
    def virtual_server(self, req: webob.Request, reference: str, **_: str) -> webob.Response:
        """One virtual server."""
        return _answered(req, _crud(self.api.virtual_servers), reference)

    @route("lbapp", "/v1/pools")
    def pools(self, req: webob.Request, **_: str) -> webob.Response:
        """All pools."""
        return _answered(req, _all(self.api.pools))

    @route("lbapp", "/v1/pools/{reference}")
    def pool(self, req: webob.Request, reference: str, **_: str) -> webob.Response:
        """One pool."""
        return _answered(req, _crud(self.api.pools), reference)

    @route("lbapp", "/v1/pools/{pool}/members")
    def members(self, req: webob.Request, pool: str, **_: str) -> webob.Response:
        """A pool's members."""
        return _answered(req, _all(self.api.members), pool)

    @route("lbapp", "/v1/pools/{pool}/members/{reference}")
    def member(self, req: webob.Request, pool: str, reference: str, **_: str) -> webob.Response:
        """One member."""
        return _answered(req, _crud(self.api.members), pool, reference)

    @route("lbapp", "/v1/networks")
    def networks(self, req: webob.Request, **_: str) -> webob.Response:
        """All networks."""
        return _answered(req, _all(self.api.networks))

    @route("lbapp", "/v1/networks/{reference}")
    def network(self, req: webob.Request, reference: str, **_: str) -> webob.Response:
        """One network."""
        return _answered(req, _crud(self.api.networks), reference)

    @route("lbapp", BULK_PATH)
    def config(self, req: webob.Request, **_: str) -> webob.Response:
        """The whole configuration."""
        return _answered(req, {"GET": self.api.sites.show, "PUT": self.api.sites.replace})

    @route("lbapp", "/v1/switches")
    def switches(self, req: webob.Request, **_: str) -> webob.Response:
        """The switches."""
        return _answered(req, {"GET": self.api.switches.index})

    @route("lbapp", "/v1/switches/{reference}")
    def switch(self, req: webob.Request, reference: str, **_: str) -> webob.Response:
        """One switch, and what is asked of it."""
        return _answered(req, _crud(self.api.switches), reference)

    @route("lbapp", "/v1/connections")
    def connections(self, req: webob.Request, **_: str) -> webob.Response:
        """The connections."""
        return _answered(req, {"GET": self.api.live.connections})

    @route("lbapp", "/v1/connections/{reference}")
    def connection(self, req: webob.Request, reference: str, **_: str) -> webob.Response:
        """One connection."""
        return _answered(req, {"GET": self.api.live.connection}, reference)

    @route("lbapp", "/v1/server-agents")
    def server_agents(self, req: webob.Request, **_: str) -> webob.Response:
        """The agents beside servers."""
        return _answered(req, {"GET": self.api.live.server_agents})

    @route("lbapp", "/v1/server-agents/{name}")
    def server_agent(self, req: webob.Request, name: str, **_: str) -> webob.Response:
        """One of them, for itself."""
        return _answered(req, {"PUT": self.api.live.announce, "DELETE": self.api.live.withdraw}, name)

    @route("lbapp", "/v1/server-agents/{name}/report")
    def server_agent_report(self, req: webob.Request, name: str, **_: str) -> webob.Response:
        """What it says of its servers' load."""
        return _answered(req, {"PUT": self.api.live.report}, name)

    @route("lbapp", "/v1/events")
    def events(self, req: webob.Request, **_: str) -> webob.Response:
        """What happened."""
        return _answered(req, {"GET": self.api.happenings.events})

    @route("lbapp", "/v1/persistence")
    def persistence(self, req: webob.Request, **_: str) -> webob.Response:
        """Who is known again."""
        return _answered(req, {"GET": self.api.remembered.index, "DELETE": self.api.remembered.clear})

    @route("lbapp", "/v1/draining")
    def draining(self, req: webob.Request, **_: str) -> webob.Response:
        """Who is draining."""
        return _answered(req, {"GET": self.api.happenings.draining})

    @route("lbapp", "/v1/stats")
    def stats(self, req: webob.Request, **_: str) -> webob.Response:
        """The counters."""
        return _answered(req, {"GET": self.api.live.statistics})

    @route("lbapp", "/v1/openapi.json")
    def openapi(self, req: webob.Request, **_: str) -> webob.Response:
        """The description of all this."""
        return _answered(req, {"GET": lambda request: ok(self.api.openapi)})


class Guard:
    """The WSGI application to serve: lets nothing through to Ryu's that is not authorized and whole."""

    def __init__(self, wsgi: WSGIApplication, api: Api) -> None:
        self._wsgi = wsgi
        self._api = api

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """WSGI."""
        try:
            if environ["PATH_INFO"] == HEALTH_PATH:
                return self._health(environ)(environ, start_response)
            self._authorize(environ)
            if self._wsgi.mapper.match(environ=environ) is None:
                raise ApiError(Problem.NOT_FOUND, f"nothing at {environ['PATH_INFO']}")
            self._read_body(environ)
            return self._wsgi(environ, start_response)
        except ApiError as error:
            if environ["wsgi.input"] is environ.get("eventlet.input"):
                # Its body was not read, and is not going to be.
                environ.get(CLOSE, _nothing)()
            return error.response()(environ, start_response)
        except Exception:
            LOG.exception("%s %s failed", environ["REQUEST_METHOD"], environ["PATH_INFO"])
            environ.get(CLOSE, _nothing)()
            return ApiError(Problem.INTERNAL, "internal error, see the log").response()(environ, start_response)

    def _health(self, environ: dict[str, Any]) -> webob.Response:
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            raise ApiError(Problem.METHOD_NOT_ALLOWED, "expected one of GET, HEAD", headers={"Allow": "GET, HEAD"})
        available = self._api.store.available
        return webob.Response(json_body={"status": "ok" if available else "degraded",
                                         "database": "connected" if available else "away"})

    def _authorize(self, environ: dict[str, Any]) -> None:
        scheme, _, token = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        if scheme.lower() != "bearer" or not self._api.tokens.valid(token.strip()):
            raise _unauthorized()
        environ[_AUTHORIZED] = True

    def _read_body(self, environ: dict[str, Any]) -> None:
        length_text = environ.get("CONTENT_LENGTH")
        if environ.get("HTTP_TRANSFER_ENCODING") or (
                length_text is None and environ["REQUEST_METHOD"] in ("POST", "PUT", "PATCH")):
            raise ApiError(Problem.LENGTH_REQUIRED, "expected a body with Content-Length")
        if length_text is not None and not (length_text.isascii() and length_text.isdigit() and len(length_text) < 20):
            raise invalid(f"expected a number, got {length_text!r}", "Content-Length")
        length = int(length_text or 0)
        limit = BULK_BODY_LIMIT if environ["PATH_INFO"] == BULK_PATH else BODY_LIMIT
        if length > limit:
            raise ApiError(Problem.TOO_LARGE, f"expected a body of at most {limit} bytes, got {length}")
        parts, missing = [], length
        # OSError: the socket's own timeout, or a connection that was reset.
        with eventlet.Timeout(BODY_SECONDS + length / BODY_RATE, False), contextlib.suppress(OSError):
            while missing:
                part = environ["wsgi.input"].read(min(missing, _CHUNK))
                if not part:
                    break
                parts.append(part)
                missing -= len(part)
        if missing:
            raise ApiError(Problem.TIMEOUT, "the body did not arrive in time")
        environ["wsgi.input"] = io.BytesIO(b"".join(parts))


def _nothing() -> None:
    """Where the server offers no way to close the connection."""


def _unauthorized() -> ApiError:
    return ApiError(Problem.UNAUTHORIZED, "expected a valid token in the header Authorization: Bearer TOKEN",
                    headers={"WWW-Authenticate": "Bearer"})


def register(wsgi: WSGIApplication, store: Store, runtime: Runtime, tokens: Tokens) -> Guard:
    """Add the API to Ryu's WSGI application.

    Returns:
        What to serve (:func:`lbapp.api.server.serve`). Requests that reach the API's routes any
        other way, such as through Ryu's own server, are answered 401.
    """
    api = Api(store, runtime, tokens)
    wsgi.register(ApiController, api)
    return Guard(wsgi, api)
