"""Engines and controller over ToyRunner: any interleaving gives the same tokens and leaves no block behind."""

import json
import random

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowkv.config import EngineConfig
from flowkv.engine.batch import Batch, BatchResult, Draw, ItemResult
from flowkv.engine.toy import ToyRunner
from flowkv.grammar.vocabulary import BYTE_END_ID
from flowkv.types import GRAMMAR_ENDED, NO_TOKEN, FinishReason, Grammar, GrammarKind, Role
from tests.cluster_in_process import Cluster
from tests.effort import examples

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED


def reference(prompt_ids: list[int], choice: int = 0, **sampling: object) -> list[int]:
    """One request alone on one large mixed instance."""
    cluster = Cluster([M], num_blocks=512)
    cluster.submit("r", prompt_ids, **sampling)
    cluster.run()
    return cluster.ids("r", choice)


def prompt(seed: int, num_tokens: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(num_tokens)]


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 16, 17, 63, 100])
def test_prefill_and_decode_on_two_instances_give_the_tokens_of_one(num_tokens: int) -> None:
    ids = prompt(num_tokens, num_tokens)
    cluster = Cluster([P, D])
    cluster.submit("r", ids, max_tokens=9)
    cluster.run()
    assert cluster.ids("r") == reference(ids, max_tokens=9)
    answer = cluster.answers["r", 0]
    assert answer.instances == ["prefill-0"] + ["decode-1"] * 8
    assert answer.finish_reason is FinishReason.LENGTH
    cluster.check_at_rest()


def test_a_fresh_pool_needs_one_call_for_each_chunk() -> None:
    cluster = Cluster([P, D])
    cluster.submit("r", prompt(0, 64), max_tokens=4)
    cluster.run()
    counters = cluster.nodes["prefill-0"].engine.counters
    assert counters.transfer_calls == 4  # 64 tokens in chunks of 16
    assert counters.transfer_bytes == 16 * 3 * 2 * 4 * 8
    assert counters.num_transfers == 1


def test_a_request_that_ends_with_its_first_token_is_not_handed_over() -> None:
    ids = prompt(1, 20)
    first = reference(ids, max_tokens=1)[0]
    cluster = Cluster([P, D])
    cluster.submit("one", ids, max_tokens=1)
    cluster.submit("stop", ids, max_tokens=9, stop_token_ids=frozenset([first]))
    cluster.run()
    assert cluster.answers["one", 0].finish_reason is FinishReason.LENGTH
    assert cluster.answers["stop", 0].finish_reason is FinishReason.STOP
    assert cluster.ids("stop") == [first]
    cluster.check_at_rest()


def test_choices_prefill_once_cross_once_and_fork() -> None:
    ids = prompt(2, 30)
    sampling = {"max_tokens": 7, "n": 3, "temperature": 1.0, "seed": 5}
    cluster = Cluster([P, D])
    cluster.submit("r", ids, **sampling)
    cluster.run()
    answers = [cluster.ids("r", choice) for choice in range(3)]
    assert answers == [reference(ids, choice, **sampling) for choice in range(3)]
    assert len({tuple(a) for a in answers}) == 3
    assert cluster.nodes["prefill-0"].engine.counters.prefill_tokens == 30
    assert cluster.nodes["prefill-0"].engine.counters.num_transfers == 1
    cluster.check_at_rest()


def test_min_tokens_masks_stop_ids() -> None:
    ids = prompt(3, 10)
    stop = reference(ids, max_tokens=6)[2]
    cluster = Cluster([P, D])
    cluster.submit("r", ids, max_tokens=6, min_tokens=5, stop_token_ids=frozenset([stop]))
    cluster.run()
    assert stop not in cluster.ids("r")[:5]


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "size": {"enum": ["small", "large"]},
        "tags": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 4},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}
BY_SCHEMA: dict[str, object] = {
    "max_tokens": 200,
    "grammar": Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(SCHEMA)),
    "stop_token_ids": frozenset({BYTE_END_ID}),
}


@pytest.mark.parametrize("roles", [[M], [P, D], [P, P, D, D]])
def test_choices_follow_their_grammar_wherever_they_are_decoded(roles: list[Role]) -> None:
    """Small pools: some are preempted, and find their place again."""
    cluster = Cluster(roles, num_blocks=60, seed=1)
    prompts = {f"r{i}": prompt(i, 10 + i) for i in range(4)}
    for i, (request_id, ids) in enumerate(prompts.items()):
        cluster.submit(request_id, ids, n=2, temperature=1.0, seed=i, **BY_SCHEMA)
    cluster.run()
    for i, (request_id, ids) in enumerate(prompts.items()):
        for choice in range(2):
            answer = cluster.ids(request_id, choice)
            assert answer == reference(ids, choice, n=2, temperature=1.0, seed=i, **BY_SCHEMA)
            assert cluster.answers[request_id, choice].finish_reason is FinishReason.STOP
            jsonschema.validate(json.loads(bytes(answer[:-1])), SCHEMA)
    if len(roles) == 1:
        assert cluster.nodes["mixed-0"].engine.counters.num_preemptions > 0
    cluster.check_at_rest()


@pytest.mark.parametrize("num_tokens", [10, 60, 150])
def test_choices_go_on_in_their_grammar_where_an_instance_was_killed(num_tokens: int) -> None:
    cluster = Cluster([P, D, D], num_blocks=200, seed=num_tokens)
    for i in range(3):
        cluster.submit(f"r{i}", prompt(i, 10 + i), n=2, temperature=1.0, seed=i, **BY_SCHEMA)
    while sum(len(answer.tokens) for answer in cluster.answers.values()) < num_tokens:
        assert cluster.step()
    cluster.kill("decode-1")
    cluster.run()
    for i in range(3):
        for choice in range(2):
            expected = reference(prompt(i, 10 + i), choice, n=2, temperature=1.0, seed=i, **BY_SCHEMA)
            assert cluster.ids(f"r{i}", choice) == expected
    cluster.check_at_rest()


def test_biases_act_on_both_instances() -> None:
    cluster = Cluster([P, D])
    cluster.submit("one", prompt(3, 10), max_tokens=6, logit_bias={65: 100.0})
    cluster.submit("none", prompt(3, 10), max_tokens=6, logit_bias=dict.fromkeys(range(32, 126), -100.0))
    cluster.run()
    assert cluster.ids("one") == [65] * 6 and cluster.ids("none") == [126] * 6


def test_prompt_logprobs_alone() -> None:
    ids = prompt(4, 37)
    cluster = Cluster([P, D])
    cluster.submit("r", ids, max_tokens=0, prompt_logprobs=1)
    cluster.run()
    answer = cluster.answers["r", 0]
    assert answer.ids == [] and answer.finish_reason is FinishReason.LENGTH
    assert answer.prompt_logprobs is not None
    assert [entry.token_id for entry in answer.prompt_logprobs] == ids[1:]
    cluster.check_at_rest()


def test_without_room_on_the_decode_instance_the_prefill_instance_decodes() -> None:
    config = EngineConfig(block_size=4, max_batch_tokens=16, max_choices=1)
    cluster = Cluster([P, D], config=config)
    prompts = {f"r{i}": prompt(i, 24) for i in range(4)}
    for request_id, ids in prompts.items():
        cluster.submit(request_id, ids, max_tokens=6)
    cluster.run()
    for request_id, ids in prompts.items():
        assert cluster.ids(request_id) == reference(ids, max_tokens=6)
    assert cluster.nodes["prefill-0"].engine.counters.num_local_fallbacks > 0
    cluster.check_at_rest()


def test_a_request_larger_than_every_pool_is_refused_and_names_the_limit() -> None:
    cluster = Cluster([P, D], num_blocks=8)
    cluster.submit("r", prompt(0, 30), max_tokens=3)
    cluster.run()
    assert cluster.rejected["r"].status == 400
    assert "32 tokens" in cluster.rejected["r"].message
    cluster.check_at_rest()


class Broken(ToyRunner):
    """Its model gives no numbers for one request."""

    def run(self, batch: Batch) -> BatchResult:
        result = super().run(batch)
        for i, item in enumerate(batch.items):
            if item.sequence.request.request_id == "bad" and item.stop > 22:
                result.items[i] = ItemResult([Draw(NO_TOKEN) for _ in item.draws])
        return result


def test_logits_that_are_no_numbers_end_one_request_and_no_other() -> None:
    cluster = Cluster([P, D], make_runner=Broken)
    cluster.submit("bad", prompt(0, 20), max_tokens=9, n=2)
    cluster.submit("good", prompt(1, 20), max_tokens=9)
    cluster.run()
    for choice in range(2):
        assert cluster.answers["bad", choice].finish_reason is FinishReason.ERROR
        assert len(cluster.ids("bad", choice)) == 3
    assert cluster.ids("good") == reference(prompt(1, 20), max_tokens=9)
    cluster.check_at_rest()


def test_a_grammar_that_lets_nothing_through_is_named_as_what_ends_its_request() -> None:
    cluster = Cluster([P, D])
    cluster.submit("bad", prompt(0, 20), max_tokens=9, grammar=Grammar(kind=GrammarKind.REGEX, text="(?=a)"))
    cluster.run()
    assert cluster.answers["bad", 0].error == GRAMMAR_ENDED


def test_preempted_requests_continue_with_the_same_tokens() -> None:
    cluster = Cluster([M], num_blocks=12)
    prompts = {f"r{i}": prompt(i, 8 + i) for i in range(4)}
    for request_id, ids in prompts.items():
        cluster.submit(request_id, ids, max_tokens=20, temperature=0.7, seed=3)
    cluster.run()
    for request_id, ids in prompts.items():
        assert cluster.ids(request_id) == reference(ids, max_tokens=20, temperature=0.7, seed=3)
    assert cluster.nodes["mixed-0"].engine.counters.num_preemptions > 0
    cluster.check_at_rest()


def test_decodes_keep_running_under_endless_prefills() -> None:
    for role in (P, D, M):
        cluster = Cluster([role], num_blocks=256)
        cluster.submit("decode", prompt(0, 4), max_tokens=10)
        for i in range(20):
            cluster.submit(f"p{i}", prompt(i, 60), max_tokens=1)
        cluster.run()
        engine = cluster.nodes[f"{role}-0"].engine
        assert engine.counters.prefill_tokens == 4 + 20 * 60
        assert len(cluster.ids("decode")) == 10


roles = st.sampled_from([[P, D], [P, P, D], [P, D, D], [M], [M, M], [P, D, M]])
shapes = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 12), st.integers(1, 3)), min_size=1, max_size=7)


@settings(max_examples=examples(100), deadline=None)
@given(roles, shapes, st.integers(0, 10**6), st.integers(20, 60))
def test_every_interleaving_gives_the_same_tokens_and_frees_every_block(
    roles: list[Role], shapes: list[tuple[int, int, int]], seed: int, num_blocks: int
) -> None:
    cluster = Cluster(roles, num_blocks=num_blocks, seed=seed)
    for i, (num_tokens, max_tokens, n) in enumerate(shapes):
        cluster.submit(f"r{i}", prompt(i, num_tokens), max_tokens=max_tokens, n=n, temperature=0.5, seed=i)
    cluster.run()
    for i, (num_tokens, max_tokens, n) in enumerate(shapes):
        for choice in range(n):
            if f"r{i}" in cluster.rejected:
                assert num_tokens + max_tokens > 4 * num_blocks
                continue
            expected = reference(prompt(i, num_tokens), choice, max_tokens=max_tokens, n=n, temperature=0.5, seed=i)
            assert cluster.ids(f"r{i}", choice) == expected
    cluster.check_at_rest()


@settings(max_examples=examples(100), deadline=None)
@given(st.sampled_from([[P, D], [P, P, D, D]]), st.integers(0, 10**6))
def test_requests_may_come_while_instances_are_still_getting_to_know_each_other(roles: list[Role], seed: int) -> None:
    cluster = Cluster(roles, seed=seed, settled=False)
    for i in range(4):
        cluster.submit(f"r{i}", prompt(i, 10), max_tokens=3)
        for _ in range(6):
            cluster.step()
    cluster.run()
    for i in range(4):
        assert f"r{i}" in cluster.rejected or cluster.ids(f"r{i}") == reference(prompt(i, 10), max_tokens=3)
    cluster.check_at_rest()


@settings(max_examples=examples(100), deadline=None)
@given(roles, shapes, st.integers(0, 10**6), st.integers(20, 60), st.data())
def test_aborts_at_any_moment_leave_no_block_behind(
    roles: list[Role], shapes: list[tuple[int, int, int]], seed: int, num_blocks: int, data: st.DataObject
) -> None:
    cluster = Cluster(roles, num_blocks=num_blocks, seed=seed)
    for i, (num_tokens, max_tokens, n) in enumerate(shapes):
        cluster.submit(f"r{i}", prompt(i, num_tokens), max_tokens=max_tokens, n=n)
    for i, (_, _, n) in enumerate(shapes):
        for _ in range(data.draw(st.integers(0, 60))):
            cluster.step()
        cluster.abort(f"r{i}", data.draw(st.sampled_from([None, *range(n)])))
    cluster.run()
    cluster.check_at_rest()


@settings(max_examples=examples(100), deadline=None)
@given(st.sampled_from([[P, P, D, D], [P, D, M], [M, M]]), shapes, st.integers(0, 10**6), st.data())
def test_instances_killed_at_any_moment_leave_no_block_behind_on_the_others(
    roles: list[Role], shapes: list[tuple[int, int, int]], seed: int, data: st.DataObject
) -> None:
    cluster = Cluster(roles, num_blocks=40, seed=seed)
    for i, (num_tokens, max_tokens, n) in enumerate(shapes):
        cluster.submit(f"r{i}", prompt(i, num_tokens), max_tokens=max_tokens, n=n)
    for _ in range(data.draw(st.integers(0, 300))):
        cluster.step()
    cluster.kill(data.draw(st.sampled_from(sorted(cluster.nodes))))
    cluster.run()
    cluster.check_at_rest()
    for i, (num_tokens, max_tokens, n) in enumerate(shapes):
        for choice in range(n):
            assert cluster.ids(f"r{i}", choice) == reference(prompt(i, num_tokens), choice, max_tokens=max_tokens, n=n)


def test_blocks_that_move_out_of_the_way_of_a_reservation_take_their_kv_along() -> None:
    config = EngineConfig(block_size=4, max_batch_tokens=16, max_choices=8, max_segments=1)
    num_moved = 0
    for seed in range(12):
        rng = random.Random(seed)
        cluster = Cluster([P, D], num_blocks=28, config=config, seed=seed)
        asked = {f"r{i}": (prompt(seed + i, rng.randrange(1, 40)), rng.randrange(2, 30)) for i in range(24)}
        for request_id, (ids, max_tokens) in asked.items():
            cluster.submit(request_id, ids, max_tokens=max_tokens)
        cluster.run()
        for request_id, (ids, max_tokens) in asked.items():
            assert cluster.ids(request_id) == reference(ids, max_tokens=max_tokens)
        num_moved += cluster.nodes["decode-1"].engine.counters.num_moved_blocks
        cluster.check_at_rest()
    assert num_moved > 0


def test_the_controller_knows_of_what_is_decoded_where_it_was_prefilled_for_want_of_room() -> None:
    cluster = Cluster([P, D], num_blocks=16)
    for i in range(4):
        cluster.submit(f"r{i}", prompt(i, 24), max_tokens=20)
    while cluster.nodes["prefill-0"].engine.counters.num_local_fallbacks == 0:
        assert cluster.step()
    engine = cluster.nodes["prefill-0"].engine
    while not engine.load.num_decoding:
        assert cluster.step()
    for _ in range(30):
        cluster.step()
    views = cluster.controller._views
    assert engine.load.num_decoding + engine.load.num_preempted == len(views["prefill-0"].homes)
    cluster.run()
    cluster.check_at_rest()
