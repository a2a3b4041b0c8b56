"""One copy between this machine and a task: its streams, its threads, and their end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from kohakuriver.client.copying.engine import Copied, Copy, Worker
from kohakuriver.client.copying.local_tree import LocalTree
from kohakuriver.client.copying.plan import Options, Plan, Planner
from kohakuriver.client.copying.remote_tree import RemoteTree
from kohakuriver.client.copying.sides import FileError, Side, StreamGone
from kohakuriver.client.forward import Event
from kohakuriver.client.lasting_terminal import NO_LASTING, Carrier
from kohakuriver.config import Settings
from kohakuriver.errors import KohakuRiverError, NotFoundError, UnavailableError, UsageError
from kohakuriver.runtime import cancel_all
from kohakuriver.tunnel.files import PIECE, Entry, files_start

__all__ = ["STREAMS", "Place", "Progress", "copy_files"]

STREAMS = 4
DEFAULT = Options()
MOST_STREAMS = 16

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """One end of a copy: a path in `task`, or on this machine where that is None."""

    task: str | None
    path: bytes

    def __str__(self) -> str:
        path = self.path.decode("utf-8", "replace")
        return path if self.task is None else f"{self.task}:{path}"

    @property
    def name(self) -> bytes:
        """What a copy of it is called; nothing where it has no name of its own, as `.`, or a slash at its end."""
        name = self.path.rpartition(b"/")[2]
        return b"" if name in (b".", b"..", b"~") else name


@dataclass(frozen=True)
class Progress:
    """How far a copy is. `plan` is None until it is known what is to be done."""

    plan: Plan | None
    done: Copied


class _Streams:
    """Streams of files to one task. Each has a socket pair, whose near end belongs to a RemoteTree."""

    def __init__(self, task: str, settings: Settings, told: Callable[[Event], object]) -> None:
        self._task = task
        self._settings = settings
        self._told = told
        self._carriers: list[asyncio.Future[None]] = []
        self._trees: list[RemoteTree] = []

    def begin(self, start: bytes) -> RemoteTree:
        """One more."""
        near, far = socket.socketpair()
        carrier = asyncio.ensure_future(Carrier(self._task, self._settings, far, start, self._told).run())
        carrier.add_done_callback(lambda _: far.close())
        tree = RemoteTree(near)
        self._carriers.append(carrier)
        self._trees.append(tree)
        return tree

    async def why(self) -> KohakuRiverError:
        """What ended one of them that was not to end."""
        for carrier in self._carriers:
            with contextlib.suppress(asyncio.TimeoutError):
                try:
                    await asyncio.wait_for(asyncio.shield(carrier), 1)
                except KohakuRiverError as error:
                    if error.code in (NO_LASTING, "terminal_lost"):
                        return self._lost(error)
                    return error
        return UnavailableError(
            f"The copy was ended by task {self._task}; the same command goes on where it stopped.", code="copy_lost"
        )

    def _lost(self, error: KohakuRiverError) -> UnavailableError:
        why = error.message.rpartition("was lost: ")[2]
        if error.code == NO_LASTING or "EPROTO" in why:
            return UnavailableError(
                f"Files of task {self._task} can't be copied: its tunnel client, or the host, is of another kind or "
                f"version. Use `kohakuriver connect {self._task} -- tar`, or `scp` where the task was made with --ssh.",
                code="no_copy",
            )
        sentence = why[:1].upper() + why[1:]
        return UnavailableError(
            f"The copy was broken off: {sentence.rstrip('.')}. The same command goes on where it stopped.",
            code="copy_lost",
        )

    def hang_up(self) -> None:
        """End all of them; threads that wait for one get StreamGone."""
        for tree in self._trees:
            tree.hang_up()

    async def close(self) -> None:
        await cancel_all(self._carriers)
        for tree in self._trees:
            tree.close()


async def copy_files(
    source: Place,
    target: Place,
    *,
    settings: Settings,
    folder: bool = False,
    options: Options = DEFAULT,
    streams: int = STREAMS,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    every: float = 0.2,
    told: Callable[[Event], object] = lambda _: None,
) -> Progress:
    """Make what `target` names a copy of what `source` names; one of them is in a task.

    A folder is copied only with `folder`: into the folder `target`, under its name, or what is in it alone where the
    source ends with a slash. Files that are there with the same size and time are left alone. `on_progress` is called
    `every` so many seconds.

    Raises UsageError for what can't be, NotFoundError where the source is missing, and what a forward raises. Single
    files that can't be copied raise nothing: they are in the result's `done.failed`.
    """
    _check(source, target, streams)
    task = source.task or target.task
    assert task is not None
    lines = _Streams(task, settings, told)
    opened = contextlib.ExitStack()  # what is open outlives the threads
    try:
        with opened, ThreadPoolExecutor(streams, thread_name_prefix="copy") as pool:
            session = _Session(source, target, lines, pool, opened, folder, options, streams, on_progress, every)
            try:
                return await session.run()
            except StreamGone:
                raise await lines.why() from None
            finally:
                session.hang_up()  # else the threads would be waited for until all is done
    finally:
        await lines.close()


def _check(source: Place, target: Place, streams: int) -> None:
    if (source.task is None) == (target.task is None):
        raise UsageError("One of SRC and DST is in a task, written as TASK:PATH, and the other one on this machine.")
    if not 1 <= streams <= MOST_STREAMS:
        raise UsageError(f"--streams takes a number from 1 to {MOST_STREAMS}, not {streams}.")
    if os.open not in os.supports_dir_fd or not hasattr(os, "preadv"):
        raise UnavailableError(
            "Copying needs a Unix system on this side; use `connect TASK -- tar`.", code="not_supported"
        )


@dataclass
class _Session:
    source: Place
    target: Place
    lines: _Streams
    pool: ThreadPoolExecutor
    opened: contextlib.ExitStack
    folder: bool
    options: Options
    streams: int
    on_progress: Callable[[Progress], None]
    every: float
    _here: LocalTree | None = None
    _ended: bool = False

    def hang_up(self) -> None:
        """End what the threads do at either end: they get StreamGone."""
        self._ended = True
        self.lines.hang_up()
        if self._here is not None:
            self._here.hang_up()

    async def run(self) -> Progress:
        is_down = self.source.task is not None
        here = self._local(self.source, is_source=True) if not is_down else None
        # A folder's copy needs a folder around it, and whether the source is one the first look tells.
        first = self.lines.begin(self._start(self.source if is_down else self.target, not is_down, here))
        try:
            await self._in_thread(first.open)
        except FileError as error:
            raise self._no_place(self.source if is_down else self.target, error) from None
        if here is None:
            here = self._local(self.target, is_source=False, folder=first.only is None)
        source, target = (first, here) if is_down else (here, first)
        planner = await self._planner(source, target)
        try:
            listed = iter([await self._alone(source)]) if source.only is not None else source.entries(b"")
            return await self._carry_out(planner, listed, first, here, is_down)
        except FileError as error:
            raise self._no_place(self.source, error) from None

    def _local(self, place: Place, *, is_source: bool, folder: bool = False) -> LocalTree:
        if folder and not self.folder:
            raise self._is_folder()
        try:
            tree = LocalTree.of(place.path, writes=not is_source, folder=folder)
        except FileError as error:
            raise self._no_place(place, error) from None
        self.opened.callback(tree.close)
        self._here = tree
        if is_source and tree.only is None and not self.folder:
            raise self._is_folder()
        return tree

    def _is_folder(self) -> UsageError:
        return UsageError(f"{self.source} is a folder; -r copies it with all that is in it.")

    def _start(self, place: Place, is_target: bool, here: LocalTree | None) -> bytes:
        is_tree = here is not None and here.only is None
        return files_start("to" if is_target else "from", place.path, folder=is_target and is_tree)

    def _no_place(self, place: Place, error: FileError) -> KohakuRiverError:
        sentence = f"{place}: {error.why}."
        return NotFoundError(sentence) if error.code == "ENOENT" else UnavailableError(sentence, code="no_file")

    def _in_thread(self, call: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self.pool, call)

    async def _alone(self, source: Side) -> list[Entry]:
        """The one file that is copied. Raises UsageError where it is none."""
        listed = await self._in_thread(lambda: _all(source, b""))
        if len(listed) != 1 or listed[0].kind not in "fe":
            raise UsageError(f"{self.source} is no regular file; nothing else can be copied by itself.")
        return listed

    async def _planner(self, source: Side, target: Side) -> Planner:
        """Who finds what is to be done. For a tree its own folder is the first entry, if it has a name there."""
        if source.only is not None:
            name = target.only or self.source.name or source.only
            there = await self._there(target, name)
            return Planner(there, b"", name, Options(update=self.options.update, owner=self.options.owner))
        own = self.source.name
        prefix = own + b"/" if own else b""
        there = await self._there(target, own)
        return Planner([each for each in there if each.path != own], prefix, None, self.options)

    async def _there(self, target: Side, path: bytes) -> list[Entry]:
        try:
            return await self._in_thread(lambda: _all(target, path))
        except FileError as error:
            if error.code in ("ENOENT", "ENOTDIR"):
                return []
            raise UnavailableError(f"{self.target}: {error.why}.", code="no_file") from None

    async def _carry_out(
        self, planner: Planner, listed: Iterator[list[Entry]], first: RemoteTree, here: LocalTree, is_down: bool
    ) -> Progress:
        made, loop = planner.plan, asyncio.get_running_loop()
        copy = Copy(made, planner.options, grows=True)
        start = self._start(self.source if is_down else self.target, not is_down, here)
        threads: list[asyncio.Future[None]] = []

        def worker(remote: RemoteTree, local: LocalTree) -> Worker:
            return copy.worker(remote, local) if is_down else copy.worker(local, remote)

        def help_out() -> None:
            """As many streams as there is work for by now."""
            while not self._ended and len(threads) < min(self.streams, 1 + made.size // PIECE + len(made.files) // 64):
                remote, local = self.lines.begin(start), here.another()
                self.opened.callback(local.close)
                threads.append(self._watched(_helping(remote, worker(remote, local))))

        def lead_on() -> None:
            lead.prepare(planner, listed, lambda: loop.call_soon_threadsafe(help_out))
            lead.run()

        lead = worker(first, here)
        async with self._shown(copy):
            threads.append(self._watched(lead_on))
            await self._until_done(threads)
            await self._in_thread(lead.conclude)
        for path, why in made.failed:
            lead.done.fail(path, why)
        return Progress(made, copy.so_far())

    def _watched(self, call: Callable[[], None]) -> asyncio.Future[None]:
        """One of several threads: where one fails the others end, too."""

        def look_at(thread: asyncio.Future[None]) -> None:
            if not thread.cancelled() and thread.exception() is not None:
                self.hang_up()

        thread = self._in_thread(call)
        thread.add_done_callback(look_at)
        return thread

    async def _until_done(self, threads: list[asyncio.Future[None]]) -> None:
        """Wait for all, of which the first sees to it that there are more. What went wrong first is raised."""
        try:
            await asyncio.wait(threads[:1])
            await asyncio.wait(threads)
        except BaseException:
            self.hang_up()
            raise
        failed = [each.exception() for each in threads]
        for error in sorted(filter(None, failed), key=lambda error: isinstance(error, StreamGone)):
            raise error

    @contextlib.asynccontextmanager
    async def _shown(self, copy: Copy) -> AsyncIterator[None]:
        """Tell how far it is, again and again."""

        async def tell() -> None:
            while True:
                self.on_progress(Progress(copy.plan if copy.is_known else None, copy.so_far()))
                await asyncio.sleep(self.every)

        telling = asyncio.ensure_future(tell())
        try:
            yield
        finally:
            await cancel_all([telling])


def _all(side: Side, path: bytes) -> list[Entry]:
    return [entry for part in side.entries(path) for entry in part]


def _helping(remote: RemoteTree, worker: Worker) -> Callable[[], None]:
    """What the thread of one more stream does. Where there can't be one more, the others do."""

    def help_out() -> None:
        try:
            remote.open()
        except (FileError, StreamGone):
            return
        worker.run()

    return help_out
