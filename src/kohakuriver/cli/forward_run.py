"""A forward, or several, from the start to the end, whatever they are run for."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from kohakuriver.cli import detached, output
from kohakuriver.cli.forward_view import Aside
from kohakuriver.cli.on_connect import OnConnect, ports_in_environment
from kohakuriver.cli.port_owner import owner
from kohakuriver.cli.signals import BY_KEYS, caught, in_foreground, suspended
from kohakuriver.client.beyond import Address, Back, BackForwarder, BeyondForwarder
from kohakuriver.client.events import Served
from kohakuriver.client.forward import STOPPED, Event, Forwarder, Listening, PathChoice, PortForward, Stats
from kohakuriver.client.ports import exposes
from kohakuriver.config import Settings
from kohakuriver.errors import KohakuRiverError, LocalAddressError
from kohakuriver.runtime import cancel_all, freeze_heap, lowered_file_limit
from kohakuriver.tunnel.local_listeners import ListeningSocket

__all__ = ["ANOTHER_PORT", "Running", "Several", "Wanted", "told_who"]

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
    path: PathChoice | None = None
    on_connect: str | None = None
    json: bool = False
    every: bool = False
    web: bool = False
    addresses: list[Address] = field(default_factory=list)
    backs: list[Back] = field(default_factory=list)

    def made(self, tell: Callable[[Event], None], say: Callable[[str], None], warned: set[str]) -> Forwarder:
        """It, not yet started; `tell` is called with what happens, and `say` with a sentence for a person.

        `warned` are the local addresses of which it was said that others can use them, and this one then.
        """

        def happened(event: Event) -> None:
            if isinstance(event, (Listening, Served)) and exposes(self.local_host) and self.local_host not in warned:
                warned.add(self.local_host)
                say(f"Warning: anybody who reaches this machine on {self.local_host} can use this forward.")
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
        return self._kind(say)(
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

    def _kind(self, say: Callable[[str], None]) -> Callable[..., Forwarder]:
        """What makes it; what only some are made of no other forward has in memory."""
        if self.every:
            from kohakuriver.client.every_port import EveryPort

            return partial(EveryPort, say=say)
        if self.web:
            from kohakuriver.client.web import WebForwarder

            return WebForwarder
        return Forwarder

    def hooked(
        self, tell: Callable[[Event], None], say: Callable[[str], None], warned: set[str], **how: Any
    ) -> tuple[Forwarder, list[OnConnect]]:
        """The same, with the command that is run when it is connected, if any; `how` is for OnConnect."""
        if self.on_connect is None:
            return self.made(tell, say, warned), []

        def happened(event: Event) -> None:
            tell(event)
            hook.happened(event)

        forwarder = self.made(happened, say, warned)
        hook = OnConnect(self.on_connect, self.task, lambda: forwarder.listening, tell, **how)
        return forwarder, [hook]


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
            with self._signals():
                return await self._opened_and_ended()
        except LocalAddressError as error:
            raise self._explained(error) from error
        except KohakuRiverError as error:
            reason = error.message if self.listens else STOPPED
            raise
        finally:
            await asyncio.gather(*(hook.close() for hook in self._hooks))
            await self._forwarder.close(reason)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Until the block ends, what ends programs ends the forward."""
        with caught(self._signalled), suspended(self._view.rest):
            yield

    def _explained(self, error: LocalAddressError) -> LocalAddressError:
        return told_who(error, self._another)

    def _settle(self) -> None:
        """Every port listens: what this program is made of is all there."""
        freeze_heap()

    async def _opened_and_ended(self) -> int:
        if not await self._until_stopped(self._forwarder.start()):
            return 0
        self.listens = True
        self._settle()
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


def told_who(error: LocalAddressError, another: str) -> LocalAddressError:
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
