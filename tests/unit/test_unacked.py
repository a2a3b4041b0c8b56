from __future__ import annotations

from kohakuriver.tunnel.unacked import KeptWindow, Store
from kohakuriver.tunnel.windows import EARLY_DATA, MAX_WINDOW, Pool


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
