import importlib.util
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowkv.errors import ConfigError, TransferError
from flowkv.kv.pool import KvPool
from flowkv.transfer.base import Arrived, Linked, Written
from flowkv.transfer.nixl import NixlTransfer
from flowkv.transfer.plan import Run, plan_runs
from flowkv.types import PoolDescriptor
from tests.e2e.server import eventually
from tests.effort import examples

if importlib.util.find_spec("nixl") is None:
    pytest.skip("NIXL is not installed (pip install 'flowkv[nixl]')", allow_module_level=True)

BLOCK_BYTES = 8192
LARGE_BLOCK_BYTES = 4 << 20  # a few of them are shared by the rails

# A peer in a process of its own: prints its descriptor, then a line for each arrival under 0 to 9.
PEER = """
import select, sys, msgspec
from flowkv.kv.pool import KvPool
from flowkv.transfer.nixl import NixlTransfer
pool = KvPool.create(8, int(sys.argv[1]))
transfer = NixlTransfer("d", pool, "L", "node")
for immediate in range(10):
    transfer.expect(immediate)
print(msgspec.json.encode(transfer.descriptor).decode(), flush=True)
while True:
    select.select(transfer.filenos(), [], [])
    for arrived in transfer.poll().arrived:
        print(*arrived, flush=True)
"""


class Side:
    def __init__(self, name: str, block_bytes: int = BLOCK_BYTES, num_blocks: int = 8) -> None:
        self.pool = KvPool.create(num_blocks, block_bytes)
        self.transfer = NixlTransfer(name, self.pool, "L", "node")

    def wait(
        self, num_written: int = 0, num_arrived_blocks: int = 0, num_linked: int = 0
    ) -> tuple[list[Written], list[Arrived], list[Linked]]:
        written: list[Written] = []
        arrived: list[Arrived] = []
        linked: list[Linked] = []
        while (
            len(written) < num_written
            or sum(a.num_blocks for a in arrived) < num_arrived_blocks
            or len(linked) < num_linked
        ):
            ready, _, _ = select.select(self.transfer.filenos(), [], [], 10.0)
            assert ready, "nothing completes"
            completions = self.transfer.poll()
            written += completions.written
            arrived += completions.arrived
            linked += completions.linked
        return written, arrived, linked

    def reach(self, name: str, pool: PoolDescriptor) -> None:
        self.transfer.connect(name, pool)
        assert self.wait(num_linked=1)[2] == [Linked(name, "nixl")]

    def block(self, i: int) -> bytes:
        return bytes(self.pool.buffer[i * self.pool.block_bytes : (i + 1) * self.pool.block_bytes])


class Peer:
    """A `Side` in a real process."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PEER, str(block_bytes)], stdout=subprocess.PIPE, text=True
        )
        self.descriptor = msgspec.json.decode(self.read_line(), type=PoolDescriptor)

    def read_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def stop(self) -> None:
        """Until `wake`. (A signal is only on its way when it has been sent.)"""
        os.kill(self.process.pid, signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)

    def wake(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        with self.process:
            self.process.kill()  # one that has ended is left alone


@pytest.fixture(scope="module")
def sides() -> Iterator[tuple[Side, Side]]:
    yield from linked_sides(BLOCK_BYTES)


@pytest.fixture(scope="module")
def large_sides() -> Iterator[tuple[Side, Side]]:
    yield from linked_sides(LARGE_BLOCK_BYTES)


def linked_sides(block_bytes: int) -> Iterator[tuple[Side, Side]]:
    p, d = Side("p", block_bytes), Side("d", block_bytes)
    p.transfer.connect("d", d.transfer.descriptor)
    d.transfer.connect("p", p.transfer.descriptor)
    assert [p.wait(num_linked=1)[2], d.wait(num_linked=1)[2]] == [[Linked("d", "nixl")], [Linked("p", "nixl")]]
    yield p, d
    p.transfer.close()
    d.transfer.close()
    for side in (p, d):
        side.pool.close()  # nothing of a closed transfer holds on to it


@contextmanager
def running_peer() -> Iterator[Peer]:
    peer = Peer(LARGE_BLOCK_BYTES)
    try:
        yield peer
    finally:
        peer.kill()


@pytest.fixture
def large_peer() -> Iterator[Peer]:
    with running_peer() as peer:
        yield peer


@pytest.fixture
def alone() -> Iterator[Side]:
    side = Side("p")
    yield side
    side.transfer.close()


@pytest.fixture
def gone() -> PoolDescriptor:
    side = Side("d")
    side.transfer.close()
    return side.transfer.descriptor


def test_runs_land_where_they_should_and_are_counted_in_blocks(sides: tuple[Side, Side]) -> None:
    p, d = sides
    p.pool.buffer[:] = os.urandom(len(p.pool.buffer))
    before = [d.block(i) for i in range(8)]
    d.transfer.expect(42)
    p.transfer.submit(7, "d", [Run(0, 5, 2), Run(6, 1, 1)], immediate=42)
    assert d.wait(num_arrived_blocks=3)[1] == [Arrived(42, 3)]
    [written], _, _ = p.wait(num_written=1)
    assert (written.ticket, written.num_bytes, written.error) == (7, 3 * BLOCK_BYTES, None)
    source = {5: 0, 6: 1, 1: 6}
    for i in range(8):
        assert d.block(i) == (p.block(source[i]) if i in source else before[i])


@settings(max_examples=examples(30), deadline=None)
@given(src=st.permutations(range(8)), dst=st.permutations(range(8)), count=st.integers(0, 8))
def test_any_blocks_can_be_written_to_any_blocks(
    sides: tuple[Side, Side], src: list[int], dst: list[int], count: int
) -> None:
    p, d = sides
    p.pool.buffer[:] = os.urandom(len(p.pool.buffer))
    expected = [d.block(i) for i in range(8)]
    for i, j in zip(src[:count], dst[:count], strict=True):
        expected[j] = p.block(i)
    d.transfer.expect(3)
    p.transfer.submit(3, "d", plan_runs(src[:count], dst[:count]), immediate=3)
    assert [w.num_bytes for w in p.wait(num_written=1)[0]] == [count * BLOCK_BYTES]
    d.wait(num_arrived_blocks=count)
    assert [d.block(i) for i in range(8)] == expected


def test_rails_share_a_large_submission(large_sides: tuple[Side, Side]) -> None:
    p, d = large_sides
    p.pool.buffer[:] = os.urandom(1 << 20) * (len(p.pool.buffer) >> 20)
    d.transfer.expect(1)
    p.transfer.submit(1, "d", [Run(0, 3, 5), Run(5, 0, 3)], immediate=1)
    assert sorted(d.wait(num_arrived_blocks=8)[1]) == [Arrived(1, 4), Arrived(1, 4)]
    assert [w.num_bytes for w in p.wait(num_written=1)[0]] == [8 * LARGE_BLOCK_BYTES]
    assert [d.block(i) for i in range(8)] == [p.block(i) for i in (5, 6, 7, 0, 1, 2, 3, 4)]


def test_both_directions_at_once(sides: tuple[Side, Side]) -> None:
    p, d = sides
    d.transfer.expect(1)
    p.transfer.expect(2)
    for ticket in range(20):
        p.transfer.submit(ticket, "d", [Run(0, 1, 2)], immediate=1)
        d.transfer.submit(ticket, "p", [Run(4, 3, 1)], immediate=2)
    assert {a.immediate for a in d.wait(20, 40)[1]} == {1}
    assert {a.immediate for a in p.wait(20, 20)[1]} == {2}


def test_an_arrival_that_is_not_expected_is_dropped(sides: tuple[Side, Side]) -> None:
    p, d = sides
    for immediate in (10, 11):
        d.transfer.expect(immediate)
    d.transfer.forget(10)
    for ticket, immediate in [(0, 9), (2, 10), (4, 11)]:  # by one rail, so one after the other
        p.transfer.submit(ticket, "d", [Run(0, 0, 1)], immediate)
    assert d.wait(num_arrived_blocks=1)[1] == [Arrived(11, 1)]
    assert len(p.wait(num_written=3)[0]) == 3


def test_what_is_cancelled_is_written_and_told_or_neither(large_sides: tuple[Side, Side]) -> None:
    p, d = large_sides
    d.transfer.expect(5)
    for ticket in range(10):
        p.transfer.submit(ticket, "d", [Run(0, 0, 8)], immediate=5)
        if ticket:
            p.transfer.cancel(ticket)
    written = p.wait(num_written=10)[0]
    assert sorted(w.ticket for w in written) == list(range(10))
    num_blocks = sum(w.num_bytes for w in written) // LARGE_BLOCK_BYTES
    assert sum(a.num_blocks for a in d.wait(num_arrived_blocks=num_blocks)[1]) == num_blocks


def test_cancel_of_what_has_not_begun_is_acknowledged_at_once(alone: Side, gone: PoolDescriptor) -> None:
    alone.transfer.connect("d", gone)
    alone.transfer.submit(1, "d", [Run(0, 0, 1)], immediate=5)
    alone.transfer.submit(2, "d", [Run(0, 0, 1)], immediate=5)
    alone.transfer.cancel(2)
    assert [(w.ticket, w.num_bytes) for w in alone.transfer.poll().written] == [(2, 0)]


def test_what_is_submitted_before_the_peer_is_reached_waits(alone: Side) -> None:
    d = Side("d")
    d.transfer.expect(5)
    alone.transfer.connect("d", d.transfer.descriptor)
    for ticket in range(2):
        alone.transfer.submit(ticket, "d", [Run(2, 3, 1)], immediate=5)
    assert [w.num_bytes for w in alone.wait(num_written=2)[0]] == [BLOCK_BYTES, BLOCK_BYTES]
    assert d.wait(num_arrived_blocks=2)[1] == [Arrived(5, 1), Arrived(5, 1)]
    d.transfer.close()


def test_one_large_block_is_not_reported_before_it_is_written() -> None:
    """It is large enough to be shared, but there is nothing to share."""
    p, d = Side("p", 32 << 20, num_blocks=1), Side("d", 32 << 20, num_blocks=1)
    p.reach("d", d.transfer.descriptor)
    for ticket in range(4):
        p.transfer.submit(ticket, "d", [Run(0, 0, 1)], immediate=1)
        p.transfer.cancel(ticket)
        [written], _, _ = p.wait(num_written=1)
        assert (written.ticket, p.transfer.poll().written) == (ticket, [])
    for side in (p, d):
        side.transfer.close()


def test_what_is_submitted_for_a_disconnected_peer_completes_unsent(alone: Side, gone: PoolDescriptor) -> None:
    alone.transfer.connect("d", gone)
    alone.transfer.submit(2, "d", [Run(0, 0, 1)], immediate=1)
    alone.transfer.disconnect("d")
    alone.transfer.submit(3, "d", [Run(0, 0, 1)], immediate=1)
    written = alone.wait(num_written=2)[0]
    assert sorted((w.ticket, w.num_bytes, w.error) for w in written) == [(2, 0, None), (3, 0, None)]


def test_a_peer_that_never_comes_does_not_keep_anyone_from_closing(gone: PoolDescriptor) -> None:
    p = Side("p")
    p.transfer.connect("d", gone)
    p.transfer.submit(1, "d", [Run(0, 0, 1)], immediate=5)
    p.transfer.close()


@pytest.mark.parametrize("endpoint", [b"", b"garbage", msgspec.msgpack.encode([b"agent", -1, 0])])
def test_an_endpoint_that_cannot_be_read_is_refused(alone: Side, endpoint: bytes) -> None:
    pool = msgspec.structs.replace(alone.transfer.descriptor, endpoints={"nixl": endpoint})
    with pytest.raises(TransferError, match="NIXL endpoint"):
        alone.transfer.connect("d", pool)


def test_a_pool_of_other_blocks_or_without_nixl_is_refused(alone: Side) -> None:
    pool = alone.transfer.descriptor
    with pytest.raises(TransferError, match="4096 bytes"):
        alone.transfer.connect("d", msgspec.structs.replace(pool, block_bytes=4096))
    with pytest.raises(TransferError, match="NIXL endpoint"):
        alone.transfer.connect("d", msgspec.structs.replace(pool, endpoints={"shm": b"/path"}))


def test_a_peer_that_nixl_refuses_is_no_other_peers_business(alone: Side, caplog: pytest.LogCaptureFixture) -> None:
    d = Side("d")
    address, metadata = len(d.pool.buffer), b"not of an agent"
    endpoint = msgspec.msgpack.encode([metadata, address, 0])
    alone.transfer.connect("x", msgspec.structs.replace(d.transfer.descriptor, endpoints={"nixl": endpoint}))
    alone.reach("d", d.transfer.descriptor)
    assert "the pool of x cannot be written to" in caplog.text
    d.transfer.close()


def test_a_killed_peer_fails_what_was_under_way_and_can_come_back(
    large_peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    p, d = Side("p", LARGE_BLOCK_BYTES), large_peer
    other = Side("d", LARGE_BLOCK_BYTES)  # of the same name, as where one comes back before its death is known
    p.reach("d", d.descriptor)
    p.reach("other", other.transfer.descriptor)
    p.transfer.submit(1, "d", [Run(0, 0, 1)], immediate=1)
    assert d.read_line() == "1 1\n"
    assert [w.num_bytes for w in p.wait(num_written=1)[0]] == [LARGE_BLOCK_BYTES]
    d.kill()
    p.transfer.submit(2, "d", [Run(0, 0, 1)], immediate=2)
    eventually(lambda: caplog.text.count("pool of d cannot be written to") == 1, "a rail finds out")
    p.transfer.submit(3, "d", [Run(0, 0, 8)], immediate=2)
    eventually(lambda: caplog.text.count("pool of d cannot be written to") == 2, "the other, which shares this one")

    other.transfer.expect(3)
    p.transfer.submit(4, "other", [Run(0, 0, 8)], immediate=3)
    other.wait(num_arrived_blocks=8)
    assert [w.num_bytes for w in p.wait(num_written=1)[0]] == [8 * LARGE_BLOCK_BYTES]

    assert p.transfer.poll().written == []  # nobody can say yet what is still under way to it
    p.transfer.disconnect("d")
    written = p.wait(num_written=2)[0]
    assert sorted((w.ticket, w.num_bytes) for w in written) == [(2, 0), (3, 0)]
    assert all("writing to d failed" in (w.error or "") for w in written)
    with running_peer() as d:
        p.reach("d", d.descriptor)
        p.transfer.submit(5, "d", [Run(0, 0, 1)], immediate=4)
        assert d.read_line() == "4 1\n"
    for side in (p, other):
        side.transfer.close()


def test_a_stopped_peer_holds_up_its_own_transfers_only(large_peer: Peer) -> None:
    p, d, other = Side("p", LARGE_BLOCK_BYTES), large_peer, Side("other", LARGE_BLOCK_BYTES)
    p.reach("d", d.descriptor)
    p.reach("other", other.transfer.descriptor)
    d.stop()
    p.transfer.submit(1, "d", [Run(0, 0, 8)], immediate=1)
    other.transfer.expect(2)
    p.transfer.submit(2, "other", [Run(0, 0, 8)], immediate=2)
    other.wait(num_arrived_blocks=8)
    assert [w.ticket for w in p.wait(num_written=1)[0]] == [2]
    d.wake()
    assert [(w.ticket, w.num_bytes) for w in p.wait(num_written=1)[0]] == [(1, 8 * LARGE_BLOCK_BYTES)]

    d.stop()
    p.transfer.submit(3, "d", [Run(0, 0, 8)], immediate=3)
    p.transfer.disconnect("d")
    [written] = p.wait(num_written=1)[0]  # one rail may have come through before
    assert written.ticket == 3
    assert written.num_bytes < 8 * LARGE_BLOCK_BYTES
    for side in (p, other):
        side.transfer.close()


def test_who_uses_nixl_keeps_ignoring_what_it_ignores() -> None:
    """A terminal that is closed sends it to all: UCX would take it for a wish to read all that it does."""
    code = """if True:
        import signal
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        from flowkv.transfer.nixl_agent import Nixl
        agent = Nixl().open_writing("p")
        signal.raise_signal(signal.SIGHUP)
        del agent
    """
    assert subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE).stdout == b""


def test_a_toy_instance_that_uses_nixl_loads_no_torch() -> None:
    if not metadata.version("torch").endswith("+cpu"):
        pytest.skip("torch has CUDA: NIXL reads of which version in a file of it")
    code = "import sys; from flowkv.transfer.nixl_agent import Nixl; Nixl(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_where_nixl_is_missing_it_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("nixl", "nixl_cu12", "nixl_cu13"):
        monkeypatch.setitem(sys.modules, f"{package}._api", None)
    with pytest.raises(ConfigError, match=r"^NIXL .* pip install 'flowkv\[nixl\]'$"):
        Side("p")
