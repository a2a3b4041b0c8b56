"""A certificate that changes while it is in use, and what is sent in the clear."""

from __future__ import annotations

import re
import ssl
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from kohakuriver.cli.pki import Authority
from kohakuriver.errors import UsageError
from kohakuriver.tls import ServerCertificate, client_context, reason, sends_in_clear, trusted_at
from tests.support.handshakes import shaken


class Watched:
    """A certificate under watch, and what was logged about it."""

    def __init__(self, directory: Path) -> None:
        self.authority = Authority(directory / "ca")
        self.made = self.authority.issue(["here"], 1)
        self.said: list[str] = []
        self.certificate = ServerCertificate(
            self.made.cert, self.made.key, lambda sentence, bad: self.said.append(sentence)
        )

    def serial(self) -> str:
        """The serial number of the certificate that a new connection gets."""
        trusted = client_context("https:", self.authority.cert)
        assert trusted is not None
        client = shaken(self.certificate.context, trusted, "here")
        shown = client.getpeercert()
        assert shown is not None
        return str(shown["serialNumber"])


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def test_nothing_is_read_while_nothing_changes(watched: Watched) -> None:
    before = watched.serial()
    for _ in range(3):
        watched.certificate.look()
    assert (watched.serial(), watched.said) == (before, [])


def test_a_pair_that_is_replaced_one_after_the_other_is_taken_once_it_is_whole(watched: Watched) -> None:
    before, made = watched.serial(), watched.made
    kept = made.key.read_bytes()
    watched.authority.issue(["here"], 1)
    fresh = made.key.read_bytes()
    made.key.write_bytes(kept)
    watched.certificate.look()  # the new certificate is there, its key is not: it may just be on its way
    assert watched.said == []
    made.key.write_bytes(fresh)
    watched.certificate.look()
    assert watched.serial() == before
    watched.certificate.look()
    assert watched.serial() != before
    assert len(watched.said) == 1


def test_a_pair_that_stays_broken_is_told_of_once(watched: Watched) -> None:
    before = watched.serial()
    watched.made.cert.write_text("broken")
    for _ in range(5):
        watched.certificate.look()
    [sentence] = watched.said
    assert str(watched.made.cert) in sentence
    assert watched.serial() == before


def test_a_certificate_that_only_openssl_can_read_is_refused_and_ends_nothing(watched: Watched) -> None:
    before, cert = watched.serial(), watched.made.cert
    cert.write_text(cert.read_text().replace(" CERTIFICATE", " TRUSTED CERTIFICATE"))
    for _ in range(3):
        watched.certificate.look()
    [sentence] = watched.said
    assert "stays in use" in sentence
    assert watched.serial() == before
    with pytest.raises(UsageError, match=re.escape(str(cert))):
        ServerCertificate(cert, watched.made.key)


def test_a_client_can_not_have_everything_negotiated_anew(watched: Watched) -> None:
    assert watched.certificate.context.options & ssl.OP_NO_RENEGOTIATION


def test_an_encrypted_key_is_refused_rather_than_asked_about(tmp_path: Path) -> None:
    made = Authority(tmp_path).issue(["here"], 1)
    key = serialization.load_pem_private_key(made.key.read_bytes(), None)
    locked = serialization.BestAvailableEncryption(b"secret")
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    made.key.write_bytes(key.private_bytes(pem, form, locked))
    with pytest.raises(UsageError, match="encrypted"):
        ServerCertificate(made.cert, made.key)


@pytest.mark.parametrize(
    ("url", "clear"),
    [
        ("http://127.0.0.1:8000", False),
        ("http://127.9.9.9", False),
        ("http://localhost:8000", False),
        ("http://[::1]:8000", False),
        ("https://host", False),
        ("http://host", True),
        ("http://10.0.0.1:8000", True),
        ("http://[fd00::1]:8000", True),
        ("http://lab.localhost:8000", False),
        ("http://127.0.0.1.example.org", True),
        ("http://127.example", True),
    ],
)
def test_only_plain_http_to_other_machines_is_in_the_clear(url: str, clear: bool) -> None:
    assert sends_in_clear(url) is clear


def test_what_is_not_about_tls_has_no_reason_here() -> None:
    assert reason(ConnectionRefusedError("no")) is None
    assert client_context("http://host") is None


def test_for_plain_http_no_authorities_are_read_and_nobody_is_trusted() -> None:
    assert trusted_at("http://here").get_ca_certs() == []
    assert trusted_at("http://here").verify_mode == ssl.CERT_REQUIRED
    assert trusted_at("https://here").cert_store_stats() == ssl.create_default_context().cert_store_stats()
