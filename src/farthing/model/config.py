"""The description of a network. Each family's adapter (`farthing.weights`) translates to and from it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al., arXiv:2104.09864) and its scaling to longer contexts.

    `kind` is `default`, `linear` (positions divided by `factor`), `llama3` (low frequencies divided by `factor`, high
    ones kept, a ramp between; Llama 3.1's model card), `yarn` (the same with a ramp over dimensions, and sharper
    attention; Peng et al., arXiv:2309.00071) or `longrope` (each pair's speed divided by its own of `divisors`; Phi-3,
    arXiv:2402.13753). Only a `share` of each head's elements rotates (Phi-4-mini). `table_scale` multiplies cosine and
    sine, `score_scale` the attention scores: DeepSeek keeps the first at 1 and sets the second to m squared
    (arXiv:2405.04434 section 3.1.4).
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # yarn's ramp begins and ends at whole pairs
    divisors: tuple[float, ...] = ()
    share: float = 1.0
    table_scale: float = 1.0
    score_scale: float = 1.0


@dataclass(frozen=True)
class Mla:
    """Widths of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434 section 2.1).

    Keys and values of all heads come from one latent of width `kv_lora_rank`. A head's query and key have `nope_dim`
    elements without position and `rope_dim` with it; its value has `v_dim`. If `q_lora_rank` is None, queries are
    projected directly.

    Raises:
        ValueError: if a width is below 1 or `rope_dim` is odd.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int

    def __post_init__(self) -> None:
        _check_integers(self, "kv_lora_rank", "nope_dim", "rope_dim", "v_dim")
        if self.q_lora_rank is not None:
            _check_integers(self, "q_lora_rank")
        if self.rope_dim % 2:
            raise ValueError(f"qk_rope_head_dim is {self.rope_dim}; rotary embedding needs an even number")

    @property
    def qk_dim(self) -> int:
        """Width of a head's query and key."""
        return self.nope_dim + self.rope_dim

    @property
    def cache_dim(self) -> int:
        """Cached elements per token and layer: the latent and the shared rotated key."""
        return self.kv_lora_rank + self.rope_dim


@dataclass(frozen=True)
class Moe:
    """Mixture of experts, in layers `first_dense` and up (DeepSeekMoE, arXiv:2401.06066; V3's gate, arXiv:2412.19437
    section 2.1.2).

    Each token goes through `shared` experts and `top_k` of `experts` routed ones, each `expert_size` wide, chosen from
    the best `top_groups` of `groups` groups. `scoring` is `sigmoid` or `softmax`. `normalise` divides the chosen scores
    by their sum, and `scale` multiplies them. `bias` adds V3's correction to the choice, not to the gate.
    `router_bias` adds a trained one to the scores' logits. With a `limit` the experts are gpt-oss's, see
    `model.moe.BoundedExperts`.

    Raises:
        ValueError: if the numbers contradict each other, or groups have fewer than two experts.
    """

    experts: int
    top_k: int
    expert_size: int
    shared: int = 1
    groups: int = 1
    top_groups: int = 1
    scoring: str = "sigmoid"
    normalise: bool = True
    scale: float = 1.0
    bias: bool = True
    first_dense: int = 0
    router_bias: bool = False
    limit: float | None = None

    def __post_init__(self) -> None:
        _check_integers(self, "experts", "top_k", "expert_size", "groups", "top_groups")
        _check_integers(self, "shared", "first_dense", least=0)
        if self.scoring not in ("sigmoid", "softmax"):
            raise ValueError(f"scoring_func is {self.scoring!r}; it must be sigmoid or softmax")
        if self.experts % self.groups:
            raise ValueError(f"n_group ({self.groups}) must divide n_routed_experts ({self.experts})")
        if self.top_groups > self.groups:
            raise ValueError(f"topk_group ({self.top_groups}) must not exceed n_group ({self.groups})")
        per_group = self.experts // self.groups
        if self.groups > 1 and per_group < 2:
            raise ValueError(
                f"n_group ({self.groups}) leaves {per_group} of {self.experts} routed experts per group; a group "
                "is scored by its best two, so use fewer groups"
            )
        if self.top_k > per_group * self.top_groups:
            raise ValueError(
                f"num_experts_per_tok ({self.top_k}) exceeds the {per_group * self.top_groups} experts in "
                f"{self.top_groups} groups; lower it or raise topk_group"
            )


def _check_integers(config: object, *names: str, least: int = 1) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a `Decoder`.

    Raises:
        ValueError: if the numbers cannot form a network (heads that do not divide, an odd head width).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float = 1e-5
    rope: Rope = field(default_factory=Rope)
    max_positions: int = 2048
    tied_head: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["", "head", "all"] = (
        ""  # RMSNorm of q and k before rotation: each head (Qwen3), or all (OLMo 2)
    )
    query_scale: float = 1.0  # multiplies the scores, beside head_dim^-1/2
    softcap: float | None = None  # bounds the scores: s becomes softcap * tanh(s / softcap) (Gemma 2)
    sinks: bool = False  # each head has a score of its own for attending to nothing (gpt-oss)
    window: int | None = None  # layers in `sliding` attend to a token and the window - 1 before it (Mistral)
    sliding: tuple[int, ...] = ()
    local_rope: Rope | None = None  # rotation in `sliding` layers, if it is another (Gemma 3)
    norms: Literal["before", "after", "both"] = (
        "before"  # of each half of a layer: its input, its output, both
    )
    centred_norms: bool = False  # norms multiply by 1 + weight (Gemma)
    activation: Literal["silu", "gelu"] = "silu"  # gelu by its tanh approximation
    embed_scale: float = 1.0
    logit_softcap: float | None = None
    mla: Mla | None = None  # replaces grouped-query attention; num_kv_heads and head_dim are then unused
    moe: Moe | None = None
    mtp_depth: int = 0  # multi-token prediction modules (arXiv:2412.19437 section 2.2)
    scores: bool = False  # a reward model: its head is one row, which gives a text's score

    def __post_init__(self) -> None:
        _check_integers(self, "vocab_size", "hidden_size", "intermediate_size", "num_layers")
        _check_integers(self, "num_heads", "num_kv_heads", "head_dim")
        _check_integers(self, "mtp_depth", least=0)
        for name, number in (("rms_eps", self.rms_eps), ("rope theta", self.rope.theta)):
            if not isinstance(number, int | float) or not number > 0:
                raise ValueError(f"{name} is {number!r}; it must be a number above 0")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads ({self.num_kv_heads}) must divide num_heads ({self.num_heads}); correct config.json"
            )
        if self.sliding:
            _check_integers(self, "window")
        if self.mla is None and self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embedding needs an even number")

    @property
    def rotary_dim(self) -> int:
        """Number of rotated elements per head."""
        return self.mla.rope_dim if self.mla else self.head_dim

    def window_of(self, layer: int) -> int | None:
        """Return how many tokens a token sees in layer number `layer`, itself included; None for all before it."""
        return self.window if layer in self.sliding else None

    def rope_of(self, layer: int) -> Rope:
        """Return the rotation in layer number `layer`."""
        return self.local_rope if self.local_rope is not None and layer in self.sliding else self.rope

    @property
    def windows(self) -> Counter[int | None]:
        """How many of the decoder's layers have each window."""
        return Counter(map(self.window_of, range(self.num_layers)))

    def is_moe(self, layer: int) -> bool:
        """Return whether layer number `layer` is a mixture of experts; MTP modules follow the last layer."""
        return self.moe is not None and layer >= self.moe.first_dense

    @property
    def moe_layers(self) -> list[int]:
        """Numbers of the decoder layers that are mixtures of experts, without MTP modules."""
        return [layer for layer in range(self.num_layers) if self.is_moe(layer)]
