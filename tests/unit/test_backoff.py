from __future__ import annotations

import json
from typing import Any

import pytest

from kohakuriver.tunnel.backoff import STEADY, Backoff, Reconnect, Verdict
from tests.vectors import generate

VECTORS = json.loads((generate.HERE / "reconnect.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["name"] for vector in VECTORS])
def test_a_tunnel_client_tries_again_or_ends_as_the_vectors_say(vector: dict[str, Any]) -> None:
    client = Reconnect(delay=vector["delay"], most=vector["max"], stays=vector["mode"] == "run")
    client.failures = vector["failures"]
    verdict, then = client.after(vector["lived"], vector["code"]), vector["then"]
    assert verdict.end == then.get("end", "")
    if not verdict.end:
        assert [verdict.least, verdict.longest] == then["pause"]
        assert client.failures == then["failures"]


def test_a_pause_lies_within_its_bounds_and_is_not_always_the_same() -> None:
    pauses = {Verdict(15.0, 30.0).pause() for _ in range(100)}
    assert len(pauses) > 90
    assert 15 <= min(pauses) <= max(pauses) <= 30


def test_pauses_grow_with_each_failure_and_begin_anew_after_a_good_one() -> None:
    backoff = Backoff(0.2, 5.0)
    ceilings = []
    for _ in range(7):
        backoff.ended(None)
        ceilings.append(backoff.ceiling)
        assert 0 <= backoff.pause() <= backoff.ceiling
    assert ceilings == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    backoff.ended(STEADY)
    assert backoff.ceiling == 0.2
