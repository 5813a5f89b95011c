import pickle
from pathlib import Path

import pytest

from flowkv.auth import KEY_VARIABLE, ClusterKey, new_key, read_key
from flowkv.errors import ConfigError

TEXT = "correct horse battery staple, and more"


def key_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "key"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_the_file_wins_over_the_environment_and_spaces_around_the_key_do_not_count(tmp_path: Path) -> None:
    environ = {KEY_VARIABLE: f" {TEXT}\n"}
    assert read_key(None, environ) == ClusterKey.derive(TEXT)
    other = new_key()
    assert read_key(key_file(tmp_path, f"{other}\n"), environ) == ClusterKey.derive(other)
    assert read_key(None, {}) is None
    assert read_key(None, {KEY_VARIABLE: ""}) is None


def test_one_key_one_pair() -> None:
    assert ClusterKey.derive(TEXT) == ClusterKey.derive(TEXT) != ClusterKey.derive(TEXT + ".")
    assert new_key() != new_key()
    key = ClusterKey.derive(TEXT)
    assert pickle.loads(pickle.dumps(key)) == key  # noqa: S301  # as processes are started


def test_a_key_that_protects_nothing_is_refused_without_showing_it(tmp_path: Path) -> None:
    short = "abcdefghijklmnopqrstuvwxyz01234"
    with pytest.raises(ConfigError, match="31 characters, fewer than 32") as failure:
        read_key(None, {KEY_VARIABLE: short})
    assert short not in str(failure.value)
    for mode in (0o640, 0o604):
        with pytest.raises(ConfigError, match="open to other users: chmod 600") as failure:
            read_key(key_file(tmp_path, TEXT, mode), {})
        assert TEXT not in str(failure.value)
    with pytest.raises(ConfigError, match="No such file"):
        read_key(tmp_path / "none", {})
    (tmp_path / "binary").write_bytes(b"\xff" * 40)
    with pytest.raises(ConfigError, match="no text"):
        read_key(tmp_path / "binary", {})


def test_a_key_shows_neither_half() -> None:
    key = ClusterKey.derive(TEXT)
    for text in (repr(key), str(key), f"{[key]}"):
        assert key.secret.decode() not in text and key.public.decode() not in text
