"""What a check has found."""

from enum import StrEnum

import msgspec


class Level(StrEnum):
    OK = "ok"
    WARN = "warn"  # it will serve, but not as well, or not as safely, as it could
    FAIL = "fail"  # `flowkv serve` with this configuration ends with an error here


class Finding(msgspec.Struct, frozen=True):
    """`advice` is what to do about it, empty where nothing is."""

    check: str
    level: Level
    text: str
    advice: str = ""


def ok(check: str, text: str) -> Finding:
    return Finding(check, Level.OK, text)


def warn(check: str, text: str, advice: str) -> Finding:
    return Finding(check, Level.WARN, text, advice)


def fail(check: str, text: str, advice: str) -> Finding:
    return Finding(check, Level.FAIL, text, advice)
