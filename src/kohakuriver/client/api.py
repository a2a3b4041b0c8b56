"""Forwards for Python code: `kohakuriver.forward` on a loop that runs, `kohakuriver.forward_sync` without one."""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, replace
from functools import partial
from types import TracebackType
from typing import Any, ParamSpec

from kohakuriver.client.beyond import Address, Back, BackForwarder, BeyondForwarder, by_kind, parse_address, parse_back
from kohakuriver.client.forward import LOOPBACK, Event, Forwarder, PathChoice, PortSpec, Stats, parse_port
from kohakuriver.client.ports import PortForward
from kohakuriver.config import Settings, load_settings
from kohakuriver.errors import UsageError
from kohakuriver.runtime import new_event_loop, serve
from kohakuriver.tunnel.local_listeners import ListeningSocket

__all__ = ["Forward", "ForwardSync", "forward", "forward_sync"]

P = ParamSpec("P")


class Forward:
    """One forward: `async with forward(…) as fwd:`, or `fwd = await forward(…)` and at the end `await fwd.close()`."""

    def __init__(self, task: str, forwarders: Callable[[], list[Forwarder]]) -> None:
        self._task = task
        self._make = forwarders
        self._forwarders: list[Forwarder] = []

    def __repr__(self) -> str:
        if not self._forwarders:
            return f"<forward to {self._task}: not open>"
        return f"<forward to {self._task}: {self.url()}>" if self._listening else f"<forward from {self._task}>"

    def __await__(self) -> Generator[Any, None, Forward]:
        return self.open().__await__()

    async def __aenter__(self) -> Forward:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def open(self) -> Forward:
        """Listen, and open the session; nothing where that is done. Raises what `forward` says."""
        if not self._forwarders:
            begun: list[Forwarder] = []
            try:
                for forwarder in self._make():
                    await forwarder.start()
                    begun.append(forwarder)
            except BaseException:
                for forwarder in begun:
                    await forwarder.close()
                raise
            self._forwarders = begun
        return self

    async def close(self) -> None:
        """End it, and what is open through it; nothing where it is not open."""
        forwarders, self._forwarders = self._forwarders, []
        for forwarder in forwarders:
            await forwarder.close()

    @property
    def _open(self) -> list[Forwarder]:
        if not self._forwarders:
            raise UsageError("The forward is not open: use it inside its `with` block, or before it is closed.")
        return self._forwarders

    @property
    def _listening(self) -> list[ListeningSocket]:
        return [local for forwarder in self._open for local in forwarder.listening]

    @property
    def _first(self) -> ListeningSocket:
        if not self._listening:
            raise UsageError("This forward has no local port: it leads from the task to this machine alone.")
        return self._listening[0]

    @property
    def local_host(self) -> str:
        """The address to connect to; for a forward that listens everywhere, this machine's loopback."""
        host = self._first.host
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)

    @property
    def local_port(self) -> int:
        """The local port of the first remote port."""
        return self._first.port

    @property
    def local_ports(self) -> dict[int, int]:
        """Local ports by remote port."""
        return {local.remote_port: local.port for local in self._listening if local.remote_path is None}

    def url(self, scheme: str = "http", remote_port: int | None = None) -> str:
        """`scheme://host:port` of the local side of `remote_port`, by default the first one."""
        if remote_port is not None and remote_port not in self.local_ports:
            raise UsageError(f"Port {remote_port} is not part of this forward.")
        port = self.local_port if remote_port is None else self.local_ports[remote_port]
        host = f"[{self.local_host}]" if ":" in self.local_host else self.local_host
        return f"{scheme}://{host}:{port}"

    def stats(self) -> Stats:
        """Totals since the forward began."""
        first, *others = (asdict(forwarder.stats()) for forwarder in self._open)
        return Stats(**{name: value + sum(each[name] for each in others) for name, value in first.items()})

    async def wait(self) -> None:
        """Wait until the forward can't go on. Raises NotFoundError once the task is gone for good, NotAllowedError
        once the right to use it is.
        """
        await asyncio.gather(*(forwarder.wait() for forwarder in self._open))


def forward(
    task: str | int,
    ports: PortSpec | Sequence[PortSpec] = (),
    *,
    reverse: PortSpec | Sequence[PortSpec] = (),
    proto: str = "tcp",
    local_port: int | None = 0,
    local_host: str = LOOPBACK,
    host: str | None = None,
    token: str | None = None,
    ca_file: str | None = None,
    resume: bool = True,
    resume_for: int | None = None,
    wait: float | None = None,
    path: PathChoice | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Forward:
    """A forward for `async with`, or for `await`, on the loop that runs.

    `task` is a numeric id or a unique name; `ports` one remote port or several, as numbers or
    `LOCAL:REMOTE[/udp]`; `LOCAL:HOST:PORT` leads on to an address that the task reaches, `LOCAL:unix:PATH` to a Unix
    socket in it. `reverse` are ports of the task that lead back to this machine: `REMOTE`, `REMOTE:LOCAL`,
    `REMOTE:HOST:PORT` or `REMOTE:unix:PATH`; `unix:PATH` in the place of REMOTE is a Unix socket in the task.
    `local_host` "localhost" is both loopback addresses. `local_port` 0 is any free one, None the remote port's
    number; another number goes with one remote port only.
    Connections outlive a session that is lost, for `resume_for` seconds (default: the setting of this name, an hour);
    without `resume` they are reset.
    `wait` is for how many seconds to wait until services listen on `ports` in the task, None for not at all.
    `path` is whether they go past the host, to the task's node itself: "auto" where that can be had, "direct" or not at
    all, "host" never (default: the setting of this name, "auto").
    `host`, `token` and `ca_file` default to the settings that the command line uses. Opening it raises the same errors
    that the command line exits with: NotFoundError, UnavailableError, NotAllowedError, LocalAddressError,
    HostUnreachableError, UsageError.
    """
    wanted, backs = _several(ports), [parse_back(str(spec)) for spec in _several(reverse)]
    addresses = [found for spec in wanted if (found := parse_address(str(spec))) is not None]
    own = [spec for spec in wanted if parse_address(str(spec)) is None]
    if local_port and len(own) != 1:
        raise UsageError("local_port goes with one remote port; give several as LOCAL:REMOTE.")
    parsed = [parse_port(spec, proto=proto, local=local_port) for spec in own]
    if any(port.path is not None for port in parsed) or any(address.path is not None for address in addresses):
        raise UsageError("Unix sockets on this side are for the command line; here a local side is a port.")
    if not wanted and not backs:
        raise UsageError("Give at least one remote port, or one that leads back by reverse=.")
    if not resume and (addresses or backs):
        raise UsageError("What leads beyond the task always outlives a lost session; leave resume out.")

    def make() -> list[Forwarder]:
        settings = load_settings(host=host, token=token, ca_file=ca_file)
        if resume_for is not None:
            settings = replace(settings, resume_for=resume_for)
        made = partial(_made, str(task), settings, local_host, on_event or (lambda event: None))
        return made(parsed, addresses, backs, patience=wait, resume=resume, path=path)

    return Forward(str(task), make)


def _several(ports: PortSpec | Sequence[PortSpec]) -> Sequence[PortSpec]:
    return [ports] if isinstance(ports, (int, str)) else ports


def _made(
    task: str,
    settings: Settings,
    local_host: str,
    on_event: Callable[[Event], None],
    ports: list[PortForward],
    addresses: list[Address],
    backs: list[Back],
    **how: Any,
) -> list[Forwarder]:
    """A session for what leads to ports of the task, one for what leads on from it, and one for what leads back."""
    made: list[Forwarder] = []
    if ports:
        made.append(Forwarder(task, ports, settings=settings, local_host=local_host, on_event=on_event, **how))
    made += [
        BeyondForwarder(task, some, settings=settings, local_host=local_host, on_event=on_event)
        for some in by_kind(addresses)
    ]
    if backs:
        made.append(BackForwarder(task, backs, settings=settings, on_event=on_event))
    return made


class ForwardSync:
    """One forward on a thread with a loop of its own: `with forward_sync(…) as fwd:`, or
    `fwd = forward_sync(…).open()` and, at the end, `fwd.close()`.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return repr(self._forward)

    def __enter__(self) -> ForwardSync:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> ForwardSync:
        """Listen, and open the session; nothing where that is done. Raises what `forward` says."""
        if self._loop is not None:
            return self
        self._loop = new_event_loop()
        self._thread = threading.Thread(target=serve, args=(self._loop,), name="kohakuriver-forward", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._forward.open(), self._loop).result()
        except BaseException:
            self._end_loop()
            raise
        return self

    def close(self) -> None:
        """End it, and what is open through it; nothing where it is not open."""
        if self._loop is None:
            return
        try:
            asyncio.run_coroutine_threadsafe(self._forward.close(), self._loop).result()
        finally:
            self._end_loop()

    def _end_loop(self) -> None:
        loop, thread = self._loop, self._thread
        assert loop is not None
        assert thread is not None
        self._loop = self._thread = None
        loop.call_soon_threadsafe(loop.stop)
        thread.join()

    @property
    def local_host(self) -> str:
        """The address to connect to."""
        return self._forward.local_host

    @property
    def local_port(self) -> int:
        """The local port of the first remote port."""
        return self._forward.local_port

    @property
    def local_ports(self) -> dict[int, int]:
        """Local ports by remote port."""
        return self._forward.local_ports

    def url(self, scheme: str = "http", remote_port: int | None = None) -> str:
        """`scheme://host:port` of the local side of `remote_port`, by default the first one."""
        return self._forward.url(scheme, remote_port)

    def stats(self) -> Stats:
        """Totals since the forward began."""
        return self._forward.stats()


def _on_a_thread(make: Callable[P, Forward]) -> Callable[P, ForwardSync]:
    """`make` with the same parameters, for a ForwardSync."""

    @functools.wraps(make)
    def on_a_thread(*args: P.args, **options: P.kwargs) -> ForwardSync:
        return ForwardSync(make(*args, **options))

    signature = inspect.signature(make).replace(return_annotation="ForwardSync")
    on_a_thread.__signature__ = signature  # type: ignore[attr-defined]
    on_a_thread.__name__ = on_a_thread.__qualname__ = f"{make.__name__}_sync"
    on_a_thread.__doc__ = (
        f"`{make.__name__}` for code without a loop, and for a `with` beside one: for `with`, or for `.open()`.\n\n"
        f"`on_event` is called on the forward's thread. Otherwise:\n\n{inspect.getdoc(make)}"
    )
    return on_a_thread


forward_sync = _on_a_thread(forward)
