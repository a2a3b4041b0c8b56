"""A real virtual machine: Debian's kernel, busybox and our static programs, in QEMU's software emulation.

Its network is QEMU's own user-mode one: what it listens on appears at an address of our loopback, and it reaches our
loopback at `GATEWAY`. So it needs no privilege, and nothing of it is seen outside of this machine.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.hops import binary
from tests.support.ssh import ours

GATEWAY = "10.0.2.2"
"""Where the machine finds what listens on our 127.0.0.1."""

_MODULES = ("virtio_pci", "virtio_net")
_BOOT_SECONDS = 100.0
_READY = b"machine is up"

_ECHO = r"""
#include <arpa/inet.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
/* echo ADDRESS PORT: TCP connections, a child each, and datagrams. Goes on behind its parent once it listens. */
int main(int argc, char **argv) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[2]))};
    static char data[65536];
    int one = 1, tcp = socket(AF_INET, SOCK_STREAM, 0), udp = socket(AF_INET, SOCK_DGRAM, 0);
    inet_pton(AF_INET, argv[1], &at.sin_addr);
    setsockopt(tcp, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(tcp, (void *)&at, sizeof at) || listen(tcp, 99) || bind(udp, (void *)&at, sizeof at)) return 1;
    if (fork()) return 0;
    for (;;) {
        struct pollfd both[2] = {{tcp, POLLIN, 0}, {udp, POLLIN, 0}};
        poll(both, 2, -1);
        if (both[1].revents) {
            struct sockaddr_in from;
            socklen_t size = sizeof from;
            ssize_t got = recvfrom(udp, data, sizeof data, 0, (void *)&from, &size);
            if (got >= 0) sendto(udp, data, got, 0, (void *)&from, size);
        }
        if (both[0].revents) {
            int peer = accept(tcp, 0, 0);
            if (peer >= 0 && fork() == 0) {
                for (ssize_t got; (got = read(peer, data, sizeof data)) > 0;)
                    for (ssize_t done = 0, put; done < got; done += put)
                        if ((put = write(peer, data + done, got - done)) < 0) return 1;
                return 0;
            }
            close(peer);
        }
    }
}
"""

_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin HOME=/root
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
mkdir -p /dev/pts; mount -t devpts devpts /dev/pts
for module in /modules/*; do insmod $module; done
ip link set lo up; ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0; ip route add default via 10.0.2.2
exec >/dev/console 2>&1
sh /start
echo "machine is up"
while :; do sleep 1000; done
"""


class Machine:
    """A virtual machine that runs; `address` is where its `ports` are reached."""

    def __init__(self, process: subprocess.Popen[bytes], address: str, console: Path, monitor: Path) -> None:
        self.process = process
        self.address = address
        self._console = console
        self._monitor = monitor
        self._boots = 0

    def wait_until_up(self) -> None:
        """Return when the start script has run once more than at the last call; AssertionError when it doesn't."""
        self._boots += 1
        deadline = time.monotonic() + _BOOT_SECONDS
        while self._console.read_bytes().count(_READY) < self._boots:
            assert self.process.poll() is None, self.console()
            assert time.monotonic() < deadline, self.console()
            time.sleep(0.05)

    def reset(self) -> None:
        """Start it again as its reset button does: nothing in it gets a chance to say goodbye."""
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.connect(str(self._monitor))
            monitor.sendall(b"system_reset\n")
            said = b""
            while said.count(b"(qemu)") < 2:  # the second prompt says that the command was carried out
                said += monitor.recv(4096)

    def console(self) -> str:
        """What it has printed so far."""
        return self._console.read_text(errors="replace")


def _kernel() -> Path:
    """The newest of Debian's kernels for virtual machines; skips where none is installed, but not in CI."""
    kernels = sorted(Path("/boot").glob("vmlinuz-*-cloud-amd64"))
    there = kernels and shutil.which("qemu-system-x86_64") and shutil.which("busybox") and shutil.which("cc")
    if not there and os.environ.get("CI") != "true":
        pytest.skip("no qemu-system-x86_64, or no kernel for it: run scripts/system-packages test")
    assert there, "qemu-system-x86 and linux-image-cloud-amd64 must be installed"
    return kernels[-1]


def _modules(release: str) -> list[Path]:
    """The modules of the network card, each behind what it needs."""
    found: dict[Path, None] = {}
    for name in _MODULES:
        command = ["modprobe", "--set-version", release, "--show-depends", name]
        path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        shown = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path})
        found.update({Path(line.split()[1]): None for line in shown.stdout.splitlines() if line.startswith("insmod")})
    return list(found)


def _archive(entries: dict[str, bytes | None]) -> bytes:
    """A cpio archive (newc) of executable files, and of directories where the content is None."""
    out = io.BytesIO()
    for number, (name, content) in enumerate([*entries.items(), ("TRAILER!!!", b"")], 1):
        encoded, data = name.encode() + b"\0", content or b""
        mode = 0o040755 if content is None else 0o100755
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        out.write(header + bytes(-len(header) % 4) + data + bytes(-len(data) % 4))
    return gzip.compress(out.getvalue(), 1)


def _echo_program(directory: Path) -> bytes:
    source, program = directory / "echo.c", directory / "echo"
    source.write_text(_ECHO)
    subprocess.run(["cc", "-O1", "-static", "-o", program, source], check=True)
    return program.read_bytes()


def _contents(directory: Path, release: str, start: str, files: dict[str, bytes]) -> bytes:
    busybox = shutil.which("busybox")
    assert busybox is not None
    directories = ("bin", "dev", "etc", "modules", "proc", "root", "sys", "tmp")
    modules = {f"modules/{number:02}-{path.name}": path.read_bytes() for number, path in enumerate(_modules(release))}
    programs = {
        "bin/busybox": Path(busybox).read_bytes(),
        "bin/tunnel-client": binary().read_bytes(),
        "bin/tunnel-sshd": Path(ours()).read_bytes(),
        "bin/echo-service": _echo_program(directory),
    }
    everything: dict[str, bytes | None] = dict.fromkeys(directories)
    passwd = b"root:x:0:0:root:/root:/bin/sh\n"
    everything |= modules | programs | files
    return _archive(everything | {"etc/passwd": passwd, "start": start.encode(), "init": _INIT.encode()})


@contextmanager
def a_machine(
    directory: Path, start: str, *, address: str, ports: list[int], files: dict[str, bytes] | None = None
) -> Iterator[Machine]:
    """A machine that runs the shell script `start` at each boot, and is up when that ends.

    Args:
        start: beside busybox's commands there are `tunnel-client`, `tunnel-sshd` and `echo-service ADDRESS PORT`, which
            echoes over TCP and UDP and listens when the command returns.
        address: one of 127.0.0.0/8 that nothing else uses, for the machine's network card.
        ports: what is reached there, TCP and UDP.
        files: what the machine has beside, by path without the first slash.
    """
    kernel = _kernel()
    release = kernel.name.removeprefix("vmlinuz-")
    archive, console, monitor = directory / "initrd", directory / "console", directory / "monitor"
    archive.write_bytes(_contents(directory, release, start, files or {}))
    console.touch()
    forwards = "".join(f",hostfwd={kind}:{address}:{port}-:{port}" for kind in ("tcp", "udp") for port in ports)
    command = (
        *("qemu-system-x86_64", "-accel", "tcg", "-m", "160", "-nodefaults", "-display", "none"),
        *("-kernel", str(kernel), "-initrd", str(archive), "-append", "console=ttyS0 quiet panic=1 rdinit=/init"),
        *("-serial", f"file:{console}", "-monitor", f"unix:{monitor},server,nowait"),
        *("-netdev", f"user,id=net{forwards}", "-device", "virtio-net-pci,netdev=net,romfile="),
    )
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            machine = Machine(process, address, console, monitor)
            machine.wait_until_up()
            yield machine
        finally:
            process.kill()
