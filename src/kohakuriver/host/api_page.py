"""The page that shows the HTTP API and tries it out: Swagger UI, on which a token may be typed.

What runs on a page with a token must be what was meant to run: the browser compares the scripts with the hashes here
(https://www.w3.org/TR/SRI/) and takes nothing else from anywhere (https://www.w3.org/TR/CSP3/).
"""

from __future__ import annotations

import base64
import hashlib

from fastapi.responses import HTMLResponse

__all__ = ["api_page"]

# Of the npm package swagger-ui-dist, as the CDN serves it. A new version has new hashes:
#   openssl dgst -sha384 -binary swagger-ui-bundle.js | base64
_FROM = "https://cdn.jsdelivr.net/npm/swagger-ui-dist@5.35.0/"
_SCRIPT = "sha384-gjRm0bEPMeTmMh5jT2cHccIwCUZSTd8YC+j0d0sXw0MdGEfScduGpSyF3ZSSLkX9"
_STYLE = "sha384-WlYgdmXYOOBWL5apwjDEZwN+U3HmXSSu5R6V5aGxEcf7z+KuRNwBhoxKVN1i3D5I"

_START = 'SwaggerUIBundle({url: "/openapi.json", dom_id: "#page", deepLinking: true})'
_START_HASH = base64.b64encode(hashlib.sha256(_START.encode()).digest()).decode()

_PAGE = f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>KohakuRiver host: HTTP API</title>
<link rel="stylesheet" href="{_FROM}swagger-ui.css" integrity="{_STYLE}" crossorigin="anonymous">
<div id="page">The API's description is <a href="/openapi.json">openapi.json</a>. To show it here, this page loads
Swagger UI from cdn.jsdelivr.net.</div>
<script src="{_FROM}swagger-ui-bundle.js" integrity="{_SCRIPT}" crossorigin="anonymous"></script>
<script>{_START}</script>
</html>
"""
_POLICY = (
    f"default-src 'none'; script-src {_FROM} 'sha256-{_START_HASH}'; style-src {_FROM} 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def api_page() -> HTMLResponse:
    """The page, with the policy that confines it."""
    return HTMLResponse(_PAGE, headers={"Content-Security-Policy": _POLICY})
