"""What `flowkv serve` and `flowkv join` show on the terminal."""

import logging
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from flowkv.config import LoggingConfig
from flowkv.logs import set_up_logging


class TerminalDisplay:
    """On a terminal a bar for each process that starts, elsewhere a line for each change. All of it on stderr."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._tasks: dict[str, TaskID] = {}
        self._last_text: dict[str, str] = {}
        self._bars = Progress(
            TextColumn("{task.description:>12}"),
            BarColumn(30),
            TextColumn("{task.fields[text]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> "TerminalDisplay":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def progress(self, process: str, fraction: float, text: str) -> None:
        if self._console.is_terminal:
            if process not in self._tasks:
                self._tasks[process] = self._bars.add_task(process, total=1.0, text=text)
            self._bars.update(self._tasks[process], completed=fraction, text=text)
        elif self._last_text.get(process) != text:
            self._last_text[process] = text
            self.note(f"{process}: {text}")

    def ready(self, text: str) -> None:
        """Everything runs: no more bars."""
        self._bars.stop()
        self.note(text)

    def note(self, text: str) -> None:
        self._console.print(f"flowkv: {text}", markup=False)


class LogDisplay:
    """The same as lines of the log, for those who keep it."""

    def __init__(self) -> None:
        self._logger = logging.getLogger("flowkv.launch")
        self._logger.setLevel(logging.INFO)  # whatever the level of the rest
        self._last_text: dict[str, str] = {}

    def __enter__(self) -> "LogDisplay":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def progress(self, process: str, fraction: float, text: str) -> None:
        if self._last_text.get(process) != text:
            self._last_text[process] = text
            self._logger.info("%s: %s", process, text)

    def ready(self, text: str) -> None:
        self.note(text)

    def note(self, text: str) -> None:
        self._logger.info("%s", text)


def open_display(config: LoggingConfig) -> TerminalDisplay | LogDisplay:
    """After what this process itself logs is set up."""
    set_up_logging(config, "launcher")
    return TerminalDisplay() if config.format == "text" else LogDisplay()
