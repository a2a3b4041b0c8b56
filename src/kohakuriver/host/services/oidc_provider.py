"""An OpenID provider, as this host asks it who somebody is: discovery, keys, the login's way there and back.

What is checked is checked by Authlib and joserfc; this module asks, bounds what comes, and says in one sentence what
is wrong. Sources: OpenID Connect Core 1.0 and Discovery 1.0, RFC 7636 (PKCE), RFC 9207 (issuer of the answer).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
from authlib.common.security import generate_token, is_secure_transport
from authlib.common.urls import add_params_to_uri
from authlib.oauth2.auth import ClientAuth
from authlib.oauth2.client import OAuth2Client
from authlib.oauth2.rfc6749.parameters import prepare_token_request
from authlib.oidc.core import CodeIDToken
from authlib.oidc.discovery import OpenIDProviderMetadata
from joserfc import jwt
from joserfc.errors import ClaimError, ExceededSizeError, ExpiredTokenError, InvalidKeyIdError, JoseError
from joserfc.jwk import KeySet, import_key
from joserfc.jws import JWSRegistry

from kohakuriver.asking import asker
from kohakuriver.errors import KohakuRiverError, UnauthenticatedError, UnavailableError
from kohakuriver.http_proxy import http_proxy
from kohakuriver.no_connection import reason
from kohakuriver.text import printable
from kohakuriver.tls import client_context

__all__ = ["Provider", "Try"]

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519")
"""How an ID token may be signed: by a key that the provider alone has. Never not at all, nor by a shared secret."""

LEEWAY = 60
"""Seconds by which two machines' clocks may differ."""

LONGEST_ANSWER = 1 << 20
"""Bytes of one answer of the provider."""

ANSWER_SECONDS = 10.0
"""How long one answer may take, from the connection to its last byte."""

FRESH_SECONDS = 3600.0
"""How long what the provider says of itself is gone by."""

AGAIN_SECONDS = 10.0
"""How soon it is asked again for keys that it has not shown, or after it could not be asked."""

MOST_AT_ONCE = 64
"""Logins that wait for the provider at a time."""

MOST_OF_ONE = 16
"""Those of one address."""

_NEEDED = (
    "issuer",
    "authorization_endpoint",
    "token_endpoint",
    "jwks_uri",
    "response_types_supported",
    "id_token_signing_alg_values_supported",
)
_WRONG = {
    "iss": "another issuer's",
    "aud": "for another client than this host",
    "azp": "for another client than this host",
    "nonce": "for another login than this one",
    "at_hash": "not the one that belongs to this login",
    "iat": "from the future: compare the clocks of both machines",
    "nbf": "not good yet: compare the clocks of both machines",
}


@dataclass(frozen=True)
class Try:
    """What is kept of one login while the browser is at the provider; all of it is random."""

    state: str = field(default_factory=lambda: generate_token(43))
    nonce: str = field(default_factory=lambda: generate_token(43))
    verifier: str = field(default_factory=lambda: generate_token(48))


class Provider:
    """An OpenID provider and this host as its client.

    Args:
        issuer: its issuer identifier, exactly as it writes it itself.
        secret: the client's; None for a client that has none.
        scopes: what is asked for beside what every login needs.
        trusted: how its certificate is checked.
        clock: seconds since the epoch, by which ID tokens are judged.
    """

    def __init__(
        self,
        issuer: str,
        client_id: str,
        secret: str | None,
        *,
        scopes: tuple[str, ...] = (),
        trusted: ssl.SSLContext,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.issuer = issuer
        self.name = urlsplit(issuer).netloc
        self._client_id = client_id
        self._secret = secret
        self._scopes = scopes
        self._clock = clock
        self._http = _http_client(issuer, trusted)
        self._busy: Counter[str] = Counter()
        self._asking = asyncio.Lock()
        self._about: OpenIDProviderMetadata | None = None
        self._about_until = 0.0
        self._failure: tuple[str, float] | None = None
        self._keys: KeySet | None = None
        self._keys_from = 0.0

    async def close(self) -> None:
        """Let go of the connections to it."""
        await self._http.aclose()

    # -- the way there -------------------------------------------------------------------------------------------------

    async def login_url(self, login: Try, redirect_uri: str) -> str:
        """Where a browser goes to log in there. Raises UnavailableError."""
        async with self._place():
            about = await self._metadata()
        client = OAuth2Client(None, self._client_id, code_challenge_method="S256")
        url, _ = client.create_authorization_url(
            about["authorization_endpoint"],
            state=login.state,
            nonce=login.nonce,
            code_verifier=login.verifier,
            redirect_uri=redirect_uri,
            scope=" ".join(self._wanted(about)),
        )
        return str(url)

    async def logout_url(self, back: str) -> str | None:
        """Where a browser goes to log out there too, and then to `back`; None where there is no such place."""
        try:
            async with self._place():
                endpoint = (await self._metadata()).get("end_session_endpoint")
        except KohakuRiverError:
            return None
        if not isinstance(endpoint, str) or not is_secure_transport(endpoint):
            return None
        params = {"client_id": self._client_id, "post_logout_redirect_uri": back}
        return str(add_params_to_uri(endpoint, params))

    def _wanted(self, about: Mapping[str, Any]) -> list[str]:
        there = about.get("scopes_supported")
        usual = ["profile", "email", "groups"] if isinstance(there, list) else ["profile", "email"]
        return ["openid", *(scope for scope in usual if not isinstance(there, list) or scope in there), *self._scopes]

    # -- the way back --------------------------------------------------------------------------------------------------

    async def claims(self, login: Try, redirect_uri: str, answer: Mapping[str, str], need: set[str]) -> dict[str, Any]:
        """What the provider says of who has logged in; `answer` is the query with which the browser came back.

        Claims of `need` that are not in the ID token are asked for at its UserInfo endpoint. Raises
        UnauthenticatedError for an answer that is not good, UnavailableError where the provider can't be asked.
        """
        async with self._place():
            about = await self._metadata()
            self._check_issuer(about, answer)
            if "error" in answer or not answer.get("code"):
                raise self._refused(f"logged nobody in ({_code(answer.get('error'))})")
            tokens = await self._exchange(about, login, redirect_uri, answer["code"])
            own = await self._id_token(about, login, tokens)
            if need <= own.keys() or "userinfo_endpoint" not in about:
                return own
            return _together(own, await self._userinfo(about, tokens, own["sub"]))

    def _check_issuer(self, about: Mapping[str, Any], answer: Mapping[str, str]) -> None:
        """RFC 9207, section 2.4: the answer of another provider must not be taken for this one's."""
        told = answer.get("iss")
        if told is None and about.get("authorization_response_iss_parameter_supported") is not True:
            return
        if told != self.issuer:
            raise self._refused("did not send this: the answer is another provider's")

    async def _exchange(self, about: Mapping[str, Any], login: Try, redirect_uri: str, code: str) -> dict[str, Any]:
        body = prepare_token_request(
            "authorization_code", redirect_uri=redirect_uri, code=code, code_verifier=login.verifier
        )
        headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}
        method = "none"
        if self._secret is not None:
            ways = about.get("token_endpoint_auth_methods_supported")
            basic = not isinstance(ways, list) or "client_secret_basic" in ways
            method = "client_secret_basic" if basic else "client_secret_post"
        auth = ClientAuth(self._client_id, self._secret, method)
        url, headers, body = auth.prepare("POST", about["token_endpoint"], headers, body)
        status, tokens = await self._ask("POST", url, headers=headers, content=body)
        if status != 200 or "error" in tokens:
            raise self._refused(f"does not take this login ({_code(tokens.get('error'))}); log in once more")
        if not isinstance(tokens.get("id_token"), str):
            raise self._refused("sent no ID token")
        return tokens

    async def _id_token(self, about: Mapping[str, Any], login: Try, tokens: Mapping[str, Any]) -> dict[str, Any]:
        said = about["id_token_signing_alg_values_supported"]
        registry = JWSRegistry(algorithms=[each for each in ALGORITHMS if each in said], strict_check_header=False)
        required = {"iss": self.issuer, "aud": self._client_id}
        options = {claim: {"essential": True, "value": value} for claim, value in required.items()}
        params = {"nonce": login.nonce, "client_id": self._client_id}
        if isinstance(tokens.get("access_token"), str):
            params["access_token"] = tokens["access_token"]
        try:
            try:
                token = jwt.decode(tokens["id_token"], await self._key_set(about), registry=registry)
            except InvalidKeyIdError:
                token = jwt.decode(tokens["id_token"], await self._key_set(about, renew=True), registry=registry)
            claims = CodeIDToken(token.claims, token.header, options, params)
            claims.validate(int(self._clock()), LEEWAY)
        except ExpiredTokenError:
            raise self._refused("sent an ID token whose time is over: compare the clocks of both machines") from None
        except ExceededSizeError:
            raise self._refused("sent an ID token that is too large; have it name fewer groups") from None
        except ClaimError as error:
            raise self._refused(f"sent an ID token that is {_wrong(error)}") from error
        except (JoseError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise self._refused("sent an ID token that is not signed as it has to be") from error
        subject = claims["sub"]
        if not (isinstance(subject, str) and 0 < len(subject) < 256 and subject.isascii() and subject.isprintable()):
            raise self._refused("sent an ID token without a subject")
        return dict(claims)

    async def _userinfo(self, about: Mapping[str, Any], tokens: Mapping[str, Any], subject: str) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {tokens.get('access_token')}"}
        status, found = await self._ask("GET", about["userinfo_endpoint"], headers=headers)
        if status != 200:
            raise self._refused("tells nothing more of who logged in")
        if found.get("sub") != subject:
            # OpenID Connect Core 1.0, section 5.3.2: else one could be taken for the other.
            raise self._refused("tells of another one than who logged in")
        return found

    # -- what it says of itself ----------------------------------------------------------------------------------------

    async def _metadata(self) -> OpenIDProviderMetadata:
        async with self._asking:
            now = time.monotonic()
            if self._about is not None and now < self._about_until:
                return self._about
            if self._failure is not None and now < self._failure[1]:
                raise _unavailable(self._failure[0])
            try:
                about = await self._discover()
            except KohakuRiverError as error:
                self._failure = error.message, now + AGAIN_SECONDS
                raise
            self._about, self._about_until, self._failure = about, now + FRESH_SECONDS, None
            self._keys = None
            return about

    async def _discover(self) -> OpenIDProviderMetadata:
        status, found = await self._ask("GET", f"{self.issuer.rstrip('/')}/.well-known/openid-configuration")
        if status != 200:
            raise self._down(f"has no OpenID configuration (HTTP status {status})")
        if found.get("issuer") != self.issuer:
            raise self._down(f"calls itself {_shown(found.get('issuer'))}, which is not what --oidc-issuer says")
        about = OpenIDProviderMetadata(found)
        try:
            for name in _NEEDED:
                getattr(about, f"validate_{name}")()
            for name in ("userinfo_endpoint", "end_session_endpoint"):
                if name in about and not is_secure_transport(about[name]):
                    raise ValueError(f'"{name}" MUST use "https" scheme')
        except (ValueError, TypeError, AttributeError) as error:
            raise self._down("has an OpenID configuration that can't be used") from error
        return about

    async def _key_set(self, about: Mapping[str, Any], *, renew: bool = False) -> KeySet:
        async with self._asking:
            now = time.monotonic()
            if self._keys is not None and not (renew and now - self._keys_from >= AGAIN_SECONDS):
                return self._keys
            status, found = await self._ask("GET", about["jwks_uri"])
            keys = found.get("keys")
            if status != 200 or not isinstance(keys, list):
                raise self._down("shows no keys")
            good = []
            for each in keys:
                # A key of a kind that is not known here does no harm, and a shared secret is none of a provider's.
                with contextlib.suppress(JoseError, ValueError, TypeError, KeyError, AttributeError):
                    if each.get("kty") in ("RSA", "EC", "OKP") and each.get("use", "sig") == "sig":
                        good.append(import_key(each))
            self._keys, self._keys_from = KeySet(good), now
            return self._keys

    # -- one answer ----------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        origin = asker().origin
        if self._busy.total() >= MOST_AT_ONCE or self._busy[origin] >= MOST_OF_ONE:
            raise UnavailableError(
                f"Too many logins wait for {self.name} just now; try again in a moment.",
                code="too_many_logins",
                status=503,
            )
        self._busy[origin] += 1
        try:
            yield
        finally:
            self._busy[origin] -= 1
            self._busy += Counter()  # forgets those that have none

    async def _ask(self, method: str, url: str, **how: Any) -> tuple[int, dict[str, Any]]:
        """The status and the JSON object of one answer. Raises UnavailableError."""
        try:
            status, body = await asyncio.wait_for(self._read(method, url, **how), ANSWER_SECONDS)
        except (asyncio.TimeoutError, httpx.TimeoutException) as error:
            raise self._down("does not answer in time") from error
        except (httpx.TransportError, httpx.InvalidURL, OSError) as error:
            raise self._down(f"can't be reached: {reason(error)}") from error
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise self._down(f"answers what is no JSON object (HTTP status {status})")
        return status, found

    async def _read(self, method: str, url: str, **how: Any) -> tuple[int, bytes]:
        body = b""
        async with self._http.stream(method, url, **how) as answer:
            async for piece in answer.aiter_raw():  # as it came: nothing is unpacked that says it is packed
                body += piece
                if len(body) > LONGEST_ANSWER:
                    raise self._down("answers more than it may")
            return answer.status_code, body

    def _down(self, why: str) -> UnavailableError:
        return _unavailable(f"The OpenID provider {self.name} {why}.")

    def _refused(self, why: str) -> UnauthenticatedError:
        return UnauthenticatedError(f"The OpenID provider {self.name} {why}.", code="oidc_refused")


def _unavailable(sentence: str) -> UnavailableError:
    return UnavailableError(sentence, code="oidc_unavailable", status=503)


def _http_client(issuer: str, trusted: ssl.SSLContext) -> httpx.AsyncClient:
    proxy = http_proxy(issuer)
    return httpx.AsyncClient(
        headers={"Accept": "application/json", "Accept-Encoding": "identity"},
        timeout=ANSWER_SECONDS,
        follow_redirects=False,
        verify=trusted,
        proxy=None
        if proxy is None
        else httpx.Proxy(proxy.url, auth=proxy.credentials, ssl_context=client_context(proxy.url)),
        trust_env=False,
    )


def _together(own: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    """All claims: those of the ID token go before. That an address is verified is said of the address beside it."""
    found = {**told, **own}
    if not {"email", "email_verified"} <= own.keys():
        found |= {name: told.get(name) for name in ("email", "email_verified")}
    return found


def _wrong(error: ClaimError) -> str:
    return _WRONG.get(getattr(error, "claim", ""), "not complete")


def _shown(name: object) -> str:
    return printable(str(name), keep="")[:200]


def _code(error: object) -> str:
    """The code of an error, as RFC 6749 has them: it came by way of a browser, and is shown."""
    return error if isinstance(error, str) and re.fullmatch(r"[a-z_]{1,40}", error) else "no reason given"
