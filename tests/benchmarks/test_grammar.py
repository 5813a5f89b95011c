"""The benchmark of grammars measures what it says."""

from benchmarks.grammar import GRAMMARS, measure, model_steps
from flowkv.bundled import MODEL_FOLDER
from flowkv.grammar.vocabulary import Vocabulary


def test_every_grammar_is_measured() -> None:
    found = measure("bundled", Vocabulary.of_folder(MODEL_FOLDER, 0), num_steps=3)
    assert [one["grammar"] for one in found] == list(GRAMMARS)
    assert all(one[kind]["p50"] > 0 for one in found for kind in ("masks_s", "draw_s", "plain_s"))


def test_steps_of_the_model_with_and_without() -> None:
    for name in ("none", "schema"):
        assert model_steps(3, GRAMMARS.get(name))["sampling_s"]["p50"] > 0
