"""How the addresses of apps at a host are called, and which names are none."""

from __future__ import annotations

import pytest

from kohakuriver.errors import UsageError
from kohakuriver.host.apps.addresses import Addresses, domain_in, url_in
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
    assert (admission.host, admission.browser, admission.task_id, admission.port) == ("lab:1", "digest", 7, 8888)
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
