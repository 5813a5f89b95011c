"""The model that ships with the repository, served by real processes."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch
from transformers import AutoTokenizer

from flowkv.bundled import MODEL_FOLDER, MODEL_NAME
from flowkv.bundled.recall import RecallTask, recall_task
from tests.e2e.server import Server, eventually, serving
from tests.engine.test_equality import first_tie, generate
from tests.model.tiny_models import eager_model

CHECKED = ("--threads", "1", "--dtype", "float32", "--set", "engine.check_integrity=true", "--roles", "fixed")
CHUNKED = ("--set", "engine.max_batch_tokens=128")  # so that most prompts take several chunks
FILLER = (
    "Friends, Romans, countrymen, lend me your ears;\nI come to bury Caesar, not to praise him.\n"
    "The evil that men do lives after them;\nThe good is oft interred with their bones;\n"
)
NUM_TASKS = 40


@pytest.fixture(scope="module")
def pair() -> Iterator[Server]:
    with serving(*CHECKED, *CHUNKED, "--prefill", "1", "--decode", "1") as server:
        yield server


@pytest.fixture(scope="module")
def mixed() -> Iterator[Server]:
    with serving(*CHECKED, *CHUNKED, "--mixed", "1") as server:
        yield server


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120.0, max_retries=0)


def tasks() -> list[RecallTask]:
    """Questions from next to their facts to some 900 tokens away from them."""
    return [recall_task(random.Random(i), FILLER * (i % 13)) for i in range(NUM_TASKS)]


def recall(server: Server) -> list[str]:
    def ask(task: RecallTask) -> str:
        messages: Any = list(task.messages)
        answer = openai_client.chat.completions.create(
            model=MODEL_NAME, messages=messages, max_tokens=16, temperature=0
        )  # fmt: skip
        return answer.choices[0].message.content or ""

    with client(server) as openai_client, ThreadPoolExecutor(16) as pool:
        return list(pool.map(ask, tasks()))


def test_recall_is_the_same_through_prefill_and_decode_and_through_one_instance(pair: Server, mixed: Server) -> None:
    handed_over, aggregated = recall(pair), recall(mixed)
    assert handed_over == aggregated
    num_right = sum(answer == task.answer for answer, task in zip(handed_over, tasks(), strict=True))
    assert num_right >= 0.95 * NUM_TASKS
    # One that its peer has answered while that seemed silent, on a machine too busy for either, is not counted.
    eventually(
        lambda: pair.gauge("flowkv_instance_transfers_total")["prefill-0"] >= 0.9 * NUM_TASKS, "they were handed over"
    )
    assert pair.gauge("flowkv_instance_local_fallbacks_total")["prefill-0"] == 0


def test_greedy_text_is_that_of_generate(pair: Server, mixed: Server) -> None:
    """Up to the first tie of rounding; tests/engine/test_equality.py goes on beyond one, token by token."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    model = eager_model(MODEL_FOLDER)
    rng = random.Random(7)
    for length in (1, 2, 17, 128, 129, 400):
        prompt_ids = [rng.randrange(5, 1500) for _ in range(length)]
        expected = generate(model, prompt_ids)
        text = tokenizer.decode(expected[: first_tie(model, prompt_ids, expected)], skip_special_tokens=True)
        for server in (pair, mixed):
            body = {"prompt": prompt_ids, "max_tokens": len(expected), "temperature": 0, "ignore_eos": True}
            answer = server.client.post("/v1/completions", json=body).json()["choices"][0]
            assert text and answer["text"].startswith(text)


def test_a_seed_gives_the_same_text_wherever_it_runs(pair: Server, mixed: Server) -> None:
    body = {"prompt": "ROMEO:\n", "max_tokens": 60, "temperature": 0.8, "top_p": 0.95, "seed": 11, "n": 3}
    answers = [server.client.post("/v1/completions", json=body).json()["choices"] for server in (pair, mixed)]
    texts = [[choice["text"] for choice in sorted(choices, key=lambda c: c["index"])] for choices in answers]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3


def test_the_openai_client_does_chat_and_completions_streamed_and_not(pair: Server) -> None:
    with client(pair) as openai_client:
        messages: Any = [{"role": "user", "content": "copper = walrus\nanchor = finch\nRecall copper."}]
        whole = openai_client.chat.completions.create(model=MODEL_NAME, messages=messages, max_tokens=12, temperature=0)
        assert whole.choices[0].message.content == "copper = walrus"
        assert whole.choices[0].finish_reason == "stop"
        assert whole.usage is not None and whole.usage.total_tokens > whole.usage.prompt_tokens

        stream = openai_client.chat.completions.create(
            model=MODEL_NAME, messages=messages, max_tokens=12, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "copper = walrus"
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens

        verse: Any = {"model": MODEL_NAME, "prompt": "JULIET:\n", "max_tokens": 20, "temperature": 0}
        completion = openai_client.completions.create(**verse)
        pieces = openai_client.completions.create(**verse, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == completion.choices[0].text
        assert [model.id for model in openai_client.models.list()] == [MODEL_NAME]


def test_echo_with_logprobs_scores_the_prompt(pair: Server) -> None:
    body = {"prompt": "To be, or not to be", "echo": True, "logprobs": 1, "max_tokens": 0}
    answer = pair.client.post("/v1/completions", json=body).json()
    logprobs = answer["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == body["prompt"] == answer["choices"][0]["text"]
    assert logprobs["token_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])
    assert answer["usage"]["completion_tokens"] == 0


def test_stop_strings_do_not_leak(pair: Server) -> None:
    whole = {"prompt": "First Citizen:\n", "max_tokens": 40, "temperature": 0}
    text = pair.client.post("/v1/completions", json=whole).json()["choices"][0]["text"]
    stop = text[10:14]
    answer = pair.client.post("/v1/completions", json=whole | {"stop": stop}).json()["choices"][0]
    assert answer["text"] == text[: text.index(stop)]
    assert answer["finish_reason"] == "stop"
