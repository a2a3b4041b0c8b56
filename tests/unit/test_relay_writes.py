"""How many writes a relay makes of what comes with one read: each would wake up its peer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from kohakuriver._frame import build_frame
from kohakuriver.limits import Limits
from kohakuriver.relay.admission import Admission, ConnectRates
from kohakuriver.relay.legs import SessionLeg, TunnelLeg
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.protocol import CLOSE, CONNECT, CONNECTED, DATA, EOF, ERROR, PROTO_TCP, ErrorText, pack_limit
from tests.support.peers.fake_transport import Wire

Run = Callable[[Coroutine[Any, Any, None]], None]
OPEN = pack_limit(1 << 20)


class Runner:
    """One container, and its users."""

    def __init__(self) -> None:
        self.tunnel = TunnelLeg(self, "c1", 1 << 24)
        self.wire = self.link(self.tunnel)

    def link(self, leg: TunnelLeg | SessionLeg) -> Wire:
        wire = Wire(masked=False)
        leg.link = Link(leg, leg.walker, masks=False)
        leg.link.start(wire)
        return wire

    def user(self) -> Wire:
        admission = Admission(Limits(), ConnectRates(0), None, None)
        mark = bytes(16)
        return self.link(SessionLeg(self, "c1", 1 << 24, port=0, proto=0, admission=admission, newest=2, mark=mark))

    def tunnel_of(self, container: str) -> TunnelLeg | None:
        return self.tunnel

    def expected_within(self, container: str) -> float:
        return 0.0

    def ended(self, container: str) -> str:
        return ""

    def tunnel_closed(self, tunnel: TunnelLeg, reason: str) -> None:
        pass

    def session_closed(self, session: SessionLeg) -> None:
        pass


def says(kind: int, stream: int, payload: bytes = b"") -> bytes:
    return build_frame(kind, PROTO_TCP, stream, 80, payload, 0x01020304)


def test_what_a_user_says_at_once_reaches_the_container_at_once(run: Run) -> None:
    async def main() -> None:
        runner = Runner()
        user = runner.user()
        user.feed(says(CONNECT, 1, OPEN) + says(DATA, 1, b"x") + says(CONNECT, 2, OPEN) + says(EOF, 1))
        assert runner.wire.kinds() == [[CONNECT, DATA, CONNECT, EOF]]
        user.feed(says(DATA, 2, b"y"))
        assert runner.wire.kinds() == [[DATA]]

    run(main())


def test_what_a_container_says_at_once_reaches_each_user_at_once(run: Run) -> None:
    async def main() -> None:
        runner = Runner()
        ann, bob = runner.user(), runner.user()
        for user in (ann, bob):
            user.feed(says(CONNECT, 1, OPEN))
        refused = ErrorText("ECONNREFUSED", "nothing listens there").pack()
        runner.wire.feed(says(CONNECTED, 1, OPEN) + says(ERROR, 2, refused) + says(DATA, 1, b"x") + says(EOF, 1))
        assert ann.kinds() == [[CONNECTED, DATA, EOF]]
        assert bob.kinds() == [[ERROR]]

    run(main())


def test_what_breaks_the_protocol_takes_nothing_with_it_that_came_before(run: Run) -> None:
    async def main() -> None:
        runner = Runner()
        user = runner.user()
        user.feed(says(CONNECT, 1, OPEN) + says(CLOSE, 1) + b"\x82\x05short")
        assert [kind for write in runner.wire.kinds() for kind in write][:2] == [CONNECT, CLOSE]
        await asyncio.sleep(0)

    run(main())
