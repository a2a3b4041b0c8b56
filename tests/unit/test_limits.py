"""Limits: their names and their bounds."""

from __future__ import annotations

import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from kohakuriver.errors import UsageError
from kohakuriver.limits import Limits, from_environment

ROOT = Path(__file__).resolve().parents[2]


def test_nothing_set_is_the_default() -> None:
    assert from_environment({}) == Limits()
    assert from_environment({"KOHAKURIVER_MAX_RATE": ""}) == Limits()


def test_each_variable_changes_its_own_limit() -> None:
    for field in fields(Limits):
        value = {
            "max_rate": 1 << 20,
            "max_message": 2 << 20,
            "max_body": 1 << 17,
            "max_audit": 2 << 20,
            "max_node_logs": 2 << 20,
            "max_backlog": 100 << 20,
            "max_user_backlog": 99 << 20,
            "max_bodies": 2 << 20,
            **dict.fromkeys(("max_memory", "max_log", "task_memory", "task_shm", "task_log"), 32 << 20),
        }.get(field.name, 5000)
        if field.name == "handshake_timeout":
            value = 3
        found = asdict(from_environment({f"KOHAKURIVER_{field.name.upper()}": str(value)}))
        assert found == {**asdict(Limits()), field.name: value}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MAX_SESSIONS", "-1"),
        ("MAX_STREAMS", "many"),
        ("MAX_CONNECTS", "1.5"),
        ("MAX_RATE", "1000"),
        ("MAX_MESSAGE", "1000"),
        ("MAX_MESSAGE", "0"),
        ("MAX_HEADER", "0"),
        ("HANDSHAKE_TIMEOUT", "0"),
        ("HANDSHAKE_TIMEOUT", "nan"),
        ("IDLE_TIMEOUT", "-3"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"KOHAKURIVER_{name}.*{re.escape(value)}"):
        from_environment({f"KOHAKURIVER_{name}": value})


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        ("MAX_SESSIONS", "a whole number from 0 (no limit) to 1048576, not"),
        ("MAX_RATE", "a whole number from 65536 to 1099511627776, or 0 for no limit, not"),
        ("HANDSHAKE_TIMEOUT", "a number from 0.1 to 600, not"),
    ],
)
def test_the_bounds_are_told_in_full(name: str, bounds: str) -> None:
    with pytest.raises(UsageError, match=re.escape(bounds)):
        from_environment({f"KOHAKURIVER_{name}": "x"})


def test_every_limit_is_documented_with_its_default() -> None:
    page = (ROOT / "docs/guide/limits.md").read_text("utf-8")
    rows = re.findall(r"^\| `KOHAKURIVER_(\w+)` \| ([\d.]+) \|", page, re.MULTILINE)
    assert {name.lower(): float(value) for name, value in rows} == asdict(Limits())
