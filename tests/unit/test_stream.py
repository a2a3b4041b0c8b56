from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kohakuriver.tunnel.protocol import (
    CLOSE,
    CONNECT,
    CONNECTED,
    DATA,
    EOF,
    ERROR,
    PING,
    PONG,
    WINDOW,
    pack_limit,
    parse_limit,
)
from kohakuriver.tunnel.states import Do, Event, Role, State
from kohakuriver.tunnel.stream import PIECE, Action, Reading, Rules, Send, StreamCore, accepted
from kohakuriver.tunnel.v1_rules import V1Rules
from kohakuriver.tunnel.windows import EARLY_DATA, FIRST_WINDOW, MIN_WINDOW, Budget, ReceiveWindow
from tests.vectors import generate

ROWS = {
    (row["version"], row["role"], row["state"], row["event"]): (row["to"], row["actions"])
    for row in json.loads((generate.HERE / "states.json").read_text(encoding="utf-8"))
}
HAPPENS: dict[str, Callable[[StreamCore, int], Sequence[Action]]] = {
    "link": lambda core, version: core.link(version),
    "local_eof": lambda core, version: core.local_eof(),
    "remote_eof": lambda core, version: core.remote_eof(),
    "remote_close": lambda core, version: core.remote_close(),
    "remote_error": lambda core, version: core.remote_error(),
    "local_closed": lambda core, version: core.local_lost(),
    "local_error": lambda core, version: core.local_lost(b"EIO: broken"),
    "linger_over": lambda core, version: core.linger_over(),
    "link_lost": lambda core, version: core.link_lost(),
}
KINDS = {
    "send_connect": CONNECT,
    "send_connected": CONNECTED,
    "send_eof": EOF,
    "send_close": CLOSE,
    "send_error": ERROR,
}


def rules(role: Role = Role.OPENER, budget: Budget | None = None) -> Rules:
    return Rules(role, budget or Budget(), V1Rules(hold=1000, linger=2.0))


def opened(version: int = 2, limit: int = 1 << 20) -> StreamCore:
    """An opener's stream that its peer has taken."""
    core = StreamCore(rules())
    core.settled()
    core.link(version)
    core.connected(limit if version == 2 else None)
    return core


def in_state(version: int, role: str, state: str) -> StreamCore:
    core = (
        StreamCore(rules()) if role == "opener" else accepted(rules(Role.ACCEPTOR), 1 << 20 if version == 2 else None)
    )
    core.settled()
    if version == 1 and role == "opener" and state != "waiting":
        core.link(1)
    elif role == "opener" and state != "waiting":
        core.link(2)
    core.state = State(state)
    core.reading = Reading.ENDED if core.state.local_done else Reading.FLOWING
    return core


def established(core: StreamCore, role: str, version: int) -> Sequence[Action]:
    if role == "acceptor":
        return core.dialled()
    return core.connected(1 << 20 if version == 2 else None)


@pytest.mark.parametrize(("version", "role", "state", "event"), list(ROWS))
def test_a_stream_does_what_the_vectors_say(version: int, role: str, state: str, event: str) -> None:
    core = in_state(version, role, state)
    to, actions = ROWS[version, role, state, event]
    happens = HAPPENS.get(event)
    did = happens(core, version) if happens is not None else established(core, role, version)
    assert core.state.value == to
    assert [KINDS.get(action, action) for action in actions] == [
        action.kind if isinstance(action, Send) else action.value for action in did
    ]


@pytest.mark.parametrize("state", [state.value for state in State if state is not State.WAITING])
@pytest.mark.parametrize(("version", "role"), [(2, "opener"), (2, "acceptor"), (1, "opener"), (1, "acceptor")])
def test_what_has_no_row_changes_nothing(version: int, role: str, state: str) -> None:
    for event in Event:
        happens = HAPPENS.get(event.value)
        if happens is None or (version, role, state, event.value) in ROWS:
            continue
        core = in_state(version, role, state)
        if event is Event.LOCAL_EOF and not core.state.local_done:
            continue  # it is owed until it can be sent
        assert list(happens(core, version)) == []
        assert core.state.value == state


def test_what_is_read_before_there_is_a_link_follows_the_connect_and_the_end_of_file_follows_that() -> None:
    core = StreamCore(rules())
    core.settled()
    assert core.local_data(b"early") == ()
    assert core.flow(blocked=False) is Do.PAUSE_LOCAL
    assert core.local_eof() == ()
    assert list(core.link(2)) == [Send(CONNECT, pack_limit(FIRST_WINDOW)), Send(DATA, b"early"), Send(EOF)]
    assert core.state is State.OPENING_LOCAL_ENDED


def test_no_more_than_early_data_is_sent_before_the_peer_has_given_a_limit() -> None:
    core = StreamCore(rules())
    core.settled()
    core.local_data(bytes(EARLY_DATA + 10))
    sent = core.link(2)
    assert sum(len(each.payload) for each in sent if isinstance(each, Send) and each.kind == DATA) == EARLY_DATA
    assert core.flow(blocked=False) is Do.PAUSE_LOCAL
    assert list(core.connected(EARLY_DATA + 10)) == [Send(DATA, bytes(10))]


def test_what_waited_is_sent_in_pieces_that_let_others_through() -> None:
    core = opened()
    assert [len(each.payload) for each in core.local_data(bytes(PIECE + 1)) if isinstance(each, Send)] == [PIECE, 1]


def test_bytes_pass_at_once_only_within_the_window_and_behind_what_waits() -> None:
    core = opened(limit=100_000)
    assert core.passes(90_000)
    assert not core.passes(10_001)
    assert core.passes(10_000)
    core.local_data(b"waits")
    core.sending.raise_to(1 << 20)
    assert not core.passes(1)
    assert list(core.flush()) == [Send(DATA, b"waits")]
    assert core.passes(1)


def test_the_local_socket_is_read_only_while_what_is_read_can_be_sent() -> None:
    core = opened(limit=100_000)
    assert core.flow(blocked=True) is Do.PAUSE_LOCAL
    assert core.flow(blocked=True) is None
    assert core.flow(blocked=False) is Do.RESUME_LOCAL
    core.passes(100_000)
    assert core.flow(blocked=False) is Do.PAUSE_LOCAL
    assert core.sending.raise_to(100_001)
    assert core.flow(blocked=False) is Do.RESUME_LOCAL


def test_a_socket_that_has_not_settled_is_not_paused() -> None:
    core = StreamCore(rules())
    assert core.flow(blocked=False) is None
    core.settled()
    assert core.flow(blocked=False) is Do.PAUSE_LOCAL


def test_a_socket_that_may_be_read_when_it_comes_has_settled_and_another_is_paused_once_it_has() -> None:
    waiting, blocked, free = StreamCore(rules()), StreamCore(rules()), StreamCore(rules())
    for core in (blocked, free):
        core.link(2)
    assert [waiting.begins(False), blocked.begins(True), free.begins(False)] == [False, False, True]
    assert free.flow(blocked=True) is Do.PAUSE_LOCAL
    for core, is_blocked in ((waiting, False), (blocked, True)):
        assert core.flow(is_blocked) is None
        core.settled()
        assert core.flow(is_blocked) is Do.PAUSE_LOCAL


def test_more_than_was_granted_ends_the_session_and_is_not_held() -> None:
    core = opened()
    assert core.arrive(FIRST_WINDOW, 0.0) in (None, Send(PING))
    assert core.arrive(1, 0.0) is Do.END_SESSION
    assert core.held == FIRST_WINDOW


def test_a_window_stays_paid_for_until_what_it_let_in_is_delivered() -> None:
    budget = Budget()
    core = accepted(rules(Role.ACCEPTOR, budget), 1 << 20)
    whole = budget.left + FIRST_WINDOW
    core.arrive(1000, 0.0)
    core.remote_close()
    assert budget.left < whole
    core.drop()
    assert budget.left == whole


def test_a_window_is_given_back_at_once_where_nothing_is_held() -> None:
    budget = Budget()
    core = accepted(rules(Role.ACCEPTOR, budget), 1 << 20)
    core.remote_close()
    assert budget.left == Budget().left


def test_a_dial_that_fails_when_the_user_has_gone_lets_go_of_what_was_held_for_it() -> None:
    core = accepted(rules(Role.ACCEPTOR), None)
    core.arrive(5000, 0.0)
    assert core.link_reading() is Do.HOLD_LINK
    core.remote_close()
    assert list(core.local_lost(b"ECONNREFUSED: nobody")) == [Do.RESET_LOCAL]
    core.drop()
    assert core.link_reading() is Do.FREE_LINK


def test_a_peer_of_version_1_takes_a_stream_over_to_its_rules() -> None:
    budget = Budget()
    core = StreamCore(rules(budget=budget))
    core.settled()
    core.link(2)
    core.local_data(bytes(EARLY_DATA + 1))
    assert list(core.connected(None)) == [Send(DATA, bytes(1))]
    assert budget.left == Budget().left
    assert core.sending.room > 1 << 60
    assert list(core.local_eof()) == [Do.LINGER]


def test_an_end_of_file_that_a_peer_of_version_1_could_not_understand_is_followed_by_a_linger() -> None:
    core = StreamCore(rules())
    core.settled()
    core.link(2)
    assert list(core.local_eof()) == [Send(EOF)]
    assert list(core.connected(None)) == [Do.LINGER]
    assert list(core.linger_over()) == [Send(CLOSE), Do.LINGER]


def test_a_linger_begins_anew_with_data_that_comes() -> None:
    core = opened(version=1)
    core.local_eof()
    assert core.linger_begins(100.0) == 2.0
    core.arrive(1, 101.5)
    assert core.linger_left(102.0) == 1.5
    assert core.linger_left(103.5) == 0.0


# -- two cores on a wire -------------------------------------------------------------------------------------------


class End:
    """One core, its local socket as an application sees it, and what is on its way from it."""

    def __init__(self, core: StreamCore) -> None:
        self.core = core
        self.wire: deque[Send] = deque()
        self.written = bytearray()  # by the application
        self.queued = bytearray()  # for it, in the socket's queue
        self.read = bytearray()
        self.app_ended = self.shut = self.closed = self.reset = False
        self.owed: Do | None = None
        self.paused = False

    def do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                assert not (self.wire and self.wire[-1].kind in (CLOSE, ERROR)), "said more behind its end"
                self.wire.append(action)
            elif action in (Do.SHUT_LOCAL, Do.CLOSE_LOCAL):
                self.owed = action
            elif action is Do.RESET_LOCAL:
                self.reset = True
                self.core.drop()
        self.settle()

    def settle(self) -> None:
        """What is owed behind the last byte, and whether the application's bytes are read."""
        if not self.queued and self.owed is not None:
            self.shut = True
            self.closed |= self.owed is Do.CLOSE_LOCAL
            self.owed = None
            if self.closed:
                self.do(self.core.local_lost())
                self.core.drop()
        change = self.core.flow(blocked=False)
        if change is not None:
            assert self.paused == (change is Do.RESUME_LOCAL)
            self.paused = change is Do.PAUSE_LOCAL

    @property
    def is_over(self) -> bool:
        return self.closed or self.reset


class Wire(RuleBasedStateMachine):
    """Every byte arrives once and in order, or the stream ends on both sides, however things interleave."""

    @initialize(first=st.sampled_from([1, 5000, FIRST_WINDOW]), budget=st.sampled_from([0, 1 << 18, 1 << 26]))
    def begin(self, first: int, budget: int) -> None:
        self.budgets = [Budget(budget, first, 1 << 20) for _ in range(2)]
        self.total = budget
        self.user = End(StreamCore(rules(Role.OPENER, self.budgets[0])))
        self.container: End | None = None
        self.now = 0.0
        self.dialling = False
        self.user.core.settled()
        self.user.settle()

    def ends(self) -> list[tuple[End, End | None]]:
        return [(self.user, self.container), *([(self.container, self.user)] if self.container is not None else [])]

    def end(self, up: bool) -> End | None:
        return self.user if up else self.container

    @precondition(lambda self: self.user.core.state is State.WAITING)
    @rule()
    def link_comes(self) -> None:
        self.user.do(self.user.core.link(2))

    @rule(up=st.booleans(), size=st.sampled_from([1, 30, 5000, 70_000, 300_000]))
    def application_writes(self, up: bool, size: int) -> None:
        end = self.end(up)
        if end is None or end.paused or end.app_ended or end.is_over or (self.dialling and not up):
            return
        core = end.core
        if core.state is State.WAITING:
            size = min(size, EARLY_DATA - len(core.early))
        elif core.early:
            return
        else:
            size = min(size, max(1, core.sending.room))
        data = bytes((len(end.written) + i) * 31 % 251 for i in range(size))
        end.written += data
        if core.state is not State.WAITING and core.passes(size):
            end.wire.append(Send(DATA, data))
            end.settle()
        else:
            end.do(core.local_data(data))

    @rule(up=st.booleans())
    def application_ends(self, up: bool) -> None:
        end = self.end(up)
        if end is not None and not (end.paused or end.app_ended or end.is_over or (self.dialling and not up)):
            end.app_ended = True
            end.do(end.core.local_eof())

    @rule(up=st.booleans(), size=st.sampled_from([1, 100, 1 << 20]))
    def application_reads(self, up: bool, size: int) -> None:
        end = self.end(up)
        if end is None or end.is_over or (self.dialling and not up):
            return
        taken = end.queued[:size]
        del end.queued[: len(taken)]
        end.read += taken
        limit = end.core.consumed(len(taken)) if taken else None
        if limit is not None:
            end.wire.append(Send(WINDOW, pack_limit(limit)))
        end.settle()

    @rule(up=st.booleans())
    def socket_breaks(self, up: bool) -> None:
        end = self.end(up)
        if end is not None and not end.is_over and not (self.dialling and not up):
            end.do(end.core.local_lost(b"ECONNRESET: reset"))
            end.reset = True
            end.core.drop()

    @precondition(lambda self: self.dialling)
    @rule(succeeds=st.booleans())
    def dial_ends(self, succeeds: bool) -> None:
        assert self.container is not None
        self.dialling = False
        core = self.container.core
        core.settled()
        self.container.do(core.dialled() if succeeds else core.local_lost(b"ECONNREFUSED: nobody"))
        if not succeeds:
            self.container.reset = True

    @rule(up=st.booleans())
    def message_arrives(self, up: bool) -> None:
        source = self.end(up)
        if source is None or not source.wire:
            return
        message = source.wire.popleft()
        self.now += 0.001
        if message.kind == CONNECT:
            core = accepted(rules(Role.ACCEPTOR, self.budgets[1]), parse_limit(message.payload))
            self.container = End(core)
            self.dialling = True
            return
        target = self.end(not up)
        assert target is not None
        if not target.core.state.gone:  # else its id is free, and the message for nobody
            self.deliver(target, message)

    def deliver(self, end: End, message: Send) -> None:
        core, limit = end.core, parse_limit(message.payload)
        if message.kind == DATA:
            if not core.state.remote_done:
                owed = core.arrive(len(message.payload), self.now)
                assert owed in (None, Send(PING)), "the peer kept its limit"
                end.queued += message.payload
                end.do(() if owed is None else (owed,))
        elif message.kind == WINDOW:
            core.sending.raise_to(limit or 0)
            end.do(core.flush())
        elif message.kind == PING:
            end.wire.append(Send(PONG))
        elif message.kind == PONG:
            granted = core.pong(self.now)
            end.do(() if granted is None else (Send(WINDOW, pack_limit(granted)),))
        elif message.kind == CONNECTED:
            end.do(core.connected(limit))
        else:
            end.do({EOF: core.remote_eof, CLOSE: core.remote_close, ERROR: core.remote_error}[message.kind]())

    @invariant()
    def bytes_arrive_once_and_in_order(self) -> None:
        for end, other in self.ends() if hasattr(self, "user") else ():
            if other is not None:
                whole = end.read + end.queued
                assert whole == other.written[: len(whole)]

    @invariant()
    def nothing_holds_more_than_its_window(self) -> None:
        for end, _ in self.ends() if hasattr(self, "user") else ():
            window = end.core.inbound
            if isinstance(window, ReceiveWindow) and not end.core.state.gone:
                assert end.core.held <= max(window.size, MIN_WINDOW, EARLY_DATA)

    def teardown(self) -> None:
        if not hasattr(self, "user"):
            return
        self.run_dry()
        user, container = self.user, self.container
        if container is None:  # it broke before there was a link
            assert user.is_over
            return
        broken = user.reset or container.reset
        if broken:
            assert (user.is_over, container.is_over) == (True, True)
        else:
            assert (user.read, container.read) == (container.written, user.written)
            assert (container.shut, user.shut) == (user.app_ended, container.app_ended)
        if user.is_over and container.is_over:
            assert [each.left for each in self.budgets] == [self.total, self.total]

    def run_dry(self) -> None:
        """Everything that is under way arrives, and the applications read on."""
        if self.user.core.state is State.WAITING:
            self.link_comes()
        while any(end.wire or (end.queued and not end.is_over) for end, _ in self.ends()) or self.dialling:
            if self.dialling:
                self.dial_ends(succeeds=True)
            for up in (True, False):
                self.application_reads(up=up, size=1 << 20)
                self.message_arrives(up=up)


Wire.TestCase.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
TestWire = Wire.TestCase
