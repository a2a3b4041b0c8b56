"""What `kohakuriver forward` shows: plain lines, JSON events, or lines above a live one on a terminal."""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from kohakuriver.cli import output
from kohakuriver.client.forward import Event, Listening, Reconnecting, Resumed, Stats, StreamError
from kohakuriver.text import printable

if TYPE_CHECKING:
    from rich.live import Live

__all__ = ["Aside", "JsonView", "LiveView", "PlainView", "View", "view_for"]

STATS_INTERVAL = 5.0
LIVE_INTERVAL = 0.5
# The same failure is not said again within this many seconds: a program that retries would flood the terminal.
QUIET = 5.0
# Events that wait for a stdout that is not read; what comes while it is full is counted and left out.
MOST_WAITING = 1000
LAST_WORDS = 1.0


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
        """`show`, where it does no harm when nobody reads stdout any more: the forward goes on."""
        try:
            self.show(event)
        except BrokenPipeError:
            output.discard_stdout()

    def show(self, event: Event) -> None:
        raise NotImplementedError

    def tick(self, stats: Stats) -> None:
        pass


class JsonView(View):
    """One event a line on stdout; statistics whenever they have changed."""

    def __init__(self) -> None:
        self._last: Stats | None = None

    def show(self, event: Event) -> None:
        output.json_line(event.to_json())

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
        self._said: dict[tuple[int, str], tuple[float, int]] = {}

    def show(self, event: Event) -> None:
        if isinstance(event, Listening):
            self.result(listening_line(self._task, event))
        elif isinstance(event, StreamError):
            self._stream_error(event)
        elif isinstance(event, Reconnecting):
            if event.reason != self._reason:
                self._reason = event.reason
                self.message(f"Reconnecting: {event.reason or 'the connection is lost'}")
        elif isinstance(event, Resumed):
            self._reason = ""
            self.message("Connected again.")

    def result(self, text: str) -> None:
        """Show a line that a script may wait for."""
        (output.note if self._beside_command else output.line)(text)

    def message(self, text: str) -> None:
        """Show a line for a person."""
        output.note(text)

    def _stream_error(self, event: StreamError) -> None:
        key = (event.remote_port, event.message)
        now = time.monotonic()
        last, unsaid = self._said.get(key, (-QUIET, 0))
        if now - last < QUIET:
            self._said[key] = (last, unsaid + 1)
            return
        more = f" ({unsaid} more like this)" if unsaid else ""
        self._said[key] = (now, 0)
        self.message(f"{self._task}:{event.remote_port}: {readable(event.message)}{more}")


def listening_line(task: str, event: Listening) -> str:
    """`Forwarding 127.0.0.1:8888 -> task:8888 (tcp)`"""
    host = f"[{event.local_host}]" if ":" in event.local_host else event.local_host
    return f"Forwarding {host}:{event.local_port} -> {task}:{event.remote_port} ({event.proto})"


def readable(text: str) -> str:
    """An ERROR's text with its symbolic code behind the words, as people read it."""
    code, colon, words = text.partition(": ")
    if colon and code.isupper() and code.isalnum():
        return f"{words} ({code})"
    return text


class LiveView(PlainView):
    """The same lines, above one that shows open streams and rates while the forward runs."""

    interval = LIVE_INTERVAL

    def __init__(self, task: str) -> None:
        super().__init__(task)
        self._live: Live | None = None
        self._before: tuple[float, Stats] | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def result(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
        else:
            output.line(text)

    def message(self, text: str) -> None:
        self.result(text)

    def tick(self, stats: Stats) -> None:
        now = time.monotonic()
        before, self._before = self._before, (now, stats)
        if before is None:
            return
        from rich.live import Live
        from rich.text import Text

        line = Text(status_line(before[1], stats, now - before[0]), style="dim", no_wrap=True, overflow="crop")
        if self._live is None:
            self._live = Live(line, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(line, refresh=True)


def status_line(before: Stats, stats: Stats, seconds: float) -> str:
    """Open streams, rates and totals; `seconds` lie between the two statistics."""
    down = (stats.bytes_received - before.bytes_received) / seconds
    up = (stats.bytes_sent - before.bytes_sent) / seconds
    return (
        f"{stats.streams} open, {stats.opened} so far | down {output.size(down)}/s, up {output.size(up)}/s | "
        f"total down {output.size(stats.bytes_received)}, up {output.size(stats.bytes_sent)} | Ctrl-C ends it"
    )


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
        self._put(lambda: self._view.tell(event))

    def tick(self, stats: Stats) -> None:
        """Have statistics shown, unless what came before them is still to be."""
        if self._waiting.empty():
            self._put(lambda: self._view.tick(stats))

    def _put(self, show: Callable[[], None]) -> None:
        try:
            self._waiting.put_nowait(show)
        except queue.Full:
            self.left_out += 1

    def _work(self) -> None:
        while (show := self._waiting.get()) is not None:
            show()


def view_for(task: str, *, json: bool, beside_command: bool) -> Aside:
    """The view that fits where stdout goes."""
    if json:
        return Aside(JsonView())
    if output.is_terminal(sys.stdout) and not beside_command:
        return Aside(LiveView(task))
    return Aside(PlainView(task, beside_command=beside_command))
