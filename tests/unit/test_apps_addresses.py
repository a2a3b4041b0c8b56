"""How the addresses of apps at a host are called, and which names are none."""

from __future__ import annotations

import pytest

from kohakuriver.errors import UsageError
from kohakuriver.host.apps.addresses import PREFIX_VARIABLE, Addresses, climbs, domain_in, url_in
from kohakuriver.host.apps.serving import where_in
from kohakuriver.host.apps.signed import BEGIN_SECONDS, COOKIE_SECONDS, LONGEST, Signed

KEY = b"k" * 32
LOCAL = "kr-abcdefghijklmnopqrstuvwxyz.localhost"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def local(*, tls: bool = False) -> Addresses:
    return Addresses(KEY, LOCAL, tls=tls)


def in_domain(public: str = "https://river.example.org") -> Addresses:
    return Addresses(KEY, LOCAL, tls=True, domain="apps.example.org", public=url_in(public))


def test_on_ones_own_machine_an_app_is_right_under_localhost() -> None:
    address = local().of(7, "lab", 8888, f"{LOCAL}:8000")
    assert address
    assert address.host == f"lab-8888-{local().tag(7, 8888)}.localhost:8000"
    assert address.place.origin == f"http://{address.host}"
    assert address.place.inner_host == "localhost:8888"
    assert local().read(address.host) == address
    assert local().main(address) == f"http://{LOCAL}:8000"


def test_under_a_domain_it_has_the_hosts_scheme_and_port() -> None:
    for public, host, scheme in (
        ("https://river.example.org", "", "https"),
        ("https://river.example.org:8443", ":8443", "https"),
        ("http://river.example.org", "", "http"),
    ):
        addresses = in_domain(public)
        address = addresses.of(7, "lab", 8888, "10.0.0.1:8000")
        assert address
        assert address.place.origin == f"{scheme}://lab-8888-{addresses.tag(7, 8888)}.apps.example.org{host}"
        assert addresses.read(address.host) == address
        assert addresses.main(address) == public


def test_another_task_or_port_has_another_address_whatever_it_is_called() -> None:
    hosts = {local().of(task, "lab", port, LOCAL) for task in (1, 2) for port in (80, 81)}
    assert len(hosts) == 4
    assert Addresses(b"x" * 32, LOCAL, tls=False).tag(1, 80) != local().tag(1, 80)


@pytest.mark.parametrize("name", ["l" * 60, "Lab", "la_b", "lab.one", None, "12", "xn--lab"])
def test_a_name_that_can_not_stand_in_an_address_is_the_tasks_id_there(name: str | None) -> None:
    address = local().of(7, name, 65535, LOCAL)
    assert address
    assert address.label == "7"
    longest = local().of(7, "l" * 44, 65535, LOCAL)
    assert longest
    assert longest.label == "l" * 44
    assert len(longest.name.partition(".")[0]) == 63


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "river.localhost", "10.0.0.1", "kr-x.localhost"])
def test_from_elsewhere_no_browser_gets_to_names_under_localhost(host: str) -> None:
    assert local().of(7, "lab", 8888, host) is None
    assert local(tls=True).of(7, "lab", 8888, LOCAL) is None


@pytest.mark.parametrize(
    "host",
    [
        "lab-8888-abcdefghijkl.localhost.:8000",
        "lab-08888-abcdefghijkl.localhost:8000",
        "lab-88888-abcdefghijkl.localhost:8000",
        "lab-8888-abcdefghijk1.localhost:8000",
        "lab-8888-abcdefghijkl.localhost:08000",
        "lab-8888-abcdefghijkl.localhost:80",
        "lab-8888-abcdefghijkl.localhost:",
        "x.lab-8888-abcdefghijkl.localhost:8000",
        "-8888-abcdefghijkl.localhost:8000",
        "xn--lab-8888-abcdefghijkl.localhost:8000",
        "lab-8888-abcdefghijkl.localhost:8000, x",
        "x@lab-8888-abcdefghijkl.localhost:8000",
        "lab-8888-abcdefghijkl.localhost\t",
        "lab-8888.localhost:8000",
        "lab-8888-abcdefghijkl.example.org",
        "",
    ],
)
def test_what_is_not_exactly_an_address_is_none(host: str) -> None:
    assert local().read(host) is None


@pytest.mark.parametrize(
    ("host", "owned"),
    [
        ("lab-8888-abcdefghijkl.localhost:1", True),
        ("LAB-8888-ABCDEFGHIJKL.LOCALHOST", True),
        ("lab-8888-abcdefghijkl.localhost.", True),
        ("lab-8888.localhost:8000", False),
        (f"{LOCAL}:8000", False),
        ("localhost", False),
        ("river.example.org", False),
    ],
)
def test_the_host_serves_no_name_that_is_an_apps(host: str, owned: bool) -> None:
    assert local().owns(host) is owned


@pytest.mark.parametrize(
    ("host", "owned"),
    [
        ("lab-8888.apps.example.org", True),
        ("anything.apps.example.org:99", True),
        ("a.b.apps.example.org.", True),
        ("apps.example.org", True),
        ("Apps.Example.Org:443", True),
        ("river.example.org", False),
        ("xapps.example.org", False),
        ("apps.example.org.evil", False),
    ],
)
def test_all_of_the_domain_is_the_apps(host: str, owned: bool) -> None:
    assert in_domain().owns(host) is owned


def test_the_short_address_under_a_domain_only_leads_on() -> None:
    address = in_domain().read("lab-8888.apps.example.org")
    assert address
    assert (address.label, address.port, address.tag) == ("lab", 8888, "")


def test_a_host_is_not_among_its_apps() -> None:
    for public in ("https://apps.example.org", "https://river.apps.example.org"):
        with pytest.raises(UsageError, match="another domain"):
            in_domain(public)


@pytest.mark.parametrize("text", ["", "apps", "a..b", "apps.example.org/", "x y.org", "apps.localhost", "-a.org", "*."])
def test_what_is_no_domain_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--apps-domain"):
        domain_in(text)


@pytest.mark.parametrize(
    "text", ["", "river", "ftp://x.org", "https://", "https://x.org/a", "https://u@x.org", "https://x:y"]
)
def test_what_is_no_url_of_a_host_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--public-url"):
        url_in(text)


def test_where_the_host_is_its_certificate_says_too() -> None:
    names = ["*.apps.example.org", "apps.example.org", "10.0.0.1", "river.example.org"]
    where = where_in("*.Apps.example.org", None, names, 8443)
    assert where.public
    assert (where.domain, where.public.geturl()) == ("apps.example.org", "https://river.example.org:8443")
    assert list(where.names) == ["river.example.org"]
    assert where_in(None, None, names, 8443).domain is None
    with pytest.raises(UsageError, match="--public-url"):
        where_in("apps.example.org", None, ["*.apps.example.org"], 443)


def test_what_a_browser_keeps_is_good_for_what_it_was_signed_for() -> None:
    clock = Clock()
    signed = Signed(KEY, clock=clock)
    shown = signed.admit("lab:1", "digest", 7, 8888)
    admission = signed.admission(shown)
    assert admission
    assert (admission.address, admission.browser, admission.task_id, admission.port) == ("lab:1", "digest", 7, 8888)
    assert signed.is_good(admission)
    assert not signed.is_old(admission)
    clock.now += COOKIE_SECONDS - 1
    assert signed.is_good(admission)
    assert signed.is_old(admission)
    clock.now += 1
    assert not signed.is_good(admission)
    assert signed.admission(shown) == admission
    assert Signed(b"x" * 32).admission(shown) is None
    for other in (shown[:-2], shown + "x", signed.begin("lab:1"), "", "a.b.c"):
        assert signed.admission(other) is None
    begin = signed.begin("lab:1")
    assert signed.begins(begin, "lab:1")
    assert not signed.begins(begin, "lab:2")
    assert not signed.begins(shown, "lab:1")
    clock.now += BEGIN_SECONDS
    assert not signed.begins(begin, "lab:1")


def test_of_a_cookie_that_comes_again_the_signature_is_checked_once_and_the_time_always(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    signed = Signed(KEY, clock=clock)
    shown = signed.admit("lab:1", "digest", 7, 8888)
    first = signed.admission(shown)
    monkeypatch.setattr("jwt.decode", lambda *_, **__: pytest.fail("it was looked at before"))
    assert (again := signed.admission(shown)) is first
    assert again
    assert signed.is_good(again)
    clock.now += COOKIE_SECONDS
    assert not signed.is_good(again)
    assert signed.admission("x" * (LONGEST + 1)) is None


def test_addresses_that_were_read_before_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kohakuriver.host.apps.addresses.MOST_KNOWN", 2)
    addresses = in_domain()
    for _ in range(2):
        for label in ("a", "b", "c"):
            found = addresses.read(f"{label}-80.apps.example.org")
            assert found
            assert (found.label, found.host) == (label, f"{label}-80.apps.example.org")
    assert addresses.read("a-80.apps.example.org:1") is None


# -- one origin for all apps -----------------------------------------------------------------------------------------


def under_one(url: str = "https://apps.example.org", public: str = "https://river.example.org") -> Addresses:
    return Addresses(KEY, LOCAL, tls=True, public=url_in(public), shared=url_in(url))


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://apps.example.org", "apps.example.org"),
        ("https://Apps.Example.org:443/", "apps.example.org"),
        ("https://apps.example.org:8443", "apps.example.org:8443"),
        ("https://river.example.org:8443", "river.example.org:8443"),
        ("https://10.0.0.7:8443", "10.0.0.7:8443"),
        ("https://[fd00::7]:8443", "[fd00::7]:8443"),
    ],
)
def test_under_one_origin_an_app_has_a_path_of_its_own(url: str, host: str) -> None:
    addresses = under_one(url)
    address = addresses.of(7, "lab", 8888, "10.0.0.1:8000")
    assert address
    tag = addresses.tag(7, 8888)
    assert address.key == f"{host}/lab-{tag}/8888"
    assert address.place.url == f"https://{host}/lab-{tag}/8888/"
    assert addresses.owns(host)
    for target in (b"/", b"/x/../y", b"?x", b""):
        assert addresses.read(host, address.prefix.encode() + target) == address
    assert addresses.named(address.key) == address
    assert addresses.main(address) == "https://river.example.org"
    assert not addresses.on_own_machine


@pytest.mark.parametrize(
    "host", ["apps.example.org:8000", "apps.example.org:443", "apps.example.org.", "river.example.org", "x", ""]
)
def test_only_the_very_origin_of_the_apps_has_addresses(host: str) -> None:
    address = under_one().of(7, "lab", 8888, "")
    assert address
    assert under_one().read(host, address.prefix.encode()) is None
    assert under_one().read("APPS.example.org", address.prefix.encode()) == address


def test_all_ports_of_a_task_are_under_what_it_is_told_and_another_task_is_elsewhere() -> None:
    addresses = under_one()
    told = addresses.variables(7, "lab")[PREFIX_VARIABLE]
    for port in (80, 65535):
        address = addresses.of(7, "lab", port, "")
        assert address
        assert address.prefix == f"{told}/{port}"
    assert addresses.variables(8, "lab")[PREFIX_VARIABLE] != told
    assert addresses.variables(7, None)[PREFIX_VARIABLE].startswith("/7-")
    assert in_domain().variables(7, "lab") == {}


@pytest.mark.parametrize(
    "target",
    [
        b"/",
        b"/lab-abcdefghijkl",
        b"/lab-abcdefghijkl/",
        b"/lab-abcdefghijkl/0/",
        b"/lab-abcdefghijkl/08888/",
        b"/lab-abcdefghijkl/65536/",
        b"/lab-abcdefghijkl/8888x",
        b"/lab-abcdefghijkl/8888;/",
        b"/lab-abcdefghijkl/8888%2f",
        b"/lab-abcdefghijk1/8888.",
        b"//lab-abcdefghijkl/8888/",
        b"/./lab-abcdefghijkl/8888/",
        b"/%6cab-abcdefghijkl/8888/",
        b"/LAB-ABCDEFGHIJKL/8888/",
        b"/xn--lab-abcdefghijkl/8888/",
        b"/x/lab-abcdefghijkl/8888/",
        b"/lab\\8888/",
        b"*",
    ],
)
def test_what_does_not_begin_with_exactly_a_prefix_is_no_address(target: bytes) -> None:
    assert under_one().read("apps.example.org", target) is None


@pytest.mark.parametrize(
    "key",
    [
        "apps.example.org",
        "apps.example.org/",
        "apps.example.org/lab-abcdefghijkl/8888/",
        "apps.example.org/lab-abcdefghijkl/8888?x",
        "APPS.example.org/lab-abcdefghijkl/8888",
        "apps.example.org:443/lab-abcdefghijkl/8888",
        "evil.example/lab-abcdefghijkl/8888",
        "/lab-abcdefghijkl/8888",
        "",
    ],
)
def test_only_the_whole_key_names_an_address(key: str) -> None:
    assert under_one().named(key) is None


@pytest.mark.parametrize(
    ("url", "host", "owned"),
    [
        ("https://apps.example.org", "apps.example.org", True),
        ("https://apps.example.org", "APPS.example.org:443", True),
        ("https://apps.example.org", "apps.example.org.", True),
        ("https://apps.example.org", "apps.example.org:8000", True),
        ("https://apps.example.org", "x.apps.example.org", False),
        ("https://apps.example.org", "river.example.org", False),
        ("https://river.example.org:8443", "river.example.org:8443", True),
        ("https://river.example.org:8443", "river.example.org.:8443", True),
        ("https://river.example.org:8443", "river.example.org", False),
        ("https://river.example.org:8443", "river.example.org:443", False),
        ("https://river.example.org:8443", "10.0.0.1:8443", False),
    ],
)
def test_the_host_serves_nothing_where_all_apps_are(url: str, host: str, owned: bool) -> None:
    assert under_one(url).owns(host) is owned


@pytest.mark.parametrize(
    ("url", "public", "why"),
    [
        ("https://river.example.org", "https://river.example.org", "another name or port"),
        ("https://river.example.org:443", "https://River.example.org", "another name or port"),
        ("http://apps.example.org", "https://river.example.org", "must begin with https://"),
        ("https://apps.example.org", "http://river.example.org", "must begin with http://"),
        ("https://example.org", "https://river.example.org", "give another one"),
    ],
)
def test_apps_that_would_not_be_apart_from_the_host_are_refused(url: str, public: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        under_one(url, public)


def test_where_all_apps_are_is_said_in_one_way_and_the_host_is_elsewhere() -> None:
    for text in ("apps.example.org", "https://apps.example.org/x", "https://apps.example.org/?x", "ftp://a.example"):
        with pytest.raises(UsageError, match="as in `--apps-url https://"):
            where_in(None, None, ["river.example.org"], 443, text)
    with pytest.raises(UsageError, match="not both"):
        where_in("apps.example.org", None, ["river.example.org"], 443, "https://apps.example.org")
    with pytest.raises(UsageError, match="--apps-url needs the host's own address"):
        where_in(None, None, ["10.0.0.1"], 443, "https://apps.example.org")
    for url, names, public in (
        ("https://apps.example.org", ["apps.example.org", "river.example.org"], "https://river.example.org:8000"),
        ("https://river.example.org:8443", ["river.example.org"], "https://river.example.org:8000"),
    ):
        where = where_in(None, None, names, 8000, url)
        assert where.public
        assert (where.public.geturl(), where.shared) == (public, url_in(url))
        assert where.shares_name is ("river" in url)
    assert not where_in(None, None, ["river.example.org"], 443).shares_name


@pytest.mark.parametrize(
    ("target", "away"),
    [
        (b"/a/../b", True),
        (b"/a/..", True),
        (b"/a/..?x", True),
        (b"/a/%2e%2E/b", True),
        (b"/a/.%2e/b", True),
        (b"/a/./b", True),
        (b"/a\\..\\b", True),
        (b"/a/...", False),
        (b"/a/..b/.c", False),
        (b"/a?x=/../b", False),
    ],
)
def test_a_path_that_leads_elsewhere_is_known(target: bytes, away: bool) -> None:
    assert climbs(target) is away
