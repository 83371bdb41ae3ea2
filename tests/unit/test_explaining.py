# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""``lbapp explain`` (lbapp/explaining.py), on the site of topologies/l7.yaml."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from lbapp.cli import cli
from lbapp.client import Client
from tests.fake_api import TOKEN, FakeApi

SITE = Path(__file__).parents[2] / "topologies" / "l7.yaml"


@pytest.fixture
def lbapp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    api = FakeApi()
    monkeypatch.setenv("LBAPP_STATE_DIR", str(tmp_path))

    def connect(url: str, token: str | None, ca: Any) -> Client:
        return Client(url, token, ca, transport=api.transport)

    def run(*words: str, code: int = 0) -> str:
        result = CliRunner().invoke(cli, ["--token", TOKEN, *words], obj=connect, prog_name="lbapp")
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        return result.stdout if code == 0 else result.stderr

    run("apply", "-f", str(SITE), "--yes")
    return run


@pytest.mark.parametrize(("words", "outcome"), [
    (("http://a.example/img/x.png",), {"pool": "images", "policy": "images", "key": "GET a.example/img/x.png"}),
    (("POST", "/other"), {"pool": "the default pool", "policy": None, "key": "POST /other"}),
    (("GET", "http://a.example/", "--header", "User-Agent: BadBot"), {
        "reject": True, "policy": "no-robots", "why": "the policy says so"}),
    (("http://a.example/robots.txt", "--header", "User-Agent: BadBot"), {
        "pool": "the default pool", "policy": None, "key": "GET a.example/robots.txt"}),
    (("--sni", "Shop.Example"), {"pool": "shop-tls", "policy": "shop", "key": "sni shop.example"}),
    ((), {"pool": "the default pool", "policy": None, "key": "no sni"})])
def test_what_becomes_of_a_request(lbapp: Any, words: tuple[str, ...], outcome: dict[str, Any]) -> None:
    told = json.loads(lbapp("explain", *words, "-o", "json"))["outcome"]
    told.pop("why", None)
    assert told == {key: value for key, value in outcome.items() if key != "why"}


def test_every_rule_says_what_it_saw(lbapp: Any) -> None:
    policies = json.loads(lbapp("explain", "http://old.example/img/a", "-o", "json"))["policies"]
    assert [(one["policy"], one["matched"], one["decided"]) for one in policies] == [
        ("images", True, True), ("old-shop", True, False), ("no-robots", False, False)]
    robots = policies[2]["rules"]
    assert [(one["type"], one["held"], one["compared"]) for one in robots] == [
        ("HEADER", False, []), ("PATH", True, ["/img/a"])]
    table = lbapp("explain", "get", "http://old.example/x")
    assert "decides" in table and "answered with 301 (policy old-shop" in table
    assert "to pool images (policy images)" in lbapp("explain", "/img")


@pytest.mark.parametrize(("words", "says"), [
    (("--virtual-server", "site"), "expected [METHOD] URL"), (("/", "--sni", "x"), "expected [METHOD] URL"),
    (("a", "b", "/"), "expected [METHOD] URL"), (("/", "--header", "no"), "--header: expected 'NAME: VALUE'"),
    (("--session-id", "abc"), "hexadecimal digits"), (("--session-id", "ab" * 33), "at most 64"),
    (("/", "--session-id", "ab"), "expected [METHOD] URL"),
    (("--virtual-server", "secure", "/"), "expected no URL"),
    (("--virtual-server", "secure", "--data", "x"), "expected --sni NAME"),
    (("--virtual-server", "nobody", "/"), "nobody"), (("--data", "x"), "no virtual server reads raw"),
    (("http://10.0.0.100:8080/",), "no virtual server at 10.0.0.100 port 8080 reads http"),
    (("http://[fd00::1]/",), "no virtual server at fd00::1 port 80 reads http")])
def test_what_does_not_fit_is_said(lbapp: Any, words: tuple[str, ...], says: str) -> None:
    assert says in lbapp("explain", *words, code=1)


def test_of_several_virtual_servers_the_url_or_an_option_tells_which(lbapp: Any) -> None:
    for name, address, port in (("other", "10.0.0.100", "8080"), ("six", "fd00::100", "80")):
        lbapp("add", "virtual-server", name, "--address", address, "--port", port, "--pool", "web", "--set",
              "application=http")
    for words, name in ((("http://10.0.0.100/img/x",), "site"), (("GET", "http://10.0.0.100:8080/img/x"), "other"),
                        (("http://[fd00:0::100]/",), "six"), (("/img/x", "--virtual-server", "other"), "other")):
        assert json.loads(lbapp("explain", *words, "-o", "json"))["virtual_server"] == name
        assert f"virtual server {name}" in lbapp("explain", *words)
    assert "expected one of other, site, six: they read http" in lbapp("explain", "http://a.example/", code=1)


def test_a_session_id(lbapp: Any, tmp_path: Path) -> None:
    """003's "TLS session id", as a rule compares it: lower case, whatever was typed."""
    site = yaml.safe_load(SITE.read_text())
    secure = next(one for one in site["virtual_servers"] if one["name"] == "secure")
    secure["l7_policies"].append({"name": "known", "action": "REDIRECT_TO_POOL", "redirect_pool": "shop-tls", "rules": [
        {"type": "SESSION_ID", "compare_type": "STARTS_WITH", "value": "0a1b"}]})
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    lbapp("apply", "-f", str(tmp_path / "site.yaml"), "--yes")
    for digits, policy in (("0A1B22", "known"), ("0b1b22", None), ("", None)):
        told = json.loads(lbapp("explain", "--session-id", digits, "-o", "json"))
        assert told["outcome"]["policy"] == policy
    assert told["policies"][-1]["rules"][0]["compared"] == []


def test_raw_data_and_servers_that_do_not_read(lbapp: Any) -> None:
    lbapp("add", "virtual-server", "plain", "--address", "10.0.0.101", "--port", "80", "--pool", "web")
    assert "does not read what clients say" in lbapp("explain", "--virtual-server", "plain", "/", code=1)
    lbapp("set", "virtual-server", "plain", "application=raw")
    assert "to the default pool (no policy)" in lbapp("explain", "--data", "hex:0001")
    assert "expected hexadecimal digits" in lbapp("explain", "--data", "hex:0", code=1)
    assert "expected --data" in lbapp("explain", "--virtual-server", "plain", code=1)
