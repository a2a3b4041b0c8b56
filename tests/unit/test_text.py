"""Texts of others, as they are shown."""

from __future__ import annotations

from kohakuriver.text import LONGEST, one_line


def test_a_peers_sentence_stays_in_its_line_and_fills_no_screen() -> None:
    assert one_line("ECONNREFUSED: nothing listens") == "ECONNREFUSED: nothing listens"
    assert one_line("no\n\x1b[31mError: fake\u202e") == "no \\x1b[31mError: fake\\u202e"
    assert one_line("x" * 900_000) == "x" * LONGEST + "…"
