"""What process tasks print is bounded, and the last of it is kept."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kohakuriver.runner.backends.printed import LogRequest
from kohakuriver.runner.backends.process.log_reader import LogReader
from kohakuriver.runner.backends.process.logs import RATE, TaskLogs, older, tail

Run = Callable[[Coroutine[Any, Any, None]], None]
LINE = b"x" * 63 + b"\n"


@contextmanager
def logs(most: int = 0) -> Iterator[TaskLogs]:
    keeper = TaskLogs(most)
    try:
        yield keeper
    finally:
        keeper.close()


async def printed(keeper: TaskLogs, path: Path, data: bytes, *, whose: str = "eve", most: int = 0) -> None:
    """One start of a task that prints `data`; back when that is in its log."""
    into, written = keeper.open(path, whose, most)

    def write() -> None:
        with os.fdopen(into, "wb") as file:
            file.write(data)

    await asyncio.get_running_loop().run_in_executor(None, write)
    await asyncio.wait_for(written, 20)


def total(path: Path) -> int:
    return sum(file.stat().st_size for file in (path, older(path)) if file.exists())


def test_the_last_that_a_task_printed_is_kept_and_no_more_than_its_limit(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        path, most = tmp_path / "log", 1 << 20
        with logs() as keeper:
            await printed(keeper, path, LINE * (4 * most // len(LINE)) + b"the end\n", most=most)
            assert most // 4 < total(path) <= most
            assert tail(path)[-2:] == ["the end", ""]
            assert (older(path).read_bytes() + path.read_bytes()).endswith(LINE * 5000 + b"the end\n")

    run(main())


def test_starts_of_a_task_follow_one_another_in_its_log_also_over_the_runners_restart(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "log"
        for word in (b"one\n", b"two\n"):
            with logs() as keeper:
                keeper.know(path, "eve")
                await printed(keeper, path, word)
        assert path.read_bytes() == b"one\ntwo\n"

    run(main())


def test_where_all_logs_are_too_much_the_user_with_the_most_loses_some_and_nobody_else(
    run: Run, tmp_path: Path
) -> None:
    async def main() -> None:
        with logs(2 << 20) as keeper:
            await printed(keeper, tmp_path / "ann", b"of ann\n", whose="ann")
            for i in range(8):
                await printed(keeper, tmp_path / f"eve{i}", LINE * (1 << 14))
                assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 2 << 20
            assert (tmp_path / "ann").read_bytes() == b"of ann\n"

    run(main())


def test_who_prints_too_much_too_fast_waits_and_keeps_nobody_else_waiting(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        with logs() as keeper:
            (tmp_path / "eves").mkdir()
            into, written = keeper.open(tmp_path / "eves" / "log", "eve", 1 << 20)

            def flood() -> int:
                count = 0
                try:
                    while True:
                        count += os.write(into, bytes(1 << 16))
                except BrokenPipeError:
                    os.close(into)
                    return count

            loop = asyncio.get_running_loop()
            start, flooding = loop.time(), loop.run_in_executor(None, flood)
            for _ in range(50):
                await asyncio.wait_for(printed(keeper, tmp_path / "ann", b"of ann\n", whose="ann"), 5)
            await keeper.forget(tmp_path / "eves")  # the task is removed: whatever it left has nowhere to print
            count = await flooding
            assert count <= 17 * RATE / 4 + (loop.time() - start + 1) * RATE + (1 << 20)
            await written

    run(main())


def test_a_log_that_can_not_be_written_ends_no_task(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        with logs() as keeper:
            await printed(keeper, tmp_path / "none" / "log", LINE * 10_000)
            await printed(keeper, tmp_path / "log", b"there\n")
        assert (tmp_path / "log").read_bytes() == b"there\n"

    run(main())


async def all_of(reader: LogReader) -> str:
    text = ""
    while (lines := await asyncio.wait_for(reader.read(), 20)) is not None:
        text += "".join(line.text for line in lines)
    await reader.close()
    return text


def numbers(first: int, last: int) -> bytes:
    return b"".join(b"%07d\n" % number for number in range(first, last))


def test_who_follows_loses_nothing_when_the_log_is_rotated_meanwhile(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        path, most, rounds, each = tmp_path / "log", 64 << 10, 40, 2000
        with logs() as keeper:
            ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            reader = LogReader(keeper, path, LogRequest(follow=True), ended)
            got = ""
            for n in range(rounds):
                await printed(keeper, path, numbers(n * each, (n + 1) * each), most=most)
                while not got.endswith(f"{(n + 1) * each - 1:07d}\n"):
                    got += "".join(line.text for line in await asyncio.wait_for(reader.read(), 20) or ())
            ended.set_result(None)
            got += await all_of(reader)
            assert got == numbers(0, rounds * each).decode()
            assert total(path) <= most

    run(main())


def test_who_reads_slower_than_the_log_is_rotated_is_told_that_something_is_missing(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        path, most = tmp_path / "log", 64 << 10
        with logs() as keeper:
            ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            reader = LogReader(keeper, path, LogRequest(follow=True), ended)
            await printed(keeper, path, b"first\n", most=most)
            assert [line.text for line in await reader.read() or ()] == ["first\n"]
            await printed(keeper, path, numbers(0, 100_000), most=most)
            ended.set_result(None)
            got = await all_of(reader)
            assert "some of the output is missing here" in got
            assert got.endswith("0099999\n")

    run(main())


def test_the_last_lines_are_found_over_both_files_and_without_the_tunnel_clients(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "log"
        with logs() as keeper:
            for number in range(3):
                await printed(keeper, path, numbers(number * 3000, (number + 1) * 3000), most=64 << 10)
            await printed(keeper, path, b"tunnel-client: info: connected\nthe end", most=64 << 10)
            for count in (0, 1, 2, 3000, 5000):
                wanted = (numbers(0, 9000) + b"the end").decode().splitlines(keepends=True)
                got = await all_of(LogReader(keeper, path, LogRequest(tail=count)))
                assert got == "".join(wanted[len(wanted) - count :])

    run(main())


def test_what_the_tunnel_client_says_within_a_line_is_left_out_of_it(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "log"
        with logs() as keeper:
            await printed(keeper, path, b"hello" + b"tunnel-client: info: the tunnel is up\n" + b"\nthe end\n")
            assert await all_of(LogReader(keeper, path, LogRequest())) == "hello\nthe end\n"
            assert await all_of(LogReader(keeper, path, LogRequest(tail=2))) == "hello\nthe end\n"
            assert await all_of(LogReader(keeper, path, LogRequest(tail=1))) == "the end\n"

    run(main())
