import importlib
import importlib.util
from importlib.metadata import PackageNotFoundError

import pytest

from flowkv.config import load_config
from flowkv.doctor import parts
from flowkv.doctor.finding import Level
from tests.doctor.machines import machine

ALONE = load_config(None, {"toy": True}, [])
NETWORKED = load_config(None, {"toy": True, "transfer.backend": "nixl"}, [])
HAS_NIXL = importlib.util.find_spec("nixl") is not None


def test_versions() -> None:
    assert "torch" in parts.versions().text


def test_extras_are_those_of_the_metadata() -> None:
    def find(name: str) -> str:
        if name == "absent":
            raise PackageNotFoundError(name)
        return "1"

    requirements = ["numpy", 'there; extra == "one"', 'absent>=2; extra == "two"', 'absent; extra == "dev"']
    assert parts.extras(requirements, find).text == "one installed; not: two (pip install 'flowkv[two]')"
    assert parts.extras(requirements[:2], find).text == "one installed"


def test_gpus_are_seen_and_not_used() -> None:
    assert "none visible" in parts.gpu(machine()).text
    found = parts.gpu(machine(gpus=("nvidia0",)))
    assert found.level is Level.OK and "1 visible (nvidia0); this version computes on the CPU alone" in found.text


def test_nixl_is_opened_only_where_it_is_needed() -> None:
    [found] = parts.nixl(ALONE, machine())
    assert found.level is Level.OK and "does not need it" in found.text


@pytest.mark.skipif(not HAS_NIXL, reason="NIXL is not installed")
def test_nixl_opens() -> None:
    assert parts.open_nixl().level is Level.OK


def test_nixl_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    found = parts.open_nixl()
    assert found.level is Level.FAIL and "pip install 'flowkv[nixl]'" in found.advice


@pytest.mark.parametrize(("transports", "level"), [("self,sysv", Level.WARN), ("tcp,self", Level.OK), (None, Level.OK)])
def test_transports_between_nodes(monkeypatch: pytest.MonkeyPatch, transports: str | None, level: Level) -> None:
    monkeypatch.setattr(parts, "open_nixl", parts.versions)
    if transports is None:
        monkeypatch.delenv("UCX_TLS", raising=False)
    else:
        monkeypatch.setenv("UCX_TLS", transports)
    assert list(parts.nixl(NETWORKED, machine()))[1].level is level
