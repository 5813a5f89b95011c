from copy import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkv.server.access.quotas import Bucket, Quota, QuotaLimits, Quotas

GAPS = st.lists(st.tuples(st.floats(0.0, 30.0), st.integers(1, 500)), min_size=1, max_size=60)


@given(GAPS, st.integers(1, 1000))
def test_no_more_than_the_rate_and_one_minute_of_credit_comes_through(
    steps: list[tuple[float, int]], per_minute: int
) -> None:
    """And a request that is let in may overdraw, once: whoever is after it waits."""
    bucket, now_s, taken = Bucket(per_minute), 100.0, 0
    for gap_s, amount in steps:
        now_s += gap_s
        wait_s = bucket.wait_s(now_s)
        if wait_s == 0.0:
            assert taken <= per_minute + (now_s - 100.0) * per_minute / 60.0 + 1e-6
            bucket.take(amount, now_s)
            taken += amount
        else:
            assert copy(bucket).wait_s(now_s + wait_s + 1e-6) == 0.0  # when to come back is true
            assert copy(bucket).wait_s(now_s + 0.9 * wait_s) > 0.0  # and no later than need be
    assert bucket.level(now_s + 1e6) == per_minute


@given(st.lists(st.sampled_from(["enter", "leave"]), max_size=100), st.integers(1, 5))
def test_never_more_inside_than_the_limit(steps: list[str], limit: int) -> None:
    quota = Quota(QuotaLimits(concurrent=limit))
    for step in steps:
        if step == "enter" and quota.refusal(0.0) is None:
            quota.enter(0.0)
        elif step == "leave" and quota.num_inside:
            quota.leave()
        assert quota.num_inside <= limit
        assert (quota.refusal(0.0) is None) == (quota.num_inside < limit)


def test_time_that_goes_back_gives_nothing() -> None:
    bucket = Bucket(60)
    bucket.take(60, 10.0)
    assert bucket.level(5.0) == 0.0
    assert bucket.level(11.0) == pytest.approx(1.0)


def test_no_limit_refuses_nothing() -> None:
    quota = Quota(QuotaLimits())
    for _ in range(1000):
        quota.enter(0.0)
        quota.spend(10**9, 0.0)
    assert quota.refusal(0.0) is None
    assert quota.headers(0.0) == []


def test_what_is_used_up_is_said_with_when_to_come_back() -> None:
    quota = Quota(QuotaLimits(concurrent=2, requests_per_minute=2, tokens_per_minute=600))
    quota.enter(0.0)
    quota.enter(0.0)
    refusal = quota.refusal(0.0)
    assert refusal is not None and "2 requests are under way" in refusal.reason
    quota.leave()
    refusal = quota.refusal(0.0)
    assert refusal is not None and "2 requests a minute" in refusal.reason
    assert refusal.retry_after_s == pytest.approx(30.0)
    quota.spend(900, 30.0)
    refusal = quota.refusal(30.0)
    assert refusal is not None and "600 tokens a minute" in refusal.reason
    assert refusal.retry_after_s == pytest.approx(30.1)
    headers = dict(quota.headers(30.0))
    assert headers[b"x-ratelimit-limit-tokens"] == b"600"
    assert headers[b"x-ratelimit-remaining-tokens"] == b"0"
    assert headers[b"x-ratelimit-reset-tokens"] == b"90.000s"
    assert headers[b"x-ratelimit-remaining-requests"] == b"1"


def test_each_key_has_its_own_and_keeps_it() -> None:
    quotas = Quotas(QuotaLimits(), QuotaLimits(concurrent=1, tokens_per_minute=60))
    one, other = quotas.of("one", {}), quotas.of("other", {"concurrent": 3})
    assert one is quotas.of("one", {})
    assert other.limits == QuotaLimits(concurrent=3, tokens_per_minute=60)
    one.enter(0.0)
    one.spend(90, 0.0)
    assert quotas.of("one", {"tokens_per_minute": 600, "concurrent": 2}) is one  # its line in the key file has changed
    assert one.num_inside == 1 and one.limits.concurrent == 2
    assert one.tokens is not None and one.tokens.level(0.0) == -30.0
    assert quotas.of("one", {"tokens_per_minute": 0}).tokens is None
