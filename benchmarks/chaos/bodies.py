"""What the clients ask for."""

import random
from collections.abc import Iterator

from benchmarks.chaos.load import Body
from flowkv.bundled.recall import recall_task


def toy_bodies(count: int, seed: int) -> list[Body]:
    """Greedy and seeded, one choice and three, prompts of one step and of many."""
    rng = random.Random(seed)
    bodies = [
        {
            "prompt": [rng.randrange(256) for _ in range(rng.choice([1, 16, 17, 64, 150, 300]))],
            "max_tokens": rng.choice([1, 8, 40, 90]),
            "temperature": rng.choice([0.0, 1.0]),
            "seed": i,
            "n": rng.choice([1, 1, 1, 3]),
        }
        for i in range(count)
    ]
    return [("/v1/completions", body) for body in bodies]


def bundled_bodies(count: int, seed: int) -> Iterator[Body]:
    """Questions whose answers stand only in the KV cache, and verses that a seed makes."""
    rng = random.Random(seed)
    for number in range(count):
        if number % 2:
            task = recall_task(rng, "The evil that men do lives after them;\n" * rng.randrange(20))
            yield "/v1/chat/completions", {"messages": list(task.messages), "max_tokens": 16, "temperature": 0}
        else:
            body = {"prompt": "ROMEO:\n" * rng.randrange(1, 20), "max_tokens": 60, "temperature": 0.8, "seed": number}
            yield "/v1/completions", body
