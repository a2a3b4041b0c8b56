"""What a command beside a process task inherits."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from kohakuriver.runner.backends.process import terminal_child

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="runners are for Linux")


def test_signals_that_a_runner_ignores_have_their_usual_meaning_for_a_command() -> None:
    line = 'trap "" HUP INT QUIT TERM; exec "$@"'
    child = [sys.executable, "-I", "-S", terminal_child.__file__, "-", "-", "-", "grep", "SigIgn", "/proc/self/status"]
    done = subprocess.run(["sh", "-c", line, "sh", *child], capture_output=True, text=True, check=True)
    ignored = int(done.stdout.split()[1], 16)
    assert not any(ignored >> (number - 1) & 1 for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT))
