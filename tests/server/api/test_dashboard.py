import re

import msgspec
import pytest

from flowkv.server.api.dashboard import FOLDER, DashboardData
from tests.e2e.server import eventually
from tests.server.conftest import Served
from tests.server.fake_cluster import status


def data(served: Served, since: int = 0) -> DashboardData:
    answer = served.client.get("/dashboard/data", params={"since": since})
    assert answer.status_code == 200 and answer.headers["cache-control"] == "no-store"
    return msgspec.json.decode(answer.content, type=DashboardData)


def test_every_file_that_the_page_names_is_there(served: Served) -> None:
    page = served.client.get("/dashboard")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    named = set(re.findall(r'(?:src|href)="dashboard/([^"]+)"', page.text))
    assert {"main.js", "style.css", "icon.svg"} <= named
    scripts = {path.name: path.read_text() for path in FOLDER.glob("*.js")}
    imported = {name for text in scripts.values() for name in re.findall(r'from "\./([^"]+)"', text)}
    assert imported | {"main.js"} == set(scripts)  # none is missing, none is left over
    for name in named | imported:
        answer = served.client.get(f"/dashboard/{name}")
        assert answer.status_code == 200 and answer.content == (FOLDER / name).read_bytes()


def test_the_page_may_load_nothing_else(served: Served) -> None:
    for path in ("/dashboard", "/dashboard/main.js", "/dashboard/data"):
        headers = served.client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    html = served.client.get("/dashboard").text
    assert "style=" not in html and not re.search(r"\son\w+=|<script(?![^>]*src)|//[a-z]", html)
    for script in FOLDER.glob("*.js"):
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|eval\(|document\.write", script.read_text())


@pytest.mark.parametrize("name", ["nothing.js", "..%2fdashboard.py", "..%2f..%2fapp.py", "%2fetc%2fpasswd"])
def test_nothing_else_is_served(served: Served, name: str) -> None:
    assert served.client.get(f"/dashboard/{name}").status_code in (400, 404)


def test_data_tells_what_was_served(served: Served) -> None:
    first = int(data(served).now_s) + 1
    eventually(lambda: data(served).now_s >= first, "a second in which nobody has asked for anything yet")
    assert served.client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 5}).status_code == 200
    assert served.client.post("/v1/completions", json={"prompt": "hi", "max_tokens": -1}).status_code == 400
    eventually(lambda: any(second.refused for second in data(served, first).seconds), "the second is over")
    found = data(served, first)
    seconds = found.seconds
    assert seconds[0].tick == first
    names = ("requests", "finished", "failed", "prompt_tokens", "output_tokens")
    assert [sum(getattr(second, name) for second in seconds) for name in names] == [1, 1, 0, 2, 5]
    assert any(second.ttft_s for second in seconds) and any(second.itl_s for second in seconds)
    assert found.recent.ttft_s is not None
    assert (found.model_name, found.is_ready, found.num_live) == ("toy", True, 0)
    assert [row.name for row in found.instances] == ["p0.1"]


def test_data_before_the_cluster_is_ready(served: Served) -> None:
    served.cluster.status = status(ready=False)
    eventually(lambda: not data(served).is_ready, "the frontend hears of it")
    assert data(served).events[-1].kind == "not_ready"


@pytest.mark.parametrize("since", ["-1", "x", "1e3", "9" * 30])
def test_a_second_that_cannot_be_is_refused(served: Served, since: str) -> None:
    assert served.client.get("/dashboard/data", params={"since": since}).status_code == 400
