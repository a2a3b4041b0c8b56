"""The page that shows the HTTP API to people, made of its OpenAPI description: no script, nothing from elsewhere.

It is as readable where there is no internet, and no page of ours asks for a token. The browser is told so too
(https://www.w3.org/TR/CSP3/). Source: https://spec.openapis.org/oas/v3.1.0
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from typing import Any

from fastapi.responses import HTMLResponse

from kohakuriver.host.html import policy

__all__ = ["api_page"]

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "h3{margin:2em 0 0;font-size:1em}table{border-collapse:collapse}td{padding:.1em 1em .1em 0;vertical-align:top}"
)
_POLICY = policy(_STYLE)
_HEAD = f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>HTTP API</title>\n<style>{_STYLE}</style>\n'
_BEGIN = (
    "<p>Every request but those below <code>/health</code> carries "
    "<code>Authorization: Bearer TOKEN</code>. "
    "From a page of this host the cookie of a browser that is logged in is as good. "
    'An error is <code>{"error": code, "message": sentence}</code>. For programs all this is in '
    '<a href="/openapi.json">openapi.json</a>.</p>\n'
)


def api_page(described: dict[str, Any]) -> HTMLResponse:
    """The page for an OpenAPI description, with the policy that confines it."""
    title = escape(f"{described['info']['title']} {described['info']['version']}: HTTP API")
    shapes = described.get("components", {}).get("schemas", {})
    parts = [
        _HEAD,
        f"<h1>{title}</h1>\n",
        _BEGIN,
        *(_route(method, path, what) for path, item in described["paths"].items() for method, what in item.items()),
        "<h2>Shapes</h2>\n",
        *(_shape(name, schema) for name, schema in sorted(shapes.items())),
        "</html>\n",
    ]
    return HTMLResponse("".join(parts), headers={"Content-Security-Policy": _POLICY})


def _route(method: str, path: str, what: dict[str, Any]) -> str:
    """One method of one path."""
    title = f"{method.upper()} {path}"
    return f"<h3><code>{escape(title)}</code></h3>\n<p>{escape(what.get('description', ''))}</p>\n{_table(_io(what))}"


def _io(what: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What goes in and comes out of a route, as (what it is, its type)."""
    for each in what.get("parameters", ()):
        yield f"{each['name']} ({each['in']})", _type(each.get("schema", {}))
    if body := what.get("requestBody"):
        yield "body", _type(_of_json(body))
    for status, answer in what["responses"].items():
        if status.startswith("2"):
            yield f"answer {status}", _type(_of_json(answer))


def _of_json(part: dict[str, Any]) -> dict[str, Any]:
    schema: dict[str, Any] = part.get("content", {}).get("application/json", {}).get("schema", {})
    return schema


def _shape(name: str, schema: dict[str, Any]) -> str:
    """One schema that routes name."""
    about = escape(schema.get("description", ""))
    rows = ((key, _type(value)) for key, value in schema.get("properties", {}).items())
    return f'<h3 id="{escape(name)}">{escape(name)}</h3>\n<p>{about}</p>\n{_table(rows)}'


def _table(rows: Iterable[tuple[str, str]]) -> str:
    lines = "".join(f"<tr><td><code>{escape(name)}</code></td><td>{kind}</td></tr>\n" for name, kind in rows)
    return f"<table>\n{lines}</table>\n" if lines else ""


def _type(schema: dict[str, Any]) -> str:
    """A schema's type in HTML, with a link to the shape that it names."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "enum" in schema or "const" in schema:
        return escape(" | ".join(map(str, schema.get("enum", [schema.get("const")]))))
    if choices := schema.get("anyOf", ()):
        return " | ".join(map(_type, choices))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return escape(str(schema.get("type", "anything")))
