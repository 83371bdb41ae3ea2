# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What a client says first, and what follows from it: which pool, which answer, or a reset.

Owns: reading HTTP, TLS hellos and raw data, and the rules about them. Never: does I/O, knows a clock, or knows members.
"""

from lbapp.control.l7.outcomes import Answer, More, Outcome, Reject, ToPool
from lbapp.control.l7.reader import Reader
from lbapp.control.l7.request import Request
from lbapp.control.l7.rules import PolicyTrace, RuleTrace
from lbapp.control.l7.tls import ClientHello

__all__ = ["Answer", "ClientHello", "More", "Outcome", "PolicyTrace", "Reader", "Reject", "Request", "RuleTrace",
           "ToPool"]
