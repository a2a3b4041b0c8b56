"""What `forward --all` makes of a task's ports, as a host tells them."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kohakuriver.client import every_port
from kohakuriver.client.every_port import EveryPort
from kohakuriver.client.forward import Connected, Event, Forwarder, Gone, Listening, PortForward
from kohakuriver.client.host import HostClient, ListeningPort, Ports
from kohakuriver.config import Settings
from kohakuriver.errors import HostUnreachableError, KohakuRiverError, UnavailableError
from tests.support.hops import asked, chain, echo, service, until

Run = Callable[[Coroutine[Any, Any, None]], None]


class Told:
    """What a host says that listens, or why it can't."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answer: Ports | KohakuRiverError = Ports([])
        self.looks = 0
        monkeypatch.setattr(HostClient, "ports", lambda _, task: self._ports())
        monkeypatch.setattr(every_port, "LOOK_EVERY", 0.01)

    async def _ports(self) -> Ports:
        self.looks += 1
        if isinstance(self.answer, KohakuRiverError):
            raise self.answer
        return self.answer

    async def looked(self) -> None:
        """Wait until what is told now was heard, and acted on."""
        looks = self.looks
        await until(lambda: self.looks >= looks + 2)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    return Told(monkeypatch)


def ports(*numbers: int, proto: Any = "tcp", more: bool = False) -> Ports:
    return Ports([ListeningPort(number, proto, "0.0.0.0") for number in numbers], more)


@asynccontextmanager
async def following(*given: PortForward, fallback: bool = False) -> AsyncIterator[tuple[Forwarder, list[Event]]]:
    """A forward of a container's ports that follows them; what it tells."""
    events: list[Event] = []
    async with chain() as hops:
        await hops.tunnel("python")
        settings = Settings(f"http://127.0.0.1:{hops.host_port}")
        forwarder = EveryPort(
            "1", given, settings=settings, local_host="127.0.0.1", fallback=fallback, on_event=events.append
        )
        await forwarder.start()
        try:
            yield forwarder, events
        finally:
            await forwarder.close()


def listened(events: list[Event]) -> list[tuple[int, int | None]]:
    return [(event.remote_port, event.instead_of) for event in events if isinstance(event, Listening)]


def gone(events: list[Event]) -> list[int]:
    return [event.remote_port for event in events if isinstance(event, Gone)]


def test_a_port_has_the_same_number_here_where_that_is_free_and_leads_there(run: Run, told: Told) -> None:
    async def main() -> None:
        async with service(echo) as port:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                number = free.getsockname()[1]
            told.answer = ports(port, number)
            async with following() as (forwarder, events):
                await until(lambda: len(listened(events)) == 2)
                assert sorted(listened(events), key=lambda each: each[0] == number) == [(port, port), (number, None)]
                locals_of = {each.remote_port: each.port for each in forwarder.listening}
                assert locals_of[number] == number
                assert await asked(locals_of[port], b"hello") == b"hello"
                told.answer = ports(port)
                await until(lambda: gone(events) == [number])
                with socket.create_server(("127.0.0.1", number)):
                    pass  # nobody has it any more

    run(main())


def test_a_forward_is_connected_once_all_that_was_found_at_first_has_a_local_port(run: Run, told: Told) -> None:
    async def main() -> None:
        async with service(echo) as port:
            told.answer = ports(port)
            async with following() as (forwarder, events):
                assert [type(event) for event in events] == [Connected, Listening]
                assert [each.remote_port for each in forwarder.listening] == [port]

    run(main())


def test_with_a_fallback_it_is_the_next_free_local_port(run: Run, told: Told) -> None:
    async def main() -> None:
        async with service(echo) as port:
            told.answer = ports(port)
            async with following(fallback=True) as (forwarder, events):
                assert listened(events) == [(port, port)]
                assert port < forwarder.listening[0].port <= port + 100

    run(main())


def test_udp_and_ports_that_were_named_are_left_alone(run: Run, told: Told) -> None:
    async def main() -> None:
        async with service(echo) as port:
            told.answer = Ports([*ports(port).ports, *ports(53, proto="udp").ports])
            async with following(PortForward(0, port)) as (_, events):
                await told.looked()
                assert listened(events) == [(port, None)]
                told.answer = ports()
                await told.looked()
                assert gone(events) == []

    run(main())


def test_while_nobody_knows_what_listens_nothing_changes_but_where_the_task_has_ended(run: Run, told: Told) -> None:
    async def main() -> None:
        async with service(echo) as port:
            told.answer = ports(port)
            async with following() as (_, events):
                await until(lambda: len(listened(events)) == 1)
                for doubt in (
                    HostUnreachableError("The host can't be reached."),
                    UnavailableError("The node is away.", code="node_offline"),
                    ports(more=True),
                ):
                    told.answer = doubt
                    await told.looked()
                    assert gone(events) == []
                told.answer = UnavailableError("Task web is stopped.", code="task_not_running")
                await until(lambda: gone(events) == [port])
                told.answer = ports(port)
                await until(lambda: len(listened(events)) == 2)

    run(main())


def test_a_port_that_comes_back_has_the_local_port_that_it_had(run: Run, told: Told) -> None:
    async def main() -> None:
        async with service(echo) as port:
            told.answer = ports(port)
            async with following() as (forwarder, events):
                await until(lambda: len(listened(events)) == 1)
                local = forwarder.listening[0].port
                assert local != port
                told.answer = ports()
                await until(lambda: gone(events) == [port])
                assert forwarder.listening == []
                told.answer = ports(port)
                await until(lambda: len(listened(events)) == 2)
                assert forwarder.listening[0].port == local

    run(main())


def test_a_first_look_that_fails_is_why_there_is_no_forward(run: Run, told: Told) -> None:
    told.answer = UnavailableError("It can't be known.", code="ports_unknown")

    async def main() -> None:
        with pytest.raises(UnavailableError, match="It can't be known"):
            async with following():
                pass

    run(main())


def test_a_task_that_tells_other_ports_at_each_look_gets_no_more_than_one_look_tells_of(
    run: Run, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(every_port, "MOST_AT_ONCE", 2)

    async def main() -> None:
        async with following() as (forwarder, _):
            for first in (41001, 41101, 41201):
                told.answer = ports(first, first + 1, first + 2, more=True)
                await told.looked()
                assert {local.remote_port for local in forwarder.listening} == {first, first + 1}

    run(main())
