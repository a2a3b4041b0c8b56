"""A stream of either end does in each state what tests/vectors/states.json says."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from kohakuriver._frame import FrameWalker
from kohakuriver.tunnel.container_endpoint import ContainerEndpoint
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.local_socket import TcpStream
from kohakuriver.tunnel.protocol import CLOSE, CONNECT, CONNECTED, EOF, ERROR, PROTO_TCP, pack_limit
from kohakuriver.tunnel.settings import EndpointConfig
from kohakuriver.tunnel.states import State
from kohakuriver.tunnel.streams import Streams
from kohakuriver.tunnel.user_endpoint import UserEndpoint
from tests.support.peers.fake_transport import FakeTransport
from tests.vectors import generate

ROWS = {
    (row["version"], row["role"], row["state"], row["event"]): (row["to"], row["actions"])
    for row in json.loads((generate.HERE / "states.json").read_text(encoding="utf-8"))
}
# How a stream gets into a state, from the one it begins in.
WAYS = {
    "waiting": [],
    "opening": ["link"],
    "opening_local_ended": ["link", "local_eof"],
    "opening_remote_ended": ["link", "remote_eof"],
    "open": ["link", "established"],
    "local_ended": ["link", "established", "local_eof"],
    "remote_ended": ["link", "established", "remote_eof"],
    "half_closed": ["link", "established", "local_eof", "linger_over"],
    "delivering": ["link", "established", "unread", "remote_close"],
}
EVENTS = ["link", "established", "local_eof", "remote_eof", "remote_close", "remote_error", "local_closed"]
EVENTS += ["local_error", "linger_over", "link_lost"]
NAMES = {CONNECT: "send_connect", CONNECTED: "send_connected", EOF: "send_eof", CLOSE: "send_close"}
NAMES[ERROR] = "send_error"
# An acceptor has no local socket before its dial has succeeded, and a stream that waits has no peer.
NEVER = {("acceptor", "opening", "local_closed"), ("acceptor", "opening", "local_eof")}
NEVER |= {("acceptor", "opening_remote_ended", "local_closed"), ("acceptor", "opening_remote_ended", "local_eof")}
REMOTE = {"remote_eof", "remote_close", "remote_error", "established"}


def cases() -> list[tuple[int, str, str, str]]:
    """Every state and event that a stream of a version and role can meet."""
    states = {key[:3] for key in ROWS}
    all_of_them = [(*at, event) for at, event in itertools.product(sorted(states), EVENTS)]
    return [
        case
        for case in all_of_them
        if case[1:] not in NEVER
        and not (case[2] == "waiting" and case[3] in REMOTE | {"local_eof", "linger_over"})
        and (case[3] != "link" or case[2] == "waiting")
        and (case[3] != "linger_over" or case in ROWS)
        and (case[3] != "local_eof" or case in ROWS)
        and (case[3] != "established" or case[1] == "opener" or case in ROWS)  # a dial succeeds once
    ]


class Stage:
    """One stream, what it sends, and its local socket."""

    def __init__(self, version: int, role: str) -> None:
        self.version = version
        self.opener = role == "opener"
        config = EndpointConfig(v1_linger=3600.0)
        self.endpoint = UserEndpoint(config=config) if self.opener else ContainerEndpoint(config=config)
        self.wire = FakeTransport()
        self.link = Link(self.endpoint, FrameWalker(masked=not self.opener), masks=self.opener, version=version)
        self.link.start(self.wire)
        self.streams: Streams | None = None
        self.reader = FrameWalker(masked=self.opener)
        self.local = FakeTransport(room=1 << 20)
        self.limit = pack_limit(1 << 20) if version == 2 else b""
        self.stream: TcpStream
        if self.opener:
            self.stream = TcpStream(self.endpoint, 7)
            self.local.connect(self.stream)

    def do(self, event: str) -> None:
        getattr(self, f"_{event}")()

    def sent(self) -> list[str]:
        """The messages since the last look, but for what flow control says."""
        data = bytearray(self.wire.take(1 << 20))
        messages, _ = self.reader.walk(data, 0, len(data))
        return [NAMES[message[0]] for message in messages if message[0] in NAMES]

    def _link(self) -> None:
        self.endpoint.attach(self.link)
        streams = self.streams = self.endpoint.streams
        assert streams is not None
        if not isinstance(self.endpoint, UserEndpoint):
            self.endpoint.dial_soon = lambda dial, stream=None: dial.close()  # type: ignore[method-assign]  # the test answers it
            self.endpoint.accept(1, PROTO_TCP, 7, self.limit)
            stream = streams.by_id[1]
            assert isinstance(stream, TcpStream)
            self.stream = stream

    def _established(self) -> None:
        if not self.opener:
            self.local.connect(self.stream)
        else:
            self.endpoint._tcp_message(self.stream, CONNECTED, self.limit)

    def _message(self, kind: int) -> None:
        if self.stream.at is not None:
            self.endpoint._tcp_message(self.stream, kind, b"")

    def _remote_eof(self) -> None:
        self._message(EOF)

    def _remote_close(self) -> None:
        self._message(CLOSE)

    def _remote_error(self) -> None:
        self._message(ERROR)

    def _unread(self) -> None:
        self.local.room = 0
        self.stream.receive([memoryview(b"the local socket takes nothing")])

    def _local_eof(self) -> None:
        self.stream.eof_received()

    def _local_closed(self) -> None:
        self.local.fail(None)

    def _local_error(self) -> None:
        if self.opener or self.local.get_protocol() is not None:
            self.local.fail(ConnectionResetError(104, "reset"))
        else:
            self.stream.failed(ConnectionRefusedError(111, "refused"))

    def _linger_over(self) -> None:
        timer = self.stream._timer
        assert timer is not None
        timer.cancel()
        self.stream.core.moved_at -= 3600
        self.stream._waited()

    def _link_lost(self) -> None:
        if isinstance(self.endpoint, UserEndpoint) and self.stream.core.state is State.WAITING:
            self.endpoint._waited_too_long(self.stream)
        else:
            self.endpoint.detach("lost")

    def is_over(self) -> bool:
        """Whether its id is free, or it has none."""
        waits = isinstance(self.endpoint, UserEndpoint) and self.stream in self.endpoint._waiting
        entered = self.streams is not None and self.stream in self.streams.by_id.values()
        return not entered and not waits


Run = Callable[[Coroutine[Any, Any, None]], None]


async def settle() -> None:
    for _ in range(6):
        await asyncio.sleep(0)


@pytest.mark.parametrize(("version", "role", "state", "event"), cases())
def test_a_stream_does_what_the_vectors_say(run: Run, version: int, role: str, state: str, event: str) -> None:
    to, actions = ROWS.get((version, role, state, event), (state, []))

    async def main() -> None:
        stage = Stage(version, role)
        for step in WAYS[state]:
            stage.do(step)
            await settle()
        stage.sent()
        local = stage.local
        owed = state == "opening_remote_ended" and event == "established"  # there was no socket to shut down before
        before = local.ended or (owed and role == "acceptor"), local.closing
        stage.do(event)
        await settle()
        assert stage.sent() == [action for action in actions if action.startswith("send_")]
        assert stage.is_over() == (to in {"delivering", "over"})
        if local.get_protocol() is not None and not event.startswith("local_"):
            assert local.aborted == ("reset_local" in actions)
            assert (local.ended, local.closing) == (
                before[0] or "shut_local" in actions,
                before[1] or bool({"reset_local", "close_local"} & set(actions)),
            )
        if "linger" in actions:
            assert stage.stream._timer is not None
        stage.stream.link_lost()
        stage.link.abort()
        await settle()

    run(main())
