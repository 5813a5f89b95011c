"""One side of a measurement, as a process: `python -m benchmarks.transfer.side PART SIDE OPTIONS CHANNEL_FD REPORT_FD`.

Started by `sides.run_pair`; nobody else has what it needs.
"""

import socket
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from benchmarks import BenchmarkError
from benchmarks.transfer import ladder, peers
from benchmarks.transfer.sides import Channel, Reporter
from flowkv.errors import FlowKVError

Source = Callable[[Any, Channel, Reporter], object]
Target = Callable[[Any, Channel], None]

PARTS: dict[str, tuple[type[msgspec.Struct], Source, Target]] = {
    "ladder": (ladder.Options, ladder.run_source, ladder.run_target),
    "peers": (peers.Options, peers.run_source, peers.run_target),
}


def main(part: str, side: str, options_text: str, channel_fd: str, report_fd: str) -> None:
    if part not in PARTS:
        sys.exit(f"benchmarks.transfer.side: no part {part!r}")
    kind, source, target = PARTS[part]
    options = msgspec.json.decode(options_text, type=kind)
    channel = Channel(socket.socket(fileno=int(channel_fd)))
    reporter = Reporter(int(report_fd))
    try:
        if side == "source":
            reporter.result(source(options, channel, reporter))
        else:
            target(options, channel)
    except (BenchmarkError, FlowKVError) as error:
        sys.exit(f"benchmarks.transfer, {part}, {side}: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
