"""Thoughts before answers that a grammar binds, by llguidance itself."""

import json

import msgspec
import pytest
import tokenizers
from tokenizers import decoders, pre_tokenizers

from flowkv.errors import GrammarError
from flowkv.grammar.compiler import compile_grammar
from flowkv.grammar.vocabulary import Vocabulary, small_tokenizer
from flowkv.server.reasoning.lead import thought_lead
from flowkv.server.reasoning.thought_format import FORMATS
from flowkv.types import Grammar, GrammarKind

TAGS = ["<think>", "</think>"]
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
ANSWERS = [
    (Grammar(kind=GrammarKind.JSON_OBJECT), "{}", "[]"),
    (Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(SCHEMA)), '{"x": 1}', "{}"),
    (Grammar(kind=GrammarKind.REGEX, text="(ab){2}"), "abab", "aba"),
    (Grammar(kind=GrammarKind.CHOICE, text='["yes", "no"]'), "yes", "maybe"),
    (Grammar(kind=GrammarKind.GRAMMAR, text='root ::= "<" ("x" | "y") ">"'), "<x>", "<z>"),
    (Grammar(kind=GrammarKind.GRAMMAR, text='start: "call " TEXT\nTEXT: /[0-9]+/'), "call 17", "call me"),
    (Grammar(kind=GrammarKind.GRAMMAR, text='start: thought\nthought: %json {"const": 17}'), "17", "18"),
]


def follows(grammar: Grammar, name: str, text: str, *, is_open: bool, added: list[str]) -> bool:
    """To its end."""
    tokenizer = tokenizers.Tokenizer.from_str(small_tokenizer(decoders.ByteLevel(), added))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = Vocabulary.of_small(tokenizer.to_str())
    lead = thought_lead(FORMATS[name], added.__contains__, is_open=is_open)
    matcher = compile_grammar(msgspec.structs.replace(grammar, lead=lead), vocabulary)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize("added", [[], TAGS], ids=["text", "tokens"])
@pytest.mark.parametrize(("grammar", "answer", "wrong"), ANSWERS)
def test_a_thought_is_free_and_the_answer_bound(grammar: Grammar, answer: str, wrong: str, added: list[str]) -> None:
    def ends(text: str, *, is_open: bool) -> bool:
        return follows(grammar, "think", text, is_open=is_open, added=added)

    for is_open, opening in ((True, ""), (False, "<think>")):
        assert ends(f"{opening}Hm: {wrong} or </thin > {answer}?\n</think>\n\n{answer}", is_open=is_open)
        assert ends(f"{opening}</think>{answer}", is_open=is_open)
        assert not ends(f"{opening}Hm.</think>\n{wrong}", is_open=is_open)
        assert not ends(f"{opening}Hm. {answer}", is_open=is_open)
    assert ends(answer, is_open=False)
    assert not ends(answer, is_open=True)
    assert not ends(f"Hm. {answer}", is_open=False)


def test_a_thought_ends_at_its_first_marker() -> None:
    assert not follows(ANSWERS[2][0], "think", "a</think>b</think>abab", is_open=True, added=[])
    text = "Here's my thought process: Hm. Here is my response: abab"
    assert follows(ANSWERS[2][0], "granite", text, is_open=False, added=[])


def test_markers_that_no_grammar_can_name_leave_the_answer_bound_from_its_first_token() -> None:
    added = ["[THINK]", "[/THINK]"]
    assert thought_lead(FORMATS["mistral"], added.__contains__, is_open=False) == ""
    assert follows(ANSWERS[2][0], "mistral", "[THINK]Hm.[/THINK]abab", is_open=False, added=[])


def test_what_is_no_grammar_is_none_after_a_thought_either() -> None:
    for text in ('{"grammars": []}', '{"x": 1}', "{"):
        with pytest.raises(GrammarError):
            follows(Grammar(kind=GrammarKind.GRAMMAR, text=text), "think", "", is_open=True, added=[])
