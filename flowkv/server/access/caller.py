"""Whose HTTP request is being answered, and what it may still take.

The gate sets it for the task that answers the request, and whoever submits to the cluster asks for it there: a new
route need not hand it on, and cannot forget to.
"""

from contextvars import ContextVar
from dataclasses import dataclass

import msgspec

from flowkv.server.access.keys import ANYBODY, ApiKey
from flowkv.server.access.quotas import Quota
from flowkv.types import DEFERRED, Request


@dataclass(frozen=True, slots=True)
class Caller:
    key: ApiKey = ANYBODY
    quotas: tuple[Quota, ...] = ()

    @property
    def name(self) -> str | None:
        """Of the key; None where no key is asked for."""
        return None if self.key is ANYBODY else self.key.name

    def spend(self, num_tokens: int, now_s: float) -> None:
        for quota in self.quotas:
            quota.spend(num_tokens, now_s)

    def ranked(self, request: Request) -> Request:
        """At the key's priority. Its holder may put requests behind those of others, but not before them."""
        if self.key is ANYBODY:
            return request
        priority = self.key.priority + max(0, request.priority)
        return msgspec.structs.replace(request, priority=min(priority, DEFERRED // 2 - 1))


_caller: ContextVar[Caller] = ContextVar("flowkv_caller")
_SOMEBODY = Caller()


def current_caller() -> Caller:
    """Without a gate: anybody, who may take what there is."""
    return _caller.get(_SOMEBODY)


def set_caller(caller: Caller) -> None:
    """For the rest of this task."""
    _caller.set(caller)
