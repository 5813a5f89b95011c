import os
from pathlib import Path

import pytest

from flowkv.errors import PoolError
from flowkv.kv import pool as pool_module
from flowkv.kv.pool import KvPool


def test_two_maps_of_one_pool_share_its_bytes() -> None:
    pool = KvPool.create(4, 4096)
    peer = KvPool.attach(os.dup(pool.fd), 4, 4096)
    peer.buffer[4096:4099] = b"abc"
    assert bytes(pool.buffer[4096:4099]) == b"abc"
    peer.close()
    pool.close()


def test_a_pool_has_no_name_in_the_file_system() -> None:
    pool = KvPool.create(1, 4096)
    assert "(deleted)" in str(Path(f"/proc/self/fd/{pool.fd}").readlink())
    pool.close()


def test_memory_that_is_not_there_is_refused_before_it_is_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "available_memory_bytes", lambda: 2**20)
    with pytest.raises(PoolError, match="2 MiB does not fit into 1 MiB"):
        KvPool.create(2, 2**20)


def test_a_peer_whose_pool_is_smaller_than_announced_is_refused() -> None:
    pool = KvPool.create(4, 4096)
    with pytest.raises(PoolError, match="16384 bytes"):
        KvPool.attach(os.dup(pool.fd), 8, 4096)
    pool.close()
