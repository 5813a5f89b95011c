from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkv.config import (
    ClusterConfig,
    EngineConfig,
    load_config,
    parse_bytes,
    parse_endpoint,
    prefill_budget,
    with_overrides,
)
from flowkv.errors import ConfigError
from flowkv.types import Role


def test_file_then_options_then_dotted_overrides(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('prefill = 2\ndtype = "float16"\n[engine]\nblock_size = 32\nmax_choices = 7\n')
    config = load_config(path, {"dtype": "float32", "server.port": 9}, ["engine.block_size=64", "model_name=x y"])
    assert config.prefill == 2 and config.decode == 1
    assert config.dtype == "float32" and config.server.port == 9
    assert config.engine == EngineConfig(block_size=64, max_choices=7)
    assert config.model_name == "x y"


def test_mixed_alone_means_no_prefill_and_decode_instances() -> None:
    assert load_config(None, {"mixed": 2}).roles == [Role.MIXED] * 2
    assert load_config(None, {"mixed": 1, "decode": 1}).roles == [Role.PREFILL, Role.DECODE, Role.MIXED]


@pytest.mark.parametrize(
    ("overrides", "dotted", "word"),
    [
        ({}, ["engine.blok_size=16"], "blok_size"),
        ({}, ["engine.block_size=17"], "power of two"),
        ({}, ["engine.block_size=many"], "engine.block_size"),
        ({}, ["prefill.x=1"], "prefill"),
        ({}, ["nonsense"], "KEY=VALUE"),
        ({"prefill": 0, "decode": 0}, [], "at least one instance"),
        ({"dtype": "int8"}, [], "bfloat16"),
        ({"server.port": 70000}, [], "65535"),
        ({"engine.kv_memory": "lots"}, [], "512MiB"),
        ({"device": "cuda"}, [], "device is one of cpu"),
        ({"server.max_body_bytes": -1}, [], "at least 1"),
        ({"network.listen": "10.0.0.1:0"}, [], "1 to 65535"),
        ({"network.node_timeout_s": 0}, [], "2 to 3600"),
    ],
)
def test_what_cannot_be_is_named(overrides: dict[str, object], dotted: list[str], word: str) -> None:
    if "prefill.x=1" in dotted:
        overrides = {"prefill": 1}
    with pytest.raises(ConfigError, match=word):
        load_config(None, overrides, dotted)


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("10.0.0.1", ("10.0.0.1", 8100)),
        ("node.example:1", ("node.example", 1)),
        ("::1", ("::1", 8100)),
        ("[::1]", ("::1", 8100)),
        ("[fe80::1%eth0]:65535", ("fe80::1%eth0", 65535)),
    ],
)
def test_endpoints(text: str, endpoint: tuple[str, int]) -> None:
    assert parse_endpoint(text) == endpoint


@pytest.mark.parametrize("text", ["", ":8100", "a:", "a:b", "a:0", "a:65536", "a:-1", "[]:1", "a:\N{SUPERSCRIPT TWO}"])
def test_what_is_no_endpoint(text: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        parse_endpoint(text)


def test_a_node_for_others_needs_no_instance_of_its_own() -> None:
    assert load_config(None, {"prefill": 0, "decode": 0, "network.listen": "10.0.0.1"}).roles == []


def test_a_node_may_differ_from_its_cluster() -> None:
    config = ClusterConfig(toy=True, engine=EngineConfig(block_size=32))
    changed = with_overrides(config, {"engine.threads": 3, "model": "m"})
    assert changed.engine == EngineConfig(block_size=32, threads=3) and changed.model == "m" and changed.toy
    with pytest.raises(ConfigError, match="512MiB"):
        with_overrides(config, {"engine.kv_memory": "lots"})


def test_a_file_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration file"):
        load_config(tmp_path / "none.toml", {})
    broken = tmp_path / "broken.toml"
    broken.write_text("a = = 1")
    with pytest.raises(ConfigError, match=r"broken\.toml"):
        load_config(broken, {})


def test_sizes() -> None:
    assert parse_bytes("auto") is None
    assert parse_bytes("512MiB") == 512 * 2**20
    assert parse_bytes("1.5GiB") == 3 * 2**29
    assert parse_bytes("1000") == parse_bytes(1000) == 1000
    assert load_config(None, {}, ["engine.kv_memory=1000000"]).engine.kv_memory == 1000000


@given(st.text())
def test_a_size_is_a_positive_number_or_an_error(text: str) -> None:
    try:
        num_bytes = parse_bytes(text)
    except ValueError:
        return
    assert num_bytes is None or num_bytes > 0


def test_running_decodes_shrink_the_prefill_budget_by_role() -> None:
    assert [prefill_budget(512, 16, role, 1) for role in (Role.PREFILL, Role.MIXED, Role.DECODE)] == [512, 256, 128]
    assert {prefill_budget(512, 16, role, 0) for role in Role} == {512}
    assert ClusterConfig().engine == EngineConfig()
