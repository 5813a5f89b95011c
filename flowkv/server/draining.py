"""The end of a frontend in order: nothing new comes in, and what runs has time to finish."""

import asyncio
from collections.abc import Callable

from flowkv.server.frontend import Frontend

_LOOK_S = 0.02


class Draining:
    """`stop` is called when the last request has ended, or after `timeout_s`; `note` tells the user."""

    def __init__(
        self, frontend: Frontend, timeout_s: float, note: Callable[[str], None], stop: Callable[[], None]
    ) -> None:
        self._frontend = frontend
        self._timeout_s = timeout_s
        self._note = note
        self._stop = stop
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """In the event loop; a second time changes nothing."""
        if self._task is None:
            self._frontend.drain(self._timeout_s)
            self._task = asyncio.get_running_loop().create_task(self._finish())

    async def _finish(self) -> None:
        count = self._frontend.num_live
        requests = f"{count} request{'' if count == 1 else 's'}"
        if count:
            self._note(f"draining: {requests}, at most {self._timeout_s:g} s; Ctrl-C again stops at once")
        try:
            async with asyncio.timeout(self._timeout_s):
                while self._frontend.num_live:  # noqa: ASYNC110  (requests end in many places, and not often)
                    await asyncio.sleep(_LOOK_S)
        except TimeoutError:
            self._note(f"{self._frontend.num_live} of {requests} did not end within {self._timeout_s:g} s")
        self._stop()
