"""Names of machines and their addresses: looked up so that nobody has to wait for a name server that says nothing.

The system's own look-up can't be interrupted, and neither a program nor an event loop ends before it does. Here a
thread waits for it that nothing else waits for.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

__all__ = ["InterruptibleNames", "ascii_named", "connected", "joined", "resolving"]

Found = list[tuple[Any, ...]]

LOOK_EVERY = 0.1  # seconds


@contextlib.contextmanager
def resolving() -> Iterator[None]:
    """Stands around whatever resolves a name. Raises `socket.gaierror`, an OSError, for one that can't be a name.

    Python raises UnicodeError for such a name, where for others it raises OSError. It has an empty label (`a..b`), or
    one of more than 63 characters (RFC 1035 section 2.3.4).
    """
    try:
        yield
    except UnicodeError as error:
        raise socket.gaierror(socket.EAI_NONAME, "this can't be the name of a machine") from error


def ascii_named(url: str) -> str:
    """`url` with its machine's name as name servers know it (IDNA, RFC 3490); our libraries differ in what they take.

    Raises ValueError where no name comes of it.
    """
    if url.isascii():
        return url
    parts = urlsplit(url)
    before, at, place = parts.netloc.rpartition("@")
    name, colon, port = place.partition(":")
    return parts._replace(netloc=f"{before}{at}{name.encode('idna').decode()}{colon}{port}").geturl()


def joined(thread: threading.Thread) -> None:
    """Wait for the end of `thread`, as `join`, but so that Ctrl-C always ends the wait.

    `join` can miss it: a signal that comes just before the wait begins, or that another thread gets, wakes nobody.
    """
    while thread.is_alive():
        thread.join(LOOK_EVERY)


class _LookUp(threading.Thread):
    """`socket.getaddrinfo(*asked)`; calls `told` on its own thread when there is a result."""

    def __init__(self, asked: tuple[Any, ...], told: Callable[[], object] = lambda: None) -> None:
        super().__init__(daemon=True)
        self._asked = asked
        self._told = told
        self._found: Found = []
        self._failure: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._found = socket.getaddrinfo(*self._asked)
        except Exception as failure:
            self._failure = failure
        with contextlib.suppress(RuntimeError):  # the loop that asked may be closed by now
            self._told()

    def result(self) -> Found:
        """What it found; what it raised is raised."""
        joined(self)
        if self._failure is not None:
            raise self._failure
        return self._found


class InterruptibleNames:
    """For an event loop: what it looks up can be cancelled, and holds up neither its end nor the program's."""

    async def getaddrinfo(
        self,
        host: Any,
        port: Any,
        *,
        family: int = 0,
        type: int = 0,  # noqa: A002  # as the loop's own
        proto: int = 0,
        flags: int = 0,
    ) -> Found:
        """As `socket.getaddrinfo`."""
        import asyncio  # which the programs that ssh starts can do without

        loop, told = asyncio.get_running_loop(), asyncio.Event()
        looking = _LookUp((host, port, family, type, proto, flags), lambda: loop.call_soon_threadsafe(told.set))
        await told.wait()
        return looking.result()


def connected(host: str, port: int, timeout: float) -> socket.socket:
    """As `socket.create_connection`, which Ctrl-C ends at once. Raises OSError, UnicodeError and OverflowError."""
    failure = OSError(f"{host} has no address")
    for family, kind, proto, _, address in _LookUp((host, port, 0, socket.SOCK_STREAM)).result():
        sock = socket.socket(family, kind, proto)
        sock.settimeout(timeout)
        try:
            sock.connect(address)
        except OSError as error:
            failure = error
            sock.close()
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise failure
