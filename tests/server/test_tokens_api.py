from typing import Any

import pytest

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
    ],
)
def test_what_is_refused(served: Served, path: str, body: dict[str, Any], status: int, param: str) -> None:
    response = served.client.post(path, json=body)
    assert response.status_code == status
    assert response.json()["error"]["param"] == param
