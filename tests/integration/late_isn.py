# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A server whose initial sequence numbers are known beforehand, whatever its kernel chooses: two programs."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

from topologies.hosts import LabHost

SOURCE = Path(__file__).with_name("late_isn.bpf.c")


@contextlib.contextmanager
def late_isn(host: LabHost, port: int, isn: int, directory: Path) -> Iterator[None]:
    """Have a server begin each connection with this number, for the time of the block.

    Args:
        host, port: the server. Its connections must have no SACK.
        isn: the number.
        directory: for the compiled program.
    """
    program = directory / f"late-{host.name}-{port}.o"
    subprocess.run(["clang", "-O2", "-g", "-target", "bpf", f"-I/usr/include/{platform.machine()}-linux-gnu",
                    f"-DISN={isn}u", f"-DPORT={port}", "-c", str(SOURCE), "-o", str(program)], check=True,
                   capture_output=True, timeout=60)
    pins = Path("/sys/fs/bpf") / f"late-{host.pid}-{port}"
    subprocess.run(["bpftool", "prog", "loadall", str(program), str(pins)], check=True, capture_output=True, timeout=30)
    try:
        # Both programs have one map: they are loaded together, and pinned until they are attached.
        host.run("tc", "qdisc", "add", "dev", host.interface, "clsact", check=False)  # it may be there
        for where, name in (("egress", "on_the_way_out"), ("ingress", "on_the_way_in")):
            # Before anybody else's, which go on from here.
            host.run("tc", "filter", "add", "dev", host.interface, where, "pref", "1", "bpf", "da", "object-pinned",
                     str(pins / name))
        yield
    finally:
        for where in ("egress", "ingress"):
            host.run("tc", "filter", "del", "dev", host.interface, where, "pref", "1", check=False)
        for pin in pins.iterdir() if pins.exists() else ():
            pin.unlink()
        if pins.exists():
            pins.rmdir()
