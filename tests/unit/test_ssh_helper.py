from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import pytest

from kohakuriver.runner.services.ssh_helper import SshHelper
from kohakuriver.runner.services.state import State, TaskRecord

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="runners are for Linux")


@pytest.fixture
def task() -> TaskRecord:
    return TaskRecord(task_id=7, container="c1", backend="docker", ssh_keys=["ssh-ed25519 AAAA me"])


@pytest.fixture
def helper(tmp_path: Path, task: TaskRecord) -> SshHelper:
    helper = SshHelper(State(tmp_path / "state"))
    helper.prepare(task)
    return helper


def test_in_a_container_root_alone_reads_the_host_key_and_the_environment(helper: SshHelper, task: TaskRecord) -> None:
    with tarfile.open(fileobj=io.BytesIO(helper.archive(task, {"PASSWORD": "secret"}))) as tar:
        content = {member: tar.extractfile(member) for member in tar.getmembers()}
        files = {member: file.read() for member, file in content.items() if file is not None}
        owners = {(member.uid, member.gid) for member in tar.getmembers()}
    telling = {member for member, text in files.items() if b"secret" in text or b"PRIVATE KEY" in text}
    assert {member.name for member in telling} == {
        ".kohakuriver/ssh/host_key",
        ".kohakuriver/ssh/host_key_ecdsa",
        ".kohakuriver/ssh/sshd_config",
    }
    assert all(member.mode == 0o600 for member in telling)
    assert owners == {(0, 0)}


def test_a_variable_that_would_be_another_line_of_the_configuration_is_left_out(
    helper: SshHelper, task: TaskRecord
) -> None:
    evil = {"A": "x\nPermitEmptyPasswords yes", "B": 'y" PATH="/evil', "C": "back\\slash", "GOOD": "a b"}
    with tarfile.open(fileobj=io.BytesIO(helper.archive(task, evil))) as tar:
        file = tar.extractfile(".kohakuriver/ssh/sshd_config")
        assert file is not None
        text = file.read().decode()
    assert 'SetEnv "GOOD=a b"\n' in text
    assert "evil" not in text
    assert "PermitEmptyPasswords" not in text


def test_the_host_keys_are_made_once_and_are_private_on_the_node(
    helper: SshHelper, task: TaskRecord, tmp_path: Path
) -> None:
    first = task.ssh_host_key, task.ssh_host_key_ecdsa
    helper.prepare(task)
    assert (task.ssh_host_key, task.ssh_host_key_ecdsa) == first
    assert [str(key).split()[0] for key in first] == ["ssh-ed25519", "ecdsa-sha2-nistp256"]
    for path in (tmp_path / "state").rglob("ssh/*"):
        assert path.stat().st_mode & 0o077 == 0
        assert path.parent.stat().st_mode & 0o077 == 0


def test_of_the_newest_algorithms_a_server_has_no_host_key_of_another_kind(tmp_path: Path, task: TaskRecord) -> None:
    state = State(tmp_path / "state")
    words = {kind: SshHelper(state, kind).process_command(task, 22)[1:] for kind in ("all", "newest")}
    folder = state.task_dir(task.container) / "ssh"
    both = [word for name in ("host_key", "host_key_ecdsa") for word in ("--host-key", f"{folder}/{name}")]
    assert words["all"][2:6] == both
    assert words["newest"][2:4] == both[:2]
    assert words["newest"][4:] == [*words["all"][6:], "--algorithms", "newest"]
