import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path

import msgspec
import pytest
import zmq

from flowkv.config import LimitsConfig
from flowkv.errors import RequestError
from flowkv.messages import Abort, FrontendHello, Lost, Message, Rejected, ServiceBeat
from flowkv.server.choice import Delta
from flowkv.server.frontend import Frontend
from flowkv.server.live_request import TextOptions
from flowkv.server.recovery import MAX_FRUITLESS
from flowkv.server.stream import RequestStream
from flowkv.server.text.byte_tokenizer import ByteTokenizer
from flowkv.types import FinishReason, Output, Request, SamplingParams, TokenLogprobs
from flowkv.wire import AsyncMailbox, Outbox, SyncContext
from tests.server.fake_cluster import CONTEXT_TOKENS, VOCAB_SIZE, FakeCluster, outputs, say, status

Scenario = Callable[[Frontend, FakeCluster], Coroutine[None, None, None]]


def run(
    scenario: Scenario,
    folder: Path,
    beat_s: float = 0.02,
    on_ready: Callable[[], None] = lambda: None,
    limits: LimitsConfig | None = None,
    clock: Callable[[], float] = time.monotonic,
    told: list[Message] | None = None,
) -> None:
    context: SyncContext = zmq.Context()

    async def main(cluster: FakeCluster) -> None:
        mailbox, outbox = AsyncMailbox(context, f"ipc://{folder}/frontend"), Outbox(context)
        frontend = Frontend(
            "f0", mailbox, outbox, cluster.address, ByteTokenizer(), beat_s=beat_s, on_ready=on_ready, limits=limits,
            clock=clock, tell_launcher=([] if told is None else told).append,
        )  # fmt: skip
        receiving = asyncio.create_task(frontend.run())
        async with asyncio.timeout(10):
            await until(lambda: frontend.is_ready)
            await scenario(frontend, cluster)
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)
        frontend.close_mailbox()
        outbox.close(linger_s=0)

    with FakeCluster(folder) as cluster:
        asyncio.run(main(cluster))
    context.term()


def request(request_id: str = "r0", n: int = 1, max_tokens: int = 100) -> Request:
    return Request(request_id=request_id, prompt_ids=[1, 2, 3], sampling=SamplingParams(max_tokens=max_tokens, n=n))


async def collect(stream: RequestStream) -> list[Delta]:
    return [delta async for deltas in stream for delta in deltas]


def texts(deltas: list[Delta]) -> dict[int, str]:
    found: dict[int, str] = {}
    for delta in deltas:
        found[delta.choice] = found.get(delta.choice, "") + delta.text
    return found


def is_readiness(frontend: Frontend, ready: bool) -> bool:
    return frontend.is_ready == ready


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def wait_for(cluster: FakeCluster, condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(cluster.wait_for, condition)


async def more_hellos(cluster: FakeCluster, number: int) -> None:
    def count() -> int:
        return sum(isinstance(message, FrontendHello) for message in cluster.received)

    before = count()
    await wait_for(cluster, lambda: count() >= before + number)


def test_it_says_once_that_the_cluster_is_ready(tmp_path: Path) -> None:
    said: list[bool] = []

    async def scenario(frontend: Frontend, cluster: FakeCluster) -> None:
        assert said == [True]
        for ready in (False, True):
            cluster.status = status(ready=ready)
            await until(partial(is_readiness, frontend, ready))
        assert said == [True]

    run(scenario, tmp_path, on_ready=lambda: said.append(True))


def test_choices_of_all_requests_share_one_stream(tmp_path: Path) -> None:
    async def scenario(frontend: Frontend, cluster: FakeCluster) -> None:
        stream = frontend.submit([request("r0", n=2), request("r1", n=2)], TextOptions(), frontend.now_s())
        deltas = await collect(stream)
        assert texts(deltas) == {0: "hello0", 1: "hello1", 2: "hello0", 3: "hello1"}
        finished = [delta.choice for delta in deltas if delta.finish_reason is FinishReason.LENGTH]
        assert sorted(finished) == [0, 1, 2, 3]
        assert not cluster.aborts

    run(scenario, tmp_path)


def test_submit_is_repeated_until_it_is_accepted(tmp_path: Path) -> None:
    async def scenario(frontend: Frontend, cluster: FakeCluster) -> None:
        cluster.num_lost_submits = 3
        cluster.answer = lambda request: outputs(request, [1])[:0]
        frontend.submit([request()], TextOptions(), 0.0)
        await wait_for(cluster, lambda: len(cluster.requests) >= 4)
        cluster.status = status(max_request_tokens=32)
        await until(lambda: frontend.limits().max_request_tokens == 32)  # and so `Accepted`, sent before, is here too
        await more_hellos(cluster, 3)
        num_submits = len(cluster.requests)
        await more_hellos(cluster, 3)
        assert len(cluster.requests) == num_submits

    run(scenario, tmp_path)


def test_a_lost_request_goes_on_after_what_has_come_of_it(tmp_path: Path) -> None:
    async def scenario(frontend: Frontend, cluster: FakeCluster) -> None:
        def answer(request: Request) -> list[Output | Rejected | Lost]:
            whole: list[Output | Rejected | Lost] = [*outputs(request, list(b"xylophone"))]
            if request.request_id == "r0":
                return [whole[1], whole[0], whole[5], Lost("r0"), Lost("r0"), whole[2]]
            return whole[2:]

        cluster.answer = answer
        deltas = await collect(frontend.submit([request()], TextOptions(), 0.0))
        assert texts(deltas) == {0: "xylophone"}
        assert b"".join(bytes(delta.token_ids) for delta in deltas) == b"xylophone"
        await wait_for(cluster, lambda: Abort("r0") in cluster.aborts)  # of the second `Lost`, and of what came late
        [resumed, *_] = [message for message in cluster.submits if message.resumes is not None]
        assert (resumed.request.request_id, resumed.resumes) == ("r0~1", "r0")
        assert resumed.output_ids == {0: list(b"xy")} and not resumed.is_claim
        assert frontend.metrics.num_recoveries._value.get() == 1
        num_prompt_tokens = len(resumed.request.prompt_ids)
        assert frontend.metrics.recovered_tokens._value.get() == num_prompt_tokens + len("xy")

    run(scenario, tmp_path)


def test_only_choices_that_run_on_are_resumed_and_all_begin_anew_where_nothing_is_out(tmp_path: Path) -> None:
    async def scenario(frontend: Frontend, cluster: FakeCluster) -> None:
        def answer(request: Request) -> list[Output | Rejected | Lost]:
            first = [*outputs(request, [65, 66, 67], choice=0)]
            second = [*outputs(request, [68, 69, 70], choice=1)]
            attempts: dict[str, list[Output | Rejected | Lost]] = {
                "r0": [Lost("r0")],
                "r0~1": [*first, second[0], Lost("r0~1")],
                "r0~2": [*second[1:]],
            }
            return attempts[request.request_id]

        cluster.answer = answer
        deltas = await collect(frontend.submit([request(n=2)], TextOptions(), 0.0))
        assert texts(deltas) == {0: "ABC", 1: "DEF"}
        tried = {message.request.request_id: message.output_ids for message in cluster.submits}
        assert tried == {"r0": {}, "r0~1": {}, "r0~2": {1: [68]}}

    run(scenario, tmp_path)


def test_a_request_that_fails_every_instance_ends_with_an_error(tmp_path: Path) -> None:
    async def scenario(frontend: Frontend, cluster: FakeCluster) -> None:
        cluster.answer = lambda request: [Lost(request.request_id, died=True)]
        with pytest.raises(RequestError, match="instances failed") as raised:
            await collect(frontend.submit([request()], TextOptions(), 0.0))
        assert (raised.value.status, raised.value.code) == (500, "instance_failed")
        assert len({message.request.request_id for message in cluster.submits}) == MAX_FRUITLESS + 1
        await wait_for(cluster, lambda: Abort(f"r0~{MAX_FRUITLESS}") in cluster.aborts)

    run(scenario, tmp_path)


def test_a_new_controller_is_told_of_every_request_and_what_runs_goes_on(tmp_path: Path) -> None:
    async def scenario(frontend: Frontend, cluster: FakeCluster) -> None:
        def answer(request: Request) -> list[Output | Rejected | Lost]:
            return [] if request.request_id == "r1" else [*outputs(request, [65])]

        cluster.answer = answer
        stream = frontend.submit([request("r1")], TextOptions(), 0.0)
        await wait_for(cluster, lambda: len(cluster.submits) == 1)
        # It knows no instance yet, and what they serve from the one before it.
        cluster.status = msgspec.structs.replace(cluster.status, controller="another", model=None, max_request_tokens=0)
        await wait_for(cluster, lambda: any(message.is_claim for message in cluster.submits))
        await more_hellos(cluster, 3)
        assert len(cluster.submits) == 2  # it was accepted once more
        stream.abort()
        assert frontend.limits().max_request_tokens == CONTEXT_TOKENS
        assert texts(await collect(frontend.submit([request("r2")], TextOptions(), 0.0))) == {0: "A"}

    run(scenario, tmp_path)


def test_a_stop_string_stops_the_choice_on_its_instance(tmp_path: Path) -> None:
    async def scenario(frontend: Frontend, cluster: FakeCluster) -> None:
        cluster.answer = say("one STOP two")
        deltas = await collect(frontend.submit([request(n=2)], TextOptions(("STOP",)), 0.0))
        assert texts(deltas) == {0: "one ", 1: "one "}
        await wait_for(cluster, lambda: {Abort("r0", 0), Abort("r0", 1)} <= set(cluster.aborts))

    run(scenario, tmp_path)


def test_abort_ends_the_stream_and_tells_the_cluster(tmp_path: Path) -> None:
    async def scenario(frontend: Frontend, cluster: FakeCluster) -> None:
        cluster.answer = lambda request: outputs(request, [65, 66])[:1]
        stream = frontend.submit([request("r0"), request("r1")], TextOptions(), 0.0)
        assert (await anext(stream))[0].text == "A"
        stream.abort()
        await collect(stream)
        await wait_for(cluster, lambda: {Abort("r0"), Abort("r1")} <= set(cluster.aborts))
        stream.abort()

    run(scenario, tmp_path)


def test_outputs_that_nobody_reads_are_stopped(tmp_path: Path) -> None:
    async def scenario(frontend: Frontend, cluster: FakeCluster) -> None:
        stranger = Output("stranger", 0, 0, [1])
        gone = Output("gone", 0, 0, [], FinishReason.ABORT)
        cluster.answer = lambda request: [gone, stranger, *outputs(request, [65])]
        await collect(frontend.submit([request()], TextOptions(), 0.0))
        await wait_for(cluster, lambda: Abort("stranger") in cluster.aborts)
        assert Abort("gone") not in cluster.aborts

    run(scenario, tmp_path)


def test_a_rejected_request_fails_the_stream_and_takes_back_the_others(tmp_path: Path) -> None:
    async def scenario(frontend: Frontend, cluster: FakeCluster) -> None:
        def answer(request: Request) -> list[Output | Rejected]:
            if request.request_id == "r0":
                return outputs(request, [65, 66])[:1]
            return [Rejected("r1", 429, "too many", "overloaded", "prompt")]

        cluster.answer = answer
        stream = frontend.submit([request("r0"), request("r1")], TextOptions(), 0.0)
        with pytest.raises(RequestError, match="too many") as caught:
            await collect(stream)
        assert (caught.value.status, caught.value.code, caught.value.param) == (429, "overloaded", "prompt")
        await wait_for(cluster, lambda: Abort("r0") in cluster.aborts)

    run(scenario, tmp_path)


def test_an_error_of_an_instance_reaches_the_reader(tmp_path: Path) -> None:
    async def scenario(frontend: Frontend, cluster: FakeCluster) -> None:
        def answer(request: Request) -> list[Output | Rejected]:
            return [*outputs(request, [65, 66])[:1], Output("r0", 0, 0, [], FinishReason.ERROR, error="d0.1 died")]

        cluster.answer = answer
        with pytest.raises(RequestError, match=r"d0.1 died") as caught:
            await collect(frontend.submit([request(n=2)], TextOptions(), 0.0))
        assert caught.value.status == 500
        await wait_for(cluster, lambda: Abort("r0") in cluster.aborts)

    run(scenario, tmp_path)


@pytest.mark.parametrize(
    "wrong", [Output("r0", 0, 0, [VOCAB_SIZE]), Output("r0", 0, 0, [65, 66], logprobs=[TokenLogprobs(65, -1.0)])]
)
def test_what_no_token_is_ends_the_choice_and_nothing_else(wrong: Output, tmp_path: Path) -> None:
    async def scenario(frontend: Frontend, cluster: FakeCluster) -> None:
        cluster.answer = lambda request: [wrong] if request.request_id == "r0" else outputs(request, [104, 105])
        ill, well = (frontend.submit([request(name, max_tokens=2)], TextOptions(), 0.0) for name in ("r0", "r1"))
        assert texts(await collect(well)) == {0: "hi"}
        with pytest.raises(RequestError, match="no token"):
            await collect(ill)

    run(scenario, tmp_path)


def test_close_ends_every_stream_and_takes_no_more(tmp_path: Path) -> None:
    async def scenario(frontend: Frontend, cluster: FakeCluster) -> None:
        cluster.answer = lambda request: outputs(request, [65, 66])[:1]
        stream = frontend.submit([request(n=2)], TextOptions(), 0.0)
        await anext(stream)
        frontend.close()
        deltas = await collect(stream)
        assert [delta.finish_reason for delta in deltas] == [FinishReason.ABORT] * 2
        await wait_for(cluster, lambda: Abort("r0") in cluster.aborts)
        assert not frontend.is_ready
        with pytest.raises(RequestError, match="shutting down"):
            frontend.limits()

    run(scenario, tmp_path)


def test_latencies_are_measured(tmp_path: Path) -> None:
    async def scenario(frontend: Frontend, cluster: FakeCluster) -> None:
        await collect(frontend.submit([request(n=2)], TextOptions(), frontend.now_s()))
        text = frontend.metrics.render().decode()
        assert "flowkv_ttft_seconds_count 1.0" in text
        assert "flowkv_itl_seconds_count 10.0" in text
        assert "flowkv_e2e_seconds_count 1.0" in text
        assert "flowkv_output_tokens_total 12.0" in text
        assert 'flowkv_choices_finished_total{finish_reason="length"} 2.0' in text
        assert 'flowkv_instance_steps_total{instance="p0.1"} 3.0' in text

    run(scenario, tmp_path)


def quick() -> float:
    """A clock that needs no patience: a hundred seconds pass in one."""
    return 100 * time.monotonic()


def test_a_controller_that_stops_is_noticed_and_nothing_piles_up_before_it(tmp_path: Path) -> None:
    async def scenario(frontend: Frontend, cluster: FakeCluster) -> None:
        cluster.is_stopped = True
        await more_hellos(cluster, 2)  # what it said before is here
        frontend.submit([request()], TextOptions(), frontend.now_s())
        await until(lambda: not frontend.is_ready)
        with pytest.raises(RequestError, match="the controller does not answer") as raised:
            frontend.limits()
        assert (raised.value.status, raised.value.code) == (503, "not_ready") and raised.value.retry_after_s
        num_submits = len(cluster.submits)
        await more_hellos(cluster, 5)
        assert len(cluster.submits) == num_submits
        cluster.is_stopped = False
        await wait_for(cluster, lambda: len(cluster.submits) > num_submits)
        await until(lambda: frontend.is_ready)
        frontend.limits()

    run(scenario, tmp_path, clock=quick)


def test_it_tells_its_launcher_that_it_lives(tmp_path: Path) -> None:
    told: list[Message] = []

    async def scenario(frontend: Frontend, cluster: FakeCluster) -> None:
        await until(lambda: told.count(ServiceBeat("f0")) >= 3)

    run(scenario, tmp_path, told=told)


def test_a_batch_that_waits_too_long_is_told_so_once(tmp_path: Path) -> None:
    async def scenario(frontend: Frontend, cluster: FakeCluster) -> None:
        cluster.answer = lambda request: []
        stream = frontend.submit([request("r0"), request("r1")], TextOptions(), frontend.now_s())
        with pytest.raises(RequestError, match="no token came"):
            await collect(stream)
        await more_hellos(cluster, 2)
        ended = [record.request_id for record in frontend.journal.recent]
        assert sorted(ended) == ["r0", "r1"]

    run(scenario, tmp_path, limits=LimitsConfig(queue_timeout_s=0.05))


def test_a_batch_that_nobody_takes_again_ends_together(tmp_path: Path) -> None:
    async def scenario(frontend: Frontend, cluster: FakeCluster) -> None:
        cluster.answer = lambda request: []
        stream = frontend.submit([request("r0"), request("r1")], TextOptions(), frontend.now_s())
        await wait_for(cluster, lambda: len(cluster.submits) == 2)
        cluster.num_lost_submits = 10**6
        cluster.status = msgspec.structs.replace(cluster.status, controller="another")
        with pytest.raises(RequestError, match="no other took it"):
            await collect(stream)
        await more_hellos(cluster, 2)  # it beats on

    run(scenario, tmp_path, clock=quick)
