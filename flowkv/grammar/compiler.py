"""From the text of a grammar to a matcher, within bounds: a text from a stranger costs little, whatever it says."""

import re
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from llguidance import LLMatcher, LLParserLimits, grammar_from

from flowkv.errors import GrammarError
from flowkv.grammar.vocabulary import Vocabulary
from flowkv.types import Grammar, GrammarKind

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_TEXT_BYTES = 128 * 1024
MAX_MESSAGE_CHARS = 400
# What is found in comments, strings and regular expressions comes first, and without a group.
_TOKEN_IDS = re.compile(r'//[^\n]*|"(?:[^"\\\n]|\\.)*"|/(?:[^/\\\n]|\\.)+/|(<\[)')
_ANY_OBJECT = '{"type":"object"}'
# A space, or a new line and its indentation: a model that likes white space would go on with it until max_tokens.
# oneOf is anyOf: whether an answer fits two branches is known only where it ends.
_JSON_OPTIONS: "JsonCompileOptions" = {"whitespace_pattern": r"\x20|\x0A[\x20\x09]{0,20}", "coerce_one_of": True}


class _Source(msgspec.Struct):
    grammars: Annotated[list[dict[str, Any]], msgspec.Meta(min_length=1)]


def limits() -> LLParserLimits:
    """Of one grammar. They end what is large, not all that is slow (`sandbox`); a step ends within some 20 ms.

    Nothing is computed ahead, so what a grammar costs to compile does not depend on the vocabulary: what a frontend
    has found good is good on every instance.
    """
    return LLParserLimits(
        initial_lexer_fuel=250_000, max_lexer_states=20_000, precompute_large_lexemes=False, verbose_errors=False
    )


def compile_grammar(grammar: Grammar, vocabulary: Vocabulary) -> LLMatcher:
    """Before its first token. Raises `GrammarError` with the compiler's own words."""
    if len(grammar.text.encode()) > MAX_TEXT_BYTES:
        raise GrammarError(f"it is longer than {MAX_TEXT_BYTES} bytes")
    matcher = LLMatcher(vocabulary.tokens, _source(grammar), log_level=0, limits=limits())
    if matcher.is_error():
        raise GrammarError(one_line(matcher.get_error()))
    return matcher


def _source(grammar: Grammar) -> str:
    """In llguidance's own form."""
    try:
        return _led(grammar.lead, _answer(grammar))
    except ValueError as error:
        raise GrammarError(one_line(str(error))) from error


def _answer(grammar: Grammar) -> str:
    match grammar.kind:
        case GrammarKind.JSON_OBJECT:
            return LLMatcher.grammar_from_json_schema(_ANY_OBJECT, _JSON_OPTIONS)
        case GrammarKind.JSON_SCHEMA:
            return LLMatcher.grammar_from_json_schema(grammar.text, _JSON_OPTIONS)
        case GrammarKind.CHOICE:
            return grammar_from("choice", _choices(grammar.text))
        case GrammarKind.REGEX:
            return LLMatcher.grammar_from_regex(grammar.text)
        case GrammarKind.GRAMMAR:
            _check_tokens(grammar.text)
            return grammar_from("grammar", grammar.text)


def _led(lead: str, source: str) -> str:
    """Several grammars in one: llguidance has them in JSON, where its own form of one may be plain Lark."""
    if not lead:
        return source
    grammars = (
        msgspec.json.decode(source, type=_Source).grammars if source.startswith("{") else [{"lark_grammar": source}]
    )
    answer, *others = grammars
    return msgspec.json.encode(_Source([{"lark_grammar": lead}, {**answer, "name": "answer"}, *others])).decode()


def _check_tokens(text: str) -> None:
    """Ids of tokens are another model's with another vocabulary, and this one's frontend compiles for a small one."""
    if any(found[1] for found in _TOKEN_IDS.finditer(text)):
        raise GrammarError("tokens have names, as <|end|>, and no numbers, as <[5]>")


def _choices(text: str) -> str:
    try:
        choices = msgspec.json.decode(text, type=list[str])
    except msgspec.DecodeError as error:
        raise GrammarError("choices are a list of strings") from error
    if not choices:
        raise GrammarError("choices are a list of strings, one at least")
    return text


def one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_MESSAGE_CHARS else line[:MAX_MESSAGE_CHARS] + " ..."
