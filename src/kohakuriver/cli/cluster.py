"""`kohakuriver up`, `host` and `runner`: the programs on the other side of a forward."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kohakuriver.backends import by_default, names
from kohakuriver.cli import output
from kohakuriver.cli.options import JsonOption, SshAlgorithms, SshAlgorithmsOption, built, one_of, remote
from kohakuriver.cli.signals import caught
from kohakuriver.descriptors import as_far_as_it_goes
from kohakuriver.errors import KohakuRiverError
from kohakuriver.spared import without

if TYPE_CHECKING:
    from kohakuriver.cli.local_cluster import LocalCluster

__all__ = ["register"]


class LogLevel(str, Enum):
    """How much is logged to stderr."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


class LogFormat(str, Enum):
    """For whom it is logged."""

    text = "text"
    json = "json"


AnonymousOption = Annotated[
    bool,
    typer.Option("--allow-anonymous", help="Let old command lines and tunnel clients in that show no credential."),
]
AllowedHostOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allowed-host",
        metavar="NAME",
        help="A name that requests may come by; may be repeated. With one, other machines must use it too.",
        show_default=False,
    ),
]
AllowedOriginOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allowed-origin",
        metavar="URL",
        help="Another site whose pages may connect, as https://name; may be repeated.",
        show_default=False,
    ),
]
LogLevelOption = Annotated[LogLevel, typer.Option("--log-level", help="How much is logged to stderr.")]
LogFormatOption = Annotated[
    LogFormat,
    typer.Option("--log-format", envvar="KOHAKURIVER_LOG_FORMAT", help="Lines for people, or a JSON object in each."),
]
PortOption = Annotated[int, typer.Option("--port", min=0, max=65535, help="The port to listen on; 0 is any free one.")]
SshPortOption = Annotated[
    int, typer.Option("--ssh-port", min=0, max=65535, help="The port of the SSH proxy; 0 is any free one.")
]
StateOption = Annotated[
    Path | None,
    typer.Option(
        "--state-dir", help="What outlives the program. Default: in your config directory.", show_default=False
    ),
]
TlsCertOption = Annotated[
    Path | None, typer.Option("--tls-cert", help="Serve HTTPS with this PEM file.", show_default=False)
]
TlsKeyOption = Annotated[
    Path | None, typer.Option("--tls-key", help="The key that belongs to --tls-cert.", show_default=False)
]
MetricsOption = Annotated[
    str | None,
    typer.Option(
        "--metrics",
        metavar="[ADDRESS:]PORT",
        help="Where Prometheus may read measures, at /metrics, without a token. Default: nowhere.",
        show_default=False,
    ),
]
StdinOption = Annotated[bool, typer.Option("--exit-with-stdin", hidden=True)]
BindOption = Annotated[str, typer.Option("--bind", metavar="ADDRESS", help="The address to listen on.")]
DatabaseOption = Annotated[
    str | None,
    typer.Option(
        "--database",
        metavar="URL",
        envvar="KOHAKURIVER_DATABASE",
        help="Default: a SQLite file in --state-dir.",
        show_default=False,
    ),
]
AuditOption = Annotated[
    Path | None,
    typer.Option("--audit-log", help="Where it goes what was done. Default: in --state-dir.", show_default=False),
]
DrainOption = Annotated[
    int,
    typer.Option("--drain", min=0, max=3600, help="Seconds that forwards have to move to another host when it ends."),
]
DrainNoticeOption = Annotated[
    int,
    typer.Option(
        "--drain-notice",
        min=0,
        max=3600,
        help="Seconds before that in which a host that ends is not ready, for a balancer to see, and still serves all.",
    ),
]
WorkersOption = Annotated[
    int,
    typer.Option("--workers", min=1, max=64, help="Processes that serve together; more than one needs PostgreSQL."),
]
MountsOption = Annotated[
    bool, typer.Option("--user-mounts", help="Let users who are no admins mount directories of the nodes.")
]
_OIDC = "OpenID Connect"


def _oidc(name: str, metavar: str, text: str) -> Any:
    return typer.Option(name, metavar=metavar, help=text, show_default=False, rich_help_panel=_OIDC)


AppsDomainOption = Annotated[
    str | None,
    typer.Option(
        "--apps-domain",
        metavar="DOMAIN",
        help="Tasks' HTTP ports have addresses in it, as lab-8888-….DOMAIN; its names, *.DOMAIN, have to lead here.",
        show_default=False,
    ),
]
AppsUrlOption = Annotated[
    str | None,
    typer.Option(
        "--apps-url",
        metavar="URL",
        help="Without names for that: all of tasks' HTTP ports are under this one, each with a path as its prefix.",
        show_default=False,
    ),
]
AppsPortOption = Annotated[
    int | None,
    typer.Option(
        "--apps-port",
        metavar="PORT",
        min=0,
        max=65535,
        help="Another port to listen on, where --apps-url has the host's own name and that port.",
        show_default=False,
    ),
]
PublicUrlOption = Annotated[
    str | None,
    typer.Option(
        "--public-url",
        metavar="URL",
        help="Where browsers find this host. Default with --apps-domain or -url: by a name in its certificate.",
        show_default=False,
    ),
]
TrustedProxyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--trusted-proxy",
        metavar="CIDR",
        help="A proxy before the host, as 10.0.3.0/24, whose X-Forwarded-For and -Proto are true; may be repeated.",
        show_default=False,
    ),
]
SshProxyProtocolOption = Annotated[
    bool,
    typer.Option(
        "--ssh-proxy-protocol",
        help="What comes to the SSH port from a --trusted-proxy begins with a PROXY header, which says who connects.",
    ),
]
AdvertiseOption = Annotated[
    str | None,
    typer.Option("--advertise-url", metavar="URL", help="How the host reaches this runner.", show_default=False),
]
NodeNameOption = Annotated[
    str | None, typer.Option("--name", help="The node's name. Default: this machine's.", show_default=False)
]
NodeTokenOption = Annotated[
    str | None,
    typer.Option("--node-token", envvar="KOHAKURIVER_NODE_TOKEN", help="The host's node token.", show_default=False),
]
NodeTokenFileOption = Annotated[
    Path | None, typer.Option("--node-token-file", help="The file that holds it.", show_default=False)
]
HostAdvertiseOption = Annotated[
    str | None,
    typer.Option(
        "--advertise-url",
        metavar="URL",
        help="How other hosts on the same database reach this one, for tasks of agents.",
        show_default=False,
    ),
]
BackendsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--backend",
        **one_of(names()),
        help=f"What to offer; may be repeated. Default: {' and '.join(by_default())}.",
        show_default=False,
    ),
]
UserProcessesOption = Annotated[
    bool,
    typer.Option("--user-processes", help="Let users who are no admins run processes, as the runner's own user."),
]
ProcessUserOption = Annotated[
    str | None,
    typer.Option(
        "--process-user",
        metavar="USER",
        help="As whom processes run. Default: the runner's own user, who must be root to name another.",
        show_default=False,
    ),
]
MountRootOption = Annotated[
    list[str] | None,
    typer.Option(
        "--mount-root",
        metavar="DIR[:ro]",
        help="What users who are no admins may mount, as /data:ro or /home/{user}; may be repeated.",
        show_default=False,
    ),
]
RegistryOption = Annotated[
    list[str] | None,
    typer.Option(
        "--registry",
        metavar="NAME",
        envvar="KOHAKURIVER_REGISTRIES",
        help="Where images may be fetched from; may be repeated, '*' is any. Default: docker.io.",
        show_default=False,
    ),
]
GpuOption = Annotated[
    list[str] | None,
    typer.Option(
        "--gpu",
        metavar="/dev/X",
        help="A GPU of this node by its device; may be repeated. Default: NVIDIA's.",
        show_default=False,
    ),
]
_SLURM = "With --backend slurm"
SlurmUsersOption = Annotated[
    Path | None,
    typer.Option(
        "--slurm-users",
        metavar="FILE",
        help="Who is who: lines USER NAME, a user here and one of the cluster; * * is everybody under the own name.",
        show_default=False,
        rich_help_panel=_SLURM,
    ),
]
SlurmClientOption = Annotated[
    str | None,
    typer.Option(
        "--slurm-client",
        metavar="PATH",
        help="Where the compute nodes have the program tunnel-client. Default: each job brings it along.",
        show_default=False,
        rich_help_panel=_SLURM,
    ),
]
SlurmUrlOption = Annotated[
    str | None,
    typer.Option(
        "--slurm-url",
        metavar="URL",
        help="How jobs reach this runner. Default: as the host does.",
        show_default=False,
        rich_help_panel=_SLURM,
    ),
]
DirectOption = Annotated[
    bool | None,
    typer.Option(
        "--direct/--no-direct",
        help="Let users' forwards connect here, past the host. Default: where it serves TLS, or is on loopback.",
        show_default=False,
    ),
]
StopTasksOption = Annotated[bool, typer.Option("--stop-tasks-on-exit", help="End containers too when the runner ends.")]


def _ca_file(whose: str) -> Any:
    return typer.Option(
        "--ca-file",
        envvar="KOHAKURIVER_CA_FILE",
        help=f"Who signed {whose}. Default: the system's authorities.",
        show_default=False,
    )


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command(epilog="Example: kohakuriver up")(up)
    app.command(epilog="Example: kohakuriver host --bind 0.0.0.0 --port 8000")(host)
    app.command(epilog="Example: kohakuriver runner --host-url http://cluster:8000 --node-token-file node-token")(
        runner
    )


def up(
    host_port: Annotated[int, typer.Option("--host-port", min=0, max=65535, help="0 is any free one.")] = 8000,
    runner_port: Annotated[int, typer.Option("--runner-port", min=0, max=65535, help="0 is any free one.")] = 8001,
    ssh_port: SshPortOption = 8002,
    state_dir: StateOption = None,
    allow_anonymous: AnonymousOption = False,
    user_processes: UserProcessesOption = False,
    mount_roots: MountRootOption = None,
    log_level: LogLevelOption = LogLevel.warning,
    json: JsonOption = False,
) -> int:
    """Run a whole cluster on this machine: a host and a runner, on loopback, until Ctrl-C.

    The other commands of the same user find it with nothing set.
    """
    from kohakuriver.cli.local_cluster import LocalCluster
    from kohakuriver.config import config_dir
    from kohakuriver.runtime import run

    cluster = LocalCluster(
        state_dir or config_dir() / "state",
        host_port=host_port,
        runner_port=runner_port,
        ssh_port=ssh_port,
        allow_anonymous=allow_anonymous,
        user_processes=user_processes,
        mount_roots=mount_roots or (),
        log_level=log_level.value,
    )
    return run(_run_up(cluster, json))


async def _run_up(cluster: LocalCluster, json: bool) -> int:
    from kohakuriver.config import remove_cluster, write_cluster

    _check_alone()
    stopped: asyncio.Future[signal.Signals] = asyncio.get_running_loop().create_future()
    with caught(lambda number: None if stopped.done() else stopped.set_result(number)):
        starting = asyncio.ensure_future(cluster.start())
        with output.working("Starting the host and the runner"):
            await _first_of(starting, stopped)
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return 0
        starting.result()
        try:
            _check_alone()  # another one may have been started at the same time
            write_cluster(cluster.cluster)
            await _say_ready(cluster, json)
            return await _until_end(cluster, stopped)
        finally:
            remove_cluster(cluster.cluster)
            await cluster.stop()


def _check_alone() -> None:
    """Raises KohakuRiverError where commands with nothing set use the cluster of another `up`, which runs."""
    from kohakuriver.config import config_dir, read_cluster

    other = read_cluster()
    if other is not None:
        raise KohakuRiverError(
            f"The commands that use {config_dir()} have the cluster at {other.host_url}, which `kohakuriver up` runs; "
            "end that, or give this one a KOHAKURIVER_CONFIG_DIR and a --state-dir of its own."
        )


async def _until_end(cluster: LocalCluster, stopped: asyncio.Future[signal.Signals]) -> int:
    ended = asyncio.ensure_future(cluster.child_ended())
    await _first_of(ended, stopped)
    if not stopped.done():
        output.error(ended.result())
        return 1
    ended.cancel()
    return 0


async def _first_of(*waited_for: asyncio.Future[Any]) -> None:
    await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)


async def _say_ready(cluster: LocalCluster, json: bool) -> None:
    from kohakuriver.client.host import HostClient

    host_url = cluster.cluster.host_url
    node = cluster.node
    async with HostClient(cluster.settings) as client:
        link = (await client.login_link()).url
    with as_far_as_it_goes():
        if json:
            ready = {"event": "ready", "host_url": host_url, "runner_url": cluster.runner_url}
            output.json_line({**ready, "ssh_proxy": cluster.cluster.ssh_proxy, "browser": link})
        else:
            backends = ", ".join(node.backends) if node else ""
            ssh = f", SSH proxy {cluster.cluster.ssh_proxy}"
            output.line(f"ready: host {host_url}, runner {cluster.runner_url} ({backends}){ssh}; Ctrl-C ends it")
            output.line(f"dashboard, in a browser within a minute: {link} (later: kohakuriver open)")


@dataclass(frozen=True)
class Serving:
    """What host and runner have in common."""

    state_dir: StateOption = None
    tls_cert: TlsCertOption = None
    tls_key: TlsKeyOption = None
    allow_anonymous: AnonymousOption = False
    allowed_hosts: AllowedHostOption = None
    allowed_origins: AllowedOriginOption = None
    log_level: LogLevelOption = LogLevel.info
    log_format: LogFormatOption = LogFormat.text
    metrics: MetricsOption = None
    json: JsonOption = False
    exit_with_stdin: StdinOption = False


@dataclass(frozen=True)
class HostServing(Serving):
    """What a host has besides, with an OpenID provider."""

    oidc_issuer: Annotated[
        str | None, _oidc("--oidc-issuer", "URL", "Let people log in at this OpenID provider, by its issuer URL.")
    ] = None
    oidc_client_id: Annotated[
        str | None, _oidc("--oidc-client-id", "ID", "As which client the provider knows this host.")
    ] = None
    oidc_client_secret_file: Annotated[
        Path | None, _oidc("--oidc-client-secret-file", "FILE", "The file that holds that client's secret.")
    ] = None
    oidc_allowed_groups: Annotated[
        list[str] | None,
        _oidc("--oidc-allowed-group", "GROUP", "Who may come in; may be repeated. '*': whom the provider knows."),
    ] = None
    oidc_allowed_domains: Annotated[
        list[str] | None,
        _oidc("--oidc-allowed-domain", "DOMAIN", "The domain that a verified e-mail must have; may be repeated."),
    ] = None
    oidc_admin_groups: Annotated[
        list[str] | None, _oidc("--oidc-admin-group", "GROUP", "Who comes in as an admin; may be repeated.")
    ] = None
    oidc_group_claim: Annotated[
        str | None, _oidc("--oidc-group-claim", "CLAIM", "The claim that has the groups. Default: groups.")
    ] = None
    oidc_scopes: Annotated[
        list[str] | None,
        _oidc("--oidc-scope", "SCOPE", "What else to ask for, where the groups need that; may be repeated."),
    ] = None
    oidc_ca_file: Annotated[
        Path | None, _oidc("--oidc-ca-file", "FILE", "Who signed its certificate. Default: the system's authorities.")
    ] = None


@remote
def host(
    ctx: typer.Context,
    common: HostServing,
    bind: BindOption = "0.0.0.0",
    port: PortOption = 8000,
    ssh_port: SshPortOption = 8002,
    database: DatabaseOption = None,
    ca_file: Annotated[Path | None, _ca_file("the runners' certificates")] = None,
    audit_log: AuditOption = None,
    drain: DrainOption = 0,
    drain_notice: DrainNoticeOption = 0,
    workers: WorkersOption = 1,
    user_mounts: MountsOption = False,
    apps_domain: AppsDomainOption = None,
    apps_url: AppsUrlOption = None,
    apps_port: AppsPortOption = None,
    public_url: PublicUrlOption = None,
    advertise_url: HostAdvertiseOption = None,
    trusted_proxies: TrustedProxyOption = None,
    ssh_proxy_protocol: SshProxyProtocolOption = False,
    ssh_algorithms: SshAlgorithmsOption = SshAlgorithms.all,
) -> int:
    """Run the host alone: the HTTP API, the middle of every forward, and the SSH proxy."""
    from kohakuriver.config import config_dir

    with _plain_logs():
        from kohakuriver.host import HostOptions, serve

    return serve(built(HostOptions, ctx.params, state_dir=common.state_dir or config_dir() / "host"))


@remote
def runner(
    ctx: typer.Context,
    common: Serving,
    host_url: Annotated[
        list[str],
        typer.Option(
            "--host-url",
            metavar="URL",
            envvar="KOHAKURIVER_HOST",
            help="The host; again for each other one on its database.",
        ),
    ],
    bind: BindOption = "0.0.0.0",
    port: PortOption = 8001,
    advertise_url: AdvertiseOption = None,
    name: NodeNameOption = None,
    node_token: NodeTokenOption = None,
    node_token_file: NodeTokenFileOption = None,
    backends: BackendsOption = None,
    registries: RegistryOption = None,
    user_processes: UserProcessesOption = False,
    process_user: ProcessUserOption = None,
    mount_roots: MountRootOption = None,
    gpus: GpuOption = None,
    slurm_users: SlurmUsersOption = None,
    slurm_client: SlurmClientOption = None,
    slurm_url: SlurmUrlOption = None,
    ca_file: Annotated[Path | None, _ca_file("the host's certificate")] = None,
    stop_tasks_on_exit: StopTasksOption = False,
    direct: DirectOption = None,
    ssh_algorithms: SshAlgorithmsOption = SshAlgorithms.all,
) -> int:
    """Run a node: start tasks here and reach into them."""
    from kohakuriver import config

    with _plain_logs():
        from kohakuriver.runner import RunnerOptions, serve

    first, *others = dict.fromkeys(url for given in host_url for url in config.host_urls(given))
    more: dict[str, Any] = {"state_dir": common.state_dir or config.config_dir() / "runner"}
    more |= {"host_url": first, "other_hosts": others}
    return serve(built(RunnerOptions, {"backends": by_default(), **_given(ctx)}, **more))


def _plain_logs() -> contextlib.AbstractContextManager[None]:
    """structlog would load Rich for tracebacks in colours, which our logs have not."""
    return without("rich")


def _given(ctx: typer.Context) -> dict[str, Any]:
    # An option that may be repeated, and was not given at all, is an empty list.
    return {name: value for name, value in ctx.params.items() if value is not None and value not in ([], ())}
