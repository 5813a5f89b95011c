import gc
import os
from pathlib import Path

from flowkv.usage import INTERVAL_S, UsageMeter, measure


def test_it_is_about_this_process() -> None:
    gc.collect()  # what other tests have left open is not closed in between
    before = measure()
    ballast = bytearray(os.urandom(1)) * (64 << 20)
    with Path(os.devnull).open():
        after = measure()
    assert after.resident_bytes - before.resident_bytes > len(ballast) // 2
    assert after.open_files == before.open_files + 1
    assert after.cpu_seconds >= before.cpu_seconds > 0


def test_it_speaks_once_a_second() -> None:
    meter = UsageMeter("decode-0")
    told = [meter.take(now_s) for now_s in (100.0, 100.5, 100.0 + INTERVAL_S, 101.5)]
    assert [usage is not None for usage in told] == [True, False, True, False]
    assert told[0] is not None and told[0].process == "decode-0"
