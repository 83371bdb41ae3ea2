# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What the control segment notices of members that refuse clients' connections."""

from __future__ import annotations

import pytest

from lbapp.control.messages import Closed, Delete, Reason
from tests.unit.test_engine_app_query import control, said


def test_a_member_that_failed_a_client_is_noted_once_each_time() -> None:
    segment = control()
    first = segment.app_query(said(1), 1.0)
    assert first is not None and first.reply is not None
    segment.app_query(said(1, failed=(first.reply.member,)), 1.1)
    assert list(segment.failures) == [(first.reply.member, "refused, or no answer")]


@pytest.mark.parametrize(("closed", "noted"), [
    (Closed(8, 1, 2, Reason.SHUTDOWN, outbound=True, packets=2, bytes=100), True),
    (Closed(8, 1, 2, Reason.SHUTDOWN, packets=2, bytes=100), False),  # a SYN and a RST, both of the client's
    (Closed(8, 1, 2, Reason.SHUTDOWN, packets=3, bytes=160), False),
    (Closed(8, 1, 2, Reason.IDLE, outbound=True, packets=2, bytes=100), False),
    (Closed(8, 1, 2, Reason.SHUTDOWN, counted=False), False),
])
def test_a_first_packet_that_was_answered_by_the_last_was_refused(closed: Closed, noted: bool) -> None:
    segment = control()
    segment.handle(Delete(1, (closed,)), 2.0)
    assert list(segment.failures) == ([(2, "refused")] if noted else [])
