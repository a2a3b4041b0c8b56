"""The backlog: a bound for all that waits in a program, and the greediest go first."""

from __future__ import annotations

from collections.abc import Hashable

from hypothesis import given
from hypothesis import strategies as st

from kohakuriver.tunnel.backlog import Backlog

MOST = 1000


class Queue:
    def __init__(self, owner: str, backlog: Backlog) -> None:
        self.owner: Hashable = owner
        self.backlog = backlog
        self.queued, self.evicted = 0, False

    def change(self, size: int) -> None:
        self.queued += size
        self.backlog.count(self, size)

    def evict(self) -> None:
        self.evicted = True


def test_the_fullest_queue_goes_of_the_owner_who_has_most_in_all() -> None:
    backlog = Backlog(MOST)
    big = Queue("ann", backlog)
    small = [Queue("eve", backlog) for _ in range(10)]
    big.change(400)
    for queue in small:
        queue.change(60)
    small[3].change(1)
    assert [queue.evicted for queue in small] == [i == 3 for i in range(10)]
    assert not big.evicted
    assert backlog.total == 400 + 9 * 60


def test_what_is_freed_of_a_queue_that_went_is_not_counted_again() -> None:
    backlog = Backlog(MOST)
    queue, other = Queue("eve", backlog), Queue("ann", backlog)
    queue.change(MOST + 1)
    assert queue.evicted
    other.change(10)
    queue.change(-queue.queued)
    assert backlog.total == 10


def test_the_fullest_queue_goes_of_an_owner_who_has_more_than_a_share_and_of_nobody_else() -> None:
    backlog = Backlog(0, share=MOST)
    others = [Queue("ann", backlog), Queue("bob", backlog)]
    for queue in others:
        queue.change(MOST)
    small, big = Queue("eve", backlog), Queue("eve", backlog)
    small.change(MOST // 4)
    big.change(MOST - MOST // 4)
    assert not big.evicted
    small.change(1)
    assert (small.evicted, big.evicted) == (False, True)
    assert not any(queue.evicted for queue in others)
    assert backlog.total == 2 * MOST + MOST // 4 + 1
    big.change(-big.queued)
    assert backlog.total == 2 * MOST + MOST // 4 + 1


def test_without_a_bound_nobody_goes() -> None:
    backlog = Backlog(0)
    queue = Queue("eve", backlog)
    queue.change(1 << 40)
    assert not queue.evicted


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 400), st.booleans()), max_size=60))
def test_no_more_waits_than_the_bound_and_who_has_less_than_a_share_never_goes(
    changes: list[tuple[int, int, bool]],
) -> None:
    backlog = Backlog(MOST)
    queues = [Queue(f"user{i % 3}", backlog) for i in range(10)]
    for index, size, more in changes:
        queue = queues[index]
        if queue.evicted:
            continue
        gone = {each for each in queues if each.evicted}
        queue.change(size if more else -min(size, queue.queued))
        assert backlog.total == sum(each.queued for each in queues if not each.evicted) <= MOST
        for each in {each for each in queues if each.evicted} - gone:
            assert sum(one.queued for one in queues if one.owner == each.owner and one not in gone) * 3 >= MOST
