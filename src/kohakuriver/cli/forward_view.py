"""What `kohakuriver forward` shows: plain lines, JSON events, or lines above a live one on a terminal."""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import ClassVar, Literal

from kohakuriver.cli import output
from kohakuriver.client.beyond import Reversed
from kohakuriver.client.events import Served
from kohakuriver.client.forward import (
    LOOPBACKS,
    Closed,
    Event,
    Gone,
    Listening,
    Moved,
    Notice,
    NotListening,
    OutOfDescriptors,
    PathTaken,
    Reconnecting,
    Resumed,
    Stats,
    StreamError,
)
from kohakuriver.client.ports import SOCKS, UNIX
from kohakuriver.descriptors import as_far_as_it_goes
from kohakuriver.text import printable

__all__ = [
    "Aside",
    "Detached",
    "JsonView",
    "LiveView",
    "LogView",
    "OnConnectFailed",
    "OpenView",
    "PlainView",
    "Together",
    "View",
    "views_for",
]

STATS_INTERVAL = 5.0
LIVE_INTERVAL = 0.5
# The same failure is not said again within this many seconds: a program that retries would flood the terminal.
QUIET = 5.0
MOST_SAID = 1000
# Events that wait for a stdout that is not read; what comes while it is full is counted and left out.
MOST_WAITING = 1000
LAST_WORDS = 1.0
_CONTAINER = re.compile(r"kohakuriver-vps-\d+")
CLEAR, DIM, PLAIN = "\r\x1b[2K", "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True)
class Detached(Event):
    """The forward goes on in the background, as the process `pid`, with this id; what happens to it is in `log`."""

    event: ClassVar[str] = "detached"
    task: str
    id: str
    pid: int
    log: str


@dataclass(frozen=True)
class OnConnectFailed(Event):
    """The command that is run on each connect ended with `code`, or could not be run (None); `message` says so."""

    event: ClassVar[str] = "on_connect_failed"
    code: int | None
    message: str


class _Outage(enum.Enum):
    """Whether it was said that connections wait for the host."""

    NONE = enum.auto()
    SAID = enum.auto()
    UNSAID = enum.auto()  # it was said a moment ago


class View:
    """Shows what happens to one forward; `interval` is how often, in seconds, it wants `tick`."""

    interval = STATS_INTERVAL

    def __enter__(self) -> View:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def tell(self, event: Event) -> None:
        """`show`, where it does no harm when nobody reads stdout any more, or its disk is full: the forward goes on."""
        with as_far_as_it_goes():
            self.show(event)

    def show(self, event: Event) -> None:
        raise NotImplementedError

    def tick(self, stats: Stats) -> None:
        pass

    def message(self, text: str) -> None:
        """Show a line for a person; programs have the events."""

    def rest(self) -> None:
        """Leave the terminal as others expect it: this program is about to be stopped."""


class JsonView(View):
    """One event a line on stdout; statistics whenever they have changed. With a `task`, each tells of which it is."""

    def __init__(self, task: str | None = None) -> None:
        self._of = {} if task is None else {"task": task}
        self._last: Stats | None = None

    def show(self, event: Event) -> None:
        output.json_line({**event.to_json(), **self._of})

    def tick(self, stats: Stats) -> None:
        if stats != self._last:
            self._last = stats
            self.tell(stats)


class PlainView(View):
    """`Forwarding …` lines on stdout (`stderr` beside a command, whose stdout it is), all else on stderr."""

    def __init__(self, task: str, *, beside_command: bool = False) -> None:
        self._task = task
        self._beside_command = beside_command
        self._reason = ""
        self._outage = _Outage.NONE
        self._lost_at = self._moved_at = -QUIET
        self._ports: set[tuple[int, int, str, str | None]] = set()
        self._said: dict[tuple[int, str], tuple[float, int]] = {}
        self._path: Literal["direct", "host"] = "host"
        self._left = False  # it was said that the straight path is lost

    def show(self, event: Event) -> None:
        if isinstance(event, Listening):
            self._listening(event)
        elif isinstance(event, Reversed):
            here = f"{UNIX}{event.local_path}" if event.local_path else _at(event.local_host, event.local_port)
            self.result(f"Forwarding {self._task}:{event.remote_path or event.remote_port} -> {here} (tcp)")
        elif isinstance(event, Gone):
            self._gone(event)
        elif isinstance(event, Served):
            self.served(event)
        elif isinstance(event, StreamError):
            self._stream_error(event)
        elif isinstance(event, Reconnecting):
            self._reconnecting(event)
        elif isinstance(event, Resumed):
            self._resumed(event)
        elif isinstance(event, Moved):
            self._moved(event)
        elif isinstance(event, PathTaken):
            self._path_taken(event)
        elif isinstance(event, NotListening):
            where = f"[{event.local_host}]:{event.local_port}"
            self.message(f"{where} does not lead to {self._task}: {event.reason}; what opens `localhost` may get that.")
        elif isinstance(event, OutOfDescriptors):
            new = f"{event.waiting} connections wait" if event.waiting else "new connections are turned away"
            self.message(f"Out of file descriptors, {new}: raise the limit (ulimit -n), or close some.")
        elif isinstance(event, Detached):
            self.detached(event)
        elif isinstance(event, (OnConnectFailed, Notice)):
            self.message(event.message)

    def _reconnecting(self, event: Reconnecting) -> None:
        if self._outage is _Outage.SAID or self._outage is _Outage.UNSAID:
            return  # of connections that wait, once
        if event.waiting:
            now = time.monotonic()
            quiet = now - self._lost_at < QUIET  # a link that comes and goes
            self._lost_at = now
            self._outage = _Outage.UNSAID if quiet else _Outage.SAID
            if not quiet:
                self.message(f"{readable(event.what, self._task)}: {_connections(event.waiting, 'wait')}.")
        elif event.reason != self._reason:
            self._reason = event.reason
            self.message(f"Reconnecting: {readable(event.reason, self._task) or 'the connection was lost'}")

    def _resumed(self, event: Resumed) -> None:
        said, self._outage, self._reason = self._outage, _Outage.NONE, ""
        if said is _Outage.SAID:
            count = f"{_connections(event.waiting, 'go')} on" if event.waiting else "no connection is left"
            self.message(f"Back after {event.seconds:.0f} s: {count}.")
        elif said is _Outage.NONE:
            self.message("Connected again.")

    def _moved(self, event: Moved) -> None:
        now = time.monotonic()
        if now - self._moved_at >= QUIET:
            self._moved_at = now
            reason = readable(event.reason, self._task)
            count = _connections(event.connections, "go")
            self.message(f"Connection to the host renewed, since {reason}: {count} on.")

    def _path_taken(self, event: PathTaken) -> None:
        """Say it when the straight path is left, and when it is taken again. Before it was lost it is no news."""
        before, self._path = self._path, event.path
        if before == event.path or (event.path == "direct" and not self._left):
            return
        self._left = True
        if event.path == "direct":
            what = f"Straight to the node of {self._task} again"
        else:
            what = f"Through the host again, since {readable(event.reason, self._task)}"
        self.message(f"{what}: {_connections(event.connections, 'go')} on." if event.connections else f"{what}.")

    def _listening(self, event: Listening) -> None:
        port = event.local_port, event.remote_port, event.proto, event.local_path
        if port not in self._ports:  # the same on the other loopback address is no news
            self.result(self.listening_line(event))
        self._ports.add(port)

    def _gone(self, event: Gone) -> None:
        port = event.local_port, event.remote_port, event.proto, None
        if port in self._ports:  # the other loopback address was told of with the first
            self._ports.remove(port)
            self.result(f"No longer forwarding {_way(self._task, event)}")

    def served(self, event: Served) -> None:
        """Show an address, with a link that lets a browser in."""
        where = f"{event.link} -> {self._task}:{event.remote_port}"
        self.result(f"Serving {where} (the link is good once, for a minute)")

    def listening_line(self, event: Listening) -> str:
        return listening_line(self._task, event)

    def result(self, text: str) -> None:
        """Show a line that a script may wait for."""
        (output.note if self._beside_command else output.line)(text)

    def detached(self, event: Detached) -> None:
        """Show how to end what is on no terminal any more."""
        output.note(f"In the background as {event.id}: `kohakuriver forward --stop {event.id}` ends it.")

    def message(self, text: str) -> None:
        """Show a line for a person, with the time: it may be read the next morning."""
        output.note(stamped(text))

    def _stream_error(self, event: StreamError) -> None:
        key = (event.remote_port, event.message)
        now = time.monotonic()
        last, unsaid = self._said.get(key, (-QUIET, 0))
        if now - last < QUIET:
            self._said[key] = (last, unsaid + 1)
            return
        if len(self._said) > MOST_SAID:  # the other end chooses the words
            self._said.clear()
        more = f" ({unsaid} more like this)" if unsaid else ""
        self._said[key] = (now, 0)
        # What leads beyond the task says itself where to.
        where = f"{self._task}:{event.remote_port}" if event.remote_port else self._task
        self.message(f"{where}: {readable(event.message, self._task)}{more}")


def _connections(count: int, verb: str) -> str:
    """`1 connection waits`, `12 connections wait`"""
    if count == 1:
        return f"1 connection {verb}{'es' if verb.endswith('o') else 's'}"
    return f"{count} connections {verb}"


def stamped(text: str) -> str:
    """`14:03:59 Connected again.`"""
    return f"{datetime.now():%H:%M:%S} {text}"


def listening_line(task: str, event: Listening) -> str:
    """`Forwarding 127.0.0.1:8888 -> task:8888 (tcp)`, and the local port that was wanted where it is another."""
    why = "" if event.instead_of is None else f", since {event.instead_of} can't be had"
    return f"Forwarding {_way(task, event)}{why}"


def _way(task: str, event: Listening | Gone) -> str:
    path = event.local_path if isinstance(event, Listening) else None
    local = _at(event.local_host, event.local_port) if path is None else f"{UNIX}{path}"
    remote = task if event.proto == SOCKS else f"{task}:{event.remote_port}"
    if isinstance(event, Listening) and event.remote_path is not None:
        remote = f"{task}:{event.remote_path}"
    if isinstance(event, Listening) and event.remote_host is not None:
        remote = f"{_at(event.remote_host, event.remote_port)} through {task}"
    return f"{local} -> {remote} ({event.proto})"


def _at(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def readable(text: str, task: str) -> str:
    """What programs say of `task`, for people: without symbolic codes (`--json` has them), and with the task's name."""
    code, colon, words = text.partition(": ")
    if colon and code.isupper() and code.isalnum():
        text = words
    return _CONTAINER.sub(task.replace("\\", ""), text)


class LiveLine:
    """The last line of a terminal, which shows open streams and rates, and is drawn anew below what is printed."""

    def __init__(self) -> None:
        self._shown = False
        self._before: tuple[float, Stats] | None = None

    def rest(self) -> None:
        """Leave the place for another line."""
        if self._shown and output.draws(sys.stdout):
            _write(CLEAR)
        self._shown = False

    def draw(self, stats: Stats) -> None:
        """Show what went on since the last time."""
        now = time.monotonic()
        before, self._before = self._before, (now, stats)
        if before is None:
            return
        self._shown = self._shown and output.draws(sys.stdout)
        if output.draws(sys.stdout):
            line = status_line(before[1], stats, now - before[0])
            with contextlib.suppress(BrokenPipeError):
                _write(f"{CLEAR}{DIM}{fitting(line, _columns() - 1)}{PLAIN}")
            self._shown = True


class LiveView(PlainView):
    """The same lines, above one that shows open streams and rates while the forward runs.

    Only while the terminal is ours: what runs in the background must not draw over the shell's prompt. The cursor is
    never hidden, so nothing is left behind whatever ends this program.
    """

    interval = LIVE_INTERVAL

    def __init__(self, task: str, line: LiveLine | None = None) -> None:
        super().__init__(task)
        self._line = line or LiveLine()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self.rest()

    def listening_line(self, event: Listening) -> str:
        """With an address to click on: most ports are a web page's."""
        url = f"  http://{LOOPBACKS[0]}:{event.local_port}"
        local = event.proto == "tcp" and event.local_host in (LOOPBACKS[0], "0.0.0.0")
        return super().listening_line(event) + (url if local else "")

    def rest(self) -> None:
        self._line.rest()

    def result(self, text: str) -> None:
        self.rest()
        output.line(text)

    def message(self, text: str) -> None:
        self.result(stamped(text))

    def tick(self, stats: Stats) -> None:
        self._line.draw(stats)


class Together(View):
    """The views of several forwards, each of which is told for itself; statistics are those of all."""

    def __init__(self, views: Sequence[View]) -> None:
        self._views = views
        self.interval = views[0].interval
        self._of_all = JsonView() if len(views) > 1 and isinstance(views[0], JsonView) else views[0]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._views[0].__exit__(kind, error, trace)

    def tick(self, stats: Stats) -> None:
        self._of_all.tick(stats)

    def message(self, text: str) -> None:
        self._views[0].message(text)

    def rest(self) -> None:
        self._views[0].rest()


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except OSError:
        return 80


def fitting(line: str, columns: int) -> str:
    """As many of the line's parts as have room, whole."""
    while len(line) > columns and " | " in line:
        line = line.rpartition(" | ")[0]
    return line[:columns]


def status_line(before: Stats, stats: Stats, seconds: float) -> str:
    """Open streams, by which path, rates and totals; `seconds` lie between the two statistics."""
    down = (stats.bytes_received - before.bytes_received) / seconds
    up = (stats.bytes_sent - before.bytes_sent) / seconds
    return (
        f"{stats.streams} open, {stats.opened} so far, {'direct' if stats.direct else 'by the host'} | "
        f"down {output.size(down)}/s, up {output.size(up)}/s | "
        f"total down {output.size(stats.bytes_received)}, up {output.size(stats.bytes_sent)} | Ctrl-C ends it"
    )


class OpenView(PlainView):
    """What `kohakuriver open` says: the address; or the link alone, on stdout, and all else on stderr."""

    def __init__(self, task: str, *, print_link: bool) -> None:
        super().__init__(task)
        self._print_link = print_link

    def served(self, event: Served) -> None:
        if self._print_link:
            output.line(event.link)
        else:
            self.result(f"Serving {event.url} -> {self._task}:{event.remote_port}; Ctrl-C ends it.")


class LogView(PlainView):
    """The same lines in a log, which has the time of each."""

    def __init__(self, task: str, logger: logging.Logger) -> None:
        super().__init__(task)
        self._logger = logger

    def show(self, event: Event) -> None:
        super().show(event)
        if isinstance(event, Closed):
            self.result(f"The forward has ended: {event.reason}")

    def result(self, text: str) -> None:
        self._logger.info("%s", printable(text, keep=""))

    message = result

    def served(self, event: Served) -> None:
        """Without the link: logs are no place for what lets in."""
        self.result(f"Serving {event.url} -> {self._task}:{event.remote_port}")

    def detached(self, event: Detached) -> None:
        self.result(f"In the background as {event.id}, process {event.pid}.")


class Aside:
    """Shows on a thread of its own what a view shows: a terminal on hold (Ctrl-S), or a pipe that nobody empties,
    holds up the showing and not the forward.
    """

    def __init__(self, view: View) -> None:
        self._view = view
        self._waiting: queue.Queue[Callable[[], None] | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._work, name="view", daemon=True)
        self.interval = view.interval
        self.left_out = 0

    def __enter__(self) -> Aside:
        self._view.__enter__()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=LAST_WORDS)
            self._thread.join(LAST_WORDS)
        if self._thread.is_alive():
            output.give_up()
        else:
            self._view.__exit__(kind, error, trace)

    def tell(self, event: Event) -> None:
        """Have an event shown."""
        self.tell_in(self._view, event)

    def tell_in(self, view: View, event: Event) -> None:
        """Have an event shown by one of the views that this one is made of."""
        self._put(lambda: view.tell(event))

    def message(self, text: str) -> None:
        """Have a line for a person shown."""
        self._put(lambda: self._view.message(text))

    def tick(self, stats: Stats) -> None:
        """Have statistics shown, unless what came before them is still to be."""
        if self._waiting.empty():
            self._put(lambda: self._view.tick(stats))

    def rest(self) -> None:
        """Have the terminal left as others expect it, and wait until it is; not for long if it takes nothing."""
        self._wait_for(self._view.rest)

    def _wait_for(self, act: Callable[[], None]) -> None:
        done = threading.Event()

        def acted() -> None:
            act()
            done.set()

        self._put(acted)
        done.wait(LAST_WORDS)

    def _put(self, show: Callable[[], None]) -> None:
        try:
            self._waiting.put_nowait(show)
        except queue.Full:
            self.left_out += 1

    def _work(self) -> None:
        while (show := self._waiting.get()) is not None:
            show()


def views_for(tasks: Sequence[str], *, json: bool, beside_command: bool = False) -> list[View]:
    """A view of each forward, by its task, that fits where stdout goes. Several are to be put Together."""
    if json:
        return [JsonView(task if len(tasks) > 1 else None) for task in tasks]
    if output.paints(sys.stdout) and not beside_command:
        line = LiveLine()
        return [LiveView(task, line) for task in tasks]
    return [PlainView(task, beside_command=beside_command) for task in tasks]
