"""What an instance says of how long a request was in each stage: seconds of its own clock, which begins anywhere."""

import msgspec

from flowkv.config import EngineConfig
from flowkv.engine.batch import BatchResult, Draw, ItemResult
from flowkv.engine.effects import Send
from flowkv.engine.engine import Engine
from flowkv.messages import Dispatch, KvReady, Outputs, PeerInfo, PeerUp, Reserve
from flowkv.transfer.base import Arrived, Linked
from flowkv.types import FinishReason, Output, Request, Role, SamplingParams, Timings
from tests.pools import descriptor

CONFIG = EngineConfig(block_size=4, max_batch_tokens=8, max_choices=8)
START_S = 1000.0


class Instance:
    """An engine whose clock the test sets."""

    def __init__(self, num_blocks: int = 16) -> None:
        self.engine = Engine("me", CONFIG, num_blocks, Role.MIXED, "controller", 6.0)
        self.engine.handle(PeerUp(PeerInfo("peer", "peer", descriptor("peer"))), START_S)
        self.engine.on_linked(Linked("peer", "local"), START_S)
        self.engine.take_effects()

    def dispatch(self, request: Request, at_s: float, *decode_instances: str) -> None:
        self.engine.handle(Dispatch(1, request, "frontend", list(decode_instances)), START_S + at_s)

    def step(self, began_s: float, ended_s: float) -> list[Output]:
        """What it puts out."""
        batch = self.engine.next_batch(START_S + began_s)
        assert batch is not None
        items = [ItemResult([Draw(9) for _ in item.draws]) for item in batch.items]
        self.engine.on_result(BatchResult(batch.batch_id, items), ended_s - began_s, START_S + ended_s)
        sent = [effect.message for effect in self.engine.take_effects() if isinstance(effect, Send)]
        return [output for message in sent if isinstance(message, Outputs) for output in message.outputs]


def make_request(num_prompt: int = 12, max_tokens: int = 3, n: int = 1) -> Request:
    return Request(request_id="r", prompt_ids=[5] * num_prompt, sampling=SamplingParams(max_tokens=max_tokens, n=n))


def test_the_first_output_says_how_long_the_prompt_was_queued_and_computed() -> None:
    instance = Instance()
    instance.dispatch(make_request(), 1.0, "peer")
    assert instance.step(3.0, 4.0) == []  # the first of two chunks
    [output] = instance.step(4.0, 4.5)
    assert output.timings == Timings(queued_s=2.0, prefill_s=1.5)


def test_a_request_that_stays_waits_and_decodes_where_it_was_prefilled() -> None:
    instance = Instance()
    instance.dispatch(make_request(num_prompt=4), 0.0)
    [first] = instance.step(0.0, 1.0)
    [second] = instance.step(1.5, 2.0)
    [last] = instance.step(2.0, 4.0)
    assert first.timings == Timings(prefill_s=1.0)
    assert second.timings == Timings(waiting_s=0.5, decode_s=0.5)
    assert last.finish_reason is FinishReason.LENGTH
    assert last.timings == Timings(decode_s=2.5)


def test_what_is_between_the_first_and_the_last_output_says_nothing() -> None:
    instance = Instance()
    instance.dispatch(make_request(num_prompt=4, max_tokens=5), 0.0)
    outputs = [output for number in range(5) for output in instance.step(float(number), number + 1.0)]
    assert [output.timings is None for output in outputs] == [False, False, True, True, False]


def test_a_decode_instance_tells_reserved_transferring_waiting_and_decoding_apart() -> None:
    instance = Instance()
    reserve = Reserve("peer", 1, make_request(), "frontend")
    instance.engine.handle(reserve, START_S + 1.0)
    instance.engine.on_arrived(Arrived(1, 2), START_S + 2.0)
    instance.engine.on_arrived(Arrived(1, 1), START_S + 2.5)
    instance.engine.handle(KvReady("peer", "r", 1, 3, {0: [9]}), START_S + 3.0)
    instance.engine.take_effects()
    [output] = instance.step(3.25, 4.25)
    assert output.timings == Timings(reserved_s=1.0, transfer_s=1.0, waiting_s=0.25, decode_s=1.0)


def test_each_choice_tells_of_itself() -> None:
    instance = Instance()
    instance.dispatch(make_request(num_prompt=4, max_tokens=2, n=2), 0.0)
    firsts, lasts = instance.step(0.0, 1.0), instance.step(1.0, 2.0)
    assert [output.timings for output in firsts] == [Timings(prefill_s=1.0)] * 2
    assert [output.timings for output in lasts] == [Timings(decode_s=1.0)] * 2


def test_a_preempted_choice_goes_on_with_the_times_that_it_had() -> None:
    instance = Instance(num_blocks=4)
    older = make_request(num_prompt=4, max_tokens=8)
    younger = msgspec.structs.replace(older, request_id="younger")
    instance.dispatch(older, 0.0)
    instance.dispatch(younger, 0.0)
    outputs = []
    for number in range(100):
        if not instance.engine.has_work:
            break
        outputs += instance.step(float(number), number + 1.0)
    assert instance.engine.counters.num_preemptions == 1
    told = [output.timings for output in outputs if output.request_id == "younger" and output.timings is not None]
    assert [timings.prefill_s for timings in told if timings.prefill_s] == [1.0]
    decoded_s = [timings.decode_s for timings in told if timings.decode_s]
    assert [decoded_s[0], decoded_s[-1]] == [1.0, number - 1.0]  # it was out of the queues in between
