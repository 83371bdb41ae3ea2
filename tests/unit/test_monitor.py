# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""lbapp.config.monitor, .pool and .fields: what an operator may ask for, and what the refusals say."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from lbapp.config import fields
from lbapp.config.model import Configuration, Network, Pool, VirtualServer
from lbapp.config.monitor import Monitor, MonitorType, codes
from lbapp.config.pool import Persistence
from lbapp.config.rows import decode, encode
from lbapp.config.snapshot import Draft, Fitting, Snapshot, matters


def test_a_monitor_has_its_type_for_a_name_and_never_hurries_less() -> None:
    monitor = msgspec.convert({"type": "HTTP", "interval": 0.5, "timeout": 0.5}, Monitor)
    assert (monitor.name, monitor.fast_interval, monitor.expected_codes) == ("http", 0.5, "200")


@pytest.mark.parametrize(("given", "field"), [
    ({"type": "TCP", "url_path": "/x"}, "url_path: expected none with type TCP"),
    ({"type": "HTTP", "expected_codes": "2xx"}, "expected_codes: expected such as 200"),
    ({"type": "HTTP", "expected_codes": "299-200"}, "expected_codes: expected the lower code first"),
    ({"type": "HTTP", "body_regex": "("}, "body_regex: expected a regular expression of RE2"),
    ({"type": "HTTP", "body_regex": "x", "http_method": "HEAD"}, "body_regex: expected none with http_method HEAD"),
    ({"type": "HTTP", "timeout": 6.0}, "timeout: expected at most the interval, 5 s, got 6"),
    ({"type": "HTTPS", "tls_verify": True}, "domain_name: expected the name that the certificate is for"),
    ({"type": "HTTP", "headers": [{"name": "a b"}]}, "name: expected a header's name"),
    ({"type": "UDP"}, "send: expected what to send"),
    ({"type": "UDP", "send": "hex:0"}, "send: expected hexadecimal digits behind hex:"),
    ({"type": "DNS"}, "dns_name: expected a name to ask for"),
    ({"type": "DNS", "dns_name": "a..b"}, "dns_name: expected a domain name"),
    ({"type": "EXTERNAL"}, "command: expected the name of an executable"),
    ({"type": "EXTERNAL", "command": "../x"}, "command"),
    ({"type": "ICMP", "port": 7, "send": "x"}, "send: expected none with type ICMP"),
])
def test_what_a_monitor_refuses(given: dict[str, Any], field: str) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert(given, Monitor)
    assert field in str(caught.value)


def test_codes() -> None:
    assert codes("200, 204,300-302") == {200, 204, 300, 301, 302}


@pytest.mark.parametrize(("given", "words"), [
    ({"monitors": [{"type": "TCP"}, {"type": "TCP"}]}, "monitors[1].name: tcp is there already"),
    ({"slow_start": 5}, "slow_start: expected an lb_algorithm that looks at weights"),
    ({"distribution": {}}, "distribution: expected an lb_algorithm that looks at weights"),
    ({"distribution": {"algorithm": "FORMULA"}}, "formula: expected a formula"),
    ({"fallback_pool": "p"}, "fallback_pool: expected another pool"),
    ({"mss": 536}, "mss: expected 0, or 1220 to 1460, got 536"),
    ({"persistence": {"type": "HEADER"}}, "key: expected a name"),
    ({"persistence": {"type": "HEADER", "key": "a b"}}, "key: expected a header's name"),
    ({"persistence": {"type": "SNI", "key": "x"}}, "key: expected none with type SNI"),
    ({"persistence": {"type": "RAW", "key": "x"}}, "key: expected OFFSET:LENGTH"),
    ({"members": [{"address": "10.0.0.1", "protocol_port": 1, "monitor_address": "127.0.0.1"}]},
     "monitor_address: expected a unicast address"),
])
def test_what_a_pool_refuses(given: dict[str, Any], words: str) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert({"name": "p", **given}, Pool)
    assert words in str(caught.value)


def test_a_raw_key() -> None:
    assert Persistence(type=msgspec.convert("RAW", fields_type()), key="4:16").span() == (4, 16)


def fields_type() -> Any:
    return next(info.type for info in msgspec.structs.fields(Persistence) if info.name == "type")


def test_a_monitor_address_is_nobody_elses() -> None:
    with pytest.raises(msgspec.ValidationError, match=r"monitor_address: expected another address"):
        msgspec.convert({"name": "n", "cidr": "10.0.0.0/24", "address": "10.0.0.1", "monitor_address": "10.0.0.1"},
                        Network)


def test_a_row_holds_all_of_a_pool() -> None:
    pool = msgspec.convert({
        "name": "p", "lb_algorithm": "LEAST_CONNECTIONS", "slow_start": 10, "on_down": "reset", "fallback_pool": "q",
        "monitors": [{"type": "HTTP", "headers": [{"name": "X", "value": "1"}]}, {"type": "ICMP"}],
        "monitor_rule": "any", "passive": {"failures": 2}, "damping": {}, "sorry": {"body": "later"},
        "persistence": {"type": "SOURCE_IP"}, "distribution": {}, "waiting": {}}, Pool)
    row = encode(pool, 1)
    again = decode("Pool", "", row)
    assert again == pool
    assert again.monitors[0].type is MonitorType.HTTP


def _fitting(**pool: Any) -> tuple[Fitting, Pool]:
    made = msgspec.convert({"name": "p", "id": "p", **pool}, Pool)
    return Fitting(Draft(Snapshot(Configuration(pools={"p": made})))), made


def test_persistence_must_be_readable() -> None:
    fitting, pool = _fitting(persistence={"type": "APP_COOKIE", "key": "sid"})
    server = msgspec.convert({"name": "v", "vip_address": "10.0.0.9", "protocol": "TCP", "protocol_port": 80},
                             VirtualServer)
    clash = fitting.clash(server, pool)
    assert clash is not None
    assert (clash.server_field, clash.pool_field) == ("application", "persistence.type")
    assert fitting.clash(msgspec.structs.replace(server, application=msgspec.convert("http", type_of(server))),
                         pool) is None
    assert matters(pool, msgspec.structs.replace(pool, persistence=None))


def type_of(server: VirtualServer) -> Any:
    return type(server.application)


def test_what_counts_clients_is_not_left_to_the_switch() -> None:
    server = msgspec.convert({"name": "v", "vip_address": "10.0.0.9", "protocol": "TCP", "protocol_port": 80},
                             VirtualServer)
    member = {"address": "10.0.0.1", "protocol_port": 1}
    plain = _fitting(lb_algorithm="SOURCE_IP", members=[member])[1]
    assert server.switch_decides(plain)
    for given in ({"persistence": {"type": "SOURCE_IP"}}, {"members": [{**member, "connection_limit": 4}]}):
        assert not server.switch_decides(_fitting(**{"lb_algorithm": "SOURCE_IP", "members": [member], **given})[1])


def test_octets() -> None:
    assert fields.octets("send", "hex:00ff") == b"\x00\xff"
    assert fields.octets("send", "ping") == b"ping"
