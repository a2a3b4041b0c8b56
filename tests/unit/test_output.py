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


def test_what_others_wrote_moves_no_cursor_and_sets_no_title(capsys: pytest.CaptureFixture[str]) -> None:
    hostile, shown = "\x1b]0;title\x07\x9b2J\u202ex", r"\x1b]0;title\x07\x9b2J\u202ex"
    output.line(f"{hostile}\n\tgrüße 仕事")
    output.note(hostile)
    output.error(hostile)
    output.table(["A"], [[hostile]])
    output.fields([("b", hostile)])
    captured = capsys.readouterr()
    assert captured.out == f"{shown}\n\tgrüße 仕事\nA\n{shown}\nb: {shown}\n"
    assert captured.err == f"{shown}\nError: {shown}\n"


def test_what_takes_its_time_shows_no_escapes_of_what_it_is_called(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "draws", lambda _: True)
    with output.working("Task 1 (\x1b]0;x\x07\nError: no) is starting") as says:
        assert says is not None
        says("on \x9b31m")
    shown = capsys.readouterr().err
    assert "\x1b]0;" not in shown
    assert "\x9b" not in shown
    assert "\nError" not in shown


def test_neither_names_nor_values_of_fields_have_escapes() -> None:
    assert output.aligned([("a\x1b[1m", "b\x1b[1m\nc")]) == "a\\x1b[1m: b\\x1b[1m\\nc"
