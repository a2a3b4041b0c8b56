"""Buckets that count what goes through in a second."""

from __future__ import annotations

import pytest

from kohakuriver.rates import TokenBucket


def test_a_bucket_lets_a_burst_through_and_then_its_rate() -> None:
    bucket = TokenBucket(rate=10, burst=3, now=0.0)
    assert [bucket.try_take(0.0) for _ in range(4)] == [True, True, True, False]
    assert not bucket.try_take(0.05)
    assert bucket.try_take(0.1)
    assert not bucket.try_take(0.1)
    assert [bucket.try_take(99.0) for _ in range(4)] == [True, True, True, False]


def test_a_bucket_that_was_overdrawn_says_how_long_to_wait() -> None:
    bucket = TokenBucket(rate=100, burst=50, now=0.0)
    assert bucket.take(50, 0.0) == 0
    assert bucket.take(200, 0.0) == pytest.approx(2.0)
    assert bucket.take(0, 1.5) == pytest.approx(0.5)
    assert bucket.take(0, 2.0) == pytest.approx(0.0)


def test_a_reservation_that_would_have_to_wait_too_long_takes_nothing() -> None:
    bucket = TokenBucket(rate=10, burst=2, now=0.0)
    assert [bucket.reserve(0.0, 0.1) for _ in range(4)] == [0, 0, pytest.approx(0.1), None]
    assert bucket.reserve(0.1, 0.1) == pytest.approx(0.1)
