"""TLS on every hop: how a server is checked, why it was not trusted, and a server's certificate that can change.

Sources: docs/guide/tls.md, RFC 8446, RFC 9525 (names in certificates).
"""

from __future__ import annotations

import contextlib
import ssl
import time
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from kohakuriver.errors import UsageError

__all__ = [
    "ServerCertificate",
    "client_context",
    "hung_up",
    "is_for_another",
    "is_this_machine",
    "reason",
    "sends_in_clear",
    "trusted_at",
]

_SIGNERS_UNKNOWN = {2, 18, 19, 20, 21, 24, 26}
_NOT_YET_VALID, _EXPIRED = 9, 10
_OTHER_NAME, _OTHER_ADDRESS = 62, 64
_NO_TLS = {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "PACKET_LENGTH_TOO_LONG"}


def client_context(url: str, ca_file: str | Path | None = None) -> ssl.SSLContext | None:
    """How the server at `url` is checked: by `ca_file` (PEM), else by the system's authorities; None for plain HTTP.

    Raises UsageError for a file that holds no certificate.
    """
    if not url.startswith(("https:", "wss:")):
        return None
    try:
        return ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
    except ssl.SSLError as error:
        raise UsageError(f"The CA file {ca_file} holds no certificate in PEM form.") from error
    except OSError as error:
        raise UsageError(f"The CA file {ca_file} can't be read: {error.strerror}.") from error


def trusted_at(url: str, ca_file: str | Path | None = None) -> ssl.SSLContext:
    """The same for libraries that check every server: for plain HTTP nobody is trusted, and no authorities are read.

    Reading those takes longer than all the rest of a request. Raises UsageError as `client_context` does.
    """
    return client_context(url, ca_file) or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def sends_in_clear(url: str) -> bool:
    """Whether what is sent to `url` can be read on a network: it is plain HTTP, and not to this machine itself."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    return parts.scheme in ("http", "ws") and not is_this_machine(host)


def is_this_machine(host: str) -> bool:
    """Whether a name or an address stands for this machine itself."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name, which may well begin with 127
        return False


def reason(error: BaseException) -> str | None:
    """Why TLS with a server failed, as a clause that says what to do; None where `error` is about something else."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ssl.SSLCertVerificationError):
            return _distrust(seen)
        if isinstance(seen, ssl.SSLError):
            if seen.reason in _NO_TLS:
                return "what answers there does not speak TLS; if it serves plain HTTP, its URL begins with http://"
            return f"TLS with it failed ({(seen.reason or str(seen)).lower().replace('_', ' ')})"
        seen = seen.__cause__ or seen.__context__
    return None


def is_for_another(error: BaseException) -> bool:
    """Whether a server was not trusted since its certificate is for other names alone."""
    return isinstance(error, ssl.SSLCertVerificationError) and error.verify_code in (_OTHER_NAME, _OTHER_ADDRESS)


def hung_up(url: str) -> str:
    """What it most likely means that the server at `url` ended the connection instead of answering, as a clause."""
    hint = "" if url.startswith(("https:", "wss:")) else "; if it serves TLS, its URL begins with https://"
    return f"it closed the connection without an answer{hint}"


def _distrust(error: ssl.SSLCertVerificationError) -> str:
    code = error.verify_code
    if code == _EXPIRED:
        return "its certificate has expired; its administrator must renew it"
    if code == _NOT_YET_VALID:
        return "its certificate is not valid yet; check the clocks of both machines"
    if code in (_OTHER_NAME, _OTHER_ADDRESS):
        return "its certificate is for another name; use a URL with a name that the certificate has"
    if code in _SIGNERS_UNKNOWN:
        return (
            "its certificate is not signed by an authority that is trusted here; name the file of the one that signed "
            "it with --ca-file or KOHAKURIVER_CA_FILE"
        )
    return f"its certificate is not valid ({error.verify_message})"


_Version = tuple[int, ...]


class ServerCertificate:
    """The certificate that a program shows, from two PEM files that are read again when they change.

    `context` is what to listen with: it gives each new connection the certificate of then, and connections under way
    keep theirs. A new certificate that is no good is refused, and the old one stays.

    Args:
        log: called with one sentence and whether it is bad news, whenever files have changed.
    """

    def __init__(self, cert: Path, key: Path, log: Callable[[str, bool], None] = lambda sentence, bad: None) -> None:
        """Raises UsageError when there is no such certificate and key."""
        self._cert = cert
        self._key = key
        self._log = log
        self._seen = self._tried = self._version()
        self.context, expiry = self._load()
        self._current = self.context
        self.context.sni_callback = self._choose
        if expiry <= time.time():
            log(f"The certificate in {cert} has expired: no client will trust it.", True)

    @property
    def names(self) -> list[str]:
        """The DNS names that the certificate is for, those with a wildcard left out."""
        from cryptography import x509

        shown = x509.load_pem_x509_certificate(self._cert.read_bytes())
        try:
            names = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound:
            return []
        return [name for name in names.get_values_for_type(x509.DNSName) if "*" not in name]

    def _choose(self, connection: ssl.SSLSocket | ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = self._current

    def look(self) -> None:
        """Take a new certificate in if there is one. To be called now and then.

        Files that changed since the last look are left for the next one: certificate and key are two files, and
        whoever replaces them does it one after the other.
        """
        version = self._version()
        if version == self._seen and version != self._tried:
            self.reload()
        self._seen = version

    def reload(self) -> None:
        """Read the files now, whether they have changed or not."""
        self._tried = self._version()
        try:
            fresh, expiry = self._load()
            if expiry <= time.time():
                raise UsageError(f"The certificate in {self._cert} has expired.")
        except UsageError as error:
            self._log(f"{error.message} The certificate from before stays in use.", True)
            return
        self._current = fresh
        self._log(f"The certificate was read again from {self._cert}.", False)

    def _version(self) -> _Version:
        """What changes when the files do."""
        version: list[int] = []
        for path in (self._cert, self._key):
            with contextlib.suppress(OSError):
                stat = path.stat()
                version += (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        return tuple(version)

    def _load(self) -> tuple[ssl.SSLContext, float]:
        """What to listen with, and when its certificate ends. Raises UsageError."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # A client that negotiates anew again and again costs us far more than itself; OpenSSL before 3 let it.
        context.options |= ssl.OP_NO_RENEGOTIATION
        try:
            # Nobody is there to type a password when the program starts.
            context.load_cert_chain(self._cert, self._key, password=_no_password)
            expiry = _expiry(self._cert)
        except ssl.SSLError as error:
            raise UsageError(_what_is_wrong(error, self._cert, self._key)) from error
        except OSError as error:
            missing = next((path for path in (self._cert, self._key) if not _readable(path)), self._cert)
            raise UsageError(f"The TLS file {missing} can't be read: {error.strerror}.") from error
        except _PasswordWanted:
            raise UsageError(f"The key in {self._key} is encrypted; give one that is not, of mode 0600.") from None
        return context, expiry


class _PasswordWanted(Exception):
    """A key is encrypted."""


def _no_password() -> str:
    raise _PasswordWanted


def _readable(path: Path) -> bool:
    try:
        path.open("rb").close()
    except OSError:
        return False
    return True


def _what_is_wrong(error: ssl.SSLError, cert: Path, key: Path) -> str:
    if error.reason == "KEY_VALUES_MISMATCH":
        return f"The key in {key} does not belong to the certificate in {cert}."
    return f"{cert} and {key} must hold a certificate and its key in PEM form, and don't ({error.reason or error})."


def _expiry(cert: Path) -> float:
    """When a certificate that could be loaded ends, in seconds since the epoch. Raises OSError and UsageError."""
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(cert.read_bytes()).not_valid_after_utc.timestamp()
    except (ValueError, x509.InvalidVersion) as error:  # it is stricter than OpenSSL
        raise UsageError(f"The first certificate in {cert} is not a plain X.509 certificate in PEM form.") from error
