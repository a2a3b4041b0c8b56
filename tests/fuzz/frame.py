"""Fuzz target for the walkers and the header: one input is options, read sizes and a peer's bytes.

`python -m tests.fuzz.frame --seconds 60` mutates the corpus for that long and keeps what fails.

The invariant: the extension answers exactly as its plain twin does, the only error is FrameViolation with a documented
code, and relayed bytes go to no target but the one that their message was routed to. Eight bytes anywhere are a header
that packs to the same bytes, fewer are a ValueError.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from kohakuriver import _frame
from tests.conformance.feeding import HEADROOM, cut
from tests.fuzz.mutation import fuzz
from tests.reference import frame as twin

CODES = {1002, 1003, 1009}


def reads_of(data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Byte 0: options. Byte 1: how many bytes behind it are the sizes of the first reads."""
    options = {
        "masked": bool(data[0] & 1),
        "allow_text": bool(data[0] & 2),
        "max_message": 200 if data[0] & 4 else twin.MAX_MESSAGE,
    }
    sizes = data[2 : 2 + data[1] % 16]
    return options, list(cut(data[2 + len(sizes) :], sizes))


def answers(frame: Any, method: str, options: dict[str, Any], reads: list[bytes]) -> Iterator[Any]:
    """Everything that one walker shows while it is fed the reads."""
    walker = {"walk": frame.FrameWalker, "relay": frame.RelayWalker, "splice": frame.SpliceWalker}[method](**options)
    table = frame.RoutingTable()
    for client_id in range(0, 8, 2):
        table.add(client_id, client_id % 4, 100 + client_id)
    kept = b""
    for number, read in enumerate(reads):
        buf = bytearray(HEADROOM) + kept + read
        start, stop = HEADROOM, len(buf)
        while True:
            args = (table,) if method == "relay" else ()
            try:
                *found, consumed = getattr(walker, method)(buf, start, stop, *args)
            except frame.FrameViolation as violation:
                yield violation.code, str(violation)
                return
            assert start <= consumed <= stop
            if method == "relay":
                found[0] = [(target, bytes(buf[a:b])) for target, a, b in found[0]]
            yield found, consumed, bytes(buf[consumed:])
            if consumed == start:
                break
            start = consumed
        kept = bytes(buf[start:])
        # An owner of an id goes while its message may be half way.
        table.remove(number * 2 % 8)
        table.add(number * 2 % 8, number % 4, number)


def check_headers(data: bytes) -> None:
    whole = len(data) - _frame.HEADER_SIZE + 1
    for offset in range(whole):
        header = _frame.unpack_header(data, offset)
        assert header == twin.unpack_header(data, offset)
        assert _frame.pack_header(*header) == data[offset : offset + _frame.HEADER_SIZE]
    for offset in range(max(whole, 0), len(data) + 1):
        with contextlib.suppress(ValueError):
            raise AssertionError(_frame.unpack_header(data, offset))


def check(data: bytes) -> None:
    """Raise AssertionError, or whatever else went wrong, if this input breaks the invariant."""
    check_headers(data)
    if len(data) < 2:
        return
    options, reads = reads_of(data)
    for method in ("walk", "relay", "splice"):
        ours = list(answers(_frame, method, options, reads))
        theirs = list(answers(twin, method, options, reads))
        assert ours == theirs, method
        assert not ours or len(ours[-1]) == 3 or ours[-1][0] in CODES, method


if __name__ == "__main__":
    fuzz(check, "frame")
