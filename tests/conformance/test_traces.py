"""What a container's end answers where streams outlive links is what tests/vectors/traces.json says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from kohakuriver._frame import FrameWalker, build_frame
from kohakuriver.tunnel import streams
from kohakuriver.tunnel.keeper import Keeper
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.local_socket import TcpStream
from kohakuriver.tunnel.protocol import ACK, DATA, ERROR, PING, WINDOW, ErrorText
from tests.support.peers.fake_transport import FakeTransport
from tests.support.peers.relayed import Container, Pipe
from tests.vectors import generate

Run = Callable[[Coroutine[Any, Any, None]], None]
TRACES = json.loads((generate.HERE / "traces.json").read_text(encoding="utf-8"))
# When these come is an end's own business.
UNTIMED = {WINDOW, ACK, PING}


class End:
    """A container's end, its link, and the one service in its container."""

    def __init__(self) -> None:
        self.keeper = Keeper()
        self.dials: dict[TcpStream, asyncio.Future[FakeTransport]] = {}
        self.service = FakeTransport()
        self._unread = b""
        self._ends = False

    def link(self) -> None:
        self.wire, self._pipe = FakeTransport(), Pipe(masked=True)
        container = Container(self.keeper, self.dials)
        link = Link(container, FrameWalker(masked=False), masks=True)
        link.start(self.wire)
        container.attach(link)

    def lost(self) -> None:
        self.wire.fail(None)

    def say(self, event: dict[str, Any]) -> None:
        payload = bytes.fromhex(event["payload"])
        self.wire.feed(build_frame(event["type"], event["proto"], event["id"], event["port"], payload))

    def dialled(self) -> None:
        (answer,) = self.dials.values()
        answer.set_result(self.service)

    async def refuses(self) -> None:
        while (waiting := [each for each in self.dials.values() if not each.done()]) != []:
            waiting[0].set_exception(ConnectionRefusedError(111, "refused"))
            await settled()

    def service_says(self, event: dict[str, Any]) -> None:
        self._unread += bytes.fromhex(event["bytes"])

    def service_ends(self) -> None:
        self._ends = True

    def service_is_read(self) -> None:
        """What the service has said and nobody read waits in its socket."""
        self._unread = self._unread[self.service.feed(self._unread) :]
        if self._ends and not self._unread and self.service.feed_eof():
            self._ends = False

    def answers(self) -> list[dict[str, Any]]:
        told: list[dict[str, Any]] = []
        for kind, _, stream, _, payload in self._pipe.messages(self.wire.take(1 << 20)):
            if kind in UNTIMED:
                continue
            if kind == DATA and told and (told[-1]["type"], told[-1]["id"]) == (DATA, stream):
                told[-1]["payload"] += payload.hex()
            elif kind == ERROR:
                told.append({"type": kind, "id": stream, "error": ErrorText.parse(payload).code})
            else:
                told.append({"type": kind, "id": stream, "payload": payload.hex()})
        return told


async def settled() -> None:
    for _ in range(8):
        await asyncio.sleep(0)


@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: trace["name"])
def test_a_trace_is_answered_as_the_vectors_say(
    run: Run, trace: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "LATE", 0.0)

    async def main() -> None:
        end = End()
        for number, event in enumerate(trace["events"]):
            act = getattr(end, event["do"])
            done = act(event) if event["do"] in ("say", "service_says") else act()
            if done is not None:
                await done
            await settled()
            if end.service._protocol is not None:
                end.service_is_read()
            await settled()
            at = f"event {number}: {event}"
            assert end.answers() == event["answers"], at
            assert bytes(end.service.sent).hex() == event["service"], at
            assert end.service.aborted == event["reset"], at
        if not end.wire.lost:
            end.lost()
        end.keeper.close(ErrorText("ECONNRESET", "the test is over"))
        await settled()

    run(main())
