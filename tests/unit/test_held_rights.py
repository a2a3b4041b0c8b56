"""What is remembered of sessions that were lost, and of ports that take no datagrams, is bounded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any, cast

from kohakuriver.errors import UnavailableError
from kohakuriver.host.services.grants import MAX_HELD, Grants, Held
from kohakuriver.store import SessionCounts, Use
from kohakuriver.tunnel.udp import EARLY_BYTES, UdpStream
from kohakuriver.tunnel.udp_service import ALL_KEPT_BYTES, KEPT_BYTES, REFUSALS_APART, Datagrams, Refusals


class Asked:
    """Accounts of which the rights in `gone` are, and what was asked of them."""

    def __init__(self) -> None:
        self.asked: list[Use] = []
        self.gone: set[Use] = set()
        self.entitled: set[tuple[str, int]] = set()

    async def withdrawn(self, uses: Iterable[Use]) -> dict[Use, str]:
        self.asked = list(uses)
        return dict.fromkeys(self.gone.intersection(self.asked), "it is gone")

    async def uses(self, user: str, task_id: int) -> bool:
        return (user, task_id) in self.entitled


def lost(user: str, number: int, until: float) -> Held:
    return Held(Use(f"{user}'s", number, None), "node", f"c{number}", user, until)


def test_of_one_user_who_loses_sessions_without_end_the_newest_are_watched_and_all_of_everybody_else() -> None:
    async def check() -> None:
        accounts, revoked = Asked(), []

        async def revoke(node: str, container: str, user: str, reason: str) -> None:
            revoked.append((user, container))

        grants = Grants(cast(Any, accounts), revoke=revoke)
        later = time.monotonic() + 100
        grants.hold(lost("ann", 1, later))
        grants.hold(lost("bob", 1, later - 200))
        for number in range(2 * MAX_HELD):
            grants.hold(lost("eve", number, later))
        await grants.check()
        assert len(accounts.asked) == MAX_HELD + 1
        accounts.gone = {Use("ann's", 1, None), Use("eve's", 2 * MAX_HELD - 1, None), Use("eve's", 0, None)}
        await grants.check()
        await grants.check()
        assert sorted(revoked) == [("ann", "c1"), ("eve", f"c{2 * MAX_HELD - 1}")]
        assert len(accounts.asked) == MAX_HELD - 1

    asyncio.run(check())


class Elsewhere(SessionCounts):
    """Sessions at other hosts: one of ann's, while `there`."""

    there = 1

    async def elsewhere(self, user: str) -> int:
        return self.there if user == "ann" else 0


def test_what_a_user_left_stays_while_sessions_at_other_hosts_may_hang_on_another_right_to_the_task() -> None:
    async def check() -> None:
        accounts, revoked, counts = Asked(), [], Elsewhere()

        async def revoke(node: str, container: str, user: str, reason: str) -> None:
            revoked.append((user, container))

        grants = Grants(cast(Any, accounts), revoke=revoke, counts=counts)
        for user in ("ann", "bob"):
            grants.hold(lost(user, 1, time.monotonic() + 100))
        accounts.gone = {Use("ann's", 1, None), Use("bob's", 1, None)}
        accounts.entitled = {("ann", 1), ("bob", 1)}
        await grants.check()
        assert revoked == [("bob", "c1")]
        counts.there = 0
        await grants.check()
        assert revoked == [("bob", "c1"), ("ann", "c1")]
        counts.there = 1
        grants.hold(lost("ann", 2, time.monotonic() + 100))
        accounts.gone = {Use("ann's", 2, None)}
        await grants.check()  # she may not use that task any more
        assert revoked[2:] == [("ann", "c2")]

    asyncio.run(check())


def test_what_a_user_left_ends_with_the_last_right_to_the_task_and_is_tried_until_it_has() -> None:
    async def check() -> None:
        accounts, revoked, away = Asked(), [], [True]

        async def revoke(node: str, container: str, user: str, reason: str) -> None:
            if away:
                away.clear()
                raise UnavailableError("the node is away")
            revoked.append((user, container))

        grants = Grants(cast(Any, accounts), revoke=revoke)
        later = time.monotonic() + 100
        uses = [Use(token, 1, None) for token in ("first", "second")]
        for use in uses:
            grants.hold(Held(use, "node", "c1", "ann", later))
        accounts.gone = {uses[0]}
        await grants.check()
        assert away
        accounts.gone = set(uses)
        await grants.check()
        assert not away
        await grants.check()
        await grants.check()
        assert set(revoked) == {("ann", "c1")}
        assert not grants._held

    asyncio.run(check())


def test_ports_that_took_nothing_are_forgotten_one_by_one() -> None:
    now = 0.0
    refusals = Refusals(lambda: now)
    for port in range(1000):
        now = port / 10
        refusals.told(port)
    assert refusals.pause(999) == REFUSALS_APART
    assert refusals.pause(960) > 0 == refusals.pause(900)
    assert len(refusals._told) == REFUSALS_APART * 10


def test_datagrams_that_come_before_there_is_a_socket_are_bounded_in_bytes_too() -> None:
    class Owner:
        class totals:
            udp_dropped = 0

    stream = UdpStream(cast(Any, Owner), 80)
    stream.hold()
    for number in range(10):
        assert stream.send_local(bytes([number]) * 60_000)
    taken: list[bytes] = []

    def take(data: bytes) -> bool:
        taken.append(data)
        return True

    stream.send_local = take
    stream.release()
    assert [data[0] for data in taken] == [8, 9]
    assert sum(map(len, taken)) <= EARLY_BYTES
    assert Owner.totals.udp_dropped == 8


def test_datagrams_that_nobody_has_answered_are_bounded_for_the_process_and_make_room_when_their_streams_end() -> None:
    before = Datagrams.kept
    streams = [Datagrams() for _ in range(2 * ALL_KEPT_BYTES // KEPT_BYTES)]
    kept = sum(each.add(bytes(KEPT_BYTES // 2)) and each.add(bytes(KEPT_BYTES // 2)) for each in streams)
    assert kept == (ALL_KEPT_BYTES - before) // KEPT_BYTES
    assert not streams[0].add(b"one more")
    assert not streams[-1].add(b"one more")
    assert len(streams[0].take()) == 2
    assert streams[-1].add(b"one more")
    for each in streams:
        each.take()
    assert Datagrams.kept == before
