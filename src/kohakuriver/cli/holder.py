"""The process that holds the forwards of `kohakuriver forward --detach`: how it is found, or started, and what it does.

A command hands its forward over on a Unix socket, in the directory of detached.py, to a process that was started under
the same conditions as itself: whatever a forward goes by that the command can't hand over is the same for both. What
is under other conditions has another process. A forward that runs commands has one of its own, with the command's
directory and all of its variables; so nothing can be run by way of the socket.

A process ends when the last of its forwards has. Who looks for one, or is about to end, has a lock meanwhile: two
commands don't start two, and none finds one that is not there any more when the forward comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import os
import re
import secrets
import socket
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import kohakuriver
from kohakuriver import tracing
from kohakuriver.cli import detached
from kohakuriver.cli.background import Log, in_background
from kohakuriver.cli.forward_run import Running, Wanted
from kohakuriver.cli.forward_view import Aside, Detached, LogView
from kohakuriver.cli.handing import Front
from kohakuriver.cli.on_connect import OnConnect
from kohakuriver.cli.signals import caught
from kohakuriver.client.beyond import BackForwarder
from kohakuriver.client.events import Event
from kohakuriver.client.forward import Forwarder, Listening
from kohakuriver.config import Settings, config_dir, state_dir
from kohakuriver.errors import KohakuRiverError, LocalAddressError, UsageError
from kohakuriver.runtime import cancel_all, freeze_heap, raise_file_limit, run
from kohakuriver.tunnel.local_listeners import ACCEPT_AGAIN, ListeningSocket
from kohakuriver.unix_sockets import address_of

__all__ = ["reach"]

HERE_SECONDS = 5.0
"""How long a process may take to say that it is there, before a command does without it."""
LOCK_SECONDS = 5.0
"""How long others may look for one."""

_AGAIN = 0.01
# What a forward's process goes by. What settings come from is handed over; the rest is nothing to a forward.
_VARIABLES = re.compile(
    r"(KOHAKURIVER|OTEL|PYTHON|SSL|OPENSSL|LD|MALLOC|RES)_\w+|\w+_proxy|TZ|HOME|HOSTALIASES|LOCALDOMAIN", re.IGNORECASE
)
_NOT_A_FORWARDS = re.compile(
    r"KOHAKURIVER_(PORT|SSH_PROXY_PORT|TASK|LOG_FORMAT|SOCKS|(PORT|SOCKET)_\d\w*|"
    + "|".join(each.name.upper() for each in fields(Settings))
    + ")"
)


def reach(*, own: bool) -> socket.socket:
    """A connection to the process that is to hold a forward, which is there; with `own` to one that holds it alone.

    To be called before there are threads or loops. Raises UsageError where there is no place for it.
    """
    sock = None if own else _shared()
    if sock is not None:
        if _is_here(sock):
            return sock
        sock.close()
    ours, theirs = socket.socketpair()
    in_background(lambda: _hold(None, None, theirs), [theirs.fileno()])
    theirs.close()
    if not _is_here(ours, patience=None):
        raise KohakuRiverError("The process that was to go on in the background has ended at once; try again.")
    return ours


def _shared() -> socket.socket | None:
    """A connection to one that others share, which is started where there is none; None where that can't be had."""
    where = detached.directory()
    kind = _conditions()
    with contextlib.suppress(OSError, UsageError), _locked(LOCK_SECONDS) as locked:
        if not locked:
            return None
        for path in detached.sockets(where, f".{kind}{detached.HOLDS}"):
            if (sock := _connected(path)) is not None:
                return sock
        name = secrets.token_hex(2)
        path = where / detached.socket_name(name, f".{kind}{detached.HOLDS}")
        unfinished = where / detached.socket_name(name, detached.NEW)
        with detached.listener_at(unfinished) as listener:
            unfinished.replace(path)
            in_background(lambda: _hold(listener, path, None), [listener.fileno()])
        return _connected(path)
    return None


def _connected(path: Path) -> socket.socket | None:
    """A connection to the process that listens there; what one left that is gone is removed."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        with address_of(path) as address:
            sock.settimeout(HERE_SECONDS)
            sock.connect(address)
    except OSError as error:
        sock.close()
        if isinstance(error, ConnectionRefusedError):
            path.unlink(missing_ok=True)
        return None
    return sock


def _is_here(sock: socket.socket, patience: float | None = HERE_SECONDS) -> bool:
    """Whether somebody of this user is at the other end, and says so."""
    if not _is_ours(sock):
        return False
    sock.settimeout(patience)
    with contextlib.suppress(OSError):
        said = b""
        while not said.endswith(b"\n"):
            more = sock.recv(1)  # what comes after it is for somebody else
            if not more:
                return False
            said += more
        sock.settimeout(None)
        return "here" in json.loads(said)
    return False


def _is_ours(sock: socket.socket) -> bool:
    """Whether this user is at the other end, as far as the system tells; the directory is this user's in any case."""
    if sys.platform != "linux":
        return True
    user: int = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
    return user == os.getuid()


@contextlib.contextmanager
def _locked(patience: float) -> Iterator[bool]:
    """Whether, until the block ends, nobody else looks for a process or is about to end. Raises OSError."""
    import fcntl

    descriptor = os.open(state_dir() / "forwards.lock", os.O_RDWR | os.O_CREAT, 0o600)
    until = time.monotonic() + patience
    try:
        while not (locked := _lock(descriptor)) and time.monotonic() < until:
            time.sleep(_AGAIN)
        yield locked
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process that was just forked has the file, too
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _conditions() -> str:
    """A name for all that a command and a process must have in common, for the one to hold the other's forward.

    It is a digest: names of files tell nothing of the environment, in which there may be passwords.
    """
    root = Path("/").stat()
    found: list[Any] = [kohakuriver.__version__, kohakuriver.__file__, sys.executable, root.st_dev, root.st_ino]
    found += [os.getresuid() if hasattr(os, "getresuid") else os.getuid(), os.getgid(), sorted(os.getgroups())]
    found += [sorted(_environment().items()), _most_files(), _unit()]
    found += [_link(f"/proc/self/ns/{name}") for name in ("net", "mnt", "pid", "user")]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:10]


def _environment() -> dict[str, str]:
    """The variables that a forward goes by."""
    return {
        name: value
        for name, value in os.environ.items()
        if _VARIABLES.fullmatch(name) and not _NOT_A_FORWARDS.fullmatch(name)
    }


def _most_files() -> int:
    import resource

    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


_PROGRAMS_OWN = re.compile(r"(.*/user@\d+\.service)/(.*/)?[^/]+\.scope")


def _unit() -> list[str]:
    """With what this process ends: a login, a service, a job. A terminal's window ends nothing that it started."""
    return [_PROGRAMS_OWN.sub(r"\1", line) for line in _text("/proc/self/cgroup").splitlines()]


def _text(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text("utf-8", "replace")
    return ""


def _link(path: str) -> str:
    with contextlib.suppress(OSError):
        return str(Path(path).readlink())
    return ""


def _hold(listener: socket.socket | None, path: Path | None, front: socket.socket | None) -> None:
    """What the process does: hold what is handed over by `listener`, or the forward of `front` alone."""
    files = raise_file_limit()
    if listener is not None:
        if os.environ.get("KOHAKURIVER_CONFIG_DIR"):
            os.environ["KOHAKURIVER_CONFIG_DIR"] = str(config_dir())
        os.chdir("/")  # nothing here is relative to where the first command was run
    run(_Holder(listener, path, files).run(front))


class _Holder:
    """The forwards of a process, each of which begins, fails and ends by itself."""

    def __init__(self, listener: socket.socket | None, path: Path | None, files: int | None) -> None:
        self._listener = listener
        self._path = path
        self._files = files
        self._held: dict[asyncio.Task[None], Held | None] = {}

    async def run(self, front: socket.socket | None) -> None:
        """Hold forwards until there are none any more, and nobody is about to bring one."""
        with caught(lambda number: self._end(number.name)):
            if front is not None:
                self._take(front)
            self._listen()
            while True:
                while self._held:
                    await asyncio.wait(list(self._held), return_when=asyncio.FIRST_COMPLETED)
                if await self._closed():
                    return

    def _end(self, why: str) -> None:
        for task, held in list(self._held.items()):
            if held is None:  # nothing is wanted yet
                task.cancel()
            else:
                held.stop(why)

    def _listen(self) -> None:
        if self._listener is not None and self._listener.fileno() >= 0:
            asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            while True:
                self._take(self._listener.accept()[0])
        except BlockingIOError:
            pass
        except OSError:  # no descriptors are left: the command waits
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._listener.fileno())
            loop.call_later(ACCEPT_AGAIN, self._listen)

    def _take(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        task = asyncio.get_running_loop().create_task(self._serve(sock))
        self._held[task] = None
        task.add_done_callback(self._held.pop)

    async def _closed(self) -> bool:
        """Be found no more, unless somebody has come meanwhile."""
        if self._listener is None or self._path is None:
            return True
        try:
            while not self._held:
                with _locked(0) as locked:
                    if locked:
                        self._accept()  # who has found this process while it had none has the lock no more
                        if not self._held:
                            asyncio.get_running_loop().remove_reader(self._listener.fileno())
                            self._path.unlink(missing_ok=True)
                            self._listener.close()
                            return True
                await asyncio.sleep(_AGAIN)
        except OSError:  # the directory is gone
            return True
        return False

    async def _serve(self, sock: socket.socket) -> None:
        """Have a command's forward, from what is said to its end."""
        if not _is_ours(sock):
            sock.close()
            return
        front = await Front.met(sock)
        try:
            asked = await front.order()
            if asked is not None:
                wanted, request_id = asked
                if wanted.on_connect is not None and self._listener is not None:
                    raise UsageError("A process that holds forwards of several commands runs nothing for them.")
                tracing.begin(request_id)
                front.ended(await self._hold(wanted, front))  # nobody hears it where it had begun
        except KohakuRiverError as error:
            front.failed(error)
        except Exception as error:
            front.failed(KohakuRiverError(f"The forward broke: {type(error).__name__}: {error}"))
        finally:
            await front.close()

    async def _hold(self, wanted: Wanted, front: Front) -> int:
        """Open a forward and keep it; 0 once it has ended. Raises KohakuRiverError where it can't be opened."""
        place = detached.Place()
        log = Log(place.log)
        log.begin()
        view = Aside(LogView(wanted.task, log.logger))
        view.__enter__()
        held = None
        try:
            held = self._made(wanted, front, view, place)
            return await held.until_ended(log)
        finally:
            # On a thread: the disk may take its time, and others' connections don't wait for that.
            await asyncio.to_thread(view.__exit__, None, None, None)
            log.close()
            place.leave(log=held is None or not held.left)

    def _made(self, wanted: Wanted, front: Front, view: Aside, place: detached.Place) -> Held:
        def tell(event: Event) -> None:
            front.tell(event)
            view.tell(event)

        def say(text: str) -> None:
            front.say(text)
            view.message(text)

        forwarder, hooks = wanted.hooked(tell, say, set(), files=self._files, silent=True)
        held = Held(forwarder, view, front, place, hooks)
        task = asyncio.current_task()
        assert task is not None
        self._held[task] = held
        return held


@functools.cache
def _freeze_once() -> None:
    """What was made later is some forward's, and is to be collected after it."""
    freeze_heap()


class Held(Running):
    """A forward that goes on without the command once every port listens, as `place` tells whoever asks.

    `left` is whether it does.
    """

    def __init__(
        self, forwarder: Forwarder, view: Aside, front: Front, place: detached.Place, hooks: Sequence[OnConnect]
    ) -> None:
        super().__init__(forwarder, view, None, None, hooks)
        self._one = forwarder
        self._front = front
        self._place = place
        self._since = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._watching = asyncio.ensure_future(self._ended_in_front())
        self.left = False

    async def until_ended(self, log: Log) -> int:
        """Run it; what happens after the command has left is in the log alone. Raises what happens before."""
        try:
            return await self.run()
        except Exception as error:
            if not self.left:
                raise
            if isinstance(error, KohakuRiverError):
                return error.exit_code  # what happened is in the log
            log.logger.exception("The forward broke:")
            return 1
        finally:
            await cancel_all([self._watching])

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        yield  # the process has them

    def _explained(self, error: LocalAddressError) -> LocalAddressError:
        return error  # the command finds out who has the address: that may be a forward of this process

    def _settle(self) -> None:
        _freeze_once()

    async def _tick(self) -> None:
        """Nobody looks at rates."""

    async def _ended_in_front(self) -> None:
        await self._front.gone()
        self.stop("in front")

    async def _opened(self) -> int:
        if not await self._until_stopped(self._place.open(self.state, lambda: self.stop("told to"))):
            return 0
        begun = Detached(self._one.task, self._place.id, os.getpid(), str(self._place.log))
        self._front.tell(begun)
        self._view.tell(begun)
        await cancel_all([self._watching])
        if self._stopped.done() or not await self._front.leave(self._place.id):
            return 0
        self.left = True
        return await super()._opened()

    def state(self) -> dict[str, Any]:
        """What it tells of itself; see `detached.listed`."""
        back = self._one.reversed if isinstance(self._one, BackForwarder) else []
        return {
            "id": self._place.id,
            "task": self._one.task,
            "ports": [_place(each) for each in self._forwarder.listening],
            "reversed": [_without_event(each) for each in back],
            "pid": os.getpid(),
            "since": self._since,
            "connections": self._forwarder.stats().streams,
            "state": "connected" if self._one.connected else "reconnecting",
            "log": str(self._place.log),
        }


def _place(local: ListeningSocket) -> dict[str, Any]:
    told = _without_event(Listening.of(local))
    return {name: value for name, value in told.items() if name != "instead_of"}


def _without_event(event: Event) -> dict[str, Any]:
    return {name: value for name, value in event.to_json().items() if name != "event"}
