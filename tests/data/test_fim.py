"""Documents rearranged to fill in their middle."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Tokens
from tokenizers import models, pre_tokenizers

from farthing.base.errors import UserError
from farthing.data.packing import EXTRA, FIM, Marks, fill_in_the_middle, fim_marks
from farthing.data.tokenizer import Tokenizer

LAST = 2**64 - 1
MARKS = Marks(begin=901, hole=902, end=903, bos=900)
EOS = 904


def arranged(size: int, first: int, second: int, front: list[int]) -> list[int]:
    document = np.array([*front, *range(size), EOS], dtype=np.uint16)
    return fill_in_the_middle(document, MARKS, (first, second)).tolist()


@given(st.integers(0, 40), st.integers(0, LAST), st.integers(0, LAST), st.sampled_from([[], [900]]))
def test_the_parts_put_back_are_the_document(size: int, first: int, second: int, front: list[int]) -> None:
    shown = arranged(size, first, second, front)
    assert len(shown) == len(front) + size + 1 + EXTRA
    assert shown[: len(front) + 1] == [*front, 901]
    assert shown[-1] == EOS
    hole, end = shown.index(902), shown.index(903)
    prefix, suffix, middle = shown[len(front) + 1 : hole], shown[hole + 1 : end], shown[end + 1 : -1]
    assert prefix + middle + suffix == list(range(size))


def test_cuts_fall_everywhere_the_ends_included() -> None:
    assert arranged(3, 0, LAST, []) == [901, 902, 903, 0, 1, 2, EOS]
    assert arranged(3, LAST, 0, []) == [901, 902, 903, 0, 1, 2, EOS]
    assert arranged(3, LAST, LAST, [900]) == [900, 901, 0, 1, 2, 902, 903, EOS]
    assert arranged(3, 2**62, 3 * 2**62, []) == [901, 0, 902, 903, 1, 2, EOS]
    cuts = {tuple(arranged(2, a << 61, b << 61, [])) for a in range(8) for b in range(8)}
    assert len(cuts) == 6  # two cuts among three places


def folder_with(folder: Path, marks: tuple[str, ...]) -> Tokenizer:
    tokens = Tokens(
        models.BPE({byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.add_special_tokens(["<bos>", *marks])
    tokens.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<bos>"}')
    return Tokenizer(folder)


@pytest.mark.parametrize("names", [FIM, ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")])
def test_marks_are_found_under_the_names_that_models_use(names: tuple[str, ...], tmp_path: Path) -> None:
    assert fim_marks(folder_with(tmp_path, names)) == Marks(257, 258, 259, 256)


@pytest.mark.parametrize("names", [(), FIM[:2]])
def test_a_tokenizer_without_them_is_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"fim_rate: the tokenizer of .* has no fill-in-the-middle tokens"):
        fim_marks(folder_with(tmp_path, names))
