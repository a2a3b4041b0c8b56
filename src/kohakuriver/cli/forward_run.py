"""`kohakuriver forward` from its start to its end: on a terminal, around a command, or in the background."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import partial
from typing import Any

from kohakuriver.cli import detached, output
from kohakuriver.cli.background import Front, in_background, log_to
from kohakuriver.cli.forward_view import Aside, Detached, LeavingView, Together, views_for
from kohakuriver.cli.on_connect import OnConnect, ports_in_environment
from kohakuriver.cli.port_owner import owner
from kohakuriver.cli.signals import BY_KEYS, caught, in_foreground, suspended
from kohakuriver.client.beyond import Address, Back, BackForwarder, BeyondForwarder
from kohakuriver.client.events import Served
from kohakuriver.client.forward import STOPPED, Event, Forwarder, Listening, PortForward, Stats, Way
from kohakuriver.client.ports import exposes
from kohakuriver.config import Settings
from kohakuriver.errors import KohakuRiverError, LocalAddressError
from kohakuriver.runtime import cancel_all, freeze_heap, lowered_file_limit, raise_file_limit, run
from kohakuriver.tunnel.local_listeners import ListeningSocket

__all__ = ["Running", "Wanted", "opened"]

ANOTHER_PORT = (
    "--local-port-fallback takes the next free port, or choose another, as in 0:REMOTE, where 0 takes any free one"
)
NOT_FOUND, NOT_EXECUTABLE, KILLED_BY = 127, 126, 128  # as shells say it


@dataclass(frozen=True)
class Wanted:
    """A forward that is to be opened. The fields after `ports` are those of Forwarder; `json` is how it is shown.

    With `every` it is one of all ports that listen, with `web` one whose ports have addresses of their own. With
    `addresses` it leads on to these and to no port of the task, with `backs` from ports of the task back to here.
    """

    task: str
    ports: list[PortForward]
    settings: Settings
    local_host: str
    patience: float | None = None
    resume: bool = True
    fallback: bool = False
    path: Way | None = None
    on_connect: str | None = None
    json: bool = False
    every: bool = False
    web: bool = False
    addresses: list[Address] = field(default_factory=list)
    backs: list[Back] = field(default_factory=list)

    def made(self, tell: Callable[[Event], None]) -> Forwarder:
        """It, not yet started; `tell` is called with what happens."""

        def happened(event: Event) -> None:
            if isinstance(event, (Listening, Served)):
                _warn_if_exposed(self.local_host)
            tell(event)

        if self.backs:
            return BackForwarder(self.task, self.backs, settings=self.settings, on_event=happened)
        if self.addresses:
            return BeyondForwarder(
                self.task,
                self.addresses,
                settings=self.settings,
                local_host=self.local_host,
                fallback=self.fallback,
                on_event=happened,
            )
        return self._kind()(
            self.task,
            self.ports,
            settings=self.settings,
            local_host=self.local_host,
            patience=self.patience,
            resume=self.resume,
            fallback=self.fallback,
            path=self.path,
            on_event=happened,
        )

    def _kind(self) -> Callable[..., Forwarder]:
        """What makes it; what only some are made of no other forward has in memory."""
        if self.every:
            from kohakuriver.client.every_port import EveryPort

            return partial(EveryPort, say=output.note)
        if self.web:
            from kohakuriver.client.web import WebForwarder

            return WebForwarder
        return Forwarder

    def hooked(self, tell: Callable[[Event], None], **how: Any) -> tuple[Forwarder, list[OnConnect]]:
        """The same, with the command that is run when it is connected, if any; `how` is for OnConnect."""
        if self.on_connect is None:
            return self.made(tell), []

        def happened(event: Event) -> None:
            tell(event)
            hook.happened(event)

        forwarder = self.made(happened)
        hook = OnConnect(self.on_connect, self.task, lambda: forwarder.listening, tell, **how)
        return forwarder, [hook]


_warned: set[str] = set()


def _warn_if_exposed(local_host: str) -> None:
    """Say once that others can use what listens there."""
    if exposes(local_host) and local_host not in _warned:
        _warned.add(local_host)
        output.note(f"Warning: anybody who reaches this machine on {local_host} can use this forward.")


def opened(front: Sequence[Wanted], behind: Sequence[Wanted], command: list[str] | None) -> int:
    """The exit code of forwards, of which some go on in the background: all are opened, or none stays open."""
    begun: list[str] = []
    complete = threading.Event()
    this = os.getpid()
    try:
        for wanted in behind:
            code, name = _begun(wanted)
            if not name:
                return code
            begun.append(name)
        if front:
            return _in_front(front, command, complete)
        complete.set()
        return 0
    finally:
        # Those in the background pass here, too, when they end: what they are beside is not theirs to end.
        if os.getpid() == this and not complete.is_set():
            for each in begun:
                with contextlib.suppress(KohakuRiverError):
                    detached.stop(each)


def _in_front(several: Sequence[Wanted], command: list[str] | None, complete: threading.Event) -> int:
    """The exit code of what runs until it is stopped, or the command has ended that it is for.

    `complete` is set where every port has listened.
    """
    files = raise_file_limit()
    beside = command is not None

    async def main() -> int:
        views = views_for([each.task for each in several], json=several[0].json, beside_command=beside)
        with Aside(Together(views)) as view:
            out = sys.stderr if beside or several[0].json else None  # stdout is somebody else's
            made = [
                each.hooked(partial(view.tell_in, shown), files=files, out=out)
                for each, shown in zip(several, views, strict=True)
            ]
            forwarders, hooks = [each for each, _ in made], [hook for _, some in made for hook in some]
            forwarder = forwarders[0] if len(forwarders) == 1 else Several(forwarders, view.message)
            running = Running(forwarder, view, command, files, hooks)
            try:
                return await running.run()
            finally:
                if running.listens:
                    complete.set()

    return run(main())


def _begun(wanted: Wanted) -> tuple[int, str]:
    """0 and the id of a forward that goes on in the background, or the exit code of its start and ""."""

    def work(front: Front) -> int:
        files = raise_file_limit()
        place = detached.Place()
        try:
            return run(_behind(wanted, front, place, files))
        finally:
            place.leave()

    return in_background(work)


async def _behind(wanted: Wanted, front: Front, place: detached.Place, files: int | None) -> int:
    logger = log_to(place.log)
    with Aside(LeavingView(wanted.task, logger, json=wanted.json)) as view:
        forwarder, hooks = wanted.hooked(view.tell, files=files, silent=True)
        running = Detaching(forwarder, view, front, place, hooks)
        try:
            code = await running.run()
        except KohakuRiverError as error:
            if not running.left:
                raise
            return error.exit_code  # what happened is in the log
        except Exception:
            if running.left:
                logger.exception("The forward broke:")
            raise
        finally:
            place.leave(log=not running.left)
        return code


class Several:
    """Several forwards as one: it is open when all are, and ends when none can go on.

    `say` is called with a sentence for a person when one has ended and others go on.
    """

    def __init__(self, forwarders: Sequence[Forwarder], say: Callable[[str], None]) -> None:
        self._forwarders = forwarders
        self._say = say
        self._started: list[Forwarder] = []

    @property
    def listening(self) -> list[ListeningSocket]:
        return [local for each in self._forwarders for local in each.listening]

    async def start(self) -> None:
        """Open one after the other. Raises what the first raises that can't be opened."""
        for each in self._forwarders:
            await each.start()
            self._started.append(each)

    async def wait(self) -> None:
        """Wait until none can go on; one that can't alone is closed. Raises what the last one raised."""
        waiting = {asyncio.ensure_future(each.wait()): each for each in self._forwarders}
        try:
            while waiting:
                ended, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    await self._ended(waiting.pop(task), task, last=not waiting)
        finally:
            await cancel_all(waiting)

    async def _ended(self, forwarder: Forwarder, how: asyncio.Future[None], *, last: bool) -> None:
        try:
            how.result()
        except KohakuRiverError as error:
            if last:
                raise
            self._say(f"The forward to {forwarder.task} has ended: {error.message}")
            await forwarder.close(error.message)

    async def close(self, reason: str = STOPPED, *, deliver: bool = False) -> None:
        """Close all that were opened; see Forwarder."""
        await asyncio.gather(*(each.close(reason, deliver=deliver) for each in self._started))

    def stats(self) -> Stats:
        """The sums of theirs."""
        each = [asdict(one.stats()) for one in self._forwarders]
        return Stats(**{name: sum(one[name] for one in each) for name in each[0]})


class Running:
    """A forward from its opening to its end, with the command that it was started for, if any.

    `files` is how many files that command may open; `hooks` end with the forward. `listens` is whether every port
    does, or did. `another` says what to do where a local port is taken.
    """

    def __init__(
        self,
        forwarder: Forwarder | Several,
        view: Aside,
        command: list[str] | None,
        files: int | None,
        hooks: Sequence[OnConnect] = (),
        another: str = ANOTHER_PORT,
    ) -> None:
        self._forwarder = forwarder
        self._another = another
        self._hooks = hooks
        self.listens = False
        self._view = view
        self._command = command
        self._files = files
        self._child: asyncio.subprocess.Process | None = None
        self._stopped: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def run(self) -> int:
        """The exit code: the command's, or 0 when stopped. Raises KohakuRiverError when the forward can't go on."""
        reason = STOPPED
        try:
            with caught(self._signalled), suspended(self._view.rest):
                return await self._opened_and_ended()
        except LocalAddressError as error:
            raise _told_who(error, self._another) from error
        except KohakuRiverError as error:
            reason = error.message if self.listens else STOPPED
            raise
        finally:
            await asyncio.gather(*(hook.close() for hook in self._hooks))
            await self._forwarder.close(reason)

    async def _opened_and_ended(self) -> int:
        if not await self._until_stopped(self._forwarder.start()):
            return 0
        self.listens = True
        freeze_heap()
        ticking = asyncio.ensure_future(self._tick())
        try:
            return await self._opened()
        finally:
            ticking.cancel()

    async def _opened(self) -> int:
        """The exit code, once every port listens."""
        if self._command is not None:
            return await self._run_command(self._command)
        await self._until_stopped(self._forwarder.wait())
        return 0

    async def _until_stopped(self, doing: Any) -> bool:
        """Whether `doing` came to its end before Ctrl-C or SIGTERM. What it raises is raised."""
        task = asyncio.ensure_future(doing)
        await asyncio.wait({task, self._stopped}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return True
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return False

    async def _run_command(self, command: list[str]) -> int:
        environment = {**os.environ, **ports_in_environment(self._forwarder.listening)}
        try:
            with lowered_file_limit(self._files):
                self._child = await asyncio.create_subprocess_exec(*command, env=environment)
        except OSError as error:
            output.error(f"{command[0]} can't be run: {error.strerror}.")
            return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
        if self._stopped.done():  # while it was being started
            self._child.send_signal(signal.Signals[self._stopped.result()])
        lost = asyncio.ensure_future(self._say_when_lost())
        try:
            code = await self._child.wait()
        finally:
            lost.cancel()
        await self._until_stopped(self._forwarder.close(deliver=True))
        return code if code >= 0 else KILLED_BY - code

    async def _say_when_lost(self) -> None:
        try:
            await self._forwarder.wait()
        except KohakuRiverError as error:
            output.note(f"The forward has ended, the command goes on: {error.message}")

    def _signalled(self, number: signal.Signals) -> None:
        if self._child is not None and self._child.returncode is None:
            if not (number in BY_KEYS and _shares_a_foreground()):
                with contextlib.suppress(ProcessLookupError):
                    self._child.send_signal(number)
        else:
            self.stop(number.name)

    def stop(self, why: str) -> None:
        """Have it end; nothing where it does already."""
        if not self._stopped.done():
            self._stopped.set_result(why)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._view.interval)
            self._view.tick(self._forwarder.stats())


class Detaching(Running):
    """A forward that goes on in the background once every port listens, as `place` tells whoever asks.

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

    async def _ended_in_front(self) -> None:
        await self._front.gone()
        self.stop("in front")

    async def _opened(self) -> int:
        if not await self._until_stopped(self._place.open(self.state, lambda: self.stop("told to"))):
            return 0
        self._view.tell(Detached(self._one.task, self._place.id, os.getpid(), str(self._place.log)))
        self._view.leave()
        await cancel_all([self._watching])
        if self._stopped.done() or not await self._front.leave(self._place.id):
            return 0
        self.left = True
        return await super()._opened()

    def state(self) -> dict[str, Any]:
        """What it tells of itself; see `detached.listed`."""
        return {
            "id": self._place.id,
            "task": self._one.task,
            "ports": [_place(each) for each in self._forwarder.listening],
            "pid": os.getpid(),
            "since": self._since,
            "connections": self._forwarder.stats().streams,
            "state": "connected" if self._one.connected else "reconnecting",
            "log": str(self._place.log),
        }


def _place(local: ListeningSocket) -> dict[str, Any]:
    told = Listening.of(local).to_json()
    return {name: value for name, value in told.items() if name not in ("event", "instead_of")}


def _told_who(error: LocalAddressError, another: str) -> LocalAddressError:
    """The error with what has the port, as far as that can be known, and with what to do about it."""
    if error.taken is None:
        return error
    host, port, proto = error.taken
    where = host if not port else f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    by, end = _who_and_end(host, port, proto)
    another = another if port else "or choose another path"
    return LocalAddressError(f"{where} is already in use{by}; {end}{another}.".replace("; or", ";"), taken=error.taken)


def _who_and_end(host: str, port: int, proto: str) -> tuple[str, str]:
    """By what a local address is taken, and how that is ended where it is a forward in the background."""
    other = detached.who_has(port or host, proto)
    if other is not None:
        by = f" by the forward {other['id']} to {other['task']} in the background"
        return by, f"`kohakuriver forward --stop {other['id']}` ends it, "
    who = owner(port, proto) if port else None
    return (f" by {who}" if who else ""), ""


def _shares_a_foreground() -> bool:
    """Whether a Ctrl-C on our terminal reaches our child by itself: it is of the same process group."""
    if os.name == "nt":  # one console, one Ctrl-C for all on it
        return True
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return in_foreground(terminal)
    finally:
        os.close(terminal)
