"""What the engine tells of its containers, and when a task's state is looked at because of it.

Docker's events are taken as hints: whatever one says, the container is inspected.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from datetime import datetime
from typing import Any

import aiodocker
import structlog

from kohakuriver.errors import KohakuRiverError, UnavailableError
from kohakuriver.runner.backends.docker.engine import TROUBLE, new_client, why
from kohakuriver.runner.services.state import TaskRecord
from kohakuriver.runtime import cancel_all
from kohakuriver.web.background import in_background

__all__ = ["EngineWatch", "Looker", "engine_time"]

log = structlog.get_logger("kohakuriver.runner")

_ENGINE_SECONDS = 5.0
_RETRY_SECONDS = 5.0
_EVENTS = ("start", "die", "destroy", "pause", "unpause", "exec_die")


class EngineWatch:
    """The engine's client while the engine answers, and its events.

    Args:
        node: its name, for sentences.
        look_around: called when the engine has come: what it has now is not known yet.
        on_event: takes one event of a container.
        on_change: called when the engine has come or gone.
    """

    def __init__(
        self,
        node: str,
        *,
        look_around: Callable[[], Awaitable[None]],
        on_event: Callable[[dict[str, Any]], None],
        on_change: Callable[[], None],
    ) -> None:
        self._node = node
        self._look_around = look_around
        self._on_event = on_event
        self._on_change = on_change
        self._client: aiodocker.Docker | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._first_look = asyncio.Event()
        self.trouble = "no Docker engine has answered yet"
        """Why there is no engine, if there is none; without a full stop."""

    @property
    def docker(self) -> aiodocker.Docker:
        """The engine's client. Raises UnavailableError "no_engine"."""
        if self._client is None:
            raise UnavailableError(
                f"The Docker engine of node {self._node} does not answer; start it there.", code="no_engine"
            )
        return self._client

    @property
    def answers(self) -> bool:
        """Whether there is an engine now."""
        return self._client is not None

    async def open(self) -> None:
        """Begin; returns once the engine's containers have been looked at, or no engine answers."""
        self._watcher = in_background(self._watch(), "following the Docker engine")
        await self._first_look.wait()

    async def end(self) -> None:
        """Look at nothing more; the client stays."""
        await cancel_all([self._watcher] if self._watcher else [])

    async def close(self) -> None:
        """Let go of the engine."""
        if self._client is not None:
            await self._client.close()

    async def _watch(self) -> None:
        """Follow the engine's events, and look for the engine again whenever it goes."""
        while True:
            try:
                await self._follow()
            except TROUBLE as error:
                self.trouble = f"no Docker engine answers ({why(error)})"
                if not self._first_look.is_set():
                    log.warning(
                        "no Docker engine answers: no task can be a container until one does", reason=why(error)
                    )
            except KohakuRiverError as error:
                log.warning("trouble with the Docker engine", reason=error.message)
            except Exception:  # unheard, it would end the watch, and tasks would be shown for ever as they are now
                log.exception("what the Docker engine told could not be taken in")
            if self._client is not None:
                log.warning("the Docker engine went away")
            await self._disconnect()
            self._first_look.set()
            await asyncio.sleep(_RETRY_SECONDS)

    async def _follow(self) -> None:
        client = new_client()
        try:
            await asyncio.wait_for(client.version(), _ENGINE_SECONDS)
        except BaseException:
            await client.close()
            raise
        self._client = client
        self._on_change()
        # Events from a little before we look: what happens meanwhile is seen twice rather than never.
        since = str(int(engine_time((await client.system.info())["SystemTime"])))
        filters = json.dumps({"type": ["container"], "event": list(_EVENTS)})
        events: Any = client.events  # not annotated
        subscriber = events.subscribe(create_task=False)
        running = asyncio.get_running_loop().create_task(events.run(since=since, filters=filters))
        try:
            await self._look_around()
            self._first_look.set()
            while (event := await subscriber.get()) is not None:
                self._on_event(event)
            await running
        finally:
            await cancel_all([running])

    async def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()
            self._on_change()


def engine_time(text: str) -> float:
    """The engine's own clock, in seconds since the epoch: it need not be this machine's. `text` is RFC 3339."""
    day_and_time, zone = re.sub(r"\.\d+", "", text)[:19], text[-6:].replace("Z", "+00:00")[-6:]
    return datetime.fromisoformat(day_and_time + zone).timestamp()


class Looker:
    """Has tasks refreshed, but not while we change them ourselves: what was seen before that is out of date."""

    def __init__(self, refresh: Callable[[TaskRecord], Coroutine[Any, Any, None]]) -> None:
        self._refresh = refresh
        self._busy: set[str] = set()
        self._missed: set[str] = set()
        self._looks: set[asyncio.Task[None]] = set()
        self._due: dict[str, asyncio.Task[None]] = {}
        self._looking: dict[str, asyncio.Task[None]] = {}

    async def look_again(self, task: TaskRecord) -> None:
        """`look`, where nobody waits for what comes of it: a failure is logged."""
        try:
            await self.look(task)
        except (*TROUBLE, KohakuRiverError) as error:
            log.warning("a container's state could not be read", task=task.task_id, reason=why(error))

    def look_soon(self, task: TaskRecord) -> None:
        """`look_again`, after what is due for this task: one that takes long keeps no other task waiting."""
        due = self._due.get(task.container)
        look = self._due[task.container] = in_background(self._look_after(due, task), "looking at a container")
        self._looks.add(look)
        look.add_done_callback(lambda look: self._looked(task, look))

    def look_later(self, task: TaskRecord, seconds: float, wanted: Callable[[], bool]) -> None:
        """`look_soon`, in so many seconds, and if it is still `wanted` then."""

        def waited(pause: asyncio.Task[None]) -> None:
            self._looks.discard(pause)
            if not pause.cancelled() and wanted():
                self.look_soon(task)

        pause = in_background(asyncio.sleep(seconds), "waiting to look at a container")
        self._looks.add(pause)
        pause.add_done_callback(waited)

    async def _look_after(self, due: asyncio.Task[None] | None, task: TaskRecord) -> None:
        if due is not None:
            await asyncio.wait({due})
        await self.look_again(task)

    def _looked(self, task: TaskRecord, look: asyncio.Task[None]) -> None:
        self._looks.discard(look)
        if self._due.get(task.container) is look:
            del self._due[task.container]

    async def look(self, task: TaskRecord) -> None:
        """Refresh a task, until we begin to change it; then, afterwards. Raises what `refresh` raises."""
        if task.container in self._busy:
            self._missed.add(task.container)
            return
        if older := self._looking.get(task.container):
            older.cancel()
        look = self._looking[task.container] = asyncio.get_running_loop().create_task(self._refresh(task))
        try:
            await asyncio.wait({look})
            if not look.cancelled():
                look.result()
        finally:
            look.cancel()
            if self._looking.get(task.container) is look:
                del self._looking[task.container]

    @contextlib.contextmanager
    def handling(self, task: TaskRecord) -> Iterator[None]:
        """What the engine says about the task meanwhile is our own doing, and is looked at afterwards."""
        self._busy.add(task.container)
        if look := self._looking.get(task.container):
            look.cancel()
            self._missed.add(task.container)
        try:
            yield
        finally:
            self._busy.discard(task.container)
            if task.container in self._missed:
                self._missed.discard(task.container)
                self.look_soon(task)

    async def close(self) -> None:
        """Look at nothing more."""
        await cancel_all([*self._looks, *self._looking.values()])
