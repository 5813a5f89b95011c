"""Valid bodies of every route that takes one, from which others are made by mutation."""

from typing import Any

PROMPT = "To be, or not to be"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
SAMPLING = {
    "max_tokens": 6, "min_tokens": 1, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "seed": 3, "n": 2,
    "stop": ["zz", "yy"], "stop_token_ids": [3], "presence_penalty": 0.5, "frequency_penalty": -0.5,
    "repetition_penalty": 1.1, "priority": 1, "ignore_eos": True,
}  # fmt: skip

SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "does", "parameters": SCHEMA, "strict": True}}]
CALLED = [
    {"role": "user", "content": PROMPT},
    {"role": "assistant", "content": None, "reasoning_content": "hm",
     "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
    {"role": "tool", "tool_call_id": "a", "name": "f", "content": "2"},
]  # fmt: skip
ITEMS = [
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": PROMPT}]},
    {"type": "function_call", "call_id": "a", "name": "f", "arguments": '{"x": 1}'},
    {"type": "function_call_output", "call_id": "a", "output": "2"},
]

BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"prompt": PROMPT, **SAMPLING, "logprobs": 2},
        {"prompt": [[1, 2, 3], [4]], "max_tokens": 3, "echo": True, "logit_bias": {"65": 5}},
        {"prompt": [1, 2, 3], "max_tokens": 5, "stream": True, "stream_options": {"include_usage": True}},
    ],
    "/v1/chat/completions": [
        {"messages": MESSAGES, **SAMPLING, "logprobs": True, "top_logprobs": 2},
        {"messages": MESSAGES, "max_completion_tokens": 4, "stream": True, "response_format": {"type": "text"}},
        {"messages": MESSAGES, "max_tokens": 60, "tools": TOOLS, "tool_choice": "required", "seed": 1},
        {"messages": CALLED, "max_tokens": 4, "tools": TOOLS, "parallel_tool_calls": False, "return_token_ids": True},
        {"messages": CALLED, "max_tokens": 60, "continue_final_message": True, "add_generation_prompt": False,
         "structured_outputs": {"json": SCHEMA}, "chat_template_kwargs": {"enable_thinking": False}},
    ],
    "/v1/responses": [
        {"input": PROMPT, "max_output_tokens": 6, "instructions": "Be brief.", "temperature": 0.5, "top_p": 0.9},
        {"input": ITEMS, "max_output_tokens": 6, "stream": True, "tool_choice": "auto",
         "tools": [{"type": "function", "name": "f", "description": "does", "parameters": SCHEMA, "strict": True}]},
        {"input": ITEMS, "max_output_tokens": 60, "metadata": {"a": "b"}, "top_logprobs": 2,
         "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
         "include": ["message.output_text.logprobs"]},
    ],
    "/tokenize": [
        {"prompt": PROMPT, "add_special_tokens": False, "return_token_strs": True},
        {"messages": CALLED, "tools": TOOLS, "add_generation_prompt": True},
    ],
    "/detokenize": [{"tokens": [1, 2, 3], "model": None}],
}  # fmt: skip


def field_names() -> list[str]:
    """Keys that bodies know, somewhere: a body may gain those of another."""
    return sorted({name for bodies in BODIES.values() for body in bodies for name in body})
