"""The comparison with peers: turns, figures, the proxy and the corrections, on stand-ins; no peer is installed."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import psutil
import pytest
from rich.console import Console

from benchmarks import BenchmarkError, report
from benchmarks.client import Answer, Client
from benchmarks.decode import Load
from benchmarks.peers import __main__ as program
from benchmarks.peers import environments, gguf_file, process, turns, vllm
from benchmarks.peers.drive import Figures, body, check, figures
from benchmarks.peers.process import PeerProcess, with_environment
from benchmarks.peers.proxy import NODE, HttpRequest, Proxy, read_request
from benchmarks.peers.summary import print_comparison, summarize
from benchmarks.peers.turns import Contestant, Play, Sample, Stage, order, samples

SMALL, LARGE = Load(1, 8, 4), Load(2, 8, 4)

SERVER = """
import http.server, os, sys
print("variable", os.environ.get("PEER_TEST"), flush=True)
if "--broken" in sys.argv:
    sys.exit("no such device")

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/alive" else 404)
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


# --- turns ---------------------------------------------------------------------------------------------------------


def test_sides_alternate_load_by_load_where_both_are_up() -> None:
    first, second = [(turn.load, turn.side) for turn in order(2, 2, True)][:4], list(order(2, 2, True))[4:]
    assert first == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [(turn.load, turn.side) for turn in second] == [(0, 1), (0, 0), (1, 1), (1, 0)]


def test_a_visit_takes_all_loads_where_one_is_up_at_a_time() -> None:
    assert [(turn.round, turn.side, turn.load) for turn in order(2, 2, False)] == [
        (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 1, 0), (1, 1, 1), (1, 0, 0), (1, 0, 1),
    ]  # fmt: skip


class Fake:
    """A contestant that writes down what happens to it; `fails_at` is a number of rounds."""

    def __init__(self, name: str, events: list[str], seeds: dict[str, list[int]]) -> None:
        self._name, self._events, self._seeds = name, events, seeds

    def contestant(self) -> Contestant:
        return Contestant(self._name, {"of": self._name}, self._open)

    @contextmanager
    def _open(self) -> Iterator[Play]:
        self._events.append(f"{self._name} up")
        yield self._play
        self._events.append(f"{self._name} down")

    def _play(self, load: Load, seed: int) -> Figures:
        self._events.append(f"{self._name} {load.batch}")
        self._seeds.setdefault(self._name, []).append(seed)
        return Figures(100.0 * load.batch if self._name == "a" else 50.0, 0.1, 0.01)


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "settled_core_fraction", lambda: 0.03)


def play_all(together: bool, rounds: int) -> tuple[list[str], dict[str, list[int]], list[Sample], Stage]:
    events: list[str] = []
    seeds: dict[str, list[int]] = {}
    pair = [Fake(name, events, seeds).contestant() for name in "ab"]
    loads = [SMALL, LARGE]
    with Stage(pair, loads, together) as stage:
        played = list(samples(stage, pair, loads, order(rounds, len(loads), together)))
    return events, seeds, played, stage


@pytest.mark.usefixtures("no_pause")
def test_both_are_warmed_up_on_every_load_before_the_first_round() -> None:
    events, _, played, stage = play_all(together=True, rounds=1)
    assert events[:6] == ["a up", "a 1", "a 2", "b up", "b 1", "b 2"]
    assert events[6:10] == ["a 1", "b 1", "a 2", "b 2"]
    assert sorted(events[10:]) == ["a down", "b down"]
    assert [sample.place for sample in played] == [0, 1, 0, 1]
    assert stage.idle_core_fraction == {"a": 0.03, "b": 0.03}


@pytest.mark.usefixtures("no_pause")
def test_apart_one_is_down_before_the_other_starts() -> None:
    events, _, played, _ = play_all(together=False, rounds=2)
    lives = [event for event in events if event[2:] in ("up", "down")]
    assert lives == ["a up", "a down", "b up", "b down", "a up", "a down"]
    assert [(sample.contestant, sample.place) for sample in played if sample.load == SMALL] == [
        ("a", 0), ("b", 1), ("b", 0), ("a", 1),
    ]  # fmt: skip


@pytest.mark.usefixtures("no_pause")
def test_both_get_the_same_prompts_and_no_prompt_comes_twice() -> None:
    _, seeds, _, _ = play_all(together=True, rounds=3)
    assert sorted(seeds["a"]) == sorted(seeds["b"])
    assert len(set(seeds["a"])) == len(seeds["a"]) == 2 + 3 * 2


@pytest.mark.usefixtures("no_pause")
def test_who_was_started_is_stopped_where_the_other_does_not_start() -> None:
    events: list[str] = []

    def broken() -> AbstractContextManager[Play]:
        raise BenchmarkError("does not start")

    pair = [Fake("a", events, {}).contestant(), Contestant("b", {}, broken)]
    with pytest.raises(BenchmarkError, match="does not start"), Stage(pair, [SMALL], True):
        pass
    assert events == ["a up", "a 1", "a down"]


def test_no_turn_begins_while_a_server_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "settled_core_fraction", lambda: 0.94)
    with pytest.raises(BenchmarkError, match=r"94% of a core: measure them with --no-together"):
        play_all(together=True, rounds=1)
    _, _, played, stage = play_all(together=False, rounds=1)
    assert len(played) == 4
    assert stage.idle_core_fraction == {"a": 0.94, "b": 0.94}


def test_a_process_that_computes_is_not_idle() -> None:
    assert process.settled_core_fraction() <= process.IDLE_CORE_FRACTION
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        fraction = process.settled_core_fraction(timeout_s=0.0)
        busy.kill()
    assert fraction > process.IDLE_CORE_FRACTION


# --- figures -------------------------------------------------------------------------------------------------------


def answer(*event_s: float) -> Answer:
    return Answer(sent_s=1.0, event_s=list(event_s), num_prompt_tokens=8, num_output_tokens=4)


def test_figures_are_of_the_whole_call() -> None:
    found = figures([answer(2.0, 2.5, 3.0, 3.5), answer(3.0, 4.0, 5.0)], 1.0, 0.5)
    assert found == Figures(8 / 4, ttft_s=1.5, itl_s=0.5, tokens_per_event=8 / 7, client_core_fraction=0.5)


def test_an_answer_of_another_length_is_no_result() -> None:
    check([answer(2.0)], SMALL)
    with pytest.raises(BenchmarkError, match=r"asked for 8/5 tokens, the server counts \(8, 4\)"):
        check([answer(2.0)], Load(1, 8, 5))


def test_an_answer_that_failed_is_no_result() -> None:
    failed = answer(2.0)
    failed.error = "HTTP 500: out of blocks"
    with pytest.raises(BenchmarkError, match="out of blocks"):
        check([failed], SMALL)


def sample(name: str, number: int, tokens_per_s: float, ttft_s: float | None = 0.1) -> Sample:
    return Sample(name, SMALL, number, 0, Figures(tokens_per_s, ttft_s))


def test_the_ratio_is_the_median_of_pairs() -> None:
    rates = [(100.0, 50.0), (10.0, 20.0), (90.0, 30.0)]
    both = [sample(name, i, rate) for i, pair in enumerate(rates) for name, rate in zip("ab", pair, strict=True)]
    (found,) = summarize(("a", "b"), both)
    assert found["ratios"] == [2.0, 0.5, 3.0]
    assert found["ratio"] == 2.0
    assert found["medians"]["a"]["tokens_per_s"] == 90.0


def test_a_round_without_its_pair_waits() -> None:
    assert summarize(("a", "b"), [sample("a", 0, 1.0)]) == []
    (found,) = summarize(("a", "b"), [sample("a", 0, 6.0), sample("b", 0, 2.0), sample("b", 1, 9.0)])
    assert found["ratios"] == [3.0]


def test_the_table_has_a_dash_for_what_a_peer_does_not_show() -> None:
    console = Console(width=140, record=True)
    summaries = summarize(("a", "b"), [sample("a", 0, 6.0), sample("b", 0, 2.0, None)])
    print_comparison(console, ("a", "b"), summaries)
    row = next(line for line in console.export_text().splitlines() if "1 x 8/4" in line)
    assert row.split() == "1 x 8/4 6 2 3.00 3.00 to 3.00 1 of 1 100.0 - - -".split()


# --- servers -------------------------------------------------------------------------------------------------------


def command(port: int, *extra: str) -> list[str]:
    return with_environment({"PEER_TEST": "a b"}, [sys.executable, "-c", SERVER, str(port), *extra])


def test_a_peer_lives_as_long_as_the_block(tmp_path: Path) -> None:
    log = tmp_path / "peer.log"
    server = PeerProcess(command, log, "/alive")
    with server as url:
        assert httpx.get(f"{url}/alive").status_code == 200
        assert server.pid != os.getpid()
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)
    assert log.read_text().startswith("variable a b\n")


def test_a_peer_that_answers_with_an_error_is_not_ready(tmp_path: Path) -> None:
    server = PeerProcess(command, tmp_path / "peer.log", "/health", start_timeout_s=1.5)
    with pytest.raises(BenchmarkError, match=r"not ready after 1\.5 s"):
        server.__enter__()


def test_a_peer_that_does_not_start_shows_why(tmp_path: Path) -> None:
    server = PeerProcess(lambda port: command(port, "--broken"), tmp_path / "peer.log")
    with pytest.raises(BenchmarkError, match=r"did not start \(exit code 1\)\n  \| variable a b\n  \| no such device"):
        server.__enter__()


def test_packages_are_installed_once(tmp_path: Path) -> None:
    said: list[str] = []
    python = environments.install(tmp_path, [["--version"]], said.append)
    assert python.exists()
    assert len(said) == 2
    environments.install(tmp_path, [["--version"]], said.append)
    assert len(said) == 2
    assert environments.versions(python, ["pip"])["pip"]
    assert (environments.site_packages(python) / "pip").is_dir()
    with pytest.raises(BenchmarkError, match="lacks one of no-such-package"):
        environments.versions(python, ["no-such-package"])


def test_a_step_that_fails_is_not_taken_for_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "sys", SimpleNamespace(executable="echo"))  # in place of making one
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho no room; exit 3")
    python.chmod(0o755)
    for _ in range(2):
        with pytest.raises(BenchmarkError, match=r"ended with code 3\n(.*\n)*.*no room"):
            environments.install(tmp_path, [["install", "x"]], lambda text: None)


def test_the_children_of_one_name_are_pinned() -> None:
    core = max(os.sched_getaffinity(0))
    with subprocess.Popen(["sh", "-c", "sleep 600 & tail -f /dev/null & wait"]) as parent:
        while len(children := psutil.Process(parent.pid).children()) < 2 or "sh" in {one.name() for one in children}:
            time.sleep(0.01)
        process.pin_children(parent.pid, "slee", core)
        pinned = {one.name(): os.sched_getaffinity(one.pid) for one in children}
        for one in (parent, *children):
            one.kill()
    assert pinned == {"sleep": {core}, "tail": os.sched_getaffinity(0)}


# --- vLLM ----------------------------------------------------------------------------------------------------------


def shipped_nixl(tmp_path: Path, line: str) -> Path:
    path = tmp_path / "nixl_cu13" / "_api.py"
    path.parent.mkdir()
    path.write_text(f"class agent_config: pass\n{line}\n")
    return path


def poll_interval_us(path: Path) -> int:
    names: dict[str, Any] = {}
    exec(path.read_text(), names)
    interval_us: int = names["agent_config"].pthrDelay
    return interval_us


def test_the_patch_leaves_nixl_as_shipped_without_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shipped_nixl(tmp_path, "agent_config.pthrDelay = 0")
    for _ in range(2):
        vllm.patch_nixl(tmp_path)
    assert poll_interval_us(path) == 0
    monkeypatch.setenv("NIXL_POLL_INTERVAL_US", "1000")
    assert poll_interval_us(path) == 1000


def test_another_nixl_is_not_patched_in_silence(tmp_path: Path) -> None:
    shipped_nixl(tmp_path, "agent_config.pthrDelay = 5")
    with pytest.raises(BenchmarkError, match="is not the one that this patch is for"):
        vllm.patch_nixl(tmp_path)


def test_the_report_says_where_threads_are_bound(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("OpenMP thread binding info: \n\tlocal_rank=0, core ids=[0, 1]\n\treserved_cpus=[2]\n")
    assert vllm.thread_binding(log) == ["core ids=[0, 1]"]
    log.write_text("OMP_NUM_THREADS=2 is set; leaving Torch threads at 2 for serving. Multi-threaded\n")
    assert vllm.thread_binding(log) == ["leaving Torch threads at 2"]


def test_compiled_and_eager_differ_in_one_argument(tmp_path: Path) -> None:
    compiled, eager = (vllm.Vllm(tmp_path, tmp_path / "model", kind, {}) for kind in (True, False))
    assert [*compiled.arguments(1), "--enforce-eager"] == eager.arguments(1)
    assert compiled.environment == eager.environment


# --- the proxy -----------------------------------------------------------------------------------------------------

Reply = Callable[[HttpRequest], bytes]


def http_answer(content: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content


@asynccontextmanager
async def stand_in(reply: Reply, seen: list[HttpRequest]) -> AsyncIterator[int]:
    """A server for one request a connection; its port."""

    async def answer_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await read_request(reader)
        seen.append(request)
        writer.write(reply(request))
        await writer.drain()
        writer.close()

    async with serving(answer_one) as port:
        yield port


@asynccontextmanager
async def serving(
    handler: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[int]:
    server = await asyncio.start_server(handler, NODE, 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


STREAM = (
    b'data: {"choices": [{"text": "w1"}]}\n\ndata: {"choices": [{"text": " w2", "finish_reason": "length"}]}\n\n'
    b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}\n\ndata: [DONE]\n\n'
)


def through_proxy(prefill_answer: bytes) -> tuple[Answer, list[HttpRequest], list[HttpRequest]]:
    """One streaming completion by the benchmark's client, and what P and D were asked."""
    at_prefill: list[HttpRequest] = []
    at_decode: list[HttpRequest] = []

    async def exchange() -> Answer:
        async with (
            stand_in(lambda _: prefill_answer, at_prefill) as prefill,
            stand_in(lambda _: http_answer(STREAM), at_decode) as decode,
            serving(Proxy(prefill, decode).answer) as port,
        ):
            client = Client(f"http://{NODE}:{port}", timeout_s=30.0)
            return await client.send(client.encode("/v1/completions", body("m", [5, 6, 7], Load(1, 3, 2))))

    return asyncio.run(exchange()), at_prefill, at_decode


def test_the_proxy_takes_what_prefill_has_to_decode() -> None:
    held = {"remote_block_ids": [[4, 5]], "remote_engine_id": "p"}
    found, at_prefill, at_decode = through_proxy(http_answer(json.dumps({"kv_transfer_params": held}).encode()))
    assert (found.error, found.text, found.num_output_tokens) == (None, "w1 w2", 2)
    asked = json.loads(at_prefill[0].body)
    assert (asked["max_tokens"], asked["min_tokens"], asked["stream"]) == (1, 1, False)
    assert "stream_options" not in asked
    assert asked["kv_transfer_params"]["do_remote_decode"] is True
    then = json.loads(at_decode[0].body)
    assert (then["max_tokens"], then["stream"], then["prompt"]) == (2, True, [5, 6, 7])
    assert then["kv_transfer_params"] == held


def test_what_prefill_refuses_goes_back_to_the_client() -> None:
    refusal = json.dumps({"error": {"message": "too long"}}).encode()
    found, _, at_decode = through_proxy(http_answer(refusal, "400 Bad Request"))
    assert found.error == "HTTP 400: too long"
    assert at_decode == []


def test_other_requests_go_to_decode() -> None:
    seen: list[HttpRequest] = []

    async def exchange() -> str:
        async with (
            stand_in(lambda request: http_answer(request.path.encode()), seen) as decode,
            serving(Proxy(1, decode).answer) as port,
            httpx.AsyncClient() as client,
        ):
            return (await client.get(f"http://{NODE}:{port}/v1/models")).text

    assert asyncio.run(exchange()) == "/v1/models"
    assert seen[0].method == "GET"


# --- llama.cpp -----------------------------------------------------------------------------------------------------


def safetensors(path: Path, arrays: dict[str, npt.NDArray[np.uint16]], dtype: str = "BF16") -> Path:
    """A file of the bits of bfloat16 values."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, bits in arrays.items():
        start, data = len(data), data + bits.tobytes()
        entries[name] = {"dtype": dtype, "shape": list(bits.shape), "data_offsets": [start, len(data)]}
    head = json.dumps(entries).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)
    return path


def test_rotated_halves_become_neighbours() -> None:
    rows = np.array([[0], [1], [2], [3], [4], [5], [10], [11], [12], [13], [14], [15]])  # two heads of six
    assert gguf_file.neighbours(rows, 2).ravel().tolist() == [0, 3, 1, 4, 2, 5, 10, 13, 11, 14, 12, 15]


def test_norms_are_widened_and_matrices_keep_their_bits(tmp_path: Path) -> None:
    bits = np.array([0x3F80, 0xC000], np.uint16)  # 1 and -2
    matrix = np.arange(8, dtype=np.uint16).reshape(4, 2)
    arrays = {
        "model.norm.weight": bits,
        "model.layers.3.self_attn.q_proj.weight": matrix,
        "model.layers.3.mlp.down_proj.weight": matrix,
    }
    config = {"num_attention_heads": 1, "num_key_value_heads": 1}
    found = dict(gguf_file.converted(safetensors(tmp_path / "model", arrays), config))
    assert found["output_norm.weight"].tolist() == [1.0, -2.0]
    assert found["blk.3.ffn_down.weight"].view(np.uint16).tolist() == matrix.tolist()
    assert found["blk.3.attn_q.weight"].view(np.uint16).tolist() == matrix[[0, 2, 1, 3]].tolist()


def test_weights_of_another_dtype_are_refused(tmp_path: Path) -> None:
    path = safetensors(tmp_path / "model", {"lm_head.weight": np.zeros((1, 1), np.uint16)}, "F16")
    with pytest.raises(ValueError, match=r"lm_head\.weight is F16"):
        list(gguf_file.tensors(path))


# --- the program ---------------------------------------------------------------------------------------------------


def test_defaults_follow_the_part() -> None:
    args = program.parse_arguments(["aggregated"])
    assert (args.batch, args.prompt_tokens, args.together) == ([1, 8, 16], [128], True)
    args = program.parse_arguments(["pd"])
    assert (args.batch, args.prompt_tokens, args.together) == ([8], [512, 2048], False)
    assert program.parse_arguments(["pd", "--together"]).together


@pytest.mark.parametrize("options", ["pd --peer generate_batch", "pd --peer-env THREADS", "pd --rounds 0"])
def test_options_that_mean_nothing_are_refused(options: str) -> None:
    with pytest.raises(SystemExit):
        program.parse_arguments(options.split())


@pytest.mark.usefixtures("no_pause")
def test_every_turn_is_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "ensure_model", lambda folder: folder)
    monkeypatch.setattr(program, "flowkv", lambda *_: Fake("a", [], {}).contestant())
    monkeypatch.setattr(program, "contestant", lambda name, *_: Fake(name, [], {}).contestant())
    written: list[int] = []
    write = report.write_report

    def watched(path: Path, results: dict[str, Any]) -> None:
        write(path, results)
        comparisons = json.loads(path.read_text())["comparisons"]
        written.append(sum(len(load["rounds"]) for one in comparisons for load in one["loads"]))

    monkeypatch.setattr(program, "write_report", watched)
    output = tmp_path / "peers.json"
    options = ["aggregated", "--peer", "vllm-eager", "generate_batch", "--batch", "2", "--rounds", "2"]
    program.run(program.parse_arguments([*options, "--output", str(output)]), Console(quiet=True))
    assert written == [0, 1, 1, 2, 2, 3, 3, 4]
    first, second = json.loads(output.read_text())["comparisons"]
    assert (first["names"], second["names"]) == (["a", "vllm-eager"], ["a", "generate_batch"])
    assert first["loads"][0]["ratio"] == 4.0
    assert first["settings"]["vllm-eager"] == {"of": "vllm-eager"}
