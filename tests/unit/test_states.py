from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kohakuriver.tunnel.states import KEPT, TRANSITIONS, Do, Event, Role, State
from tests.vectors import generate

ROWS = json.loads((generate.HERE / "states.json").read_text(encoding="utf-8"))
KINDS = st.sampled_from(list(TRANSITIONS))
EVENTS = st.lists(st.sampled_from(list(Event)), max_size=12)


def test_the_tables_are_what_the_vectors_say() -> None:
    tables = [
        {
            "version": version,
            "role": role.value,
            "state": state.value,
            "event": event.value,
            "to": step.to.value,
            "actions": [do.value for do in step.do],
        }
        for (version, role), table in TRANSITIONS.items()
        for (state, event), step in table.items()
    ]
    assert sorted(tables, key=str) == sorted(ROWS, key=str)


def test_the_tables_of_kept_streams_are_what_the_vectors_say() -> None:
    rows = json.loads((generate.HERE / "kept_states.json").read_text(encoding="utf-8"))
    assert {(row["role"], row["state"], row["event"]): (row["to"], row["actions"]) for row in rows} == {
        (role.value, state.value, event.value): (step.to.value, [do.value for do in step.do])
        for role, table in KEPT.items()
        for (state, event), step in table.items()
    }


@given(kind=KINDS, events=EVENTS)
def test_a_side_that_has_ended_stays_ended(kind: tuple[int, Role], events: list[Event]) -> None:
    state = State.WAITING if kind[1] is Role.OPENER else State.OPENING
    for event in events:
        step = TRANSITIONS[kind].get((state, event))
        following = step.to if step is not None else state
        assert state.local_done <= following.local_done
        assert state.remote_done <= following.remote_done
        assert state.gone <= following.gone
        state = following


@pytest.mark.parametrize("kind", list(TRANSITIONS))
def test_a_stream_that_is_over_on_the_wire_says_nothing_more(kind: tuple[int, Role]) -> None:
    table = TRANSITIONS[kind]
    said = [do for (state, _), step in table.items() if state.gone for do in step.do]
    assert set(said) <= {Do.RESET_LOCAL}
    assert not any(state is State.OVER for state, _ in table)


@pytest.mark.parametrize("kind", list(TRANSITIONS))
def test_a_stream_that_ends_on_the_wire_has_its_socket_seen_to_or_it_is_gone(kind: tuple[int, Role]) -> None:
    for (state, event), step in TRANSITIONS[kind].items():
        if step.to.gone and not state.gone:
            assert {Do.CLOSE_LOCAL, Do.RESET_LOCAL} & set(step.do) or event is Event.LOCAL_CLOSED
