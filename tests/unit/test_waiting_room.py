"""Who waits, and who has to go for another."""

from __future__ import annotations

from functools import partial

from kohakuriver.web.waiting_room import WaitingRoom


def test_a_source_that_fills_its_places_evicts_its_own_and_nobody_else() -> None:
    gone: list[str] = []
    room = WaitingRoom(100, 3)
    room.enter("first", partial(gone.append, "first"), "quiet")
    for number in range(10):
        room.enter(number, partial(gone.append, str(number)), "loud")
    assert gone == [str(number) for number in range(7)]
    assert len(room) == 4


def test_of_many_sources_the_one_that_has_waited_for_longest_goes() -> None:
    gone: list[int] = []
    room = WaitingRoom(16, 3)
    for number in range(20):
        room.enter(number, partial(gone.append, number), str(number))
    assert gone == [0, 1, 2, 3]
    room.leave(4)
    room.enter(20, partial(gone.append, 20), "20")
    assert gone == [0, 1, 2, 3]
