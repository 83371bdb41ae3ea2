# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The reader of a virtual server: what its client said so far in, what becomes of the connection out.

Owns: the compiled policies of one virtual server. Never: keeps anything of a connection; whoever has the bytes asks
again with more of them. Whatever is decided of a beginning is decided of everything that begins with it, and it does
not matter in which pieces the bytes came (:meth:`Reader.timed_out` aside, which decides with what there is).
"""

from __future__ import annotations

from collections.abc import Callable

from lbapp.config.model import Application, L7Policy, PolicyAction, Pool, VirtualServer
from lbapp.control.l7 import http1, http2, tls
from lbapp.control.l7.closing import closing
from lbapp.control.l7.outcomes import MORE, Answer, More, Outcome, Reject, ToPool, printable, refusal, response
from lbapp.control.l7.request import Received, Request
from lbapp.control.l7.rules import Compiled, Holds, PolicyTrace, compile_rule, matcher, trace
from lbapp.control.l7.tls import ClientHello

Subject = Request | ClientHello | bytes
Act = Callable[[Subject], Outcome]
KEY_BYTES = 16
"""How much of raw data is shown."""


class Reader:
    """Reads for one virtual server; immutable.

    ``http`` decides when the head of the first request is complete (HTTP/1.0, 1.1; HTTP/2 with prior knowledge),
    ``tls`` when the ClientHello is. ``raw`` waits for ``inspect_bytes``, and looks at just those; a client that says
    less and then waits is decided by :meth:`timed_out`. Answers exist for HTTP/1 only: a client of HTTP/2 for whom
    a policy has a redirect or a fixed response, or whose request is at fault, is reset.
    """

    __slots__ = ("_application", "_closes", "_inspect", "_policies", "_steps", "_unavailable")

    def __init__(self, server: VirtualServer) -> None:
        self._application = server.application
        self._inspect = server.inspect_bytes
        self._closes = server.close_after_first
        self._policies: tuple[tuple[L7Policy, tuple[Compiled, ...]], ...] = tuple(
            (policy, tuple(compile_rule(rule) for rule in policy.rules)) for policy in server.l7_policies)
        self._steps: tuple[tuple[Holds, Act], ...] = tuple(
            (matcher(rules), _act(policy)) for policy, rules in self._policies if policy.admin_state_up)
        self._unavailable = refusal(503, "").data if server.application is Application.HTTP else b""

    @classmethod
    def of(cls, server: VirtualServer) -> Reader | None:
        """The reader of a virtual server; None where nothing is read (``application: l4``)."""
        return None if server.application is Application.L4 else cls(server)

    def read(self, data: bytes) -> Outcome:
        """Decide.

        Args:
            data: all that the client sent so far, from its first byte.
        """
        if self._application is Application.HTTP:
            found = self._http(data)
            if self._closes and isinstance(found, ToPool) and data[:4] != http2.TELLING:
                return found._replace(edit=closing(data))
            return found
        if self._application is Application.TLS:
            hello = tls.parse(data)
            if hello is None:
                return MORE
            return hello if isinstance(hello, Reject) else self._decide(hello)
        return MORE if len(data) < self._inspect else self._decide(data[:self._inspect])

    def timed_out(self, data: bytes) -> Outcome:
        """Decide with what there is; never :class:`More`.

        ``http``: 408, or for HTTP/2 a reset. ``tls``: the default pool. ``raw``: the policies, with what the client
        said; where none matches, the default pool.
        """
        found = self.read(data)
        if not isinstance(found, More):
            return found
        if self._application is Application.HTTP:
            if data[:4] == http2.TELLING:
                return Reject("", "HTTP/2: no complete request in time")
            late = refusal(408, "no complete request in time")
            return late._replace(data=_without_body(late.data)) if _asks_head(data) else late
        if self._application is Application.TLS:
            return ToPool(None, "", "no ClientHello in time")
        return self._decide(data)

    def sorry(self, pool: Pool | None) -> bytes:
        """What a pool has its clients told when no member is there; empty where that is nothing of its own."""
        if self._application is not Application.HTTP or pool is None or pool.sorry is None:
            return b""
        told = pool.sorry
        return response(told.status, body=told.body.encode(), content_type=told.content_type)

    def unavailable(self, data: bytes = b"", sorry: bytes = b"") -> bytes:
        """What a client is told when no member is there: 503 of HTTP, else nothing (a reset it is).

        Args:
            data: what the client said, where that is known: HEAD gets no body, HTTP/2 no answer.
            sorry: what its pool has it told, see :meth:`sorry`.
        """
        if data[:4] == http2.TELLING:
            return b""
        whole = sorry or self._unavailable
        return _without_body(whole) if _asks_head(data) else whole

    def explain(self, request: Request | ClientHello | bytes) -> list[PolicyTrace]:
        """Tell of each policy and each rule whether it held, and what was compared; nothing is decided.

        Args:
            request: what a client would say, as the virtual server's application reads it; of bytes only
                ``inspect_bytes`` are looked at.
        """
        return trace(self._policies, request[:self._inspect] if isinstance(request, bytes) else request)

    def decide(self, request: Request | ClientHello | bytes) -> Outcome:
        """What becomes of a client who says this; never :class:`More`."""
        return self._decide(request[:self._inspect] if isinstance(request, bytes) else request)

    def _http(self, data: bytes) -> Outcome:
        if data[:4] == http2.TELLING:
            if not data.startswith(http2.PREFACE[:len(data)]):
                return refusal(505, "the preface of HTTP/2 is broken")
            parsed = http2.parse(data)
            if parsed is None:
                return MORE
            if isinstance(parsed, Reject):
                return parsed
            found = self._decide(parsed)
            if isinstance(found, Answer):
                return Reject(found.policy, f"HTTP/2: no answer with {found.status} is made")
            return found
        request = http1.parse(data)
        if request.__class__ is Received:  # almost always; the shortest way
            for holds, act in self._steps:
                if holds(request):
                    return act(request)
            return ToPool(None, "", request.describe())
        if request is None:
            return MORE
        if isinstance(request, Answer):
            return request._replace(data=_without_body(request.data)) if _asks_head(data) else request
        return self._decide(request)

    def _decide(self, subject: Subject) -> Outcome:
        for holds, act in self._steps:
            if holds(subject):
                return act(subject)
        return ToPool(None, "", describe(subject))


def _asks_head(data: bytes) -> bool:
    return data.startswith((b"HEAD ", b"\r\nHEAD "))


def _without_body(answer: bytes) -> bytes:
    """The headers of an answer alone: all that HEAD gets (RFC 9110, 9.3.2)."""
    return answer[:answer.find(b"\r\n\r\n") + 4]


def describe(subject: Subject) -> str:
    """What a client said, short and printable."""
    if subject.__class__ is Received:
        return subject.describe()  # was found to be ASCII to be printed
    if isinstance(subject, bytes):
        return f"{len(subject)} bytes {subject[:KEY_BYTES].hex(' ')}"
    return printable(subject.describe())


def _act(policy: L7Policy) -> Act:
    """What a policy does, as a function of what was read."""
    name = policy.name
    if policy.action is PolicyAction.REDIRECT_TO_POOL:
        pool = policy.redirect_pool
        return lambda subject: ToPool(pool, name, describe(subject))
    if policy.action is PolicyAction.REJECT:
        return lambda subject: Reject(name, describe(subject))
    code = policy.redirect_http_code
    if policy.action is PolicyAction.REDIRECT_PREFIX:
        prefix = policy.redirect_prefix or ""
        return lambda subject: _redirect(subject, name, code, prefix)
    if policy.action is PolicyAction.REDIRECT_TO_URL:
        data = response(code, location=policy.redirect_url or "")
        return lambda subject: Answer(code, data, name, describe(subject))
    status = policy.response_status
    whole, head = (response(status, body=policy.response_body.encode(), content_type=policy.response_content_type,
                            head=head) for head in (False, True))
    return lambda subject: Answer(status, head if isinstance(subject, Request) and subject.method == b"HEAD" else whole,
                                  name, describe(subject))


def _redirect(subject: Subject, policy: str, code: int, prefix: str) -> Outcome:
    assert isinstance(subject, Request)  # the model allows redirects with application http only
    target = subject.target.decode("latin-1")
    location = prefix.removesuffix("/") + target if target.startswith("/") else prefix  # "*" has no place
    return Answer(code, response(code, location=location), policy, describe(subject))


