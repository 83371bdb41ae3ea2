# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Monitors: how a pool's members are checked, as an operator describes it. Frozen; does no I/O."""

from __future__ import annotations

import enum
import re
from typing import Annotated

import msgspec

from lbapp.config.fields import TOKEN, Count, Duration, MemberName, Port, RuleText, check_regex, octets


class MonitorType(enum.Enum):
    """What a check does."""

    TCP = "TCP"
    TCP_HALF_OPEN = "TCP_HALF_OPEN"
    HTTP = "HTTP"
    HTTPS = "HTTPS"
    UDP = "UDP"
    ICMP = "ICMP"
    DNS = "DNS"
    GRPC = "GRPC"
    EXTERNAL = "EXTERNAL"


class MonitorRule(enum.Enum):
    """How many of a pool's monitors a member has to satisfy."""

    ALL = "all"
    ANY = "any"


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A header that a check sends."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    value: RuleText = ""

    def __post_init__(self) -> None:
        if not TOKEN.fullmatch(self.name):
            raise ValueError(f"name: expected a header's name, got {self.name!r}")


_HTTP = frozenset({MonitorType.HTTP, MonitorType.HTTPS})
_SPEAKING = frozenset({MonitorType.TCP, MonitorType.UDP})
_OF: dict[str, frozenset[MonitorType]] = {
    "http_method": _HTTP, "url_path": _HTTP, "domain_name": _HTTP | {MonitorType.GRPC}, "expected_codes": _HTTP,
    "headers": _HTTP, "body_regex": _HTTP, "tls_verify": frozenset({MonitorType.HTTPS}),
    "send": _SPEAKING, "expect": _SPEAKING,
    "dns_name": frozenset({MonitorType.DNS}), "dns_type": frozenset({MonitorType.DNS}),
    "dns_answer": frozenset({MonitorType.DNS}), "grpc_service": frozenset({MonitorType.GRPC}),
    "command": frozenset({MonitorType.EXTERNAL}), "arguments": frozenset({MonitorType.EXTERNAL}),
}
"""The fields that mean something to some types only."""

_CODES = re.compile(r"[1-5][0-9]{2}(?:-[1-5][0-9]{2})?(?:, ?[1-5][0-9]{2}(?:-[1-5][0-9]{2})?)*")
_NAME = re.compile(r"(?=.{1,254}$)(?:[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.?)+|\.")


def codes(text: str) -> frozenset[int]:
    """The status codes of a list such as ``200,204,300-308``.

    Raises:
        ValueError: it is no such list.
    """
    if not _CODES.fullmatch(text):
        raise ValueError(f"expected_codes: expected such as 200 or 200,204 or 200-299, got {text!r}")
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if int(last or first) < int(first):
            raise ValueError(f"expected_codes: expected the lower code first, got {part.strip()!r}")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


class Monitor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One way of checking every member of a pool (names are Octavia's where it has them).

    Attributes:
        name: unique in its pool; its type in small letters where it is left out.
        interval: seconds from one check to the next; ``fast_interval`` while the member is changing.
        timeout: seconds until a check has failed.
        rise, fall: so many good, or bad, checks in a row change the member's state.
        jitter: each interval is longer or shorter by up to this share of it.
        port: another one than the member's own.
        http_method, url_path, domain_name, headers: what HTTP and HTTPS ask for (``domain_name``: Host and SNI).
        expected_codes, body_regex: what the answer must be like (of the body, the first 64 KiB count).
        tls_verify: whether the certificate must be valid for ``domain_name``.
        send, expect: for TCP and UDP; text, or ``hex:`` and digits. What comes back must contain ``expect``. UDP
            without ``expect``: down only where the host answers that the port is unreachable.
        dns_name, dns_type, dns_answer: what is asked, and an address or text that must be among the answers.
        grpc_service: of grpc.health.v1.Health/Check; empty: the server as a whole.
        command, arguments: an executable in the directory that ``lbapp run --monitor-scripts`` names; it gets address
            and port first. 0 is up.
    """

    type: MonitorType
    name: MemberName = ""
    interval: Duration = 5.0
    fast_interval: Duration = 1.0
    timeout: Annotated[float, msgspec.Meta(ge=0.05, le=300)] = 2.0
    rise: Count = 2
    fall: Count = 3
    jitter: Annotated[float, msgspec.Meta(ge=0, le=0.5)] = 0.1
    port: Port = 0
    admin_state_up: bool = True
    http_method: Annotated[str, msgspec.Meta(pattern=r"^(GET|HEAD|OPTIONS|POST)$(?!\n)")] = "GET"
    url_path: Annotated[str, msgspec.Meta(min_length=1, max_length=1024, pattern=r"^/[!-~]*$(?!\n)")] = "/"
    domain_name: Annotated[str, msgspec.Meta(max_length=253, pattern=r"^[A-Za-z0-9._:\[\]-]*$(?!\n)")] = ""
    expected_codes: Annotated[str, msgspec.Meta(max_length=128)] = "200"
    headers: Annotated[tuple[Header, ...], msgspec.Meta(max_length=16)] = ()
    body_regex: RuleText = ""
    tls_verify: bool = False
    send: RuleText = ""
    expect: RuleText = ""
    dns_name: Annotated[str, msgspec.Meta(max_length=254)] = ""
    dns_type: Annotated[str, msgspec.Meta(pattern=r"^(A|AAAA|CNAME|MX|NS|PTR|SOA|SRV|TXT)$(?!\n)")] = "A"
    dns_answer: RuleText = ""
    grpc_service: Annotated[str, msgspec.Meta(max_length=255, pattern=r"^[A-Za-z0-9_.]*$(?!\n)")] = ""
    command: Annotated[str, msgspec.Meta(max_length=128, pattern=r"^([A-Za-z0-9_][A-Za-z0-9_.-]*)?$(?!\n)")] = ""
    arguments: Annotated[tuple[RuleText, ...], msgspec.Meta(max_length=16)] = ()

    def __post_init__(self) -> None:
        if not self.name:
            msgspec.structs.force_setattr(self, "name", self.type.value.lower())
        for info in msgspec.structs.fields(type(self)):
            allowed = _OF.get(info.name)
            if allowed is not None and self.type not in allowed and getattr(self, info.name) != info.default:
                raise ValueError(f"{info.name}: expected none with type {self.type.value}")
        if self.timeout > self.interval:
            raise ValueError(f"timeout: expected at most the interval, {self.interval:g} s, got {self.timeout:g}")
        if self.fast_interval > self.interval:
            msgspec.structs.force_setattr(self, "fast_interval", self.interval)
        codes(self.expected_codes)
        if self.body_regex:
            check_regex("body_regex", self.body_regex)
            if self.http_method == "HEAD":
                raise ValueError("body_regex: expected none with http_method HEAD")
        octets("send", self.send)
        octets("expect", self.expect)
        if self.type is MonitorType.UDP and not self.send:
            raise ValueError("send: expected what to send, with type UDP")
        if self.tls_verify and not self.domain_name:
            raise ValueError("domain_name: expected the name that the certificate is for, with tls_verify")
        if (self.type is MonitorType.DNS) != bool(self.dns_name):
            raise ValueError("dns_name: expected a name to ask for, with type DNS")
        if self.dns_name and not _NAME.fullmatch(self.dns_name):
            raise ValueError(f"dns_name: expected a domain name, got {self.dns_name!r}")
        if (self.type is MonitorType.EXTERNAL) != bool(self.command):
            raise ValueError("command: expected the name of an executable, with type EXTERNAL")


class Passive(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What clients' own connections tell of a member.

    Attributes:
        failures: so many of them within ``window`` seconds, and it is down for ``hold`` seconds; then, without
            monitors, it is tried again.
        first_byte: seconds in which a member that was given what a client said must begin to answer; 0: as long as it
            likes.
        server_errors: whether an answer with a status of 5xx is a failure, too, where the binding sees answers.
    """

    failures: Count = 3
    window: Duration = 10.0
    hold: Duration = 10.0
    first_byte: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 0.0
    server_errors: bool = False


class Damping(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A member whose state changed ``changes`` times within ``window`` seconds stays down until it has been well for
    ``hold`` seconds."""

    changes: Annotated[int, msgspec.Meta(ge=2, le=100)] = 6
    window: Duration = 60.0
    hold: Duration = 30.0
