"""Which forwards a process in the background takes over, and from whom; what is said between it and a command."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

import kohakuriver
from kohakuriver.cli import detached, forward_start, handing, holder
from kohakuriver.cli.forward_run import Wanted
from kohakuriver.cli.handing import Front
from kohakuriver.client.beyond import Address, Back
from kohakuriver.client.events import Event
from kohakuriver.client.forward import Listening, Stats
from kohakuriver.client.ports import PortForward
from kohakuriver.config import Settings
from kohakuriver.errors import (
    HostUnreachableError,
    KohakuRiverError,
    LocalAddressError,
    NotFoundError,
    UnauthenticatedError,
)

SETTINGS = Settings(
    "https://one", "a token", "one:8002", "/ca.pem", "host", 1, "2m", linger=0.5, other_hosts=("http://two",)
)
WANTED = Wanted(
    "lab", [PortForward(0, 80), PortForward(0, 81, "tcp", "/a/path")], SETTINGS, "::1", 1.5, False, True, "direct",
    None, True, True, True, [Address(1, "db", 2)], [Back(3, "here", 4)],
)  # fmt: skip


def test_what_is_handed_over_is_what_the_command_wants() -> None:
    changed = [each.name for each in fields(Wanted) if getattr(WANTED, each.name) in (None, each.default)]
    assert changed == ["on_connect"]  # that is not handed to others' processes
    assert handing.order_of(handing.order(WANTED, "an id")) == (WANTED, "an id")
    plain = Wanted("lab", [PortForward(1, 2)], Settings("http://one"), "localhost", on_connect="date")
    assert handing.order_of(handing.order(plain, "")) == (plain, "")


@pytest.mark.parametrize(
    "error",
    [
        NotFoundError("There is none.", code="no_such_task"),
        UnauthenticatedError("Log in."),
        HostUnreachableError("It is away.", url="http://one"),
        LocalAddressError("It is taken.", taken=("127.0.0.1", 80, "tcp")),
        LocalAddressError("It can't be had."),
    ],
)
def test_an_error_is_told_with_its_words_codes_and_places(error: KohakuRiverError) -> None:
    error.request_id = "an id"

    async def tell(front: Front) -> None:
        front.failed(error)

    (told,) = said(tell)
    again = handing.failure_of(told["failed"])
    for name in ("message", "code", "exit_code", "request_id", "taken", "url"):
        assert getattr(again, name, None) == getattr(error, name, None)
    assert isinstance(again, LocalAddressError | HostUnreachableError) == isinstance(
        error, LocalAddressError | HostUnreachableError
    )


def test_an_event_is_told_whole() -> None:
    events: list[Event] = [
        Listening("", 0, 80, "tcp", local_path="/a/path"),
        Listening("127.0.0.1", 81, 80, "tcp", 80),
        Stats(1, 2, 3, 4, 5, 6, 7, direct=1),
    ]

    async def tell(front: Front) -> None:
        for event in events:
            front.tell(event)

    assert [handing.event_of(told["tell"]) for told in said(tell)] == events


def said(speak: Callable[[Front], Awaitable[None]]) -> list[dict[str, Any]]:
    """What a command is told, after the greeting."""

    async def main() -> None:
        front = await Front.met(theirs)
        await speak(front)
        await front.close()

    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with ours:
        asyncio.run(main())
        greeting, *told = handing.lines(ours)
    assert greeting == {"here": True}
    return told


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("HTTPS_PROXY", True),
        ("no_proxy", True),
        ("KOHAKURIVER_PROXY", True),
        ("KOHAKURIVER_LOOP", True),
        ("SSL_CERT_FILE", True),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", True),
        ("KOHAKURIVER_HOST", False),
        ("KOHAKURIVER_TOKEN", False),
        ("KOHAKURIVER_RESUME_FOR", False),
        ("KOHAKURIVER_PORT_8888", False),
        ("TERM", False),
        ("PATH", False),
    ],
)
def test_variables_that_a_forward_goes_by_count_and_those_do_not_that_are_handed_over(
    monkeypatch: pytest.MonkeyPatch, name: str, counts: bool
) -> None:
    monkeypatch.delenv(name, raising=False)
    before = holder._conditions()
    monkeypatch.setenv(name, "something")
    assert (holder._conditions() != before) == counts


def test_another_version_or_another_python_has_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {holder._conditions()}
    monkeypatch.setattr(kohakuriver, "__version__", "another")
    found.add(holder._conditions())
    monkeypatch.setattr(sys, "executable", "/another/python")
    found.add(holder._conditions())
    assert len(found) == 3


@pytest.mark.parametrize(
    ("cgroup", "ends_with"),
    [
        (
            "/user.slice/user-1000.slice/user@1000.service/app.slice/app-org.gnome.Terminal.slice/vte-spawn-1.scope",
            "/user.slice/user-1000.slice/user@1000.service",
        ),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/mine.service",) * 2,
        ("/user.slice/user-1000.slice/session-3.scope",) * 2,
        ("/system.slice/slurmstepd.scope/job_4711/step_0/user/task_0",) * 2,
        ("/",) * 2,
    ],
)
def test_what_ends_with_another_login_service_or_job_has_another_process_and_a_window_is_none_of_them(
    monkeypatch: pytest.MonkeyPatch, cgroup: str, ends_with: str
) -> None:
    monkeypatch.setattr(holder, "_text", lambda path: f"0::{cgroup}\n")
    assert holder._unit() == [f"0::{ends_with}"]


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.geteuid() != 0, reason="needs another user")
def test_another_user_who_gets_at_the_socket_is_not_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOHAKURIVER_CONFIG_DIR", str(tmp_path))
    path = tmp_path / f"a.b{detached.HOLDS}"
    tmp_path.chmod(0o711)
    monkeypatch.chdir(tmp_path)
    with detached.listener_at(path) as listener, socket.socket(socket.AF_UNIX) as stranger:
        path.chmod(0o666)
        os.seteuid(65534)
        try:
            stranger.connect(path.name)
        finally:
            os.seteuid(0)
        asyncio.run(holder._Holder(listener, path, None).run(None))
        assert stranger.recv(100) == b""
    assert not path.exists()


def test_relative_names_of_files_are_those_of_the_commands_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ports = [PortForward(1, 2), PortForward(0, 80, "tcp", "a.sock")]
    wanted = replace(WANTED, ports=ports, settings=replace(SETTINGS, ca_file="ca.pem"))
    found = forward_start._from_anywhere(wanted)
    assert found.settings.ca_file == f"{tmp_path}/ca.pem"
    assert [port.path for port in found.ports] == [None, f"{tmp_path}/a.sock"]
