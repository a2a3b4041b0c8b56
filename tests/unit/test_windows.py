from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kohakuriver.tunnel import windows as rules
from kohakuriver.tunnel.windows import Budget, Pool, ReceiveWindow, SendWindow
from tests.vectors import generate

WINDOWS = json.loads((generate.HERE / "windows.json").read_text(encoding="utf-8"))


def may_send(limit: int) -> SendWindow:
    window = SendWindow()
    window.raise_to(limit)
    return window


def test_a_limit_never_shrinks() -> None:
    window = may_send(100)
    window.sent = 100
    assert not window.raise_to(50)
    assert not window.raise_to(100)
    assert (window.limit, window.room) == (100, 0)


def test_a_raised_limit_says_whether_there_was_no_room_before() -> None:
    window = may_send(100)
    window.sent = 99
    assert not window.raise_to(101)
    window.sent = 101
    assert window.raise_to(102)
    assert window.room == 1


def test_a_limit_of_64_bits_is_taken() -> None:
    window = may_send(0)
    assert window.raise_to((1 << 64) - 1)
    assert window.room == (1 << 64) - 1


def test_a_v1_stream_has_no_limit() -> None:
    window = may_send(rules.UNLIMITED)
    window.spend(1 << 40)
    assert window.room >= 1 << 60
    assert not window.raise_to(5)


def test_the_peer_may_send_what_was_granted_and_not_a_byte_more() -> None:
    window = ReceiveWindow(Budget(first=100_000, cap=100_000))
    assert window.receive(100_000)
    assert not window.receive(1)


def test_a_small_window_still_lets_early_data_in() -> None:
    window = ReceiveWindow(Budget(first=1))
    assert window.receive(rules.EARLY_DATA)
    assert not window.receive(1)


def test_credit_is_given_on_consumption_a_quarter_of_the_window_at_a_time() -> None:
    window = ReceiveWindow(Budget(first=1000, cap=1000))
    window.receive(1000)
    assert window.consume(249) is None
    assert window.consume(1) == 1250
    assert window.consume(249) is None
    assert window.consume(501) == 2000


@given(sizes=st.lists(st.integers(1, 50), max_size=60))
def test_a_window_of_one_byte_grants_every_byte_that_is_consumed(sizes: list[int]) -> None:
    window = ReceiveWindow(Budget(first=1, cap=1))
    total = 0
    for size in sizes:
        window.receive(size)
        total += size
        assert window.consume(size) == total + 1


@given(
    first=st.integers(1, 1 << 20),
    arrivals=st.lists(st.tuples(st.integers(1, 1 << 16), st.booleans(), st.floats(0, 1)), max_size=80),
)
def test_the_limit_is_never_more_than_a_window_beyond_what_was_consumed(
    first: int, arrivals: list[tuple[int, bool, float]]
) -> None:
    budget = Budget(first=first)
    window = ReceiveWindow(budget)
    now, last = 0.0, window.granted
    for size, answered, passed in arrivals:
        size = min(size, window.granted - window.received)
        now += passed
        assert window.receive(size)
        window.wants_ping(now)
        for limit in (window.consume(size), window.pong(now) if answered else None):
            if limit is not None:
                assert limit > last
                last = limit
        assert last == window.granted <= window.consumed + window.size
        assert window.granted > window.received, "the sender would wait for ever"
        assert window.size <= budget.cap or window.size == first


def pumped(
    window: ReceiveWindow, *, rtt: float, rate: float, rounds: int, read: int = 1 << 14, noise: float = 0.0
) -> None:
    """A peer that always has more to send: each round trip brings one burst, in reads of ``read`` bytes.

    A burst is what the limits allow that the peer has heard of, or what the link's rate lets through; it takes
    ``rtt`` seconds, or as long as the link needs for it. PONGs come ahead of bulk, so right before a burst. ``noise``
    makes round trips shorter or longer by up to that part.
    """
    chance = random.Random(1)
    now, limit, pinged = 0.0, window.granted, False
    for _ in range(rounds):
        burst = limit - window.received
        limit = window.granted
        now += max(rtt, burst / rate) * (1 + noise * chance.uniform(-1, 1))
        if pinged:
            pinged = False
            limit = window.pong(now) or limit
        while burst > 0:
            window.receive(min(read, burst))
            limit = window.consume(min(read, burst)) or limit
            pinged = window.wants_ping(now) or pinged
            burst -= read


@pytest.mark.parametrize("read", [1 << 10, 1 << 14, 1 << 16, 1 << 18, 1 << 20])
def test_a_window_grows_to_the_bandwidth_delay_product_of_a_long_link(read: int) -> None:
    window = ReceiveWindow(Budget())
    pumped(window, rtt=0.1, rate=125e6, rounds=40, read=read)
    assert window.size >= 12.5e6


def test_a_window_does_not_grow_beyond_what_the_link_can_use() -> None:
    window = ReceiveWindow(Budget())
    pumped(window, rtt=0.1, rate=1e6, rounds=400)
    assert window.size <= 2 * rules.FIRST_WINDOW


def test_a_window_stays_small_where_a_larger_one_would_only_make_small_messages_wait() -> None:
    window = ReceiveWindow(Budget())
    pumped(window, rtt=0.0001, rate=1e9, rounds=20_000, noise=0.5)
    assert window.size <= 8 * rules.FIRST_WINDOW


def test_a_window_grows_to_its_cap_and_asks_for_no_ping_any_more() -> None:
    window = ReceiveWindow(Budget(first=1 << 16, cap=1 << 18))
    pumped(window, rtt=0.1, rate=1e12, rounds=20)
    assert window.size == 1 << 18
    window.receive(window.granted - window.received)
    assert not window.wants_ping(1e9)


def test_while_others_receive_too_no_more_is_under_way_than_fills_a_round_trip() -> None:
    budget = Budget()
    window = ReceiveWindow(budget)
    pumped(window, rtt=0.0004, rate=1e9, rounds=200)
    assert window.size >= 1 << 20
    budget.shared = True
    ahead = []
    for _ in range(100):
        window.receive(1 << 14)
        window.consume(1 << 14)
        ahead.append(window.granted - window.consumed)
        if ahead[-1] < 1 << 14:
            break
    most = max(rules.FIRST_WINDOW, rules.SHARED_PART * 1e9 * 0.0004)
    assert min(ahead) >= most * 3 / 4 - (1 << 14)
    assert ahead[-1] <= most
    budget.shared = False
    window.receive(1 << 14)
    assert window.consume(1 << 14) == window.consumed + window.size


def test_a_window_grows_over_a_long_link_that_others_use_too() -> None:
    budget = Budget()
    budget.shared = True
    window = ReceiveWindow(budget)
    pumped(window, rtt=0.1, rate=125e6, rounds=60)
    assert window.size >= 12.5e6


def full_link(windows: list[ReceiveWindow], *, rtt: float, rate: float, rounds: int) -> list[int]:
    """Bytes that each got in the second half: of a full link a stream gets what part it has of what is under way."""
    half = [0] * len(windows)
    now, pinged = 0.0, [False] * len(windows)
    for number in range(rounds):
        ahead = [window.granted - window.received for window in windows]
        now += max(rtt, sum(ahead) / rate)
        for index, window in enumerate(windows):
            if pinged[index]:
                pinged[index] = False
                window.pong(now)
            while ahead[index] > 0:
                size = min(1 << 14, ahead[index])
                assert window.receive(size)
                window.consume(size)
                pinged[index] = window.wants_ping(now) or pinged[index]
                ahead[index] -= size
        if number == rounds // 2:
            half = [window.received for window in windows]
    return [window.received - before for window, before in zip(windows, half, strict=True)]


@pytest.mark.parametrize(("rtt", "rate"), [(0.0004, 1e9), (0.003, 3e8), (0.05, 5e7), (0.1, 2e7)])
def test_streams_that_share_a_full_link_get_the_same_although_one_was_there_first(rtt: float, rate: float) -> None:
    budget = Budget()
    windows = [ReceiveWindow(budget)]
    pumped(windows[0], rtt=rtt, rate=rate, rounds=60)
    budget.shared = True
    windows += [ReceiveWindow(budget) for _ in range(7)]
    got = full_link(windows, rtt=rtt, rate=rate, rounds=600)
    assert min(got) >= 0.8 * sum(got) / len(got)


def test_what_was_measured_of_a_link_says_nothing_of_the_next() -> None:
    budget = Budget()
    pumped(ReceiveWindow(budget), rtt=0.0004, rate=1e9, rounds=200)
    budget.shared = True
    assert budget.share(budget.way(b"")) < rules.MAX_WINDOW
    budget.begin()
    assert budget.share(budget.way(b"")) == rules.MAX_WINDOW


def test_what_a_user_nearby_has_measured_holds_up_nobody_far_away() -> None:
    budget = Budget()
    pumped(ReceiveWindow(budget, b"near"), rtt=0.0004, rate=1e9, rounds=200)
    budget.shared = True
    far = [ReceiveWindow(budget, b"far") for _ in range(2)]
    full_link(far, rtt=0.1, rate=125e6, rounds=120)
    assert min(window.in_force for window in far) >= 4e6


def test_of_openers_that_come_and_go_only_those_with_streams_are_remembered_for_long() -> None:
    budget = Budget()
    stays = ReceiveWindow(budget, b"stays")
    budget.way(b"goes").fastest = budget.way(b"stays").fastest = 1e6
    assert budget.way(b"goes").fastest == 1e6
    assert budget.way(None) is not budget.way(None)
    for number in range(rules.OPENERS):
        budget.way(str(number).encode())
    assert (budget.way(b"stays").fastest, budget.way(b"goes").fastest) == (1e6, 0.0)
    stays.close()


def test_a_pong_that_nobody_asked_for_changes_nothing() -> None:
    window = ReceiveWindow(Budget())
    window.receive(rules.FIRST_WINDOW)
    window.consume(rules.FIRST_WINDOW)
    assert window.pong(1.0) is None
    assert window.size == rules.FIRST_WINDOW


def test_only_one_ping_is_under_way_at_a_time() -> None:
    window = ReceiveWindow(Budget())
    window.receive(rules.FIRST_WINDOW // 2)
    assert window.wants_ping(0.0)
    window.receive(rules.FIRST_WINDOW // 2)
    assert not window.wants_ping(0.1)


def test_a_budget_gives_new_streams_less_when_most_is_spent_and_never_nothing() -> None:
    budget = Budget(total=600_000)
    sizes = [ReceiveWindow(budget).size for _ in range(5)]
    assert sizes == [262_144, 262_144, 75_712, rules.MIN_WINDOW, rules.MIN_WINDOW]
    assert budget.left == 0


@pytest.mark.parametrize("vector", WINDOWS, ids=[vector["name"] for vector in WINDOWS])
def test_windows_are_announced_and_paid_for_as_the_vectors_say(vector: dict[str, Any]) -> None:
    budget = Budget(vector["total"], vector["first"], vector["cap"])
    windows: dict[int, ReceiveWindow] = {}
    for event in vector["events"]:
        assert play(event, budget, windows) == {name: event[name] for name in event if name in RESULTS}, event
        assert budget.left == event["left"], event


RESULTS = {"limit", "ok", "ping"}


def play(event: dict[str, Any], budget: Budget, windows: dict[int, ReceiveWindow]) -> dict[str, object]:
    """What one event leads to."""
    do, stream, at = event["do"], event.get("stream", 0), event.get("at", 0) / 1e6
    if do == "shared":
        budget.shared = event["value"]
    elif do == "open":
        windows[stream] = ReceiveWindow(budget, event["opener"].to_bytes(12, "big"))
        return {"limit": windows[stream].granted}
    elif do == "recv":
        ok = windows[stream].receive(event["size"])
        return {"ok": ok, "ping": ok and windows[stream].wants_ping(at)}
    elif do == "consume":
        return {"limit": windows[stream].consume(event["size"])}
    elif do == "pong":
        return {"limit": windows[stream].pong(at)}
    elif do == "attach":
        windows[stream].attach(budget)
        return {"limit": windows[stream].granted}
    elif do == "detach":
        windows[stream].detach()
    else:
        windows[stream].close()
    return {}


def test_a_spent_budget_lets_no_window_grow() -> None:
    budget = Budget(total=300_000)
    window = ReceiveWindow(budget)
    ReceiveWindow(budget)
    pumped(window, rtt=0.1, rate=1e12, rounds=20)
    assert window.size == rules.FIRST_WINDOW


@given(ends=st.lists(st.booleans(), max_size=60))
def test_the_budget_is_whole_again_when_all_streams_have_ended(ends: list[bool]) -> None:
    budget = Budget(total=1 << 20)
    windows: list[ReceiveWindow] = []
    for end in ends:
        if end and windows:
            windows.pop(0).close()
        else:
            windows.append(ReceiveWindow(budget))
            pumped(windows[-1], rtt=0.1, rate=1e12, rounds=3)
    for window in windows:
        window.close()
        window.close()
    assert budget.left == 1 << 20


def test_windows_of_several_endpoints_are_paid_for_from_what_they_have_together() -> None:
    node = Pool(1000)
    user = Pool(600, node)
    first, second = Budget(500, first=400, within=user), Budget(500, first=400, within=user)
    one, two = ReceiveWindow(first), ReceiveWindow(second)
    assert [each.left for each in (first, second, user, node)] == [0, 0, 0, 400]
    assert (one.size, two.size) == (400, 400)  # of which 200 are what each window has at least, whatever is left
    other = ReceiveWindow(Budget(5000, first=5000, within=Pool(None, node)))
    assert (other.size, node.left) == (4096, 0)
    for window in (one, two, other):
        window.close()
    assert [each.left for each in (first, second, user, node)] == [500, 500, 600, 1000]
