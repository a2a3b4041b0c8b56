"""The terminal protocol's messages, and who may open a terminal."""

from __future__ import annotations

import json

import pytest

from kohakuriver.errors import KohakuRiverError, NotAllowedError, NotFoundError, UnavailableError, UsageError
from kohakuriver.session import ticket
from kohakuriver.tunnel import terminal
from kohakuriver.tunnel.terminal import Start

KEY = b"k" * 32


def test_a_start_is_read_as_it_was_written() -> None:
    start = Start(["sh", "-c", "echo é"], False, 40, 120, {"TERM": "xterm"})
    assert Start.from_message(terminal.read_control(start.to_message())) == start


def test_a_start_that_says_nothing_is_a_shell_on_a_terminal() -> None:
    assert Start.from_message({"type": "start"}) == Start([], True, 24, 80, {})


@pytest.mark.parametrize(
    "fields",
    [
        {"command": "ls"},
        {"command": [1]},
        {"command": ["a\0b"]},
        {"env": ["TERM=x"]},
        {"env": {"TERM": 1}},
        {"rows": 0},
        {"cols": 65536},
        {"rows": "24"},
    ],
)
def test_a_start_that_makes_no_sense_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Start.from_message({"type": "start", **fields})


NESTED = '{"type": "input", "data": ' + "[" * 100_000 + "]" * 100_000 + "}"
LONG = '{"type": "input", "data": [' + "{}," * 200_000 + "{}]}"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"type": 1}', "null", "{}", NESTED, LONG], ids=lambda text: text[:14])
def test_a_text_that_is_no_control_message_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        terminal.read_control(text)


@pytest.mark.parametrize(
    "error", [NotFoundError("No task."), UnavailableError("No shell.", code="no_shell"), KohakuRiverError("Broken.")]
)
def test_an_error_arrives_as_what_it_was(error: KohakuRiverError) -> None:
    arrived = terminal.failure(terminal.read_control(terminal.failed(error)))
    assert (type(arrived), arrived.message, arrived.code) == (type(error), error.message, error.code)


def test_an_older_peers_error_is_its_sentence() -> None:
    arrived = terminal.failure(json.loads('{"type": "error", "data": "No shell here."}'))
    assert (type(arrived), arrived.message) == (UnavailableError, "No shell here.")


def test_a_ticket_for_a_terminal_opens_no_forward_and_the_other_way_round() -> None:
    for scope, other in (("terminal", "forward"), ("forward", "terminal"), ("terminal", "control")):
        issued = ticket.issue(KEY, node="n", scope=scope, task=1, container="c", user="u")  # type: ignore[arg-type]
        assert ticket.check(KEY, issued, node="n", scope=scope).task == 1  # type: ignore[arg-type]
        with pytest.raises(NotAllowedError):
            ticket.check(KEY, issued, node="n", scope=other)  # type: ignore[arg-type]


def test_a_ticket_for_a_terminal_allows_no_port() -> None:
    issued = ticket.issue(KEY, node="n", scope="terminal", task=1, container="c", user="u")
    assert not ticket.check(KEY, issued, node="n", scope="terminal").allows(22)
