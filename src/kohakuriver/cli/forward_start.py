"""`kohakuriver forward`: what goes on in the foreground, or around a command, and what is handed to the background."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from kohakuriver import tracing
from kohakuriver.cli import detached, output
from kohakuriver.cli.background import needs_unix
from kohakuriver.cli.forward_run import ANOTHER_PORT, Running, Several, Wanted, told_who
from kohakuriver.cli.forward_view import Aside, Together, views_for
from kohakuriver.cli.handing import HEARD, event_of, failure_of, lines, order
from kohakuriver.cli.holder import reach
from kohakuriver.cli.signals import ENDING
from kohakuriver.client.beyond import Address, Back
from kohakuriver.client.ports import PortForward
from kohakuriver.errors import KohakuRiverError, LocalAddressError
from kohakuriver.runtime import raise_file_limit, run

__all__ = ["opened"]

At = TypeVar("At", PortForward, Address, Back)


def opened(front: Sequence[Wanted], behind: Sequence[Wanted], command: list[str] | None) -> int:
    """The exit code of forwards, of which some go on in the background: all are opened, or none stays open."""
    begun: list[str] = []
    complete = threading.Event()
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
        if not complete.is_set():
            for each in begun:
                with contextlib.suppress(KohakuRiverError):
                    detached.stop(each)


def _in_front(several: Sequence[Wanted], command: list[str] | None, complete: threading.Event) -> int:
    """The exit code of what runs until it is stopped, or the command has ended that it is for.

    `complete` is set where every port has listened.
    """
    files = raise_file_limit()
    beside = command is not None
    warned: set[str] = set()

    async def main() -> int:
        views = views_for([each.task for each in several], json=several[0].json, beside_command=beside)
        with Aside(Together(views)) as view:
            out = sys.stderr if beside or several[0].json else None  # stdout is somebody else's
            made = [
                each.hooked(partial(view.tell_in, shown), output.note, warned, files=files, out=out)
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
    """0 and the id of a forward that goes on in the background; or the exit code of one that was stopped, and "".

    Raises KohakuRiverError where it can't be opened, as in the foreground.
    """
    needs_unix()
    with reach(own=wanted.on_connect is not None) as sock:
        with _on_end(partial(_give_up, sock)), Aside(views_for([wanted.task], json=wanted.json)[0]) as view:
            try:
                return _until_begun(sock, wanted, view)
            except LocalAddressError as error:
                raise told_who(error, ANOTHER_PORT) from error


def _from_anywhere(wanted: Wanted) -> Wanted:
    """The same, wherever the process is that opens it: what it names is not relative to the current directory."""
    settings = wanted.settings
    if settings.ca_file:
        settings = replace(settings, ca_file=str(Path(settings.ca_file).absolute()))
    return replace(
        wanted,
        settings=settings,
        ports=[_absolute(each) for each in wanted.ports],
        addresses=[_absolute(each) for each in wanted.addresses],
        backs=[_absolute(each) for each in wanted.backs],
    )


def _absolute(at: At) -> At:
    return at if at.path is None else replace(at, path=str(Path(at.path).expanduser().absolute()))


def _until_begun(sock: socket.socket, wanted: Wanted, view: Aside) -> tuple[int, str]:
    with contextlib.suppress(ConnectionError):
        sock.sendall(order(_from_anywhere(wanted), tracing.request_id()))
    for told in lines(sock):
        if "tell" in told:
            view.tell(event_of(told["tell"]))
        elif "say" in told:
            output.note(told["say"])
        elif "ended" in told:
            return int(told["ended"]), ""
        elif "failed" in told:
            raise failure_of(told["failed"])
        elif "begun" in told:
            with contextlib.suppress(OSError):  # it was told to end meanwhile
                sock.sendall(HEARD)
                return 0, str(told["begun"])
    raise KohakuRiverError("The process that was to hold the forward in the background has ended; try again.")


def _give_up(sock: socket.socket, *_: object) -> None:
    """Have the forward ended that is being opened; that it has will be told."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def _on_end(react: Callable[..., None]) -> Iterator[None]:
    """Until the block ends, call `react` where a signal would end this process; what is ignored stays ignored."""
    before = {number: signal.getsignal(number) for number in ENDING}
    caught = [number for number, handler in before.items() if handler is not signal.SIG_IGN or number == signal.SIGTERM]
    for number in caught:
        signal.signal(number, react)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, before[number])
