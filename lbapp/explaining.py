# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""``lbapp explain``: what a virtual server's policies make of a request that nobody has sent.

The rules are evaluated here, by the code that the controller runs, on the policies that it has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import msgspec

from lbapp import display
from lbapp.client import Client
from lbapp.command_line import Failure
from lbapp.config.model import Application, VirtualServer
from lbapp.control.l7 import Answer, ClientHello, Reader, Request, ToPool
from lbapp.site import FIELDS

Subject = Request | ClientHello | bytes
SESSION_ID_MOST = 32
"""Bytes: RFC 5246, 7.4.1.2."""


def subject(application: Application, words: Sequence[str], headers: Sequence[str], sni: str | None,
            alpn: Sequence[str], session_id: str | None, data: str | None) -> Subject:
    """What a client would say, from what was typed.

    Args:
        application: what the virtual server reads.
        words, headers: of an HTTP request; [METHOD] URL, and lines.
        sni, alpn, session_id: of a ClientHello; the last one as hexadecimal digits.
        data: first bytes, as text or ``hex:DIGITS``.

    Raises:
        Failure: it does not fit what the virtual server reads.
    """
    of_tls = bool(sni or alpn or session_id is not None)
    if application is Application.HTTP:
        if not 1 <= len(words) <= 2 or of_tls or data is not None:
            raise Failure("this virtual server reads HTTP: expected [METHOD] URL, and --header 'NAME: VALUE'")
        pairs = []
        for header in headers:
            name, colon, value = header.partition(":")
            if not colon or not name.strip():
                raise Failure(f"--header: expected 'NAME: VALUE', got {header!r}")
            pairs.append((name, value))
        return Request.of(words[0].upper() if len(words) == 2 else "GET", words[-1], pairs)
    if words or headers:
        raise Failure(f"this virtual server reads {application.value}: expected no URL and no --header")
    if application is Application.TLS:
        if data is not None:
            raise Failure("this virtual server reads tls: expected --sni NAME, --alpn PROTOCOL, --session-id DIGITS")
        return ClientHello(sni.lower().removesuffix(".") if sni else None, tuple(one.encode() for one in alpn),
                           _session_id(session_id))
    if data is None or of_tls:
        raise Failure("this virtual server reads raw data: expected --data TEXT or --data hex:DIGITS")
    try:
        return bytes.fromhex(data[4:]) if data.startswith("hex:") else data.encode()
    except ValueError:
        raise Failure(f"--data: expected hexadecimal digits behind hex:, got {data!r}") from None


def _session_id(digits: str | None) -> bytes:
    with contextlib.suppress(ValueError):
        found = bytes.fromhex(digits or "")
        if len(found) <= SESSION_ID_MOST:
            return found
    raise Failure(f"--session-id: expected an even number of hexadecimal digits, at most {2 * SESSION_ID_MOST}, "
                  f"got {digits!r}")


def meant(shown: Iterable[dict[str, Any]], words: Sequence[str], data: str | None) -> dict[str, Any]:
    """Which virtual server such a request is for, where nobody has named one: the one at the URL's address and port;
    without an address in it, or without a URL, the only one that reads such requests.

    Args:
        shown: all of them, as the controller shows them.
        words, data: see :func:`subject`.

    Raises:
        Failure: it is none, or may be several.
    """
    reads = Application.HTTP if words else Application.RAW if data is not None else Application.TLS
    found, place = [one for one in shown if one["application"] == reads.value], ""
    with contextlib.suppress(ValueError):
        url = urlsplit(words[-1] if words else "")
        address, port = ip_address(url.hostname or ""), url.port or (443 if url.scheme == "https" else 80)
        found = [one for one in found if ip_address(one["vip_address"]) == address and one["protocol_port"] == port]
        place = f" at {address} port {port}"
    if not found:
        raise Failure(f"no virtual server{place} reads {reads.value}; --virtual-server NAME says which is meant")
    if len(found) > 1:
        names = ", ".join(sorted(one["name"] for one in found))
        raise Failure(f"--virtual-server: expected one of {names}: they read {reads.value}")
    return found[0]


def explain(client: Client, words: Sequence[str], virtual_server: str | None, headers: Sequence[str], sni: str | None,
            alpn: Sequence[str], session_id: str | None, data: str | None, output: str) -> None:
    """Print what becomes of it.

    Args:
        client: of the controller.
        virtual_server: id or name; None: see :func:`meant`.
        words, headers, sni, alpn, session_id, data: see :func:`subject`.
        output: table, json or yaml.

    Raises:
        Failure: the virtual server does not read, or reads something else.
    """
    shown = (client.get("virtual-servers", virtual_server) if virtual_server is not None
             else meant(client.list("virtual-servers"), words, data))
    server = msgspec.convert({field: shown[field] for field in FIELDS[VirtualServer] if field in shown}, VirtualServer)
    reader = Reader.of(server)
    if reader is None:
        raise Failure(f"virtual server {server.name} does not read what clients say (application: l4)")
    said = subject(server.application, words, headers, sni, alpn, session_id, data)
    outcome = reader.decide(said)
    policies: list[dict[str, Any]] = [{
        "policy": trace.policy.name, "action": trace.policy.action.value, "enabled": trace.asked,
        "matched": trace.matched, "decided": trace.decided, "rules": [{
            "type": rule.rule.type.value, "key": rule.rule.key, "compare_type": rule.rule.compare_type.value,
            "value": rule.rule.value, "invert": rule.rule.invert, "compared": list(rule.compared), "held": rule.held,
        } for rule in trace.rules]} for trace in reader.explain(said)]
    if output != "table":
        display.dump({"virtual_server": server.name, "outcome": _outcome(outcome), "policies": policies}, output)
        return
    rows: list[tuple[str, ...]] = []
    for one in policies:
        mark = "decides" if one["decided"] else "matches" if one["matched"] else "" if one["enabled"] else "disabled"
        rows.append((one["policy"], one["action"], mark, "", "", ""))
        for rule in one["rules"]:
            test = f"{'not ' if rule['invert'] else ''}{rule['type']} {rule['key']}".rstrip()
            rows.append(("", "", "holds" if rule["held"] else "no", test, f"{rule['compare_type']} {rule['value']}",
                         ", ".join(rule["compared"]) or "-"))
    display.table(f"virtual server {server.name}", ("policy", "action", "result", "rule", "expected", "seen"), rows)
    display.console().print(_text(outcome), highlight=False, markup=False)


def _outcome(outcome: Any) -> dict[str, Any]:
    if isinstance(outcome, ToPool):
        return {"pool": outcome.pool or "the default pool", "policy": outcome.policy or None, "key": outcome.key}
    if isinstance(outcome, Answer):
        return {"answer": outcome.status, "policy": outcome.policy or None, "why": outcome.why}
    return {"reject": True, "policy": outcome.policy or None, "why": outcome.why}


def _text(outcome: Any) -> str:
    found = _outcome(outcome)
    by = f"policy {found['policy']}" if found["policy"] else "no policy"
    if "pool" in found:
        return f"{found['key']}: to {'' if found['pool'].startswith('the ') else 'pool '}{found['pool']} ({by})"
    return f"answered with {found['answer']} ({by}: {found['why']})" if "answer" in found else f"reset ({by})"
