"""The runner as a program: state, sockets, backends, serving, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import structlog

from kohakuriver import __version__, tracing
from kohakuriver import runtime as loops
from kohakuriver.backends import kind_of
from kohakuriver.config import advertise_url, clean_token
from kohakuriver.errors import KohakuRiverError, LocalAddressError, UsageError
from kohakuriver.images import DEFAULT_REGISTRY, Registries
from kohakuriver.limits import from_environment as limits_from_environment
from kohakuriver.mount_roots import MountRoots
from kohakuriver.relay.hub import EXPECTED_SECONDS
from kohakuriver.relay.open_ports import OpenPorts
from kohakuriver.relay.straight import Straights
from kohakuriver.relay.terminal_room import TerminalRoom
from kohakuriver.relay.traffic import COUNTS
from kohakuriver.relay.tunnel_server import TunnelServer
from kohakuriver.resolve import resolving
from kohakuriver.runner.app import Services, create_app
from kohakuriver.runner.backends.base import Surroundings
from kohakuriver.runner.backends.registry import made
from kohakuriver.runner.services.doors import Doors
from kohakuriver.runner.services.gpus import found as found_gpus
from kohakuriver.runner.services.incidents import Incidents
from kohakuriver.runner.services.offer import offered
from kohakuriver.runner.services.registration import NodeIdentity, Registration
from kohakuriver.runner.services.ssh_helper import SshHelper
from kohakuriver.runner.services.state import State
from kohakuriver.runner.services.task_book import TaskBook
from kohakuriver.runner.services.tasks import TaskManager
from kohakuriver.runner.services.terminal import TerminalServer
from kohakuriver.runner.services.tunnel_guard import TunnelGuard
from kohakuriver.runner.services.tunnel_helper import TunnelHelper
from kohakuriver.tls import ServerCertificate, is_this_machine, sends_in_clear
from kohakuriver.tunnel.accept import serve_ws
from kohakuriver.tunnel.settings import from_environment
from kohakuriver.web.app import bind, new_app, print_event, server_certificate, socket_url, warn_if_in_clear
from kohakuriver.web.logging import configure_logging
from kohakuriver.web.measuring import Measures, measures_at
from kohakuriver.web.origin import Guard
from kohakuriver.web.server import Server, stop_at_end_of_stdin

__all__ = ["RunnerOptions", "main", "serve"]

log = structlog.get_logger("kohakuriver.runner")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_OF_SLURM = ("slurm_users", "slurm_client", "slurm_url")
_TRAFFIC = (*COUNTS, "sessions", "straight", "streams")
_TASK_TRAFFIC = (*_TRAFFIC, "version", "to_container_per_second", "to_user_per_second")


@dataclass(frozen=True)
class RunnerOptions:
    """How a runner runs. `port` 0 is the one it had last, or any free one; `name` None is the machine's name.

    `backends` are those it may use beside address; docker is offered while its engine answers. The node's token is
    given or read from a file. `other_hosts` are on the same database as the one at `host_url`. `advertise_url` is
    how the host reaches this runner, by default found out. `ca_file` is what the host's certificate is checked by.
    With `exit_with_stdin` it ends when its stdin does, as a child of `up` should. `allowed_hosts` and
    `allowed_origins` are as `Guard` takes them. Images that the engine has not got come from `registries` alone.
    With `user_processes` others than admins may run processes here, and they may mount `mount_roots`. Processes are the
    runner's own user, or `process_user`. Its GPUs are those at `gpus`, by default NVIDIA's.
    Who is who in Slurm says the file `slurm_users`; its nodes have a tunnel client at `slurm_client`, None where they
    have none, and reach this runner at `slurm_url`, by default where the host does. Its measures are read at
    `metrics`, as `metrics_address` takes it. `direct` is whether users may reach this runner themselves, at the address
    at which the host does; None for where it serves TLS, or is on loopback. `ssh_algorithms` is what tasks' SSH servers
    offer, by name.
    """

    state_dir: Path
    host_url: str
    node_token: str | None = None
    node_token_file: Path | None = None
    bind: str = "0.0.0.0"
    port: int = 8001
    advertise_url: str | None = None
    name: str | None = None
    other_hosts: Sequence[str] = ()
    backends: Sequence[str] = ("docker",)
    tls_cert: Path | None = None
    tls_key: Path | None = None
    ca_file: Path | None = None
    allow_anonymous: bool = False
    allowed_hosts: Sequence[str] = ()
    allowed_origins: Sequence[str] = ()
    registries: Sequence[str] = (DEFAULT_REGISTRY,)
    stop_tasks_on_exit: bool = False
    direct: bool | None = None
    ssh_algorithms: str = "all"
    user_processes: bool = False
    process_user: str | None = None
    mount_roots: Sequence[str] = ()
    gpus: Sequence[str] = ()
    slurm_users: Path | None = None
    slurm_client: str | None = None
    slurm_url: str | None = None
    metrics: str | None = None
    json: bool = False
    log_level: str = "info"
    log_format: str = "text"
    exit_with_stdin: bool = False


def serve(options: RunnerOptions) -> int:
    """Run a runner until SIGTERM or SIGINT; the exit code. Raises KohakuRiverError when it can't start."""
    configure_logging(options.log_level, options.log_format)
    tracing.serve("runner")
    return loops.run(main(options))


async def main(options: RunnerOptions) -> int:
    """What `serve` runs on an event loop."""
    certificate = server_certificate(options.tls_cert, options.tls_key)
    state = State(options.state_dir)
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(_bind(options, state))
        measures = measures_at(options.metrics, "runner")
        stack.callback(measures.close)
        identity = _identity(options, state, sock)
        return await Runner(options, state, sock, identity, certificate, measures).run()


class Runner:
    """The parts of one runner, and how they hear of one another."""

    def __init__(
        self,
        options: RunnerOptions,
        state: State,
        sock: socket.socket,
        identity: NodeIdentity,
        certificate: ServerCertificate | None,
        measures: Measures,
    ) -> None:
        limits = self._limits = limits_from_environment()
        self._began = time.monotonic()
        self._options = options
        self._sock = sock
        self._identity = identity
        self._registration = Registration(
            identity,
            state,
            heartbeat=self._heartbeat,
            told=lambda beat: self._incidents.told(beat["incidents"]),
            backends=lambda: self._tasks.backends,
            remove=self._remove,
            on_registered=self._registered,
        )
        self._incidents = Incidents()
        self._book = TaskBook(state, self._changed)
        self._tasks = TaskManager(self._book)
        room = TerminalRoom(limits)
        self._tunnels = TunnelServer(
            allow_anonymous=options.allow_anonymous,
            check_tunnel=TunnelGuard(self._book, self._tasks.comes_from, self._say).check,
            check_ticket=lambda credential: self._registration.check_ticket(credential, "forward"),
            check_terminal_ticket=lambda credential: self._registration.check_ticket(credential, "terminal"),
            room=room,
            target_of=self._tasks.target_of,
            mark=state.mark,
            expected=self._expected,
            on_tunnel_change=self._tasks.tunnel_changed,
            on_trouble=self._trouble,
            on_entered=self._tasks.lifetimes.entered,
            on_left=self._tasks.lifetimes.left,
            config=from_environment(),
            limits=limits,
            straights=Straights(identity.url, identity.offer.no_direct, lease=limits.lease),
        )
        self._terminals = TerminalServer(
            allow_anonymous=options.allow_anonymous,
            check_ticket=lambda credential: self._registration.check_ticket(credential, "terminal"),
            exec_in=self._tasks.exec,
            room=room,
            on_entered=self._of_id(self._tasks.lifetimes.entered),
            on_left=self._of_id(self._tasks.lifetimes.left),
        )
        self._ports = OpenPorts(self._book.get, self._tasks.sockets, self._tunnels.hub.tunnel_of)
        self._book.drop = self._drop
        self._tasks.lifetimes.tell = self._tunnels.hub.tell
        self._guard = Guard(
            names=[urlsplit(identity.url).hostname or "", *(certificate.names if certificate else ())],
            hosts=options.allowed_hosts,
            origins=options.allowed_origins,
        )
        self._measures = measures
        services = Services(self._tasks, self._registration, identity.url, self._tunnels, self._ports, self._new_token)
        ways = [
            *zip(("forward", "straight"), self._tunnels.session_routes(), strict=True),
            *(("terminal", way) for way in self._terminals.routes()),
        ]
        routes = [*self._tunnels.container_routes(), *(measures.route(*way) for way in ways)]
        self._server = Server(
            measures.requests(create_app(services, self._guard)),
            ws=serve_ws(routes, self._guard, max_message=limits.max_message),
            on_ready=self._ready,
            on_leave=self._leave,
            on_stop=self._stop,
            certificate=certificate,
            limits=limits,
        )
        self._certificate = certificate
        self._container_app = new_app("runner", __version__, guard=self._guard)
        self._listening = Listening(sock, self._listen_for_containers, state, tls=certificate is not None)
        self._backends = made(options.backends, self._surroundings(state))
        self._background: list[asyncio.Task[None]] = []

    def _surroundings(self, state: State) -> Surroundings:
        if self._options.process_user is not None and "process" not in self._options.backends:
            raise UsageError("--process-user is about --backend process; give that, too.")
        given = [name for name in _OF_SLURM if getattr(self._options, name) is not None]
        if given and "slurm" not in self._options.backends:
            raise UsageError(f"--{given[0].replace('_', '-')} is about --backend slurm; give that, too.")
        url = self._options.slurm_url or self._identity.url
        if self._certificate is not None and url.startswith("http:") and "slurm" in self._options.backends:
            raise UsageError(
                f"Jobs can't come to {url} in clear where this runner serves TLS: give --slurm-url https://…."
            )
        helper = TunnelHelper(state)
        if not helper.has_binary:
            log.warning(
                "there is no static tunnel client here: process tasks use the Python one, which costs more processor "
                "time, and no container can be started; to have it, install kohakuriver again where cargo is"
            )
        return Surroundings(
            node=self._identity.name,
            state=state,
            helper=helper,
            ssh=SshHelper(state, self._options.ssh_algorithms),
            report=self._book.report,
            doors=Doors(state, self._open_door),
            listen_at=self._listening.url_at,
            local_url=self._listening.local_url,
            on_change=self._registration.changed,
            user_processes=self._options.user_processes,
            process_user=self._options.process_user,
            registries=_registries(self._options),
            mount_roots=_mount_roots(self._options),
            limits=self._limits,
            gpus=found_gpus(self._options.gpus),
            slurm_users=self._options.slurm_users,
            slurm_client=self._options.slurm_client,
            url_for_jobs=url,
            ca_for_jobs=self._identity.ca_file,
            tell=lambda container, sentence: self._tunnels.hub.tell(container, sentence),
            begin=self._tasks.lifetimes.begin,
            touch=self._book.touch,
        )

    def _changed(self) -> None:
        """Something about a task is another."""
        self._registration.changed()
        self._tasks.lifetimes.changed()

    def _of_id(self, told: Callable[[str], None]) -> Callable[[int], None]:
        """What is told of a container, of the task with that id."""

        def of_id(task_id: int) -> None:
            with contextlib.suppress(KohakuRiverError):  # it was removed meanwhile
                told(self._book.of_id(task_id).container)

        return of_id

    def _say(self, container: str, sentence: str, address: str) -> None:
        self._tunnels.hub.say(container, sentence, address)

    def _trouble(self, container: str, sentence: str, address: str) -> None:
        """Something is wrong with a task's tunnel: its owner and the audit log are told."""
        self._book.note(container, sentence)
        if sentence and container in self._book:
            self._incidents.add(self._book.get(container).task_id, sentence, address)
            self._registration.changed()

    def _expected(self, container: str) -> bool:
        """Whether a tunnel was there before this runner began, and comes as soon as its client notices that."""
        if time.monotonic() - self._began > EXPECTED_SECONDS or container not in self._book:
            return False
        task = self._book.get(container)
        return task.active and not task.dialled

    def _new_token(self, container: str) -> None:
        tunnel = self._tunnels.hub.tunnel_of(container)
        if tunnel is not None and kind_of(self._book.get(container).backend).dialled:
            self._tunnels.hub.drop(container, "the token of its tunnel client was changed")
            self._book.note(container, "its tunnel client needs its new token: `kohakuriver vps agent-command` has it")
        elif tunnel is not None:
            tunnel.announce_token()

    def _drop(self, container: str, reason: str, *, gone: bool = False) -> None:
        """The task has ended: so do its streams and its terminals."""
        self._tunnels.hub.drop(container, reason, gone=gone)
        self._terminals.drop(container, reason)

    async def run(self) -> int:
        """Serve until the end; the exit code."""
        await self._server.serve([self._sock])
        return self._server.exit_code

    async def _listen_for_containers(self, sock: socket.socket) -> None:
        """Serve tunnel clients, and nothing else, on one more socket: containers have no business with the rest."""
        self._server.add_listener(sock, self._container_app, serve_ws(self._tunnels.container_routes(), self._guard))

    def _open_door(self, sock: socket.socket, container: str) -> Callable[[], None]:
        """The same on a container's own socket."""
        ws = serve_ws(self._tunnels.container_routes(), self._guard, door=container)
        return self._server.add_listener(sock, self._container_app, ws)

    async def _ready(self) -> None:
        if self._options.allow_anonymous:
            log.warning(
                "ANONYMOUS ACCESS IS ON: anybody who reaches this port can pose as every container, and open forwards "
                "and terminals to every task"
            )
        warn_if_in_clear(self._sock, self._certificate)
        if any(map(sends_in_clear, (self._identity.host_url, *self._identity.other_hosts))):
            log.warning("the host's URL is plain HTTP: others on the network can read this node's token")
        await self._listening.open()
        await self._tasks.open(self._backends)
        self._informing = self._server.keep(self._registration.run(), "keeping the host informed")
        self._background.append(self._server.keep(self._tasks.lifetimes.run(), "stopping tasks whose time has come"))
        if self._options.exit_with_stdin:
            stop_at_end_of_stdin(self._server)
        self._show_measures()
        url = self._identity.url
        sentence = f"The runner of node {self._identity.name} is ready at {url}"
        loops.freeze_heap()
        said = {"metrics": self._measures.url} if self._measures.url else {}
        print_event("ready", self._options.json, sentence, url=url, name=self._identity.name, **said)

    def _show_measures(self) -> None:
        """Have what the runner counts itself among its measures, where somebody may read them."""
        if self._measures.url is not None:
            from kohakuriver.runner.services.measures import runner_measures

            self._measures.show(runner_measures(self._tunnels.snapshot, self._book, lambda: self._tasks.backends))
        self._measures.begin(self._server)

    def _registered(self) -> None:
        name, host = self._identity.name, self._registration.host
        print_event(
            "registered",
            self._options.json,
            f"The host {host} has taken in node {name}",
            url=self._identity.url,
            name=name,
            host=host,
        )

    async def _leave(self) -> None:
        """While it listens: whoever comes from now on waits for the next one, and is not refused."""
        await loops.cancel_all([self._informing])
        await self._registration.leave()

    async def _stop(self) -> None:
        await self._terminals.close()
        await self._tasks.close(stop_tasks=self._options.stop_tasks_on_exit)
        await self._tunnels.close()
        await loops.cancel_all(self._background)
        await self._registration.close()

    def _heartbeat(self) -> dict[str, Any]:
        snapshot = self._tunnels.snapshot()
        reports = self._book.reports()
        for task, report in zip(self._book.all(), reports, strict=True):
            seen = snapshot["containers"].get(task.container, {})
            report["traffic"] = {name: seen.get(name, 0) for name in _TASK_TRAFFIC}
        traffic = {name: snapshot[name] for name in _TRAFFIC}
        return {"tasks": reports, "traffic": traffic, "incidents": self._incidents.pending()}

    async def _remove(self, task_id: int) -> None:
        for task in self._book.all():
            if task.task_id == task_id:
                try:
                    await self._tasks.remove(task.container)
                except KohakuRiverError as error:
                    log.warning("a removed task could not be ended", task=task_id, reason=error.message)


class Listening:
    """Where tunnel clients reach the runner, with a listener on one more address where one is needed.

    That is for those that have no socket of their own (`Doors`). Their tunnel clients speak no TLS, for what they
    send stays on the node: it goes over loopback, or to the node's own address on a bridge network. Where the runner
    serves TLS they have listeners of their own; jobs of Slurm come to the runner's own port then.
    """

    def __init__(
        self, sock: socket.socket, listen: Callable[[socket.socket], Awaitable[None]], state: State, *, tls: bool
    ) -> None:
        self._listen = listen
        self._state = state
        self._tls = tls
        self._host, self._port = sock.getsockname()[:2]
        self._local = socket_url(sock)
        self._more: dict[str, socket.socket] = {}
        self._opening = asyncio.Lock()

    async def open(self) -> None:
        """Listen for the processes of this node. Raises LocalAddressError."""
        if self._tls:
            self._local = await self.url_at("127.0.0.1")

    def local_url(self) -> str:
        """How processes on this node reach the runner."""
        return self._local

    async def url_at(self, address: str) -> str:
        """How a container reaches the runner at `address`, an IP address of this node. Raises LocalAddressError.

        It listens just there from now on, for tunnels alone: on the port that it had there last, or its own, or any.
        """
        if not self._tls and self._own_serves(address):
            return _url(address if ip_address(self._host).is_unspecified else self._host, self._port)
        async with self._opening:
            if address not in self._more:
                sock = self._bind(address)
                await self._listen(sock)
                self._more[address] = sock
                self._state.keep_port_at(address, sock.getsockname()[1])
        return _url(address, self._more[address].getsockname()[1])

    def _own_serves(self, address: str) -> bool:
        """Whether the runner's own socket is all right for `address`: no container needs the whole API."""
        own = ip_address(self._host)
        is_near = own.is_loopback or own.is_unspecified
        return self._host == address or (is_near and ip_address(address).is_loopback)

    def _bind(self, address: str) -> socket.socket:
        for port in (self._state.port_at(address) or self._port, self._port):
            with contextlib.suppress(LocalAddressError):
                return bind(address, port)
        return bind(address, 0)


def _url(address: str, port: int, scheme: str = "http") -> str:
    return f"{scheme}://[{address}]:{port}" if ":" in address else f"{scheme}://{address}:{port}"


def _bind(options: RunnerOptions, state: State) -> socket.socket:
    sock = None
    if options.port == 0 and state.last_port:
        try:
            sock = bind(options.bind, state.last_port)
        except LocalAddressError:
            log.info("the port of last time is taken; using another", port=state.last_port)
    sock = sock or bind(options.bind, options.port)
    state.last_port = sock.getsockname()[1]
    return sock


def _identity(options: RunnerOptions, state: State, sock: socket.socket) -> NodeIdentity:
    name = options.name or socket.gethostname()
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} can't be a node's name; give one of letters, digits, dots and dashes with --name.")
    gpus = [gpu.number for gpu in found_gpus(options.gpus)]
    given, port = options.advertise_url, sock.getsockname()[1]
    url = advertise_url(given, port) if given else _reachable_url(sock, options)
    return NodeIdentity(
        name=name,
        url=url,
        instance=state.instance,
        host_url=options.host_url.rstrip("/"),
        other_hosts=[url.rstrip("/") for url in options.other_hosts],
        token=_node_token(options),
        ca_file=options.ca_file,
        offer=replace(
            offered(limits_from_environment()),
            user_processes=options.user_processes,
            mount_roots=list(options.mount_roots),
            gpus=gpus,
            no_direct=_no_direct(options, url),
        ),
    )


def _no_direct(options: RunnerOptions, url: str) -> str:
    """Why users may not reach this runner, at `url`, past the host; empty where they may."""
    parts = urlsplit(url)
    if options.direct is None and parts.scheme != "https" and not is_this_machine(parts.hostname or ""):
        return "its node serves no TLS, and takes connections of users only with `kohakuriver runner --direct`"
    if options.direct is False:
        return "its node takes no connections of users (`kohakuriver runner --no-direct`)"
    return ""


def _registries(options: RunnerOptions) -> Registries:
    try:
        return Registries(options.registries)
    except ValueError as error:
        raise UsageError(f"--registry: {error}.") from None


def _mount_roots(options: RunnerOptions) -> MountRoots:
    try:
        return MountRoots(options.mount_roots)
    except ValueError as error:
        raise UsageError(f"--mount-root: {error}.") from None


def _node_token(options: RunnerOptions) -> str:
    if options.node_token:
        return clean_token(options.node_token)
    if options.node_token_file is None:
        raise UsageError("A runner needs its host's node token: --node-token or --node-token-file.")
    try:
        token = clean_token(options.node_token_file.read_text("utf-8", "replace"))
    except OSError as error:
        raise UsageError(f"The node token can't be read from {options.node_token_file}: {error.strerror}.") from error
    if os.name == "posix" and options.node_token_file.stat().st_mode & 0o077:
        log.warning("others on this machine may read the node token; chmod 600", file=str(options.node_token_file))
    if not token:
        raise UsageError(f"There is no node token in {options.node_token_file}; put one there.")
    return token


def _reachable_url(sock: socket.socket, options: RunnerOptions) -> str:
    """How the host most likely reaches this runner: the bound address, or the one that a route to the host takes."""
    scheme = "https" if options.tls_cert else "http"
    address, port = sock.getsockname()[:2]
    if not ip_address(address).is_unspecified:
        return _url(address, port, scheme)
    parts = urlsplit(options.host_url)
    try:
        with resolving():
            family, _, _, _, target = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing: it only picks a route
            return _url(probe.getsockname()[0], port, scheme)
    except OSError:
        return socket_url(sock, scheme)
