"""Bytes that a layer keeps for the backward pass, for each token, in closed form.

Two ways of computing are known. `usual` is what GPU trainers with flash attention do: every tensor that a
matrix product, a norm or an activation function reads is kept once, in the compute precision, with a float32
softmax statistic for each head (Korthikanti et al., arXiv:2205.05198 section 4, without the attention matrix,
which flash attention never keeps). `farthing` is this package's own network, with what torch keeps besides on
a CPU: its RMSNorm in bfloat16 is computed from [x, -x], the fused q, k, v are kept before and after rotation.

Recomputation in the backward pass:
* `none`: everything is kept.
* `selective`: outputs of norms and of the activation's product are made again, and with latent attention all
  heads' q, k and v from the latents (DeepSeek-V3, arXiv:2412.19437 section 3.2.3).
* `full`: only each layer's input is kept (arXiv:1604.06174).

Legend: d hidden size, h query heads, k key/value heads, c head size, f feed-forward size, r latent ranks,
E experts of a layer, K of them chosen for a token, b bytes of a number.
"""

from __future__ import annotations

from typing import Literal

from farthing.cost.flops import Recompute
from farthing.cost.shapes import Layer, Shapes

Code = Literal["usual", "farthing-cpu", "farthing-gpu"]
Precision = Literal["fp32", "bf16", "fp8"]

WIDTH = {"fp32": 4, "bf16": 2, "fp8": 2}  # bytes of a number that is neither a weight nor read by a product

SHORT_LENGTH = 512  # model.kernels.attention has the same figure, and a test compares them
_INDEX, _FLOAT = 8, 4  # bytes of an int64 and of a float32


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
    again = recompute == "selective"
    inside, outputs = _norm(code, b, trained)
    kept = 2 * s.width * (inside * b + (not again) * outputs * narrow)
    short = is_short(code, precision, seq_len)
    kept += _latent(s, code, b, again, inside, short) if s.mla else _grouped(s, code, b, inside, short)
    return kept + _feedforward(s, layer, code, b, narrow, again, trained)


def is_short(code: Code, precision: Precision, seq_len: int) -> bool:
    """Whether our attention keeps neither its result nor a statistic, and makes its weights again instead."""
    return code == "farthing-cpu" and precision == "bf16" and seq_len <= SHORT_LENGTH


def working_bytes(s: Shapes, layer: Layer, b: int, short_length: int = 0) -> int:
    """Bytes a token that the backward pass of one layer needs at most at a time, besides what is kept: the
    gradients of the feed-forward's inner tensors and of its ends, or of q, k, v and the result. Attention in
    short sequences of ours needs its weights, what they were made from and both gradients as well."""
    wide = (s.gates + 3) * layer.inner + 2 * s.width
    if layer.sparse:  # rows are copied for each expert that a token goes to: input, output gradient, result
        wide += 3 * s.top_k * s.width
    attention = 4 * s.heads * (s.qk + s.v + short_length) + 2 * s.width
    return max(wide, attention) * b


def _norm(code: Code, b: int, trained: bool) -> tuple[int, int]:
    """Times its width that an RMSNorm keeps for itself, and as the output that the next product reads."""
    if code != "farthing-cpu":
        return 1, 1  # its input
    if b == 2:  # [x, -x], and their normalised form if the gain is trained
        return (4 if trained else 2), 1
    return (2 if trained else 1), 1  # its input and the normalised input


def _grouped(s: Shapes, code: Code, b: int, inside: int, short: bool) -> int:
    h, k = s.heads, s.kv_heads
    kept = (h * s.qk + k * s.qk + k * s.v + h * s.v) * b + (not short) * h * _FLOAT
    queries_keys = (h + k) * s.qk * b
    if code == "usual":
        return kept + s.qk_norm * queries_keys
    # Ours are one product, of which the values are a part, so q and k live as long before rotation as after;
    # norms of them read it where it is, but for the CPU's in bfloat16, which read copies.
    copies = inside if code == "farthing-cpu" and b == 2 else inside - 1
    return kept + queries_keys * (1 + s.qk_norm * copies)


def _latent(s: Shapes, code: Code, b: int, again: bool, inside: int, short: bool) -> int:
    assert s.mla is not None
    m, h = s.mla, s.heads
    ranks, statistic = (m.q_lora or 0) + m.kv_lora, h * _FLOAT
    if again:  # the latents before their norms, and attention's result
        return (ranks + m.rope + h * m.v) * b + statistic
    if code == "usual":
        return (2 * ranks + m.rope + 2 * h * (s.qk + m.v)) * b + statistic
    # The first product's output is kept whole for the norms that read parts of it, but for the CPU's in
    # bfloat16, which reads copies.
    fused = (m.q_lora or h * s.qk) + m.kv_lora + m.rope
    norms = (inside + 1) * ranks if code == "farthing-cpu" and b == 2 else fused + inside * ranks
    if code == "farthing-gpu" or short:  # values are a part of the up-projection's output, kept whole
        return (norms + 2 * h * s.qk + h * (m.nope + m.v) + h * m.v) * b + (not short) * statistic
    # The CPU's fused attention wants values as wide as keys and gives a result as wide, to be cut.
    cut = h * m.v if m.v < s.qk else 0
    return (norms + 4 * h * s.qk + cut) * b + statistic


def _feedforward(s: Shapes, layer: Layer, code: Code, b: int, narrow: int, again: bool, trained: bool) -> int:
    before, product = s.gates * layer.inner * narrow, (not again) * layer.inner * narrow
    if not layer.sparse:
        return before + product
    router = s.experts * _FLOAT + s.top_k * (_INDEX + _FLOAT)
    if code == "usual":  # a token's row once for each of its experts
        return before + product + s.top_k * s.width * narrow + router
    # Ours makes the routed experts' rows and products again; a router that is trained reads a float32 copy.
    shared = (not again) * (layer.inner - s.top_k * s.expert_size) * b
    copy = s.width * _FLOAT if b < _FLOAT and trained else 0
    return before + shared + router + copy + s.top_k * (b + 2 * _INDEX + _FLOAT)
