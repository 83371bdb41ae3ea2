# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The benchmark's own arithmetic, files and housekeeping; the measuring itself is ``make bench``."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from bench import __main__ as command
from bench import connections, goals, holder, lab, load, machine, packets, prober, report, rounds, scale, watching
from bench.lab import BenchError
from bench.lbapp_targets import OURS, Lbapp, counted
from bench.load import Messages
from bench.targets import BASELINES, NGINX_PROXY, UPSTREAM, VIP, Target
from lbapp.config.model import Member, Pool, VirtualServer
from lbapp.dataflow.frames import parse
from tests.monitored import closed_port
from topologies.namespace import unavailable, wait_until

needs_namespaces = pytest.mark.skipif(unavailable() is not None, reason=unavailable() or "")


# ------------------------------------------------------------------ reading what the tools print


def test_wrk_runs_side_by_side_are_added_up() -> None:
    one = "Running 2s test\nresult 2000000 1000 128000 0 0 0 0 0\nbucket 10 900\nbucket 500 100\n"
    two = "result 1000000 300 64000 1 2 3 4 5\nbucket 10 300\n"
    result = load.parse_wrk([one, two])
    assert result.per_second == 500 + 300
    assert result.bytes_per_second == 64000 + 64000
    assert (result.requests, result.errors) == (1300, 15)
    assert result.histogram == {10: 1200, 500: 100}
    assert result.percentile_ms(50) == 0.01
    assert result.percentile_ms(99) == 0.5


def test_wrk_without_result_is_an_error() -> None:
    with pytest.raises(BenchError, match="no result"):
        load.parse_wrk(["result 1000000 300 64000 0 0 0 0 0\n", "unable to connect\n"])


@pytest.mark.parametrize(("percent", "expected"), [(1, 1), (50, 50), (99, 99), (99.5, 100), (100, 100)])
def test_percentile_is_the_smallest_value_that_covers_so_many(percent: float, expected: int) -> None:
    assert load.percentile(list(range(1, 101)), percent) == expected


def test_percentile_of_nothing_is_an_error() -> None:
    with pytest.raises(BenchError):
        load.percentile([], 99)


def test_iperf_counts_what_arrived() -> None:
    output = {"end": {"sum_sent": {"bits_per_second": 9e9}, "sum_received": {"bits_per_second": 8.5e9}}}
    assert load.parse_iperf(json.dumps(output)) == 8.5


@pytest.mark.parametrize(("output", "reason"), [
    ("", "no result"),
    ('{"error": "unable to connect"}', "unable to connect"),
    ('{"end": {}}', "incomplete"),
    ('{"end": {"sum_received": {"bits_per_second": 0}}}', "nothing arrived"),
])
def test_iperf_failures_say_why(output: str, reason: str) -> None:
    with pytest.raises(BenchError, match=reason):
        load.parse_iperf(output)


def test_probers_side_by_side_are_one_sequence() -> None:
    one = '{"milliseconds": [2, 3], "first_byte": [1, 2.5], "failures": 0}'
    two = '{"milliseconds": [4], "first_byte": [3], "failures": 1}'
    assert load.parse_prober([one, two], "milliseconds", "x") == [2, 3, 4]
    assert load.parse_prober([one, two], "first_byte", "x") == [1, 2.5, 3]
    with pytest.raises(BenchError, match="x: 2 of 5 probes failed"):
        load.parse_prober([one, two, two.replace("[4]", "[]").replace("[3]", "[]")], "first_byte", "x")
    with pytest.raises(BenchError, match="x: 0 of 0 probes failed"):
        load.parse_prober([], "first_byte", "x")


def test_kernel_counters_are_found_by_name() -> None:
    text = ("TcpExt: SyncookiesSent ListenDrops TCPSynRetrans\nTcpExt: 1 2 3\n"
            "IpExt: InNoRoutes\nIpExt: 7\n")
    assert load.parse_netstat(text) == {"TCPSynRetrans": 3, "TCPTimeouts": 0, "PAWSTimewait": 0, "ListenDrops": 2,
                                        "TCPTimeWaitOverflow": 0}


def test_the_small_object_has_the_size_it_is_said_to_have() -> None:
    assert len(load.small_object()) == load.SMALL_BYTES == 128


def test_process_times_are_read_behind_a_name_with_parentheses() -> None:
    fields = ["S", "7", *["0"] * 9, "150", "50", *["0"] * 6, "4711", "0"]
    assert machine.process_ticks("99 (a) b (c)) " + " ".join(fields)) == (7, 200, 4711)


def test_own_processes_are_not_others() -> None:
    others, began = machine.Others(), time.monotonic()
    before = machine.cpu_seconds(os.getpid())
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass
    own = machine.cpu_seconds(os.getpid()) - before
    assert own > 0.1
    # Whatever else runs here: the processors cannot have given it what we used.
    assert others.cores() < (os.cpu_count() or 1) - 0.1 / (time.monotonic() - began)


# ------------------------------------------------------------------ rounds


class Broken(Target):
    name = "broken"

    def build(self, lab: lab.Lab) -> load.Site:
        (lab.directory / "trace").write_text("x")
        raise BenchError("the middle is missing")


def test_every_round_has_every_target_and_none_keeps_its_place() -> None:
    targets = list(BASELINES)
    order = rounds.orders(targets, 20, seed=3)
    assert len(order) == 20
    for this, following in itertools.pairwise(order):
        assert sorted(t.name for t in this) == sorted(t.name for t in targets)
        assert all(one is not other for one, other in zip(this, following, strict=True))
    assert order == rounds.orders(targets, 20, seed=3)
    assert [len(one) for one in rounds.orders(targets[:1], 2, seed=1)] == [1, 1]


def test_a_failed_target_is_a_sample_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "wait_until_quiet", lambda patience: 0.0)
    said: list[str] = []
    sample = rounds.turn(Broken(), 2, 1, said.append)
    assert (sample.target, sample.round, sample.error, sample.metrics) == ("broken", 2, "the middle is missing", {})
    assert said[-1] == "starting"


def test_spread_and_medians() -> None:
    samples = [rounds.Sample("nft", n, {"new_conn_per_s": value}) for n, value in enumerate((30.0, 10.0, 20.0), 1)]
    samples.append(rounds.Sample("bare", 1, {}, error="no"))
    summary = rounds.spread(samples)
    assert summary == {"nft": {"new_conn_per_s": (20.0, 10.0, 30.0)}}
    assert rounds.medians(summary) == {"nft": {"new_conn_per_s": 20.0}}


def test_added_latency_is_counted_from_the_same_round() -> None:
    samples = [rounds.Sample(name, number, {"first_byte_p99_ms": value} if value else {}) for name, number, value in (
        ("haproxy-http", 1, 3.0), ("bare", 1, 1.0), ("bare", 2, 2.0), ("haproxy-http", 2, 2.5), ("nft", 2, 0.0),
        ("haproxy-http", 3, 9.0), ("bare", 3, 0.0))]
    rounds.add_latency(samples)
    added = [sample.metrics.get("first_byte_added_p99_ms") for sample in samples]
    assert added == [2.0, None, None, 0.5, None, None, None]
    assert rounds.medians(rounds.spread(samples))["haproxy-http"]["first_byte_added_p99_ms"] == 1.25


def test_the_first_byte_is_timed_where_requests_are_read_and_where_nothing_is_between() -> None:
    assert {target.name for target in (*BASELINES, *OURS) if target.first_byte} == {
        "bare", "haproxy-http", "nginx-http", "lbapp-splice", "lbapp-hybrid", "lbapp-handoff"}
    assert rounds.NOTHING_BETWEEN in command.BY_NAME
    assert set(report.LATENCY) <= set(rounds.METRICS)


@pytest.mark.skipif(shutil.which("nginx") is None, reason="not installed: nginx")
def test_nginx_has_the_rules_of_haproxy(tmp_path: Path) -> None:
    """Four servers that answer with their names stand for the four pools."""
    names = ("web", "one", "two", "three")
    upstreams = "\n".join(UPSTREAM.format(name=name, members=f"server unix:{tmp_path}/{name};") for name in names)
    text = NGINX_PROXY.format(directory=tmp_path, upstreams=upstreams, vip="127.0.0.1", web=8099)
    text = text.replace("listen 127.0.0.1:8099 backlog=8192 reuseport;", f"listen unix:{tmp_path}/proxy;")
    servers = "".join(f"    server {{ listen unix:{tmp_path}/{name}; return 200 {name}; }}\n" for name in names)
    (tmp_path / "nginx.conf").write_text(text.rstrip().removesuffix("}") + servers + "}\n")
    tmp_path.chmod(0o755)
    process = subprocess.Popen(["nginx", "-e", str(tmp_path / "error.log"), "-c", str(tmp_path / "nginx.conf")])
    try:
        wait_until((tmp_path / "proxy").exists, 10, "nginx listens")
        for words, expected in ((["http://a/"], "web"), (["http://a/one/x"], "one"), (["http://TWO.example/"], "two"),
                                (["-b", "a=b; third=yes", "http://a/"], "three"), (["http://a/one"], "web"),
                                (["-b", "third=no", "http://a/"], "web"), (["http://two.example/one/"], "one")):
            done = subprocess.run(["curl", "-sS", "-m", "5", "--unix-socket", str(tmp_path / "proxy"), *words],
                                  capture_output=True, text=True, check=True, timeout=10)
            assert done.stdout == expected, words
    finally:
        process.terminate()
        process.wait(10)


# ------------------------------------------------------------------ goals and report


def figures(ours: float, theirs: float) -> dict[str, dict[str, float]]:
    metrics = ("new_conn_per_s", "keepalive_req_per_s", "big_mb_per_s", "up_gbit_per_s", "down_gbit_per_s")
    return {"haproxy-tcp": dict.fromkeys(metrics, theirs), "lbapp-switch": dict.fromkeys(metrics, ours),
            "lbapp-punted": dict.fromkeys(metrics, ours), "lbapp-ovs": {"controller_us_per_conn": 25.1},
            "nft": dict.fromkeys(metrics, theirs), "haproxy-http": dict.fromkeys(metrics, theirs),
            "lbapp-splice": {**dict.fromkeys(metrics, 1.8 * ours), "controller_us_per_conn": 45.1},
            "lbapp-handoff": {**dict.fromkeys(metrics, 1.8 * ours), "controller_us_per_conn": 45.0},
            "lbapp-fastpath": {**dict.fromkeys(metrics, 2 * ours), "messages_per_closed": 1 / 60},
            "lbapp-agent": dict.fromkeys(metrics, 1.2 * ours)}


def test_goals_are_computed_from_the_figures() -> None:
    found = {goal.text: goal.met for goal in goals.goals(figures(90, 100), {})}
    assert found["lbapp-punted new_conn_per_s at least 0.95 times haproxy-tcp"] is False
    assert found["lbapp-fastpath new_conn_per_s at least 1.15 times nft"] is True
    assert found["lbapp-agent new_conn_per_s at least 1.20 times haproxy-tcp"] is False
    assert found["looking after members costs at most 3 % of new connections/s"] is None
    assert found["lbapp-splice big_mb_per_s at least 1.80 times haproxy-http"] is False
    assert found["lbapp-splice new_conn_per_s at least 1.00 times haproxy-http"] is True
    assert found["lbapp-handoff keepalive_req_per_s at least 1.30 times haproxy-http"] is True
    assert found["lbapp-handoff big_mb_per_s at least 1.80 times haproxy-http"] is False
    assert found["lbapp-fastpath: at most 1/64 message to the control segment a closed connection"] is False
    assert found["lbapp-switch new_conn_per_s at least 0.95 times haproxy-tcp"] is False
    assert found["lbapp-switch keepalive_req_per_s at least 1.00 times haproxy-tcp"] is False
    assert found["lbapp-ovs: controller at most 25 µs CPU a punted connection"] is False
    assert found["lbapp-handoff: controller at most 45 µs CPU a connection"] is True
    assert found["lbapp-splice: controller at most 45 µs CPU a connection"] is False
    assert found["100000 concurrent connections held"] is None


def test_goals_at_their_limits_are_met() -> None:
    scale_figures = {"connections_held": 100_000, "held_rules_per_virtual_server": 60,
                     "held_controller_bytes_per_connection": 0.0, "fast_connections_held": 1_000_000,
                     "fast_bytes_per_connection": 512, "idle_agent_percent": 1.0, "idle_fastpath_percent": 1.0,
                     **watching.figures([97.5, 49], [100, 50])}
    targets = figures(100, 100)
    targets["lbapp-ovs"]["controller_us_per_conn"] = 25.0
    targets["lbapp-splice"]["controller_us_per_conn"] = 45.0
    targets["lbapp-fastpath"]["messages_per_closed"] = 1 / 64
    targets["lbapp-handoff"]["asking_per_conn"] = 1 + 1 / 64
    assert all(goal.met for goal in goals.goals(targets, scale_figures))
    short = {**scale_figures, "connections_held": 99_999, "held_rules_per_virtual_server": 61,
             "fast_connections_held": 999_999, "fast_bytes_per_connection": 513, "idle_agent_percent": 1.1}
    assert sum(goal.met is False for goal in goals.goals(targets, short)) == 5


def test_nothing_measured_is_neither_met_nor_missed() -> None:
    found = goals.goals({}, {})
    assert {goal.met for goal in found} == {None}
    lines = report.goal_lines(found)
    assert len(lines) == 1
    assert f"{len(found)} not measured" in lines[0]


@pytest.mark.parametrize(("value", "text"), [
    (0, "0"), (0.01234, "0.0123"), (7.0, "7"), (25.04, "25"), (123.4, "123"), (10512.3, "10\u00a0512")])
def test_numbers_are_short(value: float, text: str) -> None:
    assert report.number(value) == text


def test_tables_show_median_range_and_ratio() -> None:
    summary: rounds.Spread = {"haproxy-tcp": {"new_conn_per_s": (100.0, 90.0, 110.0)},
                              "lbapp-switch": {"new_conn_per_s": (95.0, 80.0, 99.0),
                                               "messages_per_conn": (0.0, 0.0, 0.0)}}
    rates, costs = report.tables(summary, ["haproxy-tcp", "lbapp-switch", "nft"])
    assert list(rates.columns[1].cells) == ["100\n[dim]90..110[/dim]", "95\n[dim]80..99[/dim]\n[cyan]0.95x[/cyan]"]
    assert list(costs.columns[0].cells) == ["lbapp-switch"]


def test_files_are_written_and_other_parts_are_kept(tmp_path: Path) -> None:
    assert report.read_latest(tmp_path) == {}
    report.update_latest({"scale": {"rules": 3}}, tmp_path)
    report.update_latest({"targets": {"nft": {"p99_ms": 1.5}}}, tmp_path)
    assert json.loads((tmp_path / "latest.json").read_text()) == {
        "scale": {"rules": 3}, "targets": {"nft": {"p99_ms": 1.5}}}
    report.save_samples([rounds.Sample("nft", 1, {"p99_ms": 1.5}, {"errors": 0})], {"rounds": 1}, tmp_path)
    saved = json.loads((tmp_path / "samples.json").read_text())
    assert saved["samples"][0] == {"target": "nft", "round": 1, "metrics": {"p99_ms": 1.5}, "detail": {"errors": 0},
                                   "others_cores": 0.0, "error": None}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.json", "samples.json"]
    (tmp_path / "latest.json").write_text("{half")
    assert report.read_latest(tmp_path) == {}


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    summary: rounds.Spread = {"nft": {"p99_ms": (2.0, 1.0, 3.0)}, "haproxy-tcp": {"p99_ms": (4.0, 4.0, 4.0)}}
    report.plot(summary, ["nft", "haproxy-tcp"], tmp_path / "latest.png")
    assert (tmp_path / "latest.png").read_bytes().startswith(b"\x89PNG")


def test_messages_are_counted_whoever_carries_them() -> None:
    agent = {"deletes": 640, "delete_messages": 10, "queries": 650, "handshakes": {"greeted": 650, "greeted_ack": 650}}
    stats = {"virtual_servers": [{"packets": 5000}, {"packets": None}], "switches": [
        {"flow_mods": 3, "packet_ins": 7, "flows_removed": 1, "fastpath": agent},
        {"flow_mods": 1, "packet_ins": 2, "flows_removed": 0, "fastpath": None,
         "relay": {"handshakes": {"greeted": 2}}}]}
    assert counted(stats, 99) == Messages(99, 4, 9, 640, 10, 9 + 1 + 650 + 10, 5000 + 1300 + 2)


def test_messages_of_handoff_stand_beside_the_naive_count() -> None:
    def goal(**metrics: float) -> goals.Goal:
        return next(one for one in goals.goals({"lbapp-handoff": metrics}, {}) if "1 + 1/64" in one.text)

    found = goal(asking_per_conn=1.0014, naive_per_conn=9.07)
    assert found.met and found.measured == "1.001, against 9.1 of a controller that is asked for each packet"
    assert goal(asking_per_conn=1.1).met is False and goal().met is None


def test_work_of_others_is_told() -> None:
    quiet, busy = rounds.Sample("nft", 1), rounds.Sample("bare", 1, others_cores=0.7)
    assert report.busy_lines([quiet]) == []
    assert "1 of 2 measurements" in report.busy_lines([quiet, busy])[0]


def test_lost_syns_are_told() -> None:
    fine = rounds.Sample("nft", 1, detail={"requests": 10_000, "kernel": {"TCPSynRetrans": 5}})
    lost = rounds.Sample("bare", 1, detail={"requests": 10_000, "kernel": {"TCPSynRetrans": 6}})
    assert report.loss_lines([fine, rounds.Sample("nft", 2, error="no")]) == []
    (line,) = report.loss_lines([fine, lost])
    assert "bare: up to 6 SYNs" in line


# ------------------------------------------------------------------ the command


def test_unknown_targets_are_refused_with_the_known_names() -> None:
    result = CliRunner().invoke(command.main, ["--targets", "nft,ngnix"])
    assert result.exit_code == 2
    assert "ngnix" in result.output
    for name in ("bare", "nft", "haproxy-tcp", "haproxy-http", "lbapp-switch", "lbapp-punted", "lbapp-rules"):
        assert name in command.BY_NAME


def test_a_failure_is_reported_and_ends_with_status_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "BY_NAME", {"broken": Broken()})
    monkeypatch.setattr(command, "ALL", (Broken(),))
    monkeypatch.setattr(command, "_prepare", lambda: None)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report.save_samples, "__defaults__", (tmp_path,))
    monkeypatch.setattr(report.update_latest, "__defaults__", (tmp_path,))
    monkeypatch.setattr(report.read_latest, "__defaults__", (tmp_path,))
    monkeypatch.setattr(rounds, "wait_until_quiet", lambda patience: 0.0)
    result = CliRunner().invoke(command.main, ["--targets", "broken", "--rounds", "2", "--no-scale"])
    assert result.exit_code == 1
    assert result.output.count("the middle is missing") == 4  # as it happens, and at the end
    assert json.loads((tmp_path / "latest.json").read_text())["targets"] == {}


# ------------------------------------------------------------------ what lbapp is asked for


@pytest.mark.parametrize("target", OURS, ids=lambda target: target.name)
def test_requests_fit_the_model(target: Lbapp) -> None:
    body = target.virtual_server("web", 80, ["10.1.0.1", "10.1.0.2"])
    pool = msgspec.convert(body.pop("pool"), Pool)
    virtual_server = msgspec.convert(body, VirtualServer)
    assert len(pool.members) == 2
    assert virtual_server.switch_decides(pool) is (target.name in ("lbapp-switch", "lbapp-fastpath"))


def test_the_large_site_is_valid_and_has_no_conflicts() -> None:
    addresses = scale.member_addresses(2)
    document = scale.site(1000, addresses)
    pools = {pool.name: pool for pool in (msgspec.convert(pool, Pool) for pool in document["pools"])}
    assert len(pools) == 1000
    keys = set()
    for entry in document["virtual_servers"]:
        pool = pools[entry.pop("pool")]
        virtual_server = msgspec.convert(entry, VirtualServer)
        keys.add(virtual_server.key)
        assert len(pool.members) == scale.MEMBERS
        assert all(isinstance(member, Member) and member.address in addresses for member in pool.members)
        assert virtual_server.switch_decides(pool)
    assert len(keys) == 1000


def test_virtual_addresses_are_distinct_and_meet_no_host() -> None:
    found = {scale.virtual_address(index) for index in range(50_000)}
    assert len(found) == 50_000
    assert not found & {VIP, *scale.member_addresses(2)}
    for address in ("10.64.0.1", scale.virtual_address(49_999)):
        socket.inet_aton(address)


# ------------------------------------------------------------------ connections without sockets


@pytest.mark.parametrize(("what", "flags"), [("syn", packets.SYN), ("ack", packets.ACK)])
def test_generated_packets_are_what_a_client_sends(what: str, flags: int) -> None:
    mac, own = bytes.fromhex("026c62000001"), bytes.fromhex("020000000009")
    made = [bytes(frame) for frame in packets.frames(own, mac, VIP, 80, "172.16.0.0", packets.PORTS + 3, flags)]
    assert len(made) == packets.PORTS + 3
    parsed = [parse(frame) for frame in (*made[:500], *made[-5:])]
    for frame, packet in zip((*made[:500], *made[-5:]), parsed, strict=True):
        assert (frame[:6], frame[6:12]) == (mac, own)
        assert packet.tcp_flags == flags
        assert (packet.signature.destination, packet.signature.destination_port) == (socket.inet_aton(VIP), 80)
        pseudo = frame[26:34] + bytes((0, 6)) + (len(frame) - 34).to_bytes(2, "big")
        assert packets.total(frame[14:34]) % 0xFFFF == 0, "the header's checksum is whole"
        assert packets.total(pseudo + frame[34:]) % 0xFFFF == 0, "and TCP's"
    assert parsed[0].signature.source == socket.inet_aton("172.16.0.0")
    assert parsed[-1].signature.source == socket.inet_aton("172.16.0.1")
    assert len({(frame[26:30], frame[34:36]) for frame in made}) == len(made), "each is another client's"


def test_kernel_memory_is_added_up() -> None:
    assert connections.parse_memory(
        "MemTotal:       24684000 kB\nSlab:              3 kB\nVmallocTotal:   9 kB\nVmallocUsed:    2 kB\n"
        "Percpu:              1 kB\nHugePages_Total:       0\n") == 6 * 1024


def test_maps_are_told_from_other_files() -> None:
    text = "pos:\t0\nmap_type:\t1\nkey_size:\t40\nmemlock:\t464149632\nmap_id:\t7\n"
    assert connections.parse_memlock(text) == 464149632
    assert connections.parse_memlock("pos:\t0\nprog_type:\t3\nmemlock:\t4096\nprog_id:\t9\n") is None
    assert connections.parse_memlock("pos:\t0\nflags:\t02\n") is None


def test_what_a_process_started_counts_as_its_own() -> None:
    stat = "42 (a) b) S " + " ".join(map(str, (1, *range(4, 13), 30, 10, 7, 3, 20)))
    assert connections.with_children(stat) == (30 + 10 + 7 + 3) / machine.TICKS


def test_all_parts_of_scale_have_a_size_and_names_for_their_figures() -> None:
    assert command.SIZES.keys() == scale.PARTS.keys()
    names = [name for part in scale.PARTS.values() for name in part.figures]
    assert len(names) == len(set(names))


# ------------------------------------------------------------------ prober and holder


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/small" else 404)
        self.end_headers()
        self.wfile.write(b"x" * 128)

    def log_message(self, *_: object) -> None:
        pass


def test_the_prober_times_whole_connections_and_counts_failures() -> None:
    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    port = server.server_address[1]
    try:
        good = prober.probe("127.0.0.1", port, "/small", 2.0, 0.1)
        bad = prober.probe("127.0.0.1", port, "/other", 0.1, 0.01)
    finally:
        server.shutdown()
        server.server_close()
    took = good["milliseconds"]
    assert isinstance(took, list)
    assert 2 <= len(took) <= 21
    assert all(0 < value < 5000 for value in took)
    first = good["first_byte"]
    assert isinstance(first, list)
    assert all(0 < begun <= whole for begun, whole in zip(first, took, strict=True))
    assert good["failures"] == 0
    assert bad["milliseconds"] == []
    assert isinstance(bad["failures"], int)
    assert bad["failures"] > 0
    assert prober.probe("127.0.0.1", port, "/small", 0.05, 0.02)["milliseconds"] == []


@pytest.fixture
def port() -> Iterator[int]:
    """That nobody else is given."""
    with closed_port() as kept:
        yield kept.getsockname()[1]


def test_connections_are_held_and_checked(port: int) -> None:
    program = str(Path(holder.__file__))
    server = subprocess.Popen([sys.executable, program, "serve", str(port)])
    try:
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.05)
        client = subprocess.Popen([sys.executable, program, "hold", "127.0.0.1", str(port), "300"],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert client.stdin is not None
            assert client.stdout is not None
            assert json.loads(client.stdout.readline()) == {"held": 300, "failed": 0}
            client.stdin.write("check\n")
            client.stdin.flush()
            assert json.loads(client.stdout.readline()) == {"alive": 300}
            server.kill()
            server.wait()
            client.stdin.write("check\n")
            client.stdin.flush()
            assert json.loads(client.stdout.readline()) == {"alive": 0}
            client.stdin.close()
            assert client.wait(5) == 0
        finally:
            client.kill()
            client.wait()
            client.stdout.close()  # type: ignore[union-attr]
    finally:
        server.kill()
        server.wait()


def test_refused_connections_are_counted(port: int) -> None:
    one = holder.Holder("127.0.0.1", port)
    assert one.fill(20) == 20
    assert one.held == {}


# ------------------------------------------------------------------ housekeeping


def runs(pid: int) -> bool:
    """Whether a process does anything still; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@needs_namespaces
@pytest.mark.integration
def test_a_lab_leaves_nothing_behind() -> None:
    with pytest.raises(ZeroDivisionError), lab.Lab() as here:
        one, other = here.namespace("one"), here.namespace("other")
        here.link(one, "eth0", other, "eth0")
        here.ip(["addr add 10.0.0.1/24 dev eth0"], one)
        here.ip(["addr add 10.0.0.2/24 dev eth0"], other)
        process = here.spawn(other, "server", [sys.executable, "-m", "http.server", "--bind", "10.0.0.2", "8000"])
        assert Path(f"/proc/{process.pid}/ns/net").stat().st_ino == other.inode
        here.wait_port(one, "10.0.0.2", 8000, process)
        directory, pid, names = here.directory, process.pid, [one.name, other.name]
        assert one.call(lambda: Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()) == ["1024", "65535"]
        _ = 1 / 0
    assert not directory.exists()
    assert not runs(pid)
    assert not any((lab.NAMED / name).exists() for name in names)


@needs_namespaces
@pytest.mark.integration
def test_failures_in_a_lab_have_reasons() -> None:
    with lab.Lab() as here:
        one = here.namespace("one")
        dead = here.spawn(one, "dead", ["sh", "-c", "echo no such thing >&2; exit 3"])
        with pytest.raises(BenchError, match="dead ended with status 3: no such thing"):
            here.wait_port(one, "127.0.0.1", 9, dead)
        with pytest.raises(BenchError, match="longer than 1 s"):
            here.run(one.argv("sleep", "20"), timeout=1)
        with pytest.raises(BenchError, match="false failed with status 1"):
            here.run(["false"])
        with pytest.raises(BenchError, match="not installed"):
            here.run(["no-such-program-here"])


@needs_namespaces
@pytest.mark.integration
def test_what_a_killed_run_left_is_swept() -> None:
    script = ("from bench import lab; import sys\n"
              "l = lab.Lab(); n = l.namespace('left'); p = l.spawn(n, 's', ['sleep', '60'])\n"
              "print(n.name, p.pid, l.directory, flush=True); sys.stdin.read()\n")
    run = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    name, pid, directory = run.stdout.readline().split()
    run.kill()
    run.communicate()
    assert (lab.NAMED / name).exists()
    assert {name, Path(directory).name} <= set(lab.sweep())
    assert not (lab.NAMED / name).exists()
    assert not Path(directory).exists()
    assert not runs(int(pid))
