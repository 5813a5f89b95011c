"""llama.cpp's server, built from the sources that the `llama-cpp-python` package brings along.

That package's own server answers one request at a time; `llama-server`, which is in the same sources, batches.
"""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks.peers import environments
from benchmarks.peers.drive import drive
from benchmarks.peers.environments import Say, run_logged
from benchmarks.peers.process import PeerProcess
from benchmarks.peers.proxy import NODE
from benchmarks.peers.turns import Contestant, Play

NAME = "llamacpp"
SOURCES = "llama_cpp_python-0.3.36"
INSTALL_STEPS = (("install", "gguf", "cmake", "ninja", "scikit-build-core"),)
BUILD_OPTIONS = ("-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DGGML_NATIVE=ON")
NUM_SLOTS = 16  # requests that decode together
SLOT_TOKENS = 512


def contestant(model: Path, folder: Path, say: Say) -> Contestant:
    """`folder` gets the environment, the sources, the program and the model file; some minutes the first time."""
    python = environments.install(folder, INSTALL_STEPS, say)
    program = _build(python, folder, say)
    weights = _convert(python, model, folder, say)

    def command(port: int) -> list[str]:
        return [str(program), *arguments(weights, port)]

    @contextmanager
    def open_() -> Iterator[Play]:
        with PeerProcess(command, folder.parent / f"{NAME}.log") as url:
            yield partial(drive, url)

    settings = {"sources": SOURCES, "build": BUILD_OPTIONS, "arguments": arguments(Path(weights.name), 0)}
    return Contestant(NAME, settings, open_)


def arguments(weights: Path, port: int) -> list[str]:
    return [
        "--model", str(weights), "--threads", "1", "--threads-batch", "1", "--parallel", str(NUM_SLOTS),
        "--ctx-size", str(NUM_SLOTS * SLOT_TOKENS), "--batch-size", "2048", "--ubatch-size", "512",
        "--no-cache-prompt", "--no-webui", "--host", NODE, "--port", str(port),
    ]  # fmt: skip


def _build(python: Path, folder: Path, say: Say) -> Path:
    program = folder / "build" / "bin" / "llama-server"
    if program.exists():
        return program
    log, tools = folder / "build.log", python.parent
    name, _, number = SOURCES.rpartition("-")
    wanted = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", f"{name}=={number}"]
    run_logged([str(python), "-m", "pip", "download", "--dest", str(folder), *wanted], log, say)
    with tarfile.open(folder / f"{SOURCES}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    sources = folder / SOURCES / "vendor" / "llama.cpp"
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}"]
    configure = [str(tools / "cmake"), "-S", str(sources), "-B", str(folder / "build"), *generator, *BUILD_OPTIONS]
    run_logged(configure, log, say)
    run_logged([str(tools / "cmake"), "--build", str(folder / "build"), "--target", "llama-server"], log, say)
    return program


def _convert(python: Path, model: Path, folder: Path, say: Say) -> Path:
    weights = folder / "model.gguf"
    if not weights.exists():
        unfinished = weights.with_suffix(".part")
        script = Path(__file__).with_name("gguf_file.py")
        run_logged([str(python), str(script), str(model), str(unfinished)], folder / "convert.log", say)
        unfinished.rename(weights)
    return weights
