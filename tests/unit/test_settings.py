"""Windows and times that can be set: their names, their bounds, and who is told of them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from kohakuriver.client.forward import Forwarder, PortForward
from kohakuriver.config import Settings, load_settings
from kohakuriver.errors import UsageError
from kohakuriver.tunnel.settings import NAMES, EndpointConfig, from_environment, resume_for, variables

ROOT = Path(__file__).resolve().parents[2]


def test_nothing_set_is_the_default() -> None:
    assert from_environment({}) == EndpointConfig()


def test_each_setting_changes_its_own_part() -> None:
    values = {"WINDOW_FIRST": "4096", "WINDOW_MAX": "65536", "WINDOW_BUDGET": "1048576"}
    values |= {"LINGER": "0.5", "UDP_IDLE": "7", "UDP_PEERS": "3"}
    config = from_environment({f"KOHAKURIVER_{name}": value for name, value in values.items()})
    assert config == EndpointConfig(
        first_window=4096, max_window=65536, budget=1 << 20, v1_linger=0.5, udp_idle=7.0, udp_peers=3
    )


def test_a_smaller_budget_makes_windows_smaller() -> None:
    config = from_environment({"KOHAKURIVER_WINDOW_BUDGET": "65536"})
    assert (config.first_window, config.max_window) == (65536, 65536)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("window_first", "4095"),
        ("window_max", str((64 << 20) + 1)),
        ("window_budget", "64M"),
        ("linger", "0"),
        ("udp_idle", "nan"),
        ("udp_idle", "soon"),
        ("udp_peers", "0"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"{name}.*{re.escape(value)}"):
        from_environment({f"KOHAKURIVER_{name.upper()}": value})


def test_a_forward_takes_them_from_the_environment_and_the_settings_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.toml").write_text("window_max = 1000000\nudp_peers = 5\n")
    monkeypatch.setenv("KOHAKURIVER_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("KOHAKURIVER_UDP_PEERS", "6")
    forwarder = Forwarder("web", [PortForward(0, 80)], settings=load_settings())
    assert forwarder.endpoint_config == EndpointConfig(max_window=1_000_000, udp_peers=6)


def test_every_name_is_a_setting_and_documented_and_the_tunnel_client_knows_those_that_concern_it() -> None:
    assert set(NAMES) <= {field.name for field in dataclasses.fields(Settings)}
    page = (ROOT / "docs/guide/tuning.md").read_text()
    client = (ROOT / "src/kohakuriver-tunnel/src/settings.rs").read_text()
    for name in NAMES:
        assert f"`KOHAKURIVER_{name.upper()}`" in page
        assert (f'"KOHAKURIVER_{name.upper()}"' in client) == (name != "udp_peers")


def test_a_runner_hands_on_what_is_set_and_nothing_else() -> None:
    environ = {"KOHAKURIVER_WINDOW_MAX": "65536", "KOHAKURIVER_LINGER": "", "KOHAKURIVER_TOKEN": "secret"}
    assert variables(environ) == {"KOHAKURIVER_WINDOW_MAX": "65536"}
    assert variables({"KOHAKURIVER_KEEP_BUDGET": "65536"}) == {"KOHAKURIVER_KEEP_BUDGET": "65536"}


@pytest.mark.parametrize(("value", "seconds"), [(None, 3600), ("", 3600), ("60", 60), (86_400, 86_400)])
def test_connections_wait_for_an_hour_or_as_long_as_is_set(value: object, seconds: int) -> None:
    assert resume_for(value) == seconds


@pytest.mark.parametrize("value", ["0", "86401", "soon", -1])
def test_a_time_to_wait_that_makes_no_sense_is_refused_by_name(value: object) -> None:
    with pytest.raises(UsageError, match="resume_for"):
        resume_for(value)
