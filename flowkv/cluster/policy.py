"""Scores of instances for a request, the lower the better. A new policy: a function here, a line in the scheduler."""

from flowkv.cluster.load import InstanceView
from flowkv.types import Request


def prefill_score(request: Request, view: InstanceView) -> float:
    """Predicted seconds to the first token, were the prompt computed there (FlowKV: choose P by lowest TTFT)."""
    return view.predicted_ttft_s(request)


def decode_score(request: Request, view: InstanceView) -> tuple[bool, float, float]:
    """First those with room for the prompt now, then those that decode least, then those with most free blocks."""
    missing = view.num_blocks_for(len(request.prompt_ids)) > view.num_free_blocks
    return (missing, view.num_choices, -view.num_free_blocks)
