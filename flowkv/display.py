"""What `flowkv serve` and `flowkv join` show on the terminal."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn


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
