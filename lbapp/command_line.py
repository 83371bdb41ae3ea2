# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What the ``lbapp`` command's words mean: which controller, which kind, which host and port; how it fails and warns.

Imports neither sockets nor threads at the top, see :mod:`lbapp.cli`.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lbapp.client import Client


class Failure(click.ClickException):
    """Something that people can understand and mend; exit code 1."""

    def show(self, file: Any = None) -> None:
        """One line (or one for each problem) on standard error."""
        for line in self.format_message().splitlines():
            click.secho(f"lbapp: {line}", fg="red", err=True)


@dataclasses.dataclass(frozen=True)
class Access:
    """How to reach the controller. ``connect`` is replaced by tests."""

    url: str
    token: str | None
    token_file: Path
    ca: Path | None
    explicit_file: bool = False
    connect: Callable[..., Client] | None = None

    def client(self) -> Client:
        """A client with the token at hand; without one, the controller will tell."""
        from lbapp import tokens
        from lbapp.client import Client

        token = self.token
        if token is None:
            try:
                token = tokens.read(self.token_file)
            except tokens.TokenFileError as error:
                if self.explicit_file:
                    raise Failure(str(error)) from None
        if token and self.url.startswith("http://") and not loopback(self.url[7:].split("/")[0].rpartition("@")[2]):
            warn(f"the token travels to {self.url} unencrypted; use https")
        return (self.connect or Client)(self.url, token, self.ca)

    def unauthorized(self) -> str:
        """What to say when the controller wants another token."""
        if self.token is not None:
            return f"the controller at {self.url} refused the token given with --token or LBAPP_TOKEN"
        if not self.token_file.exists():
            return f"the controller at {self.url} wants a token, and {self.token_file} does not exist; " \
                   "give --token or --token-file"
        if not os.access(self.token_file, os.R_OK):
            return f"the controller at {self.url} wants a token, and {self.token_file} is not readable for this user"
        return f"the controller at {self.url} refused the token in {self.token_file}"


def loopback(host: str) -> bool:
    """Whether a host (with or without a port, IPv6 in brackets) is this machine."""
    name = host[1:].split("]")[0] if host.startswith("[") else host.split(":")[0]
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def warn(message: str) -> None:
    """A warning on standard error that is hard to miss."""
    click.secho(f"WARNING: {message}", fg="yellow", bold=True, err=True)


class HostPort(click.ParamType):
    """``host:port``; an IPv6 address stands in brackets."""

    name = "HOST:PORT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """Return host and port."""
        if isinstance(value, tuple):
            return value
        host, _, port = value.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        host = host[1:-1] if bracketed else host
        if not host or not port.isdecimal() or not 0 < int(port) < 65536 or (":" in host) != bracketed:
            self.fail(f"expected host:port such as 127.0.0.1:8080 or [::1]:8080, got {value!r}", param, ctx)
        return host, int(port)


class Kind(click.ParamType):
    """The name of a kind of resource, in singular or plural."""

    name = "KIND"

    def __init__(self, *kinds: str) -> None:
        self.kinds = kinds
        self.words = {word: kind for kind in kinds for word in (kind, kind.removesuffix("s"), kind.replace("-", "_"))}
        if "virtual-servers" in kinds:
            self.words["vs"] = "virtual-servers"
        if "switches" in kinds:
            self.words["switch"] = "switches"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the plural."""
        if value not in self.words:
            close = difflib.get_close_matches(value, self.words, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            self.fail(f"expected {', '.join(self.kinds)}, got {value!r}{hint}", param, ctx)
        return self.words[value]


RESOURCES = Kind("virtual-servers", "pools", "members", "networks")
SHOWN = Kind("virtual-servers", "pools", "members", "networks", "switches", "connections", "persistence", "events",
             "stats", "config")
