"""Real processes that end by themselves: each is followed by another, which takes up where it was."""

import os
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.e2e.server import Server, eventually, pause, serving
from tests.e2e.test_toy_cluster import CHECKED, check_all_free, complete, make_requests, toy_tokens

SLOW_STEPS = ("--set", "toy_step_s=0.02")
NEVER = ("--set", "restart.max_failures=0")


def kill(server: Server, name: str) -> int:
    """The number of lines before it is noticed."""
    num_lines = len(server.lines)
    os.kill(server.pid_of(name), signal.SIGKILL)
    return num_lines


def check_answers(server: Server, seed: int) -> None:
    requests = make_requests(6, seed)
    assert {name: complete(server, body) for name, body in requests.items()} == toy_tokens(requests)


def connect_anew(server: Server) -> None:
    """The connections of its client have ended with the frontend; the address is the same."""
    server.connect_anew()
    eventually(lambda: server.client.get("/ready").status_code == 200, "it is ready again")


@contextmanager
def streaming(server: Server, count: int) -> Iterator[list["Future[str]"]]:
    """Long answers, each begun and read by a thread; in the end what each has got, or why it got no more."""
    begun = [threading.Event() for _ in range(count)]

    def read(i: int) -> str:
        body = {"prompt": [i] * 40, "max_tokens": 4000, "temperature": 0.0, "stream": True}
        lines: list[str] = []
        try:
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60.0) as response:
                for line in response.iter_lines():
                    lines.append(line)
                    begun[i].set()
        except httpx.RemoteProtocolError:
            return "cut off"
        return "".join(lines)

    with ThreadPoolExecutor(count) as pool:
        outcomes = [pool.submit(read, i) for i in range(count)]
        assert all(event.wait(30.0) for event in begun)
        yield outcomes


def test_a_killed_frontend_comes_back_on_its_port_and_what_it_was_asked_is_ended_everywhere() -> None:
    with serving(*CHECKED, *SLOW_STEPS) as server:
        with streaming(server, 4) as outcomes:
            eventually(lambda: server.gauge("flowkv_instance_decoding")["decode-0"] == 4.0, "all are being decoded")
            num_lines = kill(server, "frontend")
            assert {outcome.result(30.0) for outcome in outcomes} == {"cut off"}
        server.wait_for_line(re.compile("the frontend was killed by SIGKILL; starting it again$"), num_lines)
        server.wait_for_line(re.compile("frontend~1: ready"), num_lines)
        connect_anew(server)
        check_all_free(server)
        check_answers(server, seed=1)
        kill(server, "frontend~1")
        server.wait_for_line(re.compile("frontend~2: ready"), num_lines)
        connect_anew(server)
        check_answers(server, seed=2)


def test_an_instance_that_keeps_ending_without_progress_stays_down_and_the_rest_serves() -> None:
    with serving(*CHECKED, "--decode", "2", "--set", "restart.max_failures=2") as server:
        (server.run_folder() / "decode-0~1").mkdir()  # where its successor would listen
        num_lines = kill(server, "decode-0")
        server.wait_for_line(re.compile("decode-0~1 .*; it stays down: 2 times in a row without progress"), num_lines)
        check_answers(server, seed=3)
        assert set(server.gauge("flowkv_instance_blocks_total")) == {"prefill-0", "decode-1"}


@pytest.mark.parametrize("victim", ["controller", "frontend"])
def test_where_nothing_is_to_be_started_again_the_end_of_one_is_the_end_of_all(victim: str) -> None:
    with serving(*CHECKED, *NEVER) as server:
        kill(server, victim)
        assert server.wait() == 1
        assert f"error: the {victim} was killed by SIGKILL: restart.max_failures is 0" in server.lines[-1]


def test_what_is_killed_stays_neither_as_a_process_nor_as_a_zombie() -> None:
    with serving(*CHECKED) as server:
        for victim in ("decode-0", "frontend", "controller"):
            pid = server.pid_of(victim)
            num_lines = kill(server, victim)
            server.wait_for_line(re.compile(f"{victim}~1: ready"), num_lines)
            eventually(lambda pid=pid: not Path(f"/proc/{pid}").exists(), f"{victim} is gone")  # type: ignore[misc]


def test_an_instance_that_hangs_is_killed_and_another_takes_its_place() -> None:
    with serving(*CHECKED) as server:
        num_lines = len(server.lines)
        pause(server.pid_of("decode-0"))
        server.wait_for_line(re.compile("decode-0 said nothing for too long; starting it again"), num_lines)
        server.wait_for_line(re.compile("decode-0~1: ready"), num_lines)
        check_answers(server, seed=4)
        check_all_free(server)


@pytest.mark.slow
def test_a_controller_or_frontend_that_hangs_is_killed_and_another_takes_its_place() -> None:
    with serving(*CHECKED) as server:
        num_lines = len(server.lines)
        pause(server.pid_of("controller"))
        eventually(lambda: server.client.get("/ready").status_code == 503, "its silence is noticed")
        refused = server.client.post("/v1/completions", json={"prompt": [3], "max_tokens": 1})
        assert refused.status_code == 503 and refused.headers["retry-after"]
        server.wait_for_line(re.compile("the controller said nothing for too long; starting it again"), num_lines)
        eventually(lambda: server.client.get("/ready").status_code == 200, "it is ready again")
        check_answers(server, seed=9)
        num_lines = len(server.lines)
        pause(server.pid_of("frontend"))
        server.wait_for_line(re.compile("the frontend said nothing for too long; starting it again"), num_lines)
        server.wait_for_line(re.compile("frontend~1: ready"), num_lines)
        connect_anew(server)
        check_answers(server, seed=10)
        check_all_free(server)


def test_streams_flow_on_while_the_controller_is_killed_and_started_again() -> None:
    with serving(*CHECKED, *SLOW_STEPS, "--decode", "2") as server:
        body = {"prompt": [3] * 40, "max_tokens": 200, "temperature": 0.0}
        [expected] = toy_tokens({"r": body})["r"]
        with ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(complete, server, body) for _ in range(4)]
            eventually(lambda: sum(server.gauge("flowkv_instance_decoding").values()) == 4.0, "all are being decoded")
            num_lines = kill(server, "controller")
            server.wait_for_line(re.compile("controller~1: ready"), num_lines)
            late = complete(server, body | {"max_tokens": 10})  # what comes meanwhile is answered too
            assert [answer.result(60.0) for answer in answers] == [[expected]] * 4
        assert late == [expected[:10]]
        check_all_free(server)
        kill(server, "decode-0")
        server.wait_for_line(re.compile("decode-0~1: ready"), num_lines)
        eventually(lambda: "decode-0~1" in server.gauge("flowkv_instance_blocks_total"), "the new one knows it")
        check_answers(server, seed=5)


def test_an_instance_that_ends_while_there_is_no_controller_is_not_waited_for() -> None:
    with serving(*CHECKED, "--decode", "2") as server:
        num_lines = len(server.lines)
        for victim in ("controller", "decode-0"):
            os.kill(server.pid_of(victim), signal.SIGKILL)
        for name in ("controller~1", "decode-0~1"):
            server.wait_for_line(re.compile(f"{name}: ready"), num_lines)
        names = {"prefill-0", "decode-1", "decode-0~1"}
        eventually(lambda: set(server.gauge("flowkv_instance_blocks_total")) == names, "all are known")
        check_answers(server, seed=6)
        check_all_free(server)


def fork_server_of(server: Server, name: str) -> int:
    """The parent of an instance, which is not the launcher."""
    return int(Path(f"/proc/{server.pid_of(name)}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_killed_fork_server_is_replaced_when_the_next_instance_is_started() -> None:
    with serving(*CHECKED) as server:
        pid = fork_server_of(server, "decode-0")
        assert pid != server.process.pid
        os.kill(pid, signal.SIGKILL)
        check_answers(server, seed=7)
        num_lines = kill(server, "decode-0")
        server.wait_for_line(re.compile("decode-0~1: ready"), num_lines)
        check_answers(server, seed=8)
        assert fork_server_of(server, "decode-0~1") != pid


@pytest.mark.parametrize("first", ["controller", "frontend", "fork server"])
def test_a_killed_launcher_leaves_nothing_behind_whatever_was_killed_before(first: str) -> None:
    with serving(*CHECKED) as server:
        os.kill(fork_server_of(server, "decode-0") if first == "fork server" else server.pid_of(first), signal.SIGKILL)
        server.process.send_signal(signal.SIGKILL)
        server.wait()
        eventually(lambda: server.processes() == [], "every process is gone")
        eventually(lambda: server.files() == [], "the run folder is gone")
