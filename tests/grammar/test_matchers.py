"""What a grammar lets through: what ends follows it, and any instance finds the place from the ids alone."""

import json
import logging
import random
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from llguidance import LLParserLimits

from flowkv.bundled import MODEL_FOLDER
from flowkv.grammar import compiler as compiler_module
from flowkv.grammar import matchers as matchers_module
from flowkv.grammar.matchers import NOTHING, Matchers
from flowkv.grammar.vocabulary import BYTE_END_ID, Vocabulary
from flowkv.model.sampler import DrawSpec, sample
from flowkv.model_files import load_tokenizer
from flowkv.types import NO_TOKEN, Grammar, GrammarKind, Request, SamplingParams

NUM_TOKENS = 1600  # of the model: more than its tokenizer has
MAX_OUTPUT = 250
VOCABULARY = Vocabulary.of_folder(MODEL_FOLDER, NUM_TOKENS)
TOKENIZER = load_tokenizer(MODEL_FOLDER)

words = st.text(st.sampled_from('ab"\\\n \u00e9\u732b'), max_size=3)
scalars = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda least, span: {"type": "integer", "minimum": least, "maximum": least + span}, st.integers(-99, 99),
              st.integers(0, 2000)),
    st.builds(lambda least, more: {"type": "string", "minLength": least, "maxLength": least + more}, st.integers(0, 3),
              st.integers(0, 4)),
    st.lists(words | st.integers(-5, 5) | st.none(), min_size=1, max_size=4).map(lambda values: {"enum": values}),
    st.sampled_from(["^[a-c]{1,4}$", "^(x|yz)?$"]).map(lambda pattern: {"type": "string", "pattern": pattern}),
)  # fmt: skip


@st.composite
def objects(draw: st.DrawFn, values: st.SearchStrategy[Any]) -> dict[str, Any]:
    properties = draw(st.dictionaries(words, values, max_size=3))
    required = draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


schemas = st.recursive(
    scalars,
    lambda inner: st.one_of(
        objects(inner),
        st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, st.integers(0, 3)),
        st.lists(inner, min_size=1, max_size=3).map(lambda branches: {"anyOf": branches}),
    ),
    max_leaves=4,
)


def request_of(grammar: Grammar, **sampling: Any) -> Request:
    params = SamplingParams(max_tokens=MAX_OUTPUT, grammar=grammar, stop_token_ids=VOCABULARY.end_ids, **sampling)
    return Request(request_id="r", prompt_ids=[5], sampling=params)


def schema_request(schema: Any, **sampling: Any) -> Request:
    return request_of(Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(schema)), **sampling)


def output_of_noise(request: Request, seed: int, matchers: Matchers, choice: int = 0) -> list[int]:
    """What a model of random logits puts out, its end included, as far as `max_tokens` goes."""
    generator = torch.Generator().manual_seed(seed)
    output_ids: list[int] = []
    while len(output_ids) < request.sampling.max_tokens:
        logits = torch.randn(1, NUM_TOKENS, generator=generator) * 4
        allowed = matchers.allowed(request, choice, output_ids)
        ((token_id, _),) = sample(logits, [DrawSpec(0, request.sampling, choice, [5], output_ids, allowed)])
        assert token_id != NO_TOKEN
        output_ids.append(token_id)
        if token_id in request.sampling.stop_token_ids:
            break
    return output_ids


def text_of(output_ids: list[int]) -> str:
    return TOKENIZER.decode(output_ids[:-1], skip_special_tokens=False)


@settings(max_examples=40, deadline=None)
@given(schemas, st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 1.0]))
def test_whatever_the_model_an_answer_that_ends_follows_its_schema(schema: Any, seed: int, temperature: float) -> None:
    request = schema_request(schema, temperature=temperature, seed=seed, top_p=0.9)
    output_ids = output_of_noise(request, seed, Matchers(VOCABULARY, 4))
    assume(output_ids[-1] in VOCABULARY.end_ids)
    jsonschema.validate(json.loads(text_of(output_ids)), schema)


@settings(max_examples=20, deadline=None)
@given(schemas, st.integers(0, 10**6))
def test_the_place_is_found_from_the_ids_at_any_moment(schema: Any, seed: int) -> None:
    """As at a handoff, after a preemption or a crash."""
    request = schema_request(schema, temperature=1.0, seed=seed)
    matchers = Matchers(VOCABULARY, 4)
    output_ids = output_of_noise(request, seed, matchers)
    walking = Matchers(VOCABULARY, 4)
    for length in range(len(output_ids)):
        way = output_ids[:length]
        assert np.array_equal(walking.allowed(request, 0, way), Matchers(VOCABULARY, 4).allowed(request, 0, way))  # type: ignore[arg-type]


def test_choices_and_attempts_have_places_of_their_own_however_few_are_kept() -> None:
    request = request_of(Grammar(kind=GrammarKind.REGEX, text="[ab]{4}c"))
    for max_places in (1, 8):
        matchers = Matchers(VOCABULARY, max_places)
        outputs = [output_of_noise(request, seed, matchers, choice=0) for seed in range(4)]  # each a new attempt
        assert len({text_of(output) for output in outputs}) > 1
        ways = [TOKENIZER.encode("abab").ids, TOKENIZER.encode("a").ids]
        for way in (*ways, *ways, []):
            for choice, ids in ((0, way), (1, ways[0])):
                alone = Matchers(VOCABULARY, 1).allowed(request, 0, ids)
                assert np.array_equal(matchers.allowed(request, choice, ids), alone)  # type: ignore[arg-type]


def test_few_grammars_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matchers_module, "MAX_COMPILED", 2)
    matchers = Matchers(VOCABULARY, 4)
    for text in ("a", "b", "a", "c"):
        matchers.allowed(request_of(Grammar(kind=GrammarKind.REGEX, text=text)), 0, [])
    assert [grammar.text for grammar in matchers._compiled] == ["a", "c"]


def test_the_places_of_a_grammar_go_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matchers_module, "MAX_COMPILED", 2)
    matchers = Matchers(VOCABULARY, 16)
    ids = TOKENIZER.encode("a").ids
    for number in range(6):
        request = msgspec.structs.replace(
            request_of(Grammar(kind=GrammarKind.REGEX, text=f"a{number}")), request_id=f"r{number}"
        )
        matchers.allowed(request, 0, ids)
    assert [request_id for request_id, _ in matchers._places] == ["r4", "r5"]


def test_what_others_have_used_up_of_a_grammar_ends_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its states are shared: one that all of them together have too many of is compiled anew."""
    limits = LLParserLimits(max_lexer_states=1000, precompute_large_lexemes=False)
    monkeypatch.setattr(compiler_module, "limits", lambda: limits)
    matchers = Matchers(Vocabulary.of_bytes(), 32)
    generator = random.Random(1)
    for number in range(20):
        request = request_of(Grammar(kind=GrammarKind.REGEX, text="[ab]*a[ab]{14}c"))
        request = msgspec.structs.replace(request, request_id=f"r{number}")
        ids = generator.choices(b"ab", k=100)
        for length in range(1, len(ids)):
            allowed = matchers.allowed(request, 0, ids[:length])
            assert allowed is not None and allowed.any()


def test_a_grammar_that_is_too_much_is_not_kept() -> None:
    matchers = Matchers(VOCABULARY, 16)
    request = request_of(Grammar(kind=GrammarKind.REGEX, text="(.*(a|ab|abc|bca|cab|c).{1,300}){300}"))
    assert matchers.allowed(request, 0, TOKENIZER.encode("cbaabacab" * 40).ids) is NOTHING
    assert not matchers._compiled and not matchers._places


def test_without_a_grammar_anything_may_be_next() -> None:
    request = Request(request_id="r", prompt_ids=[5], sampling=SamplingParams(max_tokens=9))
    assert Matchers(VOCABULARY, 4).allowed(request, 0, [7]) is None


@pytest.mark.parametrize("why", ["no tokenizer", "other ids", "no grammar", "too much"])
def test_where_it_cannot_go_on_nothing_may_be_next_and_the_log_says_why(
    why: str, caplog: pytest.LogCaptureFixture
) -> None:
    text = {"no grammar": "(?=a)", "too much": "(.*(a|ab|abc|bca|cab|c).{1,300}){300}"}.get(why, "[0-9]{3}")
    ids = {"no grammar": [], "too much": TOKENIZER.encode("cbaabacab" * 40).ids}.get(why, TOKENIZER.encode("a").ids)
    matchers = Matchers(None if why == "no tokenizer" else VOCABULARY, 4)
    request = request_of(Grammar(kind=GrammarKind.REGEX, text=text), temperature=0.0)
    with caplog.at_level(logging.WARNING):
        allowed = matchers.allowed(request, 0, ids)
    assert allowed is not None and not allowed.any()
    assert "its grammar:" in caplog.text and caplog.records[0].request_id == "r"  # type: ignore[attr-defined]
    spec = DrawSpec(0, request.sampling, 0, [5], ids, allowed)
    assert sample(torch.zeros(1, NUM_TOKENS), [spec]) == [(NO_TOKEN, None)]


def test_bytes_have_an_end_of_their_own() -> None:
    request = request_of(Grammar(kind=GrammarKind.REGEX, text="a*"))
    allowed = Matchers(Vocabulary.of_bytes(), 4).allowed(request, 0, [ord("a")])
    assert allowed is not None
    assert np.flatnonzero(np.unpackbits(allowed, bitorder="little")).tolist() == [ord("a"), BYTE_END_ID]
