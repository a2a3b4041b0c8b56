"""Count the instructions that the hot path's calls take: the same on every run, however busy the machine is.

    python -m bench.instructions

Each call is replayed under valgrind's callgrind 1000 and 3000 times; the difference, divided by 2000, is what one call
takes, the loop around it included. Needs valgrind.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable

from kohakuriver import _frame

KEY = 0xA1B2C3D4
FEW, MANY = 1000, 3000
SIZES = {"64": 64, "64K": 64 * 1024}


def frame(size: int, key: int = -1) -> tuple[bytearray, int, int]:
    buf = bytearray(_frame.HEADROOM) + _frame.build_frame(_frame.TYPE_DATA, 0, 7, 0, bytes(size), key)
    return buf, _frame.HEADROOM, len(buf)


def forward_sends(size: int) -> Callable[[], object]:
    buf = bytearray(_frame.HEADROOM + size)
    arguments = (buf, _frame.HEADROOM, len(buf), _frame.TYPE_DATA, 0, 7, 0, KEY)
    return lambda: _frame.frame_in_place(*arguments)


def host_passes_on(size: int) -> Callable[[], object]:
    walker, arguments = _frame.SpliceWalker(masked=True), frame(size, KEY)
    return lambda: walker.splice(*arguments)


def runner_passes_on(size: int) -> Callable[[], object]:
    walker, table = _frame.RelayWalker(masked=True), _frame.RoutingTable()
    table.add(7, "target", 9)
    buf, start, stop = frame(size, KEY)
    head = bytes(buf[: start + 32])

    def relay() -> object:
        buf[: len(head)] = head  # the frame's header was rewritten in place
        return walker.relay(buf, start, stop, table)

    return relay


def forward_receives(size: int) -> Callable[[], object]:
    walker, arguments = _frame.FrameWalker(masked=False), frame(size)
    return lambda: walker.walk(*arguments)


CALLS = {call.__name__: call for call in (forward_sends, host_passes_on, runner_passes_on, forward_receives)}


def count(name: str, size: str, times: int) -> int:
    """Instructions of a whole run of this file that makes the call so many times."""
    argv = [
        "valgrind",
        "--tool=callgrind",
        "--callgrind-out-file=/dev/null",
        sys.executable,
        "-m",
        "bench.instructions",
    ]
    env = {"PYTHONHASHSEED": "0"}  # where things lie in a dict is chance otherwise
    run = subprocess.run([*argv, name, size, str(times)], env=env, capture_output=True, text=True, check=True)
    found = re.search(r"Collected : (\d+)", run.stderr)
    assert found is not None, run.stderr
    return int(found[1])


def main() -> None:
    if len(sys.argv) == 4:
        call = CALLS[sys.argv[1]](SIZES[sys.argv[2]])
        for _ in range(int(sys.argv[3])):
            call()
        return
    count("forward_sends", "64", 1)  # the first run also compiles what it imports
    for name in CALLS:
        for size in SIZES:
            each = (count(name, size, MANY) - count(name, size, FEW)) / (MANY - FEW)
            print(f"{name:<17} {size:>4} bytes {each:10,.0f} instructions")


if __name__ == "__main__":
    main()
