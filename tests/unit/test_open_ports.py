"""Which ports listen in a task: what a runner asks a tunnel client, and what it makes of the answer."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.typing import Subprotocol

from kohakuriver.errors import UnavailableError
from kohakuriver.relay import open_ports
from kohakuriver.relay.open_ports import OpenPorts, TaskSockets
from kohakuriver.runner.services.state import State, TaskRecord
from kohakuriver.runner.services.task_book import TaskBook
from kohakuriver.tunnel.protocol import (
    CONNECT,
    PORTS,
    PROTO_TCP,
    PROTO_UDP,
    SESSION_ID,
    TUNNEL_V2,
    BoundPort,
    PortsAnswer,
    PortScope,
    PortsQuestion,
)
from tests.support.hops import CONTAINER, Chain, chain, until
from tests.vectors import generate

Run = Callable[[Coroutine[Any, Any, None]], None]

ANYWHERE, LOOPBACK = ipaddress.ip_address("0.0.0.0"), ipaddress.ip_address("127.0.0.1")
NONSENSE = [
    (vector["name"], bytes.fromhex(vector["hex"]))
    for vector in json.loads((generate.HERE / "ports.json").read_text("utf-8"))
    if vector["what"] == "answer" and vector["fields"] is None
]


class Client:
    """A tunnel client that answers every question for ports with what a test has it say."""

    def __init__(self, socket: ClientConnection, answer: Callable[[int], bytes]) -> None:
        self.socket = socket
        self.answer = answer
        self.questions: list[PortsQuestion] = []
        self.heard: list[int] = []

    async def serve(self) -> None:
        with contextlib.suppress(Exception):
            async for message in self.socket:
                assert isinstance(message, bytes)
                self.heard.append(message[0])
                if message[0] == PORTS:
                    question = PortsQuestion.parse(message[8:])
                    assert question is not None
                    self.questions.append(question)
                    if answer := self.answer(question.number):
                        await self.say(answer)

    async def say(self, payload: bytes) -> None:
        await self.socket.send(bytes([PORTS, 0, 0, 0, 0, 0, 0, 0]) + payload)


def told(*ports: BoundPort, more: bool = False) -> Callable[[int], bytes]:
    return lambda number: PortsAnswer(number, more, list(ports)).pack()


def silent(number: int) -> bytes:
    return b""


class Runner:
    """The hops, and what a runner knows of one task."""

    def __init__(self, hops: Chain, directory: Path, sockets: TaskSockets, **task: Any) -> None:
        self.hops = hops
        self.book = TaskBook(State(directory), lambda: None)
        about = {"task_id": 1, "container": CONTAINER, "name": "web", "backend": "docker", "status": "running"}
        self.book.add(TaskRecord(**{**about, **task}))

        async def of_task(_: TaskRecord) -> TaskSockets:
            return sockets

        self.ports = OpenPorts(self.book.get, of_task, hops.server.hub.tunnel_of)

    async def ask(self) -> dict[str, Any]:
        return await self.ports.of(CONTAINER)

    async def why_not(self) -> UnavailableError:
        with pytest.raises(UnavailableError) as error:
            await self.ask()
        return error.value


@contextlib.asynccontextmanager
async def a_client(
    directory: Path, answer: Callable[[int], bytes], sockets: TaskSockets | None = None, **task: Any
) -> AsyncIterator[tuple[Runner, Client]]:
    async with chain() as hops:
        url = f"ws://127.0.0.1:{hops.runner_port}/ws/tunnel/{CONTAINER}"
        async with connect(url, subprotocols=[Subprotocol(TUNNEL_V2)]) as socket:
            await hops.changed(CONTAINER, True)
            client = Client(socket, answer)
            serving = asyncio.ensure_future(client.serve())
            yield Runner(hops, directory, sockets or TaskSockets(), **task), client
            serving.cancel()


def test_what_a_client_tells_is_in_order_once_and_without_what_we_have_put_in(run: Run, tmp_path: Path) -> None:
    answer = told(
        BoundPort(PROTO_UDP, 53, ipaddress.ip_address("::1"), b"named"),
        BoundPort(PROTO_TCP, 8888, ANYWHERE, b"python3"),
        BoundPort(PROTO_TCP, 8888, ANYWHERE, b"python3"),
        BoundPort(PROTO_TCP, 62022, LOOPBACK, b"tunnel-sshd"),
        BoundPort(PROTO_TCP, 62022, ANYWHERE, b"mine"),
        BoundPort(PROTO_TCP, 41000, ipaddress.ip_address("127.0.0.11")),
        BoundPort(PROTO_TCP, 22, ANYWHERE),
        more=True,
    )

    async def check() -> None:
        sockets = TaskSockets(PortScope.OWN, b"RUN=1", hidden={"127.0.0.11"})
        async with a_client(tmp_path, answer, sockets, ssh_port=62022) as (runner, client):
            assert await runner.ask() == {
                "ports": [
                    {"port": 22, "proto": "tcp", "address": "0.0.0.0", "program": None},
                    {"port": 53, "proto": "udp", "address": "::1", "program": "named"},
                    {"port": 8888, "proto": "tcp", "address": "0.0.0.0", "program": "python3"},
                    {"port": 62022, "proto": "tcp", "address": "0.0.0.0", "program": "mine"},
                ],
                "more": True,
            }
            assert [each[1:] for each in client.questions] == [(PortScope.OWN, b"RUN=1")]

    run(check())


def test_a_name_that_a_terminal_would_obey_is_cut_and_shown_as_escapes(run: Run, tmp_path: Path) -> None:
    names = (b"\x1b[2J\xff", b"a\nb", b"x" * 64)

    async def check() -> None:
        ports = [BoundPort(PROTO_TCP, number, ANYWHERE, name) for number, name in enumerate(names, 1)]
        async with a_client(tmp_path, told(*ports)) as (runner, _):
            found = [port["program"] for port in (await runner.ask())["ports"]]
            assert found == ["\\x1b[2J\ufffd", "a\\nb", "x" * open_ports.LONGEST_NAME]

    run(check())


def test_what_nobody_asked_for_is_not_even_parsed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[int] = []
    parse = PortsAnswer.parse

    def counted(payload: bytes) -> PortsAnswer | None:
        parsed.append(len(payload))
        return parse(payload)

    async def check() -> None:
        async with a_client(tmp_path, told(BoundPort(PROTO_TCP, 80, ANYWHERE))) as (runner, client):
            monkeypatch.setattr(PortsAnswer, "parse", counted)
            for _ in range(100):
                await client.say(told(BoundPort(PROTO_TCP, 81, ANYWHERE))(12345))
            assert [port["port"] for port in (await runner.ask())["ports"]] == [80]
            assert len(parsed) == 1

    run(check())


@pytest.mark.parametrize("payload", [each for _, each in NONSENSE], ids=[name for name, _ in NONSENSE])
def test_an_answer_that_makes_no_sense_is_one_sentence_and_the_tunnel_goes_on(
    run: Run, tmp_path: Path, payload: bytes
) -> None:
    async def check() -> None:
        async with a_client(tmp_path, lambda number: number.to_bytes(4, "big") + payload[4:]) as (runner, client):
            error = await runner.why_not()
            assert (error.code, error.status) == ("ports_unknown", 409)
            assert "an answer that makes no sense" in error.message
            client.answer = told(BoundPort(PROTO_TCP, 80, ANYWHERE))
            assert [port["port"] for port in (await runner.ask())["ports"]] == [80]

    run(check())


def test_an_answer_that_nobody_asked_for_or_to_another_question_is_nobodys(run: Run, tmp_path: Path) -> None:
    wrong, right = BoundPort(PROTO_TCP, 1, ANYWHERE), BoundPort(PROTO_TCP, 2, ANYWHERE)

    async def check() -> None:
        async with a_client(tmp_path, silent) as (runner, client):
            await client.say(PortsAnswer(1, False, [wrong]).pack())
            asking = asyncio.ensure_future(runner.ask())
            await until(lambda: len(client.questions) == 1)
            number = client.questions[0].number
            await client.say(PortsAnswer(number + 1, False, [wrong]).pack())
            await client.say(PortsAnswer(number, False, [right]).pack())
            await client.say(PortsAnswer(number, False, [wrong]).pack())
            assert [port["port"] for port in (await asking)["ports"]] == [2]

    run(check())


def test_many_who_ask_within_a_second_cost_one_look_and_later_ones_another(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        async with a_client(tmp_path, told(BoundPort(PROTO_TCP, 80, ANYWHERE))) as (runner, client):
            answers = await asyncio.gather(*(runner.ask() for _ in range(50)))
            assert all(answer == answers[0] for answer in answers)
            await runner.ask()
            assert len(client.questions) == 1

    run(check())
    monkeypatch.setattr(open_ports, "FRESH_SECONDS", 0.0)

    async def later() -> None:
        async with a_client(tmp_path, told()) as (runner, client):
            while len(client.questions) < 3:
                await runner.ask()
                await asyncio.sleep(0)

    run(later())


def test_one_who_asks_no_longer_takes_nothing_from_the_others(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_client(tmp_path, silent) as (runner, client):
            first, second = asyncio.ensure_future(runner.ask()), asyncio.ensure_future(runner.ask())
            await until(lambda: len(client.questions) == 1)
            first.cancel()
            await client.say(told(BoundPort(PROTO_TCP, 80, ANYWHERE))(client.questions[0].number))
            assert [port["port"] for port in (await second)["ports"]] == [80]

    run(check())


def test_a_client_that_is_silent_or_goes_away_is_one_sentence_and_is_asked_anew(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kohakuriver.relay.legs.PORTS_SECONDS", 0.05)

    async def check() -> None:
        async with a_client(tmp_path, silent) as (runner, client):
            error = await runner.why_not()
            assert (error.code, error.status) == ("no_answer", 504)
            assert "did not say within" in error.message
            client.answer = told()
            assert await runner.ask() == {"ports": [], "more": False}

    run(check())
    monkeypatch.setattr("kohakuriver.relay.legs.PORTS_SECONDS", 30.0)

    async def goes() -> None:
        async with a_client(tmp_path, silent) as (runner, client):
            asking = asyncio.ensure_future(runner.why_not())
            await until(lambda: len(client.questions) == 1)
            await client.socket.close()
            assert "went away while it was asked" in (await asking).message
            assert (await runner.why_not()).code == "tunnel_not_connected"

    run(goes())


def test_a_client_of_version_1_is_not_asked(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with chain() as hops:
            async with connect(f"ws://127.0.0.1:{hops.runner_port}/ws/tunnel/{CONTAINER}") as socket:
                await hops.changed(CONTAINER, True)
                error = await Runner(hops, tmp_path, TaskSockets()).why_not()
                assert error.message == (
                    "The tunnel client of task web is of version 1 and can't tell which ports listen; forward one by "
                    "its number."
                )
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(socket.recv(), 0.05)

    run(check())


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ({"backend": "address", "address": "192.0.2.1"}, "kohakuriver vps agent-command web"),
        ({"no_client": True}, "runs no tunnel client that could look"),
        ({}, "The tunnel of task web is not connected"),
    ],
)
def test_a_task_without_a_tunnel_client_says_why_nobody_knows(
    run: Run, tmp_path: Path, task: dict[str, Any], sentence: str
) -> None:
    async def check() -> None:
        async with chain() as hops:
            error = await Runner(hops, tmp_path, TaskSockets(), **task).why_not()
            assert sentence in error.message
            assert error.exit_code == 4

    run(check())


def test_a_user_can_not_have_a_client_look(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_client(tmp_path, told()) as (runner, client):
            user = await runner.hops.user()
            assert user.link is not None
            user.link.send_message(PORTS, SESSION_ID, PortsQuestion(1).pack())
            user.link.send_message(CONNECT, 1, bytes(8), port=80)
            await until(lambda: bool(client.heard))
            assert client.heard == [CONNECT]

    run(check())
