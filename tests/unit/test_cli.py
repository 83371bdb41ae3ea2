# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The command as it is typed: lbapp/cli.py with lbapp/command_line.py, lbapp/assignments.py, lbapp/applying.py,
lbapp/showing.py, lbapp/drains.py, lbapp/display.py and lbapp/tokens.py behind it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml
from click.testing import CliRunner

from lbapp import applying, launcher
from lbapp.api.auth import Tokens
from lbapp.cli import cli
from lbapp.client import Client
from tests.fake_api import TOKEN, FakeApi

SITE = Path(__file__).parent / "site.yaml"
DPID = "00000000000000a1"


@pytest.fixture
def api():
    return FakeApi()


@pytest.fixture
def lbapp(api, monkeypatch, tmp_path):
    """Runs the command against the fake; asserts the exit code and that a failure is told on standard error alone."""
    for name in ("LBAPP_URL", "LBAPP_TOKEN", "LBAPP_TOKEN_FILE", "LBAPP_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LBAPP_STATE_DIR", str(tmp_path))

    def connect(url, token, ca):
        return Client(url, token, ca, transport=api.transport)

    def run(*words, code=0, stdin=None, token=TOKEN):
        options = ["--token", token] if token else []
        result = CliRunner().invoke(cli, [*options, *words], obj=connect, input=stdin, prog_name="lbapp")
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        return result.stdout if code == 0 else result.stderr

    run.state = tmp_path  # type: ignore[attr-defined]
    return run


def members(api, pool="web"):
    return {f"{one['address']}:{one['protocol_port']}": one for one in api.resources["pools"][pool]["members"]}


# ------------------------------------------------------------------ apply


def test_apply_twice_changes_nothing_the_second_time(lbapp, api):
    first = lbapp("apply", "-f", str(SITE))
    assert "+ virtual server web-rules" in first and "state: rules" in first
    assert "13 to add, 0 to change, 0 to remove" in first
    assert "applied: 13 created, 0 updated, 0 deleted in " in first
    assert len(api.resources["virtual-servers"]) == 6
    api.requests.clear()
    assert lbapp("apply", "-f", str(SITE)) == "no changes\n"
    assert api.asked == ["GET /v1/config"]


def test_apply_shows_what_changes(lbapp, api):
    lbapp("apply", "-f", str(SITE))
    text = SITE.read_text().replace("weight: 3}", "weight: 7}", 1)
    text = text.replace("protocol_port: 53, pool: echo}", "protocol_port: 54, pool: echo}")
    shown = lbapp("apply", "-f", "-", stdin=text)
    assert "~ pool web\n    members[10.0.0.51:80].weight: 3 → 7\n" in shown
    assert "~ virtual server echo\n    protocol_port: 53 → 54\n" in shown
    assert members(api)["10.0.0.51:80"]["weight"] == 7
    removed = lbapp("apply", "-f", "-", "--yes", stdin="{}")
    assert "- virtual server web" in removed and "0 created, 0 updated, 13 deleted" in removed


def test_a_dry_run_asks_the_controller_and_changes_nothing(lbapp, api):
    shown = lbapp("apply", "-f", str(SITE), "--dry-run")
    assert "13 to add" in shown and "nothing was changed" in shown
    assert api.resources["pools"] == {}
    assert api.asked == ["GET /v1/config", "PUT /v1/config"]


def test_on_a_terminal_it_asks(lbapp, api, monkeypatch):
    monkeypatch.setattr(applying, "interactive", lambda: True)
    refused = lbapp("apply", "-f", str(SITE), stdin="n\n")
    assert "Apply? [y/N]" in refused and "nothing was changed" in refused and api.resources["pools"] == {}
    assert "applied: 13 created" in lbapp("apply", "-f", str(SITE), stdin="y\n")
    assert "Apply?" not in lbapp("apply", "-f", "-", "--yes", stdin="{}")


def test_long_differences_are_cut_but_counted(lbapp):
    pools = [{"name": f"p{index}", "members": [{"address": f"10.0.0.{each}", "protocol_port": 80}
                                               for each in range(1, 31)]} for index in range(250)]
    shown = lbapp("apply", "-f", "-", stdin=json.dumps({"pools": pools}))
    assert "... and 50 more resources" in shown and "    ... and 10 more" in shown and "250 to add" in shown
    assert shown.count("+ pool ") == 200


def test_a_bad_document_is_refused_before_anything_is_asked(lbapp, api, tmp_path):
    site = tmp_path / "site.yaml"
    site.write_text("virtual_servers:\n  - name: web\n    vip_address: 10.0.0.1\n    protocol: TCP\n")
    assert lbapp("apply", "-f", str(site), code=1) == \
        f"lbapp: {site}: virtual_servers[0] (web): protocol_port: expected a value, it is missing (line 2)\n"
    assert lbapp("apply", "-f", str(tmp_path / "none"), code=1) == \
        f"lbapp: {tmp_path / 'none'}: No such file or directory\n"
    site.write_bytes(b"\xff")
    assert "expected UTF-8" in lbapp("apply", "-f", str(site), code=1)
    assert api.requests == []


def test_somebody_elses_change_is_not_overwritten(lbapp, api, monkeypatch):
    answer = api.answer

    def meanwhile(request):
        if request.method == "PUT":
            api.revision += 1
        return answer(request)

    api.transport = httpx.MockTransport(meanwhile)
    assert "changed by somebody else" in lbapp("apply", "-f", str(SITE), code=1)
    assert api.resources["pools"] == {}


# ------------------------------------------------------------------ add, set, remove


def test_a_virtual_server_with_its_own_pool(lbapp, api):
    shown = lbapp("add", "virtual-server", "web", "--address", "10.0.0.100", "--port", "80",
                  "--member", "10.0.0.1:80:3", "--member", "10.0.0.2:8080", "--algorithm", "weighted-round-robin",
                  "--set", "maintenance=yes", "--set", "connection_limit=100")
    server = api.resources["virtual-servers"]["web"]
    assert shown == f"virtual server web added ({server['id']})\n"
    assert server["maintenance"] is True and server["connection_limit"] == 100 and server["protocol"] == "TCP"
    pool = api.resources["pools"]["web"]
    assert server["default_pool_id"] == pool["id"] and pool["lb_algorithm"] == "WEIGHTED_ROUND_ROBIN"
    assert {name: one["weight"] for name, one in members(api).items()} == {"10.0.0.1:80": 3, "10.0.0.2:8080": 1}


def test_pools_members_and_networks(lbapp, api):
    lbapp("add", "network", "lan6", "--cidr", "fd00::/64", "--address", "fd00::254", "--set", "description=the lab")
    assert api.resources["networks"]["lan6"]["description"] == "the lab"
    lbapp("add", "pool", "six", "--algorithm", "source_ip", "--member", "[fd00::1]:80:5")
    assert "[fd00::2]:80" in lbapp("add", "member", "six", "[fd00::2]:80", "--set", "weight=0")
    assert {name: one["weight"] for name, one in members(api, "six").items()} == {"fd00::1:80": 5, "fd00::2:80": 0}
    lbapp("add", "vs", "six", "--address", "fd00::100", "--port", "80", "--pool", "six")
    assert api.resources["virtual-servers"]["six"]["default_pool_id"] == api.resources["pools"]["six"]["id"]
    assert "uses it" in lbapp("remove", "pool", "six", code=1)
    lbapp("remove", "member", "six", "[fd00::1]:80")
    assert lbapp("remove", "vs", "six") == "virtual server six removed\n"
    lbapp("remove", "pools", "six")
    assert api.resources["pools"] == {}


def test_a_member_is_disabled_and_a_virtual_server_gets_another_pool(lbapp, api):
    lbapp("apply", "-f", str(SITE))
    assert lbapp("set", "member", "web", "10.0.0.51:80", "admin_state_up=false") == \
        "member 10.0.0.51:80 of pool web: admin_state_up=false\n"
    assert members(api)["10.0.0.51:80"]["admin_state_up"] is False
    lbapp("set", "virtual-server", "web", "pool=web-even", "state=rules", "description=a = b")
    server = api.resources["virtual-servers"]["web"]
    assert server["default_pool_id"] == api.resources["pools"]["web-even"]["id"]
    assert (server["state"], server["description"]) == ("rules", "a = b")
    lbapp("set", "virtual-server", "web", "pool=none")
    assert api.resources["virtual-servers"]["web"]["default_pool_id"] is None


@pytest.mark.parametrize("words, message", [
    ("set member web", "expected POOL ADDRESS:PORT after the kind"),
    ("set pool web", "expected field=value after the name"),
    ("set pool web admin_state_up", "expected field=value, got 'admin_state_up'"),
    ("set pool web admin_state=up", "admin_state: unknown field; did you mean admin_state_up?"),
    ("set pool web admin_state_up=up", "admin_state_up: expected true or false, got 'up'"),
    ("set pool web lb_algorithm=BEST", "lb_algorithm: expected ROUND_ROBIN, "),
    ("set member web 10.0.0.1:80 weight=300", "weight: expected int <= 256, got '300'"),
    ("set member web 10.0.0.1:80 weight=1 weight=2", "weight: given twice"),
    ("set pool web members=1", "members: unknown field"),
    ("set poll web a=b", "expected virtual-servers, pools, members, networks, got 'poll'; did you mean pool?"),
    ("remove pool web x", "got unexpected x"),
    ("remove member web", "expected POOL ADDRESS:PORT"),
    ("add member web fd00::1:80", "expected an IPv6 address in brackets"),
    ("add member web 10.0.0.1", "expected ADDRESS:PORT"),
    ("add member web 10.0.0.1:99999", "expected ADDRESS:PORT"),
    ("add member web 10.0.0.999:80", "expected an IPv4 or IPv6 address"),
    ("add member web 10.0.0.1:80:heavy", "weight: expected int, got 'heavy'"),
    ("add virtual-server w --address 10.0.0.1 --port 80 --pool p --member 10.0.0.1:80",
     "--pool names a pool that exists"),
    ("show servers", "expected virtual-servers, pools"),
    ("show connections --filter marker=1", "--filter: expected field=value"),
    ("--token x token --rotate", "--rotate writes the token file"),
    ("apply", "Missing option '-f'"),
])
def test_wrong_usage_is_told_and_nothing_is_asked(lbapp, api, words, message):
    told = lbapp(*words.split(), code=2)
    assert message in told.replace("\n", " ") and told.startswith("Usage: lbapp ")
    assert api.requests == []


def test_a_refusal_names_the_field(lbapp):
    assert lbapp("add", "virtual-server", "w", "--address", "nowhere", "--port", "80", code=1).startswith(
        "lbapp: vip_address: expected an IPv4 or IPv6 address")
    assert lbapp("show", "pool", "none", code=1) == "lbapp: no pool none\n"
    assert lbapp("set", "member", "none", "10.0.0.1:80", "weight=1", code=1) == "lbapp: no pool none\n"


def test_a_failure_of_the_controller_is_called_one(lbapp, api):
    api.transport = httpx.MockTransport(lambda request: httpx.Response(500, json={"error": {"message": "see the log"}}))
    assert lbapp("show", code=1) == "lbapp: the controller at http://127.0.0.1:8080 failed: see the log\n"


# ------------------------------------------------------------------ show


@pytest.fixture
def running(lbapp, api):
    lbapp("apply", "-f", str(SITE))
    api.resources["pools"]["web"]["members"][0]["operating_status"] = "OFFLINE"
    api.resources["virtual-servers"]["web"]["operating_status"] = "DEGRADED"
    web = api.resources["virtual-servers"]["web"]["id"]
    api.switches.append({"dpid": DPID, "address": "127.0.0.1:4000", "connected": True, "connected_seconds": 125,
                         "flows": 42, "groups": 3, "hosts": {"10.0.0.51": {"mac": "02:00:00:00:00:01", "port": 4}},
                         "role": "equal", "features": ["conntrack", "groups"]})
    api.stats["virtual_servers"].append({"id": web, "name": "web", "opened": 20, "closed": 3, "active": 17,
                                         "refused": {"CONNLIMIT": 2}, "packets": 5, "bytes": 3 << 20,
                                         "messages_to_controller": 10, "messages_per_connection": 0.5})
    api.connections += [{"id": f"{index:x}", "switch": DPID, "virtual_server": "web" if index % 2 else "echo",
                         "member": "10.0.0.51:80", "protocol": "TCP", "client": f"10.0.0.9:{1000 + index}",
                         "destination": "10.0.0.100:80", "state": "ESTABLISHED", "age_seconds": 3700,
                         "idle_seconds": None, "packets": 12, "bytes": 2048, "decided_by": "switch"}
                        for index in range(300)]
    return lbapp


def lines(text, start):
    return [line.split() for line in text.splitlines() if line.strip().startswith(start)]


def test_the_overview(running):
    shown = running("show")
    assert lines(shown, "web ") == [["web", "10.0.0.100:80", "TCP", "DEGRADED", "web", "2/3", "17"]]
    assert lines(shown, "web6 ") == [["web6", "[fd00::100]:80", "TCP", "ONLINE", "web6", "3/3", "-"]]
    assert lines(shown, DPID)[0][:4] == [DPID, "127.0.0.1:4000", "connected", "2m05s"]
    overview = json.loads(running("show", "-o", "json"))
    assert [one["members_up"] for one in overview["virtual_servers"] if one["name"] == "web"] == ["2/3"]


def test_each_kind_as_a_table(running):
    assert lines(running("show", "virtual-servers"), "web-rules")[0][-3:] == ["rules", "-", "-"]
    assert "10.0.0.51:80, 10.0.0.52:80, 10.0.0.53:80" in running("show", "pools")
    assert len(lines(running("show", "members"), "web ")) == 3
    assert lines(running("show", "members", "web"), "web ")[0][:5] == ["web", "10.0.0.51:80", "s1", "3", "-"]
    assert lines(running("show", "networks"), "lan ") == [["lan", "10.0.0.0/24", "10.0.0.254", "-"]]
    assert lines(running("show", "switches"), DPID)[0][4:7] == ["42", "3", "1"]
    assert "02:00:00:00:00:01" in running("show", "switch", "a1")
    assert "no switch" in running("show", "switch", "b1", code=1)
    stats = running("show", "stats")
    assert "1m01s ago" in stats
    assert lines(stats, "web")[0] == ["web", "20", "3", "17", "5", "3.0", "MiB", "10", "0.50", "CONNLIMIT", "2"]
    assert "no statistics" in running("show", "stats", "none", code=1)
    assert "measured" not in stats


def test_what_was_measured_of_members(running, api):
    member = {"id": "1", "pool": "web", "member": "10.0.0.51:80", "opened": 7, "closed": 5, "active": 2}
    api.stats["members"] += [
        {**member, "response_seconds": 0.0123, "response_by": "monitors", "response_age_seconds": 0.4},
        {**member, "member": "10.0.0.52:80", "active": None, "bytes_lately": 2048, "bytes_lately_age_seconds": 65.2},
        {**member, "member": "10.0.0.53:80"}]
    api.stats["monitors"] = [{"addresses": ["10.0.0.250/24"], "targets": 9, "checks": 70, "late": 1, "running": 2,
                              "cpu_seconds": 0.25}, {"addresses": [], "targets": 1}]
    shown = running("show", "stats")
    assert lines(shown, "10.0.0.250/24") == [["10.0.0.250/24", "9", "70", "1", "2", "0.25"]]
    assert "the controller's network" in shown
    measured = shown.partition("measured")[2]
    assert lines(measured, "web") == [["web", "10.0.0.51:80", "12.3", "ms", "monitors", "0s", "-", "-", "2"],
                                      ["web", "10.0.0.52:80", "-", "-", "-", "2.0", "KiB", "1m05s", "-"]]


def test_one_resource(running):
    shown = running("show", "virtual-server", "web")
    assert ["pool", "web"] in [line.split() for line in shown.splitlines()]
    assert ["active", "connections", "17"] in [line.split() for line in shown.splitlines()]
    assert "10.0.0.52:80" in running("show", "pool", "web")
    assert json.loads(running("show", "pool", "web", "-o", "json"))["name"] == "web"


def test_connections_are_filtered_and_limited(running):
    shown = running("show", "connections")
    assert len(lines(shown, "web ")) == 25 and "--limit shows more" in shown and "1h01m" in shown and "2.0 KiB" in shown
    assert len(json.loads(running("show", "connections", "web", "-o", "json"))) == 150
    assert len(lines(running("show", "connections", "--filter", "virtual_server=web", "--limit", "7"), "web ")) == 7


def test_the_latest_events(running, api):
    api.events += [{"number": number, "at": "2026-01-01T10:00:00.000+00:00", "kind": "member_down", "pool": "web",
                    "member": "10.0.0.51:80", "text": f"tcp: refused {number}"} for number in range(1, 81)]
    shown = running("show", "events", "web")
    assert "refused 80" in shown and "refused 31" in shown and "refused 30" not in shown
    assert [one["number"] for one in json.loads(running("show", "events", "--limit", "2", "-o", "json"))] == [79, 80]


def test_a_members_health_is_shown(running, api):
    one, two, three = api.resources["pools"]["web"]["members"]
    one["health_status"] = {"state": "down", "reason": "http: status 500, expected 200", "share": 1.0}
    two["health_status"] = {"state": "up", "reason": "", "share": 0.35}
    three["health"] = "down"
    shown = running("show", "members", "web")
    assert "down, http: status 500, expected 200" in shown
    assert "up, slow start 35%" in shown
    assert "down (an operator's word)" in shown


def left(*counts):
    return [[{"pool": "web", "member": "10.0.0.51:80", "connections": count}] for count in counts]


def test_drain_waits_until_nothing_is_left(running, api, monkeypatch):
    from lbapp import drains

    monkeypatch.setattr(drains, "EVERY_S", 0.01)
    api.draining = left(7, 0, 3, None, 0)
    assert "pool web: 10.0.0.51:80 drained" in running("drain", "web", "10.0.0.51:80", "--wait", "--timeout", "60")
    assert len(api.draining) == 1, "one look at which nothing was left is not enough"
    assert (members(api)["10.0.0.51:80"]["draining"], members(api)["10.0.0.51:80"]["drain_timeout"]) == (True, 60)
    assert not members(api)["10.0.0.52:80"]["draining"]
    running("drain", "web", "s1", "--undo")
    assert not members(api)["10.0.0.51:80"]["draining"]


def test_drain_of_a_switch(running, api, monkeypatch):
    from lbapp import drains

    monkeypatch.setattr(drains, "EVERY_S", 0.01)
    api.draining = [[{"kind": "switch", "switch": DPID, "member": "", "pool": "", "connections": count},
                     {"kind": "switch", "switch": "f" * 16, "member": "", "pool": "", "connections": 9}]
                    for count in (4, None, 1, 0)]
    short = f"0x{DPID.lstrip('0').upper()}"
    assert f"switch {DPID}: drained" in running("drain", "--switch", short, "--wait", "--timeout", "60")
    assert (api.switches[0]["draining"], api.switches[0]["drain_timeout"]) == (True, 60)
    assert not any(one["draining"] for one in members(api).values())
    api.switches[0]["connections"] = 5
    assert lines(running("show", "switches"), DPID)[0][7:9] == ["true", "5"]
    assert f"switch {DPID}: in use again" in running("drain", "--switch", DPID, "--undo")
    assert (api.switches[0]["draining"], api.switches[0]["drain_timeout"]) == (False, 60)
    assert f"switch {DPID}: draining" in running("drain", "--switch", DPID)
    api.draining = [[{"kind": "switch", "switch": DPID, "member": "", "pool": "", "connections": None}]]
    assert "an unknown number of connections are left" in running("drain", "--switch", DPID, "--patience", "0", code=1)


def test_drain_of_a_switch_that_nobody_knows(running, api):
    assert "no switch 0000000000000bad is connected" in running("drain", "--switch", "bad", code=1)
    assert not [one for one in api.asked if one.startswith("PATCH")]
    for words in ((), ("web", "--switch", DPID), ("web", "10.0.0.51:80", "--switch", DPID)):
        assert "expected either POOL or --switch DPID" in running("drain", *words, code=2)
    assert "--undo stands alone" in running("drain", "--switch", DPID, "--undo", "--timeout", "5", code=2)


def test_drain_may_be_impatient(running, api):
    api.draining = left(5)
    assert "5 connections are left; they go on draining" in running("drain", "web", "--patience", "0", code=1)
    assert all(one["draining"] for one in members(api).values())
    assert "no member 10.0.0.99:80" in running("drain", "web", "10.0.0.99:80", code=1)
    assert "--undo stands alone" in running("drain", "web", "--undo", "--wait", code=2)


def test_the_shown_configuration_can_be_applied(running):
    text = running("show", "config")
    assert yaml.safe_load(text)["virtual_servers"]
    assert running("apply", "-f", "-", stdin=text) == "no changes\n"
    assert running("apply", "-f", "-", stdin=running("show", "config", "-o", "json")) == "no changes\n"


def test_nothing_configured(lbapp):
    assert "virtual servers: none" in lbapp("show") and "switches: none" in lbapp("show")
    assert lbapp("show", "pools") == "none\n"
    assert json.loads(lbapp("show", "pools", "-o", "json")) == []


# ------------------------------------------------------------------ access and tokens


def test_a_refused_token_is_told_with_its_origin(lbapp, monkeypatch):
    file = lbapp.state / "token"
    assert "--token or LBAPP_TOKEN" in lbapp("show", code=1, token="wrong")
    assert f"wants a token, and {file} does not exist" in lbapp("show", code=1, token=None)
    file.write_text("wrong\n")
    assert f"refused the token in {file}" in lbapp("show", code=1, token=None)
    file.write_text(f"{TOKEN}\nanother\n")
    assert "none" in lbapp("show", token=None)
    monkeypatch.setenv("LBAPP_TOKEN", "wrong")
    assert "LBAPP_TOKEN" in lbapp("show", code=1, token=None)
    assert "none" in lbapp("--token-file", str(file), "show", token=None)
    assert "does not exist" in lbapp("--token-file", str(file) + "x", "show", code=1, token=None)


def test_the_token_does_not_leave_the_machine_unnoticed(lbapp, api):
    result = CliRunner().invoke(cli, ["--token", TOKEN, "--url", "http://192.0.2.1:8080", "show"],
                                obj=lambda url, token, ca: Client(url, token, ca, transport=api.transport))
    assert "WARNING: the token travels to http://192.0.2.1:8080 unencrypted" in result.stderr
    for url in ("http://127.0.0.1:1", "http://[::1]:1", "http://localhost", "https://192.0.2.1"):
        result = CliRunner().invoke(cli, ["--token", TOKEN, "--url", url, "show"],
                                    obj=lambda url, token, ca: Client(url, token, ca, transport=api.transport))
        assert "WARNING" not in result.stderr


def test_tokens_are_printed_and_rotated(lbapp):
    file = lbapp.state / "token"
    assert f"{file} does not exist" in lbapp("token", code=1, token=None)
    tokens = Tokens(file)
    old = lbapp("token", token=None).strip()
    assert tokens.valid(old)
    new = lbapp("token", "--rotate", token=None).strip()
    assert new != old and len(new) >= 40
    assert lbapp("token", token=None).strip() == new
    assert tokens.valid(new) and not tokens.valid(old)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [one.name for one in lbapp.state.iterdir()] == ["token"]
    nowhere = str(lbapp.state / "a" / "b")
    assert "No such file" in lbapp("--token-file", nowhere, "token", "--rotate", code=1, token=None)


def test_a_token_that_cannot_be_replaced_stays(lbapp):
    file = lbapp.state / "token"
    file.mkdir()
    assert "directory" in lbapp("token", "--rotate", code=1, token=None)
    assert [one.name for one in lbapp.state.iterdir()] == ["token"]


# ------------------------------------------------------------------ run


@pytest.fixture
def started(monkeypatch):
    settings: list[launcher.Settings] = []
    monkeypatch.setattr(launcher, "run", settings.append)
    return settings


def test_run_passes_its_options_on(lbapp, started, tmp_path):
    lbapp("run", token=None)
    assert started == [launcher.Settings(state_dir=tmp_path, openflow=("127.0.0.1", 6653), api=("127.0.0.1", 8080))]
    for name in ("c", "k", "oc", "ok", "oa"):
        (tmp_path / name).touch()
    result = lbapp("run", "--state-dir", str(tmp_path / "s"), "--listen", "[::1]:6654", "--api", "127.0.0.2:81",
                   "--tls-certificate", f"{tmp_path}/c", "--tls-key", f"{tmp_path}/k",
                   "--openflow-certificate", f"{tmp_path}/oc", "--openflow-key", f"{tmp_path}/ok",
                   "--openflow-ca", f"{tmp_path}/oa", "--database", "unix:/run/db.sock",
                   "--token-file", f"{tmp_path}/t", "--log-level", "debug", "--log-file", f"{tmp_path}/log",
                   "ryu.app.simple_switch_13", "other", token=None)
    assert result == ""
    assert started[1] == launcher.Settings(
        state_dir=tmp_path / "s", openflow=("::1", 6654), api=("127.0.0.2", 81), tls_certificate=tmp_path / "c",
        tls_key=tmp_path / "k", openflow_certificate=tmp_path / "oc", openflow_key=tmp_path / "ok",
        openflow_ca=tmp_path / "oa", database="unix:/run/db.sock", token_file=tmp_path / "t", log_level="DEBUG",
        log_file=tmp_path / "log", ryu_apps=("ryu.app.simple_switch_13", "other"))
    lbapp("--token-file", f"{tmp_path}/t", "run", token=None)
    assert started[2].token_file == tmp_path / "t"


def test_run_warns_when_the_network_can_reach_it_without_tls(lbapp, started, tmp_path):
    result = CliRunner().invoke(cli, ["run", "--listen", "0.0.0.0:6653", "--api", "[::]:8080"])
    assert "WARNING: --listen 0.0.0.0: OpenFlow is open to the network without TLS" in result.stderr
    assert "WARNING: --api ::: the REST interface is open to the network without TLS" in result.stderr
    result = CliRunner().invoke(cli, ["run", "--listen", "127.0.0.1:6653", "--api", "localhost:8080"])
    assert result.stderr == "" and len(started) == 2


@pytest.mark.parametrize("words, message", [
    ("--listen 6653", "expected host:port"), ("--listen ::1:6653", "expected host:port"),
    ("--listen 127.0.0.1:0", "expected host:port"), ("--listen 127.0.0.1:66530", "expected host:port"),
    ("--tls-key /dev/null", "--tls-certificate and --tls-key belong together"),
    ("--openflow-certificate /dev/null", "--openflow-certificate and --openflow-key belong together"),
    ("--openflow-ca /dev/null", "--openflow-ca needs"), ("--tls-key /none", "does not exist"),
    ("--log-level LOUD", "is not one of"),
])
def test_run_refuses_what_cannot_work(lbapp, started, words, message):
    assert message in lbapp("run", *words.split(), code=2, token=None)
    assert started == []


@pytest.mark.parametrize("error, message", [
    (launcher.StartError("127.0.0.1:6653 is in use"), "lbapp: 127.0.0.1:6653 is in use\n"),
    (PermissionError(13, "Permission denied", "/var/lib/lbapp"), "lbapp: /var/lib/lbapp: Permission denied\n"),
    (ImportError("No module named 'ryu'"),
     "lbapp: No module named 'ryu'; is lbapp installed completely (`make setup`)?\n"),
    (RuntimeError("what?"), "lbapp: internal error: RuntimeError: what? (LBAPP_DEBUG=1 shows where)\n"),
])
def test_what_goes_wrong_in_the_controller_is_one_line(lbapp, monkeypatch, error, message):
    def fail(settings):
        raise error

    monkeypatch.setattr(launcher, "run", fail)
    assert lbapp("run", code=1, token=None) == message


def test_being_told_to_stop_is_no_failure(lbapp, monkeypatch):
    def stop(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(launcher, "run", stop)
    assert lbapp("run", token=None) == ""


# ------------------------------------------------------------------ as a process


def process(*words, **options):
    environment = {**os.environ, "LBAPP_TOKEN": "x"}
    return subprocess.run([sys.executable, "-c", "from lbapp.cli import main; main()", *words], capture_output=True,
                          text=True, timeout=30, env=environment, cwd=Path(__file__).parents[2], **options)


def test_nobody_answers():
    done = process("--url", "http://127.0.0.1:1", "show")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "lbapp: no controller answers at http://127.0.0.1:1; start one with `lbapp run`\n"
    assert process("--url", "nonsense", "show").stderr == \
        "lbapp: expected a URL such as http://127.0.0.1:8080, got 'nonsense'\n"


def test_run_imports_nothing_that_eventlet_has_to_patch():
    done = subprocess.run([sys.executable, "-c", "import lbapp.cli, sys; print([name for name in ("
                           "'httpx', 'rich', 'ssl', 'eventlet', 'ryu', 'lbapp.client') if name in sys.modules])"],
                          capture_output=True, text=True, timeout=30, cwd=Path(__file__).parents[2])
    assert done.stdout == "[]\n"
