"""What a frontend learns of a grammar from a process that it can lose."""

import gc
import json
import os
from pathlib import Path

import pytest
from llguidance import LLTokenizer
from tokenizers import Tokenizer, decoders

from flowkv.bundled import MODEL_FOLDER
from flowkv.errors import GrammarError
from flowkv.grammar.compiler import compile_grammar
from flowkv.grammar.sandbox import Sandbox
from flowkv.grammar.vocabulary import Vocabulary, small_tokenizer
from flowkv.model_files import load_tokenizer
from flowkv.types import Grammar, GrammarKind
from tests.grammar.test_compiler import BOMBS

ENDLESS = json.dumps({"allOf": [{"type": "string", "pattern": f"a.*{i}"} for i in range(300)]})


def grammar(kind: str, text: str) -> Grammar:
    return Grammar(kind=GrammarKind(kind), text=text)


def small() -> str:
    """Of the bundled model."""
    tokenizer = load_tokenizer(MODEL_FOLDER)
    added = tokenizer.get_added_tokens_decoder().values()
    return small_tokenizer(tokenizer.decoder, [token.content for token in added])


def test_any_character_may_be_the_first_of_an_answer() -> None:
    """None of them is taken for the end of a small tokenizer."""
    sandbox = Sandbox(small_tokenizer(decoders.ByteLevel()))
    for code in range(0x20, 0x7F):
        sandbox.check(grammar("choice", json.dumps([chr(code)])))
    small = small_tokenizer(decoders.ByteLevel(), ["<a>"])
    assert Vocabulary.of_small(small).end_ids == {Tokenizer.from_str(small).token_to_id("<|end|>")}


def test_one_process_compiles_them_all_and_ends_with_its_sandbox() -> None:
    sandbox = Sandbox(small_tokenizer(decoders.ByteLevel()))
    for _ in range(2):
        sandbox.check(grammar("regex", "[0-9]+"))
        with pytest.raises(GrammarError, match="look-around"):
            sandbox.check(grammar("regex", "(?=a)"))
    assert sandbox._worker is not None
    pid = sandbox._worker.process.pid
    del sandbox
    gc.collect()
    assert not Path(f"/proc/{pid}").exists()


def test_a_grammar_that_never_ends_costs_a_process_and_no_more() -> None:
    sandbox = Sandbox(small_tokenizer(decoders.ByteLevel()))
    with pytest.raises(GrammarError, match=r"more than 0.5 s"):
        sandbox.check(grammar("json_schema", ENDLESS))
    sandbox.check(grammar("regex", "[0-9]+"))


def test_a_process_that_was_killed_meanwhile_is_replaced() -> None:
    sandbox = Sandbox(small_tokenizer(decoders.ByteLevel()))
    sandbox.check(grammar("regex", "[0-9]+"))
    assert sandbox._worker is not None
    os.kill(sandbox._worker.process.pid, 9)
    sandbox._worker.process.wait()
    sandbox.check(grammar("regex", "[0-9]+"))


def test_a_process_that_dies_as_it_starts_refuses_one_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = Sandbox(small_tokenizer(decoders.ByteLevel()))
    with monkeypatch.context() as broken:
        broken.setattr("sys.executable", "/bin/false")
        with pytest.raises(GrammarError, match="ended with code 1"):
            sandbox.check(grammar("regex", "[0-9]+"))
    sandbox.check(grammar("regex", "[0-9]+"))


def test_a_process_that_has_grown_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = Sandbox(small_tokenizer(decoders.ByteLevel()))
    sandbox.check(grammar("regex", "[0-9]+"))
    assert sandbox._worker is not None
    pid = sandbox._worker.process.pid
    monkeypatch.setattr("flowkv.grammar.sandbox.MAX_GROWN_BYTES", -1)
    with pytest.raises(GrammarError, match="look-around"):
        sandbox.check(grammar("regex", "(?=a)"))
    gc.collect()
    assert not Path(f"/proc/{pid}").exists()
    sandbox.check(grammar("regex", "[0-9]+"))


def test_what_a_process_has_from_its_start_is_no_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowkv.grammar.sandbox.MAX_GROWN_BYTES", 8 * 2**20)  # less than Python takes
    sandbox = Sandbox(small_tokenizer(decoders.ByteLevel()))
    sandbox.check(grammar("regex", "[0-9]+"))
    first = sandbox._worker
    sandbox.check(grammar("regex", "[0-9]*"))
    assert sandbox._worker is first is not None


def test_no_code_of_the_current_directory_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llguidance.py").write_text("import pathlib; pathlib.Path('was_run').touch()")
    monkeypatch.chdir(tmp_path)
    Sandbox(small_tokenizer(decoders.ByteLevel())).check(grammar("regex", "[0-9]+"))
    assert not (tmp_path / "was_run").exists()


def test_special_tokens_can_be_named() -> None:
    sandbox = Sandbox(small())
    sandbox.check(grammar("grammar", 'start: <|user|> "a"'))
    with pytest.raises(GrammarError, match="nobody"):
        sandbox.check(grammar("grammar", 'start: <|nobody|> "a"'))


@pytest.mark.parametrize("name", BOMBS)
def test_frontend_and_instance_agree(name: str) -> None:
    verdicts = []
    for vocabulary in (Vocabulary(LLTokenizer(small())), Vocabulary.of_folder(MODEL_FOLDER, 1536)):
        try:
            compile_grammar(grammar(*BOMBS[name]), vocabulary)
            verdicts.append("good")
        except GrammarError as error:
            verdicts.append(str(error))
    assert verdicts[0] == verdicts[1]


def test_a_model_whose_tokens_have_no_bytes_takes_no_grammar() -> None:
    with pytest.raises(GrammarError, match="no grammar can bind"):
        small_tokenizer(decoders.WordPiece())
