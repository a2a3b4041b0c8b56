"""Clients that know no cipher which proves its packets itself, or may not use one: Debian's, and OpenSSH under FIPS."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ssh import USER, Users, ours

FIPS = [
    "Ciphers=aes256-ctr",
    "MACs=hmac-sha2-256",
    "KexAlgorithms=ecdh-sha2-nistp256",
    "HostKeyAlgorithms=ecdsa-sha2-nistp256",
]

PARAMIKO = """
import json, sys, paramiko
told = json.load(sys.stdin)

def agreed(transport):
    return [transport.local_cipher, transport.remote_mac, type(transport.kex_engine).__name__]

jump = paramiko.Transport(("127.0.0.1", told["port"]))
jump.connect(username="me", password=told["token"])
channel = jump.open_channel("direct-tcpip", (told["task"], 22), ("127.0.0.1", 0))
inner = paramiko.Transport(channel)
inner.connect(username=told["user"], pkey=paramiko.Ed25519Key.from_private_key_file(told["key"]))
session = inner.open_session()
session.exec_command("cat; exit 7")
session.sendall(b"hello")
session.shutdown_write()
said = session.makefile().read().decode()
sftp = paramiko.SFTPClient.from_transport(inner)
sftp.put(told["here"], told["there"])
sftp.get(told["there"], told["back"])
print(json.dumps({"said": said, "code": session.recv_exit_status(), "jump": agreed(jump), "task": agreed(inner),
                  "version": paramiko.__version__}))
jump.close()
"""


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Users]:
    users = Users(tmp_path_factory.mktemp("ssh"), ours())
    try:
        users.task = users.vps("web")  # type: ignore[attr-defined]
        yield users
    finally:
        users.close()


def system_python_with_paramiko() -> str:
    """The distribution's own Python where that has Paramiko: the one of our environment has another cryptography."""
    python = shutil.which("python3", path="/usr/bin")
    if python and subprocess.run([python, "-c", "import paramiko"], capture_output=True, check=False).returncode == 0:
        return python
    if os.environ.get("CI") == "true":
        raise FileNotFoundError("python3-paramiko")
    pytest.skip("the system has no python3-paramiko")


def test_debians_paramiko_goes_by_the_jump_host_runs_commands_and_copies_files(users: Users, tmp_path: Path) -> None:
    here, there, back = (tmp_path / name for name in ("here", "there", "back"))
    here.write_bytes(os.urandom(2_000_000))
    told = {
        **{"port": users.port, "token": users.token, "task": "web", "user": USER, "key": str(users.key)},
        **{"here": str(here), "there": str(there), "back": str(back)},
    }
    done = subprocess.run(
        [system_python_with_paramiko(), "-W", "ignore", "-c", PARAMIKO], input=json.dumps(told), capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["said"], found["code"]) == ("hello", 7)
    assert back.read_bytes() == here.read_bytes()
    for agreed in (found["jump"], found["task"]):
        assert agreed[0].endswith("-ctr"), found


def test_debians_curl_puts_and_gets_by_sftp(users: Users, tmp_path: Path) -> None:
    version = subprocess.run(["curl", "--version"], capture_output=True, text=True, check=True).stdout
    if "sftp" not in version:
        pytest.skip("this curl has no sftp")
    here, there, back = (tmp_path / name for name in ("here", "there", "back"))
    here.write_bytes(os.urandom(2_000_000))
    # A process task has its SSH server on this machine's loopback.
    url = f"sftp://{USER}@127.0.0.1:{users.task['ssh_port']}{there}"  # type: ignore[attr-defined]
    options = ["-sS", "--insecure", "--key", str(users.key), "--pubkey", f"{users.key}.pub"]
    for arguments in (["-T", str(here), url], [url, "-o", str(back)]):
        done = users.call("curl", *options, *arguments)
        assert done.returncode == 0, done.stderr
    assert there.read_bytes() == back.read_bytes() == here.read_bytes()


@pytest.mark.parametrize("mac", ["hmac-sha2-256", "hmac-sha2-512-etm@openssh.com"])
def test_openssh_under_fips_logs_in_and_knows_the_host_key(users: Users, mac: str) -> None:
    options = [part for option in (f"MACs={mac}", *FIPS) for part in ("-o", option)]
    data = os.urandom(3_000_000)
    done = users.ssh("-v", *options, "web", "cat", input=data)
    assert done.stdout == data, done.stderr
    said = done.stderr.decode()
    assert "kex: host key algorithm: ecdsa-sha2-nistp256" in said
    assert f"cipher: aes256-ctr MAC: {mac}" in said
    assert "Permanently added" not in said


def test_openssh_under_fips_goes_by_the_jump_host(users: Users) -> None:
    command = list(users.jump(f"{USER}@web", "echo in"))
    config = Path(command[2])
    config.write_text(config.read_text() + "".join(f"    {option.replace('=', ' ')}\n" for option in FIPS))
    done = users.call(*command)
    assert (done.returncode, done.stdout) == (0, b"in\n"), done.stderr
