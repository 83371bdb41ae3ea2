# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The ``lbapp`` command: reads the command line, calls, and turns every failure into one line.

Everything that is shown is made in :mod:`lbapp.display`, everything that is asked in
:mod:`lbapp.client`. Both, and the model, are imported by the commands that need them: ``lbapp
run`` has to patch the process for eventlet before sockets and threads are imported.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from lbapp.command_line import RESOURCES, SHOWN, Access, Failure, HostPort, loopback, warn

URL = "http://127.0.0.1:8080"
STATE_DIR = Path("/var/lib/lbapp")
FILE = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)
PATH = click.Path(path_type=Path)


class Commands(click.Group):
    """A group whose commands' failures are all one line."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command and translate what it raises."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            raise self.translated(ctx, error) from None

    @staticmethod
    def translated(ctx: click.Context, error: Exception) -> Exception:
        """What to raise in place of an error."""
        if os.environ.get("LBAPP_DEBUG"):
            return error
        # Names rather than classes: those modules may not have been imported, and then it is none of theirs.
        names = {cls.__name__ for cls in type(error).__mro__}
        if "ApiError" in names and getattr(error, "status", 0) == 401 and isinstance(ctx.obj, Access):
            return Failure(ctx.obj.unauthorized())
        if "ApiError" in names and getattr(error, "status", 0) >= 500 and isinstance(ctx.obj, Access):
            return Failure(f"the controller at {ctx.obj.url} failed: {error}")
        if names & {"ClientError", "SiteError", "TokenFileError", "StartError", "DatabaseError", "TokenError"}:
            return Failure(str(error))
        if "WordError" in names:
            return click.UsageError(str(error), click.get_current_context(silent=True) or ctx)
        if isinstance(error, OSError):
            return Failure(": ".join(str(part) for part in (error.filename, error.strerror or error) if part))
        if isinstance(error, ImportError):
            return Failure(f"{error}; is lbapp installed completely (`make setup`)?")
        return Failure(f"internal error: {type(error).__name__}: {error} (LBAPP_DEBUG=1 shows where)")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option("--url", envvar="LBAPP_URL", default=URL, show_default=True, show_envvar=True,
              help="REST interface of the controller.")
@click.option("--token", envvar="LBAPP_TOKEN", show_envvar=True, help="Bearer token, instead of the file's.")
@click.option("--token-file", envvar="LBAPP_TOKEN_FILE", type=PATH, show_envvar=True,
              help="File with the bearer token.  [default: token in the state directory]")
@click.option("--ca", type=FILE, help="Certificates to trust for an https URL.")
@click.version_option(package_name="lbapp")
@click.pass_context
def cli(ctx: click.Context, url: str, token: str | None, token_file: Path | None, ca: Path | None) -> None:
    """A load balancer whose data path is Open vSwitch and whose controller is a Ryu application."""
    sources = {name: ctx.get_parameter_source(name) for name in ("token", "token_file")}
    explicit_file = sources["token_file"] is click.core.ParameterSource.COMMANDLINE
    if explicit_file and sources["token"] is not click.core.ParameterSource.COMMANDLINE:
        token = None  # what was typed wins over the environment
    state_dir = Path(os.environ.get("LBAPP_STATE_DIR") or STATE_DIR)
    ctx.obj = Access(url, token or None, token_file or state_dir / "token", ca, token_file is not None,
                     connect=ctx.obj)


@cli.command()
@click.option("--state-dir", type=PATH, envvar="LBAPP_STATE_DIR", default=STATE_DIR, show_default=True,
              show_envvar=True, help="Database, token and logs.")
@click.option("--listen", type=HostPort(), default="127.0.0.1:6653", show_default=True, help="For OpenFlow.")
@click.option("--api", type=HostPort(), default="127.0.0.1:8080", show_default=True, help="For REST.")
@click.option("--tls-certificate", type=FILE, help="Certificate of the REST interface.")
@click.option("--tls-key", type=FILE, help="Its key.")
@click.option("--openflow-certificate", type=FILE, help="Certificate towards switches.")
@click.option("--openflow-key", type=FILE, help="Its key.")
@click.option("--openflow-ca", type=FILE, help="Who signs the switches' certificates.")
@click.option("--database", metavar="REMOTE", help="An OVSDB server to use, such as unix:PATH or tcp:HOST:PORT.  "
                                                   "[default: start one in the state directory]")
@click.option("--token-file", type=PATH, envvar="LBAPP_TOKEN_FILE",
              help="Where the bearer token is kept.  [default: token in the state directory]")
@click.option("--fastpath", is_flag=True, envvar="LBAPP_FASTPATH", show_envvar=True,
              help="Put an eBPF fast path in front of the bridges of this host.")
@click.option("--max-connections", type=click.IntRange(1024, 1 << 23), default=1 << 20, show_default=True,
              help="Size of each such fast path's table.")
@click.option("--agent", "agents", type=HostPort(), multiple=True, metavar="HOST:PORT",
              help="An agent beside a switch of another host; may be repeated.")
@click.option("--bus-key", type=PATH, envvar="LBAPP_BUS_KEY", show_envvar=True,
              help="Shared key of the buses, made where there is none.  [default: bus.key in the state directory]")
@click.option("--queries", type=click.Choice(["agent", "openflow"]), default="agent", show_default=True,
              help="How first packets come from a switch with a fast path: straight, or as packet-ins.")
@click.option("--monitor-scripts", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="DIRECTORY",
              help="Where the executables of EXTERNAL monitors are; without it there can be none.")
@click.option("--log-level", type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"], case_sensitive=False),
              default="INFO", show_default=True)
@click.option("--log-file", type=PATH, help="Log there instead of to standard error.")
@click.argument("ryu_apps", nargs=-1)
@click.pass_obj
def run(access: Access, listen: tuple[str, int], ryu_apps: tuple[str, ...], token_file: Path | None,
        log_level: str, queries: str, **options: Any) -> None:
    """Run the controller, and RYU_APPS beside it (such as ryu.app.simple_switch_13)."""
    for one in ("tls", "openflow"):
        certificate, key = options[f"{one}_certificate"], options[f"{one}_key"]
        if (certificate is None) != (key is None):
            raise click.UsageError(f"--{one}-certificate and --{one}-key belong together")
    if options["openflow_ca"] and not options["openflow_certificate"]:
        raise click.UsageError("--openflow-ca needs --openflow-certificate and --openflow-key")
    for address, option, what, safe in (
            (listen, "--listen", "OpenFlow", options["openflow_ca"] and options["openflow_certificate"]),
            (options["api"], "--api", "the REST interface", options["tls_certificate"])):
        if not safe and not loopback(f"[{address[0]}]"):
            warn(f"{option} {address[0]}: {what} is open to the network without TLS: "
                 + ("whoever reaches it can be a switch" if option == "--listen" else "the token can be overheard"))
    from lbapp import launcher

    if token_file is None and access.explicit_file:
        token_file = access.token_file
    # How it is told to stop; not an abortion.
    with contextlib.suppress(KeyboardInterrupt):
        launcher.run(launcher.Settings(openflow=listen, ryu_apps=ryu_apps, token_file=token_file,
                                       log_level=log_level.upper(), queries=queries == "agent", **options))


@cli.command()
@click.option("--bridge", required=True, help="Whose ports get the fast path.")
@click.option("--listen", type=HostPort(), default="127.0.0.1:6654", show_default=True,
              help="For controllers (CSMB over TCP; SSMB over UDP at the same address).")
@click.option("--key", type=PATH, envvar="LBAPP_BUS_KEY", show_envvar=True,
              help="Shared key of the buses, as on the controller.  [default: bus.key in the state directory]")
@click.option("--state-dir", type=PATH, envvar="LBAPP_STATE_DIR", default=STATE_DIR, show_default=True,
              show_envvar=True)
@click.option("--max-connections", type=click.IntRange(1024, 1 << 23), default=1 << 20, show_default=True,
              help="Size of the fast path's table.")
@click.option("--leave", is_flag=True, help="Leave the fast path in place at the end, for the next agent to adopt.")
@click.option("--remove", is_flag=True, help="Take down what an earlier agent left, and do nothing else.")
@click.option("--log-level", type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"], case_sensitive=False),
              default="INFO", show_default=True)
@click.option("--log-file", type=PATH, help="Log there instead of to standard error.")
def agent(**options: Any) -> None:
    """Run the agent beside a switch: the eBPF fast path in front of a bridge."""
    from lbapp import launcher

    if not options["remove"] and not loopback(f"[{options['listen'][0]}]"):
        warn(f"--listen {options['listen'][0]}: peers are authenticated, but what they say is not encrypted")
    with contextlib.suppress(KeyboardInterrupt):
        launcher.run_agent(**options)


@cli.command("server-agent")
@click.option("--listener", "listeners", type=HostPort(), multiple=True, metavar="ADDRESS:PORT",
              help="A server of this host; may be repeated.")
@click.option("--listen-port", "ports", type=click.IntRange(1, 65535), multiple=True, metavar="PORT",
              help="One at any of its addresses; may be repeated.")
@click.option("--interface", "interfaces", multiple=True, metavar="NAME",
              help="Where clients' packets come in; may be repeated.  [default: all that are up, but for loopback]")
@click.option("--name", help="By which the controller knows it.  [default: the host's name]")
@click.option("--netns", type=click.Path(exists=True, path_type=Path), metavar="FILE",
              help="Network namespace of the servers: /run/netns/NAME, /proc/PID/ns/net.  [default: this one]")
@click.option("--report-only", is_flag=True, help="Report how loaded the servers are, and adopt no connections.")
@click.option("--value", "values", multiple=True, metavar="NAME=SOURCE",
              help="Report a value of your own: command:PATH, http:URL#KEY or prometheus:URL#METRIC; may be repeated.")
@click.option("--cpu", type=click.Choice(["host", "servers"]), default="host", show_default=True,
              help="Whose CPU is reported: the whole host's, or that of the processes which listen.")
@click.option("--report-interval", type=click.FloatRange(0.2, 300), default=3.0, show_default=True, metavar="SECONDS",
              help="Between reports.")
@click.option("--bus-key", type=PATH, envvar="LBAPP_BUS_KEY", show_envvar=True,
              help="Shared key of the buses, as on the controller: reports are signed with it.")
@click.option("--remove", is_flag=True, help="Take down what an earlier one left, and do nothing else.")
@click.option("--log-level", type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"], case_sensitive=False),
              default="INFO", show_default=True)
@click.option("--log-file", type=PATH, help="Log there instead of to standard error.")
@click.pass_obj
def server_agent(access: Access, listeners: tuple[tuple[str, int], ...], ports: tuple[int, ...],
                 interfaces: tuple[str, ...], name: str | None, netns: Path | None, report_only: bool,
                 values: tuple[str, ...], cpu: str, report_interval: float, bus_key: Path | None,
                 **options: Any) -> None:
    """Run the agent beside servers: it reports how loaded they are, and this host's kernel takes over connections that
    a fast path has begun."""
    import ipaddress
    import socket

    from lbapp import launcher
    from lbapp.bus import keyfile
    from lbapp.client import ClientError
    from lbapp.server_agent.adopt import Listener
    from lbapp.server_agent.process import Settings
    from lbapp.server_agent.reporter import Reporting
    from lbapp.server_agent.sources import SourceError, Sources, read

    if not (listeners or ports or report_only or options["remove"]):
        raise click.UsageError("give at least one --listener or --listen-port")
    try:
        named = tuple(Listener(str(ipaddress.ip_address(host)), port) for host, port in listeners)
    except ValueError as error:
        raise click.UsageError(f"--listener: {error}") from None
    try:
        own = tuple(read(text) for text in values)
        Sources(own, report_interval)
    except SourceError as error:
        raise click.UsageError(f"--value: {error}") from None
    try:
        key = None if bus_key is None or options["remove"] else keyfile.read(bus_key)
    except keyfile.KeyFileError as error:
        raise Failure(str(error)) from None

    def connect() -> Any:
        try:
            return access.client()
        except Failure as failure:
            raise ClientError(failure.message) from None

    if not options["remove"]:
        connect().close()  # what is wrong with URL, certificates or token file is said at once
    reporting = Reporting(report_only, own, cpu == "servers", report_interval, key)
    settings = Settings(name or socket.gethostname(), named, ports, interfaces, netns, reporting)
    launcher.run_server_agent(settings=settings, connect=connect, **options)


@cli.command()
@click.option("-f", "--file", "file", required=True, type=click.Path(allow_dash=True), metavar="FILE",
              help="Site document, YAML or JSON; - is standard input.")
@click.option("--dry-run", is_flag=True, help="Show the difference and have the controller check it; change nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def apply(access: Access, file: str, dry_run: bool, yes: bool) -> None:
    """Make a site document the whole configuration.

    What the document does not name is removed. Shows the difference first, and asks on a terminal.
    """
    from lbapp import applying

    applying.apply(access.client, file, dry_run, yes)


@cli.command()
@click.argument("kind", type=SHOWN, required=False)
@click.argument("name", required=False)
@click.option("-o", "--output", type=click.Choice(["table", "json", "yaml"]), default="table", show_default=True)
@click.option("--limit", type=click.IntRange(min=1), help="No more than so many.  [default: 50 for connections]")
@click.option("--filter", "filters", multiple=True, metavar="FIELD=VALUE", help="Only those; may be repeated.")
@click.pass_obj
def show(access: Access, kind: str | None, name: str | None, output: str, limit: int | None,
         filters: tuple[str, ...]) -> None:
    """Show resources of a KIND, or one by NAME; without KIND an overview.

    KIND: virtual-servers, pools, members (NAME: their pool), networks, switches, connections, persistence, events,
    stats, config.
    """
    from lbapp import showing

    wanted: dict[str, str] = {}
    for word in filters:
        field, equals, text = word.partition("=")
        if not equals or not field or field in ("limit", "marker"):
            raise click.UsageError(f"--filter: expected field=value, got {word!r}")
        wanted[field] = text
    with access.client() as client:
        showing.show(client, kind, name, output, limit, wanted)


@cli.command()
@click.argument("request", nargs=-1, metavar="[METHOD] [URL]")
@click.option("--virtual-server", metavar="NAME", help="Where several could be meant.")
@click.option("--header", "headers", multiple=True, metavar="'NAME: VALUE'",
              help="Of an HTTP request; may be repeated.")
@click.option("--sni", metavar="NAME", help="The server name of a TLS client.")
@click.option("--alpn", multiple=True, metavar="PROTOCOL", help="A protocol it offers; may be repeated.")
@click.option("--session-id", metavar="DIGITS", help="The session id of its ClientHello, in hexadecimal digits.")
@click.option("--data", metavar="TEXT|hex:DIGITS", help="A client's first bytes.")
@click.option("-o", "--output", type=click.Choice(["table", "json", "yaml"]), default="table", show_default=True)
@click.pass_obj
def explain(access: Access, request: tuple[str, ...], **options: Any) -> None:
    """Tell what a virtual server's policies make of a request: which policy, which pool, and why.

    Nothing is sent to anybody. Without --virtual-server it is the one at the URL's address and port, or the only one
    that reads such requests.
    """
    from lbapp import explaining

    with access.client() as client:
        explaining.explain(client, request, **options)


class Kinds(click.Group):
    """A group whose commands are kinds of resources, in singular, plural or short."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a kind."""
        return super().get_command(ctx, RESOURCES.words.get(cmd_name, cmd_name).removesuffix("s"))


@cli.group(cls=Kinds)
def add() -> None:
    """Add a virtual server, pool, member or network."""


SET = click.option("--set", "sets", multiple=True, metavar="FIELD=VALUE", help="Another plain field; may be repeated.")


def _added(access: Access, kind: str, what: str, body: dict[str, Any], pool: str | None = None) -> None:
    from lbapp import showing

    with access.client() as client:
        showing.done(f"{what} added", client.create(kind, body, pool))


@add.command("virtual-server")
@click.argument("name")
@click.option("--address", required=True, help="The virtual address.")
@click.option("--port", type=click.IntRange(0, 65535), required=True, help="0 is every port.")
@click.option("--protocol", type=click.Choice(["TCP", "UDP"], case_sensitive=False), default="TCP", show_default=True)
@click.option("--pool", help="Id or name of a pool that exists.")
@click.option("--member", "members", multiple=True, metavar="ADDRESS:PORT[:WEIGHT]",
              help="A member of a pool of its own; may be repeated.")
@click.option("--algorithm", metavar="ALGORITHM", help="Of the pool of its own.  [default: ROUND_ROBIN]")
@SET
@click.pass_obj
def add_virtual_server(access: Access, name: str, address: str, port: int, protocol: str, pool: str | None,
                       members: tuple[str, ...], algorithm: str | None, sets: tuple[str, ...]) -> None:
    """Add the virtual server NAME, with a pool that exists or one of its own."""
    from lbapp import assignments as words

    if pool and (members or algorithm):
        raise click.UsageError("--pool names a pool that exists; --member and --algorithm make a new one")
    body = {"name": name, "vip_address": address, "protocol": protocol.upper(), "protocol_port": port,
            **words.assignments("virtual-servers", sets)}
    if pool:
        body["pool"] = pool
    elif members or algorithm:
        body["pool"] = {"name": name, "members": [words.member(text) for text in members],
                        **words.assignments("pools", [f"lb_algorithm={algorithm or 'ROUND_ROBIN'}"])}
    _added(access, "virtual-servers", f"virtual server {name}", body)


@add.command("pool")
@click.argument("name")
@click.option("--member", "members", multiple=True, metavar="ADDRESS:PORT[:WEIGHT]", help="May be repeated.")
@click.option("--algorithm", default="ROUND_ROBIN", show_default=True, metavar="ALGORITHM")
@SET
@click.pass_obj
def add_pool(access: Access, name: str, members: tuple[str, ...], algorithm: str, sets: tuple[str, ...]) -> None:
    """Add the pool NAME."""
    from lbapp import assignments as words

    body = {"name": name, "members": [words.member(text) for text in members],
            **words.assignments("pools", [f"lb_algorithm={algorithm}"]), **words.assignments("pools", sets)}
    _added(access, "pools", f"pool {name}", body)


@add.command("member")
@click.argument("pool")
@click.argument("member", metavar="ADDRESS:PORT[:WEIGHT]")
@SET
@click.pass_obj
def add_member(access: Access, pool: str, member: str, sets: tuple[str, ...]) -> None:
    """Add a member to POOL."""
    from lbapp import assignments as words

    body = {**words.member(member), **words.assignments("members", sets)}
    _added(access, "members", f"member {member} of pool {pool}", body, pool)


@add.command("network")
@click.argument("name")
@click.option("--cidr", required=True, help="Such as 10.0.0.0/24.")
@click.option("--address", required=True, help="The balancer's own address there.")
@click.option("--gateway", help="The router that leads everywhere else.")
@SET
@click.pass_obj
def add_network(access: Access, name: str, cidr: str, address: str, gateway: str | None,
                sets: tuple[str, ...]) -> None:
    """Add the network NAME, in which the balancer has an address of its own."""
    from lbapp import assignments as words

    body = {"name": name, "cidr": cidr, "address": address, **({"gateway": gateway} if gateway else {}),
            **words.assignments("networks", sets)}
    _added(access, "networks", f"network {name}", body)


def _named(kind: str, words: Sequence[str]) -> tuple[str, str | None, list[str]]:
    """Reference, pool and the remaining words: a member is named by two words, the others by one."""
    count = 2 if kind == "members" else 1
    if len(words) < count:
        raise click.UsageError(f"expected {'POOL ADDRESS:PORT' if count == 2 else 'NAME'} after the kind")
    return words[count - 1], words[0] if count == 2 else None, list(words[count:])


@cli.command()
@click.argument("kind", type=RESOURCES)
@click.argument("name", nargs=-1, required=True, metavar="NAME | POOL ADDRESS:PORT")
@click.pass_obj
def remove(access: Access, kind: str, name: tuple[str, ...]) -> None:
    """Remove a resource by its id or name; a member by its pool and ADDRESS:PORT."""
    reference, pool, rest = _named(kind, name)
    if rest:
        raise click.UsageError(f"got unexpected {' '.join(rest)}")
    from lbapp import showing

    with access.client() as client:
        client.delete(kind, reference, pool)
    showing.done(f"{kind.removesuffix('s').replace('-', ' ')} {reference}{f' of pool {pool}' if pool else ''} removed")


@cli.command("set")
@click.argument("kind", type=RESOURCES)
@click.argument("words", nargs=-1, required=True, metavar="(NAME | POOL ADDRESS:PORT) FIELD=VALUE...")
@click.pass_obj
def set_(access: Access, kind: str, words: tuple[str, ...]) -> None:
    """Change fields of a resource, such as: lbapp set member web 10.0.0.1:80 admin_state_up=false."""
    reference, pool, rest = _named(kind, words)
    if not rest:
        raise click.UsageError("expected field=value after the name")
    from lbapp import showing
    from lbapp.assignments import assignments

    changes = assignments(kind, rest)
    with access.client() as client:
        client.update(kind, reference, changes, pool)
    showing.done(f"{kind.removesuffix('s').replace('-', ' ')} {reference}{f' of pool {pool}' if pool else ''}: "
                 + ", ".join(rest))


@cli.command()
@click.argument("pool", required=False)
@click.argument("member", required=False, metavar="[ADDRESS:PORT]")
@click.option("--switch", metavar="DPID", help="A whole switch, by its datapath id, instead of a pool's members.")
@click.option("--timeout", type=click.IntRange(1, 65535), metavar="SECONDS",
              help="After so long, what is left is reset.  [default: the drain_timeout of the member or switch]")
@click.option("--wait", is_flag=True, help="Until nothing is left, with a progress bar.")
@click.option("--patience", type=click.FloatRange(min=0), metavar="SECONDS", help="Wait no longer than that.")
@click.option("--undo", is_flag=True, help="Take them back instead.")
@click.pass_obj
def drain(access: Access, pool: str | None, member: str | None, switch: str | None, timeout: int | None, wait: bool,
          patience: float | None, undo: bool) -> None:
    """Give a member of POOL (or all of them), or a switch, no new connections; those it has go on."""
    if (pool is None) is (switch is None):
        raise click.UsageError("expected either POOL or --switch DPID")
    if undo and (timeout is not None or wait or patience is not None):
        raise click.UsageError("--undo stands alone")
    from lbapp import drains

    wait = wait or patience is not None
    with access.client() as client:
        if switch is not None:
            drains.drain_switch(client, switch, timeout, wait, patience, undo)
        elif pool is not None:
            drains.drain(client, pool, member, timeout, wait, patience, undo)


@cli.command()
@click.option("--rotate", is_flag=True, help="Make a new one; the old one is refused from then on.")
@click.pass_obj
def token(access: Access, rotate: bool) -> None:
    """Print the bearer token."""
    from lbapp import tokens

    if rotate:
        if access.token is not None:
            raise click.UsageError("--rotate writes the token file; leave --token (LBAPP_TOKEN) out")
        click.echo(tokens.rotate(access.token_file))
    else:
        click.echo(access.token or tokens.read(access.token_file))


def main() -> None:
    """The console script."""
    try:
        cli.main(prog_name="lbapp", standalone_mode=True)
    except BrokenPipeError:  # such as `lbapp show | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
