"""Why a connection could not be made: a lack of the program's own is told as that, and passes."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from kohakuriver.errors import HostUnreachableError, UnavailableError
from kohakuriver.host.services.runner_client import RunnerClient
from kohakuriver.no_connection import own_lack, reason
from kohakuriver.session.carried import Route, at_runner
from kohakuriver.store import Node
from kohakuriver.tls import trusted_at
from kohakuriver.tunnel.dial import Server, open_session
from tests.support.descriptors import without_descriptors

Run = Callable[[Coroutine[Any, Any, None]], None]


@contextlib.contextmanager
def nobody_listens() -> Iterator[str]:
    """An address at which every connection is refused."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


async def _by_session(address: str) -> str:
    url = f"ws://{address}"
    with pytest.raises(UnavailableError) as caught, at_runner(Route(url, "c1", None, task="web", node="n1")):
        await open_session(Server(f"{url}/ws/forward/c1/80", peer="runner"))
    return _told(caught.value)


async def _by_request(address: str) -> str:
    runners = RunnerClient(trusted_at("http:"))
    try:
        node = Node(name="n1", url=f"http://{address}", ticket_key=os.urandom(32))
        with pytest.raises(UnavailableError) as caught:
            await runners.call(node, "GET", "/api/node", container="c1")
        return _told(caught.value)
    finally:
        await runners.close()


def _told(error: UnavailableError) -> str:
    assert (error.code, error.status, error.exit_code) == ("runner_unreachable", 502, 4)
    return error.message


@pytest.mark.parametrize("ask", [_by_session, _by_request])
def test_a_node_that_can_not_be_reached_is_told_in_one_sentence_whatever_was_wanted_of_it(
    run: Run, ask: Callable[[str], Coroutine[Any, Any, str]]
) -> None:
    async def main() -> None:
        with nobody_listens() as address:
            assert await ask(address) == (
                "The host can't reach node n1: Connection refused; check that its runner runs and that the host can "
                "use its address (`kohakuriver runner --advertise-url`)."
            )

    run(main())


@pytest.mark.parametrize("ask", [_by_session, _by_request])
def test_a_host_without_descriptors_says_that_it_is_the_one_who_lacks_something_and_goes_on(
    run: Run, ask: Callable[[str], Coroutine[Any, Any, str]]
) -> None:
    async def main() -> None:
        with nobody_listens() as address:
            with without_descriptors():
                told = await ask(address)
            assert told == (
                "The host has too many open files and can't reach node n1; try again, or ask its administrator."
            )
            assert "n1: Connection refused" in await ask(address)

    run(main())


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_a_program_without_descriptors_says_so_of_itself_also_where_a_name_is_to_be_resolved(
    run: Run, name: str
) -> None:
    async def main() -> None:
        with nobody_listens() as address:
            server = Server(f"ws://{name}:{address.rpartition(':')[2]}/ws/forward/web/80")
            with without_descriptors(), pytest.raises(HostUnreachableError) as caught:
                await open_session(server)
            assert caught.value.message == (
                f"The host at {server.where} can't be reached: this program has too many open files."
            )

    run(main())


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENFILE, "is on a machine with too many open files"),
        (errno.ENOBUFS, "is on a machine out of memory"),
        (errno.EADDRNOTAVAIL, "has no local address or port left for that"),
        (errno.ECONNREFUSED, None),
    ],
)
def test_what_a_program_lacks_is_found_beneath_what_libraries_make_of_it(number: int, words: str | None) -> None:
    wrapped = RuntimeError("no connection")
    wrapped.__cause__ = OSError(number, os.strerror(number))
    assert own_lack(wrapped) == words
    assert reason(wrapped) == (f"this program {words}" if words else "Connection refused")
