# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Everything the REST API can refuse, and what that looks like.

``{"error": {"code": ..., "message": ..., "field": ...}}``, always; a traceback never leaves the log.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from typing import Any

import msgspec
import webob

from lbapp.config import model
from lbapp.config.store import Conflict, Invalid, NotFound, StoreError


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong. ``field`` is the path of the value to blame, where there is one."""

    code: str
    message: str
    field: str | None = None


class ErrorAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The body of every answer that is not a success."""

    error: ErrorBody


class Problem(enum.Enum):
    """Code, HTTP status and reason phrase of each kind of refusal."""

    INVALID = ("invalid", "400 Bad Request")
    UNAUTHORIZED = ("unauthorized", "401 Unauthorized")
    NOT_FOUND = ("not_found", "404 Not Found")
    METHOD_NOT_ALLOWED = ("method_not_allowed", "405 Method Not Allowed")
    TIMEOUT = ("timeout", "408 Request Timeout")
    CONFLICT = ("conflict", "409 Conflict")
    LENGTH_REQUIRED = ("length_required", "411 Length Required")
    TOO_LARGE = ("too_large", "413 Content Too Large")
    UNSUPPORTED_MEDIA_TYPE = ("unsupported_media_type", "415 Unsupported Media Type")
    INTERNAL = ("internal", "500 Internal Server Error")
    UNAVAILABLE = ("unavailable", "503 Service Unavailable")

    @property
    def code(self) -> str:
        """The machine-readable code in the body."""
        return self.value[0]

    @property
    def status(self) -> str:
        """The HTTP status line's text."""
        return self.value[1]


class ApiError(Exception):
    """A request that is refused."""

    def __init__(self, problem: Problem, message: str, field: str | None = None,
                 headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.problem = problem
        self.message = message
        self.field = field
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The JSON text of the answer."""
        return msgspec.json.encode(ErrorAnswer(error=ErrorBody(
            code=self.problem.code, message=self.message, field=self.field)))

    def response(self) -> webob.Response:
        """The whole answer."""
        return webob.Response(status=self.problem.status, body=self.body(), content_type="application/json",
                              headerlist=[("Content-Type", "application/json"), *self.headers.items()])


def invalid(message: str, field: str | None = None) -> ApiError:
    """A 400; the message says what was expected."""
    return ApiError(Problem.INVALID, message, field)


def joined(prefix: str, path: str) -> str:
    """A field's path below another's: ``pool`` and ``members[0]`` give ``pool.members[0]``."""
    if not prefix or not path:
        return prefix or path
    return prefix + path if path.startswith("[") else f"{prefix}.{path}"


_AT = re.compile(r" - at `\$\.?(?P<path>.*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<field>[^`]*)`$")
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<field>.*)`$", re.DOTALL)
_NAMED = re.compile(r"^(?P<field>[a-z_][a-z_0-9]*(?:\[\d+\])?(?:\.[a-z_]+(?:\[\d+\])?)*): (?P<text>.*)$", re.DOTALL)

_ENUMS: dict[str, type[enum.Enum]] = {
    "lb_algorithm": model.Algorithm,
    "protocol": model.Protocol,
    "state": model.State,
    "decision": model.Decision,
    "application": model.Application,
    "binding": model.Binding,
    "type": model.RuleType,
    "compare_type": model.CompareType,
    "action": model.PolicyAction,
}


def from_validation(error: Exception, prefix: str = "", known: tuple[str, ...] = ()) -> ApiError:
    """A 400 for what the model refused.

    Args:
        error: msgspec's error, or one of the model's own inside it.
        prefix: the path of the object that was validated.
        known: its fields, to name when it had another one.
    """
    text = str(error)
    path = prefix
    at = _AT.search(text)
    if at is not None:
        path = joined(prefix, at["path"])
        text = text[:at.start()]
    missing, unknown, named = _MISSING.match(text), _UNKNOWN.match(text), _NAMED.match(text)
    if missing is not None:
        return invalid("required, but missing", joined(path, missing["field"]))
    if unknown is not None:
        fields = known if at is None else _fields_at(at["path"], known)
        return invalid(f"unknown field; expected one of {', '.join(fields)}", joined(path, unknown["field"]))
    if named is not None:
        return invalid(named["text"], joined(path, named["field"]))
    if text.startswith("Invalid enum value"):
        values = _ENUMS.get(re.split(r"[.\[]", path)[-1])
        if values is not None:
            text = f"expected one of {', '.join(str(one.value) for one in values)}, got {text.rpartition(' ')[2]}"
    elif text.startswith("Expected "):
        text = "e" + text.replace("`", "")[1:]
    return invalid(text, path or None)


def _fields_at(path: str, known: tuple[str, ...]) -> tuple[str, ...]:
    if path.startswith("l7_policies"):
        return editable(model.L7Rule if ".rules[" in path else model.L7Policy)
    return editable(model.Member) if path.startswith("members") else known


def from_store(error: StoreError, prefixes: Mapping[int, str] | None = None) -> ApiError:
    """The answer for a change that the store did not make.

    Args:
        prefixes: the path in the request of what each change came from.
    """
    problem = Problem.UNAVAILABLE
    if isinstance(error, Invalid):
        problem = Problem.INVALID
    elif isinstance(error, NotFound):
        problem = Problem.NOT_FOUND
    elif isinstance(error, Conflict):
        problem = Problem.CONFLICT
    field = error.field
    message = error.message
    if field is not None:
        message = message.removeprefix(f"{field}: ")
        field = joined((prefixes or {}).get(-1 if error.change is None else error.change, ""), field)
    elif error.change is not None and prefixes:
        field = prefixes.get(error.change) or None
    headers = {"Retry-After": "1"} if problem is Problem.UNAVAILABLE else None
    return ApiError(problem, message, field, headers)


READ_ONLY = ("id", "number", "revision", "provisioning_status", "operating_status", "health_status",
             "effective_weight")
"""What answers have and requests must not."""


def editable(kind: Any) -> tuple[str, ...]:
    """The fields of a kind of resource that a request may have."""
    return tuple(field for field in kind.__struct_fields__ if field not in READ_ONLY)
