"""Copies: what is decided, and that nobody in a task leads a copy out of its folder, or makes it wait or grow."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kohakuriver.cli import cp
from kohakuriver.client.copying import local_tree, remote_tree, session
from kohakuriver.client.copying.engine import Copied, Copy
from kohakuriver.client.copying.local_tree import LocalTree
from kohakuriver.client.copying.plan import Options, part_name, plan
from kohakuriver.client.copying.remote_tree import RemoteTree
from kohakuriver.client.copying.session import Place, Progress
from kohakuriver.client.copying.sides import FileError, StreamGone
from kohakuriver.config import Settings
from kohakuriver.errors import UnavailableError
from kohakuriver.tunnel.files import HEAD, PIECE, Answer, Attributes, Entry, entries_in, files_start, is_safe
from kohakuriver.tunnel.terminal import Start

PLAIN = Attributes(0o644, None, 1_000_000_000)
ENTRY = struct.Struct(">BBIIIqIQQQH")


def packed(path: bytes, kind: bytes = b"f", target: bytes = b"", size: int = 0, ns: int = 0) -> bytes:
    head = ENTRY.pack(kind[0], 0, 0o644, 0, 0, 1, ns, size, 0, 0, len(path))
    return head + path + struct.pack(">H", len(target)) + target


def entries(payload: bytes) -> list[Entry]:
    return list(entries_in(memoryview(payload)))


# -- what a peer may say -------------------------------------------------------------------------------------------


def test_an_entry_is_read_as_it_was_written() -> None:
    assert entries(packed(b"a/\xff", size=7) + packed(b"l", b"l", b"/x")) == [
        Entry(b"a/\xff", "f", 0o644, mtime=1_000_000_000, size=7),
        Entry(b"l", "l", 0o644, mtime=1_000_000_000, target=b"/x"),
    ]


@pytest.mark.parametrize(
    "path", [b"..", b"../f", b"a/../../f", b"/etc/passwd", b"a//b", b".", b"a/", b"a\0b", b"a" * 256]
)
def test_a_name_that_leads_out_of_the_folder_is_no_entry(path: bytes) -> None:
    assert not is_safe(path)
    with pytest.raises(ValueError, match="none"):
        entries(packed(path))


@pytest.mark.parametrize(
    "payload",
    [packed(b"f", b"x"), packed(b""), packed(b"f", size=1 << 63), packed(b"f", ns=1 << 31), packed(b"f")[:-1], b"f"],
)
def test_an_entry_that_makes_no_sense_is_none(payload: bytes) -> None:
    with pytest.raises((ValueError, struct.error)):
        entries(payload)


def aside(call: Callable[[], object]) -> None:
    """Make a call in a thread, until it has ended or its socket has gone."""

    def made() -> None:
        with contextlib.suppress(OSError):
            call()

    threading.Thread(target=made, daemon=True).start()


@contextlib.contextmanager
def a_peer(*answers: bytes) -> Iterator[tuple[RemoteTree, socket.socket]]:
    """The near end of a stream whose other end says these things, and then nothing more."""
    near, far = socket.socketpair()
    aside(lambda: far.sendall(b"".join(answers)))
    tree = RemoteTree(near)
    try:
        yield tree, far
    finally:
        tree.close()
        far.close()


def answer(tag: int, payload: bytes) -> bytes:
    return HEAD.pack(tag, len(payload)) + payload


@pytest.mark.parametrize(
    "said",
    [
        answer(Answer.ENTRIES, packed(b"../../.ssh/authorized_keys")),
        answer(Answer.ENTRIES, b"\xff" * 100),
        answer(Answer.DATA, b"\0\0\0\0"),
        HEAD.pack(Answer.ENTRIES, 0xFFFFFFFF),
    ],
)
def test_a_list_that_makes_no_sense_ends_the_copy(said: bytes) -> None:
    with a_peer(said) as (tree, _), pytest.raises(UnavailableError, match="makes no sense"):
        tree.entries(b"")


def test_a_list_without_end_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_tree, "_MOST_ENTRIES", 1000)
    said = answer(Answer.ENTRIES, b"".join(packed(b"%d" % number) for number in range(1001)))
    with a_peer(said) as (tree, _), pytest.raises(UnavailableError, match="more than 1000 files"):
        tree.entries(b"")


def test_bytes_with_a_wrong_checksum_are_not_written() -> None:
    told: list[memoryview | FileError] = []
    with a_peer(answer(Answer.DATA, struct.pack(">I", zlib.crc32(b"data") ^ 1) + b"data")) as (tree, _):
        tree.read(b"f", 0, 4, told.append)
        tree.settle(all_of_it=True)
    assert isinstance(told[0], FileError)


def test_more_bytes_than_were_asked_for_end_the_copy() -> None:
    with a_peer(answer(Answer.DATA, struct.pack(">I", zlib.crc32(b"data")) + b"data")) as (tree, _):
        tree.read(b"f", 0, 3, lambda told: None)
        with pytest.raises(UnavailableError, match="makes no sense"):
            tree.settle(all_of_it=True)


def test_what_a_stranger_says_is_shown_without_what_a_terminal_obeys() -> None:
    with a_peer(answer(Answer.ERROR, b"EIO: \x1b[2Jgone\nError: forged")) as (tree, _):
        with pytest.raises(FileError) as raised:
            tree.open()
    assert raised.value.why == "\\x1b[2Jgone Error: forged"


def test_what_was_sent_counts_while_more_is_sent() -> None:
    told: list[int | FileError] = []
    with a_peer(answer(Answer.DONE, b"\0") * 20) as (tree, far):
        aside(lambda: [None for _ in iter(lambda: far.recv(1 << 20), b"")])
        for number in range(20):
            tree.write(b"f", number * PIECE, memoryview(bytes(PIECE)), told.append)
        assert len(told) >= 10
        tree.hang_up()


def test_a_stream_that_ends_is_told_to_whoever_waits() -> None:
    with a_peer() as (tree, far):
        threading.Thread(target=tree.hang_up).start()
        with pytest.raises(StreamGone):
            tree.open()
        del far


def test_who_ends_a_copy_does_not_wait_until_this_machines_tree_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = socket.socketpair()
    far.sendall(answer(Answer.HELLO, b"\1"))
    begun, listed, many = threading.Event(), 0, 3_000_000

    def begin(streams: session._Streams, start: bytes) -> RemoteTree:
        streams._trees.append(RemoteTree(near))
        return streams._trees[0]

    def one_more(tree: LocalTree, path: bytes, found: list[Entry]) -> list[bytes]:
        nonlocal listed
        begun.set()
        listed += 1
        return [path] if listed < many else []

    async def end_it() -> None:
        ends = Place(None, os.fsencode(tmp_path) + b"/"), Place("lab", b"/data")
        copying = asyncio.ensure_future(session.copy_files(*ends, settings=Settings("http://lab:8000"), folder=True))
        await asyncio.to_thread(begun.wait)
        copying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await copying

    monkeypatch.setattr(session._Streams, "begin", begin)
    monkeypatch.setattr(LocalTree, "_list", one_more)
    asyncio.run(end_it())
    far.close()
    assert listed < many


# -- what is written here ------------------------------------------------------------------------------------------


def result(ask: Callable[[Callable[[int | FileError], None]], None]) -> int | FileError:
    told: list[int | FileError] = []
    ask(told.append)
    return told[0]


def test_nothing_is_written_by_way_of_a_link_in_the_folder(tmp_path: Path) -> None:
    root, secret = tmp_path / "root", tmp_path / "secret"
    root.mkdir()
    secret.mkdir()
    (secret / "f").write_text("old")
    (root / "way").symlink_to(secret)
    (root / "file").symlink_to(secret / "f")
    tree = LocalTree.of(os.fsencode(root), writes=True)
    data = memoryview(b"new")
    asked: list[Callable[[Callable[[int | FileError], None]], None]] = [
        lambda then: tree.put(b"way/new", PLAIN, data, then),
        lambda then: tree.put(b"../secret/new", PLAIN, data, then),
        lambda then: tree.part(b"way/f", 0, then),
        lambda then: tree.part(b"file", 0, then),
        lambda then: tree.folder(b"way/new", then),
        lambda then: tree.symlink(b"way/new", b"/", PLAIN, then),
        lambda then: tree.link(b"here", b"way/f", then),
        lambda then: tree.link(b"here", b"file", then),
        lambda then: tree.attributes(b"file", PLAIN, then),
        lambda then: tree.remove(b"way/f", False, then),
    ]
    try:
        for number, ask in enumerate(asked):
            assert isinstance(result(ask), FileError), number
        assert result(lambda then: tree.put(b"file", PLAIN, data, then)) == Answer.ALL
    finally:
        tree.close()
    assert [each.name for each in secret.iterdir()] == ["f"]
    assert (secret / "f").read_text() == "old"
    assert (root / "file").read_text() == "new"


def test_a_file_that_can_not_be_written_whole_leaves_nothing(tmp_path: Path) -> None:
    tree = LocalTree.of(os.fsencode(tmp_path), writes=True)
    (tmp_path / "f").mkdir()
    try:
        assert isinstance(result(lambda then: tree.put(b"f", PLAIN, memoryview(b"x"), then)), FileError)
    finally:
        tree.close()
    assert [each.name for each in tmp_path.iterdir()] == ["f"]


def test_files_whose_long_names_begin_alike_are_written_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [b"n" * 254 + end for end in (b"1", b"2")]
    tree = LocalTree.of(os.fsencode(tmp_path), writes=True)
    other = tree.another()
    rename = os.rename

    def put(each: LocalTree, name: bytes) -> int | FileError:
        return result(lambda then: each.put(name, PLAIN, memoryview(name[-1:]), then))

    def renamed(*arguments: Any, **more: Any) -> None:
        monkeypatch.setattr(os, "rename", rename)
        assert put(other, names[1]) == Answer.ALL  # meanwhile, in another thread
        rename(*arguments, **more)

    try:
        for name in names:
            assert put(tree, name) == Answer.ALL
        monkeypatch.setattr(os, "rename", renamed)
        assert put(tree, names[0]) == Answer.ALL
    finally:
        other.close()
        tree.close()
    assert {path.name[-1]: path.read_text() for path in tmp_path.iterdir()} == {"1": "1", "2": "2"}


def test_a_part_that_another_has_too_is_made_anew(tmp_path: Path) -> None:
    part, theirs = tmp_path / ".f.kohakuriver-1", tmp_path / "theirs"
    part.write_bytes(b"theirs")
    theirs.hardlink_to(part)
    tree = LocalTree.of(os.fsencode(tmp_path), writes=True)
    name = os.fsencode(part.name)
    try:
        assert result(lambda then: tree.part(name, 4, then)) == Answer.ALL
        assert result(lambda then: tree.write(name, 0, memoryview(b"mine"), then)) == Answer.ALL
        if os.geteuid() == 0:
            os.chown(part, 12345, -1)
            assert result(lambda then: tree.part(name, 4, then)) == Answer.ALL
            assert part.stat().st_uid == 0
        assert result(lambda then: tree.part(name, 4, then)) == Answer.BEFORE
    finally:
        tree.close()
    assert theirs.read_bytes() == b"theirs"


def test_what_is_no_file_any_more_is_read_as_none_the_second_time_either(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "f")
    tree = LocalTree.of(os.fsencode(tmp_path), writes=False)
    try:
        for _ in range(2):
            told: list[memoryview | FileError] = []
            tree.read(b"f", 0, 1, told.append)
            assert str(told[0]) == "It is no regular file any more"
    finally:
        tree.close()


def test_a_tree_that_was_hung_up_is_changed_no_more(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    tree = LocalTree.of(os.fsencode(tmp_path), writes=True)
    other = tree.another()
    try:
        tree.hang_up()
        for each in (tree, other):
            with pytest.raises(StreamGone):
                each.entries(b"")
            with pytest.raises(StreamGone):
                each.remove(b"f", False, lambda told: None)
    finally:
        other.close()
        tree.close()
    assert (tmp_path / "f").exists()


def test_with_update_a_small_file_has_its_name_when_it_is_whole_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all, seen = local_tree._write_all, []

    def watched(*arguments: Any) -> None:
        seen.append((tmp_path / "there/f").exists())
        write_all(*arguments)

    monkeypatch.setattr(local_tree, "_write_all", watched)
    for name in ("source", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "source/f").write_text("all of it")
    options = Options(update=True)
    source = LocalTree.of(os.fsencode(tmp_path / "source"), writes=False)
    there = LocalTree.of(os.fsencode(tmp_path / "there"), writes=True)
    try:
        worker = Copy(plan(source.entries(b""), [], b"", None, options), options).worker(source, there)
        worker.run()
    finally:
        source.close()
        there.close()
    assert (seen, worker.done.files, worker.done.failed) == ([False], 1, [])
    assert {each.name: each.read_text() for each in (tmp_path / "there").iterdir()} == {"f": "all of it"}


# -- what is decided -----------------------------------------------------------------------------------------------


def a_file(path: bytes, mtime: int = 5, size: int = 1, mode: int = 0o644) -> Entry:
    return Entry(path, "f", mode, mtime=mtime, size=size)


def test_a_file_of_the_same_size_and_time_is_the_same() -> None:
    made = plan([a_file(b"a"), a_file(b"b")], [a_file(b"a"), a_file(b"b", mtime=6)], b"", None, Options())
    assert ([path for _, path in made.files], made.same) == ([b"b"], 1)


def test_a_file_system_that_keeps_whole_seconds_has_the_same_file() -> None:
    made = plan([a_file(b"a", 7_300_000_000)], [a_file(b"a", 7_000_000_000)], b"", None, Options())
    assert made.same == 1


def test_nothing_is_taken_away_where_the_source_could_not_be_read() -> None:
    source = [Entry(b"folder", "d"), Entry(b"folder", "e", target=b"Permission denied")]
    made = plan(source, [a_file(b"other"), a_file(b"folder/x")], b"", None, Options(delete=True))
    assert (made.removed, made.failed) == ([], [(b"folder", "Permission denied")])


def test_a_path_that_is_too_long_is_told_and_holds_up_no_other() -> None:
    long = b"/".join([b"n" * 250] * 300)  # more than any length field has room for, too
    source = [Entry(long, "d"), a_file(long[:4095]), Entry(long[:4094], "l"), a_file(b"f")]
    made = plan(source, [a_file(b"other")], b"under/", None, Options(delete=True))
    assert made.failed == [(path, "File name too long") for path in (long, long[:4095], long[:4094])]
    assert ([path for _, path in made.files], made.removed) == ([b"under/f"], [])


def test_the_part_of_any_file_that_is_copied_has_a_path_that_can_be_asked_for() -> None:
    for length in range(4000, 4097):
        path = b"d/" * 1990 + b"n" * (length - 3980)
        made = plan([a_file(path)], [], b"", None, Options())
        assert all(is_safe(part_name(there, entry)) for entry, there in made.files)


def test_what_is_in_a_folder_is_taken_away_before_it() -> None:
    there = [Entry(b"a", "d"), Entry(b"a/b", "d"), a_file(b"a/b/c"), a_file(b"a-b")]
    made = plan([], there, b"", None, Options(delete=True))
    assert made.removed == [(b"a/b/c", False), (b"a/b", True), (b"a-b", False), (b"a", True)]


def test_a_part_of_another_state_of_a_file_has_another_name() -> None:
    names = {part_name(b"d/f", a_file(b"f", mtime, size)) for mtime, size in ((1, 2), (1, 3), (2, 2))}
    assert len(names) == 3
    assert all(name.startswith(b"d/.f.kohakuriver-") for name in names)


def test_parts_of_files_whose_long_names_begin_alike_have_names_of_their_own() -> None:
    names = [part_name(b"d/" + b"n" * 254 + end, a_file(b"")) for end in (b"1", b"2")]
    assert names[0] != names[1]
    assert all(is_safe(name) for name in names)


@pytest.mark.parametrize(
    ("text", "task", "path"),
    [
        ("lab:/data", "lab", b"/data"),
        ("lab:", "lab", b""),
        ("lab:a:b", "lab", b"a:b"),
        ("./a:b", None, b"./a:b"),
        ("/a:b", None, b"/a:b"),
        (":a", None, b":a"),
        ("data", None, b"data"),
    ],
)
def test_what_has_a_slash_before_its_colon_is_of_this_machine(text: str, task: str | None, path: bytes) -> None:
    assert cp._place(text) == Place(task, path)


def test_how_far_a_copy_is_says_what_is_done_how_fast_and_how_long_it_takes_still() -> None:
    made = plan([a_file(b"a", size=3_000_000_000), a_file(b"b", size=1_000_000_000)], [], b"", None, Options())
    done = Copied(files=1, size=2_000_000_000, kept_size=1_000_000_000)
    assert cp._line(Progress(made, done), 10.0) == "2.0 GB of 4.0 GB, 1 of 2 files, 100 MB/s, 20 s left"
    assert cp._line(Progress(made, Copied()), 0.0) == "0 B of 4.0 GB, 0 of 2 files"
    assert cp._clock(3725) == "1:02:05"


def test_the_host_reads_which_files_a_stream_is_for() -> None:
    assert Start.command_in(files_start("to", b"/data", folder=True)) == ["cp", "to", "/data", "folder"]


@pytest.mark.parametrize(
    ("workdir", "path", "said"),
    [
        ("/etc", ".", "/etc/."),
        ("/etc", "", "/etc/."),
        ("/etc/", "shadow", "/etc/shadow"),
        ("/etc", "~x", "/etc/~x"),
        ("/etc", "/data", "/data"),
        ("/etc", "~/x", "~/x"),
        ("/etc", "~", "~"),
        ("", "x", "x"),
        ("", "", "."),
    ],
)
def test_the_host_reads_a_copys_path_with_the_folder_that_it_begins_in(workdir: str, path: str, said: str) -> None:
    assert Start.command_in(Start(["from", path], workdir=workdir).for_files()) == ["cp", "from", said]
