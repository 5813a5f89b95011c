import subprocess
import sys

BODIES = """
from pathlib import Path
from flowkv.server.heap import give_large_blocks_back
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
give_large_blocks_back()
before = resident()
largest = b"." * (4 << 20)
del largest
held = [(b"." * (1 << 20), b"." * 10_000) for _ in range(32)]
held = [small for _, small in held]  # what lies between them is still needed
print(resident() - before)
"""


def test_of_large_bodies_nothing_stays_resident() -> None:
    done = subprocess.run([sys.executable, "-c", BODIES], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 4 << 20
