"""A peer's packages in a virtual environment of its own, installed once."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import BenchmarkError
from benchmarks.spawn import LOG_TAIL_LINES

Say = Callable[[str], None]

_VERSIONS = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"


def install(folder: Path, steps: Sequence[Sequence[str]], say: Say) -> Path:
    """The interpreter of `folder/venv`, in which `pip STEP` has been run for each step.

    What was done stands in `folder/installed.json`; with the same steps nothing is done again. Raises BenchmarkError
    with the end of `folder/install.log` where a step fails.
    """
    python = folder / "venv" / "bin" / "python"
    done = folder / "installed.json"
    wanted = json.dumps([list(step) for step in steps])
    if done.exists() and done.read_text() == wanted:
        return python
    folder.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    commands = [[str(python), "-m", "pip", *step] for step in steps]
    for command in [[sys.executable, "-m", "venv", "--clear", str(folder / "venv")], *commands]:
        run_logged(command, folder / "install.log", say)
    done.write_text(wanted)
    return python


def run_logged(command: Sequence[str], path: Path, say: Say) -> None:
    """What it writes goes to the end of the file `path`, which is shown in part where the command fails."""
    start_s = time.monotonic()
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    with path.open("a") as log:
        ended = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
    say(f"{' '.join(command)} ({time.monotonic() - start_s:.0f} s)")
    if ended.returncode != 0:
        tail = "\n  | ".join(path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
        raise BenchmarkError(f"{' '.join(command)} ended with code {ended.returncode}\n  | {tail}\n(all of it: {path})")


def versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Of packages that are installed there."""
    ended = subprocess.run([python, "-c", _VERSIONS, *packages], capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise BenchmarkError(f"{python} lacks one of {', '.join(packages)}: {ended.stderr.strip()}")
    found: dict[str, str] = json.loads(ended.stdout)
    return found


def site_packages(python: Path) -> Path:
    """Raises BenchmarkError where `python` is not that of a virtual environment."""
    found = list(python.parent.parent.glob("lib/python3*/site-packages"))
    if len(found) != 1:
        raise BenchmarkError(f"{python} has {len(found)} folders of packages, not one")
    return found[0]
