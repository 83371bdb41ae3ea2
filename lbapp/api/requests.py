# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""From a request's text to checked values: bodies, query parameters, entity tags.

Everything here either returns a value of the model or raises an :class:`ApiError` that names the
field and what was expected.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec
import netaddr
import webob

from lbapp.api.errors import READ_ONLY, ApiError, Problem, editable, from_validation, invalid, joined
from lbapp.config.fields import canonical_dpid
from lbapp.config.model import Member, Network, Pool, Switch, VirtualServer

R = TypeVar("R", bound=VirtualServer | Pool | Network | Switch | Member)

JSON = "application/json"
MERGE_PATCH = "application/merge-patch+json"
DEFAULT_LIMIT = 100
MAX_LIMIT = 1000

_TAG = re.compile(r'\s*(?:(\*)|"([^"]*)"|W/"[^"]*")\s*(?:,|$)')


def json_object(request: webob.Request) -> dict[str, Any]:
    """The request's body, a JSON object.

    Raises:
        ApiError: 415 for another type of content, 400 for anything but a JSON object.
    """
    accepted = (JSON, MERGE_PATCH) if request.method == "PATCH" else (JSON,)
    if request.content_type not in accepted:
        raise ApiError(Problem.UNSUPPORTED_MEDIA_TYPE,
                       f"expected Content-Type {' or '.join(accepted)}, got {request.content_type or 'none'}")
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise ApiError(Problem.UNSUPPORTED_MEDIA_TYPE, "expected no Content-Encoding")
    try:
        body = msgspec.json.decode(request.body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(f"expected JSON: {error}") from None
    except RecursionError:
        raise invalid("expected JSON: nested too deeply") from None
    if not isinstance(body, dict):
        raise invalid("expected a JSON object")
    return body


def reject_read_only(values: Any, path: str = "") -> None:
    """Refuse fields that only answers have, in an object and in its members."""
    if not isinstance(values, dict):
        return
    for field in READ_ONLY:
        if field in values:
            raise invalid("read-only; expected it to be left out", joined(path, field))
    members = values.get("members")
    if isinstance(members, list):
        for index, member in enumerate(members):
            reject_read_only(member, joined(path, f"members[{index}]"))


def resource_of(values: Any, kind: type[R], path: str = "") -> R:
    """Validate one resource of a request.

    Args:
        path: where it lies in the request's body.
    """
    if not isinstance(values, dict):
        raise invalid("expected an object", path or None)
    reject_read_only(values, path)
    try:
        return msgspec.convert(values, kind)
    except (msgspec.ValidationError, netaddr.AddrFormatError) as error:
        raise from_validation(error, path, editable(kind)) from None


def values_of(resource: VirtualServer | Pool | Network | Switch | Member) -> dict[str, Any]:
    """The fields of a resource that requests may have, as JSON values."""
    values = msgspec.to_builtins(resource)
    for field in READ_ONLY:
        values.pop(field, None)
    for member in values.get("members", ()):
        for field in READ_ONLY:
            member.pop(field, None)
    return values


def merged(target: Any, patch: Any) -> Any:
    """JSON Merge Patch, RFC 7396. Neither argument is changed."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


def entity_tag(revision: int | str) -> str:
    """A revision as an entity tag."""
    return f'"{revision}"'


def check_if_match(request: webob.Request, revision: int | str) -> None:
    """Refuse a change whose ``If-Match`` names another revision than the current one.

    Raises:
        ApiError: 409 for a stale tag, 400 for a header that is not one.
    """
    header = request.headers.get("If-Match")
    if header is None:
        return
    at = 0
    while at < len(header):
        match = _TAG.match(header, at)
        if match is None:
            raise invalid(f'expected If-Match to be * or tags such as "3", got {header!r}', "If-Match")
        if match[1] or match[2] == str(revision):
            return
        at = match.end()
    raise ApiError(Problem.CONFLICT, f"changed in the meantime: it has ETag {entity_tag(revision)} now, "
                                     f"not {header}", "If-Match")


def query(request: webob.Request, *allowed: str) -> Mapping[str, str]:
    """The query parameters, each at most once.

    Raises:
        ApiError: 400 for one that is not in ``allowed``.
    """
    found: dict[str, str] = {}
    try:
        items = list(request.GET.items())
    except UnicodeDecodeError:
        raise invalid("expected a query in UTF-8") from None
    for key, value in items:
        if key not in allowed:
            raise invalid(f"unknown query parameter; expected one of {', '.join(allowed) or 'none'}", key)
        if key in found:
            raise invalid("expected this query parameter once", key)
        found[key] = value
    return found


def limit_of(parameters: Mapping[str, str]) -> int:
    """The ``limit`` query parameter."""
    text = parameters.get("limit", str(DEFAULT_LIMIT))
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not 1 <= int(text) <= MAX_LIMIT:
        raise invalid(f"expected 1 to {MAX_LIMIT}, got {text!r}", "limit")
    return int(text)


def next_page(path: str, limit: int, wanted: Mapping[str, str], marker: str | int) -> str:
    """Where the page after ``marker`` is, of a list that is filtered by ``wanted``."""
    kept = "".join(f"&{name}={quote(value, safe='')}" for name, value in wanted.items())
    return f"{path}?limit={limit}{kept}&marker={quote(str(marker), safe='')}"


def dpid_of(text: str, field: str = "switch") -> str:
    """A datapath id, as 16 hexadecimal digits."""
    try:
        return canonical_dpid(text)
    except ValueError as error:
        raise invalid(str(error), field) from None


def flag_of(parameters: Mapping[str, str], name: str) -> bool:
    """A query parameter that is ``true`` or ``false``."""
    text = parameters.get(name, "false")
    if text not in ("true", "false"):
        raise invalid(f"expected true or false, got {text!r}", name)
    return text == "true"
