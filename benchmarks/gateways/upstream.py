"""An engine's OpenAI server that answers at once: what other routers are put before, and the client's own ceiling.

`python -m benchmarks.gateways.upstream PORT NUM_TOKENS`. Whatever is asked by POST gets a text of so many tokens, as
one object or as one event a token; GET is what routers ask before they believe in an engine.
"""

import asyncio
import sys
from typing import cast

import msgspec
import uvloop

from benchmarks.gateways.client import HEADERS_END

MODEL = "instant"
_INFO = {
    "status": "ok", "model_path": MODEL, "model": MODEL, "is_generation": True, "version": "0", "tp_size": 1,
    "dp_size": 1, "object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "nobody"}],
}  # fmt: skip


def _choice(text: str, finish_reason: str | None) -> dict[str, object]:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}


def _whole(num_tokens: int) -> bytes:
    usage = {"prompt_tokens": 500, "completion_tokens": num_tokens, "total_tokens": 500 + num_tokens}
    envelope = {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": MODEL}
    return msgspec.json.encode(
        envelope | {"choices": [_choice(" word" * num_tokens, "length")], "usage": usage, "kv_transfer_params": {}}
    )


def _events(num_tokens: int) -> list[bytes]:
    envelope = {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": MODEL}
    last = num_tokens - 1
    chunks = [envelope | {"choices": [_choice(" word", "length" if i == last else None)]} for i in range(num_tokens)]
    return [b"data: " + msgspec.json.encode(chunk) + b"\n\n" for chunk in chunks] + [b"data: [DONE]\n\n"]


def _sized(body: bytes) -> bytes:
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _chunked(events: list[bytes]) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in [*events, b""])


class Upstream(asyncio.Protocol):
    def __init__(self, num_tokens: int) -> None:
        self._whole = _sized(_whole(num_tokens))
        self._stream = _chunked(_events(num_tokens))
        self._info = _sized(msgspec.json.encode(_INFO))
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(HEADERS_END)) >= 0:
            start = end + len(HEADERS_END)
            head = self._buffer[:end]
            _, found, rest = head.lower().partition(b"content-length:")
            num_bytes = int(rest.split(b"\r\n", 1)[0]) if found else 0
            if len(self._buffer) < start + num_bytes:
                return
            body, self._buffer = self._buffer[start : start + num_bytes], self._buffer[start + num_bytes :]
            self._transport.write(self._answer(head, body))

    def _answer(self, head: bytes, body: bytes) -> bytes:
        if head.startswith(b"GET"):
            return self._info
        is_streamed = b'"stream":true' in body or b'"stream": true' in body
        return self._stream if is_streamed else self._whole


async def _serve(port: int, num_tokens: int) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Upstream(num_tokens), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1]), int(sys.argv[2])))
