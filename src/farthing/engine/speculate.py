"""Speculative decoding with the model's own prediction modules (Leviathan et al., arXiv:2211.17192; DeepSeek-V3,
arXiv:2412.19437 section 2.2).

Module k guesses the token k + 2 after one that the network has read. The network then reads its next token and the
guesses in one pass, and a guess stands if the network chooses the same token by the same logits and uniform number:
the output is that of plain decoding, in fewer passes.

A module's entry for position i lies in the cache slot of token i, though it has read the token k + 1 further on. So the
last entries of a page that several sequences share are those of whoever wrote last. That may cost a guess; it never
changes a token.

Shapes: B sequences, N tokens of all of them, C model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from farthing.engine.cache import Decode, PagedCache, Prefill
from farthing.engine.sampling import choose
from farthing.engine.sequence import Fresh, Running, Work
from farthing.model import Decoder


class Guesser:
    """Guesses `count` tokens a step, each with a module of its own."""

    def __init__(self, decoder: Decoder, cache: PagedCache, count: int) -> None:
        self.decoder, self.cache, self.count = decoder, cache, count
        # A step adds at most count + 1 tokens; before them the last count - 1 entries of the modules are still guesses.
        self.window = 2 * count

    def read_prompts(
        self,
        attend: Prefill,
        fresh: Sequence[Fresh],
        hidden_NC: Tensor,
        work: Work,
    ) -> None:
        """Fill the modules' layers of the cache for new prompts.

        What a module reads after a prompt's end is not known yet; its last entries are written again with the guesses.
        """
        ends = torch.tensor([end - start for start, end in attend.spans]).cumsum(0).tolist()
        for prompt, end in zip(fresh, ends, strict=True):
            recent = hidden_NC[end - min(self.window, len(prompt.ids) - prompt.cached) : end].clone()
            for sequence in prompt.samples:
                sequence.recent = recent
        for depth in range(self.count):
            after = [
                prompt.ids[min(at + depth + 1, len(prompt.ids) - 1)]
                for prompt in fresh
                for at in range(prompt.cached, len(prompt.ids))
            ]
            read = torch.tensor(after, device=attend.slots.device)
            hidden_NC = self.decoder.mtp_hidden(depth, read, hidden_NC, attend.positions, attend)
            work.module_tokens += len(after)
            work.module_pairs += attend.pairs

    def guess(self, sequences: Sequence[Running], work: Work) -> None:
        """Give every sequence its guesses. The modules read the tokens of the last step, and what has come in place of
        guesses that they read before."""
        # a sequence shorter than the window does its first position several times over: to the same result
        positions = [
            [max(at, s.length - len(_recent(s))) for at in range(s.length - self.window, s.length)]
            for s in sequences
        ]
        hidden_NC = torch.cat(
            [_recent(s)[[at - s.length for at in row]] for s, row in zip(sequences, positions, strict=True)]
        )
        attend = Decode(self.cache, [s.pages for s in sequences], positions)
        for s in sequences:
            s.guesses = []
        for depth in range(self.count):
            after = [
                s.token(at + depth + 1) for s, row in zip(sequences, positions, strict=True) for at in row
            ]
            read = torch.tensor(after, device=attend.slots.device)
            hidden_NC = self.decoder.mtp_hidden(depth, read, hidden_NC, attend.positions, attend)
            logits = self.decoder.logits(hidden_NC[self.window - 1 :: self.window])
            # with the number that the network will choose by: where both agree on the chances they agree on the token
            chosen, _, _ = choose(logits, [s.sampling for s in sequences], [s.draw(depth) for s in sequences])
            for s, token in zip(sequences, chosen.tolist(), strict=True):
                s.guesses.append(token)
            work.module_tokens += len(after)
            work.module_scored += len(sequences)
            work.module_decode_pairs += attend.pairs

    def remember(self, s: Running, hidden_NC: Tensor) -> None:
        """Keep the network's output for the tokens that a step has added to the cache."""
        s.recent = torch.cat([_recent(s), hidden_NC])[-self.window :]


def _recent(s: Running) -> Tensor:
    assert s.recent is not None
    return s.recent
