"""What commands print."""

from __future__ import annotations

import pytest

from kohakuriver.cli import output


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (123456, "123 kB"), (1_500_000, "1.5 MB"), (3e15, "3000.0 TB")],
)
def test_sizes_are_short(count: float, text: str) -> None:
    assert output.size(count) == text


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        ("1970-01-01T00:16:35Z", "5 s"),
        ("1970-01-01T00:16:35", "5 s"),
        ("1970-01-01T00:10:00+00:00", "6 min"),
        ("1969-12-31T20:00:00+00:00", "4 h"),
        ("1969-12-25T00:00:00+00:00", "7 d"),
        ("1970-01-01T01:00:00Z", "0 s"),
        ("soon", "soon"),
        (None, "never"),
    ],
)
def test_ages_are_short(moment: str | None, text: str) -> None:
    assert output.age(moment, now=1000.0) == text


def test_a_table_without_a_terminal_is_aligned_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(["Id", "Name"], [["1", "[bold]web"], ["22", "b"]])
    assert capsys.readouterr().out == "ID  NAME\n1   [bold]web\n22  b\n"


def test_a_table_on_a_narrow_terminal_shows_every_cell_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "is_terminal", lambda stream: True)
    monkeypatch.setenv("COLUMNS", "30")
    row = ["6278488900", "connected", "registry.example.org/some/image:tag"]
    output.table(["Id", "Tunnel", "Image or address"], [row])
    assert capsys.readouterr().out.splitlines()[-1].split() == row


def test_an_error_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    output.error("first\nsecond")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "Error: first second\n")


def test_fields_without_a_value_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    output.fields([("id", "1"), ("image", ""), ("name", "web")])
    assert capsys.readouterr().out == "id:   1\nname: web\n"


def test_nothing_that_is_shown_is_for_the_terminal_to_obey(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\x1b]52;c;ZXZpbA==\a\x9b2J\x7f\ttab"
    harmless = "\\x1b]52;c;ZXZpbA==\\x07\\x9b2J\\x7f\ttab"
    output.line(hostile)
    output.note(hostile)
    assert capsys.readouterr() == (f"{harmless}\n", f"{harmless}\n")
    output.fields([("message", hostile)])
    output.table(["Message"], [[hostile]])
    output._rich_table(["Message"], [[hostile]])
    output.error(hostile)
    captured = capsys.readouterr()
    assert captured.out.count("\\x1b]52;c;ZXZpbA==") == 3
    assert "\\x1b]52;c;ZXZpbA==" in captured.err
    assert not set(captured.out + captured.err) & set("\x1b\a\x9b\x7f")
