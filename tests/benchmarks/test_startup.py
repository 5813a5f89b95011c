from pathlib import Path

from benchmarks import startup


def test_the_floor_imports_what_a_server_must() -> None:
    assert startup.python_s("import json") > 0


def test_a_server_is_timed_to_its_first_token(tmp_path: Path) -> None:
    assert startup.first_token_s(tmp_path / "log", ["--toy", "--mixed", "1"]) > 0
