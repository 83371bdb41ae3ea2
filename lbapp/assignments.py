# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What people type for resources: ``field=value`` and ``ADDRESS:PORT``, checked against the model.

Owns the reading of such words, nothing else.
"""

from __future__ import annotations

import difflib
import enum
import typing
from collections.abc import Iterable
from typing import Any

import msgspec

from lbapp.config.fields import canonical_address
from lbapp.config.model import Member, Network, Pool, VirtualServer
from lbapp.config.rows import DOCUMENTS
from lbapp.site import FIELDS

KINDS: dict[str, type[Any]] = {
    "virtual-servers": VirtualServer, "pools": Pool, "members": Member, "networks": Network,
}


class WordError(ValueError):
    """A word that does not say what it should; the text says what was expected."""


def assignments(kind: str, words: Iterable[str]) -> dict[str, Any]:
    """The fields that ``field=value`` words give, as JSON has them.

    ``pool=NAME`` of a virtual server is left as ``pool``. ``null`` empties a field that may be empty.

    Raises:
        WordError: unknown field or unusable value.
    """
    cls = KINDS[kind]
    hints = typing.get_type_hints(cls, include_extras=True)
    known = [field for field in FIELDS[cls] if field not in DOCUMENTS | {"members", "default_pool_id"}]
    if cls is VirtualServer:
        known.append("pool")
    given: dict[str, Any] = {}
    for word in words:
        field, equals, text = word.partition("=")
        if not equals:
            raise WordError(f"expected field=value, got {word!r}")
        field = field.strip().replace("-", "_")
        if field not in known:
            close = difflib.get_close_matches(field, known, 1)
            raise WordError(f"{field}: unknown field; "
                            + (f"did you mean {close[0]}?" if close else f"expected {', '.join(known)}"))
        if field in given:
            raise WordError(f"{field}: given twice")
        if field == "pool":
            given[field] = None if text in ("", "null", "none") else text
        else:
            given[field] = value(hints[field], field, text)
    return given


def value(hint: Any, field: str, text: str) -> Any:
    """A value of a field from what was typed, by the field's type.

    Raises:
        WordError: it is not one.
    """
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        by_word = {str(one.value).lower(): one.value for one in hint}
        if text.lower().replace("-", "_") not in by_word:
            raise WordError(f"{field}: expected {', '.join(map(str, by_word.values()))}, got {text!r}")
        return by_word[text.lower().replace("-", "_")]
    if hint is bool and text.lower() in ("yes", "on", "no", "off"):
        return text.lower() in ("yes", "on")
    if type(None) in typing.get_args(hint) and text.lower() in ("", "null", "none"):
        return None
    try:
        return msgspec.convert(text, hint, strict=False)
    except msgspec.ValidationError as error:
        message = str(error).replace("`", "")
        message = message[:1].lower() + message[1:].split(", got")[0]
        if hint is bool:
            message = "expected true or false"
        raise WordError(f"{field}: {message}, got {text!r}") from None


def endpoint(text: str) -> tuple[str, int]:
    """Address and port of ``ADDRESS:PORT``; an IPv6 address stands in brackets.

    Raises:
        WordError: it is something else.
    """
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise WordError(f"expected an IPv6 address in brackets, such as [fd00::1]:80, got {text!r}")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise WordError(f"expected ADDRESS:PORT, got {text!r}")
    try:
        return canonical_address(host), int(port)
    except ValueError as error:
        raise WordError(str(error)) from None


def member(text: str) -> dict[str, Any]:
    """The member that ``ADDRESS:PORT[:WEIGHT]`` stands for.

    Raises:
        WordError: it is something else.
    """
    head, bracket, tail = text.partition("]")
    if (tail if bracket else head).count(":") == 2:
        where, _, weight = text.rpartition(":")
        address, port = endpoint(where)
        hint = typing.get_type_hints(Member, include_extras=True)["weight"]
        return {"address": address, "protocol_port": port, "weight": value(hint, "weight", weight)}
    address, port = endpoint(text)
    return {"address": address, "protocol_port": port}
