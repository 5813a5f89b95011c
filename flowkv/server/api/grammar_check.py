"""Grammars of clients, compiled before a request costs anything, and where they cannot hold up the event loop."""

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

from flowkv.errors import GrammarError, RequestError
from flowkv.grammar.sandbox import Sandbox
from flowkv.server.text.tokenizer import Tokenizer
from flowkv.types import Grammar

MAX_WAITING = 64  # to be compiled, one after the other, which takes half a second at most
MAX_KNOWN = 256


class GrammarCheck:
    """One for all requests of a frontend. A grammar that was found good is not compiled again."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: OrderedDict[Grammar, None] = OrderedDict()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._num_waiting = 0

    async def check(self, grammar: Grammar, param: str) -> frozenset[int]:
        """The ids that end its answers: they belong to the request's `stop_token_ids`, whatever it says of others.

        Raises `RequestError`: 400 with the compiler's words where no output can follow the grammar, `param` being the
        field that it came from; 503 while too many others are being compiled.
        """
        if grammar not in self._known:
            if self._num_waiting >= MAX_WAITING:
                raise RequestError(
                    "too many new grammars at once", status=503, param=param, code="overloaded", retry_after_s=1.0
                )
            await self._compile(grammar, param)
            self._known[grammar] = None
        self._known.move_to_end(grammar)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return self._tokenizer.grammar_end_ids

    async def _compile(self, grammar: Grammar, param: str) -> None:
        self._num_waiting += 1
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._try, grammar)
        except GrammarError as error:
            raise RequestError(f"{param}: {error}", param=param, code="invalid_grammar") from error
        finally:
            self._num_waiting -= 1

    def _try(self, grammar: Grammar) -> None:
        if not self._tokenizer.grammar_end_ids:
            raise GrammarError("this model has no end-of-sequence token, without which no grammar can end")
        self._sandbox.check(grammar)

    @cached_property
    def _sandbox(self) -> Sandbox:
        return Sandbox(self._tokenizer.small())
