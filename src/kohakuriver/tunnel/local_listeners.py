"""Local addresses of the user's side: how they are bound, and what is said where one can't be had."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kohakuriver.errors import LocalAddressError
from kohakuriver.resolve import resolving
from kohakuriver.tunnel.sockets import tune_listener
from kohakuriver.unix_sockets import address_of, is_left

__all__ = ["LISTEN_BACKLOG", "ListeningSocket", "bind", "listen_for", "listen_unix"]

LISTEN_BACKLOG = 4096
MOST_SERVED = 256
"""Connections to one port that may be about to say what they want."""
ACCEPT_AGAIN = 1.0
"""Seconds until it is tried again to accept a connection that no descriptor was left for."""


@dataclass
class ListeningSocket:
    """A local address that leads to a port of the task. `instead_of` is the local port that was wanted, if another.

    Of a Unix socket there is `path`, and neither host nor port. With a `remote_host` it leads to that one's port, with
    a `remote_path` to the Unix socket there in the task.
    """

    host: str
    port: int
    remote_port: int
    proto: str
    close: Callable[[], None] = field(repr=False)
    sock: socket.socket = field(repr=False)
    instead_of: int | None = None
    path: str | None = None
    remote_host: str | None = None
    remote_path: str | None = None


KEEP_PATH: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
"""For a server on a Unix socket whose path is ours to remove: a loop can't, where it was bound by another path."""


async def listen_unix(path: Path, remote_port: int, accepted: Callable[[], asyncio.BaseProtocol]) -> ListeningSocket:
    """Listen on a Unix socket, for its owner alone, which goes when it is closed; `accepted` makes a stream.

    One that is left of a program that is gone is replaced where it is this user's. Raises LocalAddressError.
    """
    sock = _bind_unix(path)
    made = path.lstat()
    server = await asyncio.get_running_loop().create_unix_server(
        accepted, sock=sock, backlog=LISTEN_BACKLOG, **KEEP_PATH
    )

    def close() -> None:
        server.close()
        with contextlib.suppress(OSError):
            if os.path.samestat(path.lstat(), made):
                path.unlink()

    return ListeningSocket("", 0, remote_port, "tcp", close, sock, path=str(path))


async def listen_for(
    host: str, port: int, proto: str, serve: Callable[[socket.socket], Coroutine[Any, Any, None]]
) -> ListeningSocket:
    """Listen for TCP where `serve` makes of each connection what that wants; `proto` names what it does.

    Raises LocalAddressError.
    """
    sock = await bind(host, port, socket.SOCK_STREAM)
    accepting = asyncio.get_running_loop().create_task(_serve_all(sock, serve))

    def close() -> None:
        accepting.cancel()

    return ListeningSocket(host, sock.getsockname()[1], 0, proto, close, sock)


async def _serve_all(listener: socket.socket, serve: Callable[[socket.socket], Coroutine[Any, Any, None]]) -> None:
    """Accept connections and have each served, no more than MOST_SERVED at a time, until this is cancelled."""
    loop = asyncio.get_running_loop()
    serving: set[asyncio.Task[None]] = set()
    try:
        while True:
            if len(serving) >= MOST_SERVED:
                await asyncio.wait(serving, return_when=asyncio.FIRST_COMPLETED)
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError:  # no descriptors are left: the connection waits
                await asyncio.sleep(ACCEPT_AGAIN)
                continue
            task = loop.create_task(serve(sock))
            serving.add(task)
            task.add_done_callback(serving.discard)
    finally:
        listener.close()
        for task in serving:
            task.cancel()


async def bind(host: str, port: int, kind: socket.SocketKind) -> socket.socket:
    """A socket that is bound, and listens where it is TCP's. Raises LocalAddressError."""
    try:
        with resolving():
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=kind, flags=socket.AI_PASSIVE)
    except OSError as exc:
        raise LocalAddressError(f"{host} is not an address of this machine: {exc.strerror or exc}.") from exc
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        if kind == socket.SOCK_STREAM and os.name == "posix":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        if kind == socket.SOCK_STREAM:
            tune_listener(sock)
            sock.listen(LISTEN_BACKLOG)
    except OSError as exc:
        sock.close()
        proto = "tcp" if kind == socket.SOCK_STREAM else "udp"
        taken = (host, port, proto) if exc.errno == errno.EADDRINUSE else None
        raise LocalAddressError(_not_bound(host, port, exc), taken=taken) from exc
    return sock


def _bind_unix(path: Path) -> socket.socket:
    if not hasattr(socket, "AF_UNIX"):
        raise LocalAddressError("This system has no Unix sockets for Python; name a local port instead.")
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.setblocking(False)
        _make_room(path)
        with address_of(path) as address:
            sock.bind(address)
        path.chmod(0o600)  # before anybody can connect
        sock.listen(LISTEN_BACKLOG)
    except OSError as exc:
        sock.close()
        raise LocalAddressError(f"The Unix socket {path} can't be made: {exc.strerror or exc}.") from exc
    except BaseException:
        sock.close()
        raise
    return sock


def _make_room(path: Path) -> None:
    """Remove a socket of this user's that nobody listens on. Raises LocalAddressError for anything else there."""
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise LocalAddressError(f"{path} is there already, and is no socket; choose another path.")
    if path.lstat().st_uid != os.geteuid():
        raise LocalAddressError(f"{path} is there already, and is another user's; choose another path.")
    if not is_left(path):
        raise LocalAddressError(f"{path} is already in use; choose another path.", taken=(str(path), 0, "tcp"))
    path.unlink()


def _not_bound(host: str, port: int, why: OSError) -> str:
    """Why a local address can't be had, and what to do, as a sentence."""
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    another = "choose another local port, as in 0:REMOTE, where 0 takes any free one"
    if why.errno == errno.EADDRINUSE:
        return f"{where} is already in use; {another}."
    if why.errno == errno.EADDRNOTAVAIL:
        return f"{host} is not an address of this machine; --local-host takes one that is."
    if why.errno == errno.EACCES:
        return f"{where} may not be listened on by this user; {another}."
    return f"{where} can't be bound ({why.strerror or why}); {another}."
