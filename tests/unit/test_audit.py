"""The audit log as a file."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Coroutine
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kohakuriver.asking import Asker, asking
from kohakuriver.errors import NotAllowedError, UnauthenticatedError, UnavailableError, UsageError
from kohakuriver.host.services import audit_file, audit_reader
from kohakuriver.host.services.audit import AuditLog, fingerprint, ranges
from kohakuriver.host.services.audit_file import files_of
from kohakuriver.host.services.audit_reader import AuditPage, read_page
from kohakuriver.limits import Limits
from tests.support.host_only import a_host

Run = Callable[[Coroutine[Any, Any, None]], None]
# What `ssh-keygen -l` says of the key in these tests.
OPENSSH_SAYS = "SHA256:mY6b7Ynx2mNHut1BM4ZdXKpy625TJVF5cr8k0qnWR/4"


def settled(log: AuditLog) -> AuditLog:
    """The log, once all that was added is in its file or lost."""
    asyncio.run(log.written())
    return log


def test_it_grows_by_one_line_of_json_at_a_time_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.write("one", user="ann\nmallory", port=1)
    log.write("two")
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.pop("time")[-6:] for line in lines] == ["+00:00", "+00:00"]
    assert lines == [{"event": "one", "user": "ann\nmallory", "port": 1}, {"event": "two"}]
    assert path.stat().st_mode & 0o777 == 0o600


def test_it_goes_on_in_a_new_file_when_the_old_one_is_renamed(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.write("one")
    settled(log)
    path.rename(tmp_path / "audit.jsonl.1")
    log.write("two")
    settled(log)
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
    settled(log)
    write = os.write
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda file, data: write(file, data[:10]))
        log.write("two")
        log.write("three")
        settled(log)
    log.write("four")
    log.close()
    lines = path.read_text().splitlines()
    whole = [json.loads(line) for line in lines if line.endswith("}")]
    assert [line["event"] for line in whole] == ["one", "lines_lost", "four"]
    assert whole[1]["count"] == 2


def test_half_a_line_from_a_crash_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for event in ("one", "two"):
        log = AuditLog(path)
        log.write(event)
        log.close()
        if event == "one":
            with path.open("a") as file:
                file.write('{"time": "20')
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
    settled(log)
    said = capsys.readouterr()
    assert (said.out + said.err).count("audit log can't be written to") == 1


def lines_of(path: Path) -> list[dict[str, Any]]:
    """All lines of a log, the oldest first."""
    return [json.loads(line) for file in files_of(path) for line in file.read_text().splitlines()]


def test_all_its_files_together_stay_below_the_limit_and_the_oldest_lines_go_first(tmp_path: Path) -> None:
    path, most = tmp_path / "audit.jsonl", 16_000
    log = AuditLog(path, most=most)
    for number in range(1000):
        log.write("event", number=number, text="x" * 50)
    log.close()
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= most
    numbers = [line["number"] for line in lines_of(path)]
    assert len(files_of(path)) == 8
    assert numbers == list(range(numbers[0], 1000))
    assert len(numbers) > 60
    assert {file.stat().st_mode & 0o777 for file in files_of(path)} == {0o600}


def test_it_leaves_the_last_of_a_disk_to_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    with monkeypatch.context() as full:
        full.setattr(os, "fstatvfs", lambda _: SimpleNamespace(f_frsize=1 << 20, f_blocks=10_000, f_bavail=63))
        log.write("one")
        settled(log)
    assert path.read_text() == ""
    log.write("two")
    log.close()
    assert [line["event"] for line in lines_of(path)] == ["lines_lost", "two"]


def test_ports_are_written_as_ranges() -> None:
    assert ranges([8002, 80, 8000, 8001, 443, 80]) == ["80", "443", "8000-8002"]
    assert ranges(range(1, 65536)) == ["1-65535"]


def test_a_key_has_the_fingerprint_that_openssh_shows() -> None:
    key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFv7M0rrHjlgOIaUNpUSPFm6v0yVvs93DIQ0VWmN2yFC me"
    assert fingerprint(key) == OPENSSH_SAYS
    assert fingerprint("no-key") == fingerprint("ssh-ed25519 !") == "?"


def test_strangers_push_nothing_out_of_the_log_and_their_number_is_told(tmp_path: Path) -> None:
    now = [0.0]
    log = AuditLog(tmp_path / "audit.jsonl", clock=lambda: now[0])
    for number in range(1000):
        with asking(Asker(f"2001:db8:0:1:{number:x}::1:55", "GET /")):  # one network of one machine
            log.refused(UnauthenticatedError("no"))
    for number in range(1000):
        with asking(Asker(f"192.0.{number // 250}.{number % 250}:55", "GET /")):
            log.refused(UnauthenticatedError("no"))
    log.tell_left_out()
    lines = lines_of(settled(log).path)
    told = [line for line in lines if line["event"] == "login_refused"]
    left_out = {line["from"]: line["count"] for line in lines if line["event"] == "refusals_left_out"}
    assert sum(line["from"].startswith("2001:db8:0:1:") for line in told) == 20
    assert left_out["2001:db8:0:1::/64"] == 980
    assert len(told) + sum(left_out.values()) == 2000
    assert len(told) == 200
    now[0] += 3600
    with asking(Asker("192.0.2.7:1", "GET /")):
        log.refused(UnauthenticatedError("no"))
    log.close()
    assert lines_of(log.path)[-1]["from"] == "192.0.2.7:1"


def has_room(log: AuditLog, user: str) -> bool:
    try:
        log.need_room(user)
    except UnavailableError:
        return False
    return True


def test_no_user_pushes_anything_out_of_the_log_within_a_day_and_who_did_too_much_waits(tmp_path: Path) -> None:
    now, most = [0.0], 400_000
    log = AuditLog(tmp_path / "audit.jsonl", most=most, clock=lambda: now[0])
    log.write("task_shared", user="ann", of_user="eve")
    lines = 0
    while now[0] < 86_400:
        if has_room(log, "eve"):
            log.write("session_opened", user="eve", ports=["80"])
            lines += 1
        else:
            now[0] += 600
    while has_room(log, "eve"):
        log.write("session_opened", user="eve", ports=["80"])
        lines += 1
    with pytest.raises(UnavailableError, match=r"^eve has done more than .* in its audit log; ask again in") as refusal:
        log.need_room("eve")
    assert (refusal.value.status, refusal.value.code) == (429, "too_many_requests")
    log.need_room("ann")
    log.close()
    found = lines_of(log.path)
    assert found[0]["event"] == "task_shared"
    assert [line["user"] for line in found].count("eve") == lines > 1000


def test_a_user_who_has_done_too_much_may_look_and_take_away_and_do_nothing_else_and_others_anything(
    run: Run, tmp_path: Path
) -> None:
    async def check() -> None:
        async with a_host(tmp_path, limits=Limits(max_requests=0, max_audit=1 << 20)) as host:
            await host.runner()
            eve, _ = await host.person("eve")
            ann, _ = await host.person("ann")
            made = (await eve.post("/api/tokens", json={})).json()
            while has_room(host.audit, "eve"):
                host.audit.write("session_opened", user="eve", name="x" * 400)
            answer = await eve.post("/api/tokens", json={})
            assert (answer.status_code, answer.json()["error"]) == (429, "too_many_requests")
            assert (await eve.get("/api/tasks")).status_code == 200
            assert (await eve.post("/api/tasks/1/stop")).status_code == 404
            assert (await eve.delete(f"/api/tokens/{made['id']}")).is_success
            assert (await ann.post("/api/tokens", json={})).status_code == 201

    run(check())


def test_refusals_are_of_nobodys_share(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", most=100_000)
    for _ in range(100):
        log.refused(NotAllowedError("no", code="not_yours"), user="eve", name="x" * 1000)
    log.need_room("eve")
    log.close()


def test_nobody_waits_for_the_disk_and_what_finds_no_room_meanwhile_is_counted_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_file, "WAITING_BYTES", 1000)
    log = AuditLog(tmp_path / "audit.jsonl")
    held, begun, write, writers = threading.Event(), threading.Event(), os.write, set()

    def slow(file: int, data: bytes) -> int:
        writers.add(threading.current_thread())
        begun.set()
        held.wait()
        return write(file, data)

    with monkeypatch.context() as hanging:
        hanging.setattr(os, "write", slow)
        log.write("event", number=0)
        assert begun.wait(60)
        for number in range(1, 100):  # none of these returns late, though the disk takes nothing
            log.write("event", number=number)
        held.set()
        settled(log)
    log.write("last")
    log.close()
    lines = lines_of(log.path)
    numbers = [line["number"] for line in lines if line["event"] == "event"]
    assert numbers == list(range(len(numbers)))
    assert [line["event"] for line in lines[len(numbers) :]] == ["lines_lost", "last"]
    assert len(numbers) + lines[-2]["count"] == 100
    assert len(numbers) >= 10
    assert threading.current_thread() not in writers


def test_what_was_lost_last_is_told_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda file, data: 0)
        log.write("one")
        settled(log)
    log.close()
    assert [(line["event"], line["count"]) for line in lines_of(log.path)] == [("lines_lost", 1)]


async def pages(path: Path, **wanted: Any) -> list[dict[str, Any]]:
    """All events of a log, page by page."""
    found: list[dict[str, Any]] = []
    page = AuditPage(events=[], after="", more=True)
    while page.more:
        page = await read_page(path, after=page.after or None, **wanted)
        found += page.events
    return found


def test_a_reader_gets_every_line_once_also_while_files_are_renamed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_reader, "SCANNED_BYTES", 700)

    async def check() -> None:
        log = AuditLog(tmp_path / "audit.jsonl", most=80_000)
        written, found = 0, []
        after: str | None = None
        for _ in range(60):
            for _ in range(5):
                log.write("event", number=written, user="ann" if written % 2 else "bob")
                written += 1
            await log.written()
            page = await read_page(log.path, after=after)
            found += page.events
            after = page.after
        while page.more:
            page = await read_page(log.path, after=page.after)
            found += page.events
        assert [line["number"] for line in found] == list(range(written))
        assert len(files_of(log.path)) > 2
        assert [line["number"] for line in await pages(log.path, user="ann")] == list(range(1, written, 2))
        soon = datetime.now(timezone.utc) + timedelta(seconds=2)
        assert await pages(log.path, since=soon) == []
        assert len(await pages(log.path, since=soon - timedelta(hours=1))) == written
        log.close()

    run(check())


def test_everything_that_changes_who_may_do_what_is_written_down_with_who_from_where_and_how(
    run: Run, tmp_path: Path
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            ann, _ = await host.person("ann")
            await host.person("bob")
            key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFv7M0rrHjlgOIaUNpUSPFm6v0yVvs93DIQ0VWmN2yFC me"
            order = {"name": "web", "command": ["serve", "a b"], "env": {"PASSWORD": "s3cret"}, "ssh_keys": [key]}
            order["backend"] = "process"
            task = (await ann.post("/api/tasks", json=order)).json()["task_id"]
            await ann.post("/api/tasks/web/shares", json={"user": "bob"})
            await ann.delete("/api/tasks/web/shares/bob")
            await ann.post("/api/tasks/web/stop")
            await ann.post("/api/tasks/web/restart")
            await ann.delete("/api/tasks/web")
            await host.user.post("/api/tasks/adopt", json={"container": "c", "name": "db"})
            made = (await ann.post("/api/tokens", json={"name": "laptop"})).json()["id"]
            await ann.delete("/api/tokens/laptop")
            await host.user.delete("/api/users/ann")
            await host.audit.written()
            lines = lines_of(tmp_path / "audit.jsonl")
            assert runner.name in {line.get("node") for line in lines}
        assert "s3cret" not in (tmp_path / "audit.jsonl").read_text()
        asked = [line for line in lines if line["event"] != "node_registered"]
        assert all(line["from"].startswith("127.0.0.1:") for line in asked)
        assert [(line["event"], line["user"], line["request"]) for line in asked] == [
            *(("user_added", "admin", "POST /api/users"), ("token_made", "admin", "POST /api/tokens")) * 2,
            ("task_created", "ann", "POST /api/tasks"),
            ("task_shared", "ann", "POST /api/tasks/web/shares"),
            ("task_unshared", "ann", "DELETE /api/tasks/web/shares/bob"),
            ("task_stopped", "ann", "POST /api/tasks/web/stop"),
            ("task_restarted", "ann", "POST /api/tasks/web/restart"),
            ("task_removed", "ann", "DELETE /api/tasks/web"),
            ("task_adopted", "admin", "POST /api/tasks/adopt"),
            ("token_made", "ann", "POST /api/tokens"),
            ("token_revoked", "ann", "DELETE /api/tokens/laptop"),
            ("user_removed", "admin", "DELETE /api/users/ann"),
        ]
        created = next(line for line in asked if line["event"] == "task_created")
        assert (created["task"], created["name"], created["node"]) == (task, "web", "n1")
        assert (created["command"], created["ssh_keys"]) == ("serve 'a b'", [OPENSSH_SAYS])
        assert {line["of_token"] for line in asked if line.get("label") == "laptop"} == {made}
        assert all(len(line["token"]) == 12 for line in asked)

    run(check())


def test_refused_logins_and_what_somebody_may_not_do_are_written_down_and_no_secret_is(
    run: Run, tmp_path: Path
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            ann, secret = await host.person("ann")
            assert (await host.client("kr_wrong").get("/api/tasks")).status_code == 401
            assert (await ann.get("/api/users")).status_code == 403
            await ann.delete("/api/tokens/first")
            assert (await ann.get("/api/tasks")).status_code == 401
            await host.audit.written()
            lines = lines_of(tmp_path / "audit.jsonl")
            text = (tmp_path / "audit.jsonl").read_text()
        assert "kr_wrong" not in text
        assert secret not in text
        told = [(line["event"], line.get("user"), line["code"], line["request"]) for line in lines if "code" in line]
        assert told == [
            ("login_refused", None, "not_authenticated", "GET /api/tasks"),
            ("refused", "ann", "not_admin", "GET /api/users"),
            ("login_refused", "ann", "token_revoked", "GET /api/tasks"),
        ]

    run(check())


def test_admins_read_it_by_moment_user_and_task(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner()
            ann, _ = await host.person("ann")
            task = (await ann.post("/api/tasks", json={"name": "web", "backend": "process"})).json()["task_id"]

            async def events(**query: Any) -> list[str]:
                answer = (await host.user.get("/api/audit", params=query)).json()
                return [event["event"] for event in answer["events"]]

            assert await events(user="ann") == ["user_added", "token_made", "task_created"]
            assert await events(task="web") == await events(task=str(task)) == ["task_created"]
            assert await events(since=datetime.fromtimestamp(time.time() + 60, timezone.utc).isoformat()) == []
            answer = await host.user.get("/api/audit", params={"after": "../x:1"})
            assert (answer.status_code, answer.json()["error"]) == (400, "bad_request")

    run(check())


def test_nobody_says_for_themselves_where_they_come_from(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            claim = {"X-Forwarded-For": "192.0.2.66"}
            await host.user.post("/api/users", json={"name": "ann"}, headers=claim)
            await host.audit.written()
            line = lines_of(tmp_path / "audit.jsonl")[-1]
            assert line["from"].startswith("127.0.0.1:")
            assert line["forwarded_for"] == "192.0.2.66"

    run(check())
