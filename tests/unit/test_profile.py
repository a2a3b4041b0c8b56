"""`kohakuriver.toml`: where it is looked for, what it may say, and what it may not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kohakuriver.cli import profile
from kohakuriver.cli.profile import FILE, Entry, found, read
from kohakuriver.errors import UsageError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / FILE


def test_an_entry_names_a_task_its_ports_and_how_they_are_opened(file: Path) -> None:
    file.write_text(
        '[[forward]]\ntask = "lab"\nports = ["8888", 6006, "5432:5432", "53/udp"]\n\n'
        '[[forward]]\nname = "db"\ntask = 17\nports = "0:5432"\nlocal_host = "127.0.0.1"\n'
        "local_port_fallback = true\nwait = 5\nresume = false\nresume_for = 60\ndetach = true\n"
    )
    assert profile.read(file) == [
        Entry("lab", ("8888", "6006", "5432:5432", "53/udp")),
        Entry("17", ("0:5432",), "db", "127.0.0.1", True, 5, False, 60, True),
    ]


@pytest.mark.parametrize(("said", "seconds"), [("true", 60.0), ("false", None), ("0", 0), ("1.5", 1.5)])
def test_to_wait_takes_a_time_or_the_usual_one(file: Path, said: str, seconds: float | None) -> None:
    file.write_text(f'[forward]\ntask = "lab"\nports = 80\nwait = {said}\n')
    assert profile.read(file)[0].wait == seconds


@pytest.mark.parametrize("key", ["host", "token", "ca_file", "proxy", "command", "on_connect"])
@pytest.mark.parametrize("where", ["", '[[forward]]\ntask = "lab"\nports = 80\n'], ids=["file", "entry"])
def test_whom_the_token_goes_to_and_what_runs_is_not_the_files_to_say(file: Path, key: str, where: str) -> None:
    file.write_text(f'{where}{key} = "http://elsewhere"\n')
    with pytest.raises(UsageError, match="your own to say") as raised:
        profile.read(file)
    assert repr(key) in raised.value.message
    assert str(file) in raised.value.message
    assert "elsewhere" not in raised.value.message


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ('task = "lab"', "lacks 'ports'"),
        ("ports = 80", "lacks 'task'"),
        ('task = ""\nports = 80', "'task' in .* must be a task's name or id"),
        ("task = true\nports = 80", "'task' in"),
        ('task = "lab"\nports = []', "'ports' in .* must be ports"),
        ('task = "lab"\nports = [true]', "'ports' in"),
        ('task = "lab"\nports = "http"', "'ports' in .*'http' is not a port"),
        ('task = "lab"\nports = 70000', "'ports' in .*70000 is out of range"),
        ('task = "lab"\nports = 80\nlocal_host = "0.0.0.0"', "'local_host' in .* must be a loopback address"),
        ('task = "lab"\nports = 80\nlocal_host = "name"', "'local_host' in"),
        ('task = "lab"\nports = 80\nlocal_port_fallback = 1', "'local_port_fallback' in .* must be true or false"),
        ('task = "lab"\nports = 80\nwait = -1', "'wait' in .* must be true, false or a number of seconds"),
        ('task = "lab"\nports = 80\nwait = inf', "'wait' in"),
        ('task = "lab"\nports = 80\nwait = "5"', "'wait' in"),
        ('task = "lab"\nports = 80\nresume = 1', "'resume' in .* must be true or false"),
        ('task = "lab"\nports = 80\nresume_for = true', "'resume_for' in"),
        ('task = "lab"\nports = 80\nresume_for = 86401', "'resume_for' in"),
        ('task = "lab"\nports = 80\ndetach = "yes"', "'detach' in .* must be true or false"),
        ('task = "lab"\nsocks = 65536', "'socks' in .* must be a local port"),
        ('task = "lab"\nsocks = true', "'socks' in"),
        ('task = "lab"\nports = 80\nname = 1', "'name' in .* must be text"),
        ('task = "lab"\nports = 80\nports_ = 81', "may not have 'ports_'; it may have task, ports,"),
    ],
)
def test_what_an_entry_can_not_have_is_told_with_the_file_and_the_key(file: Path, entry: str, said: str) -> None:
    file.write_text(f"[[forward]]\n{entry}\n")
    with pytest.raises(UsageError, match=said) as raised:
        profile.read(file)
    assert f"[[forward]] 1 of {file}" in raised.value.message


def test_a_unix_socket_is_below_the_directory_of_the_file(file: Path) -> None:
    file.write_text('[forward]\ntask = "lab"\nports = "unix:run/../x.sock:80"\n')
    assert profile.read(file)[0].ports == (f"unix:{file.parent}/x.sock:80",)


@pytest.mark.parametrize("path", ["/tmp/x.sock", "../x.sock", "out/x.sock"])
def test_a_unix_socket_elsewhere_is_not_the_files_to_name(file: Path, path: str) -> None:
    (file.parent / "out").symlink_to("..")
    file.write_text(f'[forward]\ntask = "lab"\nports = "unix:{path}:80"\n')
    with pytest.raises(UsageError, match="is not below the file's directory"):
        profile.read(file)


def test_all_needs_no_other_port(file: Path) -> None:
    file.write_text('[forward]\ntask = "lab"\nall = true\n')
    assert profile.read(file) == [Entry("lab", (), every=True)]
    file.write_text('[forward]\ntask = "lab"\nall = false\n')
    with pytest.raises(UsageError, match="lacks 'ports'"):
        profile.read(file)


def test_socks_needs_no_other_port(file: Path) -> None:
    file.write_text('[forward]\ntask = "lab"\nsocks = 1080\n')
    assert profile.read(file) == [Entry("lab", (), socks=1080)]


@pytest.mark.parametrize("content", [b"forward = 1", b"forward = [1]", b"other = 1", b"[[forward", b"\xff"])
def test_a_file_that_makes_no_sense_is_told_by_its_name(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(UsageError) as raised:
        profile.read(file)
    assert str(file) in raised.value.message
    assert raised.value.message.count("\n") == 0


def test_the_nearest_file_counts_up_to_the_repository_or_the_home_and_no_further(tmp_path: Path) -> None:
    home, repository, inside = tmp_path / "home", tmp_path / "home/repository", tmp_path / "home/repository/a/b"
    inside.mkdir(parents=True)
    (tmp_path / FILE).touch()
    assert profile.found(inside, home) is None
    (home / FILE).touch()
    assert profile.found(inside, home) == home / FILE
    (repository / ".git").mkdir()
    assert profile.found(inside, home) is None
    (repository / FILE).touch()
    assert profile.found(inside, home) == repository / FILE
    (inside / FILE).touch()
    assert profile.found(inside, home) == inside / FILE


def test_outside_of_repository_and_home_only_the_directory_itself_counts(tmp_path: Path) -> None:
    inside = tmp_path / "a"
    inside.mkdir()
    (tmp_path / FILE).touch()
    assert profile.found(inside, tmp_path / "home") is None
    assert profile.found(tmp_path, None) == tmp_path / FILE


def test_a_file_of_another_user_does_not_count(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('[[forward]]\ntask = "lab"\nports = ["8888"]\n')
    assert found(file.parent, None) == file
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    os.chown(file, os.getuid() or 54321, -1)  # neither this one's nor root's
    with pytest.raises(UsageError, match=rf"{FILE} belongs to another user"):
        found(file.parent, None)


def test_a_file_that_is_nested_without_end_is_told_by_its_name(file: Path) -> None:
    file.write_bytes(b"a=" + b"[" * 100_000)
    with pytest.raises(UsageError, match="nested too deeply"):
        read(file)


def test_a_profile_is_all_entries_of_its_name_and_without_one_all_are_meant(file: Path) -> None:
    entries = [Entry("a", ("1",)), Entry("b", ("2",), "db"), Entry("c", ("3",), "db"), Entry("d", ("4",), "web")]
    assert profile.chosen(file, entries, None) == entries
    assert profile.chosen(file, entries, "db") == entries[1:3]
    with pytest.raises(UsageError, match=r"no profile 'x'.*db, web"):
        profile.chosen(file, entries, "x")
    with pytest.raises(UsageError, match="has a name"):
        profile.chosen(file, entries[:1], "x")
    with pytest.raises(UsageError, match="names no forward"):
        profile.chosen(file, [], None)
