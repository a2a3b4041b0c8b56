"""The keys that our SSH servers prove themselves with: Ed25519, and ECDSA on P-256 for clients that FIPS 140 leaves no
other (docs/security.md)."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kohakuriver.config import write_private

__all__ = ["ecdsa", "ed25519"]


def ed25519(path: Path) -> str:
    """The public line (type and base64) of the Ed25519 key in `path`, which is made there (0600) if there is none.

    Raises OSError or ValueError where what is there can't be read as a private key without a passphrase.
    """
    if not path.exists():
        _write(path, Ed25519PrivateKey.generate())
    return _public(path)


def ecdsa(path: Path) -> str:
    """The same of an ECDSA key on P-256."""
    if not path.exists():
        _write(path, generate_private_key(SECP256R1()))
    return _public(path)


def _write(path: Path, key: serialization.ssh.SSHPrivateKeyTypes) -> None:
    form = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    write_private(path, key.private_bytes(*form).decode())


def _public(path: Path) -> str:
    key = serialization.load_ssh_private_key(path.read_bytes(), None).public_key()
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
