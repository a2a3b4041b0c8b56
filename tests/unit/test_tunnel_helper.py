from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import pytest

from kohakuriver.errors import UnavailableError
from kohakuriver.runner.services.state import State, TaskRecord
from kohakuriver.runner.services.tunnel_helper import TunnelHelper, name_token, new_token


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tunnel client of this installation."""
    path = tmp_path / "some-client"
    path.write_bytes(b"first version")
    path.chmod(0o755)
    monkeypatch.setenv("KOHAKURIVER_TUNNEL_CLIENT", str(path))
    return path


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(tmp_path / "state")


def test_a_container_keeps_the_tunnel_client_that_it_was_given_when_the_package_changes(
    client: Path, state: State
) -> None:
    given = TunnelHelper(state).mounts()[0][0]
    client.write_bytes(b"second version")
    newer = TunnelHelper(state).mounts()[0][0]
    assert given.read_bytes() == b"first version"
    assert newer.read_bytes() == b"second version"
    assert given.stat().st_mode & 0o777 == 0o755


def a_task() -> TaskRecord:
    task = TaskRecord(task_id=1, container="c1", backend="docker")
    new_token(task)
    return task


def members(archive: bytes) -> list[tuple[str, int, int, bytes | None]]:
    """Of a tar archive's entries: path, mode, owner, and the content of files."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        found = []
        for entry in tar:
            file = tar.extractfile(entry)
            found.append((entry.name, entry.mode, entry.uid, file.read() if file else None))
        return found


def test_a_token_in_a_container_is_for_the_tunnel_clients_user_alone_who_can_take_it_away(
    client: Path, state: State
) -> None:
    task = a_task()
    assert members(TunnelHelper(state).token_archive(task, 12345)) == [
        (".kohakuriver", 0o755, 0, None),
        (".kohakuriver/tunnel", 0o700, 12345, None),
        (".kohakuriver/tunnel/token", 0o400, 12345, task.tunnel_token.encode()),
    ]


def test_each_start_has_a_token_of_its_own_that_no_client_has_shown_yet() -> None:
    task = a_task()
    before, task.tunnel_client, task.token_start = task.tunnel_token, "a client", "a start"
    assert new_token(task) == task.tunnel_token != before
    assert [vars(task)[name] for name in ("tunnel_client", "token_start")] == ["", None]
    assert task.tunnel_token not in repr(task)


def test_a_process_gets_a_token_file_that_only_its_user_reads(client: Path, state: State) -> None:
    task = a_task()
    token = TunnelHelper(state).token_file(task)
    assert token.read_text() == task.tunnel_token
    assert token.stat().st_mode & 0o077 == 0
    assert token.parent.stat().st_mode & 0o077 == 0


def test_each_client_that_may_begin_beside_an_older_one_has_a_token_file_of_its_own(client: Path, state: State) -> None:
    helper, task = TunnelHelper(state), a_task()
    first = helper.token_file(task)
    name_token(task)
    second = helper.token_file(task)
    assert str(second).endswith(task.token_name)
    assert first != second
    assert helper.adopted_command(task, "http://172.17.0.1:8001")[-1].endswith(task.token_name)
    name_token(task)
    assert helper.token_file(task) != second
    assert not second.exists(), "what nobody took is of no use"


def test_what_is_put_into_a_running_container_is_the_client(client: Path, state: State) -> None:
    assert members(TunnelHelper(state).program_archive()) == [
        (".kohakuriver", 0o755, 0, None),
        (".kohakuriver/tunnel-client", 0o755, 0, b"first version"),
    ]


def test_no_credential_stands_on_a_command_line_or_in_an_environment(client: Path, state: State) -> None:
    helper = TunnelHelper(state)
    token = a_task().tunnel_token
    shown = [
        *helper.process_command(["serve"]),
        *helper.container_command(["serve"]),
        *helper.adopted_command(a_task(), "http://172.17.0.1:8001"),
        *helper.container_environment("c1", "http://172.17.0.1:8001").values(),
    ]
    assert all(token not in text for text in shown)


def test_without_a_static_client_processes_use_the_python_one_and_containers_are_refused_with_advice(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KOHAKURIVER_TUNNEL_CLIENT", "/nowhere/tunnel-client")
    helper = TunnelHelper(state)
    assert helper.process_command(["serve", "--now"]) == [
        *(sys.executable, "-m", "kohakuriver.tunnel.client", "run", "--", "serve", "--now"),
    ]
    for refused in (helper.mounts, helper.program_archive):
        with pytest.raises(UnavailableError, match="KOHAKURIVER_TUNNEL_CLIENT") as caught:
            refused()
        assert caught.value.code == "no_tunnel_client"


def test_nothing_is_left_of_a_container_that_is_gone(client: Path, state: State) -> None:
    helper = TunnelHelper(state)
    token = helper.token_file(a_task())
    helper.forget("c1")
    assert not token.parent.exists()
