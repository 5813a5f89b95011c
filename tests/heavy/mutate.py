"""Valid things, damaged by a seed: JSON values, and the bytes of frames and bodies."""

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

ODD_NUMBERS = (
    0, 1, -1, 2, 7, 255, 256, 4096, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**31), -(2**63),
    0.0, -0.0, 0.5, 1.5, -1.5, 1e-300, 1e300, 1e308,
)  # fmt: skip
ODD_TEXTS = (
    "", " ", "a", "\0", "null", "None", "0", "-1", "NaN", "..", "../../etc/passwd", "%s%n", "{{7*7}}", "<script>",
    "\u202e", "\ufeff", "\U0001f600", "\ud7ff", "é" * 50, "x" * 5000, "data: [DONE]\n\n", "\r\nX: y", "prefill-0", "~",
)  # fmt: skip
MAX_DEPTH = 200


def odd_value(rng: random.Random) -> Any:
    """Anything that JSON and msgpack can hold."""
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind <= 3:
        return rng.choice(ODD_NUMBERS)
    if kind <= 5:
        return rng.choice(ODD_TEXTS)
    if kind == 6:
        return [odd_value(rng) for _ in range(rng.randrange(4))]
    return {rng.choice(ODD_TEXTS)[:50]: odd_value(rng) for _ in range(rng.randrange(3))}


def mutated(value: Any, rng: random.Random, names: Sequence[str] = ()) -> Any:
    """A copy with one to three changes somewhere inside; `names` are keys that an object may gain."""
    tree = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        tree = _mutate_once(tree, rng, names)
    return tree


def _mutate_once(tree: Any, rng: random.Random, names: Sequence[str]) -> Any:
    holder = [tree]
    places = list(_places(holder, 0))
    parent, key = rng.choice(places)
    rng.choice(_CHANGES)(parent, key, rng, names)
    return holder[0] if holder else None


def _places(node: Any, depth: int) -> list[tuple[Any, Any]]:
    """Every (container, key) below `node`."""
    if depth > MAX_DEPTH:
        return []
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
    found = [(node, key) for key in keys]
    for key in keys:
        found += _places(node[key], depth + 1)
    return found


Change = Callable[[Any, Any, random.Random, Sequence[str]], None]


def _replace(parent: Any, key: Any, rng: random.Random, names: Sequence[str]) -> None:
    parent[key] = odd_value(rng)


def _nudge(parent: Any, key: Any, rng: random.Random, names: Sequence[str]) -> None:
    """A value of the same type, but another."""
    value = parent[key]
    if isinstance(value, bool):
        parent[key] = not value
    elif isinstance(value, int | float):
        parent[key] = rng.choice([-value, value + 1, value - 1, value * 1000, rng.choice(ODD_NUMBERS)])
    elif isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        parent[key] = value[:at] + rng.choice(ODD_TEXTS) + value[at + rng.randrange(3) :]
    else:
        parent[key] = odd_value(rng)


def _drop(parent: Any, key: Any, rng: random.Random, names: Sequence[str]) -> None:
    del parent[key]


def _double(parent: Any, key: Any, rng: random.Random, names: Sequence[str]) -> None:
    if isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(parent[key]))
    else:
        parent[rng.choice(list(names) or [str(key)])] = copy.deepcopy(parent[key])


def _wrap(parent: Any, key: Any, rng: random.Random, names: Sequence[str]) -> None:
    for _ in range(rng.choice([1, 1, 2, 150])):
        parent[key] = [parent[key]] if rng.random() < 0.5 else {"x": parent[key]}


def _add(parent: Any, key: Any, rng: random.Random, names: Sequence[str]) -> None:
    value = parent[key]
    if isinstance(value, dict):
        value[rng.choice([*names, "x"])] = odd_value(rng)
    elif isinstance(value, list):
        value += [odd_value(rng)] * rng.choice([1, 1, 5, 300])
    else:
        parent[key] = odd_value(rng)


_CHANGES: list[Change] = [_replace, _replace, _nudge, _nudge, _drop, _double, _wrap, _add]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut, doubled or put in."""
    frame = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(frame) + 1)
        kind = rng.randrange(4)
        if kind == 0 and at < len(frame):
            frame[at] = rng.randrange(256)
        elif kind == 1:
            del frame[at : at + rng.choice([1, 4, len(frame)])]
        elif kind == 2:
            frame[at:at] = rng.randbytes(rng.choice([1, 4, 64]))
        else:
            frame[at:at] = frame[: rng.randrange(len(frame) + 1)]
    return bytes(frame)


def mutated_body(body: dict[str, Any], rng: random.Random, names: Sequence[str]) -> bytes:
    """What is sent in the place of `body`: mostly JSON still."""
    text = json.dumps(mutated(body, rng, names), ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
    return damaged(text, rng) if rng.random() < 0.2 else text
