"""Inputs that were kept, changes to them, and trying such changes for as long as one likes."""

from __future__ import annotations

import argparse
import hashlib
import random
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["corpus", "fuzz", "kept", "mutate"]

CORPUS = Path(__file__).parent / "corpus"
LONGEST = 4096
# Bytes at which something changes: in frames, and in heads of HTTP.
SPECIAL = [bytes([byte]) for byte in (0, 1, 2, 3, 8, 0x7D, 0x7E, 0x7F, 0x80, 0x82, 0x89, 0xFD, 0xFE, 0xFF)]
SPECIAL += [b"\r", b"\n", b"\r\n", b"\r\n\r\n", b" ", b":", b",", b"%", b"%00", b"\t"]


def kept(target: str) -> list[Path]:
    """The files of a target's corpus."""
    return sorted((CORPUS / target).iterdir())


def corpus(target: str) -> list[bytes]:
    """What is in them."""
    return [path.read_bytes() for path in kept(target)]


def mutate(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Some bytes of an input changed, left out, put in, or taken from another input."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(out) + 1)
        size = rng.choice((1, 1, 2, 4, 8, 30))
        other = rng.choice(others)
        donor = rng.randrange(len(other) + 1)
        out[at : at + size * rng.randint(0, 1)] = rng.choice(
            (b"", rng.randbytes(size), rng.choice(SPECIAL), other[donor : donor + size * 4])
        )
    return bytes(out[:LONGEST])


def fuzz(check: Callable[[bytes], None], target: str) -> None:
    """Mutate a corpus for `--seconds`; an input for which `check` raises is kept, and ends it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    inputs = corpus(target)
    until = time.monotonic() + options.seconds
    runs = 0
    while time.monotonic() < until:
        data = mutate(rng.choice(inputs), inputs, rng)
        try:
            check(data)
        except BaseException:
            path = CORPUS / target / f"failed-{hashlib.sha256(data).hexdigest()[:16]}"
            path.write_bytes(data)
            print(f"kept {path}")
            raise
        runs += 1
    print(f"{runs} inputs, none failed")
