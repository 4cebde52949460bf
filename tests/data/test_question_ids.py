"""Questions as a model sees them, with and without a chat template."""

import shutil
from pathlib import Path

import pytest

from farthing.data.tokenizer import Tokenizer, question_ids


@pytest.fixture
def with_template(tiny_model: Path) -> Tokenizer:
    return Tokenizer(tiny_model)


@pytest.fixture
def without_template(tiny_model: Path, tmp_path: Path) -> Tokenizer:
    shutil.copytree(tiny_model, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    return Tokenizer(tmp_path / "base")


def text(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer._tokens.decode(ids, skip_special_tokens=False)


def test_a_chat_model_gets_its_turns(with_template: Tokenizer) -> None:
    ids = question_ids(with_template, "3 + 4 =", "{question}", None)
    assert text(with_template, ids) == "<|user|>3 + 4 =<|assistant|>"
    assert ids == with_template.chat_ids([{"role": "user", "content": "3 + 4 ="}])
    ids = question_ids(with_template, "3 + 4 =", "Think. {question}\nGo.", "Be brief.")
    assert text(with_template, ids) == "<|system|>Be brief.<|user|>Think. 3 + 4 =\nGo.<|assistant|>"


def test_a_base_model_gets_plain_text(without_template: Tokenizer) -> None:
    ids = question_ids(without_template, "3 + 4 =", "Q: {question}\nA:", None)
    assert text(without_template, ids) == "Q: 3 + 4 =\nA:"
    ids = question_ids(without_template, "3 + 4 =", "Q: {question}", "Be brief.")
    assert text(without_template, ids) == "Be brief.\nQ: 3 + 4 ="


@pytest.mark.parametrize(
    "question", ["{x} and {question}", "{0}{}", "100% {{ m }}", "\\1 {question}{question}"]
)
def test_braces_in_a_question_are_left_alone(with_template: Tokenizer, question: str) -> None:
    ids = question_ids(with_template, question, "{question}", None)
    assert text(with_template, ids) == f"<|user|>{question}<|assistant|>"


def test_the_question_goes_wherever_the_prompt_names_it(with_template: Tokenizer) -> None:
    ids = question_ids(with_template, "1", "{question}, again {question}, {other}", None)
    assert text(with_template, ids) == "<|user|>1, again 1, {other}<|assistant|>"
