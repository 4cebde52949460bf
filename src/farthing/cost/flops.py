"""Model FLOPs and parameters in closed form, from a Hugging Face config.

The convention, to be stated beside every figure: a matrix product of [m, k] by [k, n] is 2*m*n*k FLOPs;
causal attention is counted once, that is, only the (query, key) pairs that the mask lets through;
embeddings are look-ups and cost nothing; the head is counted only for the positions whose logits are
computed; norms, rotary embeddings, activations, softmax and biases are left out; the backward pass is twice
the forward pass; recomputation is not model work and is not counted. These are the "model FLOPs" of PaLM
(arXiv:2204.02311, appendix B), except that PaLM counts the masked half of attention too. Of a mixture's
experts those count that a token is sent to, and the router.

`forward_flops`, `backward_flops` and `mtp_flops` give one number for work that was done, for the ledger;
`flops`, `flops_per_token` and `decode_flops` give it in parts, for plans. docs/counting.md has every formula.

Legend: d hidden size, h query heads, V vocabulary, S tokens of a sequence, W the window of sliding attention.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from farthing.cost.shapes import Layer, Matrix, Role, Shapes, shapes

CONVENTION = "model FLOPs: 2mnk a product, causal attention once, embeddings not, backward twice the forward"

Recompute = Literal["none", "selective", "alternate", "full"]
Work = Literal["forward", "backward", "train"]
_TIMES: dict[Work, int] = {"forward": 1, "backward": 2, "train": 3}
_LINEAR: tuple[Role, ...] = ("attention", "feedforward", "expert")


@dataclass(frozen=True)
class Parameters:
    """Parameter counts. Routers' correction biases are buffers and not among them."""

    total: int
    """All parameters, a shared matrix once, without multi-token prediction."""
    embedding: int
    """V*d, the input table."""
    head: int
    """V*d of a head with a matrix of its own, else 0."""
    active: int
    """Parameters that one token passes through, embedding and head included; the total for a dense model.
    Others leave out the embedding, or both: active - embedding, active - embedding - head."""
    mtp: int
    """Of the multi-token-prediction depths, which share embedding and head; 0 without them."""


@dataclass(frozen=True)
class Flops:
    """FLOPs by what they are for. Vectors add, and are multiplied by a number."""

    linear: float = 0.0
    """Projections and feed-forward blocks: what FP8 training computes in FP8 (arXiv:2412.19437 sec. 3.3)."""
    attention_causal: float = 0.0
    """Scores and weighted values of the pairs that the mask lets through, and what stands in for them: a sparse
    indexer's scores, a recurrent state."""
    attention_full: float = 0.0
    """The same of all pairs, as PaLM's MFU counts them. Stands in for `attention_causal`, never beside it."""
    logits: float = 0.0
    router: float = 0.0
    mtp: float = 0.0
    """All of multi-token prediction, its attention causal, its logits included."""
    mtp_full: float = 0.0
    """The same with all pairs."""
    recompute: float = 0.0
    """Forward work done again in the backward pass; no model FLOPs."""
    optimizer: float = 0.0
    """The optimizer's matrix products; no model FLOPs."""

    @property
    def model(self) -> float:
        """Model FLOPs by `CONVENTION`, multi-token prediction included."""
        return self.linear + self.attention_causal + self.logits + self.router + self.mtp

    @property
    def model_full(self) -> float:
        """Model FLOPs as PaLM counts them, masked pairs included."""
        return self.linear + self.attention_full + self.logits + self.router + self.mtp_full

    @property
    def hardware(self) -> float:
        """Everything the device computes: model FLOPs, recomputation, the optimizer."""
        return self.model + self.recompute + self.optimizer

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, factor: float) -> Flops:
        return Flops(*(getattr(self, f.name) * factor for f in fields(self)))

    __rmul__ = __mul__


def causal_pairs(new: int, prefix: int = 0) -> int:
    """(query, key) pairs of `new` tokens that follow `prefix` cached ones: n*p + n*(n+1)/2."""
    if new < 0 or prefix < 0:
        raise ValueError(f"token counts cannot be negative: new={new}, prefix={prefix}")
    return new * prefix + new * (new + 1) // 2


def parameters(config: Mapping[str, Any]) -> Parameters:
    """Count the parameters of a Hugging Face style config, exactly.

    Raises UserError for a family that is not in `families.FAMILIES` or a config without a size that is
    needed.
    """
    s = shapes(config)
    embedding = s.vocab * s.embed
    head = 0 if s.tied else embedding
    common = s.outside.parameters + embedding + head
    return Parameters(
        total=common + sum(layer.parameters for layer in s.layers),
        embedding=embedding,
        head=head,
        active=common + sum(layer.active() + layer.vectors - layer.idle for layer in s.layers),
        mtp=s.mtp_depth * s.mtp.parameters,
    )


def forward_flops(
    config: Mapping[str, Any], tokens: int, pairs: float, logit_tokens: int, *, absorbed: bool = False
) -> int:
    """Model FLOPs of one forward pass, without multi-token prediction.

    `tokens` go through the layers, `pairs` is the number of (query, key) pairs attended in a layer (the sum of
    `causal_pairs` over the sequences; the mean over the layers, where some slide), `logit_tokens` positions go
    through the head. `absorbed` says that latent attention was computed on the latents themselves, as in
    decoding. Raises as `parameters`.
    """
    _check(tokens, pairs, logit_tokens)
    s = shapes(config)
    linear = s.outside.active() + sum(layer.active() for layer in s.layers)
    attending = sum(not layer.recurrent for layer in s.layers)
    attention = round(attending * pairs) * _flops_of_pair(s, absorbed)
    attention += round(pairs * sum(layer.index for layer in s.layers))
    attention += tokens * sum(layer.recurrent for layer in s.layers)
    return 2 * tokens * linear + attention + 2 * logit_tokens * s.embed * s.vocab


def backward_flops(config: Mapping[str, Any], tokens: int, pairs: float, logit_tokens: int) -> int:
    """Model FLOPs of the backward pass alone, twice the forward pass: a training step is both together."""
    return 2 * forward_flops(config, tokens, pairs, logit_tokens)


def mtp_flops(
    config: Mapping[str, Any], tokens: int, pairs: float, logit_tokens: int, *, absorbed: bool = False
) -> int:
    """Model FLOPs that the config's multi-token-prediction depths add to a forward pass, all together.

    `tokens` and `pairs` are those of the pass, as in `forward_flops`: every depth goes over all of them;
    `logit_tokens` is the sum over the depths. `absorbed` as in `forward_flops`. Raises as `parameters`.
    """
    _check(tokens, pairs, logit_tokens)
    s = shapes(config)
    layers = 2 * tokens * s.mtp.active() + round(pairs) * (_flops_of_pair(s, absorbed) + s.mtp.index)
    return s.mtp_depth * layers + 2 * logit_tokens * s.embed * s.vocab


def flops(
    config: Mapping[str, Any],
    lengths: int | Sequence[int],
    work: Work = "train",
    *,
    mtp: bool = True,
    recompute: Recompute = "none",
) -> Flops:
    """FLOPs of a pass over whole sequences, logits at every token.

    Args:
        lengths: tokens of a sequence, or of each; packed documents that do not see each other are sequences.
        mtp: whether the config's multi-token-prediction depths are trained.
        recompute: `full` computes every layer again in the backward pass; `selective` only what is cheap:
            norms and activations (no matrix products) and the up-projections of latent attention, as
            DeepSeek-V3 does (arXiv:2412.19437 section 3.2.3); `alternate` all but attention and every second
            product, as torchtitan does by default (its `op` option). Counts only where there is a backward pass.

    Raises as `parameters`.
    """
    lengths = [lengths] if isinstance(lengths, int) else lengths
    _check(*lengths)
    s, tokens = shapes(config), sum(lengths)
    kinds = Counter(s.layers)
    once = Flops(
        linear=2 * tokens * (s.outside.active() + sum(layer.active(*_LINEAR) for layer in s.layers)),
        attention_causal=sum(times * _mixing(s, layer, lengths) for layer, times in kinds.items()),
        attention_full=sum(times * _mixing(s, layer, lengths, full=True) for layer, times in kinds.items()),
        logits=2 * tokens * s.embed * s.vocab,
        router=2 * tokens * sum(layer.active("router") for layer in s.layers),
    )
    depths = s.mtp_depth if mtp else 0
    extra = depths * 2 * tokens * (s.mtp.active() + s.embed * s.vocab)
    once += Flops(
        mtp=extra + depths * _mixing(s, s.mtp, lengths),
        mtp_full=extra + depths * _mixing(s, s.mtp, lengths, full=True),
    )
    if work == "forward":
        return once
    again = 0.0
    if recompute == "full":
        heads = depths * 2 * tokens * s.embed * s.vocab
        again = once.linear + once.attention_causal + once.router + once.mtp - heads
    elif recompute == "selective":
        again = 2 * tokens * (len(s.layers) + depths) * _up_projections(s)
    elif recompute == "alternate":
        again = 2 * tokens * sum(_computed_again(layer) for layer in [*s.layers, *[s.mtp] * depths])
    return once * _TIMES[work] + Flops(recompute=again)


def flops_per_token(
    config: Mapping[str, Any],
    seq_len: int,
    work: Work = "train",
    *,
    mtp: bool = True,
    recompute: Recompute = "none",
) -> Flops:
    """`flops` of a sequence of `seq_len` tokens, divided by them."""
    return flops(config, seq_len, work, mtp=mtp, recompute=recompute) * (1 / seq_len)


def decode_flops(config: Mapping[str, Any], context: int) -> Flops:
    """FLOPs of generating one token after `context` cached ones.

    Latent attention is in its absorbed form (arXiv:2405.04434 section 2.1.2): every head's query is taken
    into the latent space by W_UK and its result out of it by W_UV. That is as much linear work for a token
    as expanding one latent, but the pairs cost more and nothing cached is expanded again.
    """
    _check(context)
    s = shapes(config)
    attention = sum(_decoding(s, layer, context) for layer in s.layers)
    return Flops(
        linear=2 * (s.outside.active() + sum(layer.active(*_LINEAR) for layer in s.layers)),
        attention_causal=attention,
        attention_full=attention,
        logits=2 * s.embed * s.vocab,
        router=2 * sum(layer.active("router") for layer in s.layers),
    )


def alternate_products(layer: Layer) -> tuple[list[Matrix], list[Matrix]]:
    """Matrices of attention and plain feed-forward one by one: those whose products `alternate` keeps, and the rest."""
    single = [m for m in layer.matrices if m.role in ("attention", "feedforward") for _ in range(m.active)]
    return single[::2], single[1::2]


def _computed_again(layer: Layer) -> int:
    """Weights that `alternate` multiplies a token with once more."""
    _, again = alternate_products(layer)
    return sum(m.inputs * m.outputs for m in again) + layer.active("expert")


def _check(*counts: float) -> None:
    if min(counts, default=0) < 0:
        raise ValueError(f"counts cannot be negative: {', '.join(map(str, counts))}")


def _flops_of_pair(s: Shapes, absorbed: bool = False) -> int:
    """For all heads of a layer: a score, and a value added to the sum, each 2 FLOPs a channel."""
    if s.mla and absorbed:
        return 2 * s.heads * (2 * s.mla.kv_lora + s.mla.rope)
    return 2 * s.heads * (s.qk + s.v)


def _mixing(s: Shapes, layer: Layer, lengths: Sequence[int], full: bool = False) -> int:
    """FLOPs of one layer's attention over sequences, or of what stands in for it; `full` counts masked pairs too."""
    if layer.recurrent:
        return sum(lengths) * layer.recurrent
    indexed = layer.index * sum(n * n if full else causal_pairs(n) for n in lengths)
    return indexed + _flops_of_pair(s) * sum(_pairs(n, layer, full) for n in lengths)


def _pairs(n: int, layer: Layer, full: bool) -> int:
    """Pairs of a sequence in which a token sees itself and those before it: all, the last of a window, or those of its
    own chunk."""
    window = min(n, layer.window or n)
    if full:
        return n * window
    if layer.chunked:
        chunks, rest = divmod(n, window) if n else (0, 0)
        return chunks * causal_pairs(window) + causal_pairs(rest)
    return causal_pairs(window) + (n - window) * window


def _decoding(s: Shapes, layer: Layer, context: int) -> int:
    """FLOPs of one layer's attention, or of what stands in for it, for a token after `context` cached ones."""
    if layer.recurrent:
        return layer.recurrent
    window = layer.window or context + 1
    seen = context % window + 1 if layer.chunked else min(context + 1, window)
    return seen * _flops_of_pair(s, absorbed=True) + (context + 1) * layer.index


def _up_projections(s: Shapes) -> int:
    """Weights of a layer that take latent queries, keys and values to the heads."""
    if s.mla is None:
        return 0
    return (s.mla.q_lora or 0) * s.heads * s.qk + s.mla.kv_lora * s.heads * (s.mla.nope + s.mla.v)
