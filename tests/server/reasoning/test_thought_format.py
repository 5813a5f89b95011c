import pytest

from flowkv.config import REASONING_PARSERS
from flowkv.server.reasoning.thought_format import FORMATS, Beginning, find_format

THINK = FORMATS["think"]


def test_every_format_can_be_configured() -> None:
    assert set(REASONING_PARSERS) == {"auto", "none", *FORMATS}


@pytest.mark.parametrize(
    ("prompt_end", "beginning"),
    [
        ("<|im_start|>assistant\n<think>\n", Beginning.INSIDE),
        ("<|Assistant|><think>", Beginning.INSIDE),
        ("<|im_start|>assistant\n", Beginning.BEFORE),
        ("user: what is <think>?\nassistant: ", Beginning.BEFORE),
        ("<SPECIAL_11>Assistant\n<think>\n\n", Beginning.INSIDE),
        ("<|assistant|>\n<think></think>", Beginning.AFTER),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", Beginning.AFTER),
        ("<|Assistant|></think>", Beginning.AFTER),
    ],
)
def test_a_prompt_says_where_its_answer_begins(prompt_end: str, beginning: Beginning) -> None:
    assert THINK.beginning(prompt_end, "") is beginning


def test_some_models_think_whatever_their_prompt_says() -> None:
    assert FORMATS["deepseek_r1"].beginning("<|Assistant|>", "") is Beginning.INSIDE
    assert FORMATS["deepseek_r1"].beginning("<|Assistant|></think>", "") is Beginning.AFTER


def test_a_thought_of_seed_oss_may_have_a_budget_of_nothing() -> None:
    seed_oss = FORMATS["seed_oss"]
    assert seed_oss.beginning("assistant\n<seed:think><seed:cot_budget_reflect>", "") is Beginning.INSIDE
    assert seed_oss.beginning("assistant\n", "") is Beginning.BEFORE


@pytest.mark.parametrize(
    ("continued", "beginning"),
    [
        ("<think>Hm, ", Beginning.INSIDE),
        ("<think>a</think>b<think>c", Beginning.INSIDE),
        ("<think>Hm.</think> Tw", Beginning.AFTER),
        ("The answer is", Beginning.AFTER),
        (" ", Beginning.BEFORE),
    ],
)
def test_an_answer_goes_on_where_it_was(continued: str, beginning: Beginning) -> None:
    assert THINK.beginning(f"assistant: {continued}", continued) is beginning


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ message.content.split('</think>')[-1] }}", "think"),
        ("{{ '<|start|>Here is my thought process: ' }}", "granite"),
        ("\u25c1think\u25b7\u25c1/think\u25b7", "kimi"),
        ("[INST][THINK][/THINK]", "mistral"),
        ("<seed:think></seed:think>", "seed_oss"),
        ("{{ messages }}<tool_call>", None),
    ],
)
def test_a_template_shows_its_format(template: str, name: str | None) -> None:
    assert find_format(template) == name
