"""A line for each request that ends: what it was, what became of it, how long it took. Not what was in it."""

import logging

from flowkv.server.records.timeline import RequestRecord, State

_logger = logging.getLogger(__name__)


def log_ended(record: RequestRecord) -> None:
    """Those that the cluster refused are logged where the client hears of it, as all that are refused."""
    if record.state is State.REFUSED or not _logger.isEnabledFor(logging.INFO):
        return
    ttft = "no token" if record.ttft_s is None else f"first token after {record.ttft_s:.3f} s"
    why = record.error or record.finish_reason
    _logger.info(
        "%s (%s, %s), %d + %d tokens, %s, %.3f s in all",
        record.state, record.status, why, record.prompt_tokens, record.output_tokens, ttft, record.elapsed_s,
        extra={"request_id": record.request_id, "fields": _fields(record)},
    )  # fmt: skip


def _fields(record: RequestRecord) -> dict[str, object]:
    return {
        "key": record.key,
        "state": record.state,
        "status": record.status,
        "finish_reason": record.finish_reason,
        "error": record.error,
        "prompt_tokens": record.prompt_tokens,
        "output_tokens": record.output_tokens,
        "num_attempts": record.num_attempts,
        "prefill_instance": record.prefill_instance,
        "decode_instance": record.decode_instance,
        "ttft_s": record.ttft_s,
        "tpot_s": record.tpot_s,
        "e2el_s": record.e2el_s,
    }
