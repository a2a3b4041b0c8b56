"""`kohakuriver cp`: trees into a task and out of it, as they were, by real processes."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kohakuriver.client.copying.plan import part_name
from kohakuriver.tunnel.files import PIECE, Entry
from tests.support import docker_images
from tests.support.processes import eventually
from tests.support.up import Apart, Cluster, Commands, Program

TASK = "data"
RATE = {"KOHAKURIVER_MAX_RATE": str(8 << 20)}
"""Bytes a second of each of four streams: a copy of a LARGE file still runs when it is seen to have begun."""
MANY = 4000
LARGE = 160 * PIECE
STAY = ("/bin/busybox", "sleep", "1000000")
OLD = 1_000_000_000_123_456_789


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    yield from with_task(Cluster(tmp_path_factory.mktemp("copies")))


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One in which a large copy takes its time."""
    yield from with_task(Cluster(tmp_path_factory.mktemp("slow"), **RATE))


def with_task(cluster: Cluster) -> Iterator[Cluster]:
    try:
        cluster.succeed("vps", "create", "--backend", "process", "--name", TASK, "--", "sleep", "1000000")
        yield cluster
    finally:
        cluster.close()


def copied(cluster: Cluster, *arguments: str) -> dict[str, Any]:
    """What `cp` says that it has done."""
    done: dict[str, Any] = json.loads(cluster.succeed("cp", "--json", *arguments))
    return done


def in_task(path: Path) -> str:
    return f"{TASK}:{path}"


def begun(commands: Commands, source: Path, target: Path, *options: str) -> Program:
    """A copy of a large file, part of which is there."""
    source.write_bytes(os.urandom(PIECE) * (LARGE // PIECE))
    copy = commands.start("cp", *options, str(source), in_task(target))

    def size() -> int:
        try:
            return sum(each.stat().st_blocks * 512 for each in target.parent.glob(f".{target.name}.kohakuriver-*"))
        except FileNotFoundError:  # it has got its name
            return 0

    def is_under_way() -> bool:
        assert copy.process.poll() is None, copy.rest(err=True)
        return size() > 20 * PIECE

    eventually(is_under_way)
    return copy


def a_tree(root: Path) -> Path:
    """One of everything."""
    (root / "empty").mkdir(parents=True)
    (root / "deep/er").mkdir(parents=True)
    (root / "nothing").touch()
    (root / "deep/er/run.sh").write_bytes(b"#!/bin/sh\n")
    (root / "deep/er/run.sh").chmod(0o750)
    (root / "large").write_bytes(os.urandom(3 * PIECE + 17))
    (root / os.fsdecode(b"no \xff text\n")).write_bytes(b"bytes")
    (root / "link").symlink_to("deep/er/run.sh")
    (root / "away").symlink_to("/nowhere/../at all")
    (root / "to folder").symlink_to("deep")
    (root / "second").hardlink_to(root / "large")
    with (root / "holes").open("wb") as file:
        file.truncate(64 * PIECE)
        file.seek(20 * PIECE)
        file.write(b"in the middle")
    (root / "closed").mkdir()
    (root / "closed/file").write_bytes(b"x")
    (root / "closed").chmod(0o555)
    for path in sorted(root.rglob("*"), reverse=True):
        os.utime(path, ns=(OLD, OLD), follow_symlinks=False)
    os.utime(root, ns=(OLD, OLD))
    return root


def shape(root: Path) -> dict[str, tuple[object, ...]]:
    """All that a copy keeps, by path."""
    found: dict[str, tuple[object, ...]] = {}
    for path in (root, *root.rglob("*")):
        about = path.lstat()
        content: object = None
        if path.is_symlink():
            content = str(path.readlink())
        elif path.is_file():
            content = path.read_bytes()
        found[str(path.relative_to(root))] = (stat.S_IFMT(about.st_mode), about.st_mode, about.st_mtime_ns, content)
    return found


def test_a_tree_goes_into_a_task_and_comes_back_as_it_was(cluster: Cluster, tmp_path: Path) -> None:
    source = a_tree(tmp_path / "source")
    there, back = tmp_path / "there", tmp_path / "back"
    copied(cluster, "-r", str(source), in_task(there))
    copied(cluster, "-r", f"{in_task(there)}/source/", str(back))
    for copy in (there / "source", back):
        assert shape(copy) == shape(source)
        assert (copy / "holes").stat().st_blocks * 512 < 2 * PIECE
        assert (copy / "second").samefile(copy / "large")


def test_what_is_there_already_is_not_copied_again(cluster: Cluster, tmp_path: Path) -> None:
    source = a_tree(tmp_path / "source")
    for target in (in_task(tmp_path / "there"),):
        assert copied(cluster, "-r", str(source), target)["files"] == 6
        again = copied(cluster, "-r", str(source), target)
        assert (again["files"], again["links"], again["bytes"]) == (0, 0, 0)
    (source / "nothing").write_bytes(b"more")
    (source / "deep/er/run.sh").chmod(0o700)
    changed = copied(cluster, "-r", str(source), in_task(tmp_path / "there"))
    assert (changed["files"], changed["bytes"]) == (1, 4)
    assert shape(tmp_path / "there/source") == shape(source)


@pytest.mark.parametrize("down", [False, True])
def test_a_file_that_is_partly_there_is_gone_on_with(cluster: Cluster, tmp_path: Path, down: bool) -> None:
    data = os.urandom(20 * PIECE + 5)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(data)
    about = source.stat()
    entry = Entry(b"", "f", size=about.st_size, mtime=about.st_mtime_ns)
    part = tmp_path / os.fsdecode(part_name(b"target", entry))
    wrong = bytearray(data[: 11 * PIECE])
    wrong[5 * PIECE] ^= 1
    part.write_bytes(wrong)
    done = copied(cluster, in_task(source) if down else str(source), str(target) if down else in_task(target))
    assert done["resumed_bytes"] == 10 * PIECE
    assert target.read_bytes() == data
    assert not part.exists()


def test_a_copy_that_is_killed_goes_on_where_it_stopped(slow: Cluster, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    first = begun(slow, source, target)
    first.process.kill()
    first.ended()
    assert not target.exists()
    done = copied(slow, str(source), in_task(target))
    assert 10 * PIECE < done["resumed_bytes"] < LARGE
    assert target.read_bytes() == source.read_bytes()
    assert [each.name for each in tmp_path.glob(".target*")] == []


@pytest.mark.parametrize("down", [False, True])
def test_a_copy_of_many_files_that_is_killed_leaves_none_that_is_taken_for_whole(
    slow: Cluster, tmp_path: Path, down: bool
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for number in range(MANY):
        (source / f"{number}").write_bytes(number.to_bytes(4, "big") * 2048)
    ends = [f"{in_task(source)}/", str(target)] if down else [f"{source}/", in_task(target)]
    first = slow.start("cp", "-r", *ends)

    def is_under_way() -> bool:
        assert first.process.poll() is None, first.rest(err=True)
        return target.exists() and sum(1 for _ in target.iterdir()) > MANY // 10

    eventually(is_under_way)
    first.process.kill()
    first.ended()
    done = copied(slow, "-r", *ends)
    assert 0 < done["unchanged"] < MANY
    assert done["unchanged"] + done["files"] == MANY
    assert shape(target) == shape(source)


def test_ctrl_c_ends_a_copy_with_one_sentence(slow: Cluster, tmp_path: Path) -> None:
    copy = begun(slow, tmp_path / "source", tmp_path / "target")
    assert copy.stop(signal.SIGINT) == 128 + signal.SIGINT
    assert copy.rest(err=True) == ["Stopped; the same command goes on from here."]


def test_a_copy_goes_on_by_itself_when_the_host_was_killed_and_is_back(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    apart = Apart(tmp_path / "cluster", **RATE)
    try:
        apart.succeed("vps", "create", "--backend", "process", "--name", TASK, "--", "sleep", "1000000")
        source, target = tmp_path / "source", tmp_path / "target"
        copy = begun(apart, source, target, "--json")
        apart.host.stop(signal.SIGKILL)
        assert not target.exists()
        apart.start_host()
        done = json.loads(copy.line("{"))
        assert (copy.ended(), done["bytes"], done["resumed_bytes"]) == (0, LARGE, 0)
        assert target.read_bytes() == source.read_bytes()
    finally:
        apart.close()


def test_delete_takes_away_what_the_source_has_not_and_nothing_else(cluster: Cluster, tmp_path: Path) -> None:
    source = a_tree(tmp_path / "source")
    there = tmp_path / "there"
    copied(cluster, "-r", str(source), in_task(there))
    (there / "beside").touch()
    (there / "source/old/er").mkdir(parents=True)
    (there / "source/old/er/file").touch()
    (there / "source/old/link").symlink_to("../../beside")
    copied(cluster, "-r", str(source), in_task(there))
    assert (there / "source/old/er/file").exists()
    assert copied(cluster, "-r", "--delete", str(source), in_task(there))["removed"] == 4
    assert shape(there / "source") == shape(source)
    assert (there / "beside").exists()


@pytest.mark.parametrize("down", [False, True])
def test_delete_takes_nothing_away_where_a_folder_can_not_be_opened(
    cluster: Cluster, tmp_path: Path, down: bool
) -> None:
    source, there = tmp_path / "source", tmp_path / "there"
    (source / ("d/" * 201)).mkdir(parents=True)  # deeper than either end opens folders, as root too
    there.mkdir()
    (there / "old").touch()
    ends = (f"{in_task(source)}/", str(there)) if down else (f"{source}/", in_task(there))
    done = cluster.run("cp", "-r", "--delete", *ends)
    assert (done.returncode, "File name too long" in done.stderr) == (1, True), done.stderr
    assert (there / "old").exists()


def test_update_leaves_alone_what_is_newer(cluster: Cluster, tmp_path: Path) -> None:
    source, there = tmp_path / "source", tmp_path / "there"
    for root, names in ((source, "ab"), (there, "ab")):
        root.mkdir()
        for name in names:
            (root / name).write_text(f"{root.name} {name}")
    os.utime(source / "a", ns=(OLD, OLD))
    os.utime(there / "b", ns=(OLD, OLD))
    assert copied(cluster, "-r", "--update", f"{source}/", in_task(there))["files"] == 1
    assert [(there / name).read_text() for name in "ab"] == ["there a", "source b"]


def test_a_file_goes_into_a_folder_that_is_there_or_gets_the_name_that_is_given(
    cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("content")
    (tmp_path / "folder").mkdir()
    copied(cluster, str(tmp_path / "file"), in_task(tmp_path / "folder"))
    copied(cluster, str(tmp_path / "file"), in_task(tmp_path / "folder/new"))
    copied(cluster, in_task(tmp_path / "folder/new"), str(tmp_path / "back"))
    copied(cluster, in_task(tmp_path / "folder/new"), f"{tmp_path / 'made'}/")
    for copy in ("folder/file", "folder/new", "back", "made/new"):
        assert (tmp_path / copy).read_text() == "content", copy


def test_a_link_where_a_folder_is_to_be_is_replaced_and_never_followed(cluster: Cluster, tmp_path: Path) -> None:
    source, secret = tmp_path / "source", tmp_path / "secret"
    (source / "way").mkdir(parents=True)
    (source / "way/file").write_text("new")
    (source / "file").write_text("new")
    secret.mkdir()
    (secret / "file").write_text("old")
    for target, other in ((tmp_path / "in", ""), (tmp_path / "out", TASK)):
        target.mkdir()
        (target / "way").symlink_to(secret)
        (target / "file").symlink_to(secret / "file")
        if other:
            copied(cluster, "-r", f"{in_task(source)}/", str(target))
        else:
            copied(cluster, "-r", f"{source}/", in_task(target))
        assert (secret / "file").read_text() == "old"
        assert (target / "way/file").read_text() == "new"
        assert not (target / "way").is_symlink()
        assert not (target / "file").is_symlink()


def test_rights_that_lend_an_owners_are_not_copied_without_the_owner(cluster: Cluster, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("x")
    program.chmod(0o6755)
    copied(cluster, in_task(program), str(tmp_path / "plain"))
    copied(cluster, "--owner", in_task(program), str(tmp_path / "owned"))
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "owned")]
    assert modes == [0o755, 0o6755]


def test_one_file_that_can_not_be_copied_holds_up_no_other(cluster: Cluster, tmp_path: Path) -> None:
    source, there = tmp_path / "source", tmp_path / "there"
    source.mkdir()
    for name in "abc":
        (source / name).write_text(name)
    (there / "b/full").mkdir(parents=True)
    os.mkfifo(source / "pipe")
    done = cluster.run("cp", "-r", f"{source}/", in_task(there))
    assert done.returncode == 1
    assert "b: a folder has that name there." in done.stderr
    assert "Left out: 1 " in done.stderr
    assert [(there / name).read_text() for name in "ac"] == ["a", "c"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["{}/nothing", f"{TASK}:/tmp"], 3, "No such file or directory"),
        ([f"{TASK}:{{}}/nothing", "{}"], 3, "No such file or directory"),
        (["{}/file", f"{TASK}:{{}}/nothing/file"], 3, "No such file or directory"),
        (["{}/folder", f"{TASK}:{{}}"], 2, "is a folder; -r copies it"),
        ([f"{TASK}:{{}}/folder", "{}"], 2, "is a folder; -r copies it"),
        (["{}/file", "{}/other"], 2, "One of SRC and DST is in a task"),
        ([f"{TASK}:a", f"{TASK}:b"], 2, "One of SRC and DST is in a task"),
        (["--delete", "{}/file", f"{TASK}:/tmp"], 2, "--delete goes with -r"),
        (["{}/file", "no-such-task:/tmp"], 3, "no-such-task"),
        (["-r", "{}/folder", f"{TASK}:{{}}/file"], 4, "Not a directory"),
    ],
)
def test_what_can_not_be_copied_is_told_in_one_sentence(
    cluster: Cluster, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    (tmp_path / "file").write_text("content")
    (tmp_path / "folder").mkdir()
    done = cluster.run("cp", *(argument.format(tmp_path) for argument in arguments))
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert said in done.stderr


def test_the_audit_log_says_what_was_copied(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    copied(cluster, str(tmp_path / "file"), in_task(tmp_path / "there"))
    assert f"cp to {tmp_path / 'there'}" in cluster.succeed("audit", "--task", TASK).replace("'", "").replace('"', "")


@pytest.mark.docker
def test_an_image_with_one_program_in_it_needs_no_other(cluster: Cluster, tmp_path: Path) -> None:
    docker_images.require_engine()
    source, back = a_tree(tmp_path / "source"), tmp_path / "back"
    cluster.succeed("vps", "create", "--image", docker_images.single_binary_image(), "--name", "bare")
    try:
        copied(cluster, "-r", str(source), "bare:/made")
        copied(cluster, "-r", "bare:/made/source/", str(back))
        assert shape(back) == shape(source)
    finally:
        cluster.succeed("vps", "rm", "bare")


@pytest.mark.docker
def test_files_are_those_of_the_images_user(cluster: Cluster, tmp_path: Path) -> None:
    docker_images.require_engine()
    (tmp_path / "file").write_text("content")
    cluster.succeed("vps", "create", "--image", docker_images.unprivileged_image(), "--name", "nobody", "--", *STAY)
    try:
        copied(cluster, str(tmp_path / "file"), "nobody:/dev/shm/file")
        told = cluster.succeed("connect", "nobody", "--", "/bin/busybox", "stat", "-c", "%u:%g", "/dev/shm/file")
        assert told == "12345:12345\n"
        refused = cluster.run("cp", str(tmp_path / "file"), "nobody:/file")
        assert (refused.returncode, refused.stderr.splitlines()[0]) == (1, "Error: file: Permission denied.")
    finally:
        cluster.succeed("vps", "rm", "nobody")


@pytest.mark.parametrize("down", [False, True])
def test_a_copy_in_the_folder_that_it_is_of_comes_to_an_end(cluster: Cluster, tmp_path: Path, down: bool) -> None:
    for name in ("data/a/f", "data/copy/old", "data/z/f"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    before = shape(tmp_path / "data")
    ends = [in_task(tmp_path / "data"), str(tmp_path / "data/copy")]
    if not down:
        ends = [str(tmp_path / "data"), in_task(tmp_path / "data/copy")]
    assert copied(cluster, "-r", f"{ends[0]}/", ends[1])["files"] == 3
    names = {str(path.relative_to(tmp_path / "data/copy")) for path in (tmp_path / "data/copy").rglob("f")}
    assert names == {"a/f", "z/f"}
    assert before.keys() < shape(tmp_path / "data").keys()


def test_what_a_copy_frees_is_not_given_back_to_the_kernel() -> None:
    program = """
import resource, sys
from kohakuriver._files import keep_memory
if sys.argv[1] == "kept":
    keep_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        [b"x" * (400 << 10) for _ in range(20)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", program, how], capture_output=True, text=True, check=True).stdout)
        for how in ("kept", "given back")
    )
    assert kept < 100 < given_back
