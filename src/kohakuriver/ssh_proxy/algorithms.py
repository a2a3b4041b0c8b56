"""What the jump host offers in an exchange of keys, as `tunnel-sshd` does: no client of one is refused by the other."""

from __future__ import annotations

from dataclasses import dataclass

from kohakuriver.errors import UsageError

__all__ = ["ALGORITHMS", "Algorithms", "check"]


@dataclass(frozen=True)
class Algorithms:
    """Names of each kind, the best first (RFC 4253, section 7.1). `host_keys` are those of key files' types."""

    exchanges: tuple[str, ...]
    ciphers: tuple[str, ...]
    macs: tuple[str, ...]
    host_keys: tuple[str, ...]

    @property
    def known(self) -> list[str]:
        """The exchanges that the libraries have here: ML-KEM is not in every version."""
        from asyncssh.kex import get_kex_algs  # it takes long to load, and one process of a host alone needs it

        ours = {name.decode() for name in get_kex_algs()}
        return [name for name in self.exchanges if name in ours]


_PROVEN = ("aes256-gcm@openssh.com", "aes128-gcm@openssh.com", "chacha20-poly1305@openssh.com")
_MACS = ("hmac-sha2-256-etm@openssh.com", "hmac-sha2-512-etm@openssh.com")

ALGORITHMS = {
    "all": Algorithms(
        exchanges=(
            "mlkem768x25519-sha256",
            "curve25519-sha256",
            "curve25519-sha256@libssh.org",
            "ecdh-sha2-nistp256",
        ),
        ciphers=(*_PROVEN, "aes256-ctr", "aes128-ctr"),
        macs=(*_MACS, "hmac-sha2-256", "hmac-sha2-512"),
        host_keys=("ed25519", "ecdsa"),
    ),
    "newest": Algorithms(exchanges=("mlkem768x25519-sha256",), ciphers=_PROVEN, macs=_MACS, host_keys=("ed25519",)),
}
"""No checker warns of `newest`, and whoever records a session now can't read it with a quantum computer later."""


def check(name: str) -> Algorithms:
    """What is called so. Raises UsageError where none of its exchanges can be had here."""
    chosen = ALGORITHMS[name]
    if name != "all" and not chosen.known:
        raise UsageError(
            f"--ssh-algorithms {name} needs ML-KEM, which the library cryptography has here in no version that is new "
            "enough; update it (pip install -U cryptography asyncssh)."
        )
    return chosen
