"""Copies: what is decided, and that nobody in a task leads a copy out of its folder, or makes it wait or grow."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib.util
import os
import socket
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kohakuriver import _files
from kohakuriver.cli import cp
from kohakuriver.client.copying import remote_tree, session
from kohakuriver.client.copying.engine import Copied, Copy
from kohakuriver.client.copying.local_tree import LocalTree
from kohakuriver.client.copying.plan import Options, Planner, part_name, plan
from kohakuriver.client.copying.remote_tree import RemoteTree
from kohakuriver.client.copying.session import Place, Progress
from kohakuriver.client.copying.sides import Batch, Contents, FileError, StreamGone, Written
from kohakuriver.config import Settings
from kohakuriver.errors import UnavailableError
from kohakuriver.tunnel import files
from kohakuriver.tunnel.files import HEAD, PIECE, Answer, Attributes, Entry, entries_in, files_start, is_safe
from kohakuriver.tunnel.terminal import Start

PLAIN = Attributes(0o644, None, 1_000_000_000)
ENTRY = struct.Struct(">BBIIIqIQQQH")


def packed(path: bytes, kind: bytes = b"f", target: bytes = b"", size: int = 0, ns: int = 0) -> bytes:
    head = ENTRY.pack(kind[0], 0, 0o644, 0, 0, 1, ns, size, 0, 0, len(path))
    return head + path + struct.pack(">H", len(target)) + target


def entries(payload: bytes) -> list[Entry]:
    return entries_in(memoryview(payload))


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
    with pytest.raises(ValueError, match="an entry"):
        entries(payload)


def listed(tree: LocalTree | RemoteTree, path: bytes = b"") -> list[Entry]:
    return [entry for part in tree.entries(path) for entry in part]


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
        listed(tree)


def test_an_end_that_copies_in_another_way_is_told_in_one_sentence() -> None:
    with a_peer(answer(0x40, b"\1")) as (tree, _), pytest.raises(UnavailableError, match="restart the task") as raised:
        tree.open()
    assert raised.value.code == "no_copy"


def test_a_list_without_end_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_tree, "_MOST_ENTRIES", 1000)
    said = answer(Answer.ENTRIES, b"".join(packed(b"%d" % number) for number in range(1001)))
    with a_peer(said) as (tree, _), pytest.raises(UnavailableError, match="more than 1000 files"):
        listed(tree)


def test_bytes_with_a_wrong_checksum_are_not_written() -> None:
    told: list[memoryview | FileError] = []
    with a_peer(answer(Answer.DATA, struct.pack(">I", zlib.crc32(b"data") ^ 1) + b"data")) as (tree, _):
        tree.read(b"f", 0, 4, told.append)
        tree.settle(all_of_it=True)
    assert isinstance(told[0], FileError)


def test_checksums_are_the_same_where_there_is_no_library_for_fast_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.crc32.__module__ == "zlib_ng.zlib_ng"
    monkeypatch.setitem(sys.modules, "zlib_ng.zlib_ng", None)
    spec = importlib.util.spec_from_file_location("slow_files", str(files.__file__))
    assert spec is not None
    assert spec.loader is not None
    slow = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(slow)
    assert slow.crc32 is zlib.crc32
    for size in (0, 1, 15, 16, 4097, PIECE):
        data = memoryview(os.urandom(size))
        assert files.crc32(data) == slow.crc32(data)
        assert files.crc32(data, 0xDEADBEEF) == slow.crc32(data, 0xDEADBEEF)


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
    far.sendall(answer(Answer.HELLO, b"\1") + answer(Answer.DONE, b"\0"))
    begun, seen, many = threading.Event(), 0, 3_000_000

    def begin(streams: session._Streams, start: bytes) -> RemoteTree:
        streams._trees.append(RemoteTree(near))
        return streams._trees[0]

    def one_more(folder: int) -> tuple[list[bytes], list[bytes]]:
        nonlocal seen
        begun.set()
        seen += 1
        return [], [b"."] if seen < many else []

    async def end_it() -> None:
        ends = Place(None, os.fsencode(tmp_path) + b"/"), Place("lab", b"/data")
        copying = asyncio.ensure_future(session.copy_files(*ends, settings=Settings("http://lab:8000"), folder=True))
        await asyncio.to_thread(begun.wait)
        copying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await copying

    monkeypatch.setattr(session._Streams, "begin", begin)
    monkeypatch.setattr(LocalTree, "_inside", lambda tree, path: tree._root)
    monkeypatch.setattr(_files, "names_in", one_more)
    asyncio.run(end_it())
    far.close()
    assert seen < many


# -- what is written here ------------------------------------------------------------------------------------------


def result(ask: Callable[[Callable[[int | FileError], None]], None]) -> int | FileError:
    told: list[int | FileError] = []
    ask(told.append)
    return told[0]


def batch_of(*files: tuple[bytes, bytes]) -> tuple[Batch, Contents]:
    """Files, by their paths and bytes, as they come to be written."""
    batch = [(Entry(path, "f", 0o644, mtime=1_000_000_000, size=len(data)), path) for path, data in files]
    contents = b"".join(struct.pack(">I", len(data)) + data for _, data in files)
    return batch, Contents(memoryview(contents), {})


def put(tree: LocalTree | RemoteTree, *files: tuple[bytes, bytes], beside: bool = False) -> Written:
    told: list[Written | FileError] = []
    tree.put(*batch_of(*files), told.append, owner=False, beside=beside)
    tree.settle(all_of_it=True)
    assert isinstance(told[0], Written)
    return told[0]


def got(tree: LocalTree | RemoteTree, *files: tuple[bytes, int]) -> tuple[bytes, dict[int, str]]:
    """Contents of files, by their paths and the sizes that they had, and why some have none."""
    told: list[tuple[bytes, dict[int, str]] | FileError] = []

    def then(said: Contents | FileError) -> None:
        assert isinstance(said, Contents)
        told.append((bytes(said.data), {number: str(why) for number, why in said.failed.items()}))

    tree.get([(Entry(path, "f", size=size), path) for path, size in files], then)
    tree.settle(all_of_it=True)
    assert not isinstance(told[0], FileError)
    return told[0]


def test_nothing_is_written_by_way_of_a_link_in_the_folder(tmp_path: Path) -> None:
    root, secret = tmp_path / "root", tmp_path / "secret"
    root.mkdir()
    secret.mkdir()
    (secret / "f").write_text("old")
    (root / "way").symlink_to(secret)
    (root / "file").symlink_to(secret / "f")
    tree = LocalTree.of(os.fsencode(root), writes=True)
    asked: list[Callable[[Callable[[int | FileError], None]], None]] = [
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
        assert got(tree, (b"way/f", 3), (b"file", 3))[1].keys() == {0, 1}
        written = put(tree, (b"way/new", b"new"), (b"../secret/new", b"new"), (b"file", b"new"))
        assert written.failed.keys() == {0, 1}
    finally:
        tree.close()
    assert [each.name for each in secret.iterdir()] == ["f"]
    assert (secret / "f").read_text() == "old"
    assert (root / "file").read_text() == "new"


def test_a_file_that_can_not_be_written_whole_leaves_nothing(tmp_path: Path) -> None:
    tree = LocalTree.of(os.fsencode(tmp_path), writes=True)
    (tmp_path / "f").mkdir()
    try:
        assert str(put(tree, (b"f", b"x")).failed[0]) == "Is a directory"
    finally:
        tree.close()
    assert [each.name for each in tmp_path.iterdir()] == ["f"]


@contextlib.contextmanager
def seen_in(folder: Path) -> Iterator[list[tuple[str, str]]]:
    """What happens to the files in a folder, as the kernel tells it (inotify(7)), once the block has ended."""
    kinds = {2: "written", 4: "attributes", 8: "closed", 0x80: "named", 0x100: "made"}
    libc = ctypes.CDLL(None, use_errno=True)
    seen: list[tuple[str, str]] = []
    watching = libc.inotify_init()
    try:
        assert libc.inotify_add_watch(watching, os.fsencode(folder), sum(kinds)) >= 0
        yield seen
        said = os.read(watching, 1 << 16)
        while said:
            _, kind, _, length = struct.unpack_from("iIII", said)
            seen.append((kinds[kind], said[16 : 16 + length].rstrip(b"\0").decode()))
            said = said[16 + length :]
    finally:
        os.close(watching)


def test_files_whose_long_names_begin_alike_are_written_beside_each_other(
    tmp_path: Path,
) -> None:
    names = [b"n" * 254 + end for end in (b"1", b"2")]
    tree = LocalTree.of(os.fsencode(tmp_path), writes=True)
    try:
        assert put(tree, (names[0], b""), (names[1], b"")) == Written({})
        with seen_in(tmp_path) as seen:  # they take the places of those
            assert put(tree, (names[0], b"1"), (names[1], b"2")) == Written({})
    finally:
        tree.close()
    made = [name for what, name in seen if what == "made"]
    assert len(set(made)) == 2  # what another thread writes meanwhile is another file
    assert all(len(name) <= 255 for name in made)
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
            assert got(tree, (b"f", 0)) == (b"\xff" * 4 + b"\0\0", {0: "It is no regular file any more"})
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
                listed(each)
            with pytest.raises(StreamGone):
                each.remove(b"f", False, lambda told: None)
    finally:
        other.close()
        tree.close()
    assert (tmp_path / "f").exists()


def test_with_update_a_small_file_has_its_name_when_it_is_whole_and_not_before(
    tmp_path: Path,
) -> None:
    for name in ("source", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "source/f").write_text("all of it")
    options = Options(update=True)
    source = LocalTree.of(os.fsencode(tmp_path / "source"), writes=False)
    there = LocalTree.of(os.fsencode(tmp_path / "there"), writes=True)
    with seen_in(tmp_path / "there") as seen:
        try:
            worker = Copy(plan(listed(source), [], b"", None, options), options).worker(source, there)
            worker.run()
        finally:
            source.close()
            there.close()
    part = next(name for _, name in seen if name != "f")
    assert part.startswith(".f.kohakuriver-")
    # All is done to it under the other name: its bytes, its mode and time; then it has its own.
    assert [what for what, _ in seen] == ["made", "written", "attributes", "closed", "named"]
    assert [name for _, name in seen] == [part] * 4 + ["f"]
    assert (worker.done.files, worker.done.size, worker.done.failed) == (1, 9, [])
    assert {each.name: each.read_text() for each in (tmp_path / "there").iterdir()} == {"f": "all of it"}


def test_a_batch_of_files_from_many_folders_is_copied_but_for_those_that_can_not(tmp_path: Path) -> None:
    files = {f"{folder}/{name}": f"{folder} {name}" * (not name.startswith("e")) for folder in "xyz" for name in "aeg"}
    for folder in ("source/x", "source/y", "source/z", "there/x", "there/z/g"):  # there is no y there
        (tmp_path / folder).mkdir(parents=True)
    for name, text in files.items():
        (tmp_path / "source" / name).write_text(text)
        (tmp_path / "source" / name).chmod(0o4750)
        os.utime(tmp_path / "source" / name, ns=(7, 1_234_567_891))
    source = LocalTree.of(os.fsencode(tmp_path / "source"), writes=False)
    there = LocalTree.of(os.fsencode(tmp_path / "there"), writes=True)
    try:
        made = plan(listed(source), [], b"", None, Options())
        (tmp_path / "source/x/a").write_text("it has grown since then")
        (tmp_path / "source/z/a").unlink()
        worker = Copy(made, Options()).worker(source, there)
        worker.run()
    finally:
        source.close()
        there.close()
    missing = "No such file or directory"
    failed = [(b"x/a", "It changed while it was copied"), (b"z/a", missing), *((b"y/%c" % c, missing) for c in b"aeg")]
    assert sorted(worker.done.failed) == sorted([*failed, (b"z/g", "Is a directory")])
    copied = {str(each.relative_to(tmp_path / "there")): each for each in tmp_path.glob("there/*/*") if each.is_file()}
    assert {name: each.read_text() for name, each in copied.items()} == {
        name: files[name] for name in ("x/e", "x/g", "z/e")
    }
    assert {(each.stat().st_mode & 0o7777, each.stat().st_mtime_ns) for each in copied.values()} == {
        (0o750, 1_234_567_891)
    }
    assert (worker.done.files, worker.done.size) == (3, len(files["x/g"]))


def test_what_the_system_says_of_a_folder_is_told_of_each_name_in_it(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"1234")
    (tmp_path / "same").hardlink_to(tmp_path / "f")
    (tmp_path / "l").symlink_to("away")
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "p")
    (tmp_path / os.fsdecode(b"\xff")).touch()
    tree = LocalTree.of(os.fsencode(tmp_path), writes=False)
    try:
        found = {entry.path: entry for entry in listed(tree)}
        alone = listed(tree, b"f")
    finally:
        tree.close()
    about = (tmp_path / "f").stat()
    expected = Entry(
        b"f", "f", about.st_mode & 0o7777, about.st_uid, about.st_gid, about.st_mtime_ns, 4, False,
        (about.st_dev, about.st_ino),
    )  # fmt: skip
    assert (found[b"f"], alone, found[b"same"].link) == (expected, [expected], expected.link)
    assert {path: entry.kind for path, entry in found.items()} == {
        b"": "d", b"f": "f", b"same": "f", b"l": "l", b"d": "d", b"p": "o", b"\xff": "f",
    }  # fmt: skip
    assert found[b"l"].target == b"away"
    assert [entry for entry in found.values() if entry.link and entry.path not in (b"f", b"same")] == []


def test_what_is_made_while_a_folder_is_told_is_not_told(tmp_path: Path) -> None:
    for name in ("a/x", "b/x"):
        (tmp_path / name).mkdir(parents=True)
    tree = LocalTree.of(os.fsencode(tmp_path), writes=False)
    try:
        parts = tree.entries(b"")
        found = list(next(parts))
        for name in ("a/x/new", "b/new", "c"):  # as a copy does that lies in what it is of
            (tmp_path / name).mkdir()
        found += [entry for part in parts for entry in part]
    finally:
        tree.close()
    assert [entry.path for entry in found] == [b"", b"a", b"b", b"a/x", b"b/x"]


def test_files_are_copied_while_more_is_listed_and_each_has_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("source/a", "source/b", "there"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("a/f", "b/f"):
        (tmp_path / "source" / name).write_text(name)
    source = LocalTree.of(os.fsencode(tmp_path / "source"), writes=False)
    other, there = source.another(), LocalTree.of(os.fsencode(tmp_path / "there"), writes=True)
    others_there = there.another()
    planner = Planner([], b"", None, Options())
    copy = Copy(planner.plan, Options(), grows=True)
    copied = threading.Event()
    lead, helper = copy.worker(source, there), copy.worker(other, others_there)
    put = others_there.put

    def watched(batch: Batch, contents: Contents, then: Callable[[Written | FileError], None], **more: bool) -> None:
        put(batch, contents, then, **more)
        copied.set()

    def told() -> Iterator[list[Entry]]:
        entries = listed(source)
        yield [*entries[:3], *(entry for entry in entries if entry.path == b"a/f"), *([Entry(b"x", "o")] * 3000)]
        assert copied.wait(60)
        yield [entry for entry in entries if entry.path == b"b/f"]

    monkeypatch.setattr(others_there, "put", watched)
    helping = threading.Thread(target=helper.run)
    helping.start()
    try:
        lead.prepare(planner, told(), lambda: None)
        lead.run()
        helping.join()
    finally:
        for tree in (source, other, there, others_there):
            tree.close()
    assert (helper.done.files + lead.done.files, lead.done.folders) == (2, 3)
    assert [(tmp_path / "there" / name).read_text() for name in ("a/f", "b/f")] == ["a/f", "b/f"]


def test_who_waits_for_files_to_copy_is_let_go_when_the_list_fails(tmp_path: Path) -> None:
    tree = LocalTree.of(os.fsencode(tmp_path), writes=False)
    planner = Planner([], b"", None, Options())
    copy = Copy(planner.plan, Options(), grows=True)
    lead, helper = copy.worker(tree, tree), copy.worker(tree, tree)
    helping = threading.Thread(target=helper.run)
    helping.start()
    tree.hang_up()
    try:
        with pytest.raises(StreamGone):
            lead.prepare(planner, tree.entries(b"f"), lambda: None)
        helping.join()
    finally:
        tree.close()
    assert helper.done.files == 0


@pytest.mark.parametrize(
    "contents",
    [
        b"\0\0\0\4data",  # of one file, where two were asked for
        b"\0\0\0\4data\0\0\0\3too",  # of another size
        b"\0\0\0\4data\0\0\0\4more+",
        b"\0\0\0\4data\0\0\0\4mo",
        b"\0\0\0\4data\xff\xff\xff\xff\0",
        b"\0\0\0\4data\xff\xff\xff\xff\0\7EIO",
        b"",
    ],
)
def test_contents_that_are_not_of_the_files_that_were_asked_for_end_the_copy(contents: bytes) -> None:
    said = answer(Answer.DATA, struct.pack(">I", zlib.crc32(contents)) + contents)
    with a_peer(said) as (tree, _), pytest.raises(UnavailableError, match="makes no sense"):
        got(tree, (b"f", 4), (b"g", 4))
    batch = [(Entry(path, "f", size=4), path) for path in (b"f", b"g")]
    with pytest.raises(ValueError, match="contents"):
        _files.contents_in(batch, contents)


def test_what_a_task_says_of_each_of_many_files_is_heard() -> None:
    contents = b"\0\0\0\4data\xff\xff\xff\xff\0\7EIO: no"
    results = b"\0\2\3\0\7EIO: no\1"
    data = answer(Answer.DATA, struct.pack(">I", zlib.crc32(contents)) + contents)
    with a_peer(data, answer(Answer.RESULTS, results)) as (tree, _):
        assert got(tree, (b"f", 4), (b"g", 4)) == (contents, {1: "no"})
        written = put(tree, *((name, b"") for name in (b"a", b"b", b"c", b"d")))
    assert ({number: str(why) for number, why in written.failed.items()}, written.not_owner) == ({2: "no"}, 1)


@pytest.mark.parametrize("results", [b"\0", b"\0\0\0", b"\0\4", b"\0\3", b"\0\3\0", b"\0\3\0\1", b"\3\0\0\0\0"])
def test_results_that_are_not_of_the_files_that_were_sent_end_the_copy(results: bytes) -> None:
    with a_peer(answer(Answer.RESULTS, results)) as (tree, far):
        aside(lambda: [None for _ in iter(lambda: far.recv(1 << 20), b"")])
        with pytest.raises(UnavailableError, match="makes no sense"):
            put(tree, (b"a", b""), (b"b", b""))


def test_no_name_that_leads_elsewhere_is_opened_and_nothing_is_read_past_its_room(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"1234")
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        for path in (b"..", b".", b"", b"a/", b"n" * 256, b"a\0b"):
            batch = [(Entry(path, "f"), path)]
            with pytest.raises(ValueError, match="name"):
                _files.read_batch(batch, 0, folder, bytearray(100), 0)
            with pytest.raises(ValueError, match="name"):
                _files.write_batch(batch, 0, folder, bytes(4), 0, False, False)
        with pytest.raises(ValueError, match="room"):
            _files.read_batch([(Entry(b"f", "f", size=4), b"f")], 0, folder, bytearray(7), 0)
    finally:
        os.close(folder)


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
