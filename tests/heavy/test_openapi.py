"""schemathesis against a real server: what it makes of `/openapi.json` is answered, and as the document says."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis.checks import CHECKS, load_all_checks

from tests.e2e.server import Server
from tests.heavy.leftovers import leaving_nothing
from tests.heavy.test_fuzz_http import fault

load_all_checks()
# A schema cannot say all that makes a request one that can be answered: some that fit it are refused with a 400.
# 5xx are judged here, since a 503 that says when to come back is an answer.
EXCLUDED = [CHECKS.get_one(name) for name in ("positive_data_acceptance", "not_a_server_error")]
OPERATORS = "/admin/"  # which end or change the cluster
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with leaving_nothing("--toy", "--set", "engine.check_integrity=true", "--kv-memory", "48KiB") as server:
        yield server


@pytest.mark.parametrize("examples", [4, pytest.param(300, marks=pytest.mark.slow)])
def test_what_the_document_allows_is_answered_as_it_says(server: Server, examples: int) -> None:
    document = server.client.get("/openapi.json").json()
    labels = []
    for found in schemathesis.openapi.from_dict(document).get_all_operations():
        operation: Any = found.ok()  # type: ignore[union-attr]  # where it is none, that is the error to see
        if not operation.path.startswith(OPERATORS):
            labels.append(operation.label)
            check_operation(server, operation, examples)
    assert {"POST /v1/completions", "POST /v1/chat/completions", "POST /v1/responses", "GET /metrics"} <= set(labels)


def check_operation(server: Server, operation: Any, examples: int) -> None:
    @seed(examples)
    @settings(max_examples=examples, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    @given(case=operation.as_strategy())
    def check(case: Any) -> None:
        answer = case.call(base_url=server.url, timeout=TIMEOUT_S)
        whole = httpx.Response(answer.status_code, headers=_headers(answer), content=answer.content)
        assert fault(whole) is None, (case.as_curl_command(), whole.text[:500])
        case.validate_response(answer, excluded_checks=EXCLUDED)

    check()


def _headers(answer: Any) -> dict[str, str]:
    return {name: value for name, (value, *_) in answer.headers.items() if name != "content-encoding"}
