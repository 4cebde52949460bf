"""Shapes of a network from its config.json: every matrix and every vector, without torch.

Counting FLOPs, parameters and bytes needs the matrices of a layer and how many of them a token passes
through. `shapes` reads them from the config of any family in `families.FAMILIES`. Of a model of images and text that
nests a text model's config (`text_config`), the text model is counted and nothing else.

Legend: d hidden size, h query heads, k key/value heads, c head size, f feed-forward size, V vocabulary,
E experts of a layer, K of them chosen for a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from farthing.base.errors import UserError
from farthing.cost.families import FAMILIES, Family, Flag, family_of, text_model

Role = Literal["attention", "feedforward", "expert", "router", "mtp", "outside"]
Config = Mapping[str, Any]
_MOST_LAYERS = 10_000  # a config that asks for more is damaged


@dataclass(frozen=True)
class Matrix:
    """`count` equal matrices [inputs, outputs] with one task; a token is multiplied with `active` of them."""

    role: Role
    inputs: int
    outputs: int
    count: int = 1
    active: int = 1

    @property
    def size(self) -> int:
        """Weights of all `count` together."""
        return self.inputs * self.outputs * self.count

    @property
    def active_size(self) -> int:
        """Weights that one token passes through."""
        return self.inputs * self.outputs * self.active


@dataclass(frozen=True)
class Mla:
    """Ranks and head sizes of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434 section 2.1)."""

    q_lora: int | None
    kv_lora: int
    nope: int
    rope: int
    v: int


@dataclass(frozen=True)
class Layer:
    """One layer, or one multi-token-prediction depth."""

    matrices: tuple[Matrix, ...]
    vectors: int
    """Parameters in biases and norms."""
    idle: int = 0
    """Of them, biases of experts that a token does not go to."""
    norms: int = 2
    """Norms as wide as the model."""
    window: int | None = None
    """Tokens that a token sees, itself included; None for all before it. With a sparse indexer, those it chooses."""
    chunked: bool = False
    """True if sequences are cut into chunks as long as the window, and a token sees its own (Llama 4)."""
    cached: int = 0
    """Numbers that a token leaves in the cache."""
    state: int = 0
    """Numbers that a sequence keeps in a recurrent state, in float32."""
    recurrent: int = 0
    """FLOPs of a token in that state, which stands in for attention; 0 with attention."""
    index: int = 0
    """FLOPs of each (query, key) pair in a sparse indexer; 0 without one."""
    inner: int = 0
    """Feed-forward channels that one token fills, chosen and shared experts together."""
    sparse: bool = False
    """True if the feed-forward is a mixture of experts."""

    def weights(self, *roles: Role) -> int:
        """Weights of the matrices of these roles; of all if none is given."""
        return sum(m.size for m in self.matrices if not roles or m.role in roles)

    def active(self, *roles: Role) -> int:
        """As `weights`, of the matrices that one token passes through."""
        return sum(m.active_size for m in self.matrices if not roles or m.role in roles)

    @property
    def parameters(self) -> int:
        return self.weights() + self.vectors


@dataclass(frozen=True)
class Shapes:
    """The sizes of a network."""

    family: str
    width: int
    heads: int
    kv_heads: int
    qk: int
    """Head size of queries and keys."""
    v: int
    """Head size of values."""
    qk_norm: bool
    """True if heads of queries and keys are normed."""
    vocab: int
    embed: int
    """Columns of the embedding: the width, but for OPT-350M."""
    tied: bool
    layers: tuple[Layer, ...]
    outside: Layer
    """Parameters before and after the layers, without embedding and head."""
    gates: int
    """Matrices of a feed-forward block before its product: 2 gated (SwiGLU), 1 plain."""
    mla: Mla | None
    experts: int
    top_k: int
    expert_size: int
    """f of one routed expert, 0 without any."""
    mtp_depth: int
    mtp: Layer
    """One depth of multi-token prediction (DeepSeek-V3, arXiv:2412.19437 section 2.2)."""


def scoring_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a decoder as large as a reward model, which has no second table of the vocabulary."""
    return {**config, "tie_word_embeddings": True, "num_nextn_predict_layers": 0}


def shapes(config: Config) -> Shapes:
    """Read the sizes from a config.json as a plain dict.

    Raises UserError for a family that is not in `FAMILIES`, and for a size that is missing or no whole number
    above 0.
    """
    config = text_model(config)
    name = family_of(config)
    family = FAMILIES[name]
    config = {**family.defaults, **_flat(config)}
    d = _size(config, "hidden_size", "n_embd", "d_model", "n_embed")
    h = _heads(config, family)
    mla = _mla(config) if family.attention in ("mla", "dsa") else None
    k = h if mla else _kv_heads(config, family, h)
    c = 1 if mla else _size(config, "head_dim", "kv_channels", default=family.head_size or max(1, d // h))
    qk, v = (mla.nope + mla.rope, mla.v) if mla else (c, c)
    count = _size(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    if count > _MOST_LAYERS:
        raise UserError(f"the model's config gives {count} layers; correct num_hidden_layers")
    attention = _attention(config, family, d, h, k, c, mla)
    recurrent = _delta_net(config, d) if family.attention == "gated" else attention
    norms = _norms(config, family)
    vectors = norms * family.norm * d
    # A layer is dense or sparse, slides or not, and attends or not: the few kinds are made once and shared.
    kinds: dict[tuple[bool, int | None, bool], Layer] = {}
    layers: list[Layer] = []
    for index in range(count):
        kind = (
            _is_sparse(config, family, index),
            _window(config, family, index),
            _is_recurrent(config, family, index),
        )
        if kind not in kinds:
            sparse, window, recurs = kind
            mixer = recurrent if recurs else attention
            feed = (_experts if sparse else _dense)(config, family, d)
            kinds[kind] = replace(
                mixer,
                matrices=mixer.matrices + feed.matrices,
                vectors=mixer.vectors + vectors + feed.vectors,
                idle=feed.idle,
                norms=norms,
                window=window,
                chunked=family.window_where == "chunks" and window is not None,
                inner=feed.inner,
                sparse=sparse,
            )
        layers.append(kinds[kind])
    last = layers[-1]
    # The projection of [hidden state; embedding], their two norms, a layer, and a norm before the head.
    mtp = replace(last, matrices=(Matrix("mtp", 2 * d, d), *last.matrices), vectors=last.vectors + 3 * d)
    embed = _size(config, "word_embed_proj_dim", default=d) if name == "opt" else d
    vocab = _size(config, "vocab_size")
    return Shapes(
        family=name,
        width=d,
        heads=h,
        kv_heads=k,
        qk=qk,
        v=v,
        qk_norm=_has_qk_norm(config, family),
        vocab=vocab,
        embed=embed,
        tied=_flag(config, ("tie_word_embeddings", family.tied)),
        layers=tuple(layers),
        outside=_outside(config, family, d, embed, vocab),
        gates=family.matrices - 1,
        mla=mla,
        experts=_expert_count(config) if any(layer.sparse for layer in layers) else 0,
        top_k=_top_k(config) if any(layer.sparse for layer in layers) else 0,
        expert_size=_size(config, family.expert_size) if any(layer.sparse for layer in layers) else 0,
        mtp_depth=_size(config, "num_nextn_predict_layers", default=0, least=0)
        if family.experts == "deepseek"
        else 0,
        mtp=mtp,
    )


def _size(config: Config, *names: str, default: int | None = None, least: int = 1) -> int:
    """The value of the first key present, as a whole number."""
    name = next((name for name in names if config.get(name) is not None), names[0])
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"the model's config gives {name}: {value!r}, not a whole number above {least - 1}")
    return value


def _flag(config: Config, flag: Flag) -> bool:
    return bool(config.get(*flag)) if isinstance(flag, tuple) else flag


def _flat(config: Config) -> Config:
    """DBRX and MPT keep some sizes in tables of their own."""
    inner = [config[key] for key in ("attn_config", "ffn_config") if isinstance(config.get(key), Mapping)]
    return {**{key: value for table in inner for key, value in table.items()}, **config}


def _heads(config: Config, family: Family) -> int:
    default = None
    if family.attention == "moa":  # each chosen expert brings as many query heads as there are key heads
        default = _size(config, "num_key_value_heads") * _top_k(config)
    return _size(config, "num_attention_heads", "n_head", "n_heads", "num_heads", default=default)


def _kv_heads(config: Config, family: Family, h: int) -> int:
    grouped = _size(config, "num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads", default=h)
    if family.kv == "falcon" and config.get("new_decoder_architecture"):
        return grouped
    if family.kv:
        return 1 if config.get("multi_query", True) else h
    return grouped


def _mla(config: Config) -> Mla:
    return Mla(
        q_lora=None if config.get("q_lora_rank") is None else _size(config, "q_lora_rank"),
        kv_lora=_size(config, "kv_lora_rank"),
        nope=_size(config, "qk_nope_head_dim"),
        rope=_size(config, "qk_rope_head_dim"),
        v=_size(config, "v_head_dim"),
    )


def _attention(config: Config, family: Family, d: int, h: int, k: int, c: int, mla: Mla | None) -> Layer:
    """The attention of a layer, without its feed-forward."""
    bias = _flag(config, family.o_bias)
    if mla:
        ranks = (mla.q_lora or 0) + mla.kv_lora
        latent = Layer(
            _mla_matrices(d, h, mla),
            ranks + bias * (d + ranks + mla.rope),
            cached=mla.kv_lora + mla.rope,
        )
        return _indexed(config, d, mla, latent) if family.attention == "dsa" else latent
    matrices, cached = _matrices(config, family, d, h, k, c), 2 * k * c
    if family.attention == "moa":
        return Layer(matrices, d, cached=cached)  # a bias of the sum over the chosen experts
    queries = h * (1 + (family.attention == "gated"))
    vectors = bias * d + _flag(config, family.qkv_bias) * (queries + 2 * k) * c + family.oss * h
    if _has_qk_norm(config, family):
        vectors += 2 * c * max(1, family.norm) if family.qk_norm == "head" else (h + k) * c
    return Layer(matrices, vectors, cached=cached)


def _mla_matrices(d: int, h: int, mla: Mla) -> tuple[Matrix, ...]:
    qk = mla.nope + mla.rope
    if mla.q_lora is None:
        queries = [Matrix("attention", d, h * qk)]
    else:
        queries = [Matrix("attention", d, mla.q_lora), Matrix("attention", mla.q_lora, h * qk)]
    return (
        *queries,
        Matrix("attention", d, mla.kv_lora + mla.rope),
        Matrix("attention", mla.kv_lora, h * (mla.nope + mla.v)),
        Matrix("attention", h * mla.v, d),
    )


def _indexed(config: Config, d: int, mla: Mla, latent: Layer) -> Layer:
    """Latent attention with the indexer that chooses `index_topk` tokens (report on DeepSeek-V3.2-Exp, equation 1).

    n small heads of size e score every pair: the sum over heads of weight * relu(q k), with one key for all.
    """
    n, e = _size(config, "index_n_heads"), _size(config, "index_head_dim")
    queries = Matrix("attention", mla.q_lora or d, n * e)
    return replace(
        latent,
        matrices=(*latent.matrices, queries, Matrix("attention", d, e), Matrix("attention", d, n)),
        vectors=latent.vectors + 2 * e,  # the LayerNorm of its keys
        cached=latent.cached + e,
        index=2 * n * e + 2 * n,
    )


def _delta_net(config: Config, d: int) -> Layer:
    """Gated DeltaNet (arXiv:2412.06464 section 3.1) as Qwen3-Next has it, without the feed-forward.

    Each value head keeps a state of [key size, value size] that a token reads, corrects and reads again: three
    products. Queries, keys and values go through a short convolution before, each channel by itself.
    """
    heads, v = _size(config, "linear_num_value_heads"), _size(config, "linear_value_head_dim")
    c = _size(config, "linear_key_head_dim")
    keys, values = _size(config, "linear_num_key_heads") * c, heads * v
    convolution = _size(config, "linear_conv_kernel_dim", default=4) * (2 * keys + values)
    return Layer(
        (
            Matrix("attention", d, 2 * keys + 2 * values),  # queries, keys, values and the output's gate
            Matrix("attention", d, 2 * heads),  # how much is written and how much is kept
            Matrix("attention", values, d),
        ),
        vectors=convolution + 2 * heads + v,  # the decay's scale and bias, and a norm
        state=heads * c * v,
        recurrent=2 * convolution + 3 * 2 * heads * c * v,
    )


def _is_recurrent(config: Config, family: Family, index: int) -> bool:
    if family.attention != "gated":
        return False
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and index < len(kinds):
        return bool(kinds[index] == "linear_attention")
    return (index + 1) % _size(config, "full_attention_interval", default=4) != 0


def _matrices(config: Config, family: Family, d: int, h: int, k: int, c: int) -> tuple[Matrix, ...]:
    """q, k, v and o; for JetMoE (arXiv:2404.07413 section 2.3) q and o are experts and k and v are shared. Gated
    attention has a gate as wide as q (arXiv:2505.06708)."""
    keys_values = Matrix("attention", d, k * c, count=2, active=2)
    if family.attention == "moa":
        experts, chosen = _expert_count(config), _top_k(config)
        q = Matrix("attention", d, k * c, experts, chosen)
        return q, keys_values, Matrix("attention", k * c, d, experts, chosen), Matrix("router", d, experts)
    gate = 1 + (family.attention == "gated")
    return Matrix("attention", d, h * c * gate), keys_values, Matrix("attention", h * c, d)


def _has_qk_norm(config: Config, family: Family) -> bool:
    return bool(family.qk_norm) and (not family.qk_norm_if or bool(config.get(family.qk_norm_if, False)))


def _norms(config: Config, family: Family) -> int:
    """Norms of a layer as wide as the model. Attention and feed-forward side by side may share one."""
    if family.kv == "falcon":
        two = (None, 2) if config.get("new_decoder_architecture") else (2,)
        parallel = config.get("new_decoder_architecture") or config.get("parallel_attn", True)
        return 1 if parallel and config.get("num_ln_in_parallel_attn") not in two else 2
    if config.get("model_type") == "stablelm" and config.get("use_parallel_residual"):
        return 1
    return family.norms


def _block(role: Role, family: Family, d: int, f: int, count: int = 1, active: int = 1) -> tuple[Matrix, ...]:
    gates = family.matrices - 1
    return Matrix(role, d, f, gates * count, gates * active), Matrix(role, f, d, count, active)


def _dense(config: Config, family: Family, d: int) -> Layer:
    """A plain feed-forward block."""
    default = family.wide * d if family.wide else None
    f = _size(config, family.dense_size, "ffn_hidden_size", "ffn_dim", "n_inner", default=default)
    if family.wide and config.get("model_type") == "mpt":
        f = _size(config, "expansion_ratio", default=family.wide) * d
    bias = _flag(config, family.mlp_bias) * ((family.matrices - 1) * f + d)
    slopes = 2 * (config.get("model_type") == "apertus")  # of its activation, xIELU
    return Layer(_block("feedforward", family, d, f), bias + slopes, inner=f)


def _experts(config: Config, family: Family, d: int) -> Layer:
    """A mixture (DeepSeekMoE, arXiv:2401.06066 section 3)."""
    experts, chosen = _expert_count(config), _top_k(config)
    f = _size(config, family.expert_size)
    matrices = [*_block("expert", family, d, f, experts, chosen), Matrix("router", d, experts)]
    if family.experts == "qwen":
        shared = _size(config, "shared_expert_intermediate_size", default=0, least=0)
        matrices += [Matrix("router", d, 1)] * bool(shared)  # the shared expert's own gate
    else:
        shared = f * _size(config, "n_shared_experts", default=family.shared, least=0)
    if shared:
        matrices += _block("feedforward", family, d, shared)
    each = family.oss * (2 * f + d)
    biases = d * (family.attention == "moa") + family.oss * experts + experts * each
    return Layer(tuple(matrices), biases, idle=(experts - chosen) * each, inner=chosen * f + shared)


def _is_sparse(config: Config, family: Family, index: int) -> bool:
    if family.experts == "deepseek":
        if config.get("n_routed_experts") is None:
            return False
        first = _size(config, "first_k_dense_replace", least=0)
        return index >= first and index % _size(config, "moe_layer_freq", default=1) == 0
    if family.experts == "qwen":
        step = _size(config, "decoder_sparse_step", default=1)
        return index not in (config.get("mlp_only_layers") or ()) and (index + 1) % step == 0
    if family.experts == "llama4":
        chosen = config.get("moe_layers")
        if isinstance(chosen, list):
            return index in chosen
        return (index + 1) % _size(config, "interleave_moe_layer_step", default=1) == 0
    return family.experts == "all"


def _expert_count(config: Config) -> int:
    return _size(config, "n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")


def _top_k(config: Config) -> int:
    chosen, experts = _size(config, "num_experts_per_tok", "moe_top_k"), _expert_count(config)
    if chosen > experts:
        raise UserError(
            f"the model's config chooses {chosen} of {experts} experts; lower num_experts_per_tok"
        )
    return chosen


def _window(config: Config, family: Family, index: int) -> int | None:
    kinds, where = config.get("layer_types"), family.window_where
    if family.attention == "dsa":
        return _size(config, "index_topk")
    if isinstance(kinds, list) and index < len(kinds):
        slides = kinds[index] in ("sliding_attention", "chunked_attention")
    elif where == "chunks":
        given = config.get("no_rope_layers")
        rotated = given if isinstance(given, list) else []
        every = _size(config, "no_rope_layer_interval", default=4)
        slides = bool(rotated[index]) if index < len(rotated) else (index + 1) % every != 0
    elif where == "qwen":
        first = _size(config, "max_window_layers", default=28, least=0)
        slides = bool(config.get("use_sliding_window", False)) and index >= first
    elif where == "if_used":
        slides = bool(config.get("use_sliding_window", False))
    elif where.startswith("but_last_of_"):
        every = _size(config, "sliding_window_pattern", default=int(where.rpartition("_")[2]))
        slides = (index + 1) % every != 0
    else:
        slides = where == "all"
    key = "attention_chunk_size" if where == "chunks" else "sliding_window"
    if not slides or config.get(key, family.window) is None:
        return None
    return _size(config, key, default=family.window)


def _outside(config: Config, family: Family, d: int, embed: int, vocab: int) -> Layer:
    """Other parameters: the last norm, a table of positions, OPT-350M's projections of a narrow embedding."""
    projections = (Matrix("outside", embed, d), Matrix("outside", d, embed)) if embed != d else ()
    last_norm = family.norm * d * bool(config.get("do_layer_norm_before", True))
    rows = 0
    if family.positions is not None:
        rows = _size(config, "max_position_embeddings", "n_positions") + family.positions
    vectors = last_norm + rows * d + 2 * d * family.embedding_norm + vocab * _flag(config, family.head_bias)
    return Layer(projections, vectors)
