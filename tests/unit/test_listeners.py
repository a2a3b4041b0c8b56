"""Where something listens, as the kernel's tables tell it."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from kohakuriver.tunnel.listeners import Bound, bound, listening

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
REST = "00000000:00000000 00:00000000 00000000     0        0"

pytestmark = pytest.mark.skipif(sys.byteorder != "little", reason="the tables here are a little-endian machine's")


def line(local: str, state: str = "0A", inode: int = 7) -> str:
    return f"   0: {local} 00000000:0000 {state} {REST} {inode} 1 0000000000000000 100 0 0 10 0\n"


def test_every_form_of_an_address_is_read(tmp_path: Path) -> None:
    (tmp_path / "tcp").write_text(HEAD + line("0100007F:1F90") + line("00000000:0050", inode=8))
    addresses = (
        "0" * 32,
        "0" * 24 + "01000000",
        "0" * 16 + "FFFF0000" + "0100007F",
        "B80D0120" + "0" * 16 + "01000000",
    )
    (tmp_path / "tcp6").write_text(HEAD + "".join(line(f"{words}:0051") for words in addresses))
    assert list(bound(tmp_path, udp=False)) == [
        Bound("127.0.0.1", 8080, 7),
        Bound("0.0.0.0", 80, 8),
        *(Bound(each, 81, 7) for each in ("::", "::1", "127.0.0.1", "2001:db8::1")),
    ]


def test_what_is_no_line_of_the_kernels_is_left_out_and_so_is_what_does_not_listen(tmp_path: Path) -> None:
    wrong = ["\n", "garbage\n", "0: XY:1 0 0A\n", line("0100007F"), line("0100007F:FFFG"), line("0100:0050")]
    good = line("0100007F:0050")
    (tmp_path / "tcp").write_text(HEAD + "".join(wrong) + line("0100007F:0051", state="01") + good)
    assert [each.port for each in bound(tmp_path, udp=False)] == [80]
    assert listening(tmp_path, 80, udp=False) == ["127.0.0.1"]
    assert list(bound(tmp_path / "nowhere", udp=True)) == []


def test_a_listener_is_known_by_the_inode_that_its_descriptor_has() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        (found,) = [each for each in bound(Path("/proc/net"), udp=False) if each.port == port]
        assert str(Path(f"/proc/self/fd/{sock.fileno()}").readlink()) == f"socket:[{found.inode}]"
