"""Workers of one host: where others find each, and what a signal to their parent means for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kohakuriver.errors import UsageError
from kohakuriver.host.server import Doors, HostOptions, advertised
from kohakuriver.web.app import socket_url
from tests.support.processes import PATIENCE

TWO = """
import os, signal, sys
from kohakuriver.host.workers import serve_together

def serve(number, ready):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGHUP, lambda *_: os.write(1, b"again %d\\n" % number))
    ready({"url": "", "ssh_proxy": "", "metrics": None})
    while True:
        signal.pause()

sys.exit(serve_together(2, serve, lambda words: print("ready", flush=True), lambda: None))
"""


class Ports:
    """What a host's sockets were bound to."""

    def __init__(self, doors: Doors) -> None:
        self.own, self.inner = socket_url(doors.own), socket_url(doors.inner)


def found(directory: Path, *, workers: int = 2, **options: Any) -> tuple[str, Ports]:
    """Where a host says that it is, and what it had bound."""
    asked = HostOptions(state_dir=directory, workers=workers, **options)
    with Doors.of(asked, 0, 0) as doors:
        return advertised(asked, doors), Ports(doors)


def test_workers_at_every_address_find_each_other_where_no_certificate_is_asked_for(tmp_path: Path) -> None:
    at, ports = found(tmp_path, bind="0.0.0.0", tls_cert=tmp_path / "c")
    assert at == ports.inner


def test_a_worker_is_told_of_by_the_name_that_was_given_and_a_port_of_its_own(tmp_path: Path) -> None:
    for name, host in (("http://h.lab:8000", "h.lab"), ("h.lab:8000", "h.lab"), ("http://[fd00::1]:8000", "[fd00::1]")):
        at, ports = found(tmp_path, bind="127.0.0.1", advertise_url=name)
        assert at == ports.own.replace("127.0.0.1", host)


@pytest.mark.parametrize(("url", "tls"), [("https://h.lab", None), ("http://h.lab", Path("c"))])
def test_a_url_whose_scheme_no_worker_serves_is_refused(tmp_path: Path, url: str, tls: Path | None) -> None:
    with pytest.raises(UsageError, match=f"must begin with {'https' if tls else 'http'}://"):
        found(tmp_path, bind="127.0.0.1", advertise_url=url, tls_cert=tls)


def test_a_terminal_that_hangs_up_ends_the_workers_and_without_one_they_are_told_to_read_again() -> None:
    ours, terminal = os.openpty()
    for stdin in (terminal, subprocess.DEVNULL):
        with subprocess.Popen([sys.executable, "-c", TWO], stdin=stdin, stdout=subprocess.PIPE, text=True) as host:
            try:
                assert host.stdout is not None
                assert host.stdout.readline() == "ready\n"
                host.send_signal(signal.SIGHUP)
                if stdin != terminal:
                    assert sorted(host.stdout.readline() for _ in range(2)) == ["again 0\n", "again 1\n"]
                    host.terminate()
                assert host.wait(PATIENCE) == 0
            finally:
                host.kill()
    os.close(ours)
    os.close(terminal)
