"""`kohakuriver init tls`: an authority and certificates that work, and what is said about them."""

from __future__ import annotations

import json
import ssl
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from kohakuriver.cli import main, pki
from kohakuriver.cli.pki import Authority
from kohakuriver.errors import UsageError
from kohakuriver.tls import ServerCertificate, client_context, reason
from tests.support.handshakes import shaken


def init(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    with pytest.raises(SystemExit) as ended:
        main.main(["init", "tls", *arguments])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def made(capsys: pytest.CaptureFixture[str], directory: Path, *arguments: str) -> dict[str, Any]:
    code, out, _ = init(capsys, "--directory", str(directory), "--json", *arguments)
    assert code == 0
    answer: dict[str, Any] = json.loads(out)
    return answer


def handshake(cert: str, key: str, ca: str, name: str) -> None:
    """A handshake in memory between a server with that certificate and a client that trusts that authority."""
    context = client_context("https:", ca)
    assert context is not None
    if hasattr(ssl, "VERIFY_X509_STRICT"):  # the default of newer Pythons
        context.verify_flags |= ssl.VERIFY_X509_STRICT
    shaken(ServerCertificate(Path(cert), Path(key)).context, context, name)


def test_every_machine_gets_a_certificate_for_all_its_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = made(capsys, tmp_path, "host.lab,10.0.0.1,fd00::1", "node1.lab")
    assert [each["names"] for each in answer["certificates"]] == [["host.lab", "10.0.0.1", "fd00::1"], ["node1.lab"]]
    host = answer["certificates"][0]
    for name in host["names"]:
        handshake(host["cert"], host["key"], answer["ca"], name)
    with pytest.raises(ssl.SSLCertVerificationError) as refused:
        handshake(host["cert"], host["key"], answer["ca"], "node1.lab")
    assert "for another name" in (reason(refused.value) or "")


def test_run_again_it_keeps_its_authority_so_that_nobody_needs_a_new_ca_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = made(capsys, tmp_path, "host.lab")
    authority = Path(first["ca"]).read_bytes()
    before = Path(first["certificates"][0]["cert"]).read_bytes()
    again = made(capsys, tmp_path, "node2.lab", "host.lab")
    assert Path(again["ca"]).read_bytes() == authority
    assert Path(first["certificates"][0]["cert"]).read_bytes() != before
    for each in again["certificates"]:
        handshake(each["cert"], each["key"], first["ca"], each["names"][0])


def test_keys_are_their_owners_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(capsys, tmp_path, "host.lab")
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"ca.pem": 0o644, "ca.key": 0o600, "host.lab.pem": 0o644, "host.lab.key": 0o600}


def test_without_names_it_is_for_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = made(capsys, tmp_path)
    [own] = answer["certificates"]
    handshake(own["cert"], own["key"], answer["ca"], "localhost")
    handshake(own["cert"], own["key"], answer["ca"], "127.0.0.1")


def test_it_says_which_file_goes_where_and_how_to_use_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = init(capsys, "--directory", str(tmp_path / "new"), "host.lab", "node1.lab")
    assert (code, err) == (0, "")
    assert f"{tmp_path / 'new' / 'ca.key'}: its key. Keep it off the cluster" in out
    for part in (
        "kohakuriver host --tls-cert host.lab.pem --tls-key host.lab.key --ca-file ca.pem",
        "`kohakuriver token create node1 --node node1`",
        "--name node1 --host-url https://host.lab:8000 --advertise-url https://node1.lab:8001 --tls-cert node1.lab.pem",
        "kohakuriver auth login --host https://host.lab:8000 --ca-file ca.pem",
    ):
        assert part in out


def test_run_again_it_takes_no_machine_for_the_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(capsys, tmp_path, "host.lab")
    _, out, _ = init(capsys, "--directory", str(tmp_path), "node2.lab", "*.rack.lab")
    assert "kohakuriver host " not in out
    assert "replace its two files" in out
    for node, name in (("node2.lab", "node2"), ("NAME.rack.lab", "NAME")):
        assert f"--name {name} --host-url https://HOST:8000 --advertise-url https://{node}:8001" in out


@pytest.mark.parametrize("name", ["a b", "host.lab,", "", "-x.lab", "a..b", "x" * 64 + ".lab"])
def test_what_is_no_name_is_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    directory = tmp_path / "new"
    code, out, err = init(capsys, "--directory", str(directory), "--", "host.lab", name)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert not directory.exists()


@pytest.mark.parametrize("machines", [["ca"], ["host.lab", "CA,10.0.0.1"], ["a", "b", "A"], ["a::b", "a__b"]])
def test_no_machine_gets_files_that_are_anothers_or_the_authoritys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], machines: list[str]
) -> None:
    authority = Path(made(capsys, tmp_path, "host.lab")["ca"])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    code, out, err = init(capsys, "--directory", str(tmp_path), *machines)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "another" in err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert authority in before


def test_a_certificate_of_a_server_is_no_authority(tmp_path: Path) -> None:
    made = Authority(tmp_path).issue(["host.lab"], 1)
    made.cert.replace(tmp_path / "ca.pem")
    made.key.replace(tmp_path / "ca.key")
    with pytest.raises(UsageError, match="not the certificate of an authority"):
        Authority(tmp_path)


def test_no_certificate_outlives_its_authority_and_one_that_has_run_out_signs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pki, "AUTHORITY_DAYS", 10)
    short = Authority(tmp_path / "short").issue(["host.lab"], 825)
    assert short.expires <= datetime.now(timezone.utc) + timedelta(days=10)
    monkeypatch.setattr(pki, "AUTHORITY_DAYS", 0)
    with pytest.raises(UsageError, match="has run out"):
        Authority(tmp_path / "over")


def test_half_an_authority_is_none(tmp_path: Path) -> None:
    Authority(tmp_path).key.rename(tmp_path / "kept-elsewhere")
    with pytest.raises(UsageError, match=r"ca\.key is missing"):
        Authority(tmp_path)


def test_the_key_must_be_the_authoritys_own(tmp_path: Path) -> None:
    Authority(tmp_path / "a")
    other = Authority(tmp_path / "b")
    other.key.replace(tmp_path / "a" / "ca.key")
    with pytest.raises(UsageError, match="is not the key of"):
        Authority(tmp_path / "a")
    (tmp_path / "a" / "ca.key").write_text("no key")
    with pytest.raises(UsageError, match="PEM form"):
        Authority(tmp_path / "a")
