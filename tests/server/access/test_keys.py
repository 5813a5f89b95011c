import logging
from pathlib import Path

import pytest

from flowkv.errors import ConfigError
from flowkv.server.access.keys import ApiKey, KeyRing, add_key, digest_of, key_line, new_key, read_file, read_variable

NAMES = "API_KEYS"


def test_a_key_is_found_by_its_hash_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    keys = {name: add_key(path, name) for name in ("alice", "bob@example.com")}
    assert path.stat().st_mode & 0o777 == 0o600
    assert not any(key in path.read_text() for key in keys.values())
    ring = KeyRing([], path)
    for name, key in keys.items():
        found = ring.find(key, 0.0)
        assert found is not None and found.name == name
    assert ring.find(new_key(), 0.0) is None
    assert ring.find(digest_of(keys["alice"]).hex(), 0.0) is None  # who has read the file has no key


def test_the_whole_hash_counts() -> None:
    key = new_key()
    digest = digest_of(key)
    for position in (0, 31):
        other = digest[:position] + bytes([digest[position] ^ 1]) + digest[position + 1 :]
        assert KeyRing([ApiKey("a", other)]).find(key, 0.0) is None
    assert KeyRing([ApiKey("a", digest)]).find(key, 0.0) is not None


def test_lines_have_limits_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    line = key_line("a", "x" * 40)
    path.write_text(f"# clients\n\n{line}  concurrent=2 tokens_per_minute=60 priority=-3  # the batch job\n")
    path.chmod(0o600)
    [key] = read_file(path)
    assert (key.name, key.limits, key.priority) == ("a", {"concurrent": 2, "tokens_per_minute": 60}, -3)
    assert digest_of("x" * 40).hex() not in repr(key)


def test_the_environment_takes_keys_and_hashes() -> None:
    plain, hashed = new_key(), new_key()
    keys = read_variable(NAMES, f"a:{plain}, {key_line('b', hashed)} priority=1\nc:{new_key()}")
    assert [key.name for key in keys] == ["a", "b", "c"]
    assert [keys[0].digest, keys[1].digest] == [digest_of(plain), digest_of(hashed)]
    assert KeyRing.of(None, NAMES, {}) is None
    assert KeyRing.of(None, NAMES, {NAMES: f"a:{plain}"}) is not None


def test_in_the_environment_a_hash_says_that_it_is_one() -> None:
    looks_like_a_hash = "0f" * 32
    [key] = read_variable(NAMES, f"a:{looks_like_a_hash}")
    assert key.digest == digest_of(looks_like_a_hash)
    with pytest.raises(ConfigError, match="not followed by a hash"):
        read_variable(NAMES, "a:sha256:0f")


def test_names_are_distinct_over_file_and_environment(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    add_key(path, "a")
    with pytest.raises(ConfigError, match="two keys are named a"):
        KeyRing.of(str(path), NAMES, {NAMES: f"a:{new_key()}"})


def test_a_key_is_appended_and_an_empty_file_revokes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys"
    path.write_text(f"a:{'0' * 64}")
    path.chmod(0o600)
    key = add_key(path, "b")
    assert path.read_text().startswith(f"a:{'0' * 64}\nb:sha256:") and path.read_text().count("\n") == 2
    ring = KeyRing([], path)
    path.write_text(" \n")
    assert ring.find(key, 10.0) is not None and "is empty" in caplog.text
    path.write_text("# nobody\n")
    assert ring.find(key, 20.0) is None


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("alice", "flowkv api-key alice"),
        ("alice:fk-not-its-hash", "is not followed by a hash"),
        (f":{'0' * 64}", "a key's name"),
        (f"a/b:{'0' * 64}", "a key's name"),
        (f"a:{'0' * 64} speed=3", "an option is one of concurrent"),
        (f"a:{'0' * 64} concurrent=many", "a whole number"),
        (f"a:{'0' * 64} concurrent=-1", "out of range"),
        (f"a:{'0' * 64}\na:{'1' * 64}", "two keys are named a"),
        ("", "holds no key"),
    ],
)
def test_a_broken_file_is_refused_by_line(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "keys"
    path.write_text(line)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=reason):
        KeyRing([], path)


def test_short_keys_open_files_and_missing_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fewer than 32") as failure:
        read_variable(NAMES, "a:hunter2")
    assert "hunter2" not in str(failure.value)
    path = tmp_path / "keys"
    add_key(path, "a")
    with pytest.raises(ConfigError, match="already"):
        add_key(path, "a")
    path.chmod(0o620)
    with pytest.raises(ConfigError, match="others may write"):
        KeyRing([], path)
    with pytest.raises(ConfigError, match="No such file"):
        KeyRing([], tmp_path / "none")


def test_keys_are_added_and_revoked_while_it_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys"
    first = add_key(path, "first")
    ring = KeyRing([], path)
    second = add_key(path, "second")
    assert ring.find(second, 10.0) is not None
    path.write_text(key_line("second", second) + "\n")
    assert ring.find(first, 10.5) is not None  # looked at once a second
    assert ring.find(first, 11.5) is None
    assert ring.find(second, 11.5) is not None
    path.write_text("broken")
    with caplog.at_level(logging.ERROR):
        assert ring.find(second, 13.0) is not None
        assert ring.find(second, 15.0) is not None
    assert len([record for record in caplog.records if "stay as they were" in record.message]) == 1
    path.unlink()
    assert ring.find(second, 20.0) is not None
