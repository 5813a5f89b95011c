"""What `flowkv plan` may choose from: which instances lean to which phase, whether roles change, and the policy."""

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import msgspec

from flowkv.config import POLICIES, ClusterConfig
from flowkv.errors import ConfigError

MIXED, FIXED, FLEXIBLE = KINDS = ("mixed", "fixed", "flexible")

_MAX_FIXED = 7  # divisions of one group of instances
_MAX_FLEXIBLE = 3
_OPTIONS = {"slo.ttft_s": "--slo-ttft", "slo.tpot_s": "--slo-tpot", "slo.admission": "--admission"}


@dataclass(frozen=True, slots=True)
class Group:
    """Instances on the same hardware; `cost` names it as `simulate.cost` does."""

    cost: str
    count: int

    @property
    def hardware(self) -> str:
        return Path(self.cost).stem if Path(self.cost).suffix else self.cost.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A cluster to try. "mixed": all instances do both phases; "fixed" and "flexible": roles of their own, which stay
    as they are or follow the load from there on."""

    kind: str
    policy: str
    groups: tuple[Group, ...]
    num_prefill: tuple[int, ...] = ()  # of each group; its others decode. Empty where all are mixed

    @property
    def is_split(self) -> bool:
        return self.kind != MIXED

    @property
    def num_instances(self) -> int:
        return sum(group.count for group in self.groups)

    @property
    def name(self) -> str:
        """`8 mixed`, `4P4D` (fixed), `flexible 4P4D`; what is not usual is named too: hardware, policy."""
        if not self.is_split:
            text = f"{self.num_instances} mixed"
        else:
            parts = [f"{count}P{group.count - count}D" for group, count in self._divided()]
            if len(self.groups) > 1:
                parts = [f"{group.hardware} {part}" for (group, _), part in zip(self._divided(), parts, strict=True)]
            text = ("flexible " if self.kind == FLEXIBLE else "") + " + ".join(parts)
        return text if self.policy == POLICIES[0] else f"{text} ({self.policy})"

    @property
    def overrides(self) -> dict[str, Any]:
        """What makes a configuration this one."""
        prefill = [group.cost for group, count in self._divided() for _ in range(count)]
        decode = [group.cost for group, count in self._divided() for _ in range(group.count - count)]
        mixed = [] if self.is_split else [group.cost for group in self.groups for _ in range(group.count)]
        costs = prefill + decode + mixed
        return {
            "prefill": len(prefill),
            "decode": len(decode),
            "mixed": len(mixed),
            "scheduling.roles": FLEXIBLE if self.kind == FLEXIBLE else FIXED,
            "scheduling.policy": self.policy,
            "simulate.cost": costs[0] if len(self.groups) == 1 else costs,
        }

    def _divided(self) -> list[tuple[Group, int]]:
        return list(zip(self.groups, self.num_prefill, strict=True)) if self.is_split else []


def candidates(groups: Sequence[Group], policies: Iterable[str]) -> list[Candidate]:
    """Everything that is compared, the simplest first.

    Of a group of more than eight instances not every division, but seven from end to end; flexible roles start from
    three of them, since they leave them anyway.
    """
    groups = tuple(groups)
    found = []
    for policy in policies:
        found.append(Candidate(MIXED, policy, groups))
        for kind, most in ((FIXED, _MAX_FIXED), (FLEXIBLE, _MAX_FLEXIBLE)):
            found += [Candidate(kind, policy, groups, division) for division in _divisions(groups, most)]
    return found


def _divisions(groups: tuple[Group, ...], most: int) -> list[tuple[int, ...]]:
    """Prefill instances of each group. Not all of all groups, and not none."""
    if len(groups) == 1:
        return [(count,) for count in _spread(range(1, groups[0].count), most)]
    choices = [_spread(range(group.count + 1), most) for group in groups]
    total = sum(group.count for group in groups)
    return [division for division in product(*choices) if 0 < sum(division) < total]


def _spread(values: Sequence[int], most: int) -> list[int]:
    """At most so many of them, evenly, with both ends; of three or fewer the middle and the quarters."""
    if len(values) <= most:
        return list(values)
    return sorted({values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)})


# --- as text -------------------------------------------------------------------------------------------------------


def parse_groups(texts: Iterable[str], num_instances: int | None) -> list[Group]:
    """`MODEL/HARDWARE`, or a file, or several with counts: `llama-3.1-8b/l20:4,h20:4`.

    One without a count stands for `num_instances`. ConfigError where counts are missing, or do not add up to it.
    """
    parts = [part for text in texts for part in text.split(",") if part]
    model = parts[0].rpartition("/")[0] if parts else ""
    counted = [_parse_count(part) for part in parts]
    if len(counted) == 1 and counted[0][1] is None and num_instances is not None:
        counted = [(counted[0][0], num_instances)]
    groups = [
        Group(name if "/" in name or Path(name).exists() else f"{model}/{name}", count)
        for name, count in counted
        if count is not None
    ]
    if len(groups) < len(counted) or not groups or min(group.count for group in groups) < 1:
        raise ConfigError(
            "there are no instances to plan with: give --instances, or a count for each --cost NAME:COUNT"
        )
    if num_instances is not None and num_instances != (total := sum(group.count for group in groups)):
        raise ConfigError(f"--instances says {num_instances}, and the counts of --cost add up to {total}")
    return groups


def _parse_count(part: str) -> tuple[str, int | None]:
    name, _, count = part.rpartition(":")
    return (name, int(count)) if name and count.isdigit() else (part, None)


def serve_commands(candidate: Candidate, config: ClusterConfig) -> list[str]:
    """The command that starts the candidate; with several kinds of hardware one for each node or more.

    `config` is the candidate's. What only a simulation reads is left out.
    """
    model = shlex.quote(config.model or "MODEL")
    roles = [
        [("prefill", count), ("decode", group.count - count)] for group, count in zip(
            candidate.groups, candidate.num_prefill, strict=True)
    ] if candidate.is_split else [[("mixed", group.count)] for group in candidate.groups]  # fmt: skip
    serve = " ".join(["flowkv serve", model, *_counts(roles[0]), *_settings(config)])
    if len(candidate.groups) == 1:
        return [serve]
    joins = [
        f"flowkv join ADDRESS {model} --role {role} --count {count}  # on {group.hardware}"
        for group, counts in list(zip(candidate.groups, roles, strict=True))[1:]
        for role, count in counts
        if count
    ]
    return [f"{serve} --listen ADDRESS  # on {candidate.groups[0].hardware}", *joins]


def _counts(roles: Iterable[tuple[str, int]]) -> list[str]:
    given = dict(roles)
    if "mixed" in given:
        return [f"--mixed {given['mixed']}"]
    return [f"--{role} {count}" for role, count in given.items()]


def _settings(config: ClusterConfig) -> list[str]:
    """Every key that is not as it would be without."""
    options = [f"--roles {config.scheduling.roles}"]
    defaults, values = msgspec.to_builtins(ClusterConfig()), msgspec.to_builtins(config)
    for section in ("slo", "scheduling", "engine", "transfer"):
        for key, value in values[section].items():
            if value != defaults[section][key] and (section, key) != ("scheduling", "roles"):
                options.append(_setting(f"{section}.{key}", value))
    return options


def _setting(key: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    if key == "slo.admission":
        return _OPTIONS[key]
    return f"{_OPTIONS[key]} {text}" if key in _OPTIONS else f"--set {shlex.quote(f'{key}={text}')}"
