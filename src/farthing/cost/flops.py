"""Model FLOPs and parameters of a dense decoder in closed form, from its Hugging Face config.

The convention, to be stated beside every figure: a matrix product of [m, k] by [k, n] is 2*m*n*k FLOPs;
causal attention is counted once, that is, only the (query, key) pairs that the mask lets through;
embeddings are look-ups and cost nothing; the head is counted only for the positions whose logits are
computed; norms, rotary embeddings, activations, softmax and biases are left out; the backward pass is twice
the forward pass; recomputation is not model work and is not counted. These are the "model FLOPs" of PaLM
(arXiv:2204.02311, appendix B), except that PaLM counts the masked half of attention too.

Legend: d hidden size, h query heads, k key/value heads, c head size, f feed-forward size, V vocabulary,
L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from farthing.errors import UserError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
CONVENTION = "model FLOPs: 2mnk a product, causal attention once, embeddings not, backward twice the forward"

_QWEN3_HEAD_SIZE = 128  # Qwen3Config's default, which is not hidden_size / heads


@dataclass(frozen=True)
class Parameters:
    """Parameter counts. `head` is 0 when the head shares the embedding's matrix."""

    total: int
    """All parameters, a shared matrix once."""
    embedding: int
    """V*d, the input table."""
    head: int
    """V*d of a head with a matrix of its own, else 0."""
    active: int
    """Parameters that one token passes through; the total for a dense model."""


@dataclass(frozen=True)
class _Shape:
    """The sizes of a config, checked once. L layers, the rest as in the module's legend."""

    L: int
    d: int
    h: int
    k: int
    c: int
    f: int
    V: int
    tied: bool
    bias_qkv: bool
    bias_o: bool
    bias_mlp: bool
    qk_norm: bool


def causal_pairs(new: int, prefix: int = 0) -> int:
    """(query, key) pairs of `new` tokens that follow `prefix` cached ones: n*p + n*(n+1)/2."""
    if new < 0 or prefix < 0:
        raise ValueError(f"token counts cannot be negative: new={new}, prefix={prefix}")
    return new * prefix + new * (new + 1) // 2


def parameters(config: Mapping[str, Any]) -> Parameters:
    """Count the parameters of a Hugging Face style config, exactly.

    Raises UserError for a family that is not in `FAMILIES` or a config without a size that is needed.
    """
    s = _shape(config)
    attention = _attention_weights(s)
    attention += s.bias_qkv * (s.h + 2 * s.k) * s.c + s.bias_o * s.d + s.qk_norm * 2 * s.c
    feedforward = 3 * s.d * s.f + s.bias_mlp * (2 * s.f + s.d)
    norms = 2 * s.d
    embedding = s.V * s.d
    head = 0 if s.tied else s.V * s.d
    total = s.L * (attention + feedforward + norms) + s.d + embedding + head
    return Parameters(total=total, embedding=embedding, head=head, active=total)


def forward_flops(config: Mapping[str, Any], tokens: int, pairs: int, logit_tokens: int) -> int:
    """Model FLOPs of one forward pass.

    `tokens` go through the layers, `pairs` is the number of (query, key) pairs attended in each layer (the
    sum of `causal_pairs` over the sequences), `logit_tokens` positions go through the head. Raises as
    `parameters`.
    """
    if min(tokens, pairs, logit_tokens) < 0:
        raise ValueError(f"counts cannot be negative: {tokens=}, {pairs=}, {logit_tokens=}")
    s = _shape(config)
    linear = 2 * tokens * (_attention_weights(s) + 3 * s.d * s.f)
    attention = 4 * pairs * s.h * s.c  # the scores, and the sum of the values: 2*h*c each for a pair
    head = 2 * logit_tokens * s.d * s.V
    return s.L * (linear + attention) + head


def backward_flops(config: Mapping[str, Any], tokens: int, pairs: int, logit_tokens: int) -> int:
    """Model FLOPs of the backward pass alone, twice the forward pass: a training step is both together."""
    return 2 * forward_flops(config, tokens, pairs, logit_tokens)


def _attention_weights(s: _Shape) -> int:
    """Weights of q, k, v and o of one layer."""
    return s.d * (s.h + 2 * s.k) * s.c + s.h * s.c * s.d


def _shape(config: Mapping[str, Any]) -> _Shape:
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"cannot count the FLOPs of a model of type {family!r}: the types known are {', '.join(FAMILIES)}"
        )

    def size(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or value <= 0:
            raise UserError(f"the model's config gives {key}: {value!r}, not a whole number above 0")
        return value

    d, h = size("hidden_size"), size("num_attention_heads")
    bias = bool(config.get("attention_bias", False))
    return _Shape(
        L=size("num_hidden_layers"),
        d=d,
        h=h,
        k=size("num_key_value_heads", h),
        c=size("head_dim", _QWEN3_HEAD_SIZE if family == "qwen3" else d // h),
        f=size("intermediate_size"),
        V=size("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        # Qwen2 always has a bias on q, k and v and never on o; Mistral has none at all.
        bias_qkv=family == "qwen2" or (family in ("llama", "qwen3") and bias),
        bias_o=family in ("llama", "qwen3") and bias,
        bias_mlp=family == "llama" and bool(config.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
    )
