"""What the extension skips of a chunked body, beside its plain twin."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kohakuriver import _frame
from tests.reference import chunks as twin

SIZES = st.integers(0, 40).flatmap(
    lambda size: st.sampled_from([f"{size:x}", f"{size:X}", f"{size:015x}", f"{size:016x}", "", "g", "fffffffffffffff"])
)
EXTENSIONS = st.sampled_from(
    [b"", b";", b";a=b", b";\t ~\xff", b";\x7f", b";\x00", b";" + b"x" * 1006, b";" + b"x" * 1030, b" "]
)
ENDS = st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r", b"", b"\r\r"])


@st.composite
def chunks(draw: st.DrawFn) -> bytes:
    """One that is mostly right."""
    size = draw(SIZES)
    length = int(size, 16) if size not in ("", "g", "fffffffffffffff") else 3
    body = bytes(draw(st.sampled_from([length, length, length, max(0, length - 1), length + 1])))
    return size.encode() + draw(EXTENSIONS) + draw(ENDS) + body + draw(ENDS)


@given(st.lists(chunks() | st.binary(max_size=8), max_size=8).map(b"".join), st.integers(0, 12), st.integers(0, 12))
def test_the_same_chunks_are_skipped_as_by_the_twin(data: bytes, start: int, cut: int) -> None:
    data = data[: len(data) - cut]
    start = min(start, len(data))
    whole = _frame.whole_chunks(data, start)
    assert whole == twin.whole_chunks(data, start)
    assert _frame.chunk_data(data, start, whole) == twin.chunk_data(data, start, whole)


def test_the_longest_line_is_skipped_and_no_longer_one() -> None:
    for more, whole in ((0, True), (1, False)):
        data = b"1;" + b"x" * (twin.CHUNK_LINE - 4 + more) + b"\r\ny\r\n"
        assert _frame.whole_chunks(data, 0) == twin.whole_chunks(data, 0) == (len(data) if whole else 0)
