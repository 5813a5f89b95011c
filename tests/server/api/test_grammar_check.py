"""What a frontend does with the grammar of a client before anything else."""

import asyncio

import pytest

from flowkv.errors import RequestError
from flowkv.grammar.sandbox import Sandbox
from flowkv.grammar.vocabulary import BYTE_END_ID
from flowkv.server.api import grammar_check
from flowkv.server.api.grammar_check import GrammarCheck
from flowkv.server.text.byte_tokenizer import ByteTokenizer
from flowkv.types import Grammar, GrammarKind


def regex(text: str) -> Grammar:
    return Grammar(kind=GrammarKind.REGEX, text=text)


def test_a_good_grammar_is_compiled_once_and_says_what_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    check = GrammarCheck(ByteTokenizer())
    compiled: list[str] = []

    def recording(sandbox: Sandbox, grammar: Grammar) -> None:
        compiled.append(grammar.text)
        sandbox_check(sandbox, grammar)

    sandbox_check = Sandbox.check
    monkeypatch.setattr(Sandbox, "check", recording)

    async def run() -> None:
        for text in ("[0-9]+", "[a-z]+", "[0-9]+"):
            assert await check.check(regex(text), "guided_regex") == {BYTE_END_ID}

    asyncio.run(run())
    assert compiled == ["[0-9]+", "[a-z]+"]


def test_a_bad_grammar_names_its_field_and_is_no_known_one() -> None:
    check = GrammarCheck(ByteTokenizer())
    for _ in range(2):
        with pytest.raises(RequestError, match="look-around") as caught:
            asyncio.run(check.check(regex("(?=a)"), "guided_regex"))
        assert (caught.value.status, caught.value.param) == (400, "guided_regex")


def test_the_event_loop_goes_on_meanwhile_and_too_many_at_once_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_check, "MAX_WAITING", 2)
    check = GrammarCheck(ByteTokenizer())

    async def run() -> list[object]:
        return await asyncio.gather(*(check.check(regex(f"a{i}"), "x") for i in range(4)), return_exceptions=True)

    results = asyncio.run(run())
    refused = [result.status for result in results if isinstance(result, RequestError)]
    assert refused == [503, 503] and results.count({BYTE_END_ID}) == 2
    assert asyncio.run(check.check(regex("a3"), "x")) == {BYTE_END_ID}


def test_few_grammars_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_check, "MAX_KNOWN", 2)
    check = GrammarCheck(ByteTokenizer())
    for text in ("a", "b", "a", "c"):
        asyncio.run(check.check(regex(text), "x"))
    assert [grammar.text for grammar in check._known] == ["a", "c"]
