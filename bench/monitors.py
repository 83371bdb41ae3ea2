# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What checking members costs: ``python -m bench.monitors [TARGETS] [INTERVAL] [SECONDS]``.

So many targets (10 000), each checked once in so many seconds (5), all of them one nginx of this machine: by TCP, by a
SYN alone, and by HTTP. Printed for each: checks a second, CPU of the process that checks for each of them, its share of
a core, and how many checks began late. The CPU is the process's own, user and system, read from the kernel; nginx and
the other core are not in it.
"""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from lbapp.config.monitor import Monitor
from lbapp.monitors.protocol import Statistics, Target
from lbapp.monitors.supervisor import Changed, Monitors
from topologies.namespace import end, wait_until

TARGETS, INTERVAL, SECONDS = 10_000, 5.0, 30.0
TYPES = ("TCP", "TCP_HALF_OPEN", "HTTP")
KINDS: dict[str, dict[str, Any]] = {kind: {"type": kind} for kind in TYPES}

_NGINX = """\
daemon off;
worker_processes 1;
worker_rlimit_nofile 65536;
pid {directory}/nginx.pid;
error_log {directory}/error.log crit;
events {{ worker_connections 32768; }}
http {{
    access_log off;
    client_body_temp_path {directory}/1; proxy_temp_path {directory}/2; fastcgi_temp_path {directory}/3;
    uwsgi_temp_path {directory}/4; scgi_temp_path {directory}/5;
    server {{ listen 127.0.0.1:{port} backlog=8192; location / {{ return 200 "fine"; }} }}
}}
"""


def free_port() -> int:
    """A port of loopback that nobody has."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def nginx(directory: Path, port: int) -> subprocess.Popen[bytes]:
    """A running nginx that answers everything with 200."""
    configuration = directory / "nginx.conf"
    configuration.write_text(_NGINX.format(directory=directory, port=port))
    process = subprocess.Popen(["nginx", "-c", str(configuration), "-p", str(directory)], stdin=subprocess.DEVNULL)

    def listening() -> bool:
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", port)) == 0

    wait_until(listening, 10, "nginx listens")
    return process


def cpu_of(process: int) -> float:
    """CPU seconds of a process so far (proc(5))."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100.0


def measure(kind: dict[str, Any], port: int, targets: int, interval: float, seconds: float) -> dict[str, float]:
    """Check so many targets for some seconds, once all of them are known to be up."""
    up: dict[str, bool] = {}
    done = threading.Event()

    def changed(found: Sequence[Changed]) -> None:
        up.update((one.key, one.up) for one in found)
        if len(up) == targets:
            done.set()

    monitor = msgspec.convert({**kind, "interval": interval, "timeout": min(2.0, interval)}, Monitor)
    monitors = Monitors(changed, lambda _: None)
    try:
        # 127.0.0.1 alone listens: so the ports of this host last.
        monitors.update({f"{index}": Target(address="127.0.0.1", port=port, monitor=monitor)
                         for index in range(targets)})
        if not done.wait(interval + 30):
            raise click.ClickException(f"only {len(up)} of {targets} targets were checked")
        time.sleep(interval + 1)  # the second checks come closer together than later ones
        before, pid = _fresh(monitors, None), monitors.pid
        assert pid is not None
        begun, used = time.monotonic(), cpu_of(pid)
        time.sleep(seconds)
        after = _fresh(monitors, before)
        elapsed, used = time.monotonic() - begun, cpu_of(pid) - used
    finally:
        monitors.close()
    checks = after.checks - before.checks
    return {"per_s": checks / elapsed, "microseconds": 1e6 * used / checks, "core": 100 * used / elapsed,
            "late": after.late - before.late, "down": sum(not state for state in up.values())}


def _fresh(monitors: Monitors, than: Statistics | None) -> Statistics:
    seen = monitors.statistics
    wait_until(lambda: monitors.statistics is not seen, 15, "statistics")
    found = monitors.statistics
    assert found is not None and found is not than
    return found


@click.command()
@click.argument("targets", type=int, default=TARGETS)
@click.argument("interval", type=float, default=INTERVAL)
@click.argument("seconds", type=float, default=SECONDS)
def main(targets: int, interval: float, seconds: float) -> None:
    """Measure, and print a line for each kind of check."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65_536)), hard))
    with tempfile.TemporaryDirectory(prefix="lbapp-bench-") as name:
        port = free_port()
        server = nginx(Path(name), port)
        try:
            for kind, fields in KINDS.items():
                found = measure(fields, port, targets, interval, seconds)
                click.echo(f"{kind:<14} {found['per_s']:7.0f} checks/s  {found['microseconds']:6.1f} us CPU each  "
                           f"{found['core']:5.1f} % of a core  {found['late']:.0f} late  {found['down']:.0f} down")
                sys.stdout.flush()
        finally:
            end(server)


if __name__ == "__main__":
    main()
