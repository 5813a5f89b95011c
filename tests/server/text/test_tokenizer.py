import json
from pathlib import Path

import pytest

from flowkv.errors import ModelError, RequestError
from flowkv.server.text.byte_tokenizer import ByteTokenizer
from flowkv.server.text.chat_template import Conversation
from flowkv.server.text.tokenizer import ModelTokenizer
from tests.server.bpe import make_model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> ModelTokenizer:
    return ModelTokenizer(folder)


def test_plain_prompts_get_special_tokens_and_are_not_cut(tokenizer: ModelTokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("the quick brown fox")) == "<bos>the quick brown fox"


def test_special_tokens_only_where_they_are_wanted(tokenizer: ModelTokenizer) -> None:
    ids = tokenizer.encode("the dog", add_special_tokens=False)
    assert tokenizer.decode(ids) == "the dog"
    assert "".join(tokenizer.token_piece(token_id) for token_id in ids) == "theĠdog"
    assert tokenizer.token_piece(10**6) == ""


def test_chats_are_rendered_once_with_the_template_s_own_special_tokens(tokenizer: ModelTokenizer) -> None:
    messages = [{"role": "system", "content": " be brief "}, {"role": "user", "content": "hi"}]
    assert (
        tokenizer.decode(tokenizer.encode_chat(Conversation(messages)))
        == "<bos><system>be brief\n<user>hi\n<assistant>"
    )


def test_the_template_s_own_complaint_reaches_the_client(tokenizer: ModelTokenizer) -> None:
    with pytest.raises(RequestError, match="system comes first") as caught:
        tokenizer.encode_chat(Conversation([{"role": "user", "content": "hi"}, {"role": "system", "content": "x"}]))
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_eos_ids_come_from_every_file(tokenizer: ModelTokenizer) -> None:
    assert tokenizer.eos_token_ids == {7, 8, 9, 10, 1}


def test_token_text_keeps_spaces(tokenizer: ModelTokenizer) -> None:
    texts = [tokenizer.token_text(token_id) for token_id in tokenizer.encode("the lazy dog")]
    assert "".join(texts) == "<bos>the lazy dog"


def test_template_file_goes_before_the_configuration(folder: Path, tmp_path: Path) -> None:
    make_model_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = ModelTokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode_chat(Conversation([{"role": "user", "content": "hi"}]))) == "hi!"


@pytest.mark.parametrize("template", [None, [{"name": "rag", "template": "x"}]])
def test_no_chat_template_is_the_client_s_error(tmp_path: Path, template: object) -> None:
    make_model_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(RequestError, match="/v1/completions"):
        ModelTokenizer(tmp_path).encode_chat(Conversation([{"role": "user", "content": "hi"}]))


def test_named_templates_use_the_default(tmp_path: Path) -> None:
    make_model_folder(tmp_path)
    named = [{"name": "rag", "template": "x"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    tokenizer = ModelTokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode_chat(Conversation([{"role": "user", "content": "hi"}]))) == "d"


def test_conversations_with_tools_have_a_template_of_their_own(tmp_path: Path) -> None:
    make_model_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("plain")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools[0].type }}")
    tokenizer = ModelTokenizer(tmp_path)
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.tool_template == "{{ tools[0].type }}"
    assert tokenizer.decode(tokenizer.encode_chat(Conversation(messages))) == "plain"
    assert tokenizer.decode(tokenizer.encode_chat(Conversation(messages, [{"type": "function"}]))) == "function"


def test_a_template_without_tools_shows_none(tokenizer: ModelTokenizer) -> None:
    assert tokenizer.tool_template is None


def test_special_tokens_can_be_kept(tokenizer: ModelTokenizer) -> None:
    ids = tokenizer.encode("the<end>dog<eos>")
    for kept, text in (((), "thedog"), (("<end>",), "the<end>dog"), (("<nothing>",), "thedog")):
        detokenizer = tokenizer.detokenizer(skip_special_tokens=True, kept=kept)
        assert "".join([detokenizer.push(token_id) for token_id in ids]) + detokenizer.flush() == text


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("tokenizer.json", None, "no tokenizer.json.*save_pretrained"),
        ("tokenizer.json", "{}", "cannot be read"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("config.json", "[]", "JSON object"),
        ("chat_template.jinja", "{% if %}", "chat template"),
    ],
)
def test_a_broken_folder_is_a_model_error(tmp_path: Path, name: str, text: str | None, complaint: str) -> None:
    make_model_folder(tmp_path)
    if text is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=complaint):
        ModelTokenizer(tmp_path)


def test_bytes_are_tokens() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("é") == [0xC3, 0xA9]
    assert (
        tokenizer.decode(tokenizer.encode_chat(Conversation([{"role": "user", "content": "hi"}])))
        == "user: hi\nassistant: "
    )
    assert tokenizer.eos_token_ids == frozenset()
