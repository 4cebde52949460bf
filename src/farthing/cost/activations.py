"""Bytes that a layer keeps until its backward pass, and that the backward pass works with, in closed form.

`usual` is what GPU trainers at large keep: torch's eager layers as Hugging Face writes them, with flash attention; our
own layers keep less. docs/counting.md has every formula.
"""

from __future__ import annotations

from typing import Literal

from farthing.base.sizes import SHORT_LENGTH
from farthing.cost.flops import Recompute, alternate_products
from farthing.cost.shapes import Layer, Shapes

Code = Literal["usual", "farthing-cpu", "farthing-gpu"]
Precision = Literal["fp32", "bf16", "pure-bf16", "fp8"]

# bytes of a number that is neither a weight nor read by a product
WIDTH = {"fp32": 4, "bf16": 2, "pure-bf16": 2, "fp8": 2}
INDEX, FLOAT = 8, 4  # bytes of an int64 and of a float32


def layer_bytes(
    s: Shapes,
    layer: Layer,
    recompute: Recompute,
    code: Code,
    precision: Precision,
    seq_len: int,
    trained: bool,
) -> int:
    """Bytes a token that one layer keeps until its backward pass, in sequences of `seq_len`.

    `trained` says whether norms are trained: under LoRA they are not, and keep less. In `fp8` what matrix
    products and the activation read is kept in a byte (arXiv:2412.19437 section 3.3.3), the rest in bfloat16.
    """
    b, narrow = WIDTH[precision], 1 if precision == "fp8" else WIDTH[precision]
    if recompute == "full":
        return s.width * b
    if recompute == "alternate":
        kept, _ = alternate_products(layer)
        return (s.width + s.heads * s.v + sum(matrix.outputs for matrix in kept)) * b + s.heads * FLOAT
    again = recompute == "selective"
    eager = code == "usual" and precision != "fp8" and not again
    inside, outputs = _norm(code, b, trained, eager)
    kept_bytes = s.width * (layer.norms * inside * b + 2 * (not again) * outputs * narrow)
    # a window cuts a longer row into blocks, whose results are kept beside all of them together
    blocks = code != "usual" and layer.window is not None and layer.window < seq_len
    short = is_short(code, precision, SHORT_LENGTH if blocks else seq_len, masked=blocks)
    kept_bytes += (blocks and not short) * s.heads * s.v * b
    kept_bytes += _latent(s, code, b, again, inside, short) if s.mla else _grouped(s, code, b, inside, short)
    return kept_bytes + _feedforward(s, layer, code, b, narrow, again, eager, trained)


def is_short(code: Code, precision: Precision, seq_len: int, masked: bool = False) -> bool:
    """Whether our attention keeps neither its result nor a statistic, and recomputes its weights: under a mask in
    bfloat16 only."""
    ours = precision == "bf16" or (precision == "fp32" and not masked)
    return code == "farthing-cpu" and ours and seq_len <= SHORT_LENGTH


def working_bytes(s: Shapes, layer: Layer, b: int, short_length: int = 0) -> int:
    """Bytes a token that the backward pass of one layer needs at most at a time, besides what is kept: the
    gradients of the feed-forward's inner tensors and of its ends, or of q, k, v and the result. Attention in
    short sequences of ours needs its weights, what they were made from and both gradients as well."""
    wide = (s.gates + 3) * layer.inner + 2 * s.width
    if layer.sparse:  # rows are copied for each expert that a token goes to: input, output gradient, result
        wide += 3 * s.top_k * s.width
    attention = 4 * s.heads * (s.qk + s.v + short_length) + 2 * s.width
    return max(wide, attention) * b


def _norm(code: Code, b: int, trained: bool, eager: bool) -> tuple[int, int]:
    """Times its width that an RMSNorm keeps for itself, and as the output that the next product reads."""
    if eager:  # its input as a float32 copy, and that normalised
        return 1 + FLOAT // b, 1
    if code != "farthing-cpu":
        return 1, 1  # its input
    if b == 2:  # [x, -x], and their normalised form if the gain is trained
        return (4 if trained else 2), 1
    return (2 if trained else 1), 1  # its input and the normalised input


def _grouped(s: Shapes, code: Code, b: int, inside: int, short: bool) -> int:
    h, k = s.heads, s.kv_heads
    kept = (h * s.qk + k * s.qk + k * s.v + h * s.v) * b + (not short) * h * FLOAT
    queries_keys = (h + k) * s.qk * b
    if code == "usual":
        return kept + s.qk_norm * queries_keys * inside
    # Ours are one product, of which the values are a part, so q and k live as long before rotation as after;
    # norms of them read it where it is, but for the CPU's in bfloat16, which read copies.
    copies = inside if code == "farthing-cpu" and b == 2 else inside - 1
    return kept + queries_keys * (1 + s.qk_norm * copies)


def _latent(s: Shapes, code: Code, b: int, again: bool, inside: int, short: bool) -> int:
    assert s.mla is not None
    m, h = s.mla, s.heads
    ranks, statistic = (m.q_lora or 0) + m.kv_lora, h * FLOAT
    if again:  # the latents before their norms, and attention's result
        return (ranks + m.rope + h * m.v) * b + statistic
    if code == "usual":
        return ((inside + 1) * ranks + m.rope + 2 * h * (s.qk + m.v)) * b + statistic
    # The first product's output is kept whole for the norms that read parts of it, but for the CPU's in
    # bfloat16, which reads copies.
    fused = (m.q_lora or h * s.qk) + m.kv_lora + m.rope
    norms = (inside + 1) * ranks if code == "farthing-cpu" and b == 2 else fused + inside * ranks
    if code == "farthing-gpu" or short:  # values are a part of the up-projection's output, kept whole
        return (norms + 2 * h * s.qk + h * (m.nope + m.v) + h * m.v) * b + (not short) * statistic
    # The CPU's fused attention wants values as wide as keys and gives a result as wide, to be cut.
    cut = h * m.v if m.v < s.qk else 0
    return (norms + 4 * h * s.qk + cut) * b + statistic


def _feedforward(
    s: Shapes, layer: Layer, code: Code, b: int, narrow: int, again: bool, eager: bool, trained: bool
) -> int:
    before, product = s.gates * layer.inner * narrow, (not again) * layer.inner * narrow
    if eager and s.gates > 1:  # the activated gate, which the product's backward pass reads
        product += layer.inner * narrow
    if not layer.sparse:
        return before + product
    router = s.experts * FLOAT + s.top_k * (INDEX + FLOAT)
    if code == "usual":  # a token's row once for each of its experts
        return before + product + s.top_k * s.width * narrow + router
    # Ours makes the routed experts' rows and products again; a router that is trained reads a float32 copy.
    shared = (not again) * (layer.inner - s.top_k * s.expert_size) * b
    copy = s.width * FLOAT if b < FLOAT and trained else 0
    return before + shared + router + copy + s.top_k * (b + 2 * INDEX + FLOAT)
