"""What can be a grammar and what cannot, and that neither costs much."""

import json
import shutil
from pathlib import Path

import pytest

from flowkv.bundled import MODEL_FOLDER
from flowkv.errors import GrammarError
from flowkv.grammar.compiler import MAX_MESSAGE_CHARS, MAX_TEXT_BYTES, compile_grammar
from flowkv.grammar.vocabulary import BYTE_END_ID, Vocabulary
from flowkv.model_files import load_tokenizer
from flowkv.types import Grammar, GrammarKind

BYTES = Vocabulary.of_bytes()


def accepts(kind: GrammarKind, text: str, answer: str) -> bool:
    """Whether the answer follows the grammar, to its end."""
    matcher = compile_grammar(Grammar(kind=kind, text=text), BYTES)
    token_ids = [*answer.encode(), BYTE_END_ID]
    return matcher.validate_tokens(token_ids) == len(token_ids)


@pytest.mark.parametrize(
    ("kind", "text", "good", "bad"),
    [
        ("json_object", "", '{"a": [1, null]}', "[1]"),
        ("json_schema", '{"type": "array", "items": {"type": "integer"}}', "[1, 2]", '["a"]'),
        ("json_object", "", '{\n    "a": 1, "b": [\n]\n}', '{\n\n"a": 1}'),
        ("json_schema", '{"oneOf": [{"type": "integer"}, {"type": "null"}]}', "null", "true"),
        ("regex", "[0-9]{2,3}x?", "123x", "1x"),
        ("choice", '["yes", "no \\"so\\"\\n", "\u00e9"]', 'no "so"\n', "maybe"),
        ("choice", '["yes", "no", "\u00e9"]', "\u00e9", "ye"),
        ("grammar", 'start: "a" b*\nb: "(" b ")" | "x"', "a((x))x", "a(x"),
        ("grammar", 'root ::= "yes" | "no" [0-9]+', "no42", "no"),
        ("grammar", 'start: /<[0-9]>/ "<[" //<[5]>', "<5><[", "<a><["),
        ("grammar", 'start: "<call>" %json {"type": "integer"} "</call>"', "<call>7</call>", "<call>a</call>"),
    ],
)
def test_every_kind(kind: str, text: str, good: str, bad: str) -> None:
    assert accepts(GrammarKind(kind), text, good)
    assert not accepts(GrammarKind(kind), text, bad)


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("json_schema", '{"type": "bogus"}', "bogus"),
        ("json_schema", "{", "EOF"),
        ("json_schema", '{"not": {"type": "string"}}', "Unimplemented"),
        ("json_schema", '{"$ref": "file:///etc/hostname"}', "does not fetch"),
        ("json_schema", '{"enum": []}', "Unsatisfiable"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", "(" * 20_000, "regex"),
        ("grammar", "start: foo", "foo"),
        ("grammar", 'start: "a" <[5]>', "names"),
        ("grammar", "start: <[^5-9,11]>", "names"),
        ("grammar", "root ::= " + "(" * 30_000, "GBNF"),
        ("grammar", "start: " + "(" * 30_000, "nested"),
        ("choice", "[]", "one at least"),
        ("choice", '{"a": 1}', "list of strings"),
        ("choice", "[1]", "list of strings"),
        ("choice", "[", "list of strings"),
        ("regex", "a" * (MAX_TEXT_BYTES + 1), "longer than"),
    ],
)
def test_a_bad_grammar_is_refused_in_one_line(kind: str, text: str, words: str) -> None:
    with pytest.raises(GrammarError, match=words) as caught:
        compile_grammar(Grammar(kind=GrammarKind(kind), text=text), BYTES)
    message = str(caught.value)
    assert "\n" not in message and len(message) <= MAX_MESSAGE_CHARS + 100


def nested_schema(depth: int) -> str:
    return '{"type":"object","properties":{"a":' * depth + '{"type":"null"}' + '},"required":["a"]}' * depth


BOMBS = {
    "powers": ("regex", "a" + "{1,99}" * 200),
    "tails": ("regex", "(.*a.{200}|.*b.{300}).*c.{400}"),
    "terminals": ("grammar", "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(64)) + '\nA64: "x"'),
    "rules": ("grammar", "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(64)) + '\na64: "x"'),
    "depth": ("json_schema", nested_schema(1000)),
    "products": (
        "json_schema",
        json.dumps({"allOf": [{"anyOf": [{"minLength": i * j} for j in range(9)]} for i in range(9)]}),
    ),
    "lengths": ("json_schema", '{"type": "array", "minItems": 1000000000, "items": {"minLength": 1000000000}}'),
    "values": ("json_schema", json.dumps({"enum": [f"value {i}" for i in range(4000)]})),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_compiled_or_refused_within_bounds(name: str) -> None:
    """Whichever: what matters is that it ends, and so does its first mask. (No clock: a hang is what would show.)"""
    kind, text = BOMBS[name]
    try:
        compile_grammar(Grammar(kind=GrammarKind(kind), text=text), BYTES).compute_bitmask()
    except GrammarError as error:
        assert str(error)


def test_a_model_with_more_tokens_than_its_tokenizer_never_draws_them() -> None:
    vocabulary = Vocabulary.of_folder(MODEL_FOLDER, num_tokens=2000)
    assert vocabulary.tokens.vocab_size == 2000
    mask = compile_grammar(Grammar(kind=GrammarKind.REGEX, text="(?s:.*)"), vocabulary).compute_bitmask()
    allowed = {index for index in range(2000) if mask[index // 8] >> index % 8 & 1}
    tokenizer = load_tokenizer(MODEL_FOLDER)
    assert allowed and max(allowed) < tokenizer.get_vocab_size(with_added_tokens=True)
    special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    assert allowed & special == vocabulary.end_ids  # text holds no special token


def test_a_model_that_ends_nowhere_takes_no_grammar(tmp_path: Path) -> None:
    shutil.copy(MODEL_FOLDER / "tokenizer.json", tmp_path)
    with pytest.raises(GrammarError, match="end-of-sequence"):
        Vocabulary.of_folder(tmp_path, 0)
