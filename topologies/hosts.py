# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What hosts of a laboratory can do: ask with curl and UDP as clients, answer with nginx and UDP as servers.

The programs are the real ones. A host is a network namespace made by somebody else (Mininet);
this module only starts processes in it.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from topologies.namespace import Namespace, wait_until

HTTP_PORTS = (80, 8080, 8081)
"""One for each virtual server that has the same members. Behind one port, a client that uses its
own port for two virtual servers would mean the same connection to the member."""

ECHO_PORT = 5300

OWN_PORTS = itertools.cycle(range(10_000, 30_000))
"""Ports of clients, the next one whenever one is asked for. Of those that the kernel gives out (32768-60999), one may
come again while a switch or a server, or a TIME_WAIT of the client itself, still knows its last connection."""

_NGINX = """\
daemon off;
user root;
worker_processes 1;
worker_rlimit_nofile 65536;
pid {prefix}/nginx.pid;
error_log {prefix}/error.log warn;
events {{ worker_connections 32768; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 10000000;
    default_type text/plain;
    client_body_temp_path {prefix}/body;
    proxy_temp_path {prefix}/proxy;
    fastcgi_temp_path {prefix}/fastcgi;
    uwsgi_temp_path {prefix}/uwsgi;
    scgi_temp_path {prefix}/scgi;
    server {{
{listen}
        root {root};
        add_header X-Server {name};
        location = / {{ return 200 "{name}\\n"; }}
        location = /about {{
            default_type application/json;
            return 200 '{{"server":"{name}","server_address":"$server_addr","server_port":$server_port,\
"client_address":"$remote_addr","client_port":$remote_port}}\\n';
        }}
    }}
}}
"""


class LabHost(Namespace):
    """A client or server.

    Args:
        name: such as ``c1``.
        pid: a process in its namespace.
        address: its IPv4 address.
        address6: its IPv6 address.
        interface: towards the switch.
        directory: for what its servers need; made when they do.
    """

    def __init__(self, name: str, pid: int, address: str, address6: str, interface: str, directory: Path) -> None:
        super().__init__(name, pid)
        self.address = address
        self.address6 = address6
        self.interface = interface
        self.directory = directory

    def one_cpu_a_flow(self) -> None:
        """Have each flow's packets received by one CPU, as a network card with several queues does (by RPS).

        A veth leaves them to the CPU of whoever sent. Two of one connection at once, a handshake's last ACK and the
        first data, are a race that Linux before 6.19 can lose: between a request's end and its socket's beginning
        it finds neither, and answers with a RST (``inet_ehash_insert``).

        Raises:
            CommandError: the kernel has no RPS.
        """
        every = f"{(1 << min(os.cpu_count() or 1, 32)) - 1:x}"
        self.run("unshare", "--mount", "sh", "-c", f"mount -t sysfs sysfs /sys && for queue in "
                 f"/sys/class/net/{self.interface}/queues/rx-*; do echo {every} >$queue/rps_cpus || exit 1; done")

    # ------------------------------------------------------------------ clients

    def curl(self, url: str, *options: str, timeout: float = 10.0) -> str:
        """What ``curl`` gets from ``url``.

        Raises:
            CommandError: no connection, an HTTP error status, or no end in time.
        """
        return self.run("curl", "-gsSf", "--max-time", f"{timeout:g}", *options, url, timeout=timeout + 5).stdout

    def who(self, url: str, count: int, timeout: float = 30.0) -> Counter[str]:
        """Ask ``count`` times, each on a connection of its own, and count the answers, which are server names.

        Failed requests count as ``curl: (error number)``.
        """
        # curl takes [1-9] in a URL as a range, and leaves an IPv6 address in brackets alone.
        text = self.run("curl", "-sS", "--stderr", "-", "--connect-timeout", "3", "--max-time", f"{timeout:g}",
                        "-H", "Connection: close", f"{url}?[1-{count}]", timeout=timeout + 5, check=False).stdout
        return Counter(line.partition(")")[0] + ")" if line.startswith("curl:") else line
                       for line in text.splitlines() if line)

    def answered(self, url: str, count: int, timeout: float = 30.0) -> int:
        """How many of so many requests are answered; see :meth:`who`."""
        return sum(number for name, number in self.who(url, count, timeout).items() if not name.startswith("curl:"))

    def udp(self, address: str, port: int, count: int = 1, payload: bytes = b"hello",
            timeout: float = 1.0) -> list[str | None]:
        """Send datagrams, each from a port of its own; the servers' names, None where no answer came.

        Raises:
            ConnectionRefusedError: the answer was an ICMP "port unreachable".
            ValueError: an answer does not end with what was sent.
        """
        names: list[str | None] = []
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        for _ in range(count):
            with self.entered():
                endpoint = socket.socket(family, socket.SOCK_DGRAM)
            with endpoint:
                endpoint.settimeout(timeout)
                endpoint.bind(("", next(OWN_PORTS)))
                endpoint.connect((address, port))
                endpoint.send(payload)
                try:
                    answer = endpoint.recv(65535)
                except TimeoutError:
                    names.append(None)
                    continue
            name, _, echoed = answer.partition(b" ")
            if echoed != payload:
                raise ValueError(f"{self.name}: sent {payload[:60]!r}, got back {echoed[:60]!r}")
            names.append(name.decode())
        return names

    # ------------------------------------------------------------------ servers

    def nginx(self, root: Path | None = None, ports: tuple[int, ...] = HTTP_PORTS,
              http2: bool = False) -> subprocess.Popen[Any]:
        """Start nginx and wait until it listens, on all addresses.

        ``/`` answers with the server's name, ``/about`` with JSON that tells server, addresses
        and ports; anything else is a file of ``root``. All answers carry ``X-Server``.

        Args:
            root: the directory of the files; one of its own unless given.
            ports: where it listens.
            http2: it speaks HTTP/2 with prior knowledge there, and nothing else.
        """
        prefix = self.directory / f"nginx-{ports[0]}"
        prefix.mkdir(parents=True, exist_ok=True)
        how = "http2 backlog=8192" if http2 else "backlog=8192"
        listen = "\n".join(f"        listen {port} {how}; listen [::]:{port} ipv6only=on {how};" for port in ports)
        configuration = prefix / "nginx.conf"
        configuration.write_text(_NGINX.format(prefix=prefix, listen=listen, root=root or prefix, name=self.name))
        process = self.popen("nginx", "-p", str(prefix), "-c", str(configuration), "-e", str(prefix / "error.log"),
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for port in ports:
            self._listening(process, socket.SOCK_STREAM, port, prefix / "error.log")
        return process

    def udp_echo(self, port: int = ECHO_PORT) -> subprocess.Popen[Any]:
        """Start the UDP server that names itself (``udp_echo.py``) and wait until it is there."""
        self.directory.mkdir(parents=True, exist_ok=True)
        errors = self.directory / f"udp-{port}.log"
        with errors.open("wb") as log:
            process = self.popen(sys.executable, "-S", str(Path(__file__).with_name("udp_echo.py")), self.name,
                                 str(port), stdout=subprocess.DEVNULL, stderr=log)
        self._listening(process, socket.SOCK_DGRAM, port, errors)
        return process

    def _listening(self, process: subprocess.Popen[Any], kind: int, port: int, log: Path) -> None:
        table = Path(f"/proc/{self.pid}/net/{'tcp' if kind == socket.SOCK_STREAM else 'udp'}6")
        state = "0A" if kind == socket.SOCK_STREAM else "07"

        def listening() -> bool:
            if process.poll() is not None:
                said = log.read_text(errors="replace").strip() if log.exists() else ""
                raise RuntimeError(f"{self.name}: the server for port {port} ended: {said or process.returncode}")
            rows = (line.split() for line in table.read_text().splitlines()[1:])
            return any(row[1].endswith(f":{port:04X}") and row[3] == state for row in rows)

        wait_until(listening, 10, f"{self.name} listens on port {port}", every=0.01)

    @staticmethod
    def kill(process: subprocess.Popen[Any]) -> None:
        """Kill a process and its children at once, as a crash would."""
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
