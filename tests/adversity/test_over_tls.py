"""The same promises with TLS between user, host and runner: another transport, which has to push back as TCP does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.adversity.test_faults import (  # noqa: F401  # collected here again
    test_a_link_that_is_lost_in_a_transfer_ends_its_streams_and_is_replaced,
    test_a_session_that_takes_nothing_for_a_while_is_kept_while_bytes_move,
    test_an_orderly_close_by_whoever_is_on_the_way_is_never_taken_for_the_end_of_a_streams_data,
)
from tests.adversity.test_streams import (  # noqa: F401
    test_64_mib_each_way_at_once_arrive_whole,
    test_1000_streams_at_once_all_work,
    test_readers_that_stop_stop_nobody_else_and_go_on_where_they_stopped,
    test_services_that_stop_reading_stop_nobody_else,
)
from tests.integration.test_hops import (  # noqa: F401
    test_a_reply_after_the_half_close_arrives,
    test_what_a_service_sent_before_it_closed_arrives,
    test_what_is_sent_before_the_stream_is_open_arrives,
)
from tests.support import hops as chain


@pytest.fixture(autouse=True)
def over_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "security", chain.Security(tmp_path))
