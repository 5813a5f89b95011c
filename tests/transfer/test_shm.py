import os
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from flowkv.errors import TransferError
from flowkv.kv.pool import KvPool
from flowkv.transfer.base import Arrived, Written
from flowkv.transfer.plan import Run
from flowkv.transfer.shm import ShmTransfer, attach, copy_bytes
from flowkv.types import PoolDescriptor

BLOCK_BYTES = 8192


def at(path: Path) -> PoolDescriptor:
    """Of a pool that is handed out at `path`, or will be, or never."""
    endpoints = {"shm": str(path).encode()}
    return PoolDescriptor(
        node="node", layout_fingerprint="L", num_blocks=8, block_bytes=BLOCK_BYTES, endpoints=endpoints
    )  # fmt: skip


class Side:
    def __init__(self, folder: Path, name: str, num_blocks: int = 8, block_bytes: int = BLOCK_BYTES) -> None:
        self.address = str(folder / name)
        self.pool = KvPool.create(num_blocks, block_bytes)
        self.transfer = ShmTransfer(self.pool, self.address, "L", "node")

    def wait(self, num_written: int, num_arrived_blocks: int) -> tuple[list[Written], list[Arrived]]:
        written: list[Written] = []
        arrived: list[Arrived] = []
        while len(written) < num_written or sum(a.num_blocks for a in arrived) < num_arrived_blocks:
            ready, _, _ = select.select(self.transfer.filenos(), [], [], 10.0)
            assert ready, "nothing completes"
            completions = self.transfer.poll()
            written += completions.written
            arrived += completions.arrived
        return written, arrived


@pytest.fixture
def side(tmp_path: Path) -> Iterator[Callable[..., Side]]:
    """Makes one, which is closed at the end."""
    with ExitStack() as stack:

        def make(name: str, **options: int) -> Side:
            made = Side(tmp_path, name, **options)
            stack.callback(made.transfer.close)
            return made

        yield make


@pytest.fixture
def sides(side: Callable[..., Side]) -> tuple[Side, Side]:
    p, d = side("p"), side("d")
    p.transfer.connect("d", d.transfer.descriptor)
    d.transfer.connect("p", p.transfer.descriptor)
    return p, d


def test_runs_land_where_they_should_and_are_counted_in_blocks(sides: tuple[Side, Side]) -> None:
    p, d = sides
    p.pool.buffer[:] = os.urandom(len(p.pool.buffer))
    before = bytes(d.pool.buffer)
    p.transfer.submit(7, "d", [Run(0, 5, 2), Run(6, 1, 1)], immediate=42)
    assert sum(a.num_blocks for a in d.wait(0, 3)[1]) == 3
    written, _ = p.wait(1, 0)
    assert (written[0].ticket, written[0].num_bytes) == (7, 3 * BLOCK_BYTES)

    def block(pool: KvPool | bytes, i: int) -> bytes:
        buffer = pool if isinstance(pool, bytes) else pool.buffer
        return bytes(buffer[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES])

    source = {5: 0, 6: 1, 1: 6}
    for i in range(8):
        assert block(d.pool, i) == (block(p.pool, source[i]) if i in source else block(before, i))


def test_both_directions_at_once(sides: tuple[Side, Side]) -> None:
    p, d = sides
    for ticket in range(20):
        p.transfer.submit(ticket, "d", [Run(0, 1, 2)], immediate=1)
        d.transfer.submit(ticket, "p", [Run(4, 3, 1)], immediate=2)
    assert {a.immediate for a in d.wait(20, 40)[1]} == {1}
    assert {a.immediate for a in p.wait(20, 20)[1]} == {2}


def test_what_is_submitted_for_a_disconnected_peer_completes_unsent(sides: tuple[Side, Side]) -> None:
    p, _ = sides
    p.transfer.disconnect("d")
    p.transfer.submit(3, "d", [Run(0, 0, 1)], immediate=1)
    written, _ = p.wait(1, 0)
    assert [(w.ticket, w.num_bytes) for w in written] == [(3, 0)]


def test_a_peer_that_closes_is_no_error_for_the_writer(sides: tuple[Side, Side]) -> None:
    p, d = sides
    d.transfer.disconnect("p")
    p.transfer.poll()
    p.transfer.submit(1, "d", [Run(0, 0, 1)], immediate=1)
    assert p.wait(1, 0)[0][0].ticket == 1


def test_a_writer_that_gives_up_while_it_connects_does_not_stop_the_others(side: Callable[..., Side]) -> None:
    p, d = side("p"), side("d")
    for _ in range(20):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as impatient:
            impatient.connect(d.address)
    p.transfer.connect("d", d.transfer.descriptor)
    p.transfer.submit(1, "d", [Run(0, 0, 1)], immediate=5)
    assert d.wait(0, 1)[1] == [Arrived(5, 1)]


def test_blocks_of_another_size_are_refused_at_the_connection(side: Callable[..., Side]) -> None:
    d = side("d", block_bytes=4096)
    with pytest.raises(TransferError, match="4096 bytes"):
        attach(d.address, BLOCK_BYTES)


def test_no_pool_at_an_address_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="cannot be reached"):
        attach(str(tmp_path / "nobody"), BLOCK_BYTES)


def test_a_write_waits_for_a_peer_that_comes_late(side: Callable[..., Side], tmp_path: Path) -> None:
    p = side("p")
    p.transfer.connect("d", at(tmp_path / "d"))
    p.transfer.submit(1, "d", [Run(2, 3, 1)], immediate=5)
    d = side("d")
    assert d.wait(0, 1)[1] == [Arrived(5, 1)]
    assert p.wait(1, 0)[0][0].num_bytes == BLOCK_BYTES


def test_a_peer_that_never_comes_does_not_keep_anyone_from_closing(side: Callable[..., Side], tmp_path: Path) -> None:
    p = side("p")
    p.transfer.connect("d", at(tmp_path / "nobody"))
    p.transfer.submit(1, "d", [Run(0, 0, 1)], immediate=5)
    p.transfer.disconnect("d")
    assert [(w.ticket, w.num_bytes) for w in p.wait(1, 0)[0]] == [(1, 0)]


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, 512 << 10, (512 << 10) + 1, 3 * (512 << 10) - 1, 5 << 20])
def test_bytes_are_copied_whole_whatever_their_number(num_bytes: int) -> None:
    source = np.frombuffer(os.urandom(num_bytes), np.uint8)
    target = np.zeros(num_bytes + 2, np.uint8)
    copy_bytes(target[1:-1], source)
    assert target[1:-1].tobytes() == source.tobytes()
    assert target[0] == target[-1] == 0
