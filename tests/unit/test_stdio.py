"""What is typed and what is shown: the way out in the input, and output that never holds the loop up."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kohakuriver.cli.stdio import Escapes, Output

Run = Callable[[Coroutine[Any, Any, None]], None]


def typed(*pieces: bytes) -> tuple[bytes, bool]:
    """What is sent of these pieces, and whether they lead out."""
    escapes, sent = Escapes(), b""
    for piece in pieces:
        out, leave = escapes.feed(piece)
        sent += out
        if leave:
            return sent, True
    return sent, False


@pytest.mark.parametrize(
    ("pieces", "sent", "leaves"),
    [
        ([b"~."], b"", True),
        ([b"ls\r~."], b"ls\r", True),
        ([b"ls\n", b"~", b"."], b"ls\n", True),
        ([b"ls ~."], b"ls ~.", False),
        ([b"~~."], b"~.", False),
        ([b"~~", b"~."], b"~~.", False),
        ([b"~x"], b"~x", False),
        ([b"~\r~."], b"~\r", True),
        ([b"~"], b"", False),
        ([b"a\r~b\r~~c\r"], b"a\r~b\r~c\r", False),
    ],
)
def test_tilde_dot_leads_out_only_at_the_start_of_a_line(pieces: list[bytes], sent: bytes, leaves: bool) -> None:
    assert typed(*pieces) == (sent, leaves)


@given(st.lists(st.binary(max_size=30).map(lambda data: data.replace(b"~", b"-"))))
def test_what_has_no_tilde_passes_unchanged(pieces: list[bytes]) -> None:
    assert typed(*pieces) == (b"".join(pieces), False)


@given(st.text(alphabet="a~.\r\n", max_size=40), st.data())
def test_it_makes_no_difference_in_which_pieces_keys_come(text: str, data: st.DataObject) -> None:
    whole = text.encode()
    cut = data.draw(st.integers(0, len(whole)))
    assert typed(whole[:cut], whole[cut:]) == typed(whole) == typed(*(bytes([key]) for key in whole))


def test_output_comes_in_order_while_its_reader_is_slow_and_the_loop_goes_on(run: Run) -> None:
    content = bytes(range(256)) * 4096

    async def main() -> None:
        ours, theirs = os.pipe()
        output = Output()
        first = asyncio.ensure_future(output.write(theirs, content))
        second = asyncio.ensure_future(output.write(theirs, b"end"))
        await asyncio.sleep(0)  # the loop is not held up, although nobody reads yet
        assert not first.done()
        loop = asyncio.get_running_loop()
        got = b""
        while len(got) < len(content) + 3:
            got += await loop.run_in_executor(None, os.read, ours, 1 << 20)
        await asyncio.gather(first, second)
        assert got == content + b"end"
        os.close(ours)
        with pytest.raises(BrokenPipeError):
            await output.write(theirs, b"nobody")
        os.close(theirs)

    run(main())


def test_input_comes_whole_and_in_order() -> None:
    content = os.urandom(3_000_000)
    program = """
import asyncio, os
from kohakuriver.cli.stdio import Input

async def main():
    stdin = Input()
    while data := await stdin.read():
        os.write(1, data)

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], input=content, capture_output=True, check=True)
    assert done.stdout == content


def test_input_that_comes_when_the_loop_has_ended_is_nobodys_and_nothing_is_said() -> None:
    program = """
import asyncio, threading
from kohakuriver.cli.stdio import Input

class Asked:
    def get(self):
        again.set()
        return asked.get()

async def main():
    global asked
    stdin = Input()
    reading = asyncio.ensure_future(stdin.read())
    await asyncio.sleep(0)
    asked, stdin._asked = stdin._asked, Asked()

again = threading.Event()
asyncio.run(main())
print("ended", flush=True)
again.wait()
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ended\n"
        try:
            assert child.communicate(b"x", timeout=20) == (b"", b"")
        finally:
            child.kill()
        assert child.returncode == 0
