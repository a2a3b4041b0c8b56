"""A cluster and a user who reaches its tasks with OpenSSH's programs."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support import forked
from tests.support.up import Commands

ROOT = Path(__file__).resolve().parents[2]
USER = getpass.getuser()

# OpenSSH's server behind the command line of ours: what the tests of the way there need is any server.
STAND_IN = """#!/bin/sh
while [ $# -gt 0 ]; do
    case $1 in
        --listen) listen=$2 ;;
        --host-key) host_keys="$host_keys -o HostKey=$2" ;;
        --authorized-keys) keys=$2 ;;
    esac
    shift 2
done
exec "{sshd}" -D -e -f /dev/null -o ListenAddress=$listen $host_keys -o AuthorizedKeysFile=$keys \\
    -o PidFile=none -o StrictModes=no -o PasswordAuthentication=no -o KbdInteractiveAuthentication=no \\
    -o "Subsystem=sftp internal-sftp" -o MaxStartups=100 -o MaxSessions=100
"""


def stand_in(directory: Path) -> str:
    """OpenSSH's sshd in the place of ours."""
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if sshd is None:
        if os.environ.get("CI") == "true":
            raise FileNotFoundError("sshd")
        pytest.skip("there is no sshd")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    path = directory / "tunnel-sshd"
    path.write_text(STAND_IN.format(sshd=sshd))
    path.chmod(0o755)
    return str(path)


def ours() -> str:
    """The static SSH server: the installed one, else the crate's own build."""
    for path in (ROOT / "src/kohakuriver/bin/tunnel-sshd", ROOT / "src/kohakuriver-sshd/target/release/tunnel-sshd"):
        if path.exists():
            return str(path)
    if os.environ.get("CI") == "true":
        raise FileNotFoundError("tunnel-sshd is not built")
    pytest.skip("tunnel-sshd is not built")


class Users(Commands):
    """A cluster, which may have more in its environment, and a user with a home of their own and an SSH key."""

    def __init__(self, directory: Path, sshd: str, **environment: str) -> None:
        super().__init__(directory)
        self.home = directory / "home"
        (self.home / ".ssh").mkdir(parents=True, mode=0o700)
        self.key = self.home / ".ssh" / "id_ed25519"
        make_key(self.key)
        self.environment |= {"HOME": str(self.home), "KOHAKURIVER_TUNNEL_SSHD": sshd}
        self.environment.pop("SSH_AUTH_SOCK", None)
        self.up = self.start("up", "--json", "--host-port=0", "--runner-port=0", "--ssh-port=0", **environment)
        self.ready = self.up.event("ready")
        self.port = int(self.ready["ssh_proxy"].rpartition(":")[2])
        self.token = (directory / "state" / "admin-token").read_text().strip()
        self.succeed("ssh-config", "--install")
        self.config = directory / "ssh_config"
        self.config.write_text(
            f"Match all\n    IdentityFile {self.key}\n    IdentitiesOnly yes\n    BatchMode yes\n"
            f"Host *.kohakuriver web\n    User {USER}\nInclude {directory / 'ssh' / 'config'}\n"
        )

    def vps(self, name: str, *options: str) -> dict[str, Any]:
        """A new task with an SSH server; a process, unless the options say otherwise."""
        options = options or ("--backend=process",)
        made = self.succeed("vps", "create", "--json", "--name", name, "--ssh", *options)
        return dict(json.loads(made))

    def call(self, *command: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
        """Run a program to its end."""
        options = {"input": b"", **options}
        return subprocess.run(command, env=self.environment, capture_output=True, timeout=60, check=False, **options)

    def ssh(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
        return self.call("ssh", "-F", str(self.config), *arguments, **options)

    def connect(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        """`vps connect`, as this user and with this user's key."""
        options = ["-F", "/dev/null", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes"]
        task, *rest = arguments
        command = ["vps", "connect", f"--user={USER}", f"--key={self.key}", task, *options, *rest]
        return forked.run(command, env=self.environment, stdin=b"", timeout=60)

    def jump(self, *arguments: str, identity: Path | None = None, token: str = "") -> Sequence[str]:
        """The command line of a plain `ssh -J`."""
        known = self.directory / "jump_known_hosts"
        config = self.directory / f"jump{'-token' if token else ''}"
        methods = "password" if token else "publickey"
        config.write_text(
            f"Host jump\n    HostName 127.0.0.1\n    Port {self.port}\n    User me\n"
            f"    PreferredAuthentications {methods}\n    NumberOfPasswordPrompts 1\n"
            f"Host *\n    IdentityFile {identity or self.key}\n    IdentitiesOnly yes\n"
            f"    StrictHostKeyChecking accept-new\n    UserKnownHostsFile {known}\n"
        )
        return ["ssh", "-F", str(config), "-J", "jump", *arguments]

    def password(self, text: str) -> dict[str, str]:
        """An environment in which OpenSSH gets this password when it asks."""
        helper = self.directory / "askpass"
        helper.write_text(f"#!/bin/sh\necho '{text}'\n")
        helper.chmod(0o700)
        return {**self.environment, "SSH_ASKPASS": str(helper), "SSH_ASKPASS_REQUIRE": "force"}


def make_key(path: Path) -> None:
    """An SSH key at `path`, and its public half beside it."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
