"""What the relays do for streams that outlive links: docs/protocol.md §3, "Streams that outlive links"."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, NamedTuple

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from kohakuriver.limits import Limits
from kohakuriver.relay import hub
from kohakuriver.tunnel.protocol import (
    ACK,
    CLOSE,
    CONNECT,
    CONNECTED,
    DATA,
    DETACH,
    EOF,
    ERROR,
    FULL_HOLD,
    GOAWAY,
    MARK,
    NOTICE,
    OPENER,
    PROTO_TERMINAL,
    RESUME,
    RESUMED,
    REVOKE,
    SESSION_ID,
    TUNNEL_V2,
    UNKNOWN_TOTAL,
    USER_LOST_HOLD,
    Attached,
    CloseCode,
    ErrorText,
    Opening,
    Resuming,
    Roll,
    pack_limit,
    pack_pair,
    pack_seconds,
)
from kohakuriver.tunnel.terminal import Start
from kohakuriver.tunnel.windows import FIRST_WINDOW, SESSION_BUDGET
from tests.support.hops import CONTAINER, SSH_PORT, Chain, chain

Run = Callable[[Coroutine[Any, Any, None]], None]

KEY = bytes(range(16))
OPEN = Opening(65_536, KEY, 3600).pack()


class Got(NamedTuple):
    """A tunnel message."""

    kind: int
    stream: int
    payload: bytes
    port: int = 0


class Peer:
    """An end of a session or of a tunnel that says exactly what a test has it say."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    async def say(self, kind: int, stream: int, payload: bytes = b"", port: int = 0) -> None:
        await self.socket.send(struct.pack(">BBIH", kind, 0, stream, port) + payload)

    async def hear(self) -> Got:
        message = await self.socket.recv()
        assert isinstance(message, bytes)
        kind, _, stream, port = struct.unpack(">BBIH", message[:8])
        return Got(kind, stream, message[8:], port)


@contextlib.asynccontextmanager
async def tunnel(hops: Chain) -> AsyncIterator[Peer]:
    url = f"ws://127.0.0.1:{hops.runner_port}/ws/tunnel/{CONTAINER}"
    # What a test leaves unheard holds up no end: a full queue would keep the answer to CLOSE unread, for ten seconds.
    async with connect(url, subprotocols=[Subprotocol(TUNNEL_V2)], max_queue=None) as socket:
        await hops.changed(CONTAINER, True)
        yield Peer(socket)


@contextlib.asynccontextmanager
async def session(hops: Chain, user: str = "ann", query: str = "", port: str = "80") -> AsyncIterator[Peer]:
    url = f"ws://127.0.0.1:{hops.host_port}/ws/forward/1/{port}{query}"
    headers = {"Authorization": f"Bearer {user}"}
    async with connect(url, subprotocols=[Subprotocol(TUNNEL_V2)], additional_headers=headers) as socket:
        assert await socket.recv() == "CONNECTED"
        yield Peer(socket)


async def opened(user: Peer, container: Peer, stream: int = 1, key: bytes = KEY) -> int:
    """Open a kept stream; the id that the container knows it by."""
    await user.say(CONNECT, stream, OPEN.replace(KEY, key))
    return (await container.hear()).stream


def test_the_runner_says_whose_a_kept_stream_is_whatever_the_user_claims(run: Run) -> None:
    async def check() -> None:
        async with chain() as hops, tunnel(hops) as container, session(hops) as ann, session(hops, "bob") as bob:
            marks = []
            for user, claimed in ((ann, b""), (bob, b""), (bob, b"m" * MARK)):
                await user.say(CONNECT, 7 + len(claimed), OPEN + claimed)
                got = Opening.parse((await container.hear()).payload)
                assert got is not None
                assert got._replace(mark=b"") == Opening.parse(OPEN)
                marks.append(got.mark)
            assert len(marks[0]) == MARK
            assert marks[0] != marks[1] == marks[2]
            await ann.say(RESUME, 9, Resuming(KEY, 1, 2, 3, UNKNOWN_TOTAL, b"m" * MARK).pack())
            resumed = await container.hear()
            assert resumed[0::2] == (RESUME, Resuming(KEY, 1, 2, 3, UNKNOWN_TOTAL, marks[0]).pack())
            assert resumed.port == 80
            roll = Roll(KEY[:OPENER], 1, b"m" * MARK)
            await ann.say(RESUME, SESSION_ID, roll.pack())
            assert await container.hear() == (RESUME, SESSION_ID, roll._replace(mark=marks[0]).pack(), 0)

    run(check())


def test_terminals_are_opened_in_their_own_sessions_alone_and_what_they_run_is_written_down(run: Run) -> None:
    start = Start(["ls", "-l", "/"]).to_bytes()
    starting = Opening(65_536, KEY, 3600, mark=bytes(MARK), start=start)

    async def open_terminal(peer: Peer, stream: int) -> None:
        await peer.socket.send(struct.pack(">BBIH", CONNECT, PROTO_TERMINAL, stream, 0) + starting.pack())

    async def check() -> None:
        async with chain() as hops, tunnel(hops) as container:
            async with session(hops) as forward, session(hops, port="terminal") as user:
                await open_terminal(forward, 1)
                assert (await forward.hear()).payload.startswith(b"EACCES: ")
                await user.say(CONNECT, 1, OPEN, 80)
                assert (await user.hear()).payload.startswith(b"EACCES: ")
                await open_terminal(user, 2)
                got = Opening.parse((await container.hear()).payload, PROTO_TERMINAL)
                assert got is not None
                assert got.start == start
                assert got.mark not in (b"", bytes(MARK))
                await open_terminal(user, 3)
                assert (await user.hear()).payload.startswith(b"EMFILE: ")
            lines = [hops.audit.written.get_nowait() for _ in range(hops.audit.written.qsize())]
            assert [line["command"] for line in lines if "command" in line] == ["ls -l /", "ls -l /"]

    run(check())


def test_what_ends_of_a_kept_stream_tell_each_other_passes_under_the_ids_of_each_leg(run: Run) -> None:
    async def check() -> None:
        async with chain() as hops, tunnel(hops) as container, session(hops) as user:
            await opened(user, container, 5)
            number = await opened(user, container, 6, KEY[::-1])
            for kind, payload in (
                (CONNECTED, pack_pair(9, 8)),
                (RESUMED, Attached(1, 2, 3).pack()),
                (ACK, pack_limit(77)),
                (EOF, pack_pair(10, 20)),
            ):
                await container.say(kind, number, payload)
                assert await user.hear() == (kind, 6, payload, 0)
            for kind, payload in ((ACK, pack_limit(78)), (EOF, pack_pair(30, 40))):
                await user.say(kind, 6, payload)
                assert await container.hear() == (kind, number, payload, 0)
            # After two EOFs its ids stay, for what is acknowledged then; CLOSE frees them.
            await user.say(ACK, 6, pack_limit(11))
            assert await container.hear() == (ACK, number, pack_limit(11), 0)
            await container.say(CLOSE, number)
            assert await user.hear() == (CLOSE, 6, b"", 0)
            await user.say(ACK, 6, pack_limit(12))
            await user.say(CLOSE, 5)
            assert (await container.hear()).kind == CLOSE
            assert not hops.server.snapshot()["streams"]

    run(check())


@pytest.mark.parametrize(
    ("code", "kind", "payload"),
    [
        (CloseCode.NORMAL, CLOSE, b""),
        (CloseCode.POLICY, CLOSE, b""),
        (CloseCode.IDLE, CLOSE, b""),
        (CloseCode.GOING_AWAY, DETACH, pack_seconds(FULL_HOLD)),
        (CloseCode.INTERNAL_ERROR, DETACH, pack_seconds(FULL_HOLD)),
        (CloseCode.SERVICE_RESTART, DETACH, pack_seconds(FULL_HOLD)),
    ],
)
def test_a_session_that_ended_ends_its_streams_and_one_that_was_lost_leaves_them(
    run: Run, code: int, kind: int, payload: bytes
) -> None:
    async def check() -> None:
        async with chain() as hops, tunnel(hops) as container, session(hops) as user:
            number = await opened(user, container)
            await user.say(CONNECT, 2, pack_limit(65_536))
            plain = (await container.hear()).stream
            await user.socket.close(code)
            assert {await container.hear(), await container.hear()} == {
                Got(kind, number, payload),
                Got(CLOSE, plain, b""),
            }

    run(check())


def test_the_streams_of_a_process_that_was_killed_are_held_for_a_shorter_time(run: Run) -> None:
    async def check() -> None:
        async with chain() as hops, tunnel(hops) as container, session(hops) as user:
            number = await opened(user, container)
            user.socket.transport.abort()
            assert await container.hear() == (DETACH, number, pack_seconds(USER_LOST_HOLD), 0)

    run(check())


def test_a_host_that_is_gone_leaves_the_streams_for_as_long_as_they_were_opened_for(run: Run) -> None:
    async def check() -> None:
        async with chain() as hops, tunnel(hops) as container, session(hops) as user:
            number = await opened(user, container)
            for proxied in hops.proxy.sessions:
                proxied.container_side.link.abort()
            assert await container.hear() == (DETACH, number, pack_seconds(FULL_HOLD), 0)

    run(check())


def test_what_is_held_for_a_user_whose_right_has_gone_is_revoked_by_that_users_mark(run: Run) -> None:
    async def check() -> None:
        async with chain() as hops, tunnel(hops) as container, session(hops, "bob") as bob:
            await bob.say(CONNECT, 1, OPEN)
            opening = Opening.parse((await container.hear()).payload)
            assert opening is not None
            hops.server.revoke(CONTAINER, "bob", "not shared any more")
            assert await container.hear() == (REVOKE, SESSION_ID, opening.mark + b"not shared any more", 0)
            hops.server.revoke("another", "bob", "nor there")

    run(check())


def test_a_stream_is_resumed_only_where_its_session_may_go(run: Run) -> None:
    async def check() -> None:
        async with chain() as hops, tunnel(hops) as container, session(hops, query="?ports=80,81") as user:
            await user.say(RESUME, 3, Resuming(KEY, 1, 0, 0, 0).pack(), port=82)
            refused = await user.hear()
            assert (refused.kind, refused.stream) == (ERROR, 3)
            assert ErrorText.parse(refused.payload).code == "EACCES"
            await user.say(RESUME, 3, Resuming(KEY, 1, 0, 0, 0).pack(), port=81)
            assert (await container.hear()).port == 81

    run(check())


def test_what_is_said_under_the_old_id_of_a_resumed_stream_goes_to_nobody_else(run: Run) -> None:
    async def check() -> None:
        async with chain() as hops, tunnel(hops) as container, session(hops) as old, session(hops) as new:
            before = await opened(old, container)
            await new.say(RESUME, 1, Resuming(KEY, 1, 0, 0, UNKNOWN_TOTAL).pack())
            after = (await container.hear()).stream
            assert before != after
            await container.say(DATA, after, b"for the new link")
            assert await new.hear() == (DATA, 1, b"for the new link", 0)
            await old.say(DATA, 1, b"late")
            assert await container.hear() == (DATA, before, b"late", 0)
            await old.socket.close(CloseCode.SERVICE_RESTART)
            assert (await container.hear())[:2] == (DETACH, before)
            await new.say(DATA, 1, b"early")
            assert await container.hear() == (DATA, after, b"early", 0)

    run(check())


def test_users_of_a_tunnel_that_broke_open_their_session_again_where_they_have_kept_streams(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "BACK_WITHIN", 0.0)

    async def check() -> None:
        async with chain() as hops, tunnel(hops) as container, session(hops) as kept, session(hops) as plain:
            await opened(kept, container)
            await plain.say(CONNECT, 1, pack_limit(65_536))
            await container.hear()
            container.socket.transport.abort()
            assert (await plain.hear()).kind == ERROR
            with pytest.raises(ConnectionClosed) as closed:
                await kept.hear()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == CloseCode.SERVICE_RESTART
            await plain.say(CONNECT, 2, pack_limit(65_536))
            assert ErrorText.parse((await plain.hear()).payload).code == "ENOTCONN"

    run(check())


def test_kept_streams_end_at_once_where_the_task_has_ended(run: Run) -> None:
    async def check() -> None:
        async with chain() as hops, tunnel(hops) as container, session(hops) as user:
            await opened(user, container, 4)
            container.socket.transport.abort()
            await hops.changed(CONTAINER, False)
            hops.server.hub.drop(CONTAINER, "the task has ended")
            assert await user.hear() == (
                ERROR,
                4,
                b"ECONNRESET: the task's tunnel went away (the task has ended)",
                0,
            )

    run(check())


def test_a_newer_tunnel_sends_users_back_without_waiting_for_anything(run: Run) -> None:
    async def check() -> None:
        async with chain() as hops, tunnel(hops) as container, session(hops) as user:
            await opened(user, container)
            async with tunnel(hops):
                with pytest.raises(ConnectionClosed) as closed:
                    await user.hear()
                assert closed.value.rcvd is not None
                assert closed.value.rcvd.code == CloseCode.SERVICE_RESTART

    run(check())


def test_a_runner_that_has_no_tunnel_at_the_moment_asks_to_resume_later(run: Run) -> None:
    async def check() -> None:
        async with chain() as hops, tunnel(hops) as container, session(hops) as user:
            container.socket.transport.abort()
            await hops.changed(CONTAINER, False)
            await user.say(RESUME, 1, Resuming(KEY, 1, 0, 0, 0).pack())
            assert ErrorText.parse((await user.hear()).payload).code == "EAGAIN"

    run(check())


def test_a_stream_that_leaves_one_link_while_its_task_ends_is_told_so_by_the_next(run: Run) -> None:
    async def check() -> None:
        async with chain() as hops, tunnel(hops) as container, session(hops) as user:
            await opened(user, container)
            container.socket.transport.abort()
            await hops.changed(CONTAINER, False)
            # It has left the link that the end is told on, and is not yet on another.
            await user.say(RESUME, 2, Resuming(KEY, 1, 0, 0, UNKNOWN_TOTAL).pack())
            while ErrorText.parse((told := await user.hear()).payload).code != "EAGAIN":
                pass
            assert told.stream == 2
            hops.server.hub.drop(CONTAINER, "task lab was stopped")
            await user.say(RESUME, 3, Resuming(KEY, 2, 0, 0, UNKNOWN_TOTAL).pack())
            while (told := await user.hear()).stream != 3:
                pass
            text = ErrorText.parse(told.payload)
            assert (text.code, "task lab was stopped" in str(text)) == ("ECONNRESET", True)
            async with tunnel(hops) as again:  # it runs again: what is not there any more its tunnel client says
                await user.say(RESUME, 4, Resuming(KEY, 3, 0, 0, UNKNOWN_TOTAL).pack())
                assert (await again.hear()).kind == RESUME

    run(check())


def test_a_stream_whose_resume_was_put_off_is_not_ended_by_the_roll_behind_it(run: Run) -> None:
    async def check() -> None:
        async with chain(Limits(max_connects=1)) as hops, tunnel(hops) as container, session(hops) as user:
            for stream in (1, 2):
                await user.say(RESUME, stream, Resuming(KEY, 1, 0, 0, UNKNOWN_TOTAL).pack())
            await user.say(RESUME, SESSION_ID, Roll(KEY[:OPENER], 1).pack())
            assert ErrorText.parse((await user.hear()).payload).code == "EAGAIN"
            await user.say(ACK, 1, pack_limit(5))
            assert [(await container.hear()).kind for _ in range(2)] == [RESUME, ACK]

    run(check())


def test_a_tunnel_that_comes_between_a_resume_and_the_roll_behind_it_ends_nothing(run: Run) -> None:
    async def check() -> None:
        async with chain() as hops, tunnel(hops) as first, session(hops) as user:
            first.socket.transport.abort()
            await hops.changed(CONTAINER, False)
            await user.say(RESUME, 1, Resuming(KEY, 1, 0, 0, UNKNOWN_TOTAL).pack())
            assert ErrorText.parse((await user.hear()).payload).code == "EAGAIN"
            async with tunnel(hops) as container:
                await user.say(RESUME, SESSION_ID, Roll(KEY[:OPENER], 1).pack())
                await user.say(RESUME, 1, Resuming(KEY, 1, 0, 0, UNKNOWN_TOTAL).pack())
                assert (await container.hear())[:2] == (RESUME, 1)

    run(check())


def test_a_session_to_ssh_reaches_the_port_of_the_tasks_ssh_server(run: Run) -> None:
    async def check() -> None:
        async with chain() as hops, tunnel(hops) as container, session(hops, port="ssh") as user:
            await user.say(CONNECT, 1, OPEN)
            assert (await container.hear()).port == SSH_PORT

    run(check())


def test_a_host_that_is_drained_sends_sessions_away_and_ends_when_they_have_gone(run: Run) -> None:
    async def check() -> None:
        async with chain() as hops, tunnel(hops) as container, session(hops) as user, session(hops) as idle:
            number = await opened(user, container)
            draining = asyncio.ensure_future(hops.proxy.drain(30))
            assert await user.hear() == (GOAWAY, SESSION_ID, pack_seconds(30, "the host is going"), 0)
            await user.say(DATA, 1, b"on its way")
            assert await container.hear() == (DATA, number, b"on its way", 0)
            await user.socket.close(CloseCode.SERVICE_RESTART)
            assert (await container.hear())[:2] == (DETACH, number)
            assert not draining.done()
            await idle.socket.close()
            await draining

    run(check())


def test_a_host_waits_no_longer_than_it_was_told_to_for_sessions_that_stay(run: Run) -> None:
    async def check() -> None:
        async with chain() as hops, tunnel(hops), session(hops) as user:
            await hops.proxy.drain(0)
            assert (await user.hear()).kind == GOAWAY
            await hops.proxy.close()
            with pytest.raises(ConnectionClosed):
                await user.hear()

    run(check())


@pytest.mark.parametrize("ends", ["closed", "ended twice", "refused inside", "session over"])
def test_streams_of_all_sessions_of_a_user_count_until_they_end_however_they_do(run: Run, ends: str) -> None:
    async def check() -> None:
        async with (
            chain(Limits(max_user_streams=16)) as hops, tunnel(hops) as container, session(hops) as second,
            session(hops, "bob") as bob,
        ):  # fmt: skip
            async with session(hops) as first:
                for number in range(1, 17):
                    await first.say(CONNECT, number, pack_limit(65_536))
                inside = [(await container.hear()).stream for _ in range(16)]
                await second.say(CONNECT, 1, pack_limit(65_536))
                refused = await second.hear()
                assert (refused.kind, ErrorText.parse(refused.payload).code) == (ERROR, "EMFILE")
                await bob.say(CONNECT, 1, pack_limit(65_536))
                assert (await container.hear()).kind == CONNECT
                if ends == "closed":
                    await first.say(CLOSE, 3)
                elif ends == "ended twice":
                    await container.say(EOF, inside[2])
                    assert (await first.hear()).kind == EOF
                    await first.say(EOF, 3)
                elif ends == "refused inside":
                    await container.say(ERROR, inside[2], ErrorText("ECONNREFUSED", "no").pack())
                    assert (await first.hear()).kind == ERROR
                if ends != "session over":
                    await first.say(CONNECT, 99, pack_limit(65_536))
                    while (await container.hear()).kind != CONNECT:
                        pass
                    return
            while (await container.hear()).kind != CLOSE:
                pass
            await second.say(CONNECT, 2, pack_limit(65_536))
            while (await container.hear()).kind != CONNECT:
                pass

    run(check())


def test_what_the_node_dials_itself_counts_for_more_and_its_sessions_share_what_they_hold(run: Run) -> None:
    async def nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    async def check() -> None:
        server = await asyncio.start_server(nothing, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with chain(Limits(max_user_streams=32)) as hops, contextlib.AsyncExitStack() as stack:
            hops.addresses[CONTAINER] = "127.0.0.1"
            users = [await stack.enter_async_context(session(hops, port=str(port))) for _ in range(5)]
            for user in users[:4]:
                await user.say(CONNECT, 1, pack_limit(65_536))
                assert (await user.hear()).kind == CONNECTED
            share = hops.server._shares.held_by("ann")
            assert SESSION_BUDGET - share.windows.left == 4 * FIRST_WINDOW
            await users[4].say(CONNECT, 1, pack_limit(65_536))
            refused = await users[4].hear()
            assert (refused.kind, ErrorText.parse(refused.payload).code) == (ERROR, "EMFILE")
            await users[0].say(CLOSE, 1)
            await users[0].say(CONNECT, 2, pack_limit(65_536))
            assert (await users[0].hear()).kind == CONNECTED
        server.close()

    run(check())


def test_everybody_who_is_connected_to_a_task_hears_what_its_node_has_to_say(run: Run) -> None:
    async def check() -> None:
        async with chain() as hops, tunnel(hops), session(hops) as one, session(hops) as other:
            hops.server.hub.tell(CONTAINER, "Task web is stopped in 5 min.")
            for user in (one, other):
                assert await user.hear() == (NOTICE, SESSION_ID, b"Task web is stopped in 5 min.", 0)

    run(check())
