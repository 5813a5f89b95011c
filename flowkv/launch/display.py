"""Where a launcher shows what its processes are doing."""

from typing import Protocol


class Display(Protocol):
    def progress(self, process: str, fraction: float, text: str) -> None: ...

    def ready(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...
