"""The OpenID provider that a host is started with: what its options have to say, and what they may not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

import structlog

from kohakuriver.config import clean_token
from kohakuriver.errors import UsageError
from kohakuriver.host.services.oidc import Rules
from kohakuriver.tls import client_context

if TYPE_CHECKING:
    from kohakuriver.host.services.oidc_provider import Provider

__all__ = ["OidcOptions", "provider_of", "rules_of"]

log = structlog.get_logger("kohakuriver.host")


class OidcOptions(Protocol):
    """Those of a host's options that are about it; see `HostOptions`."""

    @property
    def oidc_issuer(self) -> str | None: ...
    @property
    def oidc_client_id(self) -> str | None: ...
    @property
    def oidc_client_secret_file(self) -> Path | None: ...
    @property
    def oidc_allowed_groups(self) -> Sequence[str]: ...
    @property
    def oidc_allowed_domains(self) -> Sequence[str]: ...
    @property
    def oidc_admin_groups(self) -> Sequence[str]: ...
    @property
    def oidc_group_claim(self) -> str: ...
    @property
    def oidc_scopes(self) -> Sequence[str]: ...
    @property
    def oidc_ca_file(self) -> Path | None: ...


def provider_of(options: OidcOptions) -> Provider | None:
    """The provider; None for a host without one. Raises UsageError for options that make no sense."""
    issuer, client_id = options.oidc_issuer, options.oidc_client_id
    if issuer is None:
        _need_nothing(options)
        return None
    if client_id is None:
        raise UsageError("--oidc-issuer needs --oidc-client-id: as which client the provider knows this host.")
    _check_issuer(issuer)
    try:
        from kohakuriver.host.services.oidc_provider import Provider
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise UsageError(
            f"--oidc-issuer needs the Python package {package!r}: install kohakuriver with the extra 'oidc'."
        ) from error
    trusted = client_context("https:", options.oidc_ca_file)
    assert trusted is not None
    scopes = tuple(options.oidc_scopes)
    return Provider(issuer, client_id, _secret(options.oidc_client_secret_file), scopes=scopes, trusted=trusted)


def rules_of(options: OidcOptions) -> Rules:
    """Who may come in. Raises UsageError where nobody says."""
    return Rules(
        frozenset(options.oidc_allowed_groups),
        frozenset(domain.lower().lstrip("@") for domain in options.oidc_allowed_domains),
        frozenset(options.oidc_admin_groups),
        options.oidc_group_claim,
    )


def _need_nothing(options: OidcOptions) -> None:
    given = {
        "--oidc-client-id": options.oidc_client_id,
        "--oidc-client-secret-file": options.oidc_client_secret_file,
        "--oidc-allowed-group": options.oidc_allowed_groups,
        "--oidc-allowed-domain": options.oidc_allowed_domains,
        "--oidc-admin-group": options.oidc_admin_groups,
    }
    for name, value in given.items():
        if value:
            raise UsageError(f"{name} is of no use without --oidc-issuer.")


def _check_issuer(issuer: str) -> None:
    """OpenID Connect Discovery 1.0, section 3: https, and neither query nor fragment."""
    try:
        parts = urlsplit(issuer)
        good = (
            parts.scheme == "https" and bool(parts.hostname) and not (parts.query or parts.fragment or parts.username)
        )
    except ValueError:
        good = False
    if not good:
        raise UsageError(f"--oidc-issuer takes a URL like https://id.example.org/realm, not {issuer!r}.")


def _secret(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        secret = clean_token(file.read_text("utf-8", "replace"))
    except OSError as error:
        raise UsageError(f"The client's secret can't be read from {file}: {error.strerror}.") from error
    if os.name == "posix" and file.stat().st_mode & 0o077:
        log.warning("others on this machine may read the OpenID client's secret; chmod 600", file=str(file))
    if not secret:
        raise UsageError(f"There is no client secret in {file}; put it there.")
    return secret
