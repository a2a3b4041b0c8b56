"""OpenID providers for tests: a real one, which is a package of npm, and one that does what no real one would."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from joserfc import jws, jwt
from joserfc.jwk import ECKey, OctKey, RSAKey

from kohakuriver.cli.pki import Authority
from kohakuriver.host.services.oidc_provider import Provider
from kohakuriver.tls import client_context
from tests.support.browser import Browser
from tests.support.host_only import HostUnderTest
from tests.support.serving import serving

__all__ = [
    "BACK",
    "CLIENT",
    "SECRET",
    "FakeProvider",
    "RealProvider",
    "a_fake_provider",
    "a_visitor",
    "another_key",
    "path_in",
    "real_provider",
    "start_of",
]

DIRECTORY = Path(__file__).parent / "idp"
NAME = "river.localhost"
BACK = f"https://{NAME}/login/oidc/back"
CLAIMS = {"sub": "1", "groups": ["lab"], "preferred_username": "ann"}
CLIENT, SECRET = "river", "a-secret-of-the-tests"


def a_visitor(host: HostUnderTest) -> Browser:
    """A browser that goes to a host by https, through a proxy that has the certificate."""
    browser = Browser(host, NAME)
    browser.authority, browser.origin = NAME, f"https://{NAME}"
    return browser


async def start_of(browser: Browser, **data: str) -> str:
    """Press the button: where the browser is sent."""
    page = await browser.ask("POST", "/login/oidc", data=data or {"next": ""})
    assert page.status_code == 200, page.text
    found = re.search(r'http-equiv="refresh" content="0;url=([^"]+)"', page.text)
    assert found is not None
    return found[1].replace("&amp;", "&")


def path_in(url: str) -> str:
    """Path and query of an address of the host."""
    parts = urlsplit(url)
    return f"{parts.path}?{parts.query}"


class RealProvider:
    """One that runs. `people` says who they are there, by their ids."""

    def __init__(self, issuer: str, ca_file: Path, people: Path) -> None:
        self.issuer = issuer
        self.ca_file = ca_file
        self._people = people
        self._trusted = client_context("https:", ca_file)

    def knows(self, **people: dict[str, Any]) -> None:
        """From now on it knows these people, and what it says of them."""
        self._people.write_text(json.dumps(people))

    def as_client(self, client_id: str = CLIENT, secret: str | None = SECRET) -> Provider:
        """How a host talks to it."""
        assert self._trusted is not None
        return Provider(self.issuer, client_id, secret, trusted=self._trusted)

    @contextlib.asynccontextmanager
    async def a_browser(self) -> AsyncIterator[httpx.AsyncClient]:
        """Somebody's browser, as it is there."""
        async with httpx.AsyncClient(verify=self._trusted or True, trust_env=False, timeout=30) as http:
            yield http

    async def log_in(self, http: httpx.AsyncClient, url: str, user: str) -> str:
        """Go where the host sends the browser, log in, consent; where the browser is sent back to."""
        answer = await http.get(url)
        for _ in range(10):
            while answer.is_redirect:
                target = answer.headers["location"]
                if target.startswith(f"https://{NAME}/"):
                    return str(target)
                answer = await http.get(httpx.URL(answer.url).join(target))
            answer = await self._send_form(http, answer, login=user, password="-")
        raise AssertionError(answer.text)

    async def _send_form(self, http: httpx.AsyncClient, answer: httpx.Response, **typed: str) -> httpx.Response:
        action = re.search(r'<form[^>]*action="([^"]+)"', answer.text)
        assert action is not None, answer.text
        hidden = dict(re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)"', answer.text))
        return await http.post(httpx.URL(answer.url).join(action[1]), data={**hidden, **typed})

    async def log_out(self, http: httpx.AsyncClient, url: str) -> str:
        """Go where the host leads for logging out, confirm; where the browser is sent back to."""
        answer = await self._send_form(http, await http.get(url), logout="yes")
        assert answer.is_redirect, answer.text
        return str(answer.headers["location"])


@contextlib.contextmanager
def real_provider(directory: Path) -> Iterator[RealProvider]:
    """Start it; skips where this machine can't, or with CI=true fails."""
    node = shutil.which("node")
    if node is None or not (DIRECTORY / "node_modules").is_dir():
        reason = "needs Node.js and what `make test` installs of npm for an OpenID provider"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    made = Authority(directory).issue(["localhost"], 1)
    people = directory / "people.json"
    argv = [node, str(DIRECTORY / "provider.mjs"), str(people), str(made.cert), str(made.key)]
    with (directory / "provider.log").open("wb") as log:
        program = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
    assert program.stdin is not None
    assert program.stdout is not None
    try:
        issuer = program.stdout.readline().decode().strip()
        assert issuer.startswith("https://"), (directory / "provider.log").read_text()
        yield RealProvider(issuer, directory / "ca.pem", people)
    finally:
        program.stdin.close()
        program.wait(30)
        program.stdout.close()


@functools.cache
def _first_key() -> RSAKey:
    key: RSAKey = RSAKey.generate_key(2048, {"kid": "1", "alg": "RS256", "use": "sig"})
    return key


@functools.cache
def another_key(kid: str) -> RSAKey:
    """One that no provider shows, unless a test says so."""
    key: RSAKey = RSAKey.generate_key(2048, {"kid": kid, "alg": "RS256"})
    return key


class FakeProvider:
    """One that answers as a test says.

    `about` is its configuration, `keys` what it signs with, newest last; `claims` go over those of its ID tokens, and
    None takes one out. `codes` are the nonces of the logins that it has begun, by their codes.
    """

    def __init__(self, issuer: str) -> None:
        self.issuer = issuer
        self.keys: list[RSAKey | ECKey] = [_first_key()]
        self.about: dict[str, Any] = {
            "issuer": issuer,
            "authorization_endpoint": f"{issuer}/auth",
            "token_endpoint": f"{issuer}/token",
            "jwks_uri": f"{issuer}/jwks",
            "response_types_supported": ["code"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["RS256", "ES256"],
        }
        self.claims: dict[str, Any] = dict(CLAIMS)
        self.userinfo: dict[str, Any] = {}
        self.raw: dict[str, Response] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.held: asyncio.Event | None = None
        self.id_token: Any = self.signed
        self.clock: Any = None
        self.app = FastAPI()
        self.app.add_api_route("/{path:path}", self._answer, methods=["GET", "POST"])

    def as_before(self) -> None:
        """Say again what is good."""
        self.claims, self.id_token, self.raw = dict(CLAIMS), self.signed, {}

    def own_claims(self, nonce: str) -> dict[str, Any]:
        """Those of an ID token."""
        now = int(self.clock())
        usual = {"iss": self.issuer, "aud": CLIENT, "nonce": nonce, "iat": now, "exp": now + 60}
        return {name: value for name, value in {**usual, **self.claims}.items() if value is not None}

    def signed(self, claims: dict[str, Any], key: RSAKey | ECKey | None = None) -> str:
        """As it should be, unless by another `key`."""
        key = key or self.keys[-1]
        return jwt.encode({"alg": key.alg or "RS256", "kid": key.kid}, claims, key, algorithms=[key.alg or "RS256"])

    def signed_text(self, text: str) -> str:
        """With something else in it than claims."""
        return jws.serialize_compact({"alg": "RS256", "kid": "1"}, text, self.keys[0], algorithms=["RS256"])

    def unsigned(self, claims: dict[str, Any]) -> str:
        """With alg=none."""
        head, body = (_base64(json.dumps(part).encode()) for part in ({"alg": "none", "kid": "1"}, claims))
        return f"{head}.{body}."

    def with_the_public_key_as_a_secret(self, claims: dict[str, Any]) -> str:
        """With HS256: who takes the algorithm from the token checks it by what everybody knows."""
        pem = self.keys[-1].as_pem(private=False)
        key = OctKey.import_key(_base64(pem).encode(), {"kid": "1"})
        return jwt.encode({"alg": "HS256", "kid": "1"}, claims, key, algorithms=["HS256"])

    def by_a_key_of_its_own(self, claims: dict[str, Any]) -> str:
        """With a key that is nobody's, in the head of the token."""
        key = ECKey.generate_key("P-256", {"kid": "1"})
        head = {"alg": "ES256", "kid": "1", "jwk": key.as_dict(private=False)}
        return jwt.encode(head, claims, key, algorithms=["ES256"])

    async def _answer(self, request: Request, path: str) -> Response:
        if self.held is not None:
            await self.held.wait()
        body = dict(parse_qsl((await request.body()).decode()))
        self.asked.append((path, body))
        if path in self.raw:
            return self.raw[path]
        if path == ".well-known/openid-configuration":
            return JSONResponse(self.about)
        if path == "jwks":
            return JSONResponse({"keys": [key.as_dict(private=False) for key in self.keys]})
        if path == "userinfo":
            return JSONResponse(self.userinfo)
        nonce = body["code"].partition(".")[2]
        token = self.id_token(self.own_claims(nonce))
        return JSONResponse({"access_token": "a", "token_type": "Bearer", "id_token": token})

    def back(self, url: str, **more: str) -> str:
        """Where it would send the browser back to: the path and query there."""
        asked = dict(parse_qsl(urlsplit(url).query))
        answer = {"code": f"c.{asked['nonce']}", "state": asked["state"], **more}
        return path_in(str(httpx.URL(asked["redirect_uri"], params=answer)))


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


@contextlib.asynccontextmanager
async def a_fake_provider() -> AsyncIterator[FakeProvider]:
    """One on a free port of loopback."""
    app = FastAPI()
    async with serving(app) as url:
        fake = FakeProvider(url)
        app.router.routes.extend(fake.app.router.routes)
        yield fake
