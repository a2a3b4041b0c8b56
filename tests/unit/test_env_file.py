"""Variables from a file, as docker reads one."""

from __future__ import annotations

from pathlib import Path

import pytest

from kohakuriver.cli.options import variables_in
from kohakuriver.errors import UsageError


def test_a_file_of_variables_is_read_as_docker_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", "from here")
    monkeypatch.delenv("NOWHERE", raising=False)
    file = tmp_path / "env"
    file.write_text("# words\n\nA=1\n  B='two' # three\nEMPTY=\nOURS\nNOWHERE\nC=d=e\n")
    assert variables_in(file, "--env-file") == {
        **{"A": "1", "B": "'two' # three", "EMPTY": "", "OURS": "from here", "C": "d=e"},
    }


@pytest.mark.parametrize("line", ["=x", "two words=x"])
def test_a_line_that_names_no_variable_is_told_by_its_number(tmp_path: Path, line: str) -> None:
    file = tmp_path / "env"
    file.write_text(f"A=1\n{line}\n")
    with pytest.raises(UsageError, match="line 2 of"):
        variables_in(file, "--env-file")
