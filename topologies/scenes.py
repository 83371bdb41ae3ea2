# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The scenes of ``make demo``, in order. Each does something real, shows it, and checks what it claims.

``mininet/demo.py`` is the command; :mod:`topologies.lab` is the stage, :mod:`topologies.story` the voice.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from topologies import health_scene, l7_scene
from topologies.controller import API
from topologies.hosts import ECHO_PORT, LabHost
from topologies.lab import BIG_BYTES, Lab
from topologies.namespace import end, wait_until
from topologies.single import SingleTopo
from topologies.story import NotHeld, Story

VIP, VIP6 = SingleTopo.VIP, SingleTopo.VIP6
WEIGHTS = {"s1": 3, "s2": 2, "s3": 1}
REQUESTS_EACH = 200
RATE_SECONDS = 2
DIRECT_PORT = 8000
DOWNLOAD_LIMIT = "12M"
MESSAGES = ("packet_ins", "packet_outs", "flow_mods", "flows_removed")
MANY_SIGMAS = 5
"""An observed share may be this many standard deviations off: once in a million runs by chance."""


class Demo:
    """The demonstration.

    Args:
        lab: the stage.
        story: the voice.
    """

    def __init__(self, lab: Lab, story: Story) -> None:
        self.lab = lab
        self.story = story
        self.digest = ""
        self.downloads: dict[str, tuple[Path, subprocess.Popen[Any]]] = {}

    def play(self) -> None:
        """All scenes.

        Raises:
            NotHeld: a claim was wrong.
        """
        self.build()
        self.add_by_rest()
        self.who_serves_whom()
        self.messages()
        self.other_families()
        self.disable_a_member()
        health_scene.play(self)
        self.kill_the_controller()
        self.rates()
        self.fast_path()

    # ----------------------------------------------------------------- helpers

    def rest(self, method: str, path: str, body: Any = None, show: Sequence[str] = (), quiet: bool = False) -> Any:
        """Make a REST call with a real curl, show it as it can be typed, and return its JSON.

        Args:
            method: the HTTP method.
            path: below the API's address.
            body: sent as JSON.
            show: fields of the answer to show; all where empty.
            quiet: show nothing.
        """
        url = f"http://{API}{path}"
        visible = ["curl", "-s", *(["-X", method] if method not in ("GET", "POST") else []),
                   *(["-H", "Authorization: Bearer $TOKEN"] if quiet is False else [])]
        sent = ["-H", "Content-Type: application/json", "-d", json.dumps(body)] if body is not None else []
        token = (self.lab.controller.state / "token").read_text().strip()
        if not quiet:
            line = " ".join(f'"{part}"' if "$TOKEN" in part else shlex.quote(part) for part in [*visible, *sent, url])
            self.story.command("operator", line)
        done = self.lab.root.run("curl", "-sS", "-X", method, "-H", f"Authorization: Bearer {token}", *sent,
                                 "-w", "\n%{http_code}", url).stdout
        text, _, status = done.rpartition("\n")
        if not status.startswith("2"):
            raise NotHeld(f"{method} {path} succeeds: it gave {status}: {text.strip()}")
        answer = json.loads(text) if text.strip() else None
        if not quiet:
            shown = {key: answer[key] for key in show if key in answer} if show and isinstance(answer, dict) else answer
            self.story.answer(f"{status} " + json.dumps(shown, ensure_ascii=False))
        return answer

    def add(self, name: str, port: int, algorithm: str, members: Sequence[dict[str, Any]], vip: str = VIP,
            protocol: str = "TCP", quiet: bool = False, **more: Any) -> dict[str, Any]:
        """Add a virtual server with a pool of its own, and wait until it serves."""
        body = {"name": name, "vip_address": vip, "protocol": protocol, "protocol_port": port, **more,
                "pool": {"name": f"{name}-pool", "lb_algorithm": algorithm, "members": list(members)}}
        answer: dict[str, Any] = self.rest("POST", "/v1/virtual-servers", body, quiet=quiet, show=(
            "id", "name", "vip_address", "protocol", "protocol_port", "provisioning_status", "operating_status"))
        client = self.lab.client("c1")
        if protocol == "TCP":
            url = f"http://[{vip}]:{port}/" if ":" in vip else f"http://{vip}:{port}/"
            wait_until(lambda: client.run("curl", "-gsf", "--max-time", "1", url, check=False).returncode == 0, 10,
                       f"{name} serves")
        else:
            wait_until(lambda: self._echoes(client, vip, port), 10, f"{name} serves")
        return answer

    @staticmethod
    def _echoes(client: LabHost, address: str, port: int) -> bool:
        try:
            return client.udp(address, port) != [None]
        except ConnectionRefusedError:
            return False

    def members(self, port: int = 80, six: bool = False, weights: dict[str, int] | None = None) -> list[dict[str, Any]]:
        """All servers as members of a pool."""
        return [{"name": host.name, "address": host.address6 if six else host.address, "protocol_port": port,
                 "weight": (weights or {}).get(host.name, 1)} for host in self.lab.servers]

    def ask(self, url: str, count: int = REQUESTS_EACH, clients: Sequence[LabHost] = ()) -> dict[str, Counter[str]]:
        """New connections from each client; who answered, by client.

        Raises:
            NotHeld: a request was not answered by a server.
        """
        asked = {client.name: client.who(url, count) for client in clients or self.lab.clients}
        names = {server.name for server in self.lab.servers}
        strange = {answer for counter in asked.values() for answer in counter if answer not in names}
        answered = sum(sum(counter.values()) for counter in asked.values())
        if strange or answered != count * len(asked):
            raise NotHeld(f"all of {count * len(asked)} requests to {url} are answered: {answered} were, "
                          f"and there was {', '.join(sorted(strange)) or 'nothing else'}")
        return asked

    def statistics(self) -> Counter[str]:
        """Messages between the switches and the controller so far, by kind."""
        totals: Counter[str] = Counter()
        for switch in self.lab.rest.get("/v1/stats")["switches"]:
            totals.update({kind: switch[kind] for kind in MESSAGES})
        return totals

    # ------------------------------------------------------------------- scenes

    def build(self) -> None:
        """The network, the servers, the controller."""
        story, lab = self.story, self.lab
        story.scene("A network in Mininet: one Open vSwitch, three clients, three servers")
        story.say(f"switch [bold]lb1[/]: Open vSwitch {'.'.join(map(str, lab.ovs.version()))}, userspace datapath, "
                  f"segmentation offload {'on' if lab.ovs.tso else 'off'}")
        for kind, hosts in (("clients", lab.clients), ("servers", lab.servers)):
            story.say(f"{kind}: " + ", ".join(f"[bold]{h.name}[/] {h.address} {h.address6}" for h in hosts))
        self.digest = lab.make_file()
        lab.start_servers()
        story.say(f"each server runs nginx, and a UDP echo at port {ECHO_PORT}; both say who answers")
        story.command("operator", "lbapp run")
        begun = time.monotonic()
        lab.start_controller()
        story.check(True, f"the switch is connected to it, {time.monotonic() - begun:.1f} s after its start")

    def add_by_rest(self) -> None:
        """A virtual server by a REST call; the first request."""
        story, lab = self.story, self.lab
        story.scene("A virtual server is added by one REST call, pool and members with it")
        self.add("web", 80, "WEIGHTED_ROUND_ROBIN", self.members(weights=WEIGHTS))
        client = lab.client("c1")
        url = f"http://{VIP}/about"
        story.command("c1", f"curl {url}")
        answer = client.curl(url)
        story.answer(answer)
        about = json.loads(answer)
        server = lab.server(about["server"])
        story.check(about["server_address"] == server.address and about["client_address"] == client.address,
                    f"c1 asked {VIP}; {server.name} answered at its own address {server.address}, "
                    f"and saw c1's address {client.address}", answer.strip())

    def who_serves_whom(self) -> None:
        """The table of clients and servers; weights asked and observed."""
        story, lab = self.story, self.lab
        story.scene("Which member served whom")
        story.command("c1, c2, c3", f"curl -H 'Connection: close' 'http://{VIP}/?[1-{REQUESTS_EACH}]'")
        asked = self.ask(f"http://{VIP}/")
        servers = [server.name for server in lab.servers]
        totals: Counter[str] = sum(asked.values(), Counter())
        number, weights = sum(totals.values()), sum(WEIGHTS.values())
        rows: list[list[object]] = [[name, *(counter[server] for server in servers)]
                                    for name, counter in asked.items()]
        rows.append(["observed", *(f"{totals[server] / number:.1%}" for server in servers)])
        rows.append(["asked: weight", *(f"{WEIGHTS[server]}/{weights} = {WEIGHTS[server] / weights:.1%}"
                                        for server in servers)])
        story.table(["new connections", *servers], rows)
        for server in servers:
            share = WEIGHTS[server] / weights
            tolerance = MANY_SIGMAS * math.sqrt(share * (1 - share) / number)
            if abs(totals[server] / number - share) > tolerance:
                raise NotHeld(f"{server} gets {share:.1%} of the connections, give or take {tolerance:.1%}: "
                              f"it got {totals[server] / number:.1%}")
        story.check(True, f"the weights {':'.join(map(str, WEIGHTS.values()))} hold over {number} connections")

    def messages(self) -> None:
        """Three ways to keep and decide a connection, and what each costs the controller."""
        story = self.story
        story.scene("What the controller hears of a connection")
        self.add("web-punted", 8080, "ROUND_ROBIN", self.members(8080), decision="controller")
        self.add("web-rules", 8081, "ROUND_ROBIN", self.members(8081), state="rules")
        rows: list[list[object]] = []
        measured: dict[str, Counter[str]] = {}
        ways = (("switch decides", 80), ("controller decides", 8080), ("pairs of rules", 8081))
        number = REQUESTS_EACH * len(self.lab.clients)
        for way, port in ways:
            before = self.statistics()
            self.ask(f"http://{VIP}:{port}/")
            time.sleep(1.5)  # closed connections are told in batches, and a rule's end a moment later
            after = self.statistics()
            measured[way] = Counter({key: after[key] - before[key] for key in after})
            rows.append([f"{way}, :{port}",
                         *(f"{measured[way][kind] / number:.2f}" for kind in MESSAGES)])
        story.table(["by connection", "packet-in", "packet-out", "flow-mod", "removed"], rows,
                    f"messages between switch and controller, {number} connections each way")
        switch, controller, rules = (measured[way] for way, _ in ways)
        # ARP and neighbour discovery go on beside the connections.
        story.check(switch["packet_ins"] + switch["packet_outs"] <= 0.05 * number,
                    "decided by the switch: the controller hears nothing of it", str(dict(switch)))
        story.check(0.95 * number <= controller["packet_outs"] <= 1.05 * number and controller["flow_mods"] == 0,
                    "decided by the controller: one packet out for each, and no rule", str(dict(controller)))
        story.check(1.9 * number <= rules["flow_mods"] <= 2.1 * number,
                    "a pair of rules: two flow-mods for each", str(dict(rules)))

    def other_families(self) -> None:
        """UDP and IPv6."""
        story, lab = self.story, self.lab
        story.scene("UDP, and IPv6")
        self.add("echo", 53, "ROUND_ROBIN", self.members(ECHO_PORT), protocol="UDP", quiet=True)
        self.add("web6", 80, "ROUND_ROBIN", self.members(six=True), vip=VIP6, quiet=True)
        self.add("echo6", 53, "ROUND_ROBIN", self.members(ECHO_PORT, six=True), vip=VIP6, protocol="UDP", quiet=True)
        client = lab.client("c2")
        rows: list[list[object]] = []
        servers = [server.name for server in lab.servers]
        for what, answers in (
                (f"UDP  {VIP}:53", Counter(map(str, client.udp(VIP, 53, 60)))),
                (f"UDP  [{VIP6}]:53", Counter(map(str, client.udp(VIP6, 53, 60)))),
                (f"HTTP [{VIP6}]:80", client.who(f"http://[{VIP6}]/", 60))):
            rows.append([what, *(answers[server] for server in servers)])
            if set(answers) != set(servers) or sum(answers.values()) != 60:
                raise NotHeld(f"all 60 requests to {what} are answered, and all servers take part: {dict(answers)}")
        story.table(["60 from c2", *servers], rows)
        story.check(True, "all were answered, and all servers took part")

    def disable_a_member(self) -> None:
        """A member is disabled and enabled again."""
        story = self.story
        story.scene("A member is disabled, and enabled again")
        pool = "web-pool"
        members = self.lab.rest.get(f"/v1/pools/{pool}/members")["members"]
        member = next(entry for entry in members if entry["name"] == "s1")
        path = f"/v1/pools/{pool}/members/{member['id']}"
        for enabled in (False, True):
            self.rest("PATCH", path, {"admin_state_up": enabled}, show=("name", "address", "admin_state_up"))
            self._wait_for("s1", enabled)
            totals: Counter[str] = sum(self.ask(f"http://{VIP}/", 60).values(), Counter())
            seen = ", ".join(f"{name} {totals[name]}" for name in WEIGHTS)
            story.check((totals["s1"] > 0) == enabled,
                        f"180 connections, none failed, {'s1 is back' if enabled else 'none to s1'}: {seen}", seen)

    def _wait_for(self, server: str, serving: bool) -> None:
        client = self.lab.client("c3")
        wait_until(lambda: (server in client.who(f"http://{VIP}/", 30)) == serving, 5,
                   f"{server} gets {'connections' if serving else 'none'}")

    def kill_the_controller(self) -> None:
        """kill -9 under a running download, new connections meanwhile, restart."""
        story, lab = self.story, self.lab
        story.scene("The controller is killed and restarted under a running download")
        for way, port in (("the switch decided", 80), ("the controller decided", 8080), ("a pair of rules", 8081)):
            target = lab.directory / f"download-{port}"
            url = f"http://{VIP}:{port}/big"
            if port == 80:
                story.command("c1", f"curl --limit-rate {DOWNLOAD_LIMIT} -o big http://{VIP}:{{80,8080,8081}}/big")
            self.downloads[way] = (target, lab.client("c1").popen(
                "curl", "-sSf", "--limit-rate", DOWNLOAD_LIMIT, "--max-time", "60", "-o", str(target), url))
        try:
            targets = [target for target, _ in self.downloads.values()]
            wait_until(lambda: all(t.exists() and t.stat().st_size > 5_000_000 for t in targets), 10,
                       "the downloads have begun")
            assert lab.controller.process is not None
            story.command("operator", f"kill -9 {lab.controller.process.pid}    # lbapp run")
            lab.controller.kill()
            killed = [t.stat().st_size for t in targets]
            time.sleep(1)
            totals: Counter[str] = sum(self.ask(f"http://{VIP}/", 20).values(), Counter())
            story.check(True, f"without a controller, the switch goes on deciding: {sum(totals.values())} new "
                              f"connections, all answered")
            story.command("operator", "lbapp run")
            restarted = time.monotonic()
            lab.start_controller()
            client = lab.client("c2")
            wait_until(lambda: client.run("curl", "-sf", "--max-time", "1", f"http://{VIP}:8080/",
                                          check=False).returncode == 0, 10, "new connections are decided again", 0.02)
            seconds = time.monotonic() - restarted
            now = [t.stat().st_size for t in targets]
            story.say("bytes received when it was killed: " + ", ".join(f"{size / 1e6:.0f} MB" for size in killed)
                      + "; when it decided again: " + ", ".join(f"{size / 1e6:.0f} MB" for size in now))
            story.check(seconds <= 10, f"new connections are decided again {seconds:.1f} s after the restart",
                        f"{seconds:.1f} s")
            went_on = all(before < BIG_BYTES and after > before for before, after in zip(killed, now, strict=True))
            story.check(went_on, "the downloads went on all the while", f"{killed} then {now}")
            for way, (target, process) in self.downloads.items():
                status = process.wait(timeout=60)
                found = hashlib.sha256(target.read_bytes()).hexdigest() if target.exists() else "nothing"
                story.check(status == 0 and found == self.digest,
                            f"{way}: {BIG_BYTES // 1_000_000} MB, sha256 {found[:16]}... as it was sent",
                            f"curl gave {status}, sha256 {found[:16]}..., expected {self.digest[:16]}...")
        finally:
            for target, process in self.downloads.values():
                end(process)
                target.unlink(missing_ok=True)

    def rates(self) -> None:
        """Short runs of wrk: direct, and in the three ways."""
        story, lab = self.story, self.lab
        story.scene("A glance at rates")
        # A port of its own: the server takes no connection again that a client had under another address.
        lab.server("s1").nginx(ports=(DIRECT_PORT,))
        ways = (("s1 itself", lab.server("s1").address, DIRECT_PORT), ("switch decides", VIP, 80),
                ("controller decides", VIP, 8080), ("pairs of rules", VIP, 8081))
        rows: list[list[object]] = []
        client = lab.client("c1")
        for way, address, port in ways:
            new, slow, errors = self._wrk(client, f"http://{address}:{port}/", "Connection: close")
            kept, _, kept_errors = self._wrk(client, f"http://{address}:{port}/")
            rows.append([way, f"{new:,.0f}", slow, f"{kept:,.0f}", errors + kept_errors])
            if not new or not kept:
                raise NotHeld(f"wrk gets answers with {way}: {new:.0f} and {kept:.0f} a second")
        story.table(["wrk, 32 at a time", "new conn/s", "99 % within", "kept alive req/s", "errors"], rows)
        story.say("one way after the other on this machine's "
                  f"{os.cpu_count()} cores, {RATE_SECONDS} s each; [bold]make bench[/] measures properly")

    def fast_path(self) -> None:
        """The eBPF fast path: set up under a running download, counted, measured, taken down."""
        story, lab = self.story, self.lab
        story.scene("The fast path: eBPF programs in front of the switch")
        target = lab.directory / "download-fast"
        process = lab.client("c1").popen("curl", "-sSf", "--limit-rate", DOWNLOAD_LIMIT, "--max-time", "60", "-o",
                                         str(target), f"http://{VIP}/big")
        self.downloads["begun before the fast path"] = (target, process)
        try:
            wait_until(lambda: target.exists() and target.stat().st_size > 5_000_000, 10, "the download has begun")
            lab.controller.stop()
            lab.controller.options.append("--fastpath")
            story.command("operator", "lbapp run --fastpath    # in place of the one before")
            lab.start_controller()
            wait_until(lambda: self._fast() is not None, 10, "the fast path is there")
            story.check(True, "it stands in front of the switch's ports, whose numbers and rules are as they were")
            wait_until(lambda: lab.client("c2").run("curl", "-sf", "--max-time", "1", f"http://{VIP}:8080/",
                                                    check=False).returncode == 0, 10, "new connections are decided")
            self._count_fast()
            status = process.wait(timeout=60)
            found = hashlib.sha256(target.read_bytes()).hexdigest()
            story.check(status == 0 and found == self.digest, "the download that was running meanwhile: "
                        f"{BIG_BYTES // 1_000_000} MB, sha256 {found[:16]}... as it was sent",
                        f"curl gave {status}, sha256 {found[:16]}..., expected {self.digest[:16]}...")
        finally:
            end(process)
            target.unlink(missing_ok=True)
        rows: list[list[object]] = []
        for way, port in (("fast path decides", 80), ("controller decides", 8080)):
            new, slow, errors = self._wrk(lab.client("c1"), f"http://{VIP}:{port}/", "Connection: close")
            kept, _, kept_errors = self._wrk(lab.client("c1"), f"http://{VIP}:{port}/")
            rows.append([way, f"{new:,.0f}", slow, f"{kept:,.0f}", errors + kept_errors])
        story.table(["wrk, 32 at a time", "new conn/s", "99 % within", "kept alive req/s", "errors"], rows)
        l7_scene.play(self)
        lab.controller.stop()
        story.command("operator", "lbapp agent --bridge lb1 --remove")
        lab.controller.remove_fastpath(lab.bridges)
        lab.controller.options.remove("--fastpath")
        left = [line for line in lab.root.run("ip", "-o", "link").stdout.splitlines() if re.search(r": lb[ioq]", line)]
        story.check(not left, "it is gone again, and left nothing behind", "; ".join(left))

    def _fast(self) -> dict[str, int] | None:
        found: dict[str, int] | None = self.lab.rest.get("/v1/stats")["switches"][0]["fastpath"]
        return found

    def _count_fast(self) -> None:
        """What fast path and controller see of some connections."""
        story = self.story
        number = REQUESTS_EACH * len(self.lab.clients)
        rows: list[list[object]] = []
        seen: dict[str, Counter[str]] = {}
        for way, port in (("fast path decides", 80), ("controller decides", 8080)):
            before = {**(self._fast() or {}), **self.statistics()}
            self.ask(f"http://{VIP}:{port}/")
            time.sleep(0.5)  # closed connections are told of every 50 ms
            after = {**(self._fast() or {}), **self.statistics()}
            kinds = ("hits", "packet_ins", "queries", "deletes", "delete_messages")
            seen[way] = Counter({kind: after[kind] - before[kind] for kind in kinds})
            rows.append([f"{way}, :{port}", *(f"{seen[way][kind] / number:.2f}" for kind in kinds)])
        story.table(["by connection", "fast packets", "packet-in", "asked", "closed", "messages"], rows,
                    f"{number} connections each way: packets that the fast path forwarded, questions by packet-in and "
                    "by the agent, closed connections and the messages that told of them")
        decided, asked = seen["fast path decides"], seen["controller decides"]
        story.check(decided["hits"] >= 9 * number and decided["packet_ins"] + decided["queries"] <= 0.05 * number,
                    "decided in the fast path: neither Open vSwitch nor the controller sees a packet",
                    str(dict(decided)))
        story.check(asked["hits"] >= 9 * number and 0.95 * number <= asked["queries"] <= 1.05 * number,
                    "decided by the controller: one question, asked past Open vSwitch", str(dict(asked)))
        story.check(decided["deletes"] >= number and decided["delete_messages"] <= decided["deletes"] / 3,
                    f"{decided['deletes']} closed connections were told of in {decided['delete_messages']} messages",
                    str(dict(decided)))

    @staticmethod
    def _wrk(client: LabHost, url: str, header: str | None = None) -> tuple[float, str, int]:
        printed = client.run("wrk", "-t1", "-c32", f"-d{RATE_SECONDS}s", "--latency",
                             *(("-H", header) if header else ()), url, timeout=RATE_SECONDS + 20).stdout
        rate = re.search(r"Requests/sec:\s*([\d.]+)", printed)
        slow = re.search(r"99%\s+(\S+)", printed)
        errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", printed)
        return (float(rate.group(1)) if rate else 0.0, slow.group(1) if slow else "-",
                sum(map(int, errors.groups())) if errors else 0)
