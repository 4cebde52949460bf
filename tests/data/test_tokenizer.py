"""Tokenizer and chat template, held against transformers'; streaming; untrusted templates."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Tokens

from farthing.base.errors import UserError
from farthing.data.tokenizer import StreamDecoder, Tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 17 + 25? <b>é</b> 日本 👩‍👧"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "  And twice that?\n"},
]
TEMPLATE = (
    "{{ bos_token }}{%- for message in messages %}\n"
    "    {%- if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}\n"
    "    {% set ns = namespace(last=loop.last) %}\n"
    "{{ '<|start|>' + message['role'] + '\n' + message['content'] | trim }}"
    "{% generation %}<|end|>{% endgeneration %}\n"
    "{%- if not ns.last %}{% continue %}{% endif %}\n"
    "{%- endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{{ '<think>' if enable_thinking }}{% endif %}"
)


def byte_tokens() -> Tokens:
    """Bytes as tokens, so that every character beyond ASCII is spread over several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokens(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokens.add_special_tokens(
        [AddedToken(t, normalized=False) for t in ("<|bos|>", "<|start|>", "<|end|>", "<|eos|>")]
    )
    tokens.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 256)]
    )
    return tokens


def llama_tokens() -> Tokens:
    """Llama 2's kind: ▁ for spaces, bytes for what is not in the vocabulary, the first space trimmed."""
    vocabulary = {
        t: i for i, t in enumerate(["<unk>", "<s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "▁a"])
    }
    tokens = Tokens(
        models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokens.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokens.decoder = decoders.Sequence(steps)
    tokens.add_special_tokens(["<s>"])
    return tokens


def write(folder: Path, tokens: Tokens, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tokens.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write(
        tmp_path_factory.mktemp("made"),
        byte_tokens(),
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token={"__type": "AddedToken", "content": "<|bos|>", "special": True},
        eos_token="<|eos|>",
        chat_template=TEMPLATE,
    )
    (folder / "config.json").write_text('{"model_type": "llama", "eos_token_id": 7}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    return folder


# ---------------------------------------------------------------- with transformers as the measure


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("opened", [True, False])
def test_the_real_model_as_transformers(smollm2: Path, count: int, opened: bool) -> None:
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer(smollm2), AutoTokenizer.from_pretrained(smollm2)
    chat = CHAT[:count]
    assert ours.render(chat, opened) == theirs.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=opened
    )
    expected = theirs.apply_chat_template(chat, add_generation_prompt=opened, return_dict=False)
    assert ours.chat_ids(chat, add_generation_prompt=opened) == expected
    assert len(ours) == len(theirs)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (1, 2, 2)
    assert ours.stop_ids == {0, 2}


def test_the_real_texts_as_transformers(smollm2: Path, strings: list[str]) -> None:
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer(smollm2), AutoTokenizer.from_pretrained(smollm2)
    for text in strings:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.raw_encode(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("extra", [{}, {"enable_thinking": True}, {"tools": [{"name": "f<", "é": 1}]}])
def test_a_template_with_everything_as_transformers(made: Path, extra: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer(made), AutoTokenizer.from_pretrained(made)
    expected = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True, **extra)
    assert ours.render(CHAT, **extra) == expected
    ids = ours.chat_ids(CHAT, **extra)
    assert ids == theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False, **extra)
    assert ids.count(256) == 1, "one beginning, not two"
    assert ours.encode("x")[0] == 256
    assert 256 not in ours.raw_encode("x")


def test_a_keyword_that_no_template_can_have(made: Path) -> None:
    with pytest.raises(UserError, match="'self'"):
        Tokenizer(made).render(CHAT, **{"self": 1})


def test_an_older_folder_without_tokenizer_json(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"<|endoftext|>": 0, "h": 1, "i": 2, "hi": 3}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh i\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("hi") == [3]
    assert tokenizer.eos_id == 0


def test_it_loads_without_transformers(made: Path) -> None:
    code = "import sys; from farthing.data.tokenizer import Tokenizer; Tokenizer(sys.argv[1]).encode('x'); "
    code += "sys.exit(bool({'transformers', 'jinja2'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code, made], check=True)


# ---------------------------------------------------------------- on its own


def test_stop_ids_come_from_everywhere(made: Path) -> None:
    tokenizer = Tokenizer(made)
    end = tokenizer.raw_encode("<|end|>")[0]
    assert tokenizer.stop_ids == {7, 8, 9, end, tokenizer.eos_id}


def test_a_saved_length_limit_does_not_cut_prompts(tmp_path: Path) -> None:
    tokens = byte_tokens()
    tokens.enable_truncation(4)
    tokens.enable_padding(length=16)
    assert len(Tokenizer(write(tmp_path, tokens)).raw_encode("12345678")) == 8


def test_a_template_file_goes_before_the_settings(tmp_path: Path) -> None:
    folder = write(tmp_path, byte_tokens(), chat_template="old")
    (folder / "chat_template.jinja").write_text("new {{ messages[0].content }}")
    assert Tokenizer(folder).render([{"role": "user", "content": "é"}]) == "new é"


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert Tokenizer(write(tmp_path, byte_tokens(), chat_template=named)).render(CHAT) == "plain"


def test_no_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write(tmp_path, byte_tokens()))
    assert not tokenizer.has_template
    assert not tokenizer.stop_ids
    with pytest.raises(UserError, match="no chat template"):
        tokenizer.render(CHAT)


@pytest.mark.parametrize("content", ["{", "{}", "[]", ""])
def test_a_broken_tokenizer(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)


def test_an_old_tokenizer_that_cannot_be_converted(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        Tokenizer(tmp_path)


def test_a_template_with_a_mistake_in_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is broken"):
        Tokenizer(write(tmp_path, byte_tokens(), chat_template="{% for %}"))


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10**12 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in [1] %}" * 60 + "{% endfor %}" * 60,
    ],
)
def test_a_template_without_bounds_is_refused_at_once(tmp_path: Path, template: str) -> None:
    with pytest.raises(UserError, match="give the model another") as caught:
        Tokenizer(write(tmp_path, byte_tokens(), chat_template=template))
    assert "\n" not in str(caught.value)


def test_half_a_character(made: Path) -> None:
    tokenizer = Tokenizer(made)
    for read in (tokenizer.encode, tokenizer.raw_encode, tokenizer.offset_encode):
        with pytest.raises(UserError, match="surrogate"):
            read("x\ud800")
    with pytest.raises(UserError, match="surrogate"):
        tokenizer.chat_ids([{"role": "user", "content": "x\udfff"}])


@pytest.mark.parametrize(
    "messages",
    [["hi"], [{"content": "x"}], [{"role": 1}], [{"role": "tool", "content": "x"}]],
)
def test_messages_the_template_refuses(made: Path, messages: Any) -> None:
    with pytest.raises(UserError) as caught:
        Tokenizer(made).render(messages)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__code__.co_code }}",
        "{{ dict.__globals__['json'] }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ namespace(__class__=1) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler(1) }}",
        "{{ lipsum() }}",
        "{{ '{0.__class__}'.format(1) }}{{ ('%s' | attr('__class__')).x }}",
        "{% include 'tokenizer.json' %}",
        "{% import 'os' as os %}",
        "{{ range(10**9) | list }}",
        "{{ messages.append(1) }}",
        "{{ joiner() }}",
    ],
)
def test_templates_that_reach_for_the_machine(tmp_path: Path, attack: str) -> None:
    tokenizer = Tokenizer(write(tmp_path, byte_tokens(), chat_template=attack))
    with pytest.raises(UserError):
        tokenizer.render(CHAT)


# ---------------------------------------------------------------- streaming


@pytest.fixture(scope="module", params=["bytes", "llama"])
def spread(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    tokens = byte_tokens() if request.param == "bytes" else llama_tokens()
    return Tokenizer(write(tmp_path_factory.mktemp("spread"), tokens))


@settings(deadline=None)
@given(text=st.text(max_size=40))
def test_a_streamed_text_is_the_text(spread: Tokenizer, text: str) -> None:
    ids = spread.raw_encode(text)
    stream = StreamDecoder(spread)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == spread.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(deadline=None)
@given(data=st.data())
def test_any_bytes_stream_to_what_they_decode_to(made: Path, data: st.DataObject) -> None:
    tokenizer = Tokenizer(made)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
    assert not any(piece.endswith("\ufffd") for piece in pieces)


def test_a_character_comes_when_it_is_whole(made: Path) -> None:
    tokenizer = Tokenizer(made)
    stream = StreamDecoder(tokenizer)
    assert [stream.push(i) for i in tokenizer.raw_encode("a😀b")] == ["a", "", "", "", "😀", "b"]
    half = tokenizer.raw_encode("é")[0]
    assert stream.push(half) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_marks_are_not_shown(made: Path) -> None:
    tokenizer = Tokenizer(made)
    stream = StreamDecoder(tokenizer)
    assert "".join(stream.push(i) for i in tokenizer.encode("<|start|>a<|end|>b")) == "ab"
