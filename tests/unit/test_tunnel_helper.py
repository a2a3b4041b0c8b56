from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import pytest

from kohakuriver.errors import UnavailableError
from kohakuriver.runner.services import tunnel_helper
from kohakuriver.runner.services.state import State
from kohakuriver.runner.services.tunnel_helper import TunnelHelper


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
    given = TunnelHelper(state).mounts("c1")[0][0]
    client.write_bytes(b"second version")
    newer = TunnelHelper(state).mounts("c2")[0][0]
    assert given.read_bytes() == b"first version"
    assert newer.read_bytes() == b"second version"
    assert given.stat().st_mode & 0o777 == 0o755


def test_a_container_sees_its_own_token_and_the_node_keeps_it_private(client: Path, state: State) -> None:
    (_, program), (token, inside) = TunnelHelper(state).mounts("c1")
    assert (program, inside) == ("/.kohakuriver/tunnel-client", "/.kohakuriver/token")
    assert state.check_tunnel_token("c1", token.read_text())
    assert token.stat().st_mode & 0o044 == 0o044  # the container's user, whoever that is
    assert token.parent.stat().st_mode & 0o077 == 0


def test_a_process_gets_a_token_file_that_only_its_user_reads(client: Path, state: State) -> None:
    token = TunnelHelper(state).token_file("c1")
    assert state.check_tunnel_token("c1", token.read_text())
    assert token.stat().st_mode & 0o077 == 0


def test_what_is_put_into_a_running_container_is_the_client_and_the_token(client: Path, state: State) -> None:
    with tarfile.open(fileobj=io.BytesIO(TunnelHelper(state).archive("c1"))) as tar:
        folder, program, token = tar.getmembers()
        assert (folder.name, folder.isdir(), folder.mode) == (".kohakuriver", True, 0o755)
        assert (program.name, program.mode) == (".kohakuriver/tunnel-client", 0o755)
        assert (token.name, token.mode) == (".kohakuriver/token", 0o644)
        content = tar.extractfile(program)
        assert content is not None
        assert content.read() == b"first version"


def test_no_credential_stands_on_a_command_line_or_in_an_environment(client: Path, state: State) -> None:
    helper = TunnelHelper(state)
    token = state.tunnel_token("c1")
    shown = [
        *helper.process_command(["serve"]),
        *helper.container_command(["serve"]),
        *helper.adopted_command("c1", "http://172.17.0.1:8001"),
        *helper.container_environment("c1", "http://172.17.0.1:8001").values(),
    ]
    assert all(token not in text for text in shown)


def test_without_a_static_client_processes_use_the_python_one_and_containers_are_refused_with_advice(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel_helper, "find_binary", lambda *_: None)
    helper = TunnelHelper(state)
    assert helper.process_command(["serve", "--now"]) == [
        *(sys.executable, "-m", "kohakuriver.tunnel.client", "run", "--", "serve", "--now"),
    ]
    for refused in (helper.mounts, helper.archive):
        with pytest.raises(UnavailableError, match="KOHAKURIVER_TUNNEL_CLIENT") as caught:
            refused("c1")
        assert caught.value.code == "no_tunnel_client"


def test_nothing_is_left_of_a_container_that_is_gone(client: Path, state: State) -> None:
    helper = TunnelHelper(state)
    token = helper.token_file("c1")
    helper.forget("c1")
    assert not token.parent.exists()
