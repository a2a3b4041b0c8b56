"""Whose request it is, by the headers that come and go; and that traces cost nothing where nobody asked for them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from kohakuriver import tracing
from kohakuriver.errors import UsageError, from_answer

KNOWN = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{KNOWN}-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    ("request_id", "traceparent"), [(KNOWN, None), (None, PARENT), ("f" * 32, PARENT), (KNOWN, "no trace")]
)
def test_a_request_keeps_the_id_that_it_comes_with(request_id: str | None, traceparent: str | None) -> None:
    assert tracing.id_in(request_id, traceparent) == KNOWN


@pytest.mark.parametrize(
    ("request_id", "traceparent"),
    [
        (None, None),
        ("", ""),
        ("0" * 32, f"00-{'0' * 32}-00f067aa0ba902b7-01"),
        (KNOWN.upper(), f"01-{KNOWN}-00f067aa0ba902b7-01"),
        (f"{KNOWN}\n", f"{PARENT}\n"),
        ("x" * 4000, f"00-{KNOWN}-{'0' * 16}-01"),
    ],
)
def test_what_is_no_id_becomes_a_new_one(request_id: str | None, traceparent: str | None) -> None:
    made = tracing.id_in(request_id, traceparent)
    assert made not in (KNOWN, request_id)
    assert tracing.id_in(made, None) == made


def test_only_an_error_that_is_not_the_askers_fault_has_the_requests_id_and_it_is_read_again() -> None:
    tracing.serve("host")
    tracing.begin(KNOWN)
    try:
        assert tracing.told(404) == {}
        told = {"error": "unavailable", "message": "The database is down.", **tracing.told(503)}
        assert tracing.headers() == {tracing.REQUEST_ID: KNOWN}
    finally:
        tracing.begin("")
    assert tracing.headers() == {}
    assert from_answer("http://host", 503, json.dumps(told).encode()).request_id == KNOWN


def test_without_an_exporter_nothing_of_opentelemetry_is_loaded_and_a_step_is_just_done() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from kohakuriver import tracing; tracing.serve('host')\n"
            "with tracing.span('a step', 'server'): print([name for name in sys.modules if 'opentelemetry' in name])",
        ],
        env={"PATH": "/usr/bin:/bin", "OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"


def test_an_exporter_without_its_library_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("OTEL_SDK_DISABLED", raising=False)
    monkeypatch.setitem(sys.modules, "kohakuriver.otel", None)
    try:
        with pytest.raises(UsageError, match="OTEL_EXPORTER_OTLP_ENDPOINT asks for traces, which need `pip install"):
            tracing.serve("host")
    finally:
        monkeypatch.undo()
        tracing.serve("host")
