"""Placement: filter, score, pick."""

from collections.abc import Iterable
from dataclasses import dataclass

from flowkv.cluster.load import InstanceView
from flowkv.cluster.policy import decode_score, prefill_score
from flowkv.types import Request, Role


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request is prefilled, and who is to decode it, best first; nobody: the prefill instance itself."""

    prefill: InstanceView
    decode: list[InstanceView]


def place(request: Request, views: Iterable[InstanceView]) -> Placement | None:
    """The placement with the lowest predicted TTFT, or None if no instance can hold the request.

    A mixed instance decodes what it prefills, and so does any instance where no other may decode.
    """
    able = [view for view in views if view.can_hold(request)]
    if not able:
        return None
    prefill = min(_of_role(able, Role.PREFILL), key=lambda view: prefill_score(request, view))
    if prefill.role is not Role.PREFILL or request.sampling.max_tokens <= 1:
        return Placement(prefill, [])
    others = [view for view in able if view.role is not Role.PREFILL]
    return Placement(prefill, sorted(others, key=lambda view: decode_score(request, view)))


def _of_role(views: list[InstanceView], role: Role) -> list[InstanceView]:
    """Instances of that role or mixed; every one, if there are none."""
    return [view for view in views if view.role in (role, Role.MIXED)] or views
