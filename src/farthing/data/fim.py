"""Fill-in-the-middle: some documents are shown as prefix, suffix, then middle (Bavarian et al., arXiv:2207.14255).

The form is DeepSeek's (DeepSeek-V3, arXiv:2412.19437, section 4.1), prefix-suffix-middle at document level:
`begin PREFIX hole SUFFIX end MIDDLE eos`. The two cuts fall between tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from farthing.data.tokenizer import Tokenizer
from farthing.errors import UserError

FIM = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
_KNOWN = (
    FIM,
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)
EXTRA = len(FIM)  # tokens that a document gains


@dataclass(frozen=True)
class Marks:
    """Ids of the three marks, and of the beginning mark that stays in front (None where texts have none)."""

    begin: int
    hole: int
    end: int
    bos: int | None = None


def fim_marks(tokenizer: Tokenizer) -> Marks:
    """The tokenizer's marks for fill-in-the-middle. Raises UserError when it has none."""
    for names in _KNOWN:
        ids = [tokenizer.raw_encode(name) for name in names]
        if all(len(found) == 1 and found[0] in tokenizer.special_ids for found in ids):
            begin, hole, end = (found[0] for found in ids)
            return Marks(begin, hole, end, tokenizer.bos_id)
    raise UserError(
        f"fim_rate: the tokenizer of {tokenizer.folder} has no fill-in-the-middle tokens; set fim_rate to 0, or "
        "let the stage train a tokenizer"
    )


def fill_in_the_middle(ids_N: np.ndarray, marks: Marks, draw: tuple[int, int]) -> np.ndarray:
    """One document, [N] with its closing eos, rearranged: [N + 3].

    Args:
        draw: two numbers drawn evenly from 0 to 2**64 - 1; they place the two cuts, which may coincide.
    """
    front = 1 if marks.bos is not None and ids_N[0] == marks.bos else 0
    body, eos = ids_N[front:-1], ids_N[-1:]
    first, second = sorted(number * (len(body) + 1) >> 64 for number in draw)
    parts = (
        ids_N[:front],
        [marks.begin], body[:first],
        [marks.hole], body[second:],
        [marks.end], body[first:second],
        eos,
    )  # fmt: skip
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
