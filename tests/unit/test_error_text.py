from __future__ import annotations

import asyncio
import errno
import json
from typing import Any

import pytest

from kohakuriver.tunnel.error_text import WINDOW_PASSED, service_error, user_error
from tests.vectors import generate

VECTORS = json.loads((generate.HERE / "errors.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["errno"] for vector in VECTORS])
def test_a_failed_socket_is_told_in_the_vectors_words(vector: dict[str, Any]) -> None:
    error = OSError(getattr(errno, vector["errno"]), "whatever")
    assert str(service_error(error, vector["port"], "in the task")) == vector["text"]


def test_a_dial_that_is_given_up_has_timed_out() -> None:
    assert service_error(asyncio.TimeoutError(), 8080, "at 10.0.0.5") == (
        "ETIMEDOUT",
        "port 8080 at 10.0.0.5 did not answer",
    )


def test_what_is_no_error_of_the_system_is_told_too() -> None:
    assert service_error(ValueError("odd"), 1, "in the task").message.endswith("can't be reached: odd")
    assert user_error(ConnectionResetError(errno.ECONNRESET, "")).code == "ECONNRESET"
    assert WINDOW_PASSED.code == "EPROTO"
