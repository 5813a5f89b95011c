"""Pool descriptors for tests that move no bytes."""

from flowkv.types import PoolDescriptor


def descriptor(name: str, layout: str = "L", num_blocks: int = 100, node: str = "local") -> PoolDescriptor:
    return PoolDescriptor(
        node=node, layout_fingerprint=layout, num_blocks=num_blocks, block_bytes=64, endpoints={"local": name.encode()}
    )
