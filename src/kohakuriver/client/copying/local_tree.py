"""This machine's end of a copy: what is done below one folder, and nowhere else.

The names come from a task, which nobody here trusts. Each part of a path is opened by itself and is no symbolic link,
so that nothing that the task made, or anybody else meanwhile, leads out of the folder.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from kohakuriver import _files
from kohakuriver.client.copying.sides import CHANGED, Batch, Contents, Done, FileError, StreamGone, Told, Written
from kohakuriver.tunnel.files import EACH, PIECE, Answer, Attributes, Entry, crc32, is_safe

__all__ = ["PART", "LocalTree"]

PART: Final = _files.PART
"""What stands behind a file's name while it is only partly there."""

_TOGETHER = 512  # names in a folder that are looked at without a break
_DEEPEST = 200  # folders in each other: one open file each
_NO_FILE: Final = "It is no regular file any more"
_FOLDER: Final = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
_INSIDE: Final = _FOLDER | getattr(os, "O_NOFOLLOW", 0)
_FILE: Final = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_NEW: Final = os.O_CREAT | os.O_EXCL | _FILE


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What the system says as a FileError."""
    try:
        yield
    except OSError as error:
        raise _error(error) from error


def _reason(code: int) -> OSError:
    """What went wrong with one file of a batch."""
    if code == _files.NO_FILE:
        return OSError(errno.EINVAL, _NO_FILE)
    return OSError(errno.EIO, CHANGED) if code == _files.CHANGED else OSError(code, os.strerror(code))


def _error(error: OSError) -> FileError:
    return FileError(errno.errorcode.get(error.errno or 0, "EIO"), error.strerror or str(error))


class LocalTree:
    """A folder of this machine, or one name in it, for one thread. `root` is a descriptor, and this object's.

    Large because it is all that a Side can be asked for, and what is open is asked with it.
    """

    def __init__(self, root: int, only: bytes | None, hung_up: threading.Event | None = None) -> None:
        self._root = root
        self.only = only
        self._hung_up = hung_up or threading.Event()
        self._way: list[tuple[bytes, int]] = []
        self._open: tuple[bytes, bool, int] | None = None
        self._buffer = bytearray(PIECE)
        self._contents = bytearray(PIECE)

    @classmethod
    def of(cls, path: bytes, *, writes: bool, folder: bool = False) -> LocalTree:
        """What a user names. Raises FileError.

        To read, it has to be there. To write, it is a folder that is there, or one that is made where `folder` or a
        slash at its end says so, or the name of a file.
        """
        path = path or b"."
        wanted = folder or path.endswith(b"/")
        with _told():
            try:
                is_folder = stat.S_ISDIR(Path(os.fsdecode(path)).stat().st_mode)
            except FileNotFoundError:
                if not writes:
                    raise
                if wanted:
                    Path(os.fsdecode(path)).mkdir()
                is_folder = wanted
            if not is_folder and wanted and writes:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            if is_folder:
                return cls(os.open(path, _FOLDER), None)
            if not writes:
                path = os.path.realpath(path)
            parent, name = os.path.split(path)
            return cls(os.open(parent or b".", _FOLDER), name)

    def another(self) -> LocalTree:
        """The same folder, for another thread; it is hung up with this one."""
        return LocalTree(os.dup(self._root), self.only, self._hung_up)

    def hang_up(self) -> None:
        self._hung_up.set()

    def _check(self) -> None:
        """Before whatever may take its time. Raises StreamGone."""
        if self._hung_up.is_set():
            raise StreamGone("The copy has been ended.")

    def close(self) -> None:
        self._forget()
        self._truncate(0)
        os.close(self._root)

    def settle(self, *, all_of_it: bool = False) -> None:
        """Nothing waits here."""

    # -- where things are --------------------------------------------------------------------------------------

    def _truncate(self, length: int) -> None:
        while len(self._way) > length:
            os.close(self._way.pop()[1])

    def _inside(self, path: bytes) -> int:
        """The folder at a path. Raises OSError."""
        parts = path.split(b"/") if path else []
        way = self._way
        same = 0
        while same < len(way) and same < len(parts) and way[same][0] == parts[same]:
            same += 1
        self._truncate(same)
        if len(parts) > _DEEPEST:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        for part in parts[same:]:
            way.append((part, os.open(part, _INSIDE, dir_fd=way[-1][1] if way else self._root)))
        return way[-1][1] if way else self._root

    def _place(self, path: bytes) -> tuple[int, bytes]:
        """The folder that a path is in, and its name there. Raises OSError, and StreamGone."""
        self._check()
        if not is_safe(path):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        parent, _, name = path.rpartition(b"/")
        return self._inside(parent), name

    def _around(self, path: bytes) -> int:
        """The folder that a path is in, or minus the errno why it can't be opened. Raises StreamGone."""
        try:
            return self._place(path)[0]
        except OSError as error:
            return -(error.errno or errno.EIO)

    def _forget(self) -> None:
        if self._open is not None:
            os.close(self._open[2])
            self._open = None

    def _file(self, path: bytes, writes: bool) -> int:
        """A regular file, which stays open until another is asked for. Raises OSError."""
        if self._open is not None and self._open[0] == path and self._open[1] == writes:
            return self._open[2]
        self._forget()
        folder, name = self._place(path)
        opened = os.open(name, _FILE | (os.O_RDWR if writes else os.O_RDONLY), dir_fd=folder)
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            os.close(opened)
            raise OSError(errno.EINVAL, _NO_FILE)
        self._open = path, writes, opened
        return opened

    # -- reading -----------------------------------------------------------------------------------------------

    def entries(self, path: bytes) -> Iterator[list[Entry]]:
        with _told():
            if self.only is not None and not path:
                path = self.only
            if path:
                folder, name = self._place(path)
                entry = _entry(path, os.stat(name, dir_fd=folder, follow_symlinks=False), folder, name)
            else:
                entry = _entry(b"", os.fstat(self._root), self._root, b"")
        names = list(self._names(path)) if entry.kind == "d" else []
        yield [entry]
        for folder_path, inside in names:
            yield from self._looked_at(folder_path, inside)

    def _names(self, path: bytes) -> Iterator[tuple[bytes, list[bytes] | OSError]]:
        """Each folder from a path on, and the names in it, or why there are none."""
        folders = [path]
        while folders:
            self._check()
            here = folders.pop()
            try:
                names, below = _files.names_in(self._inside(here))
            except OSError as error:
                yield here, error
                continue
            yield here, names
            prefix = here + b"/" if here else b""
            folders.extend(prefix + name for name in reversed(below))

    def _looked_at(self, path: bytes, names: list[bytes] | OSError) -> Iterator[list[Entry]]:
        """What the names in a folder are."""
        prefix = path + b"/" if path else b""
        try:
            if isinstance(names, OSError):
                raise names
            for start in range(0, len(names), _TOGETHER):
                self._check()
                # Whoever takes these may ask for another folder before the next.
                yield _files.entries_of(self._inside(path), prefix, names[start : start + _TOGETHER])
        except OSError as error:
            yield [Entry(path, "e", target=os.fsencode(error.strerror or str(error)))]

    def segments(self, path: bytes) -> list[tuple[int, int]]:
        found = []
        with _told():
            opened = self._file(path, False)
            end = os.fstat(opened).st_size
            at = 0
            while at < end:
                try:
                    data = os.lseek(opened, at, os.SEEK_DATA)
                except OSError as error:
                    if error.errno == errno.ENXIO:
                        break
                    raise
                at = os.lseek(opened, data, os.SEEK_HOLE)
                found.append((data, at - data))
        return found

    def _piece(self, path: bytes, offset: int, length: int) -> memoryview:
        opened = self._file(path, False)
        view = memoryview(self._buffer)[:length]
        # A regular file gives all that was asked for, or ends.
        return view[: os.preadv(opened, [view], offset)]

    def read(self, path: bytes, offset: int, length: int, then: Told[memoryview]) -> None:
        try:
            piece = self._piece(path, offset, length)
        except OSError as error:
            then(_error(error))
            return
        then(piece)

    def get(self, batch: Batch, then: Told[Contents]) -> None:
        failed: dict[int, FileError] = {}
        size = sum(entry.size for entry, _ in batch) + EACH * len(batch)
        if len(self._contents) < size:
            self._contents = bytearray(size)
        start = at = 0
        while start < len(batch):
            folder = self._around(batch[start][0].path)
            start, at, some = _files.read_batch(batch, start, folder, self._contents, at)
            failed.update((number, _error(_reason(code))) for number, code in some)
        then(Contents(memoryview(self._contents)[:at], failed))

    def sums(self, path: bytes, offset: int, length: int, then: Told[list[int]]) -> None:
        sums = []
        try:
            for at in range(offset, offset + length, PIECE):
                piece = self._piece(path, at, min(PIECE, offset + length - at))
                if not piece:
                    break
                sums.append(crc32(piece))
        except OSError as error:
            then(_error(error))
            return
        then(sums)

    # -- writing -----------------------------------------------------------------------------------------------

    def put(self, batch: Batch, contents: Contents, then: Told[Written], *, owner: bool, beside: bool) -> None:
        failed: dict[int, FileError] = {}
        not_owner = start = at = 0
        while start < len(batch):
            folder = self._around(batch[start][1])
            start, at, some, left = _files.write_batch(batch, start, folder, contents.data, at, owner, beside)
            not_owner += some
            failed.update((number, _error(_reason(code))) for number, code in left)
        then(Written(failed, not_owner))

    def part(self, path: bytes, size: int, then: Done) -> None:
        try:
            taken = Answer.BEFORE if self._has_part(path) else Answer.ALL
            if taken == Answer.ALL:
                folder, name = self._place(path)
                os.close(os.open(name, os.O_RDWR | _NEW, 0o600, dir_fd=folder))
            os.ftruncate(self._file(path, True), size)
        except OSError as error:
            then(_error(error))
            return
        then(taken)

    def _has_part(self, path: bytes) -> bool:
        """Whether there is one that is ours alone. Another user's, who would go on having it, is taken away."""
        try:
            about = os.fstat(self._file(path, True))
        except FileNotFoundError:
            return False
        if about.st_uid == os.geteuid() and about.st_nlink == 1:
            return True
        self._forget()
        folder, name = self._place(path)
        os.unlink(name, dir_fd=folder)
        return False

    def write(self, path: bytes, offset: int, data: memoryview, then: Done) -> None:
        try:
            _write_all(self._file(path, True), data, offset)
        except OSError as error:
            then(_error(error))
            return
        then(Answer.ALL)

    def finish(self, part: bytes, path: bytes, attributes: Attributes, then: Done) -> None:
        try:
            taken = _give(self._file(part, True), attributes)
            self._forget()
            folder, name = self._place(path)
            os.rename(part.rpartition(b"/")[2], name, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError as error:
            then(_error(error))
            return
        then(taken)

    def folder(self, path: bytes, then: Done) -> None:
        try:
            self._make_folder(*self._place(path))
        except OSError as error:
            then(_error(error))
            return
        then(Answer.ALL)

    def _make_folder(self, folder: int, name: bytes) -> None:
        try:
            os.mkdir(name, 0o700, dir_fd=folder)
            return
        except FileExistsError:
            about = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISDIR(about.st_mode):
            os.unlink(name, dir_fd=folder)
            os.mkdir(name, 0o700, dir_fd=folder)
        elif about.st_mode & 0o700 != 0o700:  # nothing could be written there; it gets its own mode at the end
            opened = os.open(name, _INSIDE, dir_fd=folder)
            try:
                os.fchmod(opened, stat.S_IMODE(about.st_mode) | 0o700)
            finally:
                os.close(opened)

    def symlink(self, path: bytes, target: bytes, attributes: Attributes, then: Done) -> None:
        try:
            folder, name = self._place(path)
            try:
                os.symlink(target, name, dir_fd=folder)
            except FileExistsError:
                os.unlink(name, dir_fd=folder)
                os.symlink(target, name, dir_fd=folder)
            taken = Answer.ALL
            if attributes.owner is not None:
                try:
                    os.chown(name, *attributes.owner, dir_fd=folder, follow_symlinks=False)
                except (OSError, OverflowError):
                    taken = Answer.NOT_OWNER
            with contextlib.suppress(OSError, NotImplementedError):
                os.utime(name, ns=(attributes.mtime, attributes.mtime), dir_fd=folder, follow_symlinks=False)
        except OSError as error:
            then(_error(error))
            return
        then(taken)

    def link(self, path: bytes, existing: bytes, then: Done) -> None:
        try:
            folder, name = self._place(existing)
            folder = os.dup(folder)
            try:
                self._link(folder, name, path)
            finally:
                os.close(folder)
        except OSError as error:
            then(_error(error))
            return
        then(Answer.ALL)

    def _link(self, folder: int, name: bytes, path: bytes) -> None:
        about = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISREG(about.st_mode):
            raise OSError(errno.EINVAL, _NO_FILE)
        to, new = self._place(path)
        try:
            os.link(name, new, src_dir_fd=folder, dst_dir_fd=to, follow_symlinks=False)
        except FileExistsError:
            there = os.stat(new, dir_fd=to, follow_symlinks=False)
            if (there.st_dev, there.st_ino) != (about.st_dev, about.st_ino):
                os.unlink(new, dir_fd=to)
                os.link(name, new, src_dir_fd=folder, dst_dir_fd=to, follow_symlinks=False)

    def attributes(self, path: bytes, attributes: Attributes, then: Done) -> None:
        try:
            if path:
                folder, name = self._place(path)
                opened = os.open(name, os.O_RDONLY | _FILE, dir_fd=folder)
            else:
                opened = os.dup(self._root)
            try:
                taken = _give(opened, attributes)
            finally:
                os.close(opened)
        except OSError as error:
            then(_error(error))
            return
        then(taken)

    def remove(self, path: bytes, folder: bool, then: Done) -> None:
        self._forget()
        try:
            parent, name = self._place(path)
            (os.rmdir if folder else os.unlink)(name, dir_fd=parent)
        except OSError as error:
            then(_error(error))
            return
        then(Answer.ALL)


def _entry(path: bytes, about: os.stat_result, folder: int, name: bytes) -> Entry:
    mode, kind, target = stat.S_IMODE(about.st_mode), stat.S_IFMT(about.st_mode), b""
    if kind == stat.S_IFREG:
        link = (about.st_dev, about.st_ino) if about.st_nlink > 1 else None
        sparse = about.st_blocks * 512 < about.st_size
        return Entry(path, "f", mode, about.st_uid, about.st_gid, about.st_mtime_ns, about.st_size, sparse, link)
    letter = "d" if kind == stat.S_IFDIR else "o"
    if kind == stat.S_IFLNK:
        letter, target = "l", os.readlink(name, dir_fd=folder)
    return Entry(path, letter, mode, about.st_uid, about.st_gid, about.st_mtime_ns, target=target)


def _write_all(opened: int, data: memoryview, offset: int) -> None:
    done = os.pwrite(opened, data, offset)
    while done < len(data):
        done += os.pwrite(opened, data[done:], offset + done)


def _give(opened: int, attributes: Attributes) -> int:
    """The owner first: who gives a file away takes its special bits."""
    taken, mode = Answer.ALL, attributes.mode
    if attributes.owner is not None:
        try:
            os.fchown(opened, *attributes.owner)
        except (OSError, OverflowError):
            taken, mode = Answer.NOT_OWNER, mode & 0o1777
    os.fchmod(opened, mode)
    os.utime(opened, ns=(attributes.mtime, attributes.mtime))
    return taken
