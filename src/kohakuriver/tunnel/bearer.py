"""The credential of a request, read the same way for HTTP and for the opening handshake of a WebSocket."""

from __future__ import annotations

from collections.abc import Sequence

from kohakuriver.errors import UnauthenticatedError, UsageError


def bearer_token(headers: Sequence[str]) -> str | None:
    """The token in a request's Authorization headers (RFC 6750 §2.1); None where there is no such header.

    Raises UnauthenticatedError for another scheme and for no token; UsageError where the header is there twice.
    """
    if not headers:
        return None
    if len(headers) > 1:
        raise UsageError("A request has one Authorization header; this one has several.")
    scheme, _, token = headers[0].partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise UnauthenticatedError("The Authorization header must be `Bearer <token>`.")
    return token.strip()
