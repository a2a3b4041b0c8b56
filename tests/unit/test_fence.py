from __future__ import annotations

from pathlib import Path

import pytest

from kohakuriver.runner.backends.docker import fence
from kohakuriver.runner.backends.docker.fence import bridge_of, found, name_servers, rules


def test_name_servers_of_the_node_stay_reachable_and_everything_else_near_does_not() -> None:
    lines = rules("172.18.0.1", ["169.254.169.254"]).splitlines()
    order = [
        lines.index(f"-A KOHAKURIVER {rule}")
        for rule in (
            "-p udp -d 169.254.169.254 --dport 53 -j RETURN",
            "-d 169.254.0.0/16 -j DROP",
            "-p tcp -d 172.18.0.1 -m socket -j RETURN",
            "-m addrtype ! --dst-type UNICAST -j DROP",
        )
    ]
    assert order == sorted(order)
    assert lines[0] == "*mangle"
    assert lines[-1] == "COMMIT"


def test_the_nodes_resolvers_are_found_once_each_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "one").write_text(
        "# nameserver 9.9.9.9\nsearch example\nnameserver 10.0.0.2\nnameserver\nnameserver x\n"
    )
    (tmp_path / "two").write_text("nameserver fe80::1%eth0\nnameserver 10.0.0.2\n")
    assert name_servers([tmp_path / "one", tmp_path / "two", tmp_path / "none"]) == ["10.0.0.2", "fe80::1"]


def test_a_networks_interface_is_the_one_that_it_was_given_or_the_engines_own_name() -> None:
    assert bridge_of({"Id": "0123456789abcdef", "Options": None}) == "br-0123456789ab"
    assert bridge_of({"Id": "0", "Options": {"com.docker.network.bridge.name": "lab0"}}) == "lab0"


def test_the_packet_filters_programs_are_found_off_the_path_and_their_absence_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "iptables-restore"
    program.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(fence, "_SBIN", str(tmp_path))
    assert found("iptables-restore") == str(program)
    with pytest.raises(OSError, match="has no ip6tables-restore; install iptables"):
        found("ip6tables-restore")
