"""The dashboard as an operator sees it: in Chromium, in front of a toy cluster and of clusters that are made up."""

import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from playwright.sync_api import Browser, Page, Route, expect

from flowkv.server.access.doors import ADMIN_KEY_VARIABLE
from flowkv.server.access.keys import new_key
from flowkv.server.api.dashboard import DashboardData
from flowkv.server.records.events import Event, EventKind
from flowkv.server.records.history import Quantiles, Recent, Second
from flowkv.server.records.timeline import Phase, PhaseName, RequestRecord, State
from flowkv.server.records.watch import InstanceRow
from flowkv.types import Regime, Role
from tests.browser.page import SCHEMES, SIZES, Watched, chromium, opened
from tests.e2e.server import Server, serving

MANY = [(1, "phone"), (4, "desktop"), (64, "desktop"), pytest.param(64, "phone", marks=pytest.mark.slow)]
NASTY = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(browser: Browser) -> Iterator[Server]:
    with serving("--toy", "--prefill", "1", "--decode", "2", "--kv-memory", "1MiB", "--roles", "fixed") as server:
        yield server


def ask(server: Server, number: int) -> None:
    body = {"prompt": "a prompt of some length", "max_tokens": 20, "ignore_eos": True}
    with ThreadPoolExecutor(8) as pool:
        for answer in pool.map(lambda _: server.client.post("/v1/completions", json=body), range(number)):
            assert answer.status_code == 200, answer.text


def a_request(seconds: float) -> RequestRecord:
    """It was lost once, and ended with an error after `seconds`."""
    starts = [seconds * part / 10 for part in range(10)]
    phases = [Phase(name, "decode-0", start_s, seconds / 10) for name, start_s in zip(PhaseName, starts, strict=False)]
    return RequestRecord(
        request_id=f"{NASTY}-{seconds}", arrived_at=1e9, state=State.FAILED, error="instance_died", prompt_tokens=9,
        output_tokens=1, num_choices=1, num_attempts=2, prefill_instance="prefill-0", decode_instance="decode-0",
        elapsed_s=seconds, unaccounted_s=seconds / 10, phases=phases,
    )  # fmt: skip


def made_up(num_instances: int, **changed: Any) -> DashboardData:
    """A cluster with a history."""
    peers = range(num_instances)
    rows = [
        InstanceRow(
            name=f"decode-{place}", role=list(Role)[place % 3], is_stalled=place == 1, is_draining=place == 2,
            num_flips=place, waiting=place, prefilling=1, decoding=200, sending=2, receiving=3, preempted=0,
            waiting_tokens=10_000, blocks={"filled": 700, "reserved": 200, "quarantined": 50, "free": 74},
            prefill_tokens_per_s=12_345.6, decode_tokens_per_s=789.0, step_s=0.0213,
            links=[(peer, "shm", 1e6 * peer) for peer in peers if peer != place and (place, peer) != (0, 1)],
        )
        for place in peers
    ]  # fmt: skip
    seconds = [
        Second(
            tick=tick, requests=tick % 7, finished=tick % 6, prompt_tokens=100 * (tick % 7), output_tokens=300,
            failed=tick % 50 == 0, ttft_s=Quantiles(0.1, 0.2, 0.4) if tick % 9 else None, used_fraction=0.5,
        )
        for tick in range(1000, 1600)
    ]  # fmt: skip
    events = [
        Event(time_s=1400.0, kind=EventKind.FLIP, instance="decode-0", role=Role.PREFILL, was=Role.DECODE),
        Event(time_s=1450.0, kind=EventKind.GONE, instance="decode-9", role=Role.DECODE),
        Event(time_s=1455.0, kind=EventKind.RESTARTED, instance="decode-9~1", role=Role.DECODE, detail="restart 1"),
        Event(time_s=1460.0, kind=EventKind.STALLED, instance="decode-1", role=Role.MIXED),
        Event(time_s=1465.0, kind=EventKind.LOST, detail="3"),
        Event(time_s=1470.0, kind=EventKind.REGIME, detail="normal to overloaded"),
        Event(time_s=1480.0, kind=EventKind.CONTROLLER),
    ]
    data = DashboardData(
        frontend="made up", version="1.2.3", now_s=1600.5, window_s=600, is_ready=True, status_age_s=0.1,
        model_name="made-up", regime=Regime.OVERLOADED, num_live=12, num_flips=1, num_refused=0, seconds=seconds,
        recent=Recent(ttft_s=Quantiles(0.1, 0.2, 0.4), itl_s=Quantiles(0.01, 0.02, 0.04)),
        events=events, instances=rows, slowest=[a_request(seconds) for seconds in (8.0, 2.0, 0.5)],
    )  # fmt: skip
    return msgspec.structs.replace(data, **changed)


def answer_with(watched: Watched, data: DashboardData) -> None:
    """Instead of the server, which is not asked."""

    def fulfil(route: Route) -> None:
        since = int(re.findall(r"since=(\d+)", route.request.url)[0])
        seconds = [second for second in data.seconds if second.tick >= since]
        body = msgspec.json.encode(msgspec.structs.replace(data, seconds=seconds))
        route.fulfill(body=body, content_type="application/json")

    watched.page.route("**/dashboard/data*", fulfil)


def value_of(page: Page, tile: str) -> float:
    return float(page.locator(f"#tile-{tile} dd").first.inner_text().replace("k", "e3").rstrip("% ms"))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_shows_the_cluster(browser: Browser, server: Server, scheme: str, size: str) -> None:
    ask(server, 8)
    with opened(browser, server.url, scheme, size) as watched:
        watched.page.goto("/dashboard")
        expect(watched.page.locator("#state")).to_have_text("serving")
        expect(watched.page.locator("#instances tbody tr")).to_have_count(3)
        expect(watched.page.locator("#links")).to_contain_text("6 of 6 links up (shm)")
        ground = watched.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground))) > 380) is (scheme == "light")
        watched.check(server.url)
        watched.screenshot(f"toy-{scheme}-{size}")


def test_follows_the_load(browser: Browser, server: Server) -> None:
    with opened(browser, server.url) as watched:
        watched.page.goto("/dashboard")
        expect(watched.page.locator("#tiles")).to_be_visible()
        ask(server, 40)
        expect(watched.page.locator("#tile-output dd").first).not_to_have_text(re.compile("^\\D*0?$"))
        expect(watched.page.locator("#tile-ttft dd").first).to_have_text(re.compile(r"\d (ms|s)$"))
        expect(watched.page.locator(".plot .line.decode").first).to_have_attribute("d", re.compile(r"^M.*L"))
        assert value_of(watched.page, "requests") > 0
        row = watched.page.locator("#instances tr", has_text="prefill-0").locator(".prompt")
        expect(row).not_to_have_text("0")


def test_a_killed_instance_is_an_event(browser: Browser, server: Server) -> None:
    with opened(browser, server.url) as watched:
        watched.page.goto("/dashboard")
        expect(watched.page.locator("#instances tbody tr")).to_have_count(3)
        os.kill(server.pid_of("decode-1"), signal.SIGKILL)
        events = watched.page.locator("#events")
        expect(events.locator("li.gone", has_text="decode-1")).to_have_count(1, timeout=20_000)
        expect(events.locator("li.restarted", has_text="decode-1~1")).to_have_count(1, timeout=20_000)
        expect(watched.page.locator("#instances tbody tr", has_text="decode-1~1")).to_have_count(1)
        expect(watched.page.locator(".lanes .restarted")).to_have_count(1)
        watched.check(server.url)


def test_says_when_the_server_is_away_and_recovers(browser: Browser, server: Server) -> None:
    with opened(browser, server.url) as watched:
        watched.page.goto("/dashboard")
        state, trouble = watched.page.locator("#state"), watched.page.locator("#trouble")
        expect(state).to_have_text("serving")
        watched.context.set_offline(True)
        expect(state).to_have_text("no answer")
        expect(trouble).to_contain_text("The server does not answer")
        expect(watched.page.locator("#instances tbody tr")).to_have_count(3)  # what was known stays
        watched.context.set_offline(False)
        expect(state).to_have_text("serving")
        expect(trouble).to_be_hidden()


def test_another_frontend_begins_anew(browser: Browser, server: Server) -> None:
    """One that was started again has another clock."""
    with opened(browser, server.url) as watched:
        answer_with(watched, made_up(2))
        watched.page.goto("/dashboard")
        expect(watched.page.locator("#model")).to_have_text("made-up")
        watched.page.unroute("**/dashboard/data*")
        expect(watched.page.locator("#model")).to_have_text("toy")
        expect(watched.page.locator("#instances tbody tr")).to_have_count(3)


@pytest.mark.parametrize(("num_instances", "size"), MANY)
def test_from_one_instance_to_many(browser: Browser, server: Server, num_instances: int, size: str) -> None:
    scheme = SCHEMES[num_instances % 2]
    with opened(browser, server.url, scheme, size, reduced_motion="reduce") as watched:
        answer_with(watched, made_up(num_instances))
        watched.page.goto("/dashboard")
        expect(watched.page.locator("#instances tbody tr")).to_have_count(num_instances)
        if num_instances > 1:
            expect(watched.page.locator("#trouble")).to_contain_text("Stalled: decode-1.")
            expect(watched.page.locator(".matrix .missing")).to_have_count(1)
        assert (
            watched.page.locator(".bar i").first.evaluate("node => getComputedStyle(node).transitionDuration") == "0s"
        )
        watched.check(server.url)
        watched.screenshot(f"made-up-{num_instances}-{scheme}-{size}")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_before_anything_has_happened(browser: Browser, server: Server, scheme: str) -> None:
    nothing = made_up(
        0, seconds=[], events=[], is_ready=False, status_age_s=None, recent=Recent(), num_live=0, slowest=[]
    )
    with opened(browser, server.url, scheme) as watched:
        answer_with(watched, nothing)
        watched.page.goto("/dashboard")
        expect(watched.page.locator("#instances")).to_contain_text("The controller has not been heard of yet.")
        expect(watched.page.locator("#plots")).to_contain_text("no request in this time")
        expect(watched.page.locator("#requests code")).to_contain_text(f"curl {server.url}/v1/completions")
        watched.check(server.url)
        watched.screenshot(f"nothing-{scheme}")


def test_names_are_never_markup(browser: Browser, server: Server) -> None:
    data = made_up(3, model_name=NASTY)
    rows = [msgspec.structs.replace(row, name=f"{NASTY}{place}") for place, row in enumerate(data.instances)]
    events = [msgspec.structs.replace(event, instance=NASTY, detail=NASTY) for event in data.events]
    with opened(browser, server.url) as watched:
        answer_with(watched, msgspec.structs.replace(data, instances=rows, events=events))
        watched.page.goto("/dashboard")
        expect(watched.page.locator("#model")).to_have_text(NASTY)
        expect(watched.page.locator("#instances tbody tr")).to_have_count(3)
        assert watched.page.locator("main img").count() == 0
        watched.check(server.url)


def test_plots_are_read_with_the_keyboard(browser: Browser, server: Server) -> None:
    with opened(browser, server.url) as watched:
        answer_with(watched, made_up(2))
        watched.page.goto("/dashboard")
        plot = watched.page.locator("svg.plot").first
        expect(plot).to_have_attribute("aria-label", re.compile("Requests: submitted 3,"))  # second 1599
        plot.focus()
        watched.page.keyboard.press("ArrowLeft")
        watched.page.keyboard.press("ArrowLeft")
        expect(plot).to_have_attribute("aria-label", re.compile("Requests: submitted 1,"))  # 1597
        expect(watched.page.locator("#cursor")).to_have_text(re.compile(r"^\d\d:\d\d:\d\d$"))
        watched.page.keyboard.press("Escape")
        expect(watched.page.locator("#cursor")).to_have_text("")
        watched.page.get_by_label("10 min").check()
        expect(watched.page.locator("svg.plot").first).to_contain_text("10 min")


def test_slowest_requests_show_their_phases(browser: Browser, server: Server) -> None:
    ask(server, 2)
    with opened(browser, server.url) as watched:
        watched.page.goto("/dashboard")
        request = watched.page.locator(".requests li").first
        expect(request).to_contain_text("23 → 20 tokens")
        expect(request.locator(".phases .phase-prefill")).to_have_count(1)
        expect(request.locator(".phases .phase-decode")).to_have_count(1)
        expect(request.locator("table")).to_be_hidden()
        request.locator("summary").focus()
        watched.page.keyboard.press("Enter")
        expect(request.locator("tbody tr").last).to_contain_text("in no phase")
        watched.check(server.url)
        watched.screenshot("request")


@pytest.mark.slow
def test_with_an_admin_key_the_browser_asks_for_it(browser: Browser) -> None:
    key = new_key()
    environment = {ADMIN_KEY_VARIABLE: key}
    with serving("--toy", "--mixed", "1", "--kv-memory", "1MiB", environment=environment) as server:
        assert server.client.get("/dashboard").status_code == 401
        credentials = {"username": "anyone", "password": key}
        with opened(browser, server.url, http_credentials=credentials) as operator:
            operator.page.goto("/dashboard")
            expect(operator.page.locator("#instances tbody tr")).to_have_count(1)
            operator.check(server.url)
