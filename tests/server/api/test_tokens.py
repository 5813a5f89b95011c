import threading
from typing import Any

import pytest

from flowkv.server.api.text_service import INLINE_SIZE
from flowkv.server.text.byte_tokenizer import ByteTokenizer
from tests.server.conftest import Served
from tests.server.fake_cluster import CONTEXT_TOKENS, VOCAB_SIZE

USER = [{"role": "user", "content": "hi"}]


def test_a_prompt_and_back(served: Served) -> None:
    answer = served.client.post("/tokenize", json={"model": "toy", "prompt": "naïve"}).json()
    ids = list("naïve".encode())
    assert answer == {"count": 6, "max_model_len": CONTEXT_TOKENS, "tokens": ids, "token_strs": None}
    assert served.client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "naïve"}


def test_a_conversation(served: Served) -> None:
    answer = served.client.post("/tokenize", json={"messages": USER, "return_token_strs": True}).json()
    assert bytes(answer["tokens"]) == b"user: hi\nassistant: "
    assert "".join(answer["token_strs"]) == "user: hi\nassistant: "


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": USER}, 400, "prompt"),
        ("/tokenize", {"messages": [{"role": "user"}]}, 400, "messages"),
        ("/tokenize", {"prompt": 1}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": [1] * (CONTEXT_TOKENS + 1)}, 400, "tokens"),
        ("/tokenize", {"prompt": "a" * (CONTEXT_TOKENS + 1), "return_token_strs": True}, 400, "prompt"),
    ],
)
def test_what_is_refused(served: Served, path: str, body: dict[str, Any], status: int, param: str) -> None:
    response = served.client.post(path, json=body)
    assert response.status_code == status
    assert response.json()["error"]["param"] == param


def test_many_short_prompts_are_tokenized_together_away_from_the_event_loop(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    encode = ByteTokenizer.encode

    def seen(self: ByteTokenizer, text: str, *, add_special_tokens: bool = True) -> list[int]:
        threads.append(threading.current_thread().name)
        return encode(self, text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(ByteTokenizer, "encode", seen)
    prompts = ["x" * 100] * (INLINE_SIZE // 100 + 1)
    assert served.client.post("/v1/completions", json={"prompt": prompts}).status_code == 200
    assert len(threads) == len(prompts) and len(set(threads)) == 1 and threads[0].startswith("asyncio_")
