"""Copies: what is decided, and that nobody in a task leads a copy out of its folder, or makes it wait or grow."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kohakuriver.cli import cp
from kohakuriver.client.copying import remote_tree
from kohakuriver.client.copying.engine import Copied
from kohakuriver.client.copying.local_tree import LocalTree
from kohakuriver.client.copying.plan import Options, part_name, plan
from kohakuriver.client.copying.remote_tree import RemoteTree, StreamGone
from kohakuriver.client.copying.session import Place, Progress
from kohakuriver.client.copying.sides import FileError
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
    source[1] = source[1]._replace(path=b"folder/x")
    made = plan(source, [a_file(b"other")], b"", None, Options(delete=True))
    assert (made.removed, made.failed) == ([], [(b"folder/x", "Permission denied")])


def test_what_is_in_a_folder_is_taken_away_before_it() -> None:
    there = [Entry(b"a", "d"), Entry(b"a/b", "d"), a_file(b"a/b/c"), a_file(b"a-b")]
    made = plan([], there, b"", None, Options(delete=True))
    assert made.removed == [(b"a/b/c", False), (b"a/b", True), (b"a-b", False), (b"a", True)]


def test_a_part_of_another_state_of_a_file_has_another_name() -> None:
    names = {part_name(b"d/f", a_file(b"f", mtime, size)) for mtime, size in ((1, 2), (1, 3), (2, 2))}
    assert len(names) == 3
    assert all(name.startswith(b"d/.f.kohakuriver-") for name in names)


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
