"""Copying what a plan says, by several streams at once. Everything here blocks and runs in threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from kohakuriver.client.copying.plan import SMALL, Options, Plan, Planner, part_name
from kohakuriver.client.copying.sides import CHANGED, Batch, Contents, FileError, Side, Written
from kohakuriver.tunnel.files import EACH, PIECE, Answer, Attributes, Entry

__all__ = ["Copied", "Copy", "Worker"]

RANGE: Final = 8 << 20
"""Bytes of a large file that one stream copies before it looks for something else to do."""
_BATCH_FILES, _BATCH_BYTES = 512, 256 << 10  # few enough that one end reads while the other one writes
_FIRST_PART: Final = 2048  # entries that are planned before the first file is copied
_MOST_TOLD = 1000  # failures that are kept with their names


@dataclass
class Copied:
    """What has been done so far. Sizes are of files' contents, in bytes; what was there already is `kept_size`."""

    files: int = 0
    size: int = 0
    kept_size: int = 0
    folders: int = 0
    links: int = 0
    removed: int = 0
    not_owner: int = 0
    failures: int = 0
    failed: list[tuple[bytes, str]] = field(default_factory=list)

    def fail(self, path: bytes, why: str) -> None:
        """One file could not be copied."""
        self.failures += 1
        if len(self.failed) < _MOST_TOLD:
            self.failed.append((path, why))

    def took(self, result: int) -> None:
        self.not_owner += result == Answer.NOT_OWNER


class _Large:
    """A file that several streams copy. Its `lock` guards all that follows."""

    def __init__(self, entry: Entry, path: bytes) -> None:
        self.entry = entry
        self.path = path
        self.part = part_name(path, entry)
        self.lock = threading.Lock()
        self.begun = self.before = False
        self.error: FileError | None = None
        self.left = 1  # ranges that are not done yet, and one until all have been handed out


@dataclass(frozen=True)
class _Range:
    file: _Large
    offset: int
    length: int


def _larger_and_larger(listed: Iterable[list[Entry]]) -> Iterator[list[Entry]]:
    """The same in few parts, for each of which the other end is waited for; the first is soon there."""
    some: list[Entry] = []
    enough = _FIRST_PART
    for part in listed:
        some += part
        if len(some) >= enough:
            yield some
            some, enough = [], 2 * enough
    if some:
        yield some


def _pieces(start: int, length: int) -> list[tuple[int, int]]:
    return [(at, min(PIECE, start + length - at)) for at in range(start, start + length, PIECE)]


class Copy:
    """One copy. `source` and `target` of each worker are of its own; this is what they share.

    With `grows` the plan does: of its files those are copied that have been released.
    """

    def __init__(self, plan: Plan, options: Options, *, grows: bool = False) -> None:
        self.plan = plan
        self.options = options
        self._released = 0 if grows else None
        self._more = threading.Condition()
        self._lock = threading.Lock()
        self._jobs = self._all_jobs()
        self._segments: Callable[[bytes], list[tuple[int, int]]]
        self.workers: list[Worker] = []

    def worker(self, source: Side, target: Side) -> Worker:
        """One more, with its own way to either end."""
        worker = Worker(self, source, target)
        self.workers.append(worker)
        return worker

    def job(self, worker: Worker) -> Batch | _Range | None:
        """What is to be done next; None when there is nothing left."""
        with self._lock:
            self._segments = worker.source.segments
            return next(self._jobs, None)

    @property
    def is_known(self) -> bool:
        """Whether the plan grows no more."""
        return self._released is None

    def release(self, *, all_of_it: bool = False) -> None:
        """What is planned by now may be copied; `all_of_it`: and there will be no more."""
        with self._more:
            self._released = None if all_of_it else len(self.plan.files)
            self._more.notify_all()

    def _parts(self) -> Iterator[list[tuple[Entry, bytes]]]:
        """All files, as they are released."""
        at = 0
        while True:
            with self._more:
                while self._released is not None and self._released <= at:
                    self._more.wait()
                stop = len(self.plan.files) if self._released is None else self._released
            if at == stop:
                return
            yield self.plan.files[at:stop]
            at = stop

    def _all_jobs(self) -> Iterator[Batch | _Range]:
        for part in self._parts():
            batch: Batch = []
            size = 0
            for each in part:
                entry, path = each
                if entry.size > SMALL:
                    yield from self._ranges(_Large(entry, path))
                    continue
                its = entry.size + len(path) + EACH
                if batch and (len(batch) >= _BATCH_FILES or size + its > _BATCH_BYTES):
                    yield batch
                    batch, size = [], 0
                batch.append(each)
                size += its
            if batch:
                yield batch

    def _ranges(self, file: _Large) -> Iterator[_Range]:
        segments = [(0, file.entry.size)]
        if file.entry.sparse:
            try:
                segments = self._segments(file.entry.path)
            except FileError as error:
                file.error = error
        for at, length in segments:
            end = min(at + length, file.entry.size)
            while at < end and file.error is None:
                size = min(RANGE, end - at)
                with file.lock:
                    file.left += 1
                yield _Range(file, at, size)
                at += size
        yield _Range(file, 0, 0)

    def so_far(self) -> Copied:
        """What all workers have done by now."""
        total = Copied()
        for done in (worker.done for worker in list(self.workers)):
            for name in ("files", "size", "kept_size", "folders", "links", "removed", "not_owner", "failures"):
                setattr(total, name, getattr(total, name) + getattr(done, name))
            total.failed += done.failed
        return total


class Worker:
    """One thread's part of a copy. What its sides raise but FileError ends the copy."""

    def __init__(self, copy: Copy, source: Side, target: Side) -> None:
        self._copy = copy
        self._options = copy.options
        self.source = source
        self._target = target
        self.done = Copied()
        self._later: deque[Callable[[], None]] = deque()

    # -- before and after --------------------------------------------------------------------------------------

    def prepare(self, planner: Planner, listed: Iterator[list[Entry]], then: Callable[[], object]) -> None:
        """Plan what is listed, and make its folders, a part at a time, of which `then` is told: files are copied
        meanwhile.

        What is not wanted is taken away before, so that waits for the list's end.
        """
        if self._options.delete:
            listed = iter([[entry for part in listed for entry in part]])
        try:
            for part in _larger_and_larger(listed):
                before = len(planner.plan.folders)
                planner.add(part)
                planner.find_extra()
                self._remove()
                self._make(planner.plan.folders[before:])
                self._copy.release()
                then()
        finally:
            self._copy.release(all_of_it=True)

    def _remove(self) -> None:
        for path, folder in self._copy.plan.removed:
            self._target.remove(path, folder, self._counted(path, "removed"))
        self._target.settle(all_of_it=True)

    def _make(self, folders: list[tuple[Entry, bytes]]) -> None:
        for _, path in folders:
            if path:  # the root is there
                self._target.folder(path, self._counted(path))
        self._target.settle(all_of_it=True)
        self.done.folders += len(folders)

    def conclude(self) -> None:
        """What needs the files: links; then what the folders are given, which anything else in them would change."""
        plan, options = self._copy.plan, self._options
        for entry, path in plan.symlinks:
            self._target.symlink(path, entry.target, options.attributes(entry), self._counted(path, "links"))
        self._settle()
        for path, existing in plan.links:
            self._target.link(path, existing, self._counted(path, "links"))
        for entry, path in plan.touched:
            self._target.attributes(path, options.attributes(entry), self._counted(path))
        self._settle()
        for entry, path in reversed(plan.folders):
            self._target.attributes(path, options.attributes(entry), self._counted(path))
        self._settle()

    def _counted(self, path: bytes, what: str = "") -> Callable[[int | FileError], None]:
        def then(result: int | FileError) -> None:
            if isinstance(result, FileError):
                self.done.fail(path, result.why)
                return
            self.done.took(result)
            if what:
                setattr(self.done, what, getattr(self.done, what) + 1)

        return then

    # -- files -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Copy files until there are none left."""
        while True:
            job = self._copy.job(self)
            if job is None:
                self._settle()
                if not self._later:
                    return
            elif isinstance(job, _Range):
                self._range(job)
            else:
                self._small(job)
            while self._later:
                self._later.popleft()()

    def _settle(self) -> None:
        self.source.settle(all_of_it=True)
        self._target.settle(all_of_it=True)

    def _small(self, batch: Batch) -> None:
        """Files that are read together, and written together.

        With --update each has its name when it has its bytes and its time, and not before: whatever else ends halfway
        is newer than its source, which is what --update leaves alone ever after.
        """
        options = self._options

        def read(contents: Contents | FileError) -> None:
            if isinstance(contents, FileError):
                self._count(batch, dict.fromkeys(range(len(batch)), contents), Written({}))
                return
            missing = contents.failed

            def written(result: Written | FileError) -> None:
                self._count(batch, missing, result)

            self._target.put(batch, contents, written, owner=options.owner, beside=options.update)

        self.source.get(batch, read)

    def _count(self, batch: Batch, missing: dict[int, FileError], result: Written | FileError) -> None:
        """What became of a batch, of which some files were `missing` before the others were written."""
        if isinstance(result, FileError):
            result = Written(dict.fromkeys(set(range(len(batch))) - missing.keys(), result))
        for number, error in missing.items():
            self.done.fail(batch[number][0].path, error.why)
        for number, error in result.failed.items():
            self.done.fail(batch[number][1], error.why)
        failed = missing.keys() | result.failed.keys()
        self.done.not_owner += result.not_owner
        self.done.files += len(batch) - len(failed)
        self.done.size += sum(each[0].size for each in batch) - sum(batch[number][0].size for number in failed)

    def _range(self, job: _Range) -> None:
        file = job.file
        if not self._begin(file) or not job.length:
            self._one_less(file)
        elif file.before:
            self._compare(job)
        else:
            self._transfer(job, [(job.offset, job.length)])

    def _begin(self, file: _Large) -> bool:
        """Whether there is something to write to."""
        with file.lock:
            if not file.begun and file.error is None:
                file.begun = True
                told: list[int | FileError] = []
                self._target.part(file.part, file.entry.size, told.append)
                self._target.settle(all_of_it=True)
                result = told[0]
                if isinstance(result, FileError):
                    file.error = result
                else:
                    file.before = result == Answer.BEFORE
            return file.error is None

    def _compare(self, job: _Range) -> None:
        """Some of it may be there from an earlier try: transfer what is different."""
        told: list[list[int] | FileError] = []
        said: list[list[int] | FileError] = []
        self.source.sums(job.file.entry.path, job.offset, job.length, told.append)
        self._target.sums(job.file.part, job.offset, job.length, said.append)
        self._settle()
        ours, theirs = ([] if isinstance(each, FileError) else each for each in (told[0], said[0]))
        wanted = []
        for number, at in enumerate(range(0, job.length, PIECE)):
            size = min(PIECE, job.length - at)
            if ours[number : number + 1] == theirs[number : number + 1] != []:
                self.done.size += size
                self.done.kept_size += size
            else:
                wanted.append((job.offset + at, size))
        if wanted:
            self._transfer(job, wanted)
        else:
            self._one_less(job.file)

    def _transfer(self, job: _Range, pieces: list[tuple[int, int]]) -> None:
        """Copy pieces of a file; the last that is written counts as the range."""
        file = job.file
        pieces = [piece for start, length in pieces for piece in _pieces(start, length)]
        left = len(pieces)

        def over(result: int | FileError, size: int = 0) -> None:
            nonlocal left
            if isinstance(result, FileError):
                with file.lock:
                    file.error = file.error or result
            else:
                self.done.size += size
            left -= 1
            if not left:
                self._one_less(file)

        for offset, size in pieces:

            def read(data: memoryview | FileError, offset: int = offset, size: int = size) -> None:
                if isinstance(data, FileError):
                    over(data)
                elif len(data) != size:
                    over(FileError("EIO", CHANGED))
                else:
                    self._target.write(file.part, offset, data, lambda result: over(result, size))

            self.source.read(file.entry.path, offset, size, read)

    def _one_less(self, file: _Large) -> None:
        """A range of it is done, or all have been handed out; whoever did the last one finishes it."""
        with file.lock:
            file.left -= 1
            if file.left:
                return
        self._later.append(lambda: self._finish(file))

    def _finish(self, file: _Large) -> None:
        entry = file.entry
        if file.error is None:
            try:
                now = [each for part in self.source.entries(entry.path) for each in part]
            except FileError as error:
                file.error = error
            else:
                if not now or (now[0].size, now[0].mtime) != (entry.size, entry.mtime):
                    file.error = FileError("EIO", CHANGED)
        if file.error is not None:
            self.done.fail(entry.path, file.error.why)
            return
        attributes: Attributes = self._options.attributes(entry)
        self._target.finish(file.part, file.path, attributes, self._counted(file.path, "files"))
