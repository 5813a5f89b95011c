"""JSON of strangers and of models, within bounds that everything behind can live with."""

import json
import re
from itertools import accumulate
from typing import Any

MAX_DEPTH = 200  # far below Python's own limit: values are walked again, by templates that have frames of their own
MAX_BRACKETS = 2**18  # of all values together; an object or a list has two

_TO_SIGNS = bytes.maketrans(b"[{]}", b"(())")
_OTHERS = bytes(set(range(256)) - set(b'[{]}"'))
_STRING = re.compile(rb'"[^"]*"')
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_STEPS = {ord("("): 1, ord(")"): -1}


class NestingError(ValueError):
    pass


def check_nesting(data: bytes) -> None:
    """Raises `NestingError` where values are nested too deeply, or too many. Of what is no JSON it may say anything."""
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return
    data = data.replace(b"\\\\", b"").replace(b'\\"', b"")  # a quote ends a string from here on, or begins it
    data = data.translate(None, _OTHERS).replace(b'""', b"")
    brackets = _STRING.sub(b"", data).translate(_TO_SIGNS, b'"')
    if len(brackets) > MAX_BRACKETS:
        raise NestingError(f"it has more than {MAX_BRACKETS // 2} objects and lists")
    if max(accumulate(map(_STEPS.__getitem__, brackets), initial=0)) > MAX_DEPTH:
        raise NestingError(f"it is nested more than {MAX_DEPTH} deep")


def loads_strict(text: str, *, strict: bool = True) -> Any:
    """As `json.loads`; ValueError where it is nested too deeply too, or has half a surrogate pair, which is no text.

    `strict`: no control characters within strings.
    """
    check_nesting(text.encode())  # UnicodeEncodeError is a ValueError
    value = json.loads(text, strict=strict)
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()
    return value
