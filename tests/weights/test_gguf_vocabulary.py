"""A folder's tokenizer in a .gguf: the same ids in llama.cpp, and refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from farthing.base.errors import UserError
from farthing.base.files import read_json, write_json
from farthing.weights.gguf_tokenizer import RULES, build_tokenizer
from farthing.weights.gguf_vocabulary import tokenizer_metadata
from farthing.weights.gguf_write import export_gguf

Make = Callable[..., Path]
MARK = {"SpecialToken": {"id": "<｜begin▁of▁sentence｜>", "type_id": 0}}


@pytest.fixture
def folder(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """A copy of the tokenizer's files, with a config beside them."""
    for path in tokenizer_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write_json(tmp_path / "config.json", {"model_type": "llama", "bos_token_id": 0, "eos_token_id": 1})
    return tmp_path


def change(folder: Path, key: str, value: Any, file: str = "tokenizer.json") -> Path:
    """The file with the value of a dotted key changed."""
    data = read_json(folder / file)
    *path, last = key.split(".")
    at: Any = data
    for step in path:
        at = at[int(step) if isinstance(at, list) else step]
    at[last] = value
    write_json(folder / file, data)
    return folder


def keys_of(folder: Path, vocab_size: int) -> dict[str, Any]:
    return tokenizer_metadata(folder, vocab_size)[0]


def said(action: Any) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_llama_cpp_cuts_text_as_the_folder_does(
    make_folder: Make, tmp_path: Path, strings: list[str], llama_cpp: Callable[..., list[dict[str, Any]]]
) -> None:
    folder = make_folder("llama")
    export_gguf(folder, tmp_path / "m.gguf")
    [file] = llama_cpp([tmp_path / "m.gguf"], texts=strings)
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text, ids in zip(strings, file["texts"], strict=True):
        assert ours.encode(text, add_special_tokens=False).ids == ids, text
    assert file["metadata"]["tokenizer.ggml.pre"] == "smollm"
    assert file["metadata"]["tokenizer.ggml.add_bos_token"] == "true"


@pytest.mark.parametrize("name", RULES)
def test_every_way_of_cutting_is_recognised(name: str, folder: Path, strings: list[str]) -> None:
    """Its tokenizer.json, written by our importer, gets a name of the same rules back."""
    metadata = keys_of(folder, 336) | {"tokenizer.ggml.pre": name}
    tokenizer, _ = build_tokenizer(metadata)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", {k: v for k, v in settings.items() if k != "llama_cpp_pre"})
    matched = keys_of(folder, 336)["tokenizer.ggml.pre"]
    assert (RULES[matched].split, RULES[matched].single_digits, RULES[matched].whole_words) == (
        RULES[name].split, RULES[name].single_digits, RULES[name].whole_words
    )  # fmt: skip


def test_the_ids_mean_what_they_meant(folder: Path) -> None:
    metadata = keys_of(folder, 336)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    assert len(tokens) == len(types) == 336
    assert all(tokens[number] == token for token, number in vocabulary.items())
    assert [types[vocabulary[token]] for token in ("<｜User｜>", "<think>", "a")] == [3, 4, 1]
    assert (tokens[335], types[335]) == ("[PAD335]", 5), "the model is wider than its tokenizer"
    assert metadata["tokenizer.ggml.bos_token_id"] == 0
    assert metadata["tokenizer.ggml.eos_token_id"] == 1
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_eos_token"] is False
    assert "<｜Assistant｜>" in metadata["tokenizer.chat_template"]


def test_every_id_that_ends_an_answer_is_kept(folder: Path) -> None:
    change(folder, "eos_token_id", [7, 1, 4], "generation_config.json")
    metadata = keys_of(folder, 336)
    ids = [metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")]
    assert ids == [1, 7, 4], "the tokenizer's own comes first"


def test_the_name_a_folder_claims(folder: Path) -> None:
    assert change(folder, "llama_cpp_pre", "starcoder", "tokenizer_config.json")
    assert keys_of(folder, 336)["tokenizer.ggml.pre"] == "starcoder", "of the same rules as smollm"
    change(folder, "llama_cpp_pre", "qwen2", "tokenizer_config.json")
    assert keys_of(folder, 336)["tokenizer.ggml.pre"] == "smollm", "not what its rules are"
    change(folder, "pre_tokenizer.pretokenizers.0.individual_digits", False)
    assert "no name for" in said(lambda: keys_of(folder, 336))
    change(folder, "llama_cpp_pre", "exaone4", "tokenizer_config.json")
    assert keys_of(folder, 336)["tokenizer.ggml.pre"] == "exaone4", "unknown here: the author's word"


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("pre_tokenizer", None, "no name for"),
        ("pre_tokenizer", {"type": "Whitespace"}, "no name for"),
        ("pre_tokenizer.pretokenizers.1.add_prefix_space", True, "no name for"),
        ("pre_tokenizer.pretokenizers.1.use_regex", False, "no name for"),
        ("model.byte_fallback", True, "no token <0x00>"),
        ("model.dropout", 0.1, "dropout"),
        ("model.continuing_subword_prefix", "##", "not a tokenizer"),
        ("model.end_of_word_suffix", "</w>", "end_of_word_suffix"),
        ("normalizer", {"type": "Lowercase"}, "Lowercase"),
        ("normalizer", {"type": "NFKC"}, "NFKC"),
        ("normalizer", {"type": "NFD"}, "NFD"),
        ("normalizer", {"type": "NFC"}, "NFC"),
        ("normalizer", {"type": "StripAccents"}, "StripAccents"),
        ("normalizer", {"type": "Strip", "strip_left": True, "strip_right": False}, "Strip"),
        ("normalizer", {"type": "Prepend", "prepend": "x"}, "Prepend"),
        ("normalizer", {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}, "Replace"),
        (
            "normalizer",
            {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]},
            "NFC, Lowercase",
        ),
        ("decoder", None, "a decoder (none)"),
        ("decoder", {"type": "Fuse"}, "a decoder (Fuse)"),
        ("added_tokens.0.lstrip", True, "lstrip"),
        ("added_tokens.1.rstrip", True, "rstrip"),
        ("added_tokens.2.single_word", True, "single_word"),
        ("post_processor.single", [*[MARK] * 2, {"Sequence": {"id": "A", "type_id": 0}}], "around a text"),
        ("model.merges", ..., "not a tokenizer"),
        ("model", None, "not a tokenizer"),
    ],
)
def test_other_makes_are_refused(key: str, value: Any, named: str, folder: Path) -> None:
    if value is ...:
        data = read_json(folder / "tokenizer.json")
        del data["model"]["merges"]
        write_json(folder / "tokenizer.json", data)
    else:
        change(folder, key, value)
    assert named in said(lambda: keys_of(folder, 336))


def test_a_tokenizer_that_is_not_there_or_not_its_own(folder: Path) -> None:
    assert "belongs to it" in said(lambda: keys_of(folder, 300))
    (folder / "tokenizer.json").write_text(json.dumps([1]))
    assert "not a tokenizer" in said(lambda: keys_of(folder, 336))
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    assert "tokenizer.model" in said(lambda: keys_of(folder, 336))
    (folder / "tokenizer.model").unlink()
    assert "no tokenizer" in said(lambda: keys_of(folder, 336))


def test_characters_that_the_tokenizer_composes(folder: Path) -> None:
    """Qwen's tokenizers do, and llama.cpp's converter writes them all the same: said, not refused."""
    metadata = keys_of(folder, 336) | {"tokenizer.ggml.pre": "qwen2"}
    build_tokenizer(metadata)[0].save(str(folder / "tokenizer.json"))
    [note] = tokenizer_metadata(folder, 336)[1]
    assert "NFC" in note
    change(folder, "normalizer", {"type": "Sequence", "normalizers": []})
    assert tokenizer_metadata(folder, 336)[1] == []


def test_a_name_of_the_authors_does_not_cover_a_normalizer(folder: Path) -> None:
    change(folder, "llama_cpp_pre", "exaone4", "tokenizer_config.json")
    change(folder, "pre_tokenizer.pretokenizers.0.individual_digits", False)
    change(folder, "normalizer", {"type": "NFC"})
    assert "NFC" in said(lambda: keys_of(folder, 336))


def test_tokens_that_only_other_files_name(folder: Path) -> None:
    entry = {"content": "<tool>", "special": False, "normalized": False}
    change(folder, "added_tokens_decoder", {"330": entry, "331": entry | {"content": "<t>", "special": True}},
           "tokenizer_config.json")  # fmt: skip
    change(folder, "extra_special_tokens", ["a"], "tokenizer_config.json")
    metadata = keys_of(folder, 336)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert (tokens[330], types[330], tokens[331], types[331]) == ("<tool>", 4, "<t>", 3)
    assert types[tokens.index("a")] == 3


def test_other_models_are_refused(folder: Path) -> None:
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    for model in (
        models.WordLevel(vocabulary, unk_token="a"),
        models.Unigram([(token, 0.0) for token in vocabulary]),
    ):
        Tokenizer(model).save(str(folder / "tokenizer.json"))
        assert "byte-level" in said(lambda: keys_of(folder, 336))


def test_a_prefix_of_later_pieces(folder: Path) -> None:
    change(folder, "model.merges", [])
    change(folder, "model.continuing_subword_prefix", "##")
    assert "continuing_subword_prefix" in said(lambda: keys_of(folder, 336))


def test_digits_behind_other_cuts(folder: Path) -> None:
    """DeepSeek's first tokenizers take digits one by one, llama.cpp whole numbers: the same if no token holds two."""
    metadata = keys_of(folder, 336) | {"tokenizer.ggml.pre": "deepseek-llm"}
    build_tokenizer(metadata)[0].save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"bos_token": "<｜begin▁of▁sentence｜>"})
    cuts = read_json(folder / "tokenizer.json")["pre_tokenizer"]["pretokenizers"]
    assert cuts[5]["pattern"]["Regex"] == r"\p{N}+"
    cuts[5] = {"type": "Digits", "individual_digits": True}
    change(folder, "pre_tokenizer.pretokenizers", cuts)
    assert keys_of(folder, 336)["tokenizer.ggml.pre"] == "deepseek-llm"
    data = read_json(folder / "tokenizer.json")
    word = next(token for token in data["model"]["vocab"] if len(token) == 3)
    data["model"]["vocab"]["121"] = data["model"]["vocab"].pop(word)
    data["model"]["merges"] = []
    write_json(folder / "tokenizer.json", data)
    assert "no name for" in said(lambda: keys_of(folder, 336))


def test_two_tokens_of_one_id(folder: Path) -> None:
    change(folder, "model.vocab.zz", 40)
    change(folder, "added_tokens", [])
    change(folder, "post_processor", None)
    assert "have one id, 40" in said(lambda: keys_of(folder, 336))


def test_bytes_that_have_no_token(folder: Path) -> None:
    data = read_json(folder / "tokenizer.json")
    data["model"]["vocab"]["\x00"] = data["model"]["vocab"].pop("\u0100")
    data["model"]["unk_token"] = "<think>"
    write_json(folder / "tokenizer.json", data)
    assert "become '<think>'" in said(lambda: keys_of(folder, 336))


@pytest.mark.parametrize("value", [-1, 336, "1", True, [0, None], 1.5])
@pytest.mark.parametrize(("key", "file"), [("eos", "generation_config.json"), ("bos", "config.json")])
def test_marks_that_are_no_ids(value: Any, key: str, file: str, folder: Path) -> None:
    change(folder, f"{key}_token_id", value, file)
    assert f"{key}_token_id is" in said(lambda: keys_of(folder, 336))


def test_several_chat_templates(folder: Path) -> None:
    given = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    change(folder, "chat_template", given, "tokenizer_config.json")
    metadata = keys_of(folder, 336)
    assert metadata["tokenizer.chat_template"] == "plain"
    assert metadata["tokenizer.chat_template.tool_use"] == "tools"
    assert metadata["tokenizer.chat_templates"] == ["tool_use"]
    change(folder, "chat_template", 3, "tokenizer_config.json")
    assert "chat_template must be" in said(lambda: keys_of(folder, 336))
