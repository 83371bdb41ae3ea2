# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What clients are told while no member can take them: by lbapp.control.services and the reader."""

from __future__ import annotations

import msgspec
import pytest

from lbapp.config.model import Application
from lbapp.config.pool import Sorry
from lbapp.control.engine import ControlSegment
from tests.unit.test_engine_app_query import configuration, control, said

LATER = Sorry(status=502, body="back at noon", content_type="text/html")
WHOLE = (b"HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/html\r\nContent-Length: 12\r\nConnection: close\r\n\r\n"
         b"back at noon")


def site(reached: bool, **fields: object) -> ControlSegment:
    made = configuration(image_fields={"sorry": LATER}, **fields)  # type: ignore[arg-type]
    return control(made, 3 if reached else 0)


@pytest.mark.parametrize(("path", "answer"), [(b"/img/x", WHOLE), (b"/", b"HTTP/1.1 503")])
def test_the_pools_own_words(path: bytes, answer: bytes) -> None:
    told = site(reached=False).app_query(said(1, path), 1.0)
    assert told.answer.startswith(answer)
    assert site(reached=True).app_query(said(1, path), 1.0).answer == b""


def test_head_gets_no_body() -> None:
    request = b"HEAD /img/x HTTP/1.1\r\nHost: shop.example\r\n\r\n"
    told = site(reached=False).app_query(said(1, data=request), 1.0)
    assert told.answer == WHOLE.removesuffix(b"back at noon")


def test_in_maintenance_the_default_pool_speaks() -> None:
    made = configuration(maintenance=True)
    pools = {key: msgspec.structs.replace(pool, sorry=LATER) for key, pool in made.pools.items()}
    assert control(msgspec.structs.replace(made, pools=pools)).app_query(said(1), 1.0).answer == WHOLE


def test_who_speaks_no_http_is_reset() -> None:
    made = configuration(application=Application.TLS, l7_policies=())
    pools = {key: msgspec.structs.replace(pool, sorry=LATER) for key, pool in made.pools.items()}
    segment = control(msgspec.structs.replace(made, pools=pools), 0)
    assert segment.app_query(said(1, data=b"", timed_out=True), 1.0).answer == b""
