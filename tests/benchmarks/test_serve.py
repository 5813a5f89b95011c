import asyncio
import time
from pathlib import Path

import pytest

from benchmarks import BenchmarkError, serve
from benchmarks.client import Answer, Client
from benchmarks.report import ROOT
from flowkv.sim.figures import Slo

TRACE = str(ROOT / "benchmarks" / "data" / "mooncake.jsonl")


class FakeClient(Client):
    """Answers after the loop has gone round some times; counts how many requests were open at once."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:1")
        self.num_open = self.max_open = 0
        self.sent: list[bytes] = []

    async def send(self, request: bytes, on_text: object = None) -> Answer:
        self.sent.append(request)
        answer = Answer(sent_s=time.perf_counter())
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        for _ in range(20):
            await asyncio.sleep(0)
        self.num_open -= 1
        return answer


def test_requests_go_out_at_their_time_and_in_order() -> None:
    client = FakeClient()
    done: list[None] = []
    answers = asyncio.run(serve.replay(client, [b"a", b"b", b"c"], [0.1, 0.0, 0.05], None, lambda: done.append(None)))
    assert client.sent == [b"b", b"c", b"a"]
    assert len(answers) == len(done) == 3
    assert all(answer.late_s >= 0 for answer in answers)


def test_concurrency_is_reached_and_kept() -> None:
    client = FakeClient()
    asyncio.run(serve.replay(client, [b"x"] * 10, [1e6] * 10, 3, lambda: None))
    assert (len(client.sent), client.max_open) == (10, 3)


def test_workload_of_a_trace() -> None:
    options = f"--url http://x --trace {TRACE} --num-requests 20 --scale-length 0.1 --speedup 4"
    requests = serve.build_workload(serve.parse_arguments(options.split()))
    whole = serve.build_workload(serve.parse_arguments(["--url", "http://x", "--trace", TRACE]))
    assert [request.num_prompt_tokens for request in requests] == [round(r.num_prompt_tokens / 10) for r in whole[:20]]
    assert requests[-1].arrival_s == whole[19].arrival_s / 4
    poisson = serve.build_workload(serve.parse_arguments(["--url", "http://x", "--trace", TRACE, "--rate", "5"]))
    assert [request.hash_ids for request in poisson] == [request.hash_ids for request in whole]
    assert poisson[-1].arrival_s == pytest.approx(60, rel=0.3)


def test_a_trace_that_is_too_short() -> None:
    with pytest.raises(BenchmarkError, match="has 300 requests, fewer than 301"):
        serve.build_workload(serve.parse_arguments(["--url", "http://x", "--trace", TRACE, "--num-requests", "301"]))


@pytest.mark.parametrize(
    "options", ["", "--url x --serve y", "--url x --rate 0", "--url x --rate 1 --concurrency 2", "--url x --vocab 9:3"]
)
def test_options_that_cannot_be(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        serve.parse_arguments(options.split())
    assert error.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_summary_pools_the_rounds() -> None:
    args = serve.parse_arguments(["--url", "http://x", "--slo-ttft-s", "1"])
    (configuration,) = serve.configurations(args)
    answer = Answer(sent_s=1.0, event_s=[1.5, 2.0], finished_s=2.0, num_prompt_tokens=3, num_output_tokens=2)
    gone = Answer(sent_s=1.2, late_s=0.2, error="gone")
    counted = {"transfer_bytes": 8.0, "transfer_seconds": 2.0, "transfer_exposed_seconds": 0.5}
    serve._add_round(configuration, serve.Round([answer], 1.0, 2.0, 0.5, counted), serve._slo(args))
    serve._add_round(configuration, serve.Round([answer, gone], 0.5, 3.0, 0.5, counted), serve._slo(args))
    result = serve.summary(configuration, Slo(ttft_s=1.0))
    assert (result["num_requests"], result["num_errors"], result["errors"]) == (3, 1, ["gone"])
    assert result["output_tokens_per_s"] == pytest.approx(4 / 5)
    assert result["client_core_fraction"] == pytest.approx(0.2)
    assert result["server"]["transfer_bytes_per_s"] == 4.0
    assert [one["num_requests"] for one in result["rounds"]] == [1, 2]
    assert result["requests"]["arrival_s"] == [0.0, 0.5, pytest.approx(0.7)]  # each from the start of its round
    assert (result["max_late_s"], result["tokens_per_event"]) == (0.2, 1.0)
    assert result["itl_s"]["mean"] == pytest.approx(0.5)


def test_notes_say_what_the_client_did_to_the_figures() -> None:
    result = {"tokens_per_event": 1.0, "num_clipped": 0, "client_core_fraction": 0.25, "max_late_s": 0.001}
    assert list(serve.notes(result)) == ["client: 25% of a core, 0.001 s late at most"]
    assert len(list(serve.notes(result | {"tokens_per_event": 2.0, "num_clipped": 3}))) == 3


def test_a_wrong_trace_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "exit_on_sigterm", lambda: None)  # pytest keeps its own
    monkeypatch.setattr("sys.argv", ["serve", "--url", "http://127.0.0.1:1", "--trace", str(tmp_path / "none.jsonl")])
    with pytest.raises(SystemExit, match=r"benchmarks.serve: .*none.jsonl: cannot be read"):
        serve.main()
