"""How fast `kohakuriver cp` is, beside scp, rsync and tar over ssh, on the same files, the same machine, in turns.

    python -m bench.cp --kohakuriver .venv/bin/kohakuriver [--large 2G] [--small 20000] [--rounds 2] [--directory DIR]

A cluster by `kohakuriver up` with a process task that has our SSH server; `ssh` reaches it by the configuration that
`kohakuriver ssh-config` writes. So all of them go through the same hops: what differs is what they do there. Files are
random bytes: four large ones, and small ones of 0.5-8 KiB in folders of 200. Each copy goes to an empty folder. Prints
a line of JSON for each copy, in seconds, and then the medians and the ratios to `cp`. Exits with 1 where one differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from kohakuriver.quotas import byte_count
from tests.support.up import Cluster

TASK = "bench"
BLOCK = 1 << 20


def large_files(root: Path, size: int, count: int = 4) -> None:
    """`size` bytes in so many files."""
    root.mkdir()
    for number in range(count):
        with (root / f"large{number}").open("wb") as file:
            for _ in range(size // count // BLOCK):
                file.write(os.urandom(BLOCK))


def small_files(root: Path, count: int) -> None:
    """So many files, in folders of 200."""
    root.mkdir()
    sizes = random.Random(1)
    for number in range(count):
        folder = root / f"folder{number // 200}"
        folder.mkdir(exist_ok=True)
        (folder / f"file{number}").write_bytes(os.urandom(sizes.randrange(512, 8192)))


class Contenders:
    """The programs that copy: each takes what is in a folder to another, up or down."""

    def __init__(self, cluster: Cluster, program: str, config: Path) -> None:
        self._environment = cluster.environment
        self._program = program
        self._ssh = ["ssh", "-F", str(config)]
        self._config = str(config)

    def command(self, name: str, source: Path, target: Path, *, down: bool) -> list[str]:
        """What is run. `target` is there, and empty."""
        there, ours = (source, target) if down else (target, source)
        pair = [f"{TASK}:{there}", str(ours)] if down else [str(ours), f"{TASK}:{there}"]
        if name == "cp":
            return [self._program, "cp", "--quiet", "-r", f"{pair[0]}/", pair[1]]
        if name == "scp":
            return ["scp", "-F", self._config, "-q", "-r", "-p", f"{pair[0]}/.", pair[1]]
        if name == "rsync":
            return ["rsync", "-a", "-e", " ".join(self._ssh), f"{pair[0]}/", pair[1]]
        pack, unpack = f"tar cf - -C {source} .", f"tar xf - -C {target}"
        remote = " ".join(self._ssh) + f" {TASK} "
        line = f"{remote} '{pack}' | {unpack}" if down else f"{pack} | {remote} '{unpack}'"
        return ["bash", "-o", "pipefail", "-c", line]

    def run(self, name: str, source: Path, target: Path, *, down: bool) -> float:
        """How long a copy takes, in seconds."""
        target.mkdir()
        began = time.perf_counter()
        subprocess.run(self.command(name, source, target, down=down), env=self._environment, check=True)
        return time.perf_counter() - began


def same(one: Path, other: Path) -> bool:
    """Whether two folders have the same in them."""
    return subprocess.run(["diff", "-r", str(one), str(other)], stdout=subprocess.DEVNULL).returncode == 0


def prepared(directory: Path, program: str) -> tuple[Cluster, Contenders]:
    """A cluster with a task, and those who copy to it."""
    settings = directory / "settings"
    settings.mkdir()
    cluster = Cluster(settings)
    key, config = directory / "key", directory / "ssh_config"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    create = ("vps", "create", "--backend", "process", "--name", TASK, "--ssh", f"--public-key-file={key}.pub")
    cluster.succeed(*create, "--", "sleep", "1000000")
    config.write_text(cluster.succeed("ssh-config") + f"    IdentityFile {key}\n    LogLevel ERROR\n")
    subprocess.run(["ssh", "-F", str(config), TASK, "true"], env=cluster.environment, check=True)
    return cluster, Contenders(cluster, program, config)


def measured(options: argparse.Namespace, directory: Path, contenders: Contenders) -> bool:
    """Copy everything in turns, and say how long it took; whether all copies were right."""
    sources = {}
    if options.large:
        sources["large"] = directory / "large"
        large_files(sources["large"], options.large)
    if options.small:
        sources["small"] = directory / "small"
        small_files(sources["small"], options.small)
    took: dict[tuple[str, str, str], list[float]] = {}
    right = True
    for turn in range(options.rounds):
        for kind, source in sources.items():
            for way in options.ways.split(","):
                for name in options.names.split(","):
                    target = directory / "target"
                    seconds = contenders.run(name, source, target, down=way == "down")
                    took.setdefault((kind, way, name), []).append(seconds)
                    fine = bool(turn) or same(source, target)
                    right = right and fine
                    print(
                        json.dumps({"files": kind, "way": way, "by": name, "seconds": round(seconds, 2), "right": fine})
                    )
                    sys.stdout.flush()
                    shutil.rmtree(target)
    for (kind, way, name), each in took.items():
        middle, ours = statistics.median(each), statistics.median(took.get((kind, way, "cp"), each))
        print(f"{kind:6} {way:5} {name:6} {middle:8.2f} s   {middle / ours:5.2f}")
    return right


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kohakuriver", required=True)
    parser.add_argument("--large", type=byte_count, default=byte_count("2G"), help="bytes in large files")
    parser.add_argument("--small", type=int, default=20000, help="how many small files")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ways", default="up,down")
    parser.add_argument("--names", default="cp,scp,rsync,tar")
    parser.add_argument("--directory", default="/dev/shm" if Path("/dev/shm").is_dir() else None)
    options = parser.parse_args(arguments)
    program = str(Path(options.kohakuriver).resolve())
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        cluster, contenders = prepared(Path(name), program)
        try:
            return 0 if measured(options, Path(name), contenders) else 1
        finally:
            cluster.close()


if __name__ == "__main__":
    sys.exit(main())
