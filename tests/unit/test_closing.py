"""The closing handshake by itself: who spoke first, and how far it has come."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kohakuriver.tunnel.closing import CloseState, Closing


def test_the_side_that_speaks_first_says_how_it_ends() -> None:
    ours, theirs = Closing(), Closing()
    assert ours.begin(4000, "enough")
    assert not ours.peer_closes(1000, "bye")
    assert (ours.code, ours.reason) == (4000, "enough")
    assert theirs.peer_closes(1000, "bye")
    assert not theirs.begin(4000, "enough")
    assert (theirs.code, theirs.reason) == (1000, "bye")
    assert ours.state is theirs.state is CloseState.FINISHING


def test_a_connection_that_breaks_has_no_code_and_says_why() -> None:
    closing = Closing()
    assert closing.lost(ConnectionResetError(104, "Connection reset by peer"))
    assert (closing.code, closing.reason) == (1006, "the connection was lost (Connection reset by peer)")
    assert not closing.lost(None)


def test_why_we_cut_a_connection_counts_more_than_what_the_system_says_then() -> None:
    closing = Closing()
    closing.cut("no answer to a ping for 20 s")
    closing.cut()
    closing.lost(OSError(9, "Bad file descriptor"))
    assert (closing.code, closing.reason) == (1006, "no answer to a ping for 20 s")


STEPS = {
    "begin": lambda closing: closing.begin(1000, "ours"),
    "fail": lambda closing: closing.begin(1002, "wrong", failed=True),
    "peer": lambda closing: closing.peer_closes(1001, "theirs"),
    "finish": lambda closing: closing.finish(),
    "cut": lambda closing: closing.cut("cut"),
    "lost": lambda closing: closing.lost(None),
}


@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=12))
def test_a_close_frame_is_due_once_at_most_and_no_step_leads_back(steps: list[str]) -> None:
    closing, due, reason = Closing(), 0, ""
    for step in steps:
        before = closing.state
        answer = STEPS[step](closing)
        due += bool(answer) and step != "lost"
        assert closing.state >= before
        assert closing.state or not answer
        assert reason in ("", closing.reason)
        reason = closing.reason
    assert due <= 1
