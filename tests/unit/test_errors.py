"""The tree of exceptions."""

from __future__ import annotations

import json

import pytest

from kohakuriver import errors

WHERE = "http://host.test:8000"
ALL: list[type[errors.KohakuRiverError]] = [
    each for name in errors.__all__ if isinstance(each := getattr(errors, name), type)
]


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
    arrived = errors.from_answer(WHERE, sent.status, json.dumps(sent.to_json()).encode())
    assert type(arrived) is cls
    assert (arrived.message, arrived.code, arrived.status) == (sent.message, "on_fire", sent.status)


@pytest.mark.parametrize("status", [200, 403, 404, 409, 426, 500])
@pytest.mark.parametrize(
    "body",
    [b"", b"\xff\xfe", b"<html><body>Not found", b"[1]", b'{"error": 3, "message": null}', b'{"detail": "Not Found"}'],
)
def test_an_answer_that_is_not_ours_never_means_what_its_status_would_of_ours(status: int, body: bytes) -> None:
    error = errors.from_answer(WHERE, status, body)
    assert (type(error), error.exit_code) == (errors.HostUnreachableError, 7)
    assert f"{WHERE} is no KohakuRiver host (HTTP status {status})" in error.message
    assert "<" not in error.message


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_proxy_that_does_not_reach_the_host_is_told_from_the_host(status: int) -> None:
    error = errors.from_answer(WHERE, status, b"<html>Bad gateway", upgrade=True)
    assert (error.exit_code, error.status) == (7, status)
    assert "can't reach the host behind it" in error.message


@pytest.mark.parametrize(
    ("location", "advice"),
    [
        ("https://host.test/api", "its URL is https://host.test."),
        ("https://host.test:8000/x", "its URL is https://host.test:8000."),
        ("/login", "check the host's URL."),
        ("http://[", "check the host's URL."),
        (f"{WHERE}/login", "check the host's URL."),
    ],
)
def test_a_redirect_says_where_to_and_which_url_to_try(location: str, advice: str) -> None:
    error = errors.from_answer(WHERE, 301, b"<html>Moved", location=location)
    assert error.exit_code == 7
    assert f"redirects to {location!r}" in error.message
    assert error.message.endswith(advice)


def test_a_host_that_was_asked_without_an_upgrade_is_behind_a_proxy_that_dropped_it() -> None:
    body = b'{"error": "upgrade_required", "message": "It came without an upgrade."}'
    assert errors.from_answer(WHERE, 426, body, upgrade=True).exit_code == 7


def test_a_code_given_to_one_error_does_not_stick_to_its_class() -> None:
    errors.UnavailableError("x", code="node_offline")
    assert errors.UnavailableError("y").code == "unavailable"


def test_a_name_that_is_taken_is_the_callers_to_change_though_http_calls_it_a_conflict() -> None:
    body = json.dumps({"error": "name_taken", "message": "There is one already; choose another name."}).encode()
    error = errors.from_answer(WHERE, 409, body)
    assert (type(error), error.exit_code, error.status) == (errors.UsageError, 2, 409)
