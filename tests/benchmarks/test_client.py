"""The client against a server of ten lines, byte by byte."""

import asyncio
import json
from collections.abc import Sequence
from contextlib import suppress

import pytest

from benchmarks import BenchmarkError
from benchmarks.client import Answer, Client, run_of
from flowkv.sim.figures import Slo, figures

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(data: object) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def chunk(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


STREAM = [
    event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}),
    event({"choices": [{"index": 0, "delta": {"content": "to "}}]}),
    b": still here\n\n",
    event({"choices": [{"index": 0, "text": "be"}]}),
    event({"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}),
    event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}),
    b"data: [DONE]\n\n",
]


def ask(pieces: Sequence[bytes], timeout_s: float = 20.0, hold: bool = False) -> tuple[Answer, bytes, list[str]]:
    """What the client makes of an answer sent in these pieces (and then not closed, if `hold`), and what it sent."""
    seen: list[bytes] = []
    texts: list[str] = []

    async def main() -> Answer:
        answered = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            seen.append(await reader.readuntil(b'"prompt":"x"'))
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(0)
            if hold:
                with suppress(ConnectionResetError):
                    await reader.read()
            writer.close()
            answered.set()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            client = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", timeout_s)
            answer = await client.send(client.encode("/v1/completions", {"prompt": "x"}), texts.append)
            await answered.wait()
            return answer

    return asyncio.run(main()), seen[0], texts


def test_a_whole_stream() -> None:
    answer, sent, texts = ask([HEAD, *map(chunk, STREAM), chunk(b"")])
    assert answer.error is None
    assert (answer.text, texts, answer.finish_reason) == ("to be", ["to ", "be"], "stop")
    assert (answer.num_prompt_tokens, answer.num_output_tokens, len(answer.event_s)) == (5, 2, 2)
    assert answer.sent_s <= answer.event_s[0] <= answer.event_s[1] <= answer.finished_s
    assert sent.startswith(b"POST /v1/completions HTTP/1.1\r\n")


def test_pieces_may_be_cut_anywhere() -> None:
    whole = HEAD + b"".join(map(chunk, STREAM)) + chunk(b"")
    answer, _, _ = ask([whole[i : i + 7] for i in range(0, len(whole), 7)])
    assert (answer.text, answer.error, answer.num_output_tokens) == ("to be", None, 2)


def test_a_stream_that_breaks_off_is_an_error() -> None:
    assert (
        ask([HEAD, *map(chunk, STREAM[:3])])[0].error == "the server closed the connection in the middle of the answer"
    )
    assert ask([HEAD, *map(chunk, STREAM[:-1]), chunk(b"")])[0].error == "the stream ended without [DONE]"


def test_an_error_in_the_stream() -> None:
    answer, _, _ = ask([HEAD, chunk(STREAM[1]), chunk(event({"error": {"message": "instance lost"}}))], hold=True)
    assert (answer.error, answer.text) == ("instance lost", "to ")


def test_an_http_error_shows_its_message() -> None:
    body = json.dumps({"error": {"message": "too long", "code": None}}).encode()
    head = b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n" % len(body)
    assert ask([head, body])[0].error == "HTTP 400: too long"
    assert ask([b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 4\r\n\r\noops"])[0].error == "HTTP 502: oops"


def test_what_is_not_http_or_not_json() -> None:
    assert "not an answer" in (ask([b"SSH-2.0-x\r\n\r\n"])[0].error or "")
    assert "not an answer" in (ask([HEAD, chunk(b"data: {oops\n\n")], hold=True)[0].error or "")


def test_silence_ends_at_the_time_limit() -> None:
    assert ask([HEAD], timeout_s=0.2, hold=True)[0].error == "no end after 0.2 s"


def test_nobody_listens() -> None:
    async def main() -> Answer:
        server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        return await Client(f"http://127.0.0.1:{port}").send(b"")

    assert (asyncio.run(main()).error or "").startswith("connection failed")


@pytest.mark.parametrize("url", ["https://127.0.0.1", "127.0.0.1:8000", "http://127.0.0.1/v1"])
def test_urls_that_are_not_a_server(url: str) -> None:
    with pytest.raises(BenchmarkError, match="not of the form"):
        Client(url)


def test_a_refusal_is_told_from_a_failure() -> None:
    def status(code: int) -> Answer:
        return ask([b"HTTP/1.1 %d No\r\nContent-Length: 2\r\n\r\n{}" % code])[0]

    refused, failed = status(429), status(503)
    assert (refused.is_refused, failed.is_refused) == (True, False)
    assert refused.error is not None and failed.error is not None


def answered(*event_s: float, tokens: int | None = None, error: str | None = None) -> Answer:
    num_tokens = len(event_s) if tokens is None else tokens
    return Answer(sent_s=1.0, event_s=list(event_s), num_prompt_tokens=10, num_output_tokens=num_tokens, error=error)


def test_an_answer_in_the_figures() -> None:
    record = answered(1.5, 2.3, tokens=5).record(3, start_s=0.25)
    assert (record.index, record.arrival_s, record.num_prompt_tokens) == (3, 0.75, 10)
    assert record.ttft_s == pytest.approx(0.5)
    assert record.e2el_s == pytest.approx(1.3)
    assert record.tpot_s == pytest.approx(0.2)  # tokens, not events
    assert answered().record(0).ttft_s is None


def test_a_run_has_the_gaps_of_whole_answers() -> None:
    run = figures(run_of([answered(1.5, 1.6, 1.9), answered(1.1, 9.1, error="gone")], 2.0), Slo())
    assert (run["num_requests"], run["num_errors"], run["output_tokens"]) == (2, 1, 3)
    assert run["itl_s"]["mean"] == pytest.approx(0.2)
    assert run["itl_s"]["max"] == pytest.approx(0.3)
