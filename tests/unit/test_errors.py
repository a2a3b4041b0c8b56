"""The tree of exceptions."""

from __future__ import annotations

import json

import pytest

from kohakuriver import errors

ALL = [getattr(errors, name) for name in errors.__all__ if name not in ("from_status", "printable")]


def test_each_class_has_the_exit_code_of_the_manual() -> None:
    codes = {cls.__name__: cls.exit_code for cls in ALL}
    assert codes == {
        "KohakuRiverError": 1,
        "UsageError": 2,
        "NotFoundError": 3,
        "UnavailableError": 4,
        "NotAllowedError": 5,
        "UnauthenticatedError": 5,
        "LocalAddressError": 6,
        "HostUnreachableError": 7,
    }


@pytest.mark.parametrize("cls", [cls for cls in ALL if cls is not errors.LocalAddressError])
def test_an_error_survives_the_way_over_http(cls: type[errors.KohakuRiverError]) -> None:
    sent = cls("The task is on fire; put it out.", code="on_fire")
    arrived = errors.from_status(sent.status, json.dumps(sent.to_json()).encode())
    assert type(arrived) is cls
    assert (arrived.message, arrived.code, arrived.status) == (sent.message, "on_fire", sent.status)


@pytest.mark.parametrize(
    "body", [b"", b"\xff\xfe", b"<html><body>Bad gateway", b"[1]", b'{"error": 3, "message": null}']
)
def test_an_answer_that_is_not_ours_still_gives_the_class_and_names_the_status(body: bytes) -> None:
    error = errors.from_status(502, body)
    assert isinstance(error, errors.HostUnreachableError)
    assert "502" in error.message
    assert "<" not in error.message


def test_text_that_is_not_ours_is_shown_shortened() -> None:
    message = errors.from_status(503, b"overloaded " * 1000).message
    assert "overloaded" in message
    assert len(message) < 300


def test_a_code_given_to_one_error_does_not_stick_to_its_class() -> None:
    errors.UnavailableError("x", code="node_offline")
    assert errors.UnavailableError("y").code == "unavailable"


def test_a_name_that_is_taken_is_the_callers_to_change_though_http_calls_it_a_conflict() -> None:
    body = json.dumps({"error": "name_taken", "message": "There is one already; choose another name."}).encode()
    error = errors.from_status(409, body)
    assert (type(error), error.exit_code, error.status) == (errors.UsageError, 2, 409)
