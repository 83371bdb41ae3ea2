# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Open vSwitch as processes and database records: finds it, starts it, sets it up, reads it.

Owns what is said with ``ovs-vsctl``, ``ovs-appctl`` and ``ovs-ctl``: daemons, bridges, ports,
controller targets, conntrack timeouts, counters that OpenFlow does not carry. Never speaks
OpenFlow, and imports nothing but the standard library, for Mininet's own interpreter loads it too.

Two kinds of instance: :class:`Ovs` is the system's (or that of ``OVS_RUNDIR``), started through
``ovs-ctl`` where no init system did; :class:`PrivateOvs` lives in a directory of its own, dies
with the process that made it, and may stand in another network namespace.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

LOG = logging.getLogger(__name__)

OVS_CTL = Path("/usr/share/openvswitch/scripts/ovs-ctl")
SCHEMA = Path("/usr/share/openvswitch/vswitch.ovsschema")
DEFAULT_RUNDIR = Path("/var/run/openvswitch")

PROTOCOLS = ("OpenFlow13", "OpenFlow15")
"""13 is what the controller speaks; 15 is for ``ovs-ofctl``, which needs it for selection methods."""

CONTROLLER_QUEUE_SIZE = 511
"""Packets waiting for the controller; the most that OVS allows (its default is 100)."""

INACTIVITY_PROBE_MS = 5000
MAX_BACKOFF_MS = 1000
"""How long a switch waits between two attempts to reach its controller (OVS's default is 8 s)."""

COMMAND_TIMEOUT_S = 15

CONNTRACK_TIMEOUTS: Mapping[str, int] = {
    # A connection nobody completes: a flood must not fill the table.
    "tcp_syn_sent": 10,
    "tcp_syn_recv": 10,
    # RFC 5382, REQ-5: not below 2 hours 4 minutes.
    "tcp_established": 7440,
    # One side has finished; the other may go on for as long as it sends something.
    "tcp_fin_wait": 300,
    "tcp_close_wait": 300,
    "tcp_last_ack": 5,
    # Both are done: a client that uses its port again must not meet the old entry.
    "tcp_time_wait": 1,
    "tcp_close": 1,
    "udp_first": 30,
    "udp_single": 30,
    "udp_multiple": 60,
}
"""Seconds that conntrack keeps a connection of ours (keys of OVSDB's CT_Timeout_Policy)."""

COMMAND_DESCRIPTORS = 12
"""What a command needs at most while it is started: its pipes, and the one that tells that it was."""

DROP_COUNTERS = ("packet_in_overflow", "rconn_overflow")
"""Coverage counters of packets that found the queue to the controller full: the datapath's queue, the socket's."""


class OvsError(Exception):
    """Open vSwitch is missing, did not start, or refused a command. The message says which and why."""


class Ovs:
    """The system's Open vSwitch, or the one whose run directory is given.

    Args:
        rundir: run directory; by default ``OVS_RUNDIR`` from the environment, else the system's.
    """

    def __init__(self, rundir: Path | str | None = None) -> None:
        self.rundir = Path(rundir or os.environ.get("OVS_RUNDIR") or DEFAULT_RUNDIR)

    # ---------------------------------------------------------------- commands

    @property
    def environment(self) -> dict[str, str]:
        """Variables that make OVS's own commands talk to this instance."""
        return {"OVS_RUNDIR": str(self.rundir)}

    def command(self, *argv: str, timeout: float = COMMAND_TIMEOUT_S) -> str:
        """Run one of OVS's commands against this instance and return what it printed.

        Raises:
            OvsError: the command is not installed, cannot be started, failed, or did not answer in time.
        """
        try:
            _room_for_a_command()
            done = subprocess.run(argv, env={**os.environ, **self.environment}, timeout=timeout, check=False,
                                  stdin=subprocess.DEVNULL, capture_output=True, text=True)
        except FileNotFoundError:
            raise OvsError(f"{argv[0]} is not installed (Debian package openvswitch-switch)") from None
        except subprocess.TimeoutExpired:
            raise OvsError(f"no answer within {timeout:g} s from: {_short(argv)}") from None
        except OSError as error:
            raise OvsError(f"{argv[0]} cannot be started: {error.strerror or error}") from None
        if done.returncode:
            reason = (done.stderr or done.stdout).strip().splitlines()
            raise OvsError(f"{_short(argv)}: {reason[-1] if reason else f'exit status {done.returncode}'}")
        return done.stdout

    def vsctl(self, *arguments: str, wait: bool = True) -> str:
        """``ovs-vsctl``; with ``wait`` it returns once ovs-vswitchd has done what was asked."""
        mode = () if wait else ("--no-wait",)
        return self.command("ovs-vsctl", f"--timeout={COMMAND_TIMEOUT_S - 5}", *mode, *arguments)

    def ofctl(self, *arguments: str) -> str:
        """``ovs-ofctl`` with OpenFlow 1.5, which can print all that 1.3 can."""
        return self.command("ovs-ofctl", "-O", "OpenFlow15", *arguments)

    def appctl(self, *arguments: str) -> str:
        """``ovs-appctl`` to ovs-vswitchd."""
        # A private instance, perhaps of another process, has its control socket under a name of its own.
        own = self._control("ovs-vswitchd")
        target = ("-t", str(own)) if own.exists() else ()
        return self.command("ovs-appctl", f"--timeout={COMMAND_TIMEOUT_S - 5}", *target, *arguments)

    def _control(self, program: str) -> Path:
        return self.rundir / f"{program}.ctl"

    # ------------------------------------------------------------------ daemons

    def database_running(self) -> bool:
        """Whether ovsdb-server answers."""
        with contextlib.suppress(OvsError):
            self.command("ovs-vsctl", "--timeout=2", "--no-wait", "get", "Open_vSwitch", ".", "_uuid", timeout=4)
            return True
        return False

    def switch_running(self) -> bool:
        """Whether ovs-vswitchd answers."""
        with contextlib.suppress(OvsError):
            self.command("ovs-appctl", "--timeout=2", "version", timeout=4)
            return True
        return False

    def ensure_running(self, tso: bool = True) -> None:
        """Start ovsdb-server and ovs-vswitchd unless they run already; only then may ``tso`` be set.

        Raises:
            OvsError: Open vSwitch is missing or did not start.
        """
        if self.switch_running():
            if tso and not self.tso:
                LOG.warning("ovs-vswitchd was started without userspace TSO: bulk transfers will be slow")
            return
        self._start_database()
        if tso:
            # Read once, at ovs-vswitchd's start.
            self.vsctl("set", "Open_vSwitch", ".", "other_config:userspace-tso-enable=true", wait=False)
        self._start_switch()
        self._wait_for_switch()

    def _ovs_ctl(self, *arguments: str) -> None:
        if not OVS_CTL.exists():
            raise OvsError(f"{OVS_CTL} does not exist (Debian package openvswitch-switch)")
        self.command(str(OVS_CTL), *arguments, timeout=60)

    def _start_database(self) -> None:
        self._ovs_ctl("start", "--system-id=random", "--no-ovs-vswitchd", "--no-record-hostname")

    def _start_switch(self) -> None:
        self._ovs_ctl("start", "--system-id=random", "--no-ovsdb-server", "--no-mlockall", "--no-record-hostname")

    def _wait_for_switch(self) -> None:
        # Without --no-wait, a change returns when ovs-vswitchd has done all that the database says.
        self.vsctl("set", "Open_vSwitch", ".", f"external_ids:lbapp-started={time.time_ns()}")

    def stop(self) -> None:
        """Stop both daemons. Bridges stay in the database."""
        self._ovs_ctl("stop")

    @property
    def tso(self) -> bool:
        """Whether userspace TSO is set, and with it checksum offload towards hosts."""
        with contextlib.suppress(OvsError):
            return "true" in self.vsctl("--if-exists", "get", "Open_vSwitch", ".",
                                        "other_config:userspace-tso-enable", wait=False)
        return False

    # ------------------------------------------------------------------ bridges

    def add_bridge(self, name: str, controller: str | None = None, datapath_id: int | None = None) -> None:
        """Add a bridge on the userspace datapath; a bridge of that name is only set up again.

        Args:
            name: the bridge.
            controller: OpenFlow target such as ``tcp:127.0.0.1:6653``; None leaves it without one.
            datapath_id: chosen by OVS where None.
        """
        bridge = [
            "datapath_type=netdev", "fail_mode=secure", f"protocols={','.join(PROTOCOLS)}",
            f"other_config:controller-queue-size={CONTROLLER_QUEUE_SIZE}",
            "other_config:disable-in-band=true",
        ]
        if datapath_id is not None:
            bridge.append(f"other_config:datapath-id={datapath_id:016x}")
        transaction = ["--may-exist", "add-br", name, "--", "set", "Bridge", name, *bridge]
        if controller is not None:
            transaction += ["--", *self._controller(name, controller)]
        self.vsctl(*transaction)

    @staticmethod
    def _controller(bridge: str, target: str) -> list[str]:
        return ["set-controller", bridge, target, "--", "set", "Controller", bridge,
                f"inactivity_probe={INACTIVITY_PROBE_MS}", f"max_backoff={MAX_BACKOFF_MS}",
                "connection_mode=out-of-band"]

    def set_controller(self, bridge: str, target: str | None) -> None:
        """Change where a bridge looks for its controller. From or to None, OVS forgets all rules."""
        if target is None:
            self.vsctl("del-controller", bridge)
        else:
            self.vsctl(*self._controller(bridge, target))

    def delete_bridge(self, name: str) -> None:
        """Delete a bridge, if it exists."""
        self.vsctl("--if-exists", "del-br", name)

    def bridges(self) -> list[str]:
        """The names of all bridges."""
        return self.vsctl("list-br", wait=False).split()

    def add_port(self, bridge: str, interface: str, number: int | None = None, tag: int | None = None) -> int:
        """Add an interface to a bridge and return its OpenFlow port number.

        Args:
            bridge: the bridge.
            interface: an existing network interface.
            number: the OpenFlow port number to ask for.
            tag: makes it an access port of this VLAN, which keeps NORMAL from joining networks.

        Raises:
            OvsError: the interface cannot be opened.
        """
        transaction = ["--may-exist", "add-port", bridge, interface]
        if tag is not None:
            transaction += ["--", "set", "Port", interface, f"tag={tag}"]
        if number is not None:
            transaction += ["--", "set", "Interface", interface, f"ofport_request={number}"]
        self.vsctl(*transaction)
        given = self.vsctl("get", "Interface", interface, "ofport").strip()
        if not given.isdigit():
            reason = self.vsctl("get", "Interface", interface, "error").strip()
            raise OvsError(f"{interface} cannot be a port of {bridge}: {reason}")
        return int(given)

    def delete_port(self, bridge: str, interface: str) -> None:
        """Take an interface off a bridge, if it is there."""
        self.vsctl("--if-exists", "del-port", bridge, interface)

    def bridge_of(self, datapath_id: int) -> str | None:
        """The bridge of this Open vSwitch that has a datapath id; None where none has."""
        listed = self.vsctl("--bare", "--columns=name", "find", "bridge", f'datapath_id="{datapath_id:016x}"',
                            wait=False)
        return listed.strip() or None

    def connected(self, bridge: str) -> bool:
        """Whether a bridge has a controller on the line; OVSDB tells up to 5 seconds late."""
        return "true" in self.vsctl("--if-exists", "get", "Controller", bridge, "is_connected", wait=False)

    # ---------------------------------------------------------------- conntrack

    def set_conntrack_timeouts(self, zones: Iterable[int], policy: Mapping[str, int] = CONNTRACK_TIMEOUTS) -> None:
        """Give conntrack zones of the userspace datapath our timeouts. What was set before is replaced.

        Args:
            zones: conntrack zones, 0-65535.
            policy: seconds by the name that OVSDB's CT_Timeout_Policy has for them.
        """
        record = self.vsctl("--if-exists", "get", "Open_vSwitch", ".", "datapaths:netdev", wait=False).strip()
        if not record:
            # ovs-vswitchd does not make the record; add-zone-tp insists on it.
            self.vsctl("--", "--id=@d", "create", "Datapath", "datapath_version=0",
                       "--", "set", "Open_vSwitch", ".", "datapaths:netdev=@d")
        timeouts = [f"{name}={seconds}" for name, seconds in policy.items()]
        present = self._conntrack_timeouts()
        for zone in sorted(set(zones)):
            if present.get(zone) == set(timeouts):
                continue
            if zone in present:
                # Not in one transaction with what follows: OVS would still see the old one.
                self.vsctl("del-zone-tp", "netdev", f"zone={zone}")
            self.vsctl("add-zone-tp", "netdev", f"zone={zone}", *timeouts)

    def _conntrack_timeouts(self) -> dict[int, set[str]]:
        listed = self.vsctl("list-zone-tp", "netdev", wait=False)
        return {int(zone): set(policy.split())
                for zone, policy in re.findall(r"Zone:\s*(\d+), Timeout Policies:(.*)", listed)}

    # ----------------------------------------------------------------- readings

    def controller_queue_drops(self) -> int:
        """Packets lost because the queue to a controller was full, on all bridges, since ovs-vswitchd started."""
        total = 0
        for counter in DROP_COUNTERS:
            # A counter that never counted may be unknown.
            with contextlib.suppress(OvsError):
                total += int(self.appctl("coverage/read-counter", counter))
        return total

    def conntrack_entries(self) -> int:
        """Connections that the userspace datapath tracks now."""
        try:
            return int(self.appctl("dpctl/ct-get-nconns", "netdev@ovs-netdev"))
        except OvsError:
            if self.bridges():
                raise
            return 0  # no bridge, no datapath

    def version(self) -> tuple[int, ...]:
        """The version of ovs-vswitchd, such as (3, 1, 0)."""
        found = re.search(r"(\d+)\.(\d+)\.(\d+)", self.appctl("version"))
        if found is None:
            raise OvsError("ovs-vswitchd does not tell its version")
        return tuple(int(part) for part in found.groups())


class PrivateOvs(Ovs):
    """An instance of one's own: database, sockets, logs and pid files in one directory.

    The daemons are children of this process and are killed with it, however it ends.

    Args:
        directory: made if it is missing; a database that is there already is used again.
        prefix: a command that runs another one where the daemons shall be, such as
            ``("nsenter", "--net=/run/netns/lb")``.
    """

    def __init__(self, directory: Path | str, prefix: Sequence[str] = ()) -> None:
        super().__init__(directory)
        self.prefix = tuple(prefix)
        self._database: subprocess.Popen[bytes] | None = None
        self._switch: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Variables that make OVS's own commands, and its daemons, use the directory."""
        where = str(self.rundir)
        return {"OVS_RUNDIR": where, "OVS_LOGDIR": where, "OVS_DBDIR": where, "OVS_SYSCONFDIR": where}

    def _spawn(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        argv = ["setpriv", "--pdeathsig", "TERM", *self.prefix, program, *arguments,
                "--pidfile", f"--unixctl={self._control(program)}", "-vconsole:off", "-vsyslog:off", "-vfile:info",
                f"--log-file={self.rundir / program}.log", "--no-chdir"]
        try:
            return subprocess.Popen(argv, env={**os.environ, **self.environment}, stdin=subprocess.DEVNULL,
                                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        except FileNotFoundError as error:
            raise OvsError(f"{error.filename} is not installed") from None

    def switch_running(self) -> bool:
        """Whether this instance's ovs-vswitchd lives."""
        return self._switch is not None and self._switch.poll() is None

    def _start_database(self) -> None:
        if self._database is not None and self._database.poll() is None:
            return
        self.rundir.mkdir(parents=True, exist_ok=True)
        database = self.rundir / "conf.db"
        if not database.exists():
            self.command("ovsdb-tool", "create", str(database), str(SCHEMA))
        self._database = self._spawn("ovsdb-server", str(database), f"--remote=punix:{self.rundir}/db.sock")
        self._wait(self.database_running, self._database, "ovsdb-server")
        self.vsctl("init", wait=False)

    def _start_switch(self) -> None:
        self._switch = self._spawn("ovs-vswitchd", f"unix:{self.rundir}/db.sock")
        self._wait(self._control("ovs-vswitchd").exists, self._switch, "ovs-vswitchd")

    def _wait(self, ready: Callable[[], bool], process: subprocess.Popen[bytes], program: str) -> None:
        deadline = time.monotonic() + COMMAND_TIMEOUT_S
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                log = self.rundir / f"{program}.log"
                last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
                raise OvsError(f"{program} did not start: {last[0] if last else 'it left no log'}")
            time.sleep(0.02)

    def kill_switch(self) -> None:
        """Kill ovs-vswitchd at once, as a crash would; :meth:`ensure_running` starts it again."""
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait()
            self._control("ovs-vswitchd").unlink(missing_ok=True)

    def stop(self) -> None:
        """Stop both daemons and remove the datapath's own interfaces. The directory stays."""
        if self.switch_running():
            # --cleanup takes the datapath and its tap interfaces away as well.
            with contextlib.suppress(OvsError):
                self.appctl("exit", "--cleanup")
        for process in (self._switch, self._database):
            if process is not None:
                _end(process)
        self._switch = self._database = None


def _room_for_a_command() -> None:
    """Find out whether there are descriptors enough: with too few, Popen would leave open the ones it got.

    Raises:
        OSError: there are not.
    """
    found: list[int] = []
    try:
        while len(found) < COMMAND_DESCRIPTORS:
            found.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    finally:
        for descriptor in found:
            os.close(descriptor)


def _short(argv: Sequence[str]) -> str:
    """A command for a message: a bundle of flows can be megabytes."""
    text = " ".join(argv)
    return text if len(text) <= 400 else text[:400] + "..."


def _end(process: subprocess.Popen[bytes], patience: float = 3.0) -> None:
    """End a process: it is asked, and killed if it does not listen."""
    process.terminate()
    try:
        process.wait(timeout=patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
