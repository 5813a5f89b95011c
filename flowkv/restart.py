"""`flowkv restart`: a rolling restart, asked for and watched."""

import time
from collections.abc import Callable, Sequence

from flowkv.errors import FlowKVError
from flowkv.remote import Remote
from flowkv.server.api.admin import Restarted
from flowkv.types import RollingRestart

_LOOK_S = 0.3
_BEGIN_S = 10.0  # for the controller to take it up, and the frontend to hear of that


def restart(url: str, instances: Sequence[str], show: Callable[[str], None]) -> None:
    """Returns when all are replaced. FlowKVError if that is given up, ConfigError if the server does not answer."""
    remote = Remote(url)
    asked = remote.post("/admin/restart", Restarted, [("instance", name) for name in instances])
    show(f"restarting {', '.join(asked.instances)}")
    rolling = _begun(remote, asked.token)
    shown = ""
    while rolling.instance or rolling.num_left:
        if rolling.instance and (text := describe(rolling)) != shown:
            show(shown := text)
        time.sleep(_LOOK_S)
        rolling = remote.view().rolling
        if not rolling.token:
            raise FlowKVError("the controller was started again, and has forgotten what was left to restart")
    if rolling.failure:
        raise FlowKVError(f"given up: {rolling.failure}")
    show(f"done: {rolling.num_done} restarted")


def describe(rolling: RollingRestart) -> str:
    return f"{rolling.instance}: {rolling.phase} ({rolling.num_done} done, {rolling.num_left} left after it)"


def _begun(remote: Remote, token: str) -> RollingRestart:
    """From when it is known, be it over already."""
    deadline_s = time.monotonic() + _BEGIN_S
    while (rolling := remote.view().rolling).token != token:
        if time.monotonic() >= deadline_s:
            raise FlowKVError("the controller has not begun: it may be down, or somebody else has asked for more")
        time.sleep(_LOOK_S)
    return rolling
