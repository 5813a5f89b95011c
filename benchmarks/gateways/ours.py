"""FlowKV's controller and frontend, as `flowkv serve` starts them, with instances that answer at once."""

import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path
from types import TracebackType

import psutil
import zmq

from benchmarks import BenchmarkError
from benchmarks.gateways.instances import InstancesSpec, run_instances
from flowkv.bundled import MODEL_FOLDER, MODEL_NAME
from flowkv.cluster.service import ControllerSpec, run_controller
from flowkv.config import ClusterConfig
from flowkv.launch.children import Children
from flowkv.messages import Ready, Serving
from flowkv.server.process import FrontendSpec, run_frontend
from flowkv.types import ModelInfo
from flowkv.wire import Mailbox, SyncContext

_START_TIMEOUT_S = 60.0
_EPOCH = "benchmark"


class OurGateway:
    """From `with` to the end of the block; the context's value is the URL."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._folder = Path(tempfile.mkdtemp(prefix="flowkv-bench-"))
        self._context = SyncContext()
        self._mailbox = Mailbox(self._context, f"ipc://{self._folder}/launcher")
        self._poller = zmq.Poller()
        self._poller.register(self._mailbox.socket, zmq.POLLIN)
        self._children = Children(self._poller)
        self.pids: dict[str, int] = {}

    def __enter__(self) -> str:
        try:
            return self._start()
        except BaseException:
            self._stop()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _start(self) -> str:
        controller, launcher = f"ipc://{self._folder}/controller", self._mailbox.address
        self._fork("controller", run_controller, ControllerSpec(
            "controller", controller, launcher, _EPOCH, self._config, MODEL_NAME, None
        ))  # fmt: skip
        self._fork("frontend", run_frontend, FrontendSpec(
            "frontend", f"ipc://{self._folder}/frontend", controller, launcher, self._config.server,
            str(MODEL_FOLDER), MODEL_NAME,
        ))  # fmt: skip
        model = ModelInfo(name=MODEL_NAME, dtype="none", vocab_size=1536, max_model_tokens=32_768)
        roles = tuple(self._config.roles)
        self._fork("instances", run_instances, InstancesSpec(str(self._folder), controller, _EPOCH, model, roles))
        url, is_serving, deadline_s = "", False, time.monotonic() + _START_TIMEOUT_S
        while not (url and is_serving):
            self._poller.poll(100)
            for message in self._mailbox.receive_all():
                url = message.url or url if isinstance(message, Ready) else url
                is_serving = is_serving or isinstance(message, Serving)
            if self._children.take_gone() or time.monotonic() > deadline_s:
                raise BenchmarkError("controller, frontend and instances do not come into service")
        return url

    def _fork(self, name: str, target: object, spec: object) -> None:
        child = self._children.start(name, multiprocessing.get_context("spawn"), target, spec)  # type: ignore[arg-type]
        assert child.process.pid is not None
        self.pids[name] = child.process.pid

    def _stop(self) -> None:
        self._children.stop_all("frontend")
        self._mailbox.close()
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)


def cpu_s(pid: int) -> float:
    """Seconds of CPU that a process and its children have used."""
    process = psutil.Process(pid)
    times = [one.cpu_times() for one in [process, *process.children(recursive=True)]]
    return float(sum(one.user + one.system for one in times))
