"""The routing table, as a state machine beside a dictionary."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from kohakuriver import _frame
from tests.reference import frame as twin

IDS = st.one_of(st.integers(0, 20), st.integers(0, 0xFFFFFFFF), st.integers(0, 300).map(lambda i: i << 20))


class Target:
    pass


class TableMachine(RuleBasedStateMachine):
    """Adds and removes in any order; both tables must stay what the dictionary is."""

    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[Any] = [_frame.RoutingTable(), twin.RoutingTable()]
        self.model: dict[int, tuple[Target, int]] = {}
        self.targets = [Target() for _ in range(4)]

    @rule(target=ids, client_id=IDS)
    def an_id(self, client_id: int) -> int:
        return client_id

    @rule(client_id=ids, which=st.integers(0, 3), new_id=IDS)
    def add(self, client_id: int, which: int, new_id: int) -> None:
        for table in self.tables:
            if client_id in self.model:
                with pytest.raises(KeyError):
                    table.add(client_id, self.targets[which], new_id)
            else:
                table.add(client_id, self.targets[which], new_id)
        self.model.setdefault(client_id, (self.targets[which], new_id))

    @rule(client_id=ids)
    def remove(self, client_id: int) -> None:
        expected = self.model.pop(client_id, None)
        assert [table.remove(client_id) for table in self.tables] == [expected] * 2

    @rule(which=st.integers(0, 3))
    def remove_all_of_one_target(self, which: int) -> None:
        target = self.targets[which]
        for table in self.tables:
            for client_id, (other, _) in table.items():
                if other is target:
                    table.remove(client_id)
        self.model = {key: value for key, value in self.model.items() if value[0] is not target}

    @rule(client_id=ids)
    def look_up(self, client_id: int) -> None:
        for table in self.tables:
            assert table.get(client_id) == self.model.get(client_id)
            assert (client_id in table) == (client_id in self.model)

    @invariant()
    def all_are_there(self) -> None:
        for table in self.tables:
            assert len(table) == len(self.model)
            assert dict(table.items()) == self.model


TestTableMachine = TableMachine.TestCase


def test_thousands_of_ids_are_all_found_and_all_removed(frame: Any) -> None:
    table = frame.RoutingTable()
    ids = [i * 4096 for i in range(5000)]
    for i, client_id in enumerate(ids):
        table.add(client_id, ids, i)
    assert [table.get(client_id) for client_id in ids] == [(ids, i) for i in range(5000)]
    assert table.get(1) is None
    for client_id in ids[::2]:
        table.remove(client_id)
    assert [client_id in table for client_id in ids] == [False, True] * 2500
    assert [table.remove(client_id) for client_id in ids[1::2]] == [(ids, i) for i in range(1, 5000, 2)]
    assert len(table) == 0


def test_targets_are_told_apart_by_identity(frame: Any) -> None:
    first: list[int] = []
    second: list[int] = []
    table = frame.RoutingTable()
    table.add(1, first, 10)
    table.add(2, second, 20)
    for client_id, target in ((1, first), (2, second)):
        route = table.get(client_id)
        assert route is not None
        assert route[0] is target


@pytest.mark.parametrize("client_id", [-1, 1 << 32])
def test_an_id_that_is_no_id_is_an_overflow(frame: Any, client_id: int) -> None:
    table = frame.RoutingTable()
    for call in (
        table.get,
        table.remove,
        table.__contains__,
        lambda i: table.add(i, None, 0),
        lambda i: table.add(0, None, i),
    ):
        with pytest.raises(OverflowError):
            call(client_id)
    assert len(table) == 0


def test_a_removed_target_is_let_go(frame: Any) -> None:
    table, target = frame.RoutingTable(), Target()
    gone = weakref.ref(target)
    table.add(1, target, 1)
    table.remove(1)
    del target
    gc.collect()
    assert gone() is None


def test_a_table_in_a_cycle_with_its_target_is_collected(frame: Any) -> None:
    table, target = frame.RoutingTable(), Target()
    gone = weakref.ref(target)
    target.table = table  # type: ignore[attr-defined]
    table.add(1, target, 1)
    del table, target
    gc.collect()
    assert gone() is None
