from __future__ import annotations

import pytest

from kohakuriver.tunnel.kept import Identity, accepted_kept
from kohakuriver.tunnel.protocol import ACK, EOF, KEY, WINDOW, pack_limit, pack_pair
from kohakuriver.tunnel.states import Role
from kohakuriver.tunnel.stream import Rules
from kohakuriver.tunnel.unacked import KeptWindow, Store
from kohakuriver.tunnel.v1_rules import V1Rules
from kohakuriver.tunnel.windows import EARLY_DATA, MAX_WINDOW, Budget, Pool


def test_a_stream_may_keep_what_is_granted_until_the_budget_is_used_up() -> None:
    store = Store(1000)
    window = KeptWindow(store)
    window.raise_to(1 << 40)
    assert window.room == MAX_WINDOW
    window.unacked.add(bytes(EARLY_DATA))
    window.renew()
    assert store.used == EARLY_DATA
    assert window.room == EARLY_DATA
    window.unacked.ack(EARLY_DATA)
    window.renew()
    assert window.room == EARLY_DATA + MAX_WINDOW


def test_what_one_endpoint_keeps_others_of_its_share_may_not() -> None:
    all_of_them = Pool(1000)
    first, second = Store(within=all_of_them), Store(within=all_of_them)
    KeptWindow(first).unacked.add(bytes(EARLY_DATA))
    assert second.share == EARLY_DATA
    assert second.used == 0


@pytest.mark.parametrize(
    ("kind", "payload"),
    [(ACK, pack_limit(EARLY_DATA)), (WINDOW, pack_pair(1 << 40, EARLY_DATA)), (EOF, pack_pair(0, EARLY_DATA))],
)
def test_whatever_acknowledges_gives_room_to_a_stream_that_may_not_keep_all_that_was_granted(
    kind: int, payload: bytes
) -> None:
    rules = Rules(Role.ACCEPTOR, Budget(), V1Rules(1000, 2.0), Store(1000))
    core = accepted_kept(rules, Identity(bytes(KEY), 60), 1 << 40)
    assert core.local_data(bytes(EARLY_DATA))
    core.take(WINDOW, pack_pair(1 << 40, 0))
    assert core.sending.room == 0
    core.take(kind, payload)
    assert core.sending.room == MAX_WINDOW
