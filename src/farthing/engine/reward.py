"""Reward models at work: the score of a question with its answer, by our own decoder.

The conversation is written by the reward model's chat template and goes through the network whole. The score is read at
the last token that is not padding, as transformers reads it: a template that ends in the padding token itself is read
before that.

Shapes: N tokens of all texts, flat; T texts; C model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from farthing.cost.flops import forward_flops
from farthing.cost.meter import Span
from farthing.cost.shapes import scoring_config
from farthing.data.tokenizer import Tokenizer
from farthing.engine.model import check_vocabulary
from farthing.model import Segments
from farthing.weights import load_decoder
from farthing.weights.reward import reward_config

_TOKENS = 8192  # of a pass


class RewardModel:
    """A loaded reward model.

    Raises:
        UserError: for a folder that holds none, and as `load_decoder`.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> None:
        self.folder = folder
        config = reward_config(folder)
        self._counted = scoring_config(config)
        self._pad = config.get("pad_token_id")
        self.decoder = load_decoder(folder, dtype, device, scores=True)
        self.tokenizer = Tokenizer(folder)
        check_vocabulary(folder, self.tokenizer, self.decoder.config)

    def ids(self, question: str, answer: str, system: str | None = None) -> list[int]:
        """What the network reads, up to where the score is read. A special token that the answer spells is text."""
        answer = spelled_apart(answer, self.tokenizer)
        if self.tokenizer.has_template:
            turns = [{"role": "system", "content": system}] if system else []
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            ids = self.tokenizer.chat_ids(turns, add_generation_prompt=False)
        else:
            ids = self.tokenizer.encode(
                "\n".join([system, question, answer] if system else [question, answer])
            )
        while len(ids) > 1 and ids[-1] == self._pad:
            ids.pop()
        return ids

    @torch.no_grad()
    def scores(self, texts: Sequence[Sequence[int]], span: Span) -> list[float]:
        """The scores of texts, as `ids` gives them; work is booked on the span."""
        return [score for group in _passes(texts) for score in self._pass(group, span)]

    def _pass(self, texts: Sequence[Sequence[int]], span: Span) -> list[float]:
        device = self.decoder.embed.weight.device
        lengths = [len(ids) for ids in texts]
        segments = Segments([(length, ()) for length in lengths])
        ids_N = torch.tensor([token for ids in texts for token in ids], device=device)
        hidden_NC = self.decoder.hidden(ids_N, segments.positions().to(device), segments)
        ends_T = torch.tensor(lengths, device=device).cumsum(0) - 1
        scores: list[float] = self.decoder.logits(hidden_NC[ends_T])[:, 0].tolist()
        span.tokens_in += len(ids_N)
        span.flops += forward_flops(self._counted, len(ids_N), segments.pairs(self.decoder.config.windows), 0)
        return scores


def spelled_apart(text: str, tokenizer: Tokenizer) -> str:
    """A text in which no special token is spelled, so that an answer cannot end its own turn and begin another."""
    for token in map(tokenizer.token_text, sorted(tokenizer.special_ids)):
        if len(token) > 1 and token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def _passes(texts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Texts in groups of at most `_TOKENS` tokens, or one that alone has more."""
    group: list[Sequence[int]] = []
    used = 0
    for ids in texts:
        if group and used + len(ids) > _TOKENS:
            yield group
            group, used = [], 0
        group.append(ids)
        used += len(ids)
    if group:
        yield group
