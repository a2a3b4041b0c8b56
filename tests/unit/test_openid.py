"""What a host takes from an OpenID provider, and what it refuses, each in one sentence."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.responses import JSONResponse, Response
from joserfc.jwk import ECKey

from kohakuriver.errors import NotAllowedError, UsageError
from kohakuriver.host import HostOptions
from kohakuriver.host.oidc_options import provider_of, rules_of
from kohakuriver.host.services import failures, oidc_provider
from kohakuriver.host.services.oidc import EVERYBODY, TRY_SECONDS, Rules
from kohakuriver.host.services.oidc_provider import LEEWAY, LONGEST_ANSWER, Provider
from kohakuriver.limits import Limits
from tests.support.browser import Browser
from tests.support.host_only import HostUnderTest, a_host
from tests.support.openid import FakeProvider, a_fake_provider, a_visitor, another_key, start_of

Run = Callable[[Coroutine[Any, Any, None]], None]
Check = Callable[[HostUnderTest, FakeProvider], Coroutine[Any, Any, None]]

LAB = Rules(frozenset({"lab"}))
MAIL = Rules(domains=frozenset({"uni.example"}))
TRUSTED = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


@contextlib.asynccontextmanager
async def both(
    directory: Path, rules: Rules, limits: Limits | None = None
) -> AsyncIterator[tuple[HostUnderTest, FakeProvider]]:
    async with a_fake_provider() as fake:
        provider = Provider(fake.issuer, "river", "s", trusted=TRUSTED)
        async with a_host(directory, oidc=(provider, rules), limits=limits) as host:
            fake.clock = host.clock
            provider._clock = host.clock
            try:
                yield host, fake
            finally:
                await provider.close()


@pytest.fixture
def on_host(run: Run, tmp_path: Path) -> Callable[..., None]:
    """Run a check with a host and a provider that does as it is told."""

    def go(check: Check, rules: Rules = LAB, limits: Limits | None = None) -> None:
        async def main() -> None:
            async with both(tmp_path, rules, limits) as (host, fake):
                await check(host, fake)

        run(main())

    return go


async def come_in(host: HostUnderTest, fake: FakeProvider, **answer: str) -> tuple[Browser, httpx.Response]:
    browser = a_visitor(host)
    return browser, await browser.open(fake.back(await start_of(browser), **answer), site="cross-site")


async def refused(host: HostUnderTest, fake: FakeProvider, words: str, status: int = 401, **answer: Any) -> None:
    """Nobody comes in, and the page says why in one sentence, and nothing that the provider has said."""
    browser, page = await come_in(host, fake, **answer)
    assert (page.status_code, "kohakuriver-host" in "".join(browser.cookies)) == (status, False), page.text
    assert words in page.text
    assert page.text.count("<p>") == 2  # the sentence, and the way back
    assert await browser.user() is None
    assert [user["name"] for user in (await host.user.get("/api/users")).json()] == ["admin"]


def changed(**claims: Any) -> Callable[[FakeProvider], None]:
    return lambda fake: fake.claims.update(claims)


def signed_by(how: Callable[[FakeProvider, dict[str, Any]], str]) -> Callable[[FakeProvider], None]:
    def prepare(fake: FakeProvider) -> None:
        fake.id_token = lambda claims: how(fake, claims)

    return prepare


def at(offset: float, name: str) -> Callable[[FakeProvider], None]:
    def prepare(fake: FakeProvider) -> None:
        fake.claims[name] = int(fake.clock()) + offset

    return prepare


NOT_SIGNED = "is not signed as it has to be"
BAD_TOKENS: list[tuple[str, Callable[[FakeProvider], None], str]] = [
    ("alg=none", signed_by(FakeProvider.unsigned), NOT_SIGNED),
    ("HS256 with the public key", signed_by(FakeProvider.with_the_public_key_as_a_secret), NOT_SIGNED),
    ("a key in its own head", signed_by(FakeProvider.by_a_key_of_its_own), NOT_SIGNED),
    ("another's key", signed_by(lambda fake, claims: fake.signed(claims, another_key("1"))), NOT_SIGNED),
    ("another's signature", signed_by(lambda fake, claims: fake.signed(claims)[:-8] + "AAAAAAAA"), NOT_SIGNED),
    ("no token", signed_by(lambda fake, claims: "a.b"), NOT_SIGNED),
    ("claims that are none", signed_by(lambda fake, claims: fake.signed_text("[1]")), NOT_SIGNED),
    ("nothing", lambda fake: fake.raw.update(token=JSONResponse({"access_token": "a"})), "sent no ID token"),
    ("groups without an end", changed(groups=["x" * 100] * 2000), "too large"),
    ("another issuer", changed(iss="https://evil.example"), "another issuer&#x27;s"),
    ("no issuer", changed(iss=None), "another issuer&#x27;s"),
    ("another audience", changed(aud="others"), "for another client"),
    ("two audiences and no azp", changed(aud=["river", "others"]), "for another client"),
    ("another azp", changed(aud=["river", "others"], azp="others"), "for another client"),
    ("no audience", changed(aud=None), "for another client"),
    ("another nonce", changed(nonce="n"), "for another login"),
    ("no nonce", changed(nonce=None), "for another login"),
    ("expired", at(-LEEWAY - 1, "exp"), "time is over"),
    ("no end", changed(exp=None), "not complete"),
    ("an end that is no time", changed(exp="later"), "not complete"),
    ("from the future", at(LEEWAY + 1, "iat"), "compare the clocks"),
    ("not yet good", at(LEEWAY + 1, "nbf"), "compare the clocks"),
    ("no subject", changed(sub=None), "not complete"),
    ("an empty subject", changed(sub=""), "without a subject"),
    ("a subject that is too long", changed(sub="x" * 256), "without a subject"),
    ("a subject that is a number", changed(sub=1), "not complete"),
    ("another token's at_hash", changed(at_hash="AAAA"), "not the one that belongs to this login"),
]


def test_an_id_token_that_is_not_good_lets_nobody_in(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest, fake: FakeProvider) -> None:
        for what, prepare, words in BAD_TOKENS:
            fake.as_before()
            prepare(fake)
            try:
                await refused(host, fake, words)
            except AssertionError as error:
                raise AssertionError(f"with {what}") from error
        fake.as_before()
        browser, _ = await come_in(host, fake)
        assert await browser.user() == "ann"

    on_host(check, limits=Limits(max_requests=0, max_failures=0))


def test_clocks_may_differ_by_a_minute(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest, fake: FakeProvider) -> None:
        now = int(host.clock())
        for claims in ({"exp": now - LEEWAY + 1}, {"iat": now + LEEWAY, "nbf": now + LEEWAY}):
            fake.claims |= claims
            browser, _ = await come_in(host, fake)
            assert await browser.user() == "ann"
            for name in claims:
                del fake.claims[name]

    on_host(check)


def test_a_provider_that_signs_with_new_keys_is_asked_for_them_but_not_for_each_that_somebody_names(
    on_host: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(host: HostUnderTest, fake: FakeProvider) -> None:
        fake.about["id_token_signing_alg_values_supported"] = ["RS256", "ES256", "none", "HS256"]
        await come_in(host, fake)
        fake.keys = [*fake.keys, ECKey.generate_key("P-256", {"kid": "2", "alg": "ES256"})]
        monkeypatch.setattr(oidc_provider, "AGAIN_SECONDS", 0.0)
        browser, _ = await come_in(host, fake)
        assert await browser.user() == "ann"
        monkeypatch.setattr(oidc_provider, "AGAIN_SECONDS", 10.0)
        asked = sum(path == "jwks" for path, _ in fake.asked)
        fake.keys = [*fake.keys, another_key("3")]
        for _ in range(3):
            assert NOT_SIGNED in (await come_in(host, fake))[1].text
        assert sum(path == "jwks" for path, _ in fake.asked) == asked
        for trick in (fake.unsigned, fake.with_the_public_key_as_a_secret):
            fake.id_token = trick  # its configuration does name these
            assert NOT_SIGNED in (await come_in(host, fake))[1].text

    on_host(check)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"state": "x"}, "has begun no such login here"),
        ({"iss": "https://evil.example"}, "the answer is another provider&#x27;s"),
        ({"error": "access_denied"}, "logged nobody in (access_denied)"),
        ({"error": "<b>pay me</b>", "error_description": "pay me"}, "logged nobody in (no reason given)"),
        ({"code": ""}, "logged nobody in"),
    ],
    ids=str,
)
def test_an_answer_by_way_of_the_browser_that_is_not_good_lets_nobody_in(
    on_host: Callable[..., None], answer: dict[str, Any], words: str
) -> None:
    async def check(host: HostUnderTest, fake: FakeProvider) -> None:
        await refused(host, fake, words, **answer)
        assert not any(path == "token" for path, _ in fake.asked)

    on_host(check)


def test_a_provider_that_names_itself_in_its_answers_has_to(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest, fake: FakeProvider) -> None:
        fake.about["authorization_response_iss_parameter_supported"] = True
        await refused(host, fake, "another provider&#x27;s")
        browser, _ = await come_in(host, fake, iss=fake.issuer)
        assert await browser.user() == "ann"

    on_host(check)


def test_what_is_said_twice_in_an_answer_counts_for_nothing(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest, fake: FakeProvider) -> None:
        browser = a_visitor(host)
        back = fake.back(await start_of(browser))
        assert (await browser.open(f"{back}&state=x", site="cross-site")).status_code == 401

    on_host(check)


@pytest.mark.parametrize("how", [{"Sec-Fetch-Dest": "iframe"}, {"Sec-Purpose": "prefetch"}])
def test_no_login_ends_where_no_user_sees_it(on_host: Callable[..., None], how: dict[str, str]) -> None:
    async def check(host: HostUnderTest, fake: FakeProvider) -> None:
        browser = a_visitor(host)
        back = fake.back(await start_of(browser))
        assert (await browser.open(back, site="cross-site", **how)).status_code == 403
        assert await browser.user() is None
        assert (await browser.open("/login/oidc/back?state=x&code=x", site="cross-site")).status_code == 401
        assert (await browser.open(back, site="cross-site")).status_code == 303  # neither has ended it

    on_host(check)


def test_a_login_of_another_browser_a_used_one_and_an_old_one_let_nobody_in(on_host: Callable[..., None]) -> None:
    """Login CSRF: mallory has begun a login, and sends ann to where it ends."""

    async def check(host: HostUnderTest, fake: FakeProvider) -> None:
        mallory, ann = a_visitor(host), a_visitor(host)
        back = fake.back(await start_of(mallory))
        assert "has begun no such login" in (await ann.open(back, site="cross-site")).text
        await start_of(ann)
        assert "has begun no such login" in (await ann.open(back, site="cross-site")).text
        assert await ann.user() is None
        # A page of another name in the domain sets a cookie beside ours, or one that has no TLS behind it.
        ((name, kept),) = mallory.cookies.items()
        for cookies in (f"{name}={kept}; {name}=1.a.b.c.", f"{name.removeprefix('__Host-')}={kept}"):
            headers = {"Host": ann.authority, "Cookie": cookies}
            assert (await host.nobody.get(back, headers=headers)).status_code == 401
        assert (await mallory.open(back, site="cross-site")).status_code == 303
        assert "has begun no such login" in (await mallory.open(back, site="cross-site")).text
        late = a_visitor(host)
        back = fake.back(await start_of(late))
        host.clock.now += TRY_SECONDS
        assert "took too long" in (await late.open(back, site="cross-site")).text

    on_host(check)


def test_a_login_ends_the_one_that_the_browser_had_before(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest, fake: FakeProvider) -> None:
        before = a_visitor(host)
        await before.log_in(host.admin_token)
        browser = a_visitor(host)
        browser.cookies = dict(before.cookies)
        await browser.open(fake.back(await start_of(browser)), site="cross-site")
        assert [await browser.user(), await before.user()] == ["ann", None]

    on_host(check)


@pytest.mark.parametrize("sender", [{"site": "cross-site"}, {"site": "same-site"}, {"origin": "https://evil.example"}])
def test_no_other_page_begins_a_login(on_host: Callable[..., None], sender: dict[str, Any]) -> None:
    async def check(host: HostUnderTest, fake: FakeProvider) -> None:
        browser = a_visitor(host)
        answer = await browser.ask("POST", "/login/oidc", data={"next": ""}, **sender)
        assert (answer.status_code, browser.cookies, fake.asked) == (403, {}, [])

    on_host(check)


def test_without_tls_the_provider_is_not_gone_to_and_hears_of_no_name_of_the_host(
    on_host: Callable[..., None],
) -> None:
    async def check(host: HostUnderTest, fake: FakeProvider) -> None:
        browser = Browser(host)
        answer = await browser.ask("POST", "/login/oidc", data={"next": ""})
        assert (answer.status_code, browser.cookies, fake.asked) == (400, {}, [])
        assert "https://" in answer.text
        assert host.logins.name not in answer.text

    on_host(check)


BROKEN = {
    "no configuration": (Response(status_code=404, content=b"{}"), "has no OpenID configuration (HTTP status 404)"),
    "no JSON": (Response(b"<html>"), "answers what is no JSON object"),
    "deep JSON": (Response(b"[" * 100_000), "answers what is no JSON object"),
    "no object": (JSONResponse([]), "answers what is no JSON object"),
    "too much": (Response(b"{" + b" " * LONGEST_ANSWER + b"}"), "answers more than it may"),
    "a redirect": (Response(status_code=302, content=b"{}", headers={"Location": "/x"}), "HTTP status 302"),
    "another issuer": (JSONResponse({"issuer": "https://evil.example"}), "is not what --oidc-issuer says"),
    "packed": (Response(b"\x1f\x8b", headers={"Content-Encoding": "gzip"}), "answers what is no JSON object"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_provider_that_can_not_be_used_is_told_of_in_one_sentence(on_host: Callable[..., None], what: str) -> None:
    answer, words = BROKEN[what]

    async def check(host: HostUnderTest, fake: FakeProvider) -> None:
        fake.raw[".well-known/openid-configuration"] = answer
        browser = a_visitor(host)
        for _ in range(3):
            page = await browser.ask("POST", "/login/oidc", data={"next": ""})
            assert (page.status_code, browser.cookies) == (503, {})
            assert words in page.text
        assert len(fake.asked) == 1  # strangers who press the button do not have it asked each time
        assert (await browser.log_in(host.admin_token)).status_code == 303

    on_host(check)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("token_endpoint", "http://id.example/token"),
        ("jwks_uri", None),
        ("userinfo_endpoint", "ftp://x"),
        ("end_session_endpoint", "javascript:alert(1)"),
        ("id_token_signing_alg_values_supported", "RS256"),
    ],
)
def test_a_configuration_that_leads_past_tls_or_says_too_little_is_not_gone_by(
    on_host: Callable[..., None], name: str, value: object
) -> None:
    async def check(host: HostUnderTest, fake: FakeProvider) -> None:
        fake.about = {key: each for key, each in {**fake.about, name: value}.items() if each is not None}
        page = await a_visitor(host).ask("POST", "/login/oidc", data={"next": ""})
        assert page.status_code == 503
        assert "has an OpenID configuration that can&#x27;t be used" in page.text

    on_host(check)


@pytest.mark.parametrize("where", ["token", "jwks"])
@pytest.mark.parametrize(
    ("answer", "words", "status"),
    [
        (Response(b"{" + b" " * LONGEST_ANSWER + b"}"), "answers more than it may", 503),
        (Response(b"no"), "no JSON object", 503),
        (JSONResponse({"error": "invalid_grant", "keys": 1}, 400), "(invalid_grant)", 401),
    ],
    ids=["huge", "no JSON", "refused"],
)
def test_a_bad_answer_of_a_provider_in_the_middle_of_a_login_lets_nobody_in(
    on_host: Callable[..., None], where: str, answer: Response, words: str, status: int
) -> None:
    async def check(host: HostUnderTest, fake: FakeProvider) -> None:
        fake.raw[where] = answer
        bad_keys = where == "jwks" and status == 401
        await refused(host, fake, "shows no keys" if bad_keys else words, 503 if bad_keys else status)

    on_host(check)


def test_a_provider_that_is_slow_or_away_holds_up_nobody_else(
    on_host: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(host: HostUnderTest, fake: FakeProvider) -> None:
        browser = a_visitor(host)
        back = fake.back(await start_of(browser))
        fake.held = asyncio.Event()
        waiting = asyncio.ensure_future(browser.open(back, site="cross-site"))
        other = a_visitor(host)
        assert (await other.log_in(host.admin_token)).status_code == 303  # meanwhile
        page = await waiting
        fake.held.set()
        assert page.status_code == 503
        assert "does not answer in time" in page.text

    monkeypatch.setattr(oidc_provider, "ANSWER_SECONDS", 0.5)
    on_host(check)


def test_a_provider_that_is_not_there_is_told_of_and_found_again_when_it_is(
    run: Run, tmp_path: Path, unused_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        provider = Provider(f"http://127.0.0.1:{unused_port}", "river", None, trusted=TRUSTED)
        async with a_host(tmp_path, oidc=(provider, LAB)) as host:
            page = await a_visitor(host).ask("POST", "/login/oidc", data={"next": ""})
            assert page.status_code == 503
            assert (
                f"The OpenID provider 127.0.0.1:{unused_port} can&#x27;t be reached: Connection refused." in page.text
            )
            await provider.close()

    run(check())


def test_many_logins_of_one_address_that_wait_for_the_provider_keep_out_no_other_address(
    on_host: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(host: HostUnderTest, fake: FakeProvider) -> None:
        browser = a_visitor(host)
        back = fake.back(await start_of(browser))
        fake.held = asyncio.Event()
        kept = dict(browser.cookies)
        waiting = []
        for _ in range(3):
            each = a_visitor(host)
            each.cookies = dict(kept)
            waiting.append(asyncio.ensure_future(each.open(back, site="cross-site")))
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        assert [each.result().status_code for each in done] == [503]
        assert "Too many logins wait" in next(iter(done)).result().text
        fake.held.set()
        await asyncio.wait(waiting)

    monkeypatch.setattr(oidc_provider, "MOST_OF_ONE", 2)
    on_host(check)


def test_answers_that_are_not_good_are_answered_ever_later(
    on_host: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "LONGEST_WAIT", 0.0)

    async def check(host: HostUnderTest, fake: FakeProvider) -> None:
        answers = await asyncio.gather(*(a_visitor(host).open("/login/oidc/back?state=x&code=x") for _ in range(30)))
        assert {answer.status_code for answer in answers} == {401}
        fake.raw["token"] = JSONResponse({"error": "invalid_grant"}, 400)
        browsers = [a_visitor(host) for _ in range(12)]
        backs = [fake.back(await start_of(browser)) for browser in browsers]
        tries = (browser.open(back, site="cross-site") for browser, back in zip(browsers, backs, strict=True))
        assert 429 in {answer.status_code for answer in await asyncio.gather(*tries)}

    on_host(check, limits=Limits(max_requests=0, max_failures=1))


# -- who may come in -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "claims", "role"),
    [
        (LAB, {"groups": ["lab"]}, "user"),
        (LAB, {"groups": "lab"}, "user"),
        (LAB, {"groups": ["Lab", "lab2", ["lab"], None]}, None),
        (LAB, {"groups": {"lab": 1}}, None),
        (LAB, {"groups": 7}, None),
        (LAB, {}, None),
        (Rules(frozenset({"lab"}), admins=frozenset({"wheel"})), {"groups": ["wheel"]}, "admin"),
        (Rules(frozenset({"lab"}), claim="roles"), {"roles": ["lab"]}, "user"),
        (Rules(frozenset({"lab"}), claim="roles"), {"groups": ["lab"]}, None),
        (Rules(frozenset({EVERYBODY})), {}, "user"),
        (LAB, {"groups": [EVERYBODY]}, None),
        (MAIL, {"email": "ann@uni.example", "email_verified": True}, "user"),
        (MAIL, {"email": "ann@UNI.example", "email_verified": True}, "user"),
        (MAIL, {"email": "ann@uni.example", "email_verified": False}, None),
        (MAIL, {"email": "ann@uni.example", "email_verified": "true"}, None),
        (MAIL, {"email": "ann@uni.example"}, None),
        (MAIL, {"email": "ann@x.uni.example", "email_verified": True}, None),
        (MAIL, {"email": "ann@evil.example@uni.example", "email_verified": True}, None),
        (MAIL, {"email": "@uni.example", "email_verified": True}, None),
        (MAIL, {"email": ["ann@uni.example"], "email_verified": True}, None),
        (Rules(frozenset({"lab"}), MAIL.domains), {"groups": ["lab"], "email": "a@b", "email_verified": True}, None),
        (Rules(frozenset({"lab"}), MAIL.domains), {"email": "a@uni.example", "email_verified": True}, None),
    ],
    ids=str,
)
def test_who_may_come_in_is_whom_the_rules_name(rules: Rules, claims: dict[str, Any], role: str | None) -> None:
    if role is None:
        with pytest.raises(NotAllowedError, match=r"^You are logged in at the provider, but that account .*\.$"):
            rules.role(claims)
    else:
        assert rules.role(claims) == role


def test_an_address_that_the_provider_has_not_verified_lets_nobody_in(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest, fake: FakeProvider) -> None:
        fake.claims |= {"email": "ann@uni.example", "email_verified": False}
        await refused(host, fake, "has not verified", 403)

    on_host(check, MAIL)


def test_what_the_id_token_does_not_say_is_asked_for_and_has_to_be_of_the_same_subject(
    on_host: Callable[..., None],
) -> None:
    async def check(host: HostUnderTest, fake: FakeProvider) -> None:
        fake.about["userinfo_endpoint"] = f"{fake.issuer}/userinfo"
        fake.claims = {"sub": "1", "email": "ann@elsewhere.example"}
        verified = {"email": "ann@uni.example", "email_verified": True}
        for told in ({"sub": "2", **verified}, verified):
            fake.userinfo = told
            await refused(host, fake, "tells of another one")
        fake.userinfo = {"sub": "1", "email_verified": True}  # of which address?
        await refused(host, fake, "no e-mail address", 403)
        fake.userinfo = {"sub": "1", **verified}
        browser, _ = await come_in(host, fake)
        assert await browser.user() == "ann"

    on_host(check, MAIL)


def test_a_user_is_called_as_they_are_there_as_far_as_a_user_can_be(on_host: Callable[..., None]) -> None:
    called: list[tuple[dict[str, Any], str]] = [
        ({"preferred_username": "Ann.Lee@uni.example"}, "ann.lee"),
        ({"preferred_username": "Zoë Müller"}, "zoe-muller"),
        ({"preferred_username": "@@", "email": "bob@x"}, "bob"),
        ({"preferred_username": "山田"}, "user"),
        ({"preferred_username": "-._"}, "user-2"),
        ({"preferred_username": "anonymous"}, "anonymous-2"),
        ({"preferred_username": "../etc"}, "etc"),
        ({"preferred_username": ["ann"], "name": "x" * 200}, "x" * 50),
        ({}, "user-3"),
    ]

    async def check(host: HostUnderTest, fake: FakeProvider) -> None:
        for number, (claims, name) in enumerate(called):
            fake.claims = {"sub": f"{number}", "groups": ["lab"], **claims}
            browser, _ = await come_in(host, fake)
            assert await browser.user() == name

    on_host(check)


# -- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"oidc_issuer": "https://id.example"}, "needs --oidc-client-id"),
        ({"oidc_client_id": "river"}, "no use without --oidc-issuer"),
        ({"oidc_allowed_groups": ["lab"]}, "no use without --oidc-issuer"),
        ({"oidc_issuer": "http://id.example", "oidc_client_id": "river"}, "takes a URL like https://"),
        ({"oidc_issuer": "https://id.example?x=1", "oidc_client_id": "river"}, "takes a URL like https://"),
        ({"oidc_issuer": "https://id.example", "oidc_client_id": "river"}, "who may come in"),
        (
            {"oidc_issuer": "https://i", "oidc_client_id": "r", "oidc_client_secret_file": Path("/none/such")},
            "can't be read from /none/such",
        ),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused_in_one_sentence(given: dict[str, Any], words: str) -> None:
    async def start() -> None:
        options = HostOptions(Path(), **given)
        if provider := provider_of(options):
            await provider.close()
            rules_of(options)

    with pytest.raises(UsageError) as told:
        asyncio.run(start())
    assert words in told.value.message
    assert told.value.message.count(". ") == 0


def test_a_host_without_the_packages_for_it_says_which_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "kohakuriver.host.services.oidc_provider")
    monkeypatch.setitem(sys.modules, "authlib.common.security", None)
    options = HostOptions(Path(), oidc_issuer="https://i", oidc_client_id="r", oidc_allowed_groups=["x"])
    with pytest.raises(UsageError, match=r"needs the Python package 'authlib': install .* the extra 'oidc'\.$"):
        provider_of(options)


def test_a_secret_that_others_may_read_is_taken_and_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "secret"
    file.write_text("s\n")
    file.chmod(0o644)
    options = HostOptions(
        tmp_path, oidc_issuer="https://i", oidc_client_id="r", oidc_client_secret_file=file, oidc_allowed_groups=["x"]
    )

    async def start() -> None:
        provider = provider_of(options)
        assert provider is not None
        await provider.close()

    asyncio.run(start())
    assert "may read the OpenID client's secret" in capsys.readouterr().out
    assert json.dumps("s\n") not in repr(options)
