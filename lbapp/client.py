# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A client of the controller's REST interface: for the command line, the demonstration and tests.

Owns the HTTP session, paging, and the translation of every failure into one exception with one
line of text. Knows paths and names of resources, not their meaning; never prints.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx

SECONDS = 30.0
APPLY_SECONDS = 300.0
"""A whole configuration of tens of thousands of members is one transaction."""
PAGE = 1000

COLLECTIONS = {
    "virtual-servers": "virtual_servers",
    "pools": "pools",
    "members": "members",
    "networks": "networks",
    "switches": "switches",
    "connections": "connections",
    "events": "events",
    "persistence": "persistence",
}
"""Paths below /v1 (members: below their pool) and the key of the list in the answer."""
UNPAGED = frozenset({"switches"})
"""Kinds whose list is always whole."""

Json = dict[str, Any]
Page = list[Json]


class ClientError(Exception):
    """The request failed; the text is one line for people."""


class Unreachable(ClientError):
    """Nobody answers at the URL, or not in time."""


class ApiError(ClientError):
    """The controller refused.

    Attributes:
        status: of HTTP.
        code: the controller's own word or number for it; the status where it gave none.
        message: what was expected.
        field: the field it is about, if it is about one.
    """

    def __init__(self, status: int, message: str, field: str | None = None, code: str | int | None = None) -> None:
        self.status = status
        self.code = status if code is None else code
        self.message = message
        self.field = field
        named = field and not message.startswith(f"{field}:")
        super().__init__(f"{field}: {message}" if named else message)


class Applied(NamedTuple):
    """What applying a configuration did, or would do: how many resources."""

    created: int
    updated: int
    deleted: int

    @property
    def total(self) -> int:
        """How many resources were touched."""
        return self.created + self.updated + self.deleted


class Config(NamedTuple):
    """The whole configuration, and the tag to give to :meth:`Client.apply` so that nobody else's change is lost."""

    document: Json
    etag: str | None


class Client:
    """One controller.

    Args:
        url: such as ``http://127.0.0.1:8080``.
        token: the bearer token; None sends none.
        ca: certificates to trust for https; by default the system's.
        seconds: to wait for an answer.
        transport: instead of the network, for tests.

    Raises:
        ClientError: the URL or the certificates cannot be used.
    """

    def __init__(self, url: str, token: str | None = None, ca: Path | str | None = None, seconds: float = SECONDS,
                 transport: httpx.BaseTransport | None = None) -> None:
        self.url = url.rstrip("/")
        try:
            scheme = httpx.URL(self.url).scheme
            if scheme not in ("http", "https") or not httpx.URL(self.url).host:
                raise httpx.InvalidURL("no host")
        except httpx.InvalidURL:
            raise ClientError(f"expected a URL such as http://127.0.0.1:8080, got {url!r}") from None
        # Without TLS there is nothing to verify, and loading the certificates takes longer than most requests.
        verify: ssl.SSLContext | bool = False
        if scheme == "https":
            try:
                verify = ssl.create_default_context(cafile=str(ca) if ca else None)
            except (OSError, ssl.SSLError) as error:
                raise ClientError(f"{ca}: not usable as CA certificates: {error.strerror or error}") from None
        headers = {"Accept": "application/json"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        # No proxies from the environment, no redirects: the token goes to this URL and nowhere else.
        try:
            self._http = httpx.Client(base_url=self.url, headers=headers, verify=verify, timeout=seconds,
                                      trust_env=False, follow_redirects=False, transport=transport)
        except (ValueError, UnicodeError):
            raise ClientError("expected a token of printable ASCII characters") from None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def request(self, method: str, path: str, body: Any = None, params: Mapping[str, Any] | None = None,
                etag: str | None = None, seconds: float | None = None) -> httpx.Response:
        """Send a request that has to succeed.

        Args:
            etag: sent as If-Match.

        Raises:
            Unreachable: no answer.
            ApiError: an error status.
        """
        headers = {"If-Match": etag} if etag else {}
        try:
            response = self._http.request(method, path, json=body, params=params or None, headers=headers,
                                          timeout=seconds or self._http.timeout)
        except httpx.TimeoutException:
            raise Unreachable(f"the controller at {self.url} did not answer in time") from None
        except httpx.ConnectError as error:
            if "CERTIFICATE" in str(error) or "SSL" in str(error):
                raise Unreachable(f"no TLS connection to {self.url}: {error} (see --ca)") from None
            raise Unreachable(f"no controller answers at {self.url}; start one with `lbapp run`") from None
        except httpx.RemoteProtocolError:
            raise Unreachable(f"what answers at {self.url} ended the connection or speaks no HTTP "
                              "(https where TLS is on)") from None
        except httpx.HTTPError as error:
            raise Unreachable(f"{self.url}: {error}") from None
        if not response.is_success:
            raise _refusal(response)
        return response

    def call(self, method: str, path: str, body: Any = None, **options: Any) -> Any:
        """Like :meth:`request`, and return the answer's JSON; None where it is empty."""
        response = self.request(method, path, body, **options)
        if not response.content:
            return None
        try:
            return response.json()
        except ValueError:
            raise ClientError(f"{self.url} answered {method} {path} with something other than JSON; "
                              "is it an lbapp controller?") from None

    # ------------------------------------------------------------------ resources

    def list(self, kind: str, pool: str | None = None, limit: int | None = None,
             filters: Mapping[str, str] | None = None) -> Page:
        """All resources of a kind, page by page.

        Args:
            kind: a key of :data:`COLLECTIONS`.
            pool: id or name, for members.
            limit: no more than so many.
            filters: query parameters.
        """
        found: Page = []
        for page in self.pages(kind, pool, limit, filters):
            found += page
        return found if limit is None else found[:limit]

    def pages(self, kind: str, pool: str | None = None, limit: int | None = None,
              filters: Mapping[str, str] | None = None) -> Iterator[Page]:
        """The pages of :meth:`list`, fetched as they are asked for."""
        path, key = self._path(kind, pool=pool), COLLECTIONS[kind]
        first: dict[str, Any] = dict(filters or {})
        if kind not in UNPAGED:
            first["limit"] = PAGE if limit is None else min(limit, PAGE)
        params: dict[str, Any] | None = first
        left, target = limit, path
        while True:
            answer = self.call("GET", target, params=params)
            page = answer.get(key) if isinstance(answer, dict) else None
            if not isinstance(page, list):
                raise ClientError(f"{self.url} answered {path} without {key}; is it an lbapp controller?")
            yield page
            following = answer.get("next")
            left = None if left is None else left - len(page)
            # An empty page or the same one again would go on for ever.
            if not following or following == target or not page or (left is not None and left <= 0):
                return
            if not str(following).startswith(f"{path}?"):
                raise ClientError(f"{self.url} answered {path} with a next page elsewhere: {following}")
            target, params = str(following), None

    def get(self, kind: str, reference: str, pool: str | None = None) -> Json:
        """One resource by id or name; a member also by ``address:port``."""
        return self.call("GET", self._path(kind, reference, pool))

    def create(self, kind: str, body: Json, pool: str | None = None) -> Json:
        """Create a resource and return it."""
        return self.call("POST", self._path(kind, pool=pool), body)

    def update(self, kind: str, reference: str, changes: Json, pool: str | None = None,
               etag: str | None = None) -> Json:
        """Change some fields of a resource (PATCH) and return it."""
        return self.call("PATCH", self._path(kind, reference, pool), changes, etag=etag)

    def delete(self, kind: str, reference: str, pool: str | None = None) -> None:
        """Delete a resource."""
        self.call("DELETE", self._path(kind, reference, pool))

    def config(self) -> Config:
        """The whole configuration."""
        response = self.request("GET", "/v1/config", seconds=APPLY_SECONDS)
        try:
            document = response.json()
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise ClientError(f"{self.url} answered /v1/config with something other than a configuration")
        return Config(document, response.headers.get("ETag"))

    def apply(self, document: Json, dry_run: bool = False, etag: str | None = None) -> Applied:
        """Make a site document the whole configuration.

        Args:
            document: networks, pools and virtual_servers.
            dry_run: only say what would be done.
            etag: from :meth:`config`; refused (412) if the configuration changed since.
        """
        answer = self.call("PUT", "/v1/config", document, params={"dry_run": "true"} if dry_run else None, etag=etag,
                           seconds=APPLY_SECONDS)
        return Applied(*(_count((answer or {}).get(field)) for field in Applied._fields))

    def stats(self) -> Json:
        """What the controller counted."""
        return self.call("GET", "/v1/stats")

    # ------------------------------------------------------------------ waiting

    def wait(self, seconds: float = SECONDS, until: Callable[[Client], Any] | None = None, what: str = "") -> Any:
        """Wait until the controller answers, or until something holds there.

        Args:
            seconds: how long at most.
            until: is called with this client until its result is true; refusals count as not yet.
            what: for the message.

        Returns:
            The last result of ``until``.

        Raises:
            Unreachable: not in time.
        """
        deadline = time.monotonic() + seconds
        pause, last = 0.02, "no answer"
        while True:
            try:
                result = until(self) if until is not None else self.answers()
                if result:
                    return result
                last = "not yet"
            except ClientError as error:
                last = str(error)
            if time.monotonic() + pause > deadline:
                raise Unreachable(f"waited {seconds:g} s for {what or f'the controller at {self.url}'}: {last}")
            time.sleep(pause)
            pause = min(pause * 1.5, 0.5)

    def answers(self) -> bool:
        """Whether a controller answers, whatever it thinks of the token."""
        try:
            self.request("GET", "/v1/switches", seconds=2.0)
        except ApiError as error:
            return error.status < 500
        except Unreachable:
            return False
        return True

    # ------------------------------------------------------------------ inside

    def _path(self, kind: str, reference: str | None = None, pool: str | None = None) -> str:
        if kind == "members":
            if not pool:
                raise ValueError("members are those of a pool")
            path = f"/v1/pools/{quote(pool, safe='')}/members"
        elif kind in COLLECTIONS:
            path = f"/v1/{kind}"
        else:
            raise ValueError(f"no such kind of resource: {kind}")
        return path if reference is None else f"{path}/{quote(reference, safe='')}"


def _count(value: Any) -> int:
    if isinstance(value, Mapping):
        return sum(_count(one) for one in value.values())
    return len(value) if isinstance(value, list) else int(value or 0)


def _refusal(response: httpx.Response) -> ApiError:
    """The exception for an error status, whoever wrote the body."""
    try:
        error = response.json()["error"]
        code, message, field = error.get("code"), str(error["message"]), error.get("field")
    except (ValueError, KeyError, TypeError, AttributeError):
        code, field = None, None
        message = f"{response.request.method} {response.request.url.path} was answered with {response.status_code} " \
                  f"{response.reason_phrase}"
    return ApiError(response.status_code, " ".join(message.split()), str(field) if field else None, code)
