"""The `openai` package, unmodified, as its users use it."""

from collections.abc import Iterator

import openai
import pytest

from flowkv.types import FinishReason, Output
from tests.server.conftest import Served
from tests.server.fake_cluster import outputs, say, status


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="toy", prompt="hi", n=2, logprobs=1, temperature=0.5)
    assert [choice.text for choice in answer.choices] == ["hello0", "hello1"]
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens == list("hello0")
    assert answer.usage is not None
    assert answer.usage.total_tokens == 14


def test_completion_streamed(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="toy", prompt=[104, 105], stream=True, stop=["lo"])
    chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(choice.text for choice in chunks) == "hel"
    assert chunks[-1].finish_reason == "stop"


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="toy",
        messages=[{"role": "user", "content": "hi"}],
        logprobs=True,
        top_logprobs=1,
        max_completion_tokens=4,
    )
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "hell", "length")
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert choice.logprobs.content[0].token == "h"


def test_chat_streamed_with_usage(served: Served, client: openai.OpenAI) -> None:
    served.cluster.answer = say("naïve 你好 😀")
    stream = client.chat.completions.create(
        model="toy",
        messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    shown = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(shown) == "naïve 你好 😀"
    assert not any("\ufffd" in piece for piece in shown)
    assert last.usage is not None
    assert last.usage.completion_tokens == len("naïve 你好 😀".encode())


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").id == "toy"


def test_errors_have_their_types(served: Served, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="hi")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="toy", prompt="hi", temperature=-1)
    assert bad.value.param == "temperature"
    served.cluster.status = status(ready=False)
    while served.client.get("/ready").status_code == 200:
        pass
    with pytest.raises(openai.InternalServerError, match="not ready"):
        client.completions.create(model="toy", prompt="hi")


def test_an_error_within_a_stream_is_raised(served: Served, client: openai.OpenAI) -> None:
    lost = FinishReason.ERROR
    served.cluster.answer = lambda request: [
        *outputs(request, [65, 66])[:1],
        Output(request.request_id, 0, 0, [], lost, error="d0.1 died"),
    ]
    with pytest.raises(openai.APIError, match=r"d0.1 died"):
        list(client.completions.create(model="toy", prompt="hi", stream=True))
