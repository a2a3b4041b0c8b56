"""What of refused tunnel clients a heartbeat tells."""

from __future__ import annotations

from kohakuriver.runner.services.incidents import TOLD_AT_ONCE, TOLD_EVERY, Incidents


def test_a_container_that_is_refused_without_end_is_counted_and_told_of_now_and_then() -> None:
    now = 0.0
    incidents, told = Incidents(lambda: now), []
    for _ in range(5000):
        incidents.add(1, "a second tunnel client came", "10.0.0.2")
        pending = incidents.pending()
        incidents.told(pending)
        told += pending
    assert len(told) == TOLD_AT_ONCE
    now += TOLD_EVERY
    (last,) = incidents.pending()
    assert sum(each["count"] for each in told) + last["count"] == 5000
    incidents.told([last])
    now += TOLD_EVERY
    assert incidents.pending() == []
