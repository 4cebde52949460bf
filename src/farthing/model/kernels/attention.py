"""Attention: torch's fused kernel, our own for short sequences in training, and plain softmax attention.

Shapes: B sequences, H query heads, G key/value heads, L queries, M keys, D head width, E value width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from farthing.base.sizes import SHORT_LENGTH
from farthing.model.kernels.probe import Kernel, anywhere, numbers


@dataclass(frozen=True)
class Rule:
    """What a layer's attention differs in from seeing every token before."""

    window: int | None = None
    """Tokens that a token sees, itself included; None for all before it. The caller masks the others."""
    softcap: float | None = None
    """Bounds the scores: s becomes softcap * tanh(s / softcap) (Gemma 2, arXiv:2408.00118 section 2)."""
    sinks: Tensor | None = None
    """Score of a key without a value that every query sees, [H, L or 1, 1] (arXiv:2309.17453 section 3.2)."""

    @property
    def weighs(self) -> bool:
        """Whether the weights are not the softmax of the scores alone."""
        return self.softcap is not None or self.sinks is not None


FULL = Rule()
BLOCK = 64  # causal queries of a product: fewer keys in vain against fewer, larger products
SCORE_BYTES = 64 << 20  # of float32 scores that are held at a time under a rule of their own


def attention(
    q_BHLD: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    mask: Tensor | None,
    causal: bool = False,
    rule: Rule = FULL,
) -> Tensor:
    """Return softmax(q k^T / sqrt(D) + mask) v, [B, H, L, E], with the rule's changes.

    A boolean mask is true where a key is seen. `causal` takes no mask; its queries are the last L of M positions.
    """
    if rule.weighs:
        return _in_pieces(q_BHLD, k_BGMD, v_BGME, mask, causal, rule)
    # for short rows matrices are faster than torch's CPU kernel: up to three times in bfloat16, 1.2 times in float32
    few = q_BHLD.shape[2] <= SHORT_LENGTH and (causal or q_BHLD.dtype == torch.bfloat16)
    if torch.is_grad_enabled() and few and SHORT.on(q_BHLD):
        return _Short.apply(q_BHLD, k_BGMD, v_BGME, mask, causal)
    return _forward(q_BHLD, k_BGMD, v_BGME, mask, causal)


def _forward(q_BHLD: Tensor, k_BGMD: Tensor, v_BGME: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    function = fused if TORCH.on(q_BHLD) else plain
    return function(q_BHLD, k_BGMD, v_BGME, mask, causal)


def _in_pieces(
    q_BHLD: Tensor, k_BGMD: Tensor, v_BGME: Tensor, mask: Tensor | None, causal: bool, rule: Rule
) -> Tensor:
    """`plain` for some queries at a time. Their scores are not kept: the backward pass computes them again."""
    batch, heads, length, _ = q_BHLD.shape
    at_once = max(1, SCORE_BYTES // (4 * batch * heads * k_BGMD.shape[2]))
    outs = []
    for start in range(0, length, at_once):
        end = min(start + at_once, length)
        reach, rows = k_BGMD.shape[2], mask
        if causal:
            reach = k_BGMD.shape[2] - length + end
            rows = seen_causally(end - start, reach, q_BHLD.device)
        elif mask is not None and mask.shape[-2] > 1:
            rows = mask[..., start:end, :]
        k, v, own = k_BGMD[:, :, :reach], v_BGME[:, :, :reach], rule
        if rule.sinks is not None and rule.sinks.shape[1] > 1:
            own = replace(rule, sinks=rule.sinks[:, start:end])
        piece = (q_BHLD[:, :, start:end], k, v, rows, False, own)
        if torch.is_grad_enabled():
            outs.append(checkpoint(plain, *piece, use_reentrant=False, preserve_rng_state=False))
        else:
            outs.append(plain(*piece))
    return torch.cat(outs, 2)


def plain(
    q_BHLD: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    mask: Tensor | None,
    causal: bool = False,
    rule: Rule = FULL,
) -> Tensor:
    """Attention by its definition (arXiv:1706.03762 eq. 1), in float32, which every processor supports."""
    shared = q_BHLD.shape[1] // k_BGMD.shape[1]
    k_BHMD, v_BHME = (t.float().repeat_interleave(shared, 1) for t in (k_BGMD, v_BGME))
    scores_BHLM = q_BHLD.float() @ k_BHMD.transpose(2, 3) * q_BHLD.shape[-1] ** -0.5
    if rule.softcap is not None:
        scores_BHLM = rule.softcap * torch.tanh(scores_BHLM / rule.softcap)
    bias = _score_bias(q_BHLD, k_BGMD, mask, causal)
    if bias is not None:
        scores_BHLM = scores_BHLM + bias
    if rule.sinks is None:
        weights_BHLM = scores_BHLM.softmax(-1)
    else:
        sinks = rule.sinks.float().expand(*scores_BHLM.shape[:-1], 1)
        weights_BHLM = torch.cat([scores_BHLM, sinks], -1).softmax(-1)[..., :-1]
    return (weights_BHLM @ v_BHME).to(q_BHLD.dtype)


def _score_bias(q_BHLD: Tensor, k_BGMD: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """Return the bias to add to the scores: 0 where a key is seen, -inf elsewhere; None if all are seen."""
    if causal:
        length, keys = q_BHLD.shape[2], k_BGMD.shape[2]
        return q_BHLD.new_full((length, keys), -torch.inf).triu(1 + keys - length)
    if mask is not None and mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=q_BHLD.dtype).masked_fill_(~mask, -torch.inf)
    return mask


def seen_causally(queries: int, keys: int, device: torch.device) -> Tensor:
    """Which keys the last `queries` of `keys` positions see, [queries, keys] bool."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def fused(
    q_BHLD: Tensor, k_BGMD: Tensor, v_BGME: Tensor, mask: Tensor | None, causal: bool = False
) -> Tensor:
    """torch's scaled_dot_product_attention."""
    width, missing = v_BGME.shape[-1], q_BHLD.shape[-1] - v_BGME.shape[-1]
    if missing > 0 and q_BHLD.device.type == "cpu":
        # torch's CPU kernel needs values as wide as queries; the fallback takes ten times as long
        v_BGME = F.pad(v_BGME, (0, missing))
    if causal and q_BHLD.shape[2] < k_BGMD.shape[2]:  # torch's queries are the first positions
        mask, causal = seen_causally(q_BHLD.shape[2], k_BGMD.shape[2], q_BHLD.device), False
    grouped = q_BHLD.shape[1] != k_BGMD.shape[1]
    out = F.scaled_dot_product_attention(
        q_BHLD, k_BGMD, v_BGME, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    )
    return out[..., :width]


class _Short(torch.autograd.Function):
    """Attention whose weights are matrices, made again in the backward pass: two products and a softmax, then five.

    Causal queries go in blocks, each with the keys that any of them sees. With a mask torch's kernel goes forward.
    Outputs and gradients lie token by token, as the maps before and after attention read them.
    """

    @staticmethod
    def forward(
        ctx: Any, q_BHLD: Tensor, k_BGMD: Tensor, v_BGME: Tensor, mask: Tensor | None, causal: bool
    ) -> Tensor:
        ctx.save_for_backward(q_BHLD, k_BGMD, v_BGME, mask)
        ctx.causal = causal
        if not causal:
            return _forward(q_BHLD, k_BGMD, v_BGME, mask, causal)
        out_BHLE, groups = _by_token(q_BHLD, v_BGME.shape[-1]), k_BGMD.shape[1]
        q, out = _grouped(q_BHLD, groups), _grouped(out_BHLE, groups)
        k_all, v_all = k_BGMD.flatten(0, 1), v_BGME.flatten(0, 1)
        for rows, keys in _blocks(q_BHLD.shape[2], k_BGMD.shape[2], causal):
            k, v = k_all[:, :keys].contiguous(), v_all[:, :keys].contiguous()
            weights = _weights(_rows(q, rows), k, None, rows.stop - rows.start)
            own = out[..., rows, :]
            own.copy_(torch.bmm(weights, v).view(own.shape))
        return out_BHLE

    @staticmethod
    def backward(ctx: Any, grad_BHLE: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_BHLD, k_BGMD, v_BGME, mask = ctx.saved_tensors
        groups, scale = k_BGMD.shape[1], q_BHLD.shape[-1] ** -0.5
        q, grad = _grouped(q_BHLD, groups), _grouped(grad_BHLE, groups)
        grad_q_BHLD = _by_token(q_BHLD, q_BHLD.shape[-1])
        grad_q = _grouped(grad_q_BHLD, groups)
        k_all, v_all = k_BGMD.flatten(0, 1), v_BGME.flatten(0, 1)
        bias = _score_bias(q_BHLD, k_BGMD, mask, False)
        sums: tuple[Tensor, Tensor] | None = None
        # the last block sees every key, so its gradients begin the sums
        for rows, keys in reversed(_blocks(q_BHLD.shape[2], k_BGMD.shape[2], ctx.causal)):
            q_rows, grad_rows = _rows(q, rows), _rows(grad, rows)
            k, v = k_all[:, :keys].contiguous(), v_all[:, :keys]
            weights = _weights(q_rows, k, bias, rows.stop - rows.start if ctx.causal else 0)
            above = torch.bmm(grad_rows, v.transpose(1, 2))
            scores = torch._softmax_backward_data(above, weights, -1, q.dtype)
            own = grad_q[..., rows, :]
            torch.mul(torch.bmm(scores, k).view(own.shape), scale, out=own)
            parts = torch.bmm(scores.transpose(1, 2), q_rows), torch.bmm(weights.transpose(1, 2), grad_rows)
            if sums is None:
                sums = parts[0].float(), parts[1].float()
            else:
                for total, part in zip(sums, parts, strict=True):
                    total[:, :keys] += part
        assert sums is not None
        grad_k_BGMD, grad_v_BGME = (_by_token(t, t.shape[-1]) for t in (k_BGMD, v_BGME))
        grad_k_BGMD.copy_(sums[0].mul_(scale).view(k_BGMD.shape))
        grad_v_BGME.copy_(sums[1].view(v_BGME.shape))
        return grad_q_BHLD, grad_k_BGMD, grad_v_BGME, None, None


def _by_token(like_BHLD: Tensor, width: int) -> Tensor:
    """A new [B, H, L, width] that lies as [B, L, H, width]."""
    batch, heads, length, _ = like_BHLD.shape
    return like_BHLD.new_empty(batch, length, heads, width).transpose(1, 2)


def _grouped(t_BHLD: Tensor, groups: int) -> Tensor:
    """A view with the query heads of each key head apart, [B, G, H / G, L, D]."""
    return t_BHLD.unflatten(1, (groups, -1))


def _rows(t: Tensor, rows: slice) -> Tensor:
    """These positions of query heads that share a key head as the rows of one product, [B * G, H / G * rows, D]."""
    return t[..., rows, :].reshape(t.shape[0] * t.shape[1], -1, t.shape[-1])


def _weights(q: Tensor, k: Tensor, bias: Tensor | None, block: int = 0) -> Tensor:
    """Softmax of the scores, which belong to a block of the last causal queries, or have a bias."""
    scores = q.new_empty(len(q), q.shape[1], k.shape[1])
    torch.baddbmm(scores, q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5, out=scores)
    if block:  # earlier keys are seen by all of the block
        later = scores.new_full((block, block), -torch.inf).triu(1)
        scores[:, :, -block:].unflatten(1, (-1, block)).add_(later)
    elif bias is not None:
        scores.unflatten(1, (-1, len(bias))).add_(bias)
    return scores.softmax(-1)


def _blocks(length: int, keys: int, causal: bool) -> list[tuple[slice, int]]:
    """Blocks of queries, and how many of the keys they see."""
    if not causal:
        return [(slice(0, length), keys)]
    size = BLOCK if length > 2 * BLOCK else BLOCK // 2
    starts = range(0, length, size)
    ends = [min(start + size, length) for start in starts]
    return [(slice(start, end), keys - length + end) for start, end in zip(starts, ends, strict=True)]


def short(
    q_BHLD: Tensor, k_BGMD: Tensor, v_BGME: Tensor, mask: Tensor | None, causal: bool = False
) -> Tensor:
    """`attention` with matrices of weights, and our own backward pass."""
    return _Short.apply(q_BHLD, k_BGMD, v_BGME, mask, causal)


def _short_lacks(device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float32):
        return "for bfloat16 and float32 on a CPU"
    return "" if hasattr(torch, "_softmax_backward_data") else "this torch has no _softmax_backward_data"


def _inputs(heads: int, groups: int, length: int, width: int, value: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        numbers(1, heads, length, width).requires_grad_(),
        numbers(1, groups, length, width, seed=1).requires_grad_(),
        numbers(1, groups, length, value, seed=2).requires_grad_(),
    )


def _examples() -> list[tuple[Any, ...]]:
    seen = torch.ones(19, 19, dtype=torch.bool).tril()
    seen[12:, 4:12] = False  # two samples of one prompt
    bias = torch.zeros(19, 19).masked_fill_(~seen, -torch.inf)
    return [
        (*_inputs(4, 2, 19, 16, 12), None, True),
        (*_inputs(4, 4, 19, 16, 16), seen, False),
        (*_inputs(4, 2, 19, 16, 16), bias, False),
        (*_inputs(2, 1, 320, 16, 16), None, True),  # long enough for the kernel to pack its operands
        (numbers(1, 4, 40, 16).requires_grad_(), *_inputs(4, 2, 52, 16, 12)[1:], None, True),
    ]


def _examples_with_decoding() -> list[tuple[Any, ...]]:
    q, (_, k, v) = numbers(1, 2, 3, 16, seed=3), _inputs(2, 2, 19, 16, 16)
    return [*_examples(), (q, k.detach(), v.detach(), None, False)]


TORCH = Kernel(
    "attention", "torch's scaled_dot_product_attention", fused, plain, anywhere, _examples_with_decoding
)
SHORT = Kernel("short attention", "matrices of weights, made twice", short, plain, _short_lacks, _examples)
