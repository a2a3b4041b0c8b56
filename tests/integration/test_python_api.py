"""`kohakuriver.forward` and `forward_sync`, as a script and a notebook use them."""

from __future__ import annotations

import asyncio
import queue
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any

import pytest

import kohakuriver
from tests.support.addresses import free_port, own_address
from tests.support.network.wall import wall
from tests.support.up import Cluster, Service, broken, connect, echoes

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def service(cluster: Cluster) -> Service:
    return cluster.service()


@pytest.fixture(autouse=True)
def settings(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KOHAKURIVER_HOST", raising=False)
    monkeypatch.delenv("KOHAKURIVER_TOKEN", raising=False)
    monkeypatch.setenv("KOHAKURIVER_CONFIG_DIR", str(cluster.directory))


async def echo_through(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"hello")
    answer = await reader.readexactly(5)
    writer.close()
    await writer.wait_closed()
    return answer


def test_a_forward_is_open_inside_its_block(run: Run, service: Service) -> None:
    async def main() -> None:
        async with kohakuriver.forward(service.task, service.port) as fwd:
            assert fwd.url("http") == f"http://127.0.0.1:{fwd.local_port}"
            assert await echo_through(fwd.local_port) == b"hello"
            assert fwd.stats().opened == 1
            port = fwd.local_port
        with pytest.raises(ConnectionRefusedError):
            await echo_through(port)

    run(main())


def test_several_ports_are_told_apart_by_their_remote_port(run: Run, cluster: Cluster, service: Service) -> None:
    other = cluster.service()

    async def main() -> None:
        async with kohakuriver.forward(service.task, [service.port, f"0:{other.port}"]) as fwd:
            assert set(fwd.local_ports) == {service.port, other.port}
            assert await echo_through(fwd.local_ports[other.port]) == b"hello"
            assert fwd.url("ws", other.port) == f"ws://127.0.0.1:{fwd.local_ports[other.port]}"
            with pytest.raises(kohakuriver.UsageError):
                fwd.url("http", 1)

    run(main())


def test_a_port_of_the_task_leads_back_here_and_another_address_is_reached_beside_its_own_ports(
    run: Run, cluster: Cluster, service: Service
) -> None:
    async def hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(5))
        writer.close()

    async def main() -> None:
        async with await asyncio.start_server(hello, "127.0.0.1", 0) as here:
            back = free_port()
            to = f"{back}:{here.sockets[0].getsockname()[1]}"
            async with kohakuriver.forward(service.task, service.port, reverse=to, wait=30) as fwd:
                assert await echo_through(back) == b"hello"  # a process task's loopback is this machine's
                assert await echo_through(fwd.local_port) == b"hello"
            back = free_port()  # the task lets go of the other one soon, and not at once
            to = f"{back}:{here.sockets[0].getsockname()[1]}"
            async with kohakuriver.forward(service.task, reverse=[to]) as only:
                assert await echo_through(back) == b"hello"
                assert repr(only) == f"<forward from {service.task}>"
                with pytest.raises(kohakuriver.UsageError, match="no local port"):
                    only.url()
            address = own_address()
            async with await asyncio.start_server(hello, address, 0) as beyond:
                port = beyond.sockets[0].getsockname()[1]
                async with kohakuriver.forward(service.task, f"0:{address}:{port}") as fwd:
                    assert await echo_through(fwd.local_ports[port]) == b"hello"
        for bad in ({"ports": ()}, {"reverse": "x:y"}, {"reverse": 9, "resume": False}):
            with pytest.raises(kohakuriver.UsageError):
                kohakuriver.forward(service.task, **bad)

    run(main())


def test_the_sync_twin_needs_no_loop(service: Service) -> None:
    threads = threading.active_count()
    with kohakuriver.forward_sync(service.task, service.port) as fwd:
        with connect(fwd.local_port) as connection:
            assert echoes(connection)
        assert fwd.stats().opened == 1
    assert threading.active_count() == threads


def test_the_sync_twin_works_where_a_loop_runs_already_as_in_a_notebook(run: Run, service: Service) -> None:
    async def cell() -> None:
        with kohakuriver.forward_sync(service.task, service.port) as fwd:
            assert await echo_through(fwd.local_port) == b"hello"

    run(cell())


def test_a_forward_that_is_awaited_stays_open_until_it_is_closed(run: Run, service: Service) -> None:
    async def cells() -> None:
        fwd = await kohakuriver.forward(service.task, service.port)
        assert repr(fwd) == f"<forward to {service.task}: http://127.0.0.1:{fwd.local_port}>"
        assert await echo_through(fwd.local_port) == b"hello"
        port = fwd.local_port
        assert await fwd is fwd
        await fwd.close()
        await fwd.close()
        with pytest.raises(ConnectionRefusedError):
            await echo_through(port)
        with pytest.raises(kohakuriver.UsageError):
            fwd.url()

    run(cells())


def test_the_sync_twin_is_opened_and_closed_by_hand_where_no_block_fits(service: Service) -> None:
    threads = threading.active_count()
    fwd = kohakuriver.forward_sync(service.task, service.port).open()
    assert fwd.open() is fwd
    with connect(fwd.local_port) as connection:
        assert echoes(connection)
    fwd.close()
    fwd.close()
    assert threading.active_count() == threads


def test_two_forwards_in_one_program_are_independent(run: Run, service: Service) -> None:
    async def main() -> None:
        async with kohakuriver.forward(service.task, service.port) as kept:
            async with kohakuriver.forward(service.task, service.port) as ended:
                assert await echo_through(ended.local_port) == b"hello"
            assert await echo_through(kept.local_port) == b"hello"

    run(main())


def test_each_failure_has_its_exception(run: Run, cluster: Cluster, service: Service) -> None:
    cluster.succeed("vps", "create", "--name", "stopped", "--backend", "process")
    cluster.succeed("vps", "stop", "stopped")
    with socket.socket() as nobody, socket.create_server(("127.0.0.1", 0)) as taken:
        nobody.bind(("127.0.0.1", 0))
        host = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        cases: list[tuple[type[kohakuriver.KohakuRiverError], Callable[[], kohakuriver.Forward]]] = [
            (kohakuriver.NotFoundError, lambda: kohakuriver.forward("nobody", 80)),
            (kohakuriver.UnavailableError, lambda: kohakuriver.forward("stopped", 80)),
            (kohakuriver.UnauthenticatedError, lambda: kohakuriver.forward(service.task, 80, token="wrong")),
            (kohakuriver.HostUnreachableError, lambda: kohakuriver.forward(service.task, 80, host=host)),
            (
                kohakuriver.LocalAddressError,
                lambda: kohakuriver.forward(service.task, 80, local_port=taken.getsockname()[1]),
            ),
        ]
        for cls, make in cases:

            async def enter(make: Callable[[], kohakuriver.Forward] = make) -> None:
                async with make():
                    raise AssertionError("it opened")

            with pytest.raises(cls) as caught:
                run(enter())
            assert type(caught.value) is cls


def test_a_sync_forward_that_fails_leaves_no_thread(service: Service) -> None:
    threads = threading.active_count()
    with pytest.raises(kohakuriver.NotFoundError):
        with kohakuriver.forward_sync("nobody", 80):
            raise AssertionError("it opened")
    assert threading.active_count() == threads


def test_a_forward_says_when_its_task_is_gone(run: Run, cluster: Cluster) -> None:
    service = cluster.service()

    async def main() -> None:
        async with kohakuriver.forward(service.task, service.port) as fwd:
            removing = cluster.start("vps", "rm", service.task)
            with pytest.raises(kohakuriver.NotFoundError):
                await asyncio.wait_for(fwd.wait(), 30)
            removing.ended()

    run(main())


def test_events_are_told(run: Run, service: Service) -> None:
    events: list[str] = []

    async def main() -> None:
        async with kohakuriver.forward(service.task, service.port, on_event=lambda event: events.append(event.event)):
            pass

    run(main())
    # Two addresses are listened on, 127.0.0.1 and ::1, where both can be had.
    # Which path is taken may be known before the end, or not.
    assert [each for each in dict.fromkeys(events) if each != "path"] == ["connected", "listening", "stats", "closed"]


@pytest.mark.parametrize("resume", [True, False])
def test_connections_wait_for_a_network_that_went_as_on_the_command_line(
    cluster: Cluster, service: Service, resume: bool
) -> None:
    said: queue.Queue[kohakuriver.Event] = queue.Queue()
    make = kohakuriver.forward_sync if resume else partial(kohakuriver.forward_sync, resume=False)
    token = (cluster.directory / "state" / "admin-token").read_text().strip()
    with wall(int(cluster.ready["host_url"].rpartition(":")[2])) as between:
        at = f"http://127.0.0.1:{between.port}"
        with make(service.task, service.port, host=at, token=token, on_event=said.put) as fwd:
            with connect(fwd.local_port) as connection:
                assert echoes(connection)
                between.cut()
                while said.get(timeout=20).event != "reconnecting":
                    pass
                between.open()
                assert echoes(connection) if resume else broken(connection)
