"""Which tokens may be next: every choice's place in its grammar, found from what it has put out.

Nothing of it crosses a wire. An instance that takes a choice over, or takes it up again, finds the place by going
through its ids once; from then on each token is one step.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from flowkv.errors import GrammarError
from flowkv.grammar.compiler import compile_grammar, one_line
from flowkv.grammar.vocabulary import Vocabulary
from flowkv.throttle import Throttle
from flowkv.types import Grammar, Request

Bits = npt.NDArray[np.uint8]  # bit i % 8 of byte i // 8: whether token i may be next

MAX_COMPILED = 16  # each may come to take some 40 MiB, whose states all of its places share
NOTHING: Bits = np.zeros(1, np.uint8)  # not of no bytes, which numpy would unpack from beyond their end

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Compiled:
    start: LLMatcher  # stays where it is
    first: Bits  # what may be first
    num_places: int = 0  # that ever were, which all have added to the states


@dataclass(slots=True)
class _Place:
    grammar: Grammar
    matcher: LLMatcher
    ids: list[int] = field(default_factory=list)  # which `matcher` has gone through

    def is_on_the_way_to(self, grammar: Grammar, output_ids: Sequence[int]) -> bool:
        return self.grammar == grammar and output_ids[: len(self.ids)] == self.ids


class Matchers:
    """Of one instance. `max_places` choices have theirs kept; where one is not, it is found anew.

    Without a vocabulary (None) nothing may be drawn by a grammar.
    """

    def __init__(self, vocabulary: Vocabulary | None, max_places: int) -> None:
        self._vocabulary = vocabulary
        self._max_places = max_places
        self._compiled: OrderedDict[Grammar, _Compiled] = OrderedDict()
        self._places: OrderedDict[tuple[str, int], _Place] = OrderedDict()
        self._throttle = Throttle()

    def allowed(self, request: Request, choice: int, output_ids: list[int]) -> Bits | None:
        """Which tokens may follow `output_ids`; None: any, since there is no grammar.

        None may where the grammar is too much for the bounds set to it, or the ids do not follow it: the log says so.
        """
        grammar = request.sampling.grammar
        if grammar is None:
            return None
        key = (request.request_id, choice)
        try:
            return self._allowed(grammar, key, output_ids)
        except GrammarError as error:
            if (more := self._throttle.note("grammar", time.monotonic())) is not None:
                _logger.warning("its grammar: %s%s", error, more, extra={"request_id": request.request_id})
            return NOTHING

    def _allowed(self, grammar: Grammar, key: tuple[str, int], output_ids: list[int]) -> Bits:
        compiled = self._compile(grammar)
        if not output_ids:
            return compiled.first
        try:
            return _next(self._place(grammar, compiled, key, output_ids).matcher)
        except GrammarError:
            self._drop(grammar)  # it can only fail again, and has come to be as large as any
            if compiled.num_places <= 1:
                raise
        return self._allowed(grammar, key, output_ids)  # others may have used up what it may take

    def _place(self, grammar: Grammar, compiled: _Compiled, key: tuple[str, int], output_ids: list[int]) -> _Place:
        place = self._places.pop(key, None)
        if place is None or not place.is_on_the_way_to(grammar, output_ids):
            place = _Place(grammar, compiled.start.deep_copy())
            compiled.num_places += 1
        new_ids = output_ids[len(place.ids) :]
        place.matcher.consume_tokens(new_ids)
        place.ids += new_ids
        self._places[key] = place
        if len(self._places) > self._max_places:
            self._places.popitem(last=False)
        return place

    def _compile(self, grammar: Grammar) -> _Compiled:
        compiled = self._compiled.pop(grammar, None)
        if compiled is None:
            if self._vocabulary is None:
                raise GrammarError("this instance knows no tokenizer that one could bind")
            start = compile_grammar(grammar, self._vocabulary)
            compiled = _Compiled(start, _next(start.deep_copy()))
        self._compiled[grammar] = compiled
        if len(self._compiled) > MAX_COMPILED:
            self._drop(next(iter(self._compiled)))
        return compiled

    def _drop(self, grammar: Grammar) -> None:
        """With its places, which would keep its states."""
        del self._compiled[grammar]
        for key in [key for key, place in self._places.items() if place.grammar == grammar]:
            del self._places[key]


def _next(matcher: LLMatcher) -> Bits:
    """Raises `GrammarError` where the matcher has given up."""
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    if matcher.is_error():
        raise GrammarError(one_line(matcher.get_error()))
    return bits
