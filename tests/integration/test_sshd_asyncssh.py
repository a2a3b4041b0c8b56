"""The SSH server for tasks with a second implementation as its client, which speaks what OpenSSH here may not yet."""

from __future__ import annotations

import asyncio
import getpass
import json
import os
import subprocess
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from kohakuriver import host_keys
from kohakuriver.binaries import ssh_server_options
from tests.support.ssh import ours

Run = Callable[[Coroutine[Any, Any, Any]], Any]

EXCHANGES = ("mlkem768x25519-sha256", "curve25519-sha256", "curve25519-sha256@libssh.org", "ecdh-sha2-nistp256")
CIPHERS = ("aes256-gcm@openssh.com", "aes128-gcm@openssh.com", "chacha20-poly1305@openssh.com")
MACS = ("hmac-sha2-256-etm@openssh.com", "hmac-sha2-512-etm@openssh.com", "hmac-sha2-256", "hmac-sha2-512")
DATA = os.urandom(3_000_000)


class Server:
    """One that lets in `key`."""

    def __init__(self, directory: Path, algorithms: str = "all") -> None:
        self.key = asyncssh.generate_private_key("ssh-ed25519")
        authorized = directory / "authorized"
        authorized.write_bytes(self.key.export_public_key())
        ecdsa = host_keys.ecdsa(directory / "ecdsa")
        options = ssh_server_options(0, [str(directory / "key"), str(directory / "ecdsa")], str(authorized), algorithms)
        self.process = subprocess.Popen(
            [ours(), *options, "--rekey-bytes=1000000"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self.process.stdout is not None
        ready = json.loads(self.process.stdout.readline())
        self.port = int(ready["address"].rpartition(":")[2])
        lines = [f"[127.0.0.1]:{self.port} {key}\n" for key in (ready["host_key"], ecdsa)]
        self.known_hosts = asyncssh.import_known_hosts("".join(lines))

    def connect(self, username: str = "root", **options: Any) -> Any:
        return asyncssh.connect(
            "127.0.0.1", self.port, username=username, client_keys=[self.key], known_hosts=self.known_hosts,
            config=None, agent_path=None, **options,
        )  # fmt: skip

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("sshd"))
    yield server
    server.close()


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_every_exchange_of_keys_is_understood_also_again_and_again(run: Run, server: Server, exchange: str) -> None:
    async def main() -> None:
        async with server.connect(kex_algs=[exchange], rekey_bytes="500k") as connection:
            done = await connection.run("cat; echo errors >&2; exit 7", input=DATA, encoding=None)
            assert (done.stdout == DATA, done.stderr, done.exit_status) == (True, b"errors\n", 7)

    run(main())


@pytest.mark.parametrize("cipher", CIPHERS)
def test_every_cipher_is_understood(run: Run, server: Server, cipher: str) -> None:
    async def main() -> None:
        async with server.connect(encryption_algs=[cipher]) as connection:
            done = await connection.run("cat", input=DATA, encoding=None)
            assert done.stdout == DATA

    run(main())


@pytest.mark.parametrize("cipher", ["aes128-ctr", "aes256-ctr"])
@pytest.mark.parametrize("mac", MACS)
def test_ciphers_that_prove_nothing_themselves_are_understood_with_every_mac(
    run: Run, server: Server, cipher: str, mac: str
) -> None:
    async def main() -> None:
        async with server.connect(encryption_algs=[cipher], mac_algs=[mac], rekey_bytes="500k") as connection:
            done = await connection.run("cat", input=DATA, encoding=None)
            assert done.stdout == DATA

    run(main())


@pytest.mark.parametrize("kind", ["ssh-ed25519", "ecdsa-sha2-nistp256"])
def test_the_client_chooses_the_kind_of_host_key(run: Run, server: Server, kind: str) -> None:
    async def main() -> None:
        async with server.connect(server_host_key_algs=[kind]) as connection:
            assert connection.get_server_host_key().get_algorithm() == kind

    run(main())


def test_files_are_served_to_another_client_too(run: Run, server: Server, tmp_path: Path) -> None:
    async def main() -> None:
        (tmp_path / "here").write_bytes(DATA)
        async with server.connect() as connection, connection.start_sftp_client() as sftp:
            await sftp.put(str(tmp_path / "here"), str(tmp_path / "there"))
            await sftp.get(str(tmp_path / "there"), str(tmp_path / "back"))
            assert (tmp_path / "back").read_bytes() == DATA
            assert {"here", "there", "back"} <= set(await sftp.listdir(str(tmp_path)))
            with pytest.raises(asyncssh.SFTPNoSuchFile):
                await sftp.stat(str(tmp_path / "nowhere"))

    run(main())


def test_many_channels_of_one_connection_each_get_their_own(run: Run, server: Server) -> None:
    async def main() -> None:
        async with server.connect() as connection:
            runs = [connection.run(f"cat; echo {number}", input="x" * 100_000) for number in range(40)]
            for number, done in enumerate(await asyncio.gather(*runs)):
                assert done.stdout == "x" * 100_000 + f"{number}\n"

    run(main())


def test_the_users_own_name_and_root_are_the_same_user_and_any_other_name_is_refused(run: Run, server: Server) -> None:
    async def main() -> None:
        for name in (getpass.getuser(), "root"):
            async with server.connect(name) as connection:
                assert (await connection.run("id -un")).stdout == f"{getpass.getuser()}\n"
        for name in ("nobody", "u", ""):
            with pytest.raises(asyncssh.PermissionDenied):
                async with server.connect(name):
                    pass

    run(main())
