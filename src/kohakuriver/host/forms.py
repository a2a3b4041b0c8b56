"""Forms that pages of ours send."""

from __future__ import annotations

from urllib.parse import parse_qsl

from fastapi import Request

from kohakuriver.errors import UsageError

__all__ = ["LONGEST_FORM", "fields_of"]

LONGEST_FORM = 4096
"""Bytes of what somebody sends who need not be known."""
_FORM = "application/x-www-form-urlencoded"


async def fields_of(request: Request) -> dict[str, str]:
    """A form's fields. Raises UsageError for what is none, or is too long."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _FORM:
        raise UsageError(f"A form is sent as {_FORM}.")
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > LONGEST_FORM:
            raise UsageError(f"A form may have at most {LONGEST_FORM} bytes.", status=413)
    try:
        return dict(parse_qsl(body.decode("ascii"), keep_blank_values=True, max_num_fields=8, errors="strict"))
    except ValueError as error:
        raise UsageError("This is no form that can be read.") from error
