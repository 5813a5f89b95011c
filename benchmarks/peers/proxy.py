"""vLLM's P/D over NIXL needs somebody to tell D what P has: the least that does, a process of its own.

    python -m benchmarks.peers.proxy PREFILL_PORT DECODE_PORT --port PORT

A completion goes to P first, for one token, which P's answer brings with `kv_transfer_params`; then, with these, to D,
whose answer passes through byte by byte. D computes the first token again. Anything else goes to D as it is.
"""

import argparse
import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NODE = "127.0.0.1"
_PASS_BYTES = 65_536
_TO_PREFILL = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


@dataclass(frozen=True, slots=True)
class HttpRequest:
    method: str
    path: str
    body: bytes

    def encode(self) -> bytes:
        """The connection closes after the answer, whose end is therefore the end of the stream."""
        head = f"{self.method} {self.path} HTTP/1.1\r\nHost: {NODE}\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(self.body)}\r\nConnection: close\r\n\r\n".encode() + self.body


async def read_request(reader: asyncio.StreamReader) -> HttpRequest:
    """Raises asyncio.IncompleteReadError where the client leaves before the end."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.split("\r\n")
    method, path, _ = first.split(" ", 2)
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return HttpRequest(method, path, await reader.readexactly(int(fields.get("content-length", 0))))


def for_prefill(body: Mapping[str, Any]) -> dict[str, Any]:
    """The same request for one token, not streamed, its KV kept for D."""
    kept = {name: value for name, value in body.items() if name != "stream_options"}
    return {**kept, "stream": False, "max_tokens": 1, "min_tokens": 1, "kv_transfer_params": _TO_PREFILL}


class Proxy:
    def __init__(self, prefill_port: int, decode_port: int) -> None:
        self._prefill_port = prefill_port
        self._decode_port = decode_port

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request of one client, and the end of its connection."""
        try:
            request = await read_request(reader)
            if request.method == "POST":
                await self._complete(request, writer)
            else:
                await _pass(self._decode_port, request, writer)
        finally:
            writer.close()

    async def _complete(self, request: HttpRequest, writer: asyncio.StreamWriter) -> None:
        body = json.loads(request.body)
        first = HttpRequest("POST", request.path, json.dumps(for_prefill(body)).encode())
        answer = await _ask(self._prefill_port, first)
        head, _, content = answer.partition(b"\r\n\r\n")
        if head.split(b" ", 2)[1] != b"200":
            writer.write(answer)
            return
        params = json.loads(content)["kv_transfer_params"]
        second = json.dumps({**body, "kv_transfer_params": params}).encode()
        await _pass(self._decode_port, HttpRequest("POST", request.path, second), writer)


async def _ask(port: int, request: HttpRequest) -> bytes:
    reader, writer = await asyncio.open_connection(NODE, port)
    try:
        writer.write(request.encode())
        return await reader.read()
    finally:
        writer.close()


async def _pass(port: int, request: HttpRequest, client: asyncio.StreamWriter) -> None:
    reader, writer = await asyncio.open_connection(NODE, port)
    try:
        writer.write(request.encode())
        while piece := await reader.read(_PASS_BYTES):
            client.write(piece)
            await client.drain()
    finally:
        writer.close()


async def serve(proxy: Proxy, port: int) -> None:
    server = await asyncio.start_server(proxy.answer, NODE, port)
    async with server:
        await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.proxy", description=__doc__)
    parser.add_argument("prefill_port", type=int)
    parser.add_argument("decode_port", type=int)
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    asyncio.run(serve(Proxy(args.prefill_port, args.decode_port), args.port))


if __name__ == "__main__":
    main()
