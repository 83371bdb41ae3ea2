# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What lbapp is compared with: a bare wire, nftables, HAProxy in both modes, nginx as a proxy.

A target lays the network between four clients and two servers. Hosts, servers, kernel parameters
and load are the same for all; only the middle differs. ``lbapp_targets`` has ours.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from pathlib import Path

from bench.lab import Lab, Namespace, Process
from bench.load import BIG_BYTES, BULK_PORT, WEB_PORT, Client, Site, small_object

CLIENTS, SERVERS = 4, 2
VIP = "10.9.0.100"
CONNTRACK = {"net/netfilter/nf_conntrack_tcp_timeout_time_wait": "3"}
"""lbapp gives its zone short closing timeouts; nftables gets the same."""

NGINX = """\
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log {directory}/error.log crit;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000000;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
        listen {port} backlog=8192;
        root {root};
    }}
}}
"""

NFT = """\
table ip bench {{
    chain prerouting {{
        type nat hook prerouting priority dstnat;
        ip daddr {vip} tcp dport {web} dnat to numgen inc mod {count} map {{ {members} }}
        ip daddr {vip} tcp dport {bulk} dnat to {first}
    }}
}}
"""

HAPROXY = """\
global
    nbthread 2
    maxconn 4000
defaults
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    option splice-auto
    balance roundrobin
listen web
    mode {mode}
    bind {vip}:{web} backlog 8192
{rules}{members}
listen bulk
    mode tcp
    bind {vip}:{bulk}
    server s1 {first}:{bulk}
"""
RULES = """\
    acl one path_beg /one/
    acl two hdr(host) -i two.example
    acl three req.cook(third) -m str yes
    use_backend one if one
    use_backend two if two
    use_backend three if three
"""
"""With mode http: three rules that all requests of the benchmark have to get past."""
BACKEND = """\
backend {name}
    mode http
    balance roundrobin
{members}
"""


NGINX_PROXY = """\
daemon off;
user root;
worker_processes 2;
pid {directory}/nginx.pid;
error_log {directory}/error.log crit;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/temp;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    map $cookie_third $of_cookie {{ default web; yes three; }}
    map $host $of_host {{ default $of_cookie; two.example two; }}
    map $uri $chosen {{ default $of_host; ~^/one/ one; }}
{upstreams}
    server {{
        listen {vip}:{web} backlog=8192 reuseport;
        location / {{
            proxy_pass http://$chosen;
            proxy_http_version 1.1;
            proxy_set_header Host $host;
            proxy_set_header Connection "";
            proxy_max_temp_file_size 0;
        }}
    }}
}}
"""
"""RULES in nginx's words; what it has read and the client has not is never put on a disk."""
UPSTREAM = "    upstream {name} {{ {members} keepalive 64; keepalive_requests 1000000000; }}"


class Target(abc.ABC):
    """Something that can stand between clients and servers.

    Attributes:
        name: as in ``--targets`` and in the results.
        bulk: whether iperf3's own protocol can pass.
        first_byte: whether the first byte of new connections is timed at a fixed rate: where requests are read, and
            where nothing is between.
    """

    name: str
    bulk: bool = True
    first_byte: bool = False

    @abc.abstractmethod
    def build(self, lab: Lab) -> Site:
        """Lay the network, start everything, and return when it is ready."""


def start_servers(lab: Lab, servers: Sequence[Namespace]) -> None:
    """nginx and iperf3 in every server's namespace; they are ready on return."""
    root = lab.directory / "www"
    root.mkdir(mode=0o755)
    (root / "small").write_text(small_object())
    with (root / "big").open("wb") as big:
        big.truncate(BIG_BYTES)
    started: list[tuple[Namespace, int, Process]] = []
    for index, server in enumerate(servers, 1):
        directory = lab.directory / f"nginx{index}"
        directory.mkdir(mode=0o755)
        configuration = directory / "nginx.conf"
        configuration.write_text(NGINX.format(directory=directory, port=WEB_PORT, root=root))
        started.append((server, WEB_PORT, lab.spawn(
            server, f"nginx{index}", ["nginx", "-e", str(directory / "error.log"), "-c", str(configuration)])))
        started.append((server, BULK_PORT, lab.spawn(server, f"iperf{index}", ["iperf3", "-s", "-p", str(BULK_PORT)])))
    for server, port, process in started:
        lab.wait_port(server, "127.0.0.1", port, process)


def hosts(lab: Lab) -> tuple[list[Namespace], list[Namespace]]:
    """The namespaces of the clients and of the servers."""
    return ([lab.namespace(f"c{index}") for index in range(1, CLIENTS + 1)],
            [lab.namespace(f"s{index}") for index in range(1, SERVERS + 1)])


class Bare(Target):
    """Every client on a wire of its own to one of the servers: what the machine can do at all."""

    name = "bare"
    first_byte = True

    def build(self, lab: Lab) -> Site:
        """See :meth:`Target.build`."""
        clients, servers = hosts(lab)
        ends = []
        for index, client in enumerate(clients, 1):
            server = servers[(index - 1) % len(servers)]
            lab.link(client, "eth0", server, f"eth{index}")
            lab.ip([f"addr add 10.0.{index}.1/24 dev eth0"], client)
            lab.ip([f"addr add 10.0.{index}.2/24 dev eth{index}"], server)
            ends.append(Client(client, f"10.0.{index}.2"))
        start_servers(lab, servers)
        return Site(tuple(ends), tuple(servers))


def routed(lab: Lab) -> tuple[Namespace, Site, list[str]]:
    """Clients and servers around a namespace in the middle that routes between them.

    Returns:
        the middle, the site, and the servers' addresses.
    """
    clients, servers = hosts(lab)
    middle = lab.namespace("mid")
    addresses = []
    for label, network, namespaces in (("c", 0, clients), ("s", 1, servers)):
        for index, namespace in enumerate(namespaces, 1):
            subnet, port = f"10.{network}.{index}", f"{label}{index}"
            lab.link(namespace, "eth0", middle, port)
            lab.ip([f"addr add {subnet}.254/24 dev {port}"], middle)
            lab.ip([f"addr add {subnet}.2/24 dev eth0", f"route add default via {subnet}.254"], namespace)
            if label == "s":
                addresses.append(f"{subnet}.2")
    lab.ip([f"addr add {VIP}/32 dev lo"], middle)
    middle.sysctl({"net/ipv4/ip_forward": "1"})
    start_servers(lab, servers)
    return middle, Site(tuple(Client(client, VIP) for client in clients), tuple(servers)), addresses


class Nftables(Target):
    """The kernel's own translation: DNAT, servers in turn."""

    name = "nft"

    def build(self, lab: Lab) -> Site:
        """See :meth:`Target.build`."""
        middle, site, addresses = routed(lab)
        members = ", ".join(f"{index} : {address}" for index, address in enumerate(addresses))
        lab.run(middle.argv("nft", "-f", "-"), text=NFT.format(
            vip=VIP, web=WEB_PORT, bulk=BULK_PORT, count=len(addresses), members=members, first=addresses[0]))
        middle.sysctl(CONNTRACK)
        return site


class HAProxy(Target):
    """HAProxy with two threads, servers in turn, kernel splicing, no logs; with mode http, three rules."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.name = f"haproxy-{mode}"
        self.bulk = mode == "tcp"  # iperf3 does not speak HTTP
        self.first_byte = mode == "http"

    def build(self, lab: Lab) -> Site:
        """See :meth:`Target.build`."""
        middle, site, addresses = routed(lab)
        path: Path = lab.directory / "haproxy.cfg"
        members = "\n".join(f"    server s{index} {address}:{WEB_PORT}" for index, address in enumerate(addresses, 1))
        rules = RULES if self.mode == "http" else ""
        text = HAPROXY.format(mode=self.mode, vip=VIP, web=WEB_PORT, bulk=BULK_PORT, rules=rules, members=members,
                              first=addresses[0])
        if rules:
            text += "".join(BACKEND.format(name=name, members=members) for name in ("one", "two", "three"))
        path.write_text(text)
        process = lab.spawn(middle, self.name, ["haproxy", "-db", "-f", str(path)])
        lab.wait_port(middle, VIP, WEB_PORT, process)
        return site


class NginxProxy(Target):
    """nginx as a proxy with the rules of ``haproxy-http``: two processes, connections to the servers kept, no logs."""

    name = "nginx-http"
    bulk = False
    first_byte = True

    def build(self, lab: Lab) -> Site:
        """See :meth:`Target.build`."""
        middle, site, addresses = routed(lab)
        directory = lab.directory / "proxy"
        directory.mkdir(mode=0o755)
        members = " ".join(f"server {address}:{WEB_PORT};" for address in addresses)
        upstreams = "\n".join(UPSTREAM.format(name=name, members=members) for name in ("web", "one", "two", "three"))
        configuration = directory / "nginx.conf"
        configuration.write_text(NGINX_PROXY.format(directory=directory, upstreams=upstreams, vip=VIP, web=WEB_PORT))
        process = lab.spawn(middle, self.name, ["nginx", "-e", str(directory / "error.log"), "-c", str(configuration)])
        lab.wait_port(middle, VIP, WEB_PORT, process)
        return site


BASELINES: tuple[Target, ...] = (Bare(), Nftables(), HAProxy("tcp"), HAProxy("http"), NginxProxy())
