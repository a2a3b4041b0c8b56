"""Unix sockets by their paths (unix(7)): how a long one is named, and whether somebody listens there."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from kohakuriver.errors import UsageError

__all__ = ["address_of", "is_left"]

_LONGEST = 100  # bytes of a path that every system takes: 107 on Linux, 103 on macOS


@contextlib.contextmanager
def address_of(path: Path) -> Iterator[str]:
    """What `path` is called where it is bound or connected to: long paths have no room in a socket's address.

    Raises UsageError where there is no shorter name for it, and OSError where there is no such directory.
    """
    if len(os.fsencode(path)) <= _LONGEST:
        yield str(path)
        return
    if not Path("/proc/self/fd").is_dir():
        raise UsageError(f"The path of {path} is too long for a socket; choose a shorter one.")
    # To pass a directory takes less than to read it; not every system can open one just for that.
    directory = os.open(path.parent, getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def is_left(path: Path) -> bool:
    """Whether `path` is a socket on which nobody listens any more."""
    with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
        sock.setblocking(False)
        with address_of(path) as address:
            return sock.connect_ex(address) == errno.ECONNREFUSED and path.is_socket()
    return False
