"""Settings: flag, environment, file, the cluster of `up`, default."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

import pytest

from kohakuriver import config
from kohakuriver.errors import UsageError


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HOST", "PORT", "TOKEN", "SSH_PROXY", "SSH_PROXY_PORT"):
        monkeypatch.delenv(f"KOHAKURIVER_{name}", raising=False)
    monkeypatch.setenv("KOHAKURIVER_CONFIG_DIR", str(tmp_path))
    return tmp_path


def test_with_nothing_set_the_host_is_this_machine() -> None:
    settings = config.load_settings()
    assert (settings.host, settings.token, settings.ssh_proxy) == ("http://127.0.0.1:8000", None, "127.0.0.1:8002")


def test_a_flag_beats_the_environment_which_beats_the_file_which_beats_the_cluster(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_cluster(config.Cluster("http://127.0.0.1:1", "of-cluster"))
    assert config.load_settings().host == "http://127.0.0.1:1"
    (directory / "config.toml").write_text('host = "from-file"\n')
    assert config.load_settings().host == "http://from-file:8000"
    monkeypatch.setenv("KOHAKURIVER_HOST", "from-env")
    assert config.load_settings().host == "http://from-env:8000"
    assert config.load_settings(host="from-flag").host == "http://from-flag:8000"


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOHAKURIVER_TOKEN", "")
    monkeypatch.setenv("KOHAKURIVER_HOST", "")
    assert config.load_settings().token is None
    assert config.load_settings().host == "http://127.0.0.1:8000"


def test_the_token_of_the_local_cluster_goes_to_no_other_host() -> None:
    config.write_cluster(config.Cluster("http://127.0.0.1:1", "secret"))
    assert config.load_settings().token == "secret"
    assert config.load_settings(host="http://127.0.0.1:1/").token == "secret"
    assert config.load_settings(host="elsewhere").token is None


def test_the_host_of_the_last_login_is_used_with_nothing_set_and_gets_its_own_token_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config.write_logins(config.Logins("http://lab:8000", {"http://lab:8000": "of-lab", "http://old:8000": "of-old"}))
    settings = config.load_settings()
    assert (settings.host, settings.token) == ("http://lab:8000", "of-lab")
    assert config.load_settings(host="old").token == "of-old"
    assert config.load_settings(host="elsewhere").token is None
    monkeypatch.setenv("KOHAKURIVER_TOKEN", "of-script")
    assert config.load_settings().token == "of-script"


def test_an_authority_of_a_login_is_for_that_host_and_gives_way_to_one_that_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config.write_logins(config.Logins("https://lab:8000", {"https://lab:8000": "t"}, {"https://lab:8000": "/lab.pem"}))
    assert config.load_settings().ca_file == "/lab.pem"
    assert config.load_settings(host="https://elsewhere").ca_file is None
    monkeypatch.setenv("KOHAKURIVER_CA_FILE", "/other.pem")
    assert config.load_settings().ca_file == "/other.pem"


def test_logins_that_an_older_version_wrote_are_read(directory: Path) -> None:
    (directory / "logins.json").write_text('{"current": "http://lab:8000", "tokens": {"http://lab:8000": "t"}}')
    assert config.load_settings() == config.Settings("http://lab:8000", "t", "lab:8002")


@pytest.mark.parametrize("token", ["kr_\u00fc", "two words", "two\nlines", "kr_\x00"])
def test_what_can_not_be_a_token_is_refused_before_anything_is_sent(token: str) -> None:
    with pytest.raises(UsageError, match="copy it once more") as refused:
        config.load_settings(token=token)
    assert token not in str(refused.value)
    assert config.load_settings(token=" kr_x\n").token == "kr_x"


@pytest.mark.parametrize("name", ["", ".", "..", "../tasks/lab", "a/b"])
def test_a_name_leads_to_no_other_path(name: str) -> None:
    with pytest.raises(UsageError, match="can't be a name"):
        config.path_segment(name)
    assert config.path_segment("lab 1?x#y") == "lab%201%3Fx%23y"


def test_a_running_cluster_of_ones_own_comes_before_a_login_elsewhere_but_not_before_one_to_it() -> None:
    config.write_logins(config.Logins("http://lab:8000", {"http://lab:8000": "of-lab"}))
    config.write_cluster(config.Cluster("http://127.0.0.1:1", "of-cluster"))
    settings = config.load_settings()
    assert (settings.host, settings.token) == ("http://127.0.0.1:1", "of-cluster")
    config.write_logins(config.Logins(None, {"http://127.0.0.1:1": "of-login"}))
    assert config.load_settings().token == "of-login"


@pytest.mark.skipif(os.name != "posix", reason="POSIX file modes")
def test_logins_are_for_their_owner_alone(directory: Path) -> None:
    config.write_logins(config.Logins(None, {"http://a": "secret"}))
    assert stat.S_IMODE((directory / "logins.json").stat().st_mode) == 0o600


HOMES = [
    {"HOME": "{file}"},
    {"HOME": ""},
    {"HOME": "/nonexistent"},
    {"HOME": "some/where"},
    {"XDG_CONFIG_HOME": "{file}"},
]


@pytest.mark.parametrize("environment", HOMES)
def test_a_home_that_holds_nothing_is_no_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.delenv("KOHAKURIVER_CONFIG_DIR")
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(file=tmp_path / "file"))
    assert config.load_settings().host == config.DEFAULT_HOST


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(*_: object) -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(UsageError, match="KOHAKURIVER_CONFIG_DIR"):
        config.load_settings()


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"current": null, "tokens": 1}'])
def test_a_damaged_file_of_logins_is_named(directory: Path, content: str) -> None:
    (directory / "logins.json").write_text(content)
    with pytest.raises(UsageError, match=r"logins\.json"):
        config.load_settings()


def test_a_token_is_not_shown_when_settings_are_printed() -> None:
    assert "secret" not in repr(config.load_settings(token="secret"))


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("name", "http://name:8000"),
        ("name:9000", "http://name:9000"),
        ("10.0.0.1", "http://10.0.0.1:8000"),
        ("::1", "http://[::1]:8000"),
        ("[::1]:9000", "http://[::1]:9000"),
        ("http://name", "http://name"),
        ("https://name/river/", "https://name/river"),
    ],
)
def test_a_host_may_be_a_url_or_a_bare_name(text: str, url: str) -> None:
    assert config.host_url(text) == url


@pytest.mark.parametrize(
    "text", ["", "ftp://name", "http://", "name:99999", "a b", "http://name?x=1", "http://u:p@name"]
)
def test_what_is_no_host_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(UsageError, match="host must be"):
        config.host_url(text)


def test_a_misspelt_setting_is_named(directory: Path) -> None:
    (directory / "config.toml").write_text('tokn = "x"\n')
    with pytest.raises(UsageError, match="tokn"):
        config.load_settings()


def test_a_broken_file_is_named(directory: Path) -> None:
    (directory / "config.toml").write_text("host = \n")
    with pytest.raises(UsageError, match=r"config\.toml"):
        config.load_settings()


@pytest.mark.skipif(os.name != "posix", reason="POSIX file modes")
def test_the_cluster_file_is_for_its_owner_alone(directory: Path) -> None:
    config.write_cluster(config.Cluster("http://127.0.0.1:1", "secret"))
    assert stat.S_IMODE((directory / "cluster.json").stat().st_mode) == 0o600


def test_a_cluster_whose_up_was_killed_comes_before_nothing(directory: Path) -> None:
    lock = directory / "up.lock"
    lock.touch()
    config.write_cluster(config.Cluster("http://127.0.0.1:1", "secret", lock=str(lock)))
    config.write_logins(config.Logins("http://lab:8000", {"http://lab:8000": "mine"}))
    assert config.load_settings().host == "http://lab:8000"
    assert config.left_cluster()
    with lock.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert config.load_settings().host == "http://127.0.0.1:1"
        assert not config.left_cluster()


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"host_url": 1'])
def test_a_damaged_cluster_file_counts_as_none(directory: Path, content: str) -> None:
    (directory / "cluster.json").write_text(content)
    assert config.read_cluster() is None
    assert config.load_settings().host == "http://127.0.0.1:8000"


def test_up_removes_its_own_cluster_and_nobody_elses() -> None:
    first, second = config.Cluster("http://a", "1", pid=1), config.Cluster("http://b", "2", pid=2)
    config.write_cluster(first)
    config.write_cluster(second)
    config.remove_cluster(first)
    assert config.read_cluster() == second
    config.remove_cluster(second)
    assert config.read_cluster() is None


def test_a_failed_write_leaves_no_half_file_behind(directory: Path) -> None:
    config.write_private(directory / "file", "before")
    with pytest.raises(UnicodeEncodeError):
        config.write_private(directory / "file", "\ud800")
    assert (directory / "file").read_text() == "before"
    assert [path.name for path in directory.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("environment", "host"),
    [
        ({"KOHAKURIVER_HOST": "lab", "KOHAKURIVER_PORT": "8100"}, "http://lab:8100"),
        ({"KOHAKURIVER_HOST": "lab:9", "KOHAKURIVER_PORT": "8100"}, "http://lab:9"),
        ({"KOHAKURIVER_HOST": "https://lab", "KOHAKURIVER_PORT": "8100"}, "https://lab"),
        ({"KOHAKURIVER_PORT": "8100"}, "http://127.0.0.1:8100"),
        ({"KOHAKURIVER_PORT": "tcp://10.0.0.1:8000"}, config.DEFAULT_HOST),
    ],
)
def test_the_port_may_be_in_a_variable_of_its_own(
    environment: dict[str, str], host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert config.load_settings().host == host


def test_the_port_of_the_ssh_proxy_may_be_in_a_variable_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOHAKURIVER_SSH_PROXY_PORT", "8022")
    assert config.load_settings(host="lab").ssh_proxy == "lab:8022"
    monkeypatch.setenv("KOHAKURIVER_SSH_PROXY_PORT", "22x")
    with pytest.raises(UsageError, match="KOHAKURIVER_SSH_PROXY_PORT"):
        config.load_settings(host="lab")


def test_this_machine_has_several_names_and_one_login() -> None:
    config.write_logins(config.Logins("http://localhost:8000", {"http://localhost:8000": "kr_a"}))
    for host in ("127.0.0.1:8000", "[::1]:8000", "localhost"):
        assert config.load_settings(host=host).token == "kr_a"
    for host in ("127.0.0.1:8001", "lab:8000", "https://localhost:8000"):
        assert config.load_settings(host=host).token is None


def test_who_was_told_of_plain_http_is_not_told_again() -> None:
    assert not config.accepts_plain_http("http://lab:8000")
    config.accept_plain_http("http://lab:8000")
    assert config.accepts_plain_http("http://lab:8000")
    assert not config.accepts_plain_http("http://other:8000")


def test_a_relative_directory_is_taken_from_where_the_program_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KOHAKURIVER_CONFIG_DIR", "settings")
    assert config.config_dir() == config.state_dir() == tmp_path / "settings"
