"""The files by which OpenSSH knows our tasks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kohakuriver.cli import ssh_files
from kohakuriver.cli.ssh_names import alias
from kohakuriver.errors import KohakuRiverError, UsageError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX file modes and links")

BEFORE = "# mine\nHost other\n    User me\n"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KOHAKURIVER_CONFIG_DIR", str(tmp_path / "config dir"))
    monkeypatch.delenv("KOHAKURIVER_HOST", raising=False)
    return tmp_path


def ssh_says(home: Path, name: str) -> dict[str, str]:
    """What OpenSSH makes of the user's configuration for a host."""
    done = subprocess.run(
        ["ssh", "-F", str(home / ".ssh/config"), "-G", name], capture_output=True, text=True, check=True
    )
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)


def test_installing_adds_one_line_to_the_users_configuration_and_uninstalling_takes_it_back(home: Path) -> None:
    config = home / ".ssh" / "config"
    config.parent.mkdir()
    config.write_text(BEFORE)
    config.chmod(0o640)
    path = ssh_files.install(["web"])
    ssh_files.install(["web", "lab"])
    assert config.read_text() == f'Include "{path}"\n{BEFORE}'
    assert config.stat().st_mode & 0o777 == 0o640
    assert ssh_files.installed()
    assert ssh_files.uninstall()
    assert config.read_text() == BEFORE
    assert not path.exists()
    assert not ssh_files.installed()
    assert not ssh_files.uninstall()


def test_a_configuration_that_is_a_link_stays_one(home: Path) -> None:
    (home / ".ssh").mkdir()
    (home / "dotfile").write_text(BEFORE)
    (home / ".ssh" / "config").symlink_to(home / "dotfile")
    ssh_files.install([])
    assert (home / ".ssh" / "config").is_symlink()
    assert "Include" in (home / "dotfile").read_text()
    ssh_files.uninstall()
    assert (home / "dotfile").read_text() == BEFORE


def test_where_there_was_no_configuration_none_is_left(home: Path) -> None:
    ssh_files.install([])
    assert (home / ".ssh" / "config").stat().st_mode & 0o777 == 0o600
    ssh_files.uninstall()
    assert list((home / ".ssh").iterdir()) == []


def test_openssh_understands_it_and_other_hosts_are_left_alone(home: Path) -> None:
    ssh_files.install(["web"])
    for name in ("web", "any-task.kohakuriver"):
        options = ssh_says(home, name)
        assert options["user"] == "root"
        assert "kohakuriver.cli.ssh_dial" in options["proxycommand"]
        assert options["proxyusefdpass"] == "yes"
        assert "--direct" not in options["proxycommand"]
        assert "ssh/known_hosts" in options["userknownhostsfile"]
    assert "proxycommand" not in ssh_says(home, "example.org")


def test_both_host_keys_are_known_under_every_name_of_the_task() -> None:
    ssh_files.learn_host_keys(123, "web", ["ssh-ed25519 AAAA", "ecdsa-sha2-nistp256 BBBB"])
    for name in ("web", "web.kohakuriver", "123", "123.kohakuriver", alias(123)):
        found = subprocess.run(
            ["ssh-keygen", "-F", name, "-f", str(ssh_files.known_hosts_file())], capture_output=True, text=True
        )
        assert "ssh-ed25519 AAAA" in found.stdout
        assert "ecdsa-sha2-nistp256 BBBB" in found.stdout


def test_a_new_task_of_an_old_name_replaces_its_host_key_and_no_other() -> None:
    ssh_files.learn_host_keys(1, "web", ["ssh-ed25519 AAAA", "ecdsa-sha2-nistp256 DDDD"])
    ssh_files.learn_host_keys(2, "lab", ["ssh-ed25519 BBBB"])
    ssh_files.learn_host_keys(3, "web", ["ssh-ed25519 CCCC"])
    lines = ssh_files.known_hosts_file().read_text().splitlines()
    assert [line.split()[2] for line in lines] == ["BBBB", "CCCC"]


@pytest.mark.parametrize(
    ("name", "key"), [("web\n@cert-authority *", "ssh-ed25519 AAAA"), ("web", "ssh-ed25519 AAAA\n* ssh-ed25519 BBBB")]
)
def test_a_host_that_tells_a_line_more_than_its_key_is_not_believed(name: str, key: str) -> None:
    with pytest.raises(KohakuRiverError, match="don't trust that host"):
        ssh_files.learn_host_keys(1, name, [key])
    assert not ssh_files.known_hosts_file().exists()


def test_many_that_learn_host_keys_at_once_lose_none() -> None:
    code = (
        "import sys, kohakuriver.cli.ssh_files as files; n = sys.argv[1]; files.learn_host_keys(int(n), 't' + n, 'k')"
    )
    programs = [subprocess.Popen([sys.executable, "-c", code, str(number)]) for number in range(10)]
    assert [program.wait() for program in programs] == [0] * 10
    assert len(ssh_files.known_hosts_file().read_text().splitlines()) == 10


def test_the_keys_of_a_new_vps_are_those_in_the_users_ssh_folder(home: Path) -> None:
    (home / ".ssh").mkdir()
    (home / ".ssh" / "id_ed25519.pub").write_text("ssh-ed25519 AAAA me\n")
    (home / ".ssh" / "work.pub").write_text("# for work\nssh-rsa BBBB\n\nssh-ed25519 AAAA me\n")
    (home / ".ssh" / "id_ed25519").write_text("secret")
    assert ssh_files.public_keys([]) == ["ssh-ed25519 AAAA me", "ssh-rsa BBBB"]
    assert ssh_files.public_keys([home / ".ssh" / "id_ed25519.pub"]) == ["ssh-ed25519 AAAA me"]


def test_without_any_key_a_sentence_says_how_to_make_one() -> None:
    with pytest.raises(UsageError, match="ssh-keygen"):
        ssh_files.public_keys([])


def test_a_private_key_is_never_taken_for_a_public_one(home: Path) -> None:
    path = home / "id"
    path.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nsecret\n")
    with pytest.raises(UsageError, match=r"id\.pub"):
        ssh_files.public_keys([path])


@pytest.mark.parametrize("name", ["cfg%d", "a b", "it's", "pay $HOME", "#1", "[x]*?", "\u00fc", "%h%%"])
def test_openssh_finds_our_files_whatever_their_directory_is_called(
    home: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KOHAKURIVER_CONFIG_DIR", str(home / name))
    ssh_files.install(["web"])
    assert ssh_files.installed()
    said = ssh_says(home, "web")
    assert said["userknownhostsfile"] == str(home / name / "ssh/known_hosts")
    probe = said["proxycommand"].replace("%%", "%").partition(" -m ")[0] + " -c 'import os;"
    probe += ' print(os.environ["KOHAKURIVER_CONFIG_DIR"])\''
    found = subprocess.run(["sh", "-c", probe], capture_output=True, text=True, check=True)
    assert found.stdout == f"{home / name}\n"
    assert ssh_files.uninstall()
    assert not (home / ".ssh" / "config").exists()


@pytest.mark.parametrize("name", ['say "hi"', "a\nb", "back\\slash", "${HOME}", "caf\udce9"])
def test_a_directory_that_openssh_can_not_be_told_of_is_refused_before_anything_is_written(
    home: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KOHAKURIVER_CONFIG_DIR", str(home / name))
    (home / ".ssh").mkdir()
    (home / ".ssh" / "config").write_text(BEFORE)
    with pytest.raises(UsageError, match="KOHAKURIVER_CONFIG_DIR"):
        ssh_files.install(["web"])
    assert (home / ".ssh" / "config").read_text() == BEFORE
    assert not (home / name).exists()


def test_a_relative_directory_is_found_from_anywhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setenv("KOHAKURIVER_CONFIG_DIR", "mine")
    ssh_files.install(["web"])
    monkeypatch.chdir("/")
    assert ssh_says(home, "web")["userknownhostsfile"] == str(home / "mine/ssh/known_hosts")


def test_a_key_of_any_name_is_the_one_that_ssh_takes(home: Path) -> None:
    key = home / "k%d $a 'b'"
    done = subprocess.run(
        ["ssh", "-G", "-F", "none", "-o", f"IdentityFile {ssh_files.spoken(key)}", "x"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"identityfile {str(key).replace('%', '%%')}" in done.stdout.splitlines()
