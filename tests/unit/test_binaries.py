"""What an installation that was made without cargo says."""

from __future__ import annotations

import os

import pytest

from kohakuriver.binaries import missing
from tests.support import forked
from tests.support.hops import binary
from tests.support.ssh import ours

NOWHERE = {"KOHAKURIVER_TUNNEL_CLIENT": "/nowhere/tunnel-client", "KOHAKURIVER_TUNNEL_SSHD": "/nowhere/tunnel-sshd"}


def test_the_first_look_at_an_installation_says_what_it_has_no_programs_for(monkeypatch: pytest.MonkeyPatch) -> None:
    version = forked.run(["--version"], env={**os.environ, **NOWHERE}, stdin="", timeout=20)
    assert (version.returncode, version.stdout.count("\n")) == (0, 1)
    assert version.stderr == (
        "This installation has no static tunnel client and no SSH server for tasks, which a runner needs for "
        "containers: to have it here, install it again with Rust's cargo on the path.\n"
    )
    for name, path in zip(NOWHERE, (binary(), ours()), strict=True):
        monkeypatch.setenv(name, str(path))
    assert missing() is None
