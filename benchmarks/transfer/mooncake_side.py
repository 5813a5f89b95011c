"""One side of Mooncake's transfer engine, for an interpreter that has it and may have nothing else.

`python mooncake_side.py target ADDRESS POOL_BYTES` prints one line of JSON, [name, address of its memory], and serves
until its input ends. `python mooncake_side.py source ADDRESS POOL_BYTES`, told that line, then reads lines of JSON
{"name", "calls": [[src offset, dst offset, bytes], ...], "turns", "max_calls"} and answers each with {"seconds": [...]}
or {"error": ...}.
"""

import ctypes
import importlib
import json
import mmap
import os
import sys
import time
from typing import Any


def main(side: str, address: str, pool_bytes: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the library prints is no answer
    engine = importlib.import_module("mooncake.engine").TransferEngine()
    if code := engine.initialize(address, "P2PHANDSHAKE", "tcp", ""):
        raise SystemExit(f"Mooncake does not start: code {code}")
    memory = mmap.mmap(-1, int(pool_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ctypes.memset(base, 1, int(pool_bytes))
    if code := engine.register_memory(base, int(pool_bytes)):
        raise SystemExit(f"Mooncake does not register memory: code {code}")
    if side == "target":
        answers.write(json.dumps([f"{address}:{engine.get_rpc_port()}", base]) + "\n")
        sys.stdin.read()
        return
    target, target_base = json.loads(sys.stdin.readline())
    for line in sys.stdin:
        answers.write(json.dumps(_measure(engine, target, base, target_base, json.loads(line))) + "\n")


def _measure(engine: Any, target: str, base: int, target_base: int, case: dict[str, Any]) -> dict[str, Any]:
    """The first pass is not timed."""
    seconds = []
    for _ in range(case["turns"] + 1):
        started_s = time.monotonic()
        for first in range(0, len(case["calls"]), case["max_calls"]):
            part = case["calls"][first : first + case["max_calls"]]
            src, dst, size = ([row[i] for row in part] for i in range(3))
            addresses = ([base + offset for offset in src], [target_base + offset for offset in dst])
            if code := getattr(engine, f"batch_transfer_sync_{case['name']}")(target, *addresses, size):
                return {"error": f"code {code} for {len(part)} descriptors in a call"}
        seconds.append(time.monotonic() - started_s)
    return {"seconds": seconds[1:]}


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # its threads do not end by themselves
