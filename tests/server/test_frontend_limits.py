"""What a frontend does to clients that wait too long, or make it wait."""

import asyncio
from pathlib import Path

import pytest

from flowkv.config import LimitsConfig
from flowkv.errors import RequestError
from flowkv.messages import Abort
from flowkv.server.access.caller import Caller, set_caller
from flowkv.server.access.keys import ApiKey
from flowkv.server.access.quotas import Quota, QuotaLimits
from flowkv.server.frontend import Frontend
from flowkv.server.live_request import TextOptions
from flowkv.types import FinishReason, Output, Request, SamplingParams
from tests.server.fake_cluster import FakeCluster, outputs
from tests.server.test_frontend import collect, request, run, wait_for


def test_a_request_without_a_first_token_is_given_up_everywhere(tmp_path: Path) -> None:
    async def scenario(frontend: Frontend, cluster: FakeCluster) -> None:
        cluster.answer = lambda request: outputs(request, [1, 2])[: request.request_id == "r0"]
        begun = frontend.submit([request("r0")], TextOptions(), frontend.now_s())
        await anext(begun)
        stream = frontend.submit([request("r1"), request("r2")], TextOptions(), frontend.now_s())
        with pytest.raises(RequestError, match="no token came within") as late:
            await collect(stream)
        assert (late.value.status, late.value.code, late.value.retry_after_s) == (503, "queue_timeout", 0.1)
        await wait_for(cluster, lambda: {Abort("r1"), Abort("r2")} <= set(cluster.aborts))
        assert frontend.num_live == 1  # one that has begun may take its time
        assert Abort("r0") not in cluster.aborts

    run(scenario, tmp_path, limits=LimitsConfig(queue_timeout_s=0.1))


def test_what_a_client_leaves_unread_is_bounded(tmp_path: Path) -> None:
    async def scenario(frontend: Frontend, cluster: FakeCluster) -> None:
        endless = [Output("r0", 0, index, [65]) for index in range(2000)]
        cluster.answer = lambda request: list(endless)
        stream = frontend.submit([request(max_tokens=100_000)], TextOptions(), frontend.now_s())
        await wait_for(cluster, lambda: Abort("r0") in cluster.aborts)
        assert stream.unread_bytes <= 70_000
        with pytest.raises(RequestError, match="did not read"):
            await collect(stream)
        metrics = frontend.metrics.render().decode()
        assert 'flowkv_rejections_total{reason="slow_reader"} 1.0' in metrics
        assert f'flowkv_choices_finished_total{{finish_reason="{FinishReason.ABORT}"}} 1.0' in metrics

    run(scenario, tmp_path, limits=LimitsConfig(slow_reader_bytes=2**16))


def test_a_key_pays_for_its_prompt_and_for_what_comes(tmp_path: Path) -> None:
    quota = Quota(QuotaLimits(tokens_per_minute=1000))

    async def scenario(frontend: Frontend, cluster: FakeCluster) -> None:
        set_caller(Caller(ApiKey("alice", b"", priority=5), (quota,)))
        stream = frontend.submit([request(n=2), request("r1")], TextOptions(), frontend.now_s())
        await collect(stream)
        assert quota.tokens is not None
        # Two prompts of three tokens, and three choices: "hello0", "hello1" and "hello".
        assert 1000 - quota.tokens.level(frontend.now_s()) == pytest.approx(2 * 3 + 6 + 6 + 5, abs=10)
        assert {request.priority for request in cluster.requests} == {5}

    run(scenario, tmp_path)


@pytest.mark.parametrize(("asked", "given"), [(-7, 5), (0, 5), (3, 8), (2**30 - 1, 2**30 - 1)])
def test_a_key_may_put_its_requests_behind_others_only(asked: int, given: int) -> None:
    wanted = Request(request_id="r", prompt_ids=[1], sampling=SamplingParams(max_tokens=1), priority=asked)
    assert Caller(ApiKey("alice", b"", priority=5)).ranked(wanted).priority == given
    assert Caller().ranked(wanted).priority == asked


def test_without_a_limit_a_request_may_wait(tmp_path: Path) -> None:
    async def scenario(frontend: Frontend, cluster: FakeCluster) -> None:
        cluster.answer = lambda request: []
        frontend.submit([request()], TextOptions(), frontend.now_s() - 1e6)
        await wait_for(cluster, lambda: len(cluster.requests) == 1)
        await asyncio.sleep(0.1)
        assert frontend.num_live == 1

    run(scenario, tmp_path)
