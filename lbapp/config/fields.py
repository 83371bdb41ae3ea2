# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Types and checks that fields of the configuration share. Each check's message begins with the field."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec
import netaddr
import re2

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=255, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]*$(?!\n)")]
MemberName = Annotated[str, msgspec.Meta(max_length=255, pattern=r"^[A-Za-z0-9._:-]*$(?!\n)")]
Text = Annotated[str, msgspec.Meta(max_length=1024, pattern=r"^[^\u0000]*$")]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Weight = Annotated[int, msgspec.Meta(ge=0, le=256)]
Seconds = Annotated[int, msgspec.Meta(ge=0, le=65535)]
ConnectionLimit = Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)]
Number = Annotated[int, msgspec.Meta(ge=0, lt=2**24)]
RuleText = Annotated[str, msgspec.Meta(max_length=512, pattern=r"^[^\u0000\r\n]*$(?!\n)")]
Location = Annotated[str, msgspec.Meta(min_length=1, max_length=2048, pattern=r"^[!-~]+$(?!\n)")]
Count = Annotated[int, msgspec.Meta(ge=1, le=100)]
Rate = Annotated[int, msgspec.Meta(ge=-1, le=10_000_000)]
Burst = Annotated[int, msgspec.Meta(ge=0, le=10_000_000)]
Duration = Annotated[float, msgspec.Meta(ge=0.05, le=86_400)]
"""Seconds, or parts of one."""

_DPID = re.compile(r"(?:0[xX])?([0-9a-fA-F]{1,16})")

R = TypeVar("R", bound=msgspec.Struct)
UNLIMITED = -1
REGEX = re2.Options()
"""How regular expressions are read: bytes, bounded memory, and no complaint on standard error."""
REGEX.encoding = re2.Options.Encoding.LATIN1
REGEX.log_errors = False
REGEX.max_mem = 1 << 20
REGEX_MOST = 500
"""Instructions of a compiled regular expression: larger ones no longer fit into that memory, and are slow then."""
TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
"""The name of a header (RFC 9110)."""


def canonical_address(value: str) -> str:
    """Return the canonical text of an IPv4 or IPv6 address.

    Raises:
        ValueError: the text is not an address, or it carries a prefix length.
    """
    try:
        address = netaddr.IPAddress(value, flags=netaddr.INET_PTON)
    except (netaddr.AddrFormatError, ValueError, TypeError) as error:
        raise ValueError(f"expected an IPv4 or IPv6 address, got {value!r}") from error
    return str(address)


def canonical_dpid(value: str) -> str:
    """Return the canonical text of a datapath id: its 16 hexadecimal digits.

    Raises:
        ValueError: the text is none; leading zeros may be left out, and 0x may be there.
    """
    found = _DPID.fullmatch(value)
    if found is None:
        raise ValueError(f"expected a datapath id (1 to 16 hexadecimal digits), got {value!r}")
    return found[1].lower().zfill(16)


def set_field(resource: Any, field: str, value: Any) -> None:
    """Write a field of a resource that is being made."""
    msgspec.structs.force_setattr(resource, field, value)


def replaced(resource: R, changes: Mapping[str, object]) -> R:
    """A copy of a resource with other values, which are known to be right."""
    copied = copy.copy(resource)
    for field, value in changes.items():
        set_field(copied, field, value)
    return copied


def address_field(resource: Any, field: str) -> None:
    """Make an address canonical; None stays.

    Raises:
        ValueError: it is none.
    """
    value = getattr(resource, field)
    if value is None:
        return
    try:
        set_field(resource, field, canonical_address(value))
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None


def unicast_field(resource: Any, field: str) -> None:
    """Refuse an address that no host can have.

    Raises:
        ValueError: it is such a one.
    """
    value = getattr(resource, field)
    if value is None:
        return
    address = netaddr.IPAddress(value)
    if address.is_multicast() or int(address) == 0 or value == "255.255.255.255" or address.is_loopback():
        raise ValueError(f"{field}: expected a unicast address that hosts can have, got {value!r}")


def _words(error: Exception) -> str:
    text = error.args[0] if error.args else ""
    return text.decode("latin-1") if isinstance(text, bytes) else str(text)


def check_regex(field: str, value: str) -> None:
    """Refuse what is no regular expression, or too large a one.

    Raises:
        ValueError: which of the two.
    """
    try:
        size = re2.compile(value.encode(), REGEX).programsize
    except re2.error as error:
        raise ValueError(f"{field}: expected a regular expression of RE2, got {value!r} "
                         f"({_words(error)})") from None
    if size > REGEX_MOST:
        raise ValueError(f"{field}: expected a regular expression of at most {REGEX_MOST} instructions, got "
                         f"{value!r} with {size}")


def octets(field: str, value: str) -> bytes:
    """The bytes that a text stands for: its own, or behind ``hex:`` those of its digits.

    Raises:
        ValueError: they are no digits.
    """
    if not value.startswith("hex:"):
        return value.encode()
    try:
        return bytes.fromhex(value[4:])
    except ValueError:
        raise ValueError(f"{field}: expected hexadecimal digits behind hex:, got {value!r}") from None
