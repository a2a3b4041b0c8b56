"""What schemathesis checks of every answer beside its own checks; loaded by tests/conformance/api_fuzz.py."""

from __future__ import annotations

import json
from typing import Any

import schemathesis

LONGEST = 2000


@schemathesis.check
def documented_error(ctx: Any, response: Any, case: Any) -> None:
    """An error is a 4xx, or the 502 or 504 of a node, with the body {"error": code, "message": sentence}.

    That of a node has the request's id, too.
    """
    if response.status_code < 400:
        return
    assert response.status_code < 500 or response.status_code in (502, 504), f"status {response.status_code}"
    body = json.loads(response.content)
    of_request = {"request_id"} if response.status_code >= 500 else set()
    assert set(body) == {"error", "message"} | of_request, f"the body of the error is {body!r}"
    assert body["error"].replace("_", "").isalpha()
    assert body["error"].islower()
    assert 0 < len(body["message"]) < LONGEST


HUGE = "99999999999999999999999999"


@schemathesis.hook
def map_path_parameters(ctx: Any, path_parameters: dict[str, Any]) -> dict[str, Any]:
    """Names that exist, and numbers that no database holds, in place of some that are made up."""
    for name, known in (("task", "known"), ("name", "n1")):
        if name in (path_parameters or {}):
            made_up = str(path_parameters[name])
            choice = sum(made_up.encode("utf-8", "replace")) % 4
            path_parameters[name] = {0: known, 1: known, 2: HUGE}.get(choice, made_up)
    return path_parameters


@schemathesis.hook
def map_body(ctx: Any, body: Any) -> Any:
    """Addresses and nodes that exist in place of some that are made up."""
    if isinstance(body, dict):
        if isinstance(body.get("address"), str):
            body["address"] = "192.0.2.1"
        if isinstance(body.get("node"), str) and len(body["node"]) % 2:
            body["node"] = "n1"
    return body
