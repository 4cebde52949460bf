"""Every place where a folder keeps chat templates, against transformers' reading of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from farthing.base.errors import UserError
from farthing.data.tokenizer import Tokenizer
from farthing.weights.chat_template import read_templates
from farthing.weights.folder import copy_tokenizer

CHAT = [{"role": "user", "content": "hi"}]
TOOLS = [{"name": "f"}]
LIST = [
    {"name": "default", "template": "plain"},
    {"name": "tool_use", "template": "with {{ tools | length }}"},
]
PLACES: dict[str, tuple[Any, dict[str, str]]] = {
    "none": (None, {}),
    "a text": ("plain {{ messages[0].content }}", {}),
    "a list": (LIST, {}),
    "an object": ({"default": "plain", "rag": "other"}, {}),
    "a file": (None, {"chat_template.jinja": "file {{ messages[0].content }}"}),
    "a file before a text": ("text", {"chat_template.jinja": "file"}),
    "a file before a list": (LIST, {"chat_template.jinja": "file"}),
    "more files": (
        None,
        {"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "tools é"},
    ),
    "more files before a list": (LIST, {"additional_chat_templates/default.jinja": "more"}),
    "a default in both": (None, {"chat_template.jinja": "a", "additional_chat_templates/default.jinja": "b"}),
    "an empty text": ("", {}),
}


def place(folder: Path, given: Any, files: dict[str, str], tokenizer: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer / name).read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings = {**settings, "chat_template": given} if given is not None else settings
    if given is None:
        del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 336}')
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_the_template_is_transformers(name: str, tools: Any, tmp_path: Path, tokenizer_folder: Path) -> None:
    from transformers import AutoTokenizer

    folder = place(tmp_path, *PLACES[name], tokenizer_folder)
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    assert ours.has_template == bool(theirs.chat_template is not None)
    if theirs.chat_template is None:
        return
    expected = theirs.apply_chat_template(CHAT, tools=tools, tokenize=False, add_generation_prompt=True)
    assert ours.render(CHAT, tools=tools) == expected


@pytest.mark.parametrize("name", PLACES)
def test_a_copy_has_the_same_templates(name: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    folder = place(tmp_path / "from", *PLACES[name], tokenizer_folder)
    copy_tokenizer(folder, tmp_path / "to")
    settings = [json.loads((at / "tokenizer_config.json").read_text()) for at in (folder, tmp_path / "to")]
    assert read_templates(tmp_path / "to", settings[1]) == read_templates(folder, settings[0])
    assert all(path.is_file() for path in (tmp_path / "to").iterdir()), "model folders are flat"


def test_a_processors_file_is_read_last(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "chat_template.json").write_text('{"chat_template": "of a processor"}')
    assert Tokenizer(place(tmp_path, None, {}, tokenizer_folder)).render(CHAT) == "of a processor"
    assert Tokenizer(place(tmp_path, "plain", {}, tokenizer_folder)).render(CHAT) == "plain"


def test_no_template_for_plain_conversations(tmp_path: Path, tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer(place(tmp_path, {"rag": "a", "tool_use": "b"}, {}, tokenizer_folder))
    with pytest.raises(UserError, match="named rag, tool_use, but none named default"):
        tokenizer.render(CHAT)
    assert tokenizer.render(CHAT, tools=TOOLS) == "b"


@pytest.mark.parametrize(
    "given", [3, True, ["text"], [{"name": "default"}], [{"template": "x"}], {"default": 3}, [[]]]
)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.json"])
def test_templates_of_wrong_types(given: Any, file: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = place(tmp_path, given if file.startswith("tok") else None, {}, tokenizer_folder)
    if file == "chat_template.json":
        (folder / file).write_text(json.dumps({"chat_template": given}))
    with pytest.raises(UserError, match=f"{file}: chat_template must be"):
        Tokenizer(folder)


def test_a_file_that_is_not_text(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = place(tmp_path, None, {}, tokenizer_folder)
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        Tokenizer(folder)
