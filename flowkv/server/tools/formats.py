"""The formats that are known. Names are vLLM's; a format is found by signs of it in the chat template."""

from flowkv.server.tools import deepseek, kimi
from flowkv.server.tools.json_formats import bare_json, between_tags, marked_list, mistral
from flowkv.server.tools.tool_format import ToolFormat
from flowkv.server.tools.xml_formats import glm, qwen3_coder

_TAGS = ("<tool_call>", "</tool_call>")
_KIMI = ("<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>",
         "<|tool_calls_section_end|>")  # fmt: skip
_DEEPSEEK = (
    deepseek.CALLS_BEGIN, deepseek.CALL_BEGIN, deepseek.SEPARATOR, deepseek.CALL_END, deepseek.CALLS_END
)  # fmt: skip

FORMATS: dict[str, ToolFormat] = {  # looked for in this order
    "qwen3_coder": ToolFormat(qwen3_coder, ("<function=", "<parameter="), _TAGS, opening=("<tool_call>", "<function=")),
    "glm45": ToolFormat(glm, ("<tool_call>", "<arg_key>"), _TAGS),
    "deepseek_v3": ToolFormat(deepseek.parse, (deepseek.CALL_BEGIN,), _DEEPSEEK),
    "kimi_k2": ToolFormat(kimi.parse, ("<|tool_call_begin|>",), _KIMI, opening=(_KIMI[0], _KIMI[1])),
    "mistral": ToolFormat(mistral, ("[TOOL_CALLS]",), ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"), id_length=9),
    "phi4_mini_json": ToolFormat(marked_list("functools"), ("<|tool|>",)),
    "nemotron": ToolFormat(marked_list("<TOOLCALL>", "</TOOLCALL>"), ("<TOOLCALL>",), ("<TOOLCALL>", "</TOOLCALL>")),
    "jamba": ToolFormat(
        marked_list("<tool_calls>", "</tool_calls>"), ("<tool_calls>",), ("<tool_calls>", "</tool_calls>")
    ),
    "granite": ToolFormat(marked_list("<|tool_call|>"), ("<|tool_call|>",), ("<|tool_call|>",)),
    "hermes": ToolFormat(between_tags, ("<tool_call>",), _TAGS),
    "llama3_json": ToolFormat(bare_json, ('{"name": function name, "parameters"',), ("<|python_tag|>",)),
}


def find_format(template: str) -> str | None:
    """The name of the format that a chat template teaches its model."""
    return next((name for name, known in FORMATS.items() if all(sign in template for sign in known.signs)), None)
