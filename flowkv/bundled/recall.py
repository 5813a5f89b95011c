"""The recall task that the bundled model was trained on.

A conversation states `name = value` facts, talks of something else, and then asks for some of the facts.
An answer is one word that stands only in the KV cache by then, so a block that was lost, swapped or left
unfilled on its way between instances shows as a wrong answer.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

# Every word is a single token of the bundled tokenizer, in the two forms that occur ("word", " word").
NAMES = (
    "anchor apple arrow basket beacon bell blanket bottle bridge brush bucket button cabin candle canvas "
    "carpet castle chain chalk chest circle clock compass copper cradle crystal curtain diamond drum feather "
    "fence flag fountain gate glass hammer harbor helmet hinge hook jar kettle key ladder lantern lemon "
    "lever lock magnet marble mirror needle"
).split()
VALUES = (
    "badger beetle bison camel canary cobra condor coyote crane cricket deer dolphin donkey eagle falcon ferret "
    "finch fox frog gazelle goose gopher heron hornet hyena ibex iguana jackal jaguar koala lark lemur leopard "
    "lizard llama lobster magpie marten mole moose newt ocelot octopus oriole otter owl panda panther parrot "
    "pelican penguin pigeon puma quail rabbit raccoon raven robin salmon seal shark sparrow squid stork swan "
    "tiger toad trout turtle viper walrus weasel whale wolf wombat zebra"
).split()


@dataclass(frozen=True, slots=True)
class RecallTask:
    """One conversation: chat messages that end with a question, and the answer that is right."""

    messages: tuple[dict[str, str], ...]
    answer: str


def state_facts(facts: Sequence[tuple[str, str]]) -> str:
    return "".join(f"{name} = {value}\n" for name, value in facts)


def ask(name: str) -> str:
    return f"Recall {name}."


def reply(name: str, value: str) -> str:
    return f"{name} = {value}"


def draw_facts(rng: random.Random, num_facts: int) -> list[tuple[str, str]]:
    """Distinct names with independent values."""
    return [(name, rng.choice(VALUES)) for name in rng.sample(NAMES, num_facts)]


def recall_task(rng: random.Random, filler: str, num_facts: int = 6) -> RecallTask:
    """A single-turn task: facts, then `filler` (any text), then one question."""
    facts = draw_facts(rng, num_facts)
    name, value = rng.choice(facts)
    content = f"{state_facts(facts)}{filler}\n{ask(name)}"
    return RecallTask(({"role": "user", "content": content},), reply(name, value))
