"""A certificate authority for clusters that have none, and certificates for their machines.

Sources: RFC 5280 (profile), RFC 9525 (names of servers), docs/guide/tls.md.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from kohakuriver.config import write_private
from kohakuriver.errors import UsageError

__all__ = ["AUTHORITY_DAYS", "Authority", "Certificate", "check_machines"]

AUTHORITY_DAYS = 3650
# Clocks of machines in a lab differ; a certificate of the future is refused.
_BACKDATED = timedelta(hours=1)
_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_DNS_NAME = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*", re.IGNORECASE)


@dataclass(frozen=True)
class Certificate:
    """A certificate and its key as PEM files. `names` are DNS names and IP addresses."""

    names: list[str]
    cert: Path
    key: Path
    expires: datetime


class Authority:
    """Signs certificates. `ca.pem` in its directory is what they are checked by, `ca.key` what signs."""

    def __init__(self, directory: Path) -> None:
        """Take the authority in `directory`, or make one. Raises UsageError for what is none or half of one."""
        self.directory = directory
        self.cert = directory / "ca.pem"
        self.key = directory / "ca.key"
        if self.cert.exists() != self.key.exists():
            missing = self.key if self.cert.exists() else self.cert
            raise UsageError(f"{missing} is missing beside its other half; put it back, or use another --directory.")
        self.is_new = not self.cert.exists()
        if self.is_new:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._make()
        try:
            self._own = x509.load_pem_x509_certificate(self.cert.read_bytes())
            key = serialization.load_pem_private_key(self.key.read_bytes(), None)
        except (ValueError, TypeError) as error:
            raise UsageError(f"{self.cert} and {self.key} are not a certificate and its key in PEM form.") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != self._own.public_key():
            raise UsageError(f"{self.key} is not the key of {self.cert} that this command once made.")
        self._check_own()
        self._key = key

    def _check_own(self) -> None:
        constraints = [each.value for each in self._own.extensions if isinstance(each.value, x509.BasicConstraints)]
        if not any(each.ca for each in constraints):
            raise UsageError(f"{self.cert} is not the certificate of an authority; use another --directory.")
        if self._own.not_valid_after_utc <= datetime.now(timezone.utc):
            raise UsageError(f"The authority in {self.cert} has run out; make a new one with another --directory.")

    def _make(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        # A name of its own, so that a machine that trusts two such authorities can tell them apart.
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"KohakuRiver authority {secrets.token_hex(4)}")])
        usage = _usage(key_cert_sign=True, crl_sign=True)
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        certificate = (
            _builder(name, name, key, AUTHORITY_DAYS, datetime.now(timezone.utc))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(identifier, critical=False)
            .sign(key, hashes.SHA256())
        )
        _write(self.cert, self.key, certificate, key)

    def issue(self, names: list[str], days: float, *, since: datetime | None = None) -> Certificate:
        """A new certificate and key for a server with these names, in files named after the first.

        It is good for `days` from `since`, by default now, and never longer than the authority. Raises UsageError for
        what is no name.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
        own = x509.SubjectKeyIdentifier.from_public_key(self._own.public_key())
        certificate = (
            _builder(subject, self._own.subject, key, days, since or datetime.now(timezone.utc), self._own)
            .add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        stem = _stem(names)
        made = Certificate(
            names, self.directory / f"{stem}.pem", self.directory / f"{stem}.key", certificate.not_valid_after_utc
        )
        _write(made.cert, made.key, certificate, key)
        return made


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    days: float,
    since: datetime,
    signer: x509.Certificate | None = None,
) -> x509.CertificateBuilder:
    until = since + timedelta(days=days)
    if signer is not None:  # no client accepts it for longer
        until = min(until, signer.not_valid_after_utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(since - _BACKDATED)
        .not_valid_after(until)
    )


def _usage(**on: bool) -> x509.KeyUsage:
    names = "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign"
    names += " crl_sign encipher_only decipher_only"
    return x509.KeyUsage(**{name: on.get(name, False) for name in names.split()})


def check_machines(machines: list[list[str]]) -> None:
    """Check the names of machines, each of which gets a certificate and a key in files that its first name gives.

    Raises UsageError for what is neither a DNS name nor an IP address, and for files that would replace others.
    """
    taken = {"ca"}
    for names in machines:
        for name in names:
            _general(name)
        stem = _stem(names).lower()  # some file systems don't tell A from a
        if stem in taken:
            raise UsageError(
                f"The files {stem}.pem and {stem}.key, which {names[0]} would get, are another's; give another of this "
                "machine's names first."
            )
        taken.add(stem)


def _stem(names: list[str]) -> str:
    return re.sub(r"[*:]", "_", names[0])


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    if len(name) > 253 or not _DNS_NAME.fullmatch(name):
        raise UsageError(f"{name!r} can't be in a certificate: give a machine's name or its IP address.")
    return x509.DNSName(name.lower())


def _write(cert: Path, key: Path, certificate: x509.Certificate, private: ec.EllipticCurvePrivateKey) -> None:
    """The key first: a program that watches the certificate's file then finds its key."""
    pem = serialization.Encoding.PEM
    plain = private.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_private(key, plain.decode())
    write_private(cert, certificate.public_bytes(pem).decode())
    cert.chmod(0o644)
