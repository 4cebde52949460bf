"""Tokens that a folder names outside of tokenizer.json, against transformers' reading of the same files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from farthing.base.errors import UserError
from farthing.data.tokenizer import Tokenizer as Ours
from farthing.weights.tokenizer import read_tokenizer

Folder = Callable[..., Path]
TEXT = "x</s> <a>  <b> <c>\n <v>y<b><end>"


def tokens(special: bool = True) -> Tokenizer:
    """Bytes 0 to 255, then </s> (256) and <v> (257) as ordinary tokens, then <a> (258) as an added one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, "</s>", "<v>"])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_tokens([AddedToken("<a>", special=special, normalized=False)])
    return made


@pytest.fixture
def make(tmp_path: Path) -> Folder:
    def folder(
        settings: dict[str, Any] | None = None,
        made: Tokenizer | None = None,
        vocab_size: int = 300,
        **files: Any,
    ) -> Path:
        (made or tokens()).save(str(tmp_path / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | (settings or {})
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": vocab_size}))
        for name, value in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
        return tmp_path

    return folder


def token(content: str, **flags: Any) -> dict[str, Any]:
    return {
        "content": content, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False,
        "special": True, **flags,
    }  # fmt: skip


def typed(content: str, **flags: Any) -> dict[str, Any]:
    return {"__type": "AddedToken", **token(content, **flags)}


DECODER = {"258": token("<a>"), "259": token("<b>"), "260": token("<c>", special=False)}
PLAIN = {"258": token("<a>", special=False)}
CASES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "decoder": {"settings": {"added_tokens_decoder": DECODER}},
    "decoder in another order": {"settings": {"added_tokens_decoder": dict(reversed(DECODER.items()))}},
    "decoder that strips": {"settings": {"added_tokens_decoder": DECODER | {"259": token("<b>", lstrip=True)}}},
    "decoder that strips behind": {"settings": {"added_tokens_decoder": DECODER | {"259": token("<b>", rstrip=True)}}},
    "decoder of whole words": {"settings": {"added_tokens_decoder": DECODER | {"259": token("<b>", single_word=True)}}},
    "decoder with other flags": {
        "settings": {"added_tokens_decoder": {"258": token("<a>", special=False, lstrip=True)}}
    },
    "decoder that makes special": {"special": False, "settings": {"added_tokens_decoder": {"258": token("<a>")}}},
    "decoder of the vocabulary": {"settings": {"added_tokens_decoder": {"256": token("</s>"), "257": token("<v>")}}},
    "decoder goes before the map": {
        "settings": {"added_tokens_decoder": DECODER, "eos_token": "<a>"},
        "special_tokens_map": {"eos_token": "</s>", "additional_special_tokens": ["<v>"]},
    },
    "extra": {"settings": {"extra_special_tokens": ["<b>", typed("<c>", lstrip=True)]}},
    "extra by name": {"settings": {"extra_special_tokens": {"image_token": "<b>"}}},
    "additional": {"settings": {"additional_special_tokens": ["<b>", "<v>"]}},
    "extra goes before additional": {
        "settings": {"additional_special_tokens": ["<b>"], "extra_special_tokens": ["<c>"]}
    },
    "extra twice": {
        "settings": {"extra_special_tokens": ["<b>"]}, "special_tokens_map": {"extra_special_tokens": ["<c>"]}
    },
    "added": {"added_tokens": {"<b>": 259, "<c>": 260}},
    "added, with names": {"added_tokens": {"<b>": 259, "<c>": 260}, "settings": {"eos_token": "<b>"}},
    "added, extra": {"added_tokens": {"<b>": 259}, "settings": {"additional_special_tokens": ["<b>"]}},
    "added, named in the map": {"added_tokens": {"<b>": 259}, "special_tokens_map": {"eos_token": "<b>"}},
    "end in the vocabulary": {"settings": {"eos_token": "</s>"}},
    "end in the vocabulary, decoder": {"settings": {"eos_token": "</s>", "added_tokens_decoder": DECODER}},
    "end that was not special": {"special": False, "settings": {"eos_token": "<a>", "bos_token": "<v>"}},
    "end not special in the decoder": {
        "special": False, "settings": {"eos_token": "<a>", "added_tokens_decoder": PLAIN}
    },
    "end that is new": {"settings": {"eos_token": "<end>", "pad_token": "<b>"}},
    "end as an object": {"settings": {"eos_token": typed("</s>", rstrip=True)}},
    "a map": {
        "settings": {"eos_token": "<a>"},
        "special_tokens_map": {"eos_token": token("</s>"), "additional_special_tokens": ["<b>"]},
    },
    "marks that are asked for": {"settings": {"add_bos_token": True, "bos_token": "<a>", "eos_token": "<b>"}},
    "another class": {"settings": {"tokenizer_class": "TokenizersBackend", "added_tokens_decoder": DECODER}},
    "no class": {"settings": {"tokenizer_class": None, "extra_special_tokens": ["<b>"], "add_prefix_space": True}},
    "new marks in another order": {"settings": {"pad_token": "<b>", "unk_token": "<c>", "eos_token": "<end>"}},
    "new marks here and in the map": {
        "settings": {"unk_token": "<c>"}, "special_tokens_map": {"eos_token": "<b>", "bos_token": "<end>"}
    },
    "additional goes before the map's": {
        "settings": {"additional_special_tokens": ["<b>"]}, "special_tokens_map": {"additional_special_tokens": ["<c>"]}
    },
    "additional beside extra names": {
        "settings": {"additional_special_tokens": ["<b>"], "extra_special_tokens": {"image_token": "<c>"}}
    },
    "special tokens that are split": {"settings": {"additional_special_tokens": ["<b>"], "split_special_tokens": True}},
    "a name of its own": {"settings": {"image_token": "<b>", "add_bos_token": True, "bos_token": None}},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_named_tokens_are_transformers(name: str, make: Folder) -> None:
    from transformers import AutoTokenizer

    case = dict(CASES[name])
    folder = make(made=tokens(case.pop("special", True)), **case)
    theirs, ours = AutoTokenizer.from_pretrained(folder), Ours(folder)
    ids = ours.raw_encode(TEXT)
    assert ids == theirs.encode(TEXT, add_special_tokens=False)
    assert ours.encode(TEXT) == theirs.encode(TEXT)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert len(ours) == len(theirs)
    added = {number: str(added) for number, added in theirs.added_tokens_decoder.items() if added.special}
    assert ours.special_ids == set(added)
    assert read_tokenizer(folder).marks == theirs.special_tokens_map
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
        theirs.pad_token_id,
    )


def test_the_cases_differ(make: Folder) -> None:
    """The comparison could not tell them apart otherwise."""
    read = set()
    for case in CASES.values():
        case = dict(case)
        folder = make(made=tokens(case.pop("special", True)), **case)
        made = Ours(folder)
        read.add((tuple(made.raw_encode(TEXT)), made.special_ids, made.eos_id))
        for name in ("special_tokens_map.json", "added_tokens.json"):
            (folder / name).unlink(missing_ok=True)
    assert len(read) > 15


def test_an_end_that_the_config_names_is_not_shown(make: Folder) -> None:
    """Even where transformers leaves it: named, added, and in no list that says it is special."""
    settings = {"eos_token": "<a>", "added_tokens_decoder": {"259": token("<b>")}}
    made = Ours(make(settings, made=tokens(special=False)))
    assert made.decode(made.raw_encode("x<a>y")) == "xy"
    assert made.special_ids == {258, 259}


def test_tokens_are_found_before_the_text_is_normalised(make: Folder) -> None:
    lower = tokens()
    lower.normalizer = normalizers.Lowercase()
    made = Ours(make({"added_tokens_decoder": {"259": token("<B>")}}, made=lower))
    assert made.raw_encode("<B>") == [259]
    assert 259 not in made.raw_encode("<b>")


def test_a_token_the_model_has_no_room_for_stays_text(make: Folder) -> None:
    made = Ours(make({"pad_token": "[PAD]", "eos_token": "<v>"}, vocab_size=259))
    assert made.pad_id is None
    assert made.eos_id == 257
    assert max(made.raw_encode("[PAD]")) < 256


# ---------------------------------------------------------------- refusals


def said(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        Ours(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "case",
    [
        {"settings": {"added_tokens_decoder": {"262": token("<b>")}}},
        {"settings": {"added_tokens_decoder": {"300": token("<a>")}}},
        {"settings": {"added_tokens_decoder": {"258": token("<b>")}}},
        {"settings": {"added_tokens_decoder": {"3": token("</s>")}}},
        {"added_tokens": {"<b>": 270}},
        {"added_tokens": {"<a>": 3}},
    ],
)
def test_two_ids_for_one_token(case: dict[str, Any], make: Folder) -> None:
    assert "the id" in said(make(**case))


@pytest.mark.parametrize("number", [0, 259, 400])
def test_an_added_token_whose_id_is_another(number: int, make: Folder) -> None:
    folder = make()
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"][0]["id"] = number
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert f"the id {number}, but it is the tokenizer's 258" in said(folder)
    late = {key: data[key] for key in sorted(data, reverse=True)}  # behind the vocabulary
    late["model"]["vocab"]["added_tokens"] = late["model"]["vocab"].pop("<v>")
    (folder / "tokenizer.json").write_text(json.dumps(late))
    assert f"the id {number}" in said(folder)


def test_gaps_in_the_vocabulary(make: Folder) -> None:
    """The next number after 258 tokens is one that is taken."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(alphabet)} | {"<v>": 257}
    made = Tokenizer(models.BPE(vocabulary, []))
    assert "no id of its own" in said(make({"eos_token": "<b>"}, made=made))


def test_ids_beyond_the_vocabulary(make: Folder) -> None:
    assert "ids up to 258 ('<a>'), but the model has 258" in said(make(vocab_size=258))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)} | {"far": 9_000_000}, []))
    assert "9000000" in said(make(made=made))


def test_the_vocabulary_reaches_over_gaps(make: Folder) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Ours(
        make(made=Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)} | {"far": 299}, [])))
    )
    assert (len(made), made.vocab_size) == (257, 300)


def test_a_mark_around_the_text_that_is_no_token(make: Folder) -> None:
    made = tokens()
    made.post_processor = processors.TemplateProcessing(single="<a> $A", special_tokens=[("<a>", 299)])
    assert "299" in said(make(made=made))


@pytest.mark.parametrize(
    "single", [[{"SpecialToken": {"id": "<no>", "type_id": 0}}], [{"Sequence": {"id": "B", "type_id": 0}}]]
)
def test_a_panic_of_the_library_is_one_line(
    single: Any, make: Folder, capfd: pytest.CaptureFixture[str]
) -> None:
    made = tokens()
    made.post_processor = processors.TemplateProcessing(single="<a> $A", special_tokens=[("<a>", 258)])
    folder = make(made=made)
    data = json.loads((folder / "tokenizer.json").read_text())
    data["post_processor"]["single"] = single
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert "damaged" in said(folder)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "settings",
    [
        {"added_tokens_decoder": ["<b>"]},
        {"added_tokens_decoder": {"x": token("<b>")}},
        {"added_tokens_decoder": {"-1": token("<b>")}},
        {"added_tokens_decoder": {"²": token("<b>")}},
        {"added_tokens_decoder": {"259": 3}},
        {"added_tokens_decoder": {"259": {"special": True}}},
        {"added_tokens_decoder": {"259": token("<b>", special="yes")}},
        {"added_tokens_decoder": {"9" * 40: token("<b>")}},
        {"added_tokens_decoder": None},
        {"eos_token": 3},
        {"pad_token": ["x"]},
        {"bos_token": {"content": None}},
        {"extra_special_tokens": [3]},
        {"extra_special_tokens": 3},
        {"additional_special_tokens": "<b>"},
        {"additional_special_tokens": [None]},
        {"eos_token": "\ud800"},
    ],
)
def test_settings_of_wrong_types(settings: dict[str, Any], make: Folder) -> None:
    said(make(settings))


@pytest.mark.parametrize(
    "value", [{"<b>": "259"}, {"<b>": True}, {"": 259}, {"\ud800": 259}, {"<b>": -1}, [], 3]
)
def test_added_tokens_of_wrong_types(value: Any, make: Folder) -> None:
    said(make(added_tokens=value))
