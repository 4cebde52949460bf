"""Attention within segments. Groups segments so that neither many tiny products nor a large mask dominates the cost.

A segment is (prefix length, suffix lengths), as in `model.attention.Segments`. Shapes: N tokens, H query heads,
G key/value heads, D head width, E value width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from farthing.model.kernels.attention import FULL, Rule, attention
from farthing.model.kernels.probe import Kernel, anywhere, numbers
from farthing.model.kernels.window import causal

DENSE_LENGTH = (
    1024  # up to here, one masked product for a prompt and uneven samples saves more than it wastes
)
JOIN_LENGTH = 256  # total length of short documents computed together

Segment = tuple[int, list[int]]


class Plan:
    """The products that compute a list of segments, and their masks, which all layers share."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = list(segments)
        self.longest = max((prefix + max(suffixes, default=0) for prefix, suffixes in segments), default=0)
        lengths = {prefix for prefix, _ in segments}
        plain = all(not suffixes for _, suffixes in segments)
        self._rectangle = (len(segments), lengths.pop()) if plain and len(lengths) == 1 else None
        self._computed = _joined(segments)
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def __call__(self, q_NHD: Tensor, k_NGD: Tensor, v_NGE: Tensor, rule: Rule = FULL) -> Tensor:
        """Return the attention output of every token, [N, H, E]."""
        if rule.window is not None and rule.window >= self.longest:
            rule = replace(rule, window=None)
        if not KERNEL.on(q_NHD):
            return one_by_one(q_NHD, k_NGD, v_NGE, self.segments, rule)
        return self.together(q_NHD, k_NGD, v_NGE, rule)

    def together(self, q_NHD: Tensor, k_NGD: Tensor, v_NGE: Tensor, rule: Rule = FULL) -> Tensor:
        """The fast path: equal lengths and a prompt's samples as a batch, short documents joined under a mask."""
        if self._rectangle:
            rows, length = self._rectangle
            q, k, v = (t.view(rows, length, *t.shape[1:]).transpose(1, 2) for t in (q_NHD, k_NGD, v_NGE))
            return causal(q, k, v, rule).transpose(1, 2).flatten(0, 1)
        sizes = [sum((prefix, *suffixes)) for prefix, suffixes in self._computed]
        pieces = zip(*(t.split(sizes) for t in (q_NHD, k_NGD, v_NGE)), strict=True)
        outs = []
        for number, (q, k, v) in enumerate(pieces):
            prefix, suffixes = self._computed[number]
            if prefix and _even(suffixes):
                outs += _samples(q, k, v, prefix, suffixes, rule)
            elif suffixes and len(q) > DENSE_LENGTH:
                outs += _branches(q, k, v, prefix, suffixes, rule)
            elif suffixes:
                outs.append(_masked(q, k, v, self._mask(number, rule.window, q), rule))
            else:
                outs.append(_sequence(q, k, v, rule))
        return torch.cat(outs)

    def _mask(self, number: int, window: int | None, like: Tensor) -> Tensor:
        """Return the mask of computed segment `number`, [n, n]: 0 where a key is seen, -inf elsewhere."""
        if (number, window) not in self._masks:
            prefix, suffixes = self._computed[number]
            sizes = torch.tensor([prefix, *suffixes])
            part = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
            seen = ((part[None, :] == 0) | (part[None, :] == part[:, None])).tril()
            if window is not None:
                at = torch.cat([torch.arange(prefix), *(prefix + torch.arange(n) for n in suffixes)])
                seen &= at[:, None] - at < window
            mask = torch.zeros(seen.shape, dtype=like.dtype).masked_fill_(~seen, -torch.inf)
            self._masks[number, window] = mask.to(like.device)
        return self._masks[number, window]


def one_by_one(
    q_NHD: Tensor, k_NGD: Tensor, v_NGE: Tensor, segments: Sequence[Segment], rule: Rule = FULL
) -> Tensor:
    """The definition: each prefix alone, then each suffix after its prefix."""
    sizes = [sum((prefix, *suffixes)) for prefix, suffixes in segments]
    pieces = zip(*(t.split(sizes) for t in (q_NHD, k_NGD, v_NGE)), segments, strict=True)
    return torch.cat(
        [out for q, k, v, segment in pieces for out in _branches(q, k, v, segment[0], segment[1], rule)]
    )


def _branches(
    q_NHD: Tensor, k_NGD: Tensor, v_NGE: Tensor, prefix: int, suffixes: list[int], rule: Rule
) -> list[Tensor]:
    pieces = zip(*(t.split([prefix, *suffixes]) for t in (q_NHD, k_NGD, v_NGE)), strict=True)
    q, k, v = next(pieces)
    outs = [_sequence(q, k, v, rule)]
    outs += [_sequence(q_s, torch.cat([k, k_s]), torch.cat([v, v_s]), rule) for q_s, k_s, v_s in pieces]
    return outs


def _even(suffixes: list[int]) -> bool:
    """Whether padding all of them to the longest at most doubles them."""
    return 0 < len(suffixes) * max(suffixes, default=0) <= 2 * sum(suffixes)


def _samples(
    q_NHD: Tensor, k_NGD: Tensor, v_NGE: Tensor, prefix: int, suffixes: list[int], rule: Rule
) -> list[Tensor]:
    """The prefix, then its suffixes as one batch, each behind the prefix and padded at its end, where no token of its
    own sees the padding. The backward pass lays them out again instead of keeping the copies."""

    def padded(t_NHD: Tensor) -> Tensor:
        if min(suffixes) == max(suffixes):
            return t_NHD[prefix:].unflatten(0, (len(suffixes), -1)).transpose(1, 2)
        return pad_sequence(t_NHD[prefix:].split(suffixes), batch_first=True).transpose(1, 2)

    def behind_prefix(t_NGD: Tensor) -> Tensor:
        before = t_NGD[:prefix].transpose(0, 1).expand(len(suffixes), -1, -1, -1)
        return torch.cat([before, padded(t_NGD)], 2)

    laid_out = [(padded, q_NHD), (behind_prefix, k_NGD), (behind_prefix, v_NGE)]
    q, k, v = (layout(flat) for layout, flat in laid_out)
    copies = {
        (copy.data_ptr(), copy.shape): (layout, flat.detach())
        for copy, (layout, flat) in zip((q, k, v), laid_out, strict=True)
    }

    def kept(tensor: Tensor) -> Any:
        return copies.get((tensor.data_ptr(), tensor.shape), tensor)

    def made_again(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[0](kept[1])

    with torch.autograd.graph.saved_tensors_hooks(kept, made_again):
        outs = causal(q, k, v, rule).transpose(1, 2)
    own = [out[:length] for out, length in zip(outs, suffixes, strict=True)]
    return [_sequence(q_NHD[:prefix], k_NGD[:prefix], v_NGE[:prefix], rule), *own]


def _sequence(q_LHD: Tensor, k_MGD: Tensor, v_MGE: Tensor, rule: Rule) -> Tensor:
    """Causal attention of the last L of a sequence's M tokens, [L, H, E]."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q_LHD, k_MGD, v_MGE))
    return causal(q, k, v, rule)[0].transpose(0, 1)


def _masked(q_LHD: Tensor, k_LGD: Tensor, v_LGE: Tensor, mask: Tensor, rule: Rule) -> Tensor:
    q, k, v = (t.transpose(0, 1)[None] for t in (q_LHD, k_LGD, v_LGE))
    return attention(q, k, v, mask, False, rule)[0].transpose(0, 1)


def _joined(segments: Sequence[Segment]) -> list[Segment]:
    """Join neighbouring short documents as suffixes of one empty prefix, which is equivalent: one masked product beats
    many tiny ones."""
    out: list[Segment] = []
    for prefix, suffixes in segments:
        if suffixes or prefix > JOIN_LENGTH:
            out.append((prefix, list(suffixes)))
        elif out and out[-1][0] == 0 and sum(out[-1][1]) + prefix <= JOIN_LENGTH:
            out[-1][1].append(prefix)
        else:
            out.append((0, [prefix]))
    return [(parts[0], []) if prefix == 0 and len(parts) == 1 else (prefix, parts) for prefix, parts in out]


def _together(
    q_NHD: Tensor, k_NGD: Tensor, v_NGE: Tensor, segments: Sequence[Segment], rule: Rule = FULL
) -> Tensor:
    return Plan(segments).together(q_NHD, k_NGD, v_NGE, rule)


def _examples() -> list[tuple[Any, ...]]:
    def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k = numbers(tokens, 4, 16).requires_grad_(), numbers(tokens, 2, 16, seed=1).requires_grad_()
        return q, k, numbers(tokens, 2, 16, seed=2).requires_grad_()

    short = [(6, [3, 4]), (2, [1, 1, 9]), (5, []), (4, []), (2, [])]
    return [(*inputs(37), short), (*inputs(18), [(9, []), (9, [])]), (*inputs(37), short, Rule(window=4))]


KERNEL = Kernel(
    "joined segments", "short sequences in one masked product", _together, one_by_one, anywhere, _examples
)
