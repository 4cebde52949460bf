"""One dial: a size or a depth sets every width, rate and length of a model that is trained from scratch.

docs/training.md has the rules and their sources. Each value can be overridden, and the values that depend on it
follow: sizes by the keys of config.json under `model`, the rest by the stage's own keys. No torch here, so
that a plan can ask for a model before there is one.

Legend: C model width, L layers, H heads, G key/value heads, D width of a head, E experts, K of them a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from farthing.base.errors import UserError
from farthing.base.schema import given as value_given
from farthing.base.schema import nearest
from farthing.cost.flops import causal_pairs, forward_flops, parameters

if TYPE_CHECKING:
    from farthing.recipe.pretrain import Pretrain

ASPECT = 64  # width by depth (nanochat's dial)
TOKENS_PER_PARAMETER = 20  # Chinchilla, arXiv:2203.15556
WARMUP = 2000  # DeepSeek-V2 and V3; for short runs a twentieth of the steps
TIED_BELOW = (
    1_000_000_000  # parameters; SmolLM2 and Llama 3.2 1B share embedding and head, DeepSeek-V3 does not
)
MAX_POSITIONS = 2048  # at least, so that a short row length does not forbid chatting
_WIDEST, _DEEPEST = 16_384, 128
_MAY_BE_ZERO = ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers")
_MOST = {"num_hidden_layers": 1000, "num_attention_heads": 10_000, "max_position_embeddings": 10**9}

# (narrowest C, E, K, gate scale): the expert counts for which Moonlight (arXiv:2502.16982, figure 6)
# worked out the scale that keeps the routed experts' sum as large as one expert's output.
MIXTURES = ((0, 16, 2, 1.41), (512, 32, 4, 2.0), (1024, 64, 6, 2.446), (4096, 256, 8, 2.83))


@dataclass(frozen=True)
class Dialled:
    """The dial's result. `tokens` and `batch_tokens` are whole rows and whole steps."""

    config: dict[str, Any]
    """The model's config.json."""
    init_std: float
    lr: float
    batch_tokens: int
    steps: int
    warmup: int

    @property
    def tokens(self) -> int:
        """Tokens trained on, in all steps."""
        return self.steps * self.batch_tokens


def dial(stage: Pretrain, vocab_size: int, bos_id: int | None = None, eos_id: int | None = None) -> Dialled:
    """Turn the dial: the model's config and how to train it.

    Raises:
        UserError: for a size that no model with this vocabulary is close to, a key that the family lacks, a latent
            larger than the cache it replaces, and a row longer than the model's positions.
    """
    config = _model(stage, vocab_size)
    config |= {"bos_token_id": bos_id, "eos_token_id": eos_id}
    if stage.length > config["max_position_embeddings"]:
        raise UserError(
            f"length ({stage.length}) is more than max_position_embeddings ({config['max_position_embeddings']}); "
            "lower length or raise model.max_position_embeddings"
        )
    tokens = stage.tokens or TOKENS_PER_PARAMETER * parameters(config).active
    compute = training_flops(config, stage.length) * tokens
    batch = stage.batch_tokens or best_batch(compute)
    lr = stage.lr or best_rate(compute)
    rows = max(1, round(batch / stage.length))
    steps = max(1, round(tokens / (rows * stage.length)))
    warmup = min(WARMUP, math.ceil(steps / 20)) if stage.warmup is None else min(stage.warmup, steps)
    return Dialled(config, config["initializer_range"], lr, rows * stage.length, steps, warmup)


def best_batch(flops: float) -> float:
    """Tokens of the best batch for a run of so many non-embedding FLOPs (DeepSeek LLM, arXiv:2401.02954, eq. 1)."""
    return 0.2920 * flops**0.3271


def best_rate(flops: float) -> float:
    """Best learning rate for a run of so many non-embedding FLOPs (DeepSeek LLM, arXiv:2401.02954, eq. 1)."""
    return 0.3118 * flops**-0.1250


def training_flops(config: dict[str, Any], length: int) -> float:
    """FLOPs of training on one token, embedding and head left out (M in arXiv:2401.02954, section 3.2)."""
    return 3 * forward_flops(config, length, causal_pairs(length), 0) / length


def _model(stage: Pretrain, vocab_size: int) -> dict[str, Any]:
    overrides: dict[str, Any] = {**stage.model, "vocab_size": vocab_size}
    _check_overrides(stage)
    fixed_width, fixed_depth = overrides.get("hidden_size"), overrides.get("num_hidden_layers")
    if stage.depth is not None:
        depth = fixed_depth or stage.depth
        config = _rules(stage, fixed_width or ASPECT * depth, depth, overrides, tied=True)
        if parameters(config).total >= TIED_BELOW:
            config = _rules(stage, fixed_width or ASPECT * depth, depth, overrides, tied=False)
        return config
    assert stage.size is not None
    return _nearest_model(stage, stage.size, overrides, fixed_width, fixed_depth)


def _check_overrides(stage: Pretrain) -> None:
    """Refuse a key of `model` that the family lacks or that is fixed, and a value that can be none of its values.

    Raises:
        UserError: that names the key.
    """
    known = _rules(stage, 256, 4, {}, tied=True)
    for key, value in stage.model.items():
        if key not in known or key in ("model_type", "architectures", "vocab_size"):
            hint = nearest(key, list(known)) or f"it has {', '.join(known)}"
            raise UserError(f"model.{key}: a {stage.family} model has no such key to set; {hint}")
        usual = known[key]
        if key == "q_lora_rank" and value is None:
            continue
        if isinstance(usual, bool):
            fits, wanted = isinstance(value, bool), "true or false"
        elif isinstance(usual, int) or key == "q_lora_rank":
            least, most = 0 if key in _MAY_BE_ZERO else 1, _MOST.get(key, 1_000_000)
            fits = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
            wanted = f"a whole number of at least {least} and at most {most:,}"
        elif isinstance(usual, float):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            fits, wanted = number and 0 < value <= 1e30, "a number above 0 and at most 1e30"  # type: ignore[operator]
        else:
            fits, wanted = value == usual, f"{usual!r}, which is fixed"
        if not fits:
            raise UserError(f"model.{key}: must be {wanted}, not {value_given(value)}")
    built = _rules(stage, _WIDEST, 4, stage.model, tied=True)  # wide, so that any latent is small beside it
    for key, value in stage.model.items():
        if built[key] != value:
            raise UserError(
                f"model.{key}: is {value_given(built[key])} in every {stage.family} model; leave it out"
            )


def _nearest_model(
    stage: Pretrain, size: int, overrides: dict[str, Any], width: Any, depth: Any
) -> dict[str, Any]:
    """The shape nearest to this many parameters, its depth within half and twice what the aspect asks for."""
    best: tuple[float, dict[str, Any]] | None = None
    for c in [width] if width else (*range(ASPECT, 512, ASPECT // 2), *range(512, _WIDEST + 1, ASPECT)):
        middle = c / ASPECT
        first, last = max(1, math.ceil(middle * 0.75)), max(2, int(middle * 1.5))
        for layers in [depth] if depth else range(first, min(last, _DEEPEST) + 1):
            config = _rules(stage, c, layers, overrides, tied=size < TIED_BELOW)
            total = parameters(config).total
            off = abs(math.log(total / size))
            # Within a tenth of the size the shape decides: nearest to the aspect.
            cost = max(off, 0.1) + 0.01 * abs(math.log(layers / middle))
            if best is None or cost < best[0]:
                best = (cost, config)
            if total > 2 * size:
                break
        if c != width and parameters(_rules(stage, c, 1, overrides, tied=True)).total > 2 * size:
            break
    assert best is not None
    total = parameters(best[1]).total
    if abs(math.log(total / size)) > math.log(1.35):
        table = best[1]["vocab_size"] * best[1]["hidden_size"]
        raise UserError(
            f"size: the nearest {stage.family} model has {total:,} parameters, not {size:,} "
            f"({table:,} of them the embedding of {best[1]['vocab_size']:,} entries); change size, vocab_size or model"
        )
    return best[1]


def _rules(
    stage: Pretrain, width: int, depth: int, overrides: dict[str, Any], *, tied: bool
) -> dict[str, Any]:
    """The config.json for a width and a depth; overrides are kept and the rest follows from them."""

    def given(key: str, value: Any) -> Any:
        return overrides.get(key, value)

    c = int(given("hidden_size", width))
    # heads divide the width, without which transformers refuses a llama
    head = 32 if c < 512 else 64 if c < 2048 or c % 128 else 128
    heads = given("num_attention_heads", max(1, c // head))
    # Llama 3's four query heads for each key/value head, as far as it divides.
    groups = max(g for g in range(1, max(1, heads // 4) + 1) if heads % g == 0)
    feedforward = 8 * c / 3  # SwiGLU's three matrices hold what two of 4 C would (arXiv:2002.05202)
    config: dict[str, Any] = {
        "vocab_size": given("vocab_size", 8192),
        "hidden_size": c,
        "num_hidden_layers": given("num_hidden_layers", depth),
        "num_attention_heads": heads,
        "hidden_act": "silu",
        "max_position_embeddings": given("max_position_embeddings", max(MAX_POSITIONS, stage.length)),
        "rms_norm_eps": given("rms_norm_eps", 1e-6),
        "rope_theta": given("rope_theta", 10_000.0),
        "tie_word_embeddings": given("tie_word_embeddings", tied),
        "attention_bias": False,
        # DeepSeek-V3's 0.006 at its width of 7,168, growing as narrower matrices need it to.
        "initializer_range": given("initializer_range", round(0.5 / math.sqrt(c), 6)),
    }
    if stage.family == "llama":
        return config | {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "intermediate_size": given("intermediate_size", _rounded(feedforward, 64)),
            "num_key_value_heads": given("num_key_value_heads", groups),
            "head_dim": given("head_dim", head),
        }
    config |= _mixture(stage, c, feedforward, given)
    if stage.family == "moe":
        return config | {
            "model_type": "glm4_moe",
            "architectures": ["Glm4MoeForCausalLM"],
            "num_key_value_heads": given("num_key_value_heads", groups),
            "head_dim": given("head_dim", head),
            "partial_rotary_factor": 1.0,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": config["rope_theta"],
                "partial_rotary_factor": 1.0,
            },
            "use_qk_norm": False,
        }
    return config | _latent(stage, c, head, heads, groups, given)


def _mixture(stage: Pretrain, c: int, feedforward: float, given: Any) -> dict[str, Any]:
    """DeepSeekMoE with V3's gate: a token's experts together are as wide as a dense layer's feed-forward."""
    experts, top_k, scale = next(m[1:] for m in reversed(MIXTURES) if c >= m[0])
    top_k, shared = given("num_experts_per_tok", top_k), given("n_shared_experts", 1)
    expert = given("moe_intermediate_size", _rounded(feedforward / (top_k + shared), 32))
    return {
        "intermediate_size": given("intermediate_size", (top_k + shared) * expert),
        "moe_intermediate_size": expert,
        "n_routed_experts": given("n_routed_experts", experts),
        "n_shared_experts": shared,
        "num_experts_per_tok": top_k,
        "first_k_dense_replace": given("first_k_dense_replace", 1),
        "n_group": given("n_group", 1),
        "topk_group": given("topk_group", 1),
        "norm_topk_prob": True,
        "routed_scaling_factor": given("routed_scaling_factor", scale),
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "aux_loss_alpha": stage.balance,
        "seq_aux": True,
    }


def _latent(stage: Pretrain, c: int, head: int, heads: int, groups: int, given: Any) -> dict[str, Any]:
    """Multi-head latent attention in V2-Lite's proportions, its cache below that of grouped queries."""
    rope = given("qk_rope_head_dim", head // 2)
    replaced = 2 * groups * head
    rank = given("kv_lora_rank", min(4 * head, replaced - head))
    if isinstance(rank, int) and isinstance(rope, int) and rank + rope > max(replaced, 2 * head):
        raise UserError(
            f"model.kv_lora_rank: a latent of {rank} and {rope} rotated elements a token is more than the {replaced} "
            f"that {groups} key/value heads of {head} would keep; lower it to {replaced - rope} or less"
        )
    return {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_key_value_heads": heads,
        "q_lora_rank": given("q_lora_rank", _rounded(0.21 * c, 64) if c >= 4096 else None),
        "kv_lora_rank": rank,
        "qk_nope_head_dim": given("qk_nope_head_dim", head),
        "qk_rope_head_dim": rope,
        "v_head_dim": given("v_head_dim", head),
        "rope_interleave": True,
        "rope_scaling": None,
        "num_nextn_predict_layers": stage.mtp_depth,
    }


def _rounded(value: float, step: int) -> int:
    return max(step, round(value / step) * step)
