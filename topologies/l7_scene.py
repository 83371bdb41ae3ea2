# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The scene of ``make demo`` in which what clients say decides: path, host and server name."""

from __future__ import annotations

import re
import subprocess
import time
from collections import Counter
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from topologies.hosts import LabHost
from topologies.namespace import end, wait_until
from topologies.single import SingleTopo

if TYPE_CHECKING:
    from topologies.scenes import Demo

VIP = SingleTopo.VIP
WEB, SECURE, TLS_PORT = 8090, 8443, 9443
CONNECTIONS = 100


def _rule(kind: str, compare: str, value: str) -> dict[str, str]:
    return {"type": kind, "compare_type": compare, "value": value}


def _policy(name: str, pool: str, rule: dict[str, str]) -> dict[str, Any]:
    return {"name": name, "action": "REDIRECT_TO_POOL", "redirect_pool": pool, "rules": [rule]}


def play(demo: Demo) -> None:
    """A site of three pools by path and host, and the same by server name; who served what, and the messages."""
    story, lab = demo.story, demo.lab
    story.scene("What clients say decides: HTTP and TLS, spliced past the controller")
    for index, host in enumerate(lab.servers, 1):
        demo.rest("POST", "/v1/pools", {"name": f"site{index}", "members": [
            {"address": host.address, "protocol_port": 80}]}, quiet=True)
        demo.rest("POST", "/v1/pools", {"name": f"tls{index}", "members": [
            {"address": host.address, "protocol_port": TLS_PORT}]}, quiet=True)
    story.say("pools [bold]site1[/], [bold]site2[/], [bold]site3[/] have one server each")
    demo.rest("POST", "/v1/virtual-servers", {
        "name": "site", "vip_address": VIP, "protocol": "TCP", "protocol_port": WEB, "application": "http",
        "pool": "site3", "l7_policies": [
            _policy("images", "site1", _rule("PATH", "STARTS_WITH", "/img")),
            _policy("shop", "site2", _rule("HOST_NAME", "EQUAL_TO", "shop.example")),
            {"name": "moved", "action": "REDIRECT_TO_URL", "redirect_url": "https://new.example/",
             "rules": [_rule("PATH", "EQUAL_TO", "/old")]}]}, show=("name", "application", "provisioning_status"))
    demo.rest("POST", "/v1/virtual-servers", {
        "name": "secure", "vip_address": VIP, "protocol": "TCP", "protocol_port": SECURE, "application": "tls",
        "pool": "tls3", "l7_policies": [_policy("shop", "tls2", _rule("SNI", "EQUAL_TO", "shop.example"))]}, quiet=True)
    with ExitStack() as running:
        for host in lab.servers:
            running.callback(end, _tls_server(demo, host))
        _requests(demo)
        _messages(demo)


def _tls_server(demo: Demo, host: LabHost) -> subprocess.Popen[Any]:
    """openssl, with a certificate in the server's own name."""
    key, certificate = (str(demo.lab.directory / f"{host.name}.{kind}") for kind in ("key", "crt"))
    host.run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={host.name}",
             "-keyout", key, "-out", certificate)
    return host.popen("openssl", "s_server", "-accept", str(TLS_PORT), "-key", key, "-cert", certificate, "-www",
                      "-quiet", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _requests(demo: Demo) -> None:
    story, client, web = demo.story, demo.lab.client("c1"), f"http://{VIP}:{WEB}"
    wait_until(lambda: client.run("curl", "-sf", "--max-time", "1", f"{web}/", check=False).returncode == 0, 10,
               "the site serves")
    rows: list[list[object]] = []
    demo.lab.make_file("img-logo", 1000)
    for said, options, path, expected in (
            ("path /img-logo", (), "/img-logo", "s1"),
            ("Host: shop.example", ("-H", "Host: shop.example"), "/about", "s2"),
            ("neither", (), "/about", "s3")):
        headers = client.run("curl", "-sS", "--max-time", "5", "-o", "/dev/null", "-D", "-", *options,
                             f"{web}{path}").stdout
        server = re.search(r"^X-Server: (\S+)", headers, re.M)
        rows.append([said, server[1] if server else "nobody", expected])
    found = client.run("curl", "-sSi", "--max-time", "5", f"{web}/old").stdout
    redirected = found.startswith("HTTP/1.1 302") and "Location: https://new.example/" in found
    rows.append(["path /old", "302 by the load balancer" if redirected else found[:40], "302 by the load balancer"])
    for name, expected in (("shop.example", "s2"), ("other.example", "s3")):
        wait_until(partial(_certificate, client, name), 10, "TLS serves")
        rows.append([f"TLS, server name {name}", _certificate(client, name), expected])
    story.table(["what the client says", "served by", "expected"], rows)
    story.check(all(row[1] == row[2] for row in rows), "each was served by the pool that its rule names",
                str([row for row in rows if row[1] != row[2]]))


def _certificate(client: LabHost, name: str) -> str:
    """The name in the certificate that a TLS client gets."""
    printed = client.run("openssl", "s_client", "-connect", f"{VIP}:{SECURE}", "-servername", name, timeout=10,
                         check=False).stdout
    found = re.search(r"subject=CN ?= ?(\S+)", printed)
    return found[1] if found else ""


def _messages(demo: Demo) -> None:
    """The same requests with each way of having the controller look at a connection."""
    story, per, answers = demo.story, {}, Counter[str]()
    for binding in ("relay", "hybrid", "auto"):
        demo.lab.rest.patch("/v1/virtual-servers/site", {"binding": binding})
        wait_until(lambda: demo.lab.rest.get("/v1/virtual-servers/site")["provisioning_status"] == "ACTIVE", 10,
                   "the switch knows")
        time.sleep(0.5)
        before = _counts(demo)
        answers += demo.lab.client("c2").who(f"http://{VIP}:{WEB}/", CONNECTIONS)
        time.sleep(0.5)
        per[binding] = _counts(demo)
        per[binding].subtract(before)
    kinds = ("greeted", "packet_ins", "queries")
    ways = {"relay": "every packet through the controller (relay)",
            "hybrid": "its handshakes only (hybrid)", "auto": "handshake by the fast path (APP_PROXY)"}
    story.table(["the controller has", "SYN answered below", "packet-ins", "questions", "messages a connection"],
                [[text, *(f"{per[binding][kind] / CONNECTIONS:.2f}" for kind in kinds),
                  f"{(per[binding]['packet_ins'] + per[binding]['queries']) / CONNECTIONS:.2f}"]
                 for binding, text in ways.items()], f"{CONNECTIONS} requests each, a connection for every one")
    messages = {binding: counts["packet_ins"] + counts["queries"] for binding, counts in per.items()}
    story.check(sum(answers.values()) == 3 * CONNECTIONS and set(answers) == {"s3"}
                and messages["relay"] > messages["hybrid"] > messages["auto"]
                and per["auto"]["queries"] == CONNECTIONS and per["auto"]["packet_ins"] <= 0.05 * CONNECTIONS,
                "one message a connection: the request itself; the handshake and all the rest stayed below",
                f"{dict(answers)}, {messages}")


def _counts(demo: Demo) -> Counter[str]:
    switch = demo.lab.rest.get("/v1/stats")["switches"][0]
    fast = switch["fastpath"]
    return Counter({"greeted": fast["handshakes"]["greeted"], "queries": fast["queries"],
                    "packet_ins": switch["packet_ins"]})
