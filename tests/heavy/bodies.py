"""Valid bodies of every route that takes one, from which others are made by mutation."""

from typing import Any

PROMPT = "To be, or not to be"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
SAMPLING = {
    "max_tokens": 6, "min_tokens": 1, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "seed": 3, "n": 2,
    "stop": ["zz", "yy"], "stop_token_ids": [3], "presence_penalty": 0.5, "frequency_penalty": -0.5,
    "repetition_penalty": 1.1, "priority": 1, "ignore_eos": True,
}  # fmt: skip

BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"prompt": PROMPT, **SAMPLING, "logprobs": 2},
        {"prompt": [[1, 2, 3], [4]], "max_tokens": 3, "echo": True, "logit_bias": {"65": 5}},
        {"prompt": [1, 2, 3], "max_tokens": 5, "stream": True, "stream_options": {"include_usage": True}},
    ],
    "/v1/chat/completions": [
        {"messages": MESSAGES, **SAMPLING, "logprobs": True, "top_logprobs": 2},
        {"messages": MESSAGES, "max_completion_tokens": 4, "stream": True, "response_format": {"type": "text"}},
    ],
}


def field_names() -> list[str]:
    """Keys that bodies know, somewhere: a body may gain those of another."""
    return sorted({name for bodies in BODIES.values() for body in bodies for name in body})
