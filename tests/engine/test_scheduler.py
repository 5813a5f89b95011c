from flowkv.config import EngineConfig
from flowkv.engine.scheduler import HybridScheduler
from flowkv.engine.sequence import Sequence
from flowkv.kv.blocks import BlockManager
from flowkv.types import Request, Role, SamplingParams

CONFIG = EngineConfig(block_size=4, max_batch_tokens=16, max_choices=4)


def scheduler(role: Role = Role.MIXED, num_blocks: int = 32) -> HybridScheduler:
    return HybridScheduler(CONFIG, BlockManager(num_blocks, CONFIG.block_size), role)


def sequence(arrival: int, num_prompt: int, num_choices: int = 1) -> Sequence:
    sampling = SamplingParams(max_tokens=50, n=num_choices)
    request = Request(request_id=f"r{arrival}", prompt_ids=[7] * num_prompt, sampling=sampling)
    return Sequence(request, "frontend", arrival, num_choices=num_choices)


def decoding(it: HybridScheduler, arrival: int, num_prompt: int) -> Sequence:
    """A sequence whose prompt is computed and whose first token is out."""
    running = sequence(arrival, num_prompt)
    assert it.blocks.prepare_write(running.block_table, 0, num_prompt) == []
    running.num_computed = num_prompt
    running.output_ids.append(1)
    it.start_decoding(running)
    return running


def step(it: HybridScheduler) -> list[tuple[str, int, int]]:
    items = it.schedule().items
    for item in items:
        item.sequence.num_computed = item.stop
    return [(item.sequence.request.request_id, item.start, item.num_tokens) for item in items]


def test_all_chunks_but_the_last_end_on_a_block_boundary() -> None:
    it = scheduler()
    it.add(sequence(0, 37))
    assert step(it) == [("r0", 0, 16)]
    assert step(it) == [("r0", 16, 16)]
    assert step(it) == [("r0", 32, 5)]


def test_prompts_share_a_step_in_order_of_arrival() -> None:
    it = scheduler()
    for arrival, num_prompt in enumerate([6, 6, 30]):
        it.add(sequence(arrival, num_prompt))
    assert step(it) == [("r0", 0, 6), ("r1", 0, 6), ("r2", 0, 4)]


def test_what_is_left_of_the_budget_is_cut_to_whole_blocks() -> None:
    it = scheduler()
    for arrival, num_prompt in enumerate([6, 5, 30]):
        it.add(sequence(arrival, num_prompt))
    assert step(it)[-1] == ("r2", 0, 4)
    assert step(it) == [("r2", 4, 16)]


def test_only_the_last_chunk_draws_once_for_each_choice() -> None:
    it = scheduler()
    it.add(sequence(0, 20, num_choices=3))
    assert [item.draws for item in it.schedule().items] == [()]
    it.prefilling[0].num_computed = 16
    assert [item.draws for item in it.schedule().items] == [(0, 1, 2)]


def test_every_running_decode_is_in_every_step_whatever_the_role() -> None:
    for role in Role:
        it = scheduler(role)
        decoding(it, 0, 5)
        it.add(sequence(1, 60))
        for i in range(4):
            assert ("r0", 5 + i, 1) in step(it)


def test_the_role_sets_the_prefill_budget_beside_running_decodes() -> None:
    chunks = {}
    for role in Role:
        it = scheduler(role)
        decoding(it, 0, 5)
        it.add(sequence(1, 60))
        chunks[role] = next(num_tokens for name, _, num_tokens in step(it) if name == "r1")
    assert chunks == {Role.PREFILL: 16, Role.MIXED: 8, Role.DECODE: 4}


def test_a_prompt_waits_for_all_of_its_blocks_and_a_block_for_each_decode() -> None:
    it = scheduler(num_blocks=6)
    decoding(it, 0, 5)
    it.add(sequence(1, 14))  # four blocks beside the two in use: none is left for the decode to grow
    assert step(it) == [("r0", 5, 1)]
    it.blocks.free(it.decoding.pop().block_table)
    assert step(it) == [("r1", 0, 14)]


def test_the_youngest_is_preempted_and_computed_again_from_its_ids() -> None:
    it = scheduler(num_blocks=4)
    old, young = decoding(it, 0, 8), decoding(it, 1, 8)
    assert step(it) == [("r0", 8, 1)]
    assert it.waiting == [young] and young.block_table == [] and young.num_computed == 0
    assert young.output_ids == [1]
    assert it.num_preemptions == 1
    old.output_ids.append(2)
    it.blocks.check_integrity([old.block_table])


def test_the_phase_that_goes_second_is_preempted_first() -> None:
    for role, victim in ((Role.DECODE, "r0"), (Role.PREFILL, "r1")):
        it = scheduler(role, num_blocks=7)
        prompt = sequence(0, 20)  # five blocks
        it.add(prompt)
        step(it)
        decoding(it, 1, 8)  # the other two, both full
        step(it)
        assert [s.request.request_id for s in it.waiting] == [victim]


def test_a_pinned_prompt_keeps_its_blocks_and_the_decode_sits_out() -> None:
    it = scheduler(Role.DECODE, num_blocks=7)
    prompt = sequence(0, 20)
    it.add(prompt)
    step(it)
    decoding(it, 1, 8)
    it.is_pinned = lambda s: s is prompt
    step(it)
    assert prompt.block_table and prompt not in it.waiting


def test_no_more_run_at_once_than_may() -> None:
    it = scheduler()
    for arrival in range(6):
        it.add(sequence(arrival, 1))
    assert len(step(it)) == CONFIG.max_choices


def num_queued(it: HybridScheduler) -> int:
    return sum(prompts.num_tokens for prompts in it.queued_prompts())


def test_a_lower_priority_number_goes_first_and_equals_by_arrival() -> None:
    it = scheduler()
    for arrival, priority in enumerate([1, 0, 1, -1]):
        request = Request(
            request_id=f"r{arrival}", prompt_ids=range(16), sampling=SamplingParams(max_tokens=5), priority=priority
        )  # fmt: skip
        it.add(Sequence(request, "frontend", arrival))
    assert num_queued(it) == 64
    assert [step(it)[0][0] for _ in range(3)] == ["r3", "r1", "r0"]
    it.prefilling.clear()
    assert num_queued(it) == 16


def test_decodes_are_in_order_of_arrival_however_they_came() -> None:
    it = scheduler()
    for arrival in (2, 0, 1):
        decoding(it, arrival, 5)
    assert step(it) == [("r0", 5, 1), ("r1", 5, 1), ("r2", 5, 1)]
    assert it.decode_context_tokens == 3 * 7


def test_a_step_that_would_decode_alone_is_left_out_where_nothing_decodes() -> None:
    it = HybridScheduler(EngineConfig(block_size=4, max_batch_tokens=16), BlockManager(64, 4), Role.MIXED, 1.0)
    it._num_shared = 100  # the last of these steps was the last that decoded
    it.add(sequence(0, 8))
    assert step(it)
