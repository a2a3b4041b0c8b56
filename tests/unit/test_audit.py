"""The audit log as a file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kohakuriver.errors import UsageError
from kohakuriver.host.services.audit import AuditLog


def test_it_grows_by_one_line_of_json_at_a_time_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    AuditLog(path).write("one", user="ann\nmallory", port=1)
    AuditLog(path).write("two")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.pop("time")[-6:] for line in lines] == ["+00:00", "+00:00"]
    assert lines == [{"event": "one", "user": "ann\nmallory", "port": 1}, {"event": "two"}]
    assert path.stat().st_mode & 0o777 == 0o600


def test_it_goes_on_in_a_new_file_when_the_old_one_is_renamed(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.write("one")
    path.rename(tmp_path / "audit.jsonl.1")
    log.write("two")
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["two"]


def test_a_place_that_can_not_be_written_to_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"audit log .* can't be written to"):
        AuditLog(tmp_path / "none" / "audit.jsonl")


def test_how_many_lines_a_full_disk_has_cost_is_written_down_and_no_line_is_glued_to_half_a_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.write("one")
    write = os.write
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda file, data: write(file, data[:10]))
        log.write("two")
        log.write("three")
    log.write("four")
    lines = path.read_text().splitlines()
    whole = [json.loads(line) for line in lines if line.endswith("}")]
    assert [line["event"] for line in whole] == ["one", "lines_lost", "four"]
    assert whole[1]["count"] == 2


def test_half_a_line_from_a_crash_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    AuditLog(path).write("one")
    with path.open("a") as file:
        file.write('{"time": "20')
    AuditLog(path).write("two")
    first, half, second = path.read_text().splitlines()
    assert (json.loads(first)["event"], half, json.loads(second)["event"]) == ("one", '{"time": "20', "two")


def test_a_disk_that_fails_later_ends_nothing_and_is_logged_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    log = AuditLog(tmp_path / "there" / "audit.jsonl")
    (tmp_path / "there" / "audit.jsonl").unlink()
    (tmp_path / "there").rmdir()
    log.write("one")
    log.write("two")
    said = capsys.readouterr()
    assert (said.out + said.err).count("audit log can't be written to") == 1
