"""The straight path, over real sockets on every hop, while links fail and rights end: nobody notices but the speed."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from kohakuriver.client.forward import Reconnecting, StreamError
from kohakuriver.errors import KohakuRiverError, UnauthenticatedError, UnavailableError
from kohakuriver.limits import Limits
from kohakuriver.tunnel.backoff import Backoff
from kohakuriver.tunnel.dial import Server, open_session
from kohakuriver.tunnel.opener import AGAIN_AFTER
from kohakuriver.tunnel.protocol import (
    CONNECT,
    CONNECTED,
    DATA,
    ERROR,
    MARK,
    OPENER,
    PING,
    PONG,
    PROTO_TERMINAL,
    RESUME,
    RESUMED,
    SESSION_ID,
    STRAIGHT,
    TUNNEL_V2,
    UNKNOWN_TOTAL,
    ErrorText,
    Opening,
    Resuming,
    Roll,
    StraightOffer,
    straight_greeting,
)
from kohakuriver.tunnel.terminal import Start
from tests.adversity.test_revocation import granting
from tests.adversity.test_udp import udp_echo
from tests.support.hops import CLIENTS, CONTAINER, Chain, chain, dial, echo, service, until
from tests.support.peers.cuttable import relay
from tests.support.stage import DIRECT, Stage, stage
from tests.unit.test_relay_kept import Peer, session

Run = Callable[[Coroutine[Any, Any, None]], None]
kinds = pytest.mark.parametrize("kind", [*CLIENTS, DIRECT])
MIB = 1 << 20
AWAY = 2.0
"""Seconds within which connections have left a path that leads nowhere."""


@pytest.fixture(autouse=True)
def _again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The straight path is tried again as soon as it may be, not after a random part of minutes."""
    monkeypatch.setattr(Backoff, "pause", lambda self, at_most=0.0: 0.05)


async def echoed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: bytes) -> None:
    writer.write(text)
    assert await reader.readexactly(len(text)) == text


@contextlib.asynccontextmanager
async def in_use(there: Stage) -> AsyncIterator[None]:
    """Meanwhile something passes: only then another path is looked for."""

    async def use() -> None:
        async with dial(there.port) as connection:
            while True:
                await echoed(*connection, b"in use")
                await asyncio.sleep(0.05)

    using = asyncio.ensure_future(use())
    try:
        yield
    finally:
        using.cancel()
        await asyncio.wait({using})


def untouched(there: Stage) -> None:
    assert not [event for event in there.events if isinstance(event, StreamError)]


class Bulk:
    """A connection through which so much goes both ways at once, with checksums."""

    def __init__(self, size: int) -> None:
        self._piece = os.urandom(MIB)
        self._pieces = size // MIB
        self.done = 0

    async def run(self, port: int) -> None:
        async with dial(port) as (reader, writer):
            sent, back = hashlib.sha256(), hashlib.sha256()

            async def send() -> None:
                for number in range(self._pieces):
                    piece = number.to_bytes(8, "big") + self._piece[8:]
                    sent.update(piece)
                    writer.write(piece)
                    await writer.drain()
                writer.write_eof()

            sending = asyncio.ensure_future(send())
            while data := await reader.read(1 << 18):
                back.update(data)
                self.done += len(data)
            await sending
            assert back.digest() == sent.digest()
            assert self.done == self._pieces * MIB


@kinds
def test_a_forward_goes_straight_and_what_is_open_goes_with_it(run: Run, kind: str) -> None:
    async def main() -> None:
        async with service(echo) as port, stage(kind, port, straight=True) as there, dial(there.port) as mine:
            await echoed(*mine, b"by whichever path")
            await there.goes("direct")
            before = sum(each.passed()[0] for each in there.hops.proxy.sessions)
            await Bulk(8 * MIB).run(there.port)
            await echoed(*mine, b"still the same connection")
            session_of_host = next(iter(there.hops.proxy.sessions))
            assert session_of_host.user.walker.bytes_passed <= before + 1024  # nothing of that came by the host
            assert there.forwarder.stats().direct == 1
            assert there.hops.server.snapshot()["straight"] == 1
            assert there.hops.server.snapshot()["sessions"] == 1
            untouched(there)
        assert len(there.paths) == 1

    run(main())


def test_the_host_writes_one_line_with_all_bytes_of_a_session_that_went_past_it(run: Run) -> None:
    async def main() -> None:
        async with service(echo) as port, stage("rust", port, straight=True) as there:
            await there.goes("direct")
            await Bulk(4 * MIB).run(there.port)
            await there.forwarder.close()
            lines = there.hops.audit.written
            while (line := await lines.get())["event"] != "session_closed":
                pass
            assert 4 * MIB <= line["bytes_to_container"] < 4.2 * MIB
            assert 4 * MIB <= line["bytes_to_user"] < 4.2 * MIB
            assert (line["ended_by"], line["code"]) == ("user", 1000)
            assert lines.empty()
            await until(lambda: not there.hops.server.hub.sessions)
            await there.hops.at_rest()

    run(main())


@kinds
@pytest.mark.parametrize("how", ["cut", "freeze"])
def test_when_the_straight_path_fails_all_goes_on_through_the_host_within_2_s_and_comes_back(
    run: Run, kind: str, how: str
) -> None:
    async def main() -> None:
        async with service(echo) as port, stage(kind, port, straight=True) as there, dial(there.port) as mine:
            await there.goes("direct")
            await echoed(*mine, b"a" * 100)
            there.relays["straight"].lets_in = False
            failed = time.monotonic()
            getattr(there.relays["straight"], how)()
            await echoed(*mine, b"b" * 100)
            assert time.monotonic() - failed < AWAY
            told = await there.goes("host")
            assert told.connections == 1
            assert told.reason
            await echoed(*mine, b"c" * 100)
            there.relays["straight"].lets_in = True
            async with in_use(there):
                await there.goes("direct", 2)
            await echoed(*mine, b"d" * 100)
            untouched(there)
            await until(lambda: there.hops.server.snapshot()["straight"] == 1)

    run(main())


@pytest.mark.parametrize("how", ["cut", "freeze"])
def test_where_the_line_to_the_host_has_gone_unnoticed_meanwhile_it_is_not_waited_for_when_the_straight_path_fails(
    run: Run, how: str
) -> None:
    async def main() -> None:
        async with service(echo) as port, stage("rust", port, straight=True) as there, dial(there.port) as mine:
            await there.goes("direct")
            await echoed(*mine, b"a" * 100)
            there.relays["user"].freeze()
            there.relays["straight"].lets_in = False
            failed = time.monotonic()
            getattr(there.relays["straight"], how)()
            await echoed(*mine, b"b" * 100)
            assert time.monotonic() - failed < 3.5  # 4 where it is doubted as one in use
            untouched(there)

    run(main())


@kinds
def test_no_byte_is_lost_whatever_fails_however_often(run: Run, kind: str) -> None:
    async def main() -> None:
        async with (
            service(echo) as port,
            stage(kind, port, straight=True) as there,
            contextlib.AsyncExitStack() as stack,
        ):
            await there.goes("direct")
            echoes = [await stack.enter_async_context(dial(there.port)) for _ in range(20)]
            bulk = Bulk(256 * MIB)
            moving = asyncio.ensure_future(bulk.run(there.port))
            links = ["straight", "straight", "user", "host"] + ([] if kind == DIRECT else ["container"])
            dice = random.Random(7)
            faults = 0
            while not moving.done() and faults < 25:
                relay = there.relays[dice.choice(links)]
                (relay.cut if dice.random() < 0.8 else relay.freeze)()
                faults += 1
                for number, each in enumerate(echoes):
                    await echoed(*each, b"%d %d" % (faults, number))
                await asyncio.sleep(dice.random() * 0.3)
            await moving
            untouched(there)
            assert faults > 3

    run(main())


@contextlib.asynccontextmanager
async def straight_user(
    hops: Chain, user: str = "ann", port: str = "80"
) -> AsyncIterator[tuple[Peer, Peer, StraightOffer]]:
    """A session through the host, its straight path, which is in use, and the ticket for that."""
    hops.straights.url, hops.straights.refusal = f"http://127.0.0.1:{hops.runner_port}", ""
    async with session(hops, user, port=port) as line:
        offer = await asked(line)
        headers = {"Authorization": f"Bearer {offer.shown.hex()}"}
        async with connect(offer.url, subprotocols=[Subprotocol(TUNNEL_V2)], additional_headers=headers) as opened:
            assert await opened.recv() == straight_greeting(offer.proof)
            straight = Peer(opened)
            await straight.say(RESUME, SESSION_ID, Roll(bytes(OPENER), 1).pack())
            yield line, straight, offer


async def asked(line: Peer) -> StraightOffer:
    """What a session is told that asks for a straight path."""
    await line.say(STRAIGHT, SESSION_ID)
    while (got := await line.hear()).kind != STRAIGHT:
        pass
    offer = StraightOffer.parse(got.payload)
    assert offer is not None
    return offer


async def closed(peer: Peer) -> tuple[int, str]:
    """How its link ends."""
    try:
        while True:
            await peer.socket.recv()
    except ConnectionClosed as error:
        end = error.rcvd
        return (1006, "") if end is None else (end.code, end.reason)


async def used(straight: Peer, port: int, key: bytes = b"k" * 16) -> None:
    """Open a kept stream there whose service echoes, and use it."""
    await straight.say(CONNECT, 1, Opening(65_536, key, 3600).pack(), port=port)
    while (got := await straight.hear()).kind != CONNECTED:
        assert got.kind != ERROR, got
    await straight.say(DATA, 1, b"x" * 1000)
    while (got := await straight.hear()).payload != b"x" * 1000:
        assert got.kind != ERROR, got


@kinds
def test_a_right_that_ends_ends_the_straight_path_within_2_s_and_its_bytes_are_written_down(
    run: Run, kind: str
) -> None:
    async def main() -> None:
        async with service(echo) as port, chain() as hops:
            await serving(hops, kind)
            grants = granting(hops)
            async with straight_user(hops) as (line, straight, _):
                await used(straight, port)
                began = time.monotonic()
                grants[0].end("the token of this session was revoked")
                for peer in (straight, line):
                    assert await closed(peer) == (1008, "the token of this session was revoked")
                assert time.monotonic() - began < AWAY
                await until(lambda: grants[0].released == 1)
                assert int(str(grants[0].how["bytes_to_container"])) >= 1000
            await until(lambda: not hops.server.hub.sessions and not hops.server.hub.direct)
            await hops.at_rest()

    run(main())


async def serving(hops: Chain, kind: str) -> None:
    if kind == DIRECT:
        hops.addresses[CONTAINER] = "127.0.0.1"
    else:
        await hops.tunnel(kind)


@kinds
def test_a_user_who_ends_the_session_or_just_goes_has_no_straight_path_left(run: Run, kind: str) -> None:
    async def main() -> None:
        async with service(echo) as port, chain() as hops:
            await serving(hops, kind)
            for code in (1000, 1001, None):
                async with straight_user(hops) as (line, straight, _):
                    await used(straight, port, os.urandom(16))
                    if code is None:
                        line.socket.transport.abort()
                    else:
                        await line.socket.close(code)
                    assert (await closed(straight))[0] in (1000, 1011, 1012, 4002)
                await until(lambda: not hops.server.hub.sessions and not hops.server.hub.direct)

    run(main())


@kinds
@pytest.mark.parametrize("how", ["frozen", "cut"])
def test_a_runner_that_hears_nothing_from_its_host_ends_straight_paths_when_the_lease_is_over(
    run: Run, kind: str, how: str
) -> None:
    lease = 1.0

    async def main() -> None:
        async with (
            service(echo) as port,
            chain(Limits(lease=lease)) as hops,
            relay(lambda: hops.runner_port) as between,
        ):
            hops.runner_seen_by_host = lambda: between.port
            await serving(hops, kind)
            async with straight_user(hops) as (_, straight, _offer):
                await asyncio.sleep(1.5 * lease)  # it is renewed
                await used(straight, port)
                began = time.monotonic()
                between.lets_in = False
                (between.freeze if how == "frozen" else between.cut)()
                code, reason = await closed(straight)
                if how == "cut":  # its host tells its user too, who may go on meanwhile
                    assert time.monotonic() - began > lease / 2
                assert time.monotonic() - began < 2.5 * lease
                assert code == 1012
                assert "has not heard from the host" in reason

    run(main())


def test_a_ticket_opens_one_straight_path_once_and_that_of_its_session_alone(run: Run) -> None:
    async def main() -> None:
        async with service(echo) as port, chain() as hops:
            await hops.tunnel("rust")
            async with straight_user(hops) as (line, straight, offer):
                proof = straight_greeting(offer.proof)
                with pytest.raises(UnauthenticatedError):  # once
                    await open_session(Server(offer.url, offer.shown.hex()), greeting=proof)
                fresh = await asked(line)
                for url, shown in (
                    (fresh.url.replace(CONTAINER, "kohakuriver-vps-2"), fresh.shown.hex()),
                    (fresh.url, "00" * 16),
                    (fresh.url, None),
                ):
                    with pytest.raises(KohakuRiverError):
                        await open_session(Server(url, shown), greeting=proof)
                await used(straight, port)  # nobody noticed
            gone = await asked_and_gone(hops)
            with pytest.raises(UnauthenticatedError):
                await open_session(Server(gone.url, gone.shown.hex()), greeting=straight_greeting(gone.proof))

    run(main())


async def asked_and_gone(hops: Chain) -> StraightOffer:
    """The ticket of a session that is over."""
    async with session(hops) as line:
        offer = await asked(line)
    await until(lambda: not hops.server.hub.sessions)
    return offer


def test_a_session_confined_to_some_ports_is_so_on_its_straight_path(run: Run) -> None:
    async def main() -> None:
        async with service(echo) as port, service(echo) as other, chain() as hops:
            await hops.tunnel("rust")
            async with straight_user(hops, port=f"{port}?ports={port}") as (_, straight, _offer):
                await straight.say(CONNECT, 3, Opening(65_536, b"o" * 16, 3600).pack(), port=other)
                while (got := await straight.hear()).kind != ERROR:
                    pass
                assert ErrorText.parse(got.payload).code == "EACCES"
                await used(straight, port)

    run(main())


def test_a_terminal_is_opened_through_the_host_which_writes_down_what_is_started(run: Run) -> None:
    async def main() -> None:
        async with chain() as hops:
            await hops.tunnel("rust")
            async with straight_user(hops, port="terminal") as (_, straight, _offer):
                start = Opening(65_536, b"t" * 16, 60, mark=bytes(MARK), start=Start(["true"]).to_bytes())
                await straight.socket.send(struct.pack(">BBIH", CONNECT, PROTO_TERMINAL, 1, 0) + start.pack())
                while (got := await straight.hear()).kind != ERROR:
                    pass
                assert ErrorText.parse(got.payload).code == "EACCES"

    run(main())


def test_who_answers_at_the_nodes_address_without_being_the_node_gets_no_byte(run: Run) -> None:
    async def main() -> None:
        async with service(echo) as port, chain() as hops:
            await hops.tunnel("rust")
            hops.straights.url, hops.straights.refusal = f"http://127.0.0.1:{hops.runner_port}", ""
            async with session(hops, port=str(port)) as line:
                offer = await asked(line)
                wrong = straight_greeting(bytes(16))
                with pytest.raises(KohakuRiverError, match="not the one that was meant"):
                    await open_session(Server(offer.url, offer.shown.hex()), greeting=wrong)

    run(main())


def test_what_overtakes_on_the_other_link_opens_and_resumes_nothing(run: Run) -> None:
    """A CONNECT and a RESUME that the host's link brings late are of a time before the streams went straight."""

    async def main() -> None:
        async with service(echo) as port, chain() as hops:
            await hops.tunnel("rust")
            async with straight_user(hops, port=str(port)) as (line, straight, _):
                await used(straight, port)
                await line.say(CONNECT, 5, Opening(65_536, b"l" * 16, 3600).pack())
                await line.say(RESUME, 7, Resuming(b"k" * 16, 1, 0, 65_536, UNKNOWN_TOTAL).pack())
                await line.say(PING, SESSION_ID, b"behind them")
                while (got := await line.hear()).kind != PONG:
                    assert got.kind not in (CONNECTED, RESUMED), got
                await straight.say(DATA, 1, b"undisturbed")
                while (got := await straight.hear()).payload != b"undisturbed":
                    assert got.kind != ERROR, got
                await line.say(RESUME, 9, Resuming(b"k" * 16, 2, 1011, 1 << 20, UNKNOWN_TOTAL).pack())
                while (got := await line.hear()).kind != RESUMED:
                    assert got.kind != ERROR, got
                assert hops.server.snapshot()["streams"] == 1  # what it was on the straight link is forgotten

    run(main())


@kinds
def test_datagrams_go_straight_and_those_of_a_quiet_stream_are_not_lost_on_the_way_there(run: Run, kind: str) -> None:
    class Back(asyncio.DatagramProtocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def datagram_received(self, data: bytes, address: Any) -> None:
            self.transport.sendto(data, address)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        service, _ = await loop.create_datagram_endpoint(Back, local_addr=("127.0.0.1", 0))
        port = service.get_extra_info("sockname")[1]
        async with stage(kind, port, proto="udp", straight=True) as there:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.connect(("127.0.0.1", there.port))
                for number in range(200):
                    text = b"datagram %d" % number
                    await loop.sock_sendall(sock, text)
                    assert await asyncio.wait_for(loop.sock_recv(sock, 100), 10) == text
                await there.goes("direct")
                await loop.sock_sendall(sock, b"straight")
                assert await loop.sock_recv(sock, 100) == b"straight"
            untouched(there)
        service.close()

    run(main())


@kinds
def test_no_datagram_is_lost_on_the_way_to_the_straight_path_however_many_there_are(run: Run, kind: str) -> None:
    async def busy(port: int, over: asyncio.Event) -> int:
        """Ask again and again, with several questions on their way, and wait for every answer."""
        loop, sent = asyncio.get_running_loop(), 0
        answers: set[int] = set()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.connect(("127.0.0.1", port))
            while not over.is_set() or len(answers) < sent:
                while not over.is_set() and sent < len(answers) + 4:
                    await loop.sock_sendall(sock, b"%d" % sent)
                    sent += 1
                answers.add(int(await asyncio.wait_for(loop.sock_recv(sock, 100), 10)))
        assert answers == set(range(sent))
        return sent

    async def main() -> None:
        async with udp_echo() as (_, port), stage(kind, port, proto="udp", straight=True) as there:
            over = asyncio.Event()
            users = [asyncio.ensure_future(busy(there.port, over)) for _ in range(8)]
            await there.goes("direct")
            over.set()
            assert sum(await asyncio.gather(*users)) > 8
            untouched(there)

    run(main())


def test_with_direct_a_forward_begins_straight_or_says_why_not(run: Run) -> None:
    async def main() -> None:
        async with service(echo) as port:
            async with stage("rust", port, straight=True, path="direct") as there:
                assert there.forwarder.straight
            with pytest.raises(UnavailableError, match="is not for users"):
                async with stage("rust", port, path="direct"):
                    raise AssertionError("it has begun")
            async with stage("rust", port, straight=True, path="host") as there, dial(there.port) as mine:
                await echoed(*mine, b"through the host")
                assert not there.paths
                assert not there.relays["straight"].accepted

    run(main())


def test_a_runner_that_can_not_be_reached_costs_a_quiet_try_and_says_why(run: Run) -> None:
    async def main() -> None:
        async with service(echo) as port, stage("rust", port, straight=True) as there, dial(there.port) as mine:
            there.relays["straight"].lets_in = False
            there.relays["straight"].cut()
            await echoed(*mine, b"as ever")
            told = await there.goes("host")
            assert told.reason
            untouched(there)

    run(main())


def test_of_a_runner_that_ends_it_is_not_said_that_the_host_is_another_way_to_it(run: Run) -> None:
    async def main() -> None:
        async with service(echo) as port, stage("rust", port, straight=True) as there, dial(there.port) as mine:
            await there.goes("direct")
            await echoed(*mine, b"straight")
            await there.hops.server.close()
            await until(lambda: any(isinstance(event, Reconnecting) for event in there.events))
            assert [each.path for each in there.paths] == ["direct"]

    run(main())


@pytest.mark.parametrize("how", ["over", "back"])
def test_connections_that_change_their_path_take_nothing_of_how_many_their_user_may_open_a_second(
    run: Run, how: str
) -> None:
    async def main() -> None:
        limits = Limits(max_connects=10)
        async with (
            service(echo) as port,
            stage("rust", port, straight=True, limits=limits) as there,
            contextlib.AsyncExitStack() as stack,
        ):
            there.relays["straight"].lets_in = how == "back"
            if how == "over":
                there.relays["straight"].cut()
            connections = []
            for number in range(40):
                if number % 8 == 7:
                    await asyncio.sleep(1)  # no more are allowed in less
                connections.append(await stack.enter_async_context(dial(there.port)))
                await echoed(*connections[-1], b"open")
            there.relays["straight"].lets_in = how == "over"
            if how == "over":
                await echoed(*connections[0], b"in use")
                await there.goes("direct")
            else:
                assert there.forwarder.straight
                there.relays["straight"].cut()
                await until(lambda: not there.forwarder.straight)
            began = time.monotonic()
            await asyncio.gather(*(echoed(*each, b"at once") for each in connections))
            assert time.monotonic() - began < AGAIN_AFTER
            untouched(there)

    run(main())


def test_a_session_with_a_limited_rate_stays_with_the_host_that_limits_it(run: Run) -> None:
    async def main() -> None:
        async with service(echo) as port, stage("rust", port, straight=True, limits=Limits(max_rate=MIB)) as there:
            told = await there.goes("host")
            assert "limits their rate" in told.reason
            assert not there.relays["straight"].accepted

    run(main())


def test_an_idle_forward_looks_for_no_straight_path_which_its_host_would_take_for_use(run: Run) -> None:
    async def main() -> None:
        limits = Limits(idle_timeout=1.0)
        async with service(echo) as port, stage("rust", port, limits=limits) as there:
            await there.goes("host")
            with pytest.raises(UnavailableError, match="nothing passed"):
                await asyncio.wait_for(there.forwarder.wait(), 20)

    run(main())


def test_a_straight_session_in_use_is_not_idle_and_one_that_is_not_used_ends(run: Run) -> None:
    async def main() -> None:
        limits = Limits(idle_timeout=1.0)
        async with service(echo) as port, stage("rust", port, straight=True, limits=limits) as there:
            await there.goes("direct")
            async with dial(there.port) as mine:
                for _ in range(10):
                    await echoed(*mine, b"used")
                    await asyncio.sleep(0.25)
                assert there.forwarder.straight
                with pytest.raises(UnavailableError, match="nothing passed"):
                    await there.forwarder.wait()

    run(main())
