import base64
from pathlib import Path
from typing import Any

import pytest

from flowkv.config import ServerConfig
from flowkv.errors import ConfigError, RequestError
from flowkv.server.access.doors import Access, Audience, Call, Unauthorized, access_of, host_name, is_loopback
from flowkv.server.access.keys import add_key, new_key

CLIENT, OPERATOR = new_key(), new_key()
API = {"FLOWKV_API_KEYS": f"alice:{CLIENT}"}
ADMIN = {"FLOWKV_ADMIN_KEY": OPERATOR}
LOCAL = {"host": "127.0.0.1:8000"}
MODELS, PAGE, ACTION = "/v1/models", "/metrics", "/admin/drain"


def doors(environ: dict[str, str], **server: Any) -> tuple[Access, Access]:
    return access_of(ServerConfig(**server), environ)


def code(access: Access, path: str, method: str = "GET", **headers: str) -> str:
    """What becomes of a call: the name of the key that let it in, or the code of the refusal."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        return access.admit(Call(method, path, LOCAL | named), 0.0).name
    except RequestError as error:
        assert error.code is not None
        return error.code


def bearer(key: str) -> str:
    return f"Bearer {key}"


def basic(key: str) -> str:
    return "Basic " + base64.b64encode(f"me:{key}".encode()).decode()


def test_without_keys_everything_is_open_to_this_machine_alone() -> None:
    main, _ = doors({})
    assert [code(main, path) for path in ("/health", MODELS, PAGE, ACTION)] == ["anybody"] * 3 + ["operator"]
    for host in ("localhost:8000", "[::1]:8000", "127.1.2.3", "app.localhost", ""):
        assert code(main, MODELS, host=host) == "anybody"
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "2130706433"):
        for path in (MODELS, PAGE, ACTION):
            assert code(main, path, host=host) == "forbidden_host"
    assert code(main, "/health", host="evil.example") == "anybody"


def test_web_pages_of_others_may_not_call_a_local_server() -> None:
    main, _ = doors({}, cors_origins=["https://chat.example"], allowed_hosts=["flowkv.example"])
    for origin in ("http://evil.example", "null", "http://[", "http://127.0.0.1:9000", "https://chat.example.evil"):
        for path in (MODELS, PAGE, ACTION):
            assert code(main, path, "POST", origin=origin) == "forbidden_origin"
    assert code(main, MODELS, "POST", origin="http://127.0.0.1:8000") == "anybody"
    assert code(main, MODELS, "POST", origin="https://chat.example") == "anybody"
    assert code(main, ACTION, "POST", origin="https://chat.example") == "forbidden_origin"
    assert code(main, MODELS, host="flowkv.example") == "anybody"
    assert code(main, ACTION, host="flowkv.example") == "forbidden_host"  # whoever is behind that name


def test_api_keys_open_the_api_and_nothing_else() -> None:
    main, _ = doors(API)
    assert code(main, MODELS) == "missing_api_key"
    assert code(main, MODELS, authorization=CLIENT) == "missing_api_key"
    for wrong in (new_key(), "", CLIENT[:-1], CLIENT + "x", "é"):
        assert code(main, MODELS, authorization=bearer(wrong)) == "invalid_api_key"
    assert code(main, MODELS, authorization=basic(CLIENT)) == "missing_api_key"
    assert code(main, MODELS, authorization=bearer(CLIENT)) == "alice"
    assert code(main, MODELS, authorization=f"bearer  {CLIENT} ", host="flowkv.example") == "alice"
    assert code(main, "/no/such/path") == "missing_api_key"
    assert code(main, "/health") == "anybody"
    for path in (PAGE, ACTION, "/cluster", "/dashboard/data", "/requests", "/debug/trace"):
        assert code(main, path, authorization=bearer(CLIENT)) == "shut"


def test_the_admin_key_opens_what_is_for_operators() -> None:
    main, _ = doors(API | ADMIN)
    for path in (PAGE, ACTION):
        assert code(main, path) == "missing_api_key"
        assert code(main, path, authorization=bearer(CLIENT)) == "invalid_api_key"
        assert code(main, path, authorization=bearer(OPERATOR)) == "admin"
        assert code(main, path, authorization=basic(OPERATOR)) == "admin"
    assert code(main, MODELS, authorization=bearer(OPERATOR)) == "invalid_api_key"
    assert code(main, PAGE, authorization="Basic !") == "invalid_api_key"
    # A browser that knows the password adds it to whatever a page makes it call.
    assert (
        code(main, ACTION, "POST", authorization=basic(OPERATOR), origin="https://evil.example") == "forbidden_origin"
    )
    with pytest.raises(Unauthorized) as refused:
        main.admit(Call("GET", PAGE, LOCAL), 0.0)
    assert refused.value.challenge.startswith("Basic")
    with pytest.raises(Unauthorized) as refused:
        main.admit(Call("GET", MODELS, LOCAL), 0.0)
    assert refused.value.challenge.startswith("Bearer") and refused.value.status == 401


def test_an_admin_key_alone_leaves_the_local_api_open() -> None:
    main, _ = doors(ADMIN)
    assert [code(main, path) for path in (MODELS, PAGE, ACTION)] == ["anybody", "missing_api_key", "missing_api_key"]


def test_operators_on_a_port_of_their_own() -> None:
    main, admin = doors(API, admin_port=9000)
    assert [code(main, path) for path in (PAGE, ACTION)] == ["shut", "shut"]
    assert [code(admin, path) for path in (PAGE, ACTION, MODELS, "/health")] == [
        "operator",
        "operator",
        "shut",
        "anybody",
    ]
    assert code(admin, ACTION, host="evil.example") == "forbidden_host"
    assert code(admin, ACTION, "POST", origin="https://evil.example") == "forbidden_origin"
    _, admin = doors(API | ADMIN, admin_port=9000, admin_host="0.0.0.0")
    assert code(admin, PAGE) == "missing_api_key"
    assert code(admin, PAGE, authorization=bearer(OPERATOR), host="node-3:9000") == "admin"


def test_paths_that_need_no_key_are_the_operators_choice() -> None:
    main, _ = doors(API, open_paths=["/health", "/metrics"])
    assert [code(main, path) for path in ("/metrics", "/health", "/ready")] == ["anybody", "anybody", "missing_api_key"]


def test_what_would_be_open_to_strangers_does_not_start() -> None:
    with pytest.raises(ConfigError, match="--insecure"):
        doors({}, host="0.0.0.0")
    with pytest.raises(ConfigError, match="could stop this server"):
        doors(API, admin_port=0, admin_host="0.0.0.0", insecure=True)
    main, _ = doors({}, host="0.0.0.0", insecure=True)
    assert [code(main, path, host="any.example") for path in (MODELS, PAGE, ACTION)] == ["anybody", "anybody", "shut"]
    assert code(main, MODELS, "POST", origin="http://evil.example") == "forbidden_origin"
    main, _ = doors({}, host="0.0.0.0", insecure=True, allowed_hosts=["any.example"])
    assert code(main, MODELS, host="other.example") == "forbidden_host"
    with pytest.raises(ConfigError, match="shorter than 32"):
        doors({"FLOWKV_ADMIN_KEY": "hunter2"})


def test_keys_from_files(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    key = add_key(path, "bob")
    main, _ = doors({}, api_key_file=str(path), host="0.0.0.0")
    assert code(main, MODELS, authorization=bearer(key)) == "bob"


@pytest.mark.parametrize(
    "path",
    ["/v1/models/../../etc/passwd", "/v1/models/..", "/../x", "/./x", "/v1\\models", "/v1/\x00", "/a\nb"],
)
def test_a_path_that_climbs_is_refused_whoever_asks(path: str) -> None:
    main, _ = doors({})
    assert code(main, path) == "bad_path"


@pytest.mark.parametrize("path", ["/v1/models/a..b", "/v1/models/.hidden", "/v1/models/org/name-1.5", "/v1/models/..."])
def test_a_path_with_dots_in_a_name_is_fine(path: str) -> None:
    main, _ = doors({})
    assert code(main, path) == "anybody"


def test_audiences_go_by_whole_segments() -> None:
    main, _ = doors({})
    audiences = {
        "/metrics": Audience.OPERATORS, "/metricsx": Audience.CLIENTS, "/admin": Audience.ADMINS,
        "/admin/x": Audience.ADMINS, "/administer": Audience.CLIENTS, "/health": Audience.EVERYBODY,
        "/health/x": Audience.CLIENTS, "/": Audience.CLIENTS, "//admin/x": Audience.CLIENTS,
    }  # fmt: skip
    assert {path: main.audience(path) for path in audiences} == audiences


def test_hosts() -> None:
    assert [host_name(host) for host in ("A.b:80", "[::1]:80", "[::1]", "::1", "a:b:c", "a:80:x")] == [
        "a.b", "[::1]", "[::1]", "::1", "a:b:c", "a:80:x"
    ]  # fmt: skip
    assert [is_loopback(name) for name in ("localhost", "LOCALHOST", "127.0.0.2", "::1", "[::1]", "x.localhost")] == [
        True
    ] * 6
    assert [is_loopback(name) for name in ("0.0.0.0", "10.0.0.1", "localhost.x", "", "::", "127.1")] == [False] * 6
