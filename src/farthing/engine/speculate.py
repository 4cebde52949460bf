"""Speculative decoding with the model's own prediction modules (Leviathan et al., arXiv:2211.17192; DeepSeek-V3,
arXiv:2412.19437 section 2.2).

Module k guesses the token k + 2 positions after one that the network has read. The network then reads its next token
and the guesses in one pass, and accepts a guess that equals its own choice from the same logits and uniform number. The
output is that of plain decoding, in fewer passes.

A module's entry for position i lies in the cache slot of token i, although the module also read token i + k + 1. If
several sequences share a page, its last entries therefore belong to the sequence that wrote last. This may cost a
guess; it never changes a token.

Shapes: B sequences, N tokens of all of them, C model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from farthing.engine.cache import Decode, PagedCache, Prefill
from farthing.engine.compiled import CompiledNetwork
from farthing.engine.sampling import Row, choose
from farthing.engine.sequence import Prompt, Running, Work
from farthing.model import Decoder
from farthing.model.attention import mean_pairs


class Guesser:
    """Guesses `count` tokens per step, each with its own module."""

    def __init__(
        self, decoder: Decoder, cache: PagedCache, count: int, network: CompiledNetwork | None = None
    ) -> None:
        self.decoder, self.cache, self.count, self.network = decoder, cache, count, network
        # A step adds at most count + 1 tokens; the modules' last count - 1 entries before them still rest on guesses.
        self.window = 2 * count

    def read_prompts(
        self,
        attend: Prefill,
        prompts: Sequence[Prompt],
        hidden_NC: Tensor,
        work: Work,
    ) -> None:
        """Fill the modules' layers of the cache for what a pass reads of prompts.

        The tokens that a module reads past a prompt's end are not known yet; `guess` rewrites its last entries.
        """
        for prompt, rows in zip(prompts, hidden_NC.split([prompt.new for prompt in prompts]), strict=True):
            for s in prompt.samples:
                self.remember(s, rows)
        for depth in range(self.count):
            after = [
                prompt.ids[min(at + depth + 1, len(prompt.ids) - 1)]
                for prompt in prompts
                for at in range(prompt.read, prompt.end)
            ]
            read = torch.tensor(after, device=attend.slots.device)
            hidden_NC = self.decoder.mtp_hidden(depth, read, hidden_NC, attend.positions, attend)
            work.module_tokens += len(after)
            work.module_pairs += attend.pairs

    def guess(self, sequences: Sequence[Running], work: Work) -> None:
        """Set every sequence's guesses. The modules read the tokens of the last step and the tokens that replaced
        earlier guesses."""
        # a sequence shorter than the window repeats its first position, with the same result
        positions = [
            [max(at, s.length - len(_recent(s))) for at in range(s.length - self.window, s.length)]
            for s in sequences
        ]
        hidden_NC = torch.cat(
            [_recent(s)[[at - s.length for at in row]] for s, row in zip(sequences, positions, strict=True)]
        )
        tables = [s.pages for s in sequences]
        attend = Decode(self.cache, tables, positions) if self.network is None else None
        if self.network is not None:
            self.network.place(tables, positions)
        pairs = mean_pairs([(at, at + 1) for row in positions for at in row], self.cache.windows)
        for s in sequences:
            s.guesses = []
        for depth in range(self.count):
            after = [
                s.token(at + depth + 1) for s, row in zip(sequences, positions, strict=True) for at in row
            ]
            # use the uniform number that the network will use: equal distributions then give equal tokens
            rows = [Row(s.sampling, s.draw(depth)) for s in sequences]
            if self.network is not None:
                hidden_NC = self.network.module(depth, after, hidden_NC)
                chosen = self.network.choose(hidden_NC[self.window - 1 :: self.window], rows)
            else:
                assert attend is not None
                read = torch.tensor(after, device=attend.slots.device)
                hidden_NC = self.decoder.mtp_hidden(depth, read, hidden_NC, attend.positions, attend)
                chosen = choose(self.decoder.logits(hidden_NC[self.window - 1 :: self.window]), rows)
            for s, token in zip(sequences, chosen.ids, strict=True):
                s.guesses.append(token)
            work.module_tokens += len(after)
            work.module_scored += len(sequences)
            work.module_decode_pairs += pairs

    def remember(self, s: Running, hidden_NC: Tensor) -> None:
        """Keep the network's output for the last tokens that a step added to the cache."""
        before = [] if s.recent is None else [s.recent]
        s.recent = torch.cat([*before, hidden_NC[-self.window :]])[-self.window :]


def _recent(s: Running) -> Tensor:
    assert s.recent is not None
    return s.recent
