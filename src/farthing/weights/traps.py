"""Fifteen ways in which engines read the same DeepSeek folder differently, and which of them a folder walks into.

Each was found in an engine's source, an issue or a run of it; tests/weights/test_traps.py demonstrates them by number.
What a folder cannot show is in the list too, with what Farthing does about it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from farthing.base.errors import UserError
from farthing.weights.folder import read_config
from farthing.weights.fp8 import BLOCK, SCALE
from farthing.weights.settings import rope_key

if TYPE_CHECKING:
    from farthing.weights.check import Checked

LATENT_FAMILIES = ("deepseek_v2", "deepseek_v3")
LATENT_EPS = 1e-6
_BIAS = ".mlp.gate.e_score_correction_bias"


@dataclass(frozen=True)
class Facts:
    """What the checks look at. `least_bias` is the smallest correction bias, `ragged` an FP8 tensor that is no whole
    number of blocks; None without one."""

    config: Mapping[str, Any]
    names: frozenset[str] = frozenset()
    least_bias: float | None = None
    tokenizer_problem: str | None = None
    ragged: str | None = None
    latent: bool = field(init=False)
    gated: bool = field(init=False)

    def __post_init__(self) -> None:
        latent = self.config.get("model_type") in LATENT_FAMILIES
        object.__setattr__(self, "latent", latent)
        object.__setattr__(self, "gated", latent and bool(self.config.get("n_routed_experts")))

    @property
    def rope(self) -> dict[str, Any]:
        """Rotary settings in either spelling."""
        return dict(self.config.get(rope_key(self.config)) or {})

    def count(self, key: str, otherwise: int = 0) -> int:
        """A whole number of the config; `otherwise` where it is missing or something else."""
        value = self.config.get(key)
        return value if type(value) is int and value > 0 else otherwise


@dataclass(frozen=True)
class Trap:
    """`check` gives a sentence for a folder that falls in, None for one that does not; None for `check` itself means
    that no folder shows it. `answer` is what Farthing does."""

    number: int
    name: str
    engines: str
    check: Callable[[Facts], str | None] | None
    answer: str


def facts(model: Checked) -> Facts:
    """Look at a folder that `weights.check` has passed, at its config.json as it is written."""
    from farthing.weights.gguf_vocabulary import tokenizer_metadata

    folder, weights = model.folder, model.weights
    names = frozenset(weights.headers)
    biases = [name for name in weights if name.endswith(_BIAS)]
    scaled = sorted(name for name in weights if name + SCALE in names)
    problem = None
    try:
        tokenizer_metadata(folder, model.config.vocab_size)
    except UserError as error:
        problem = str(error)
    return Facts(
        config=read_config(folder),
        names=names,
        least_bias=min((float(weights[name].min()) for name in biases), default=None),
        tokenizer_problem=problem,
        ragged=next((name for name in scaled if any(map(_ragged, weights.shape(name), BLOCK))), None),
    )


def _ragged(size: int, block: int) -> bool:
    """Whether a side is longer than a block and not a multiple of it."""
    return size > block and size % block > 0


def failed_traps(found: Facts) -> list[tuple[Trap, str]]:
    """The traps a folder falls into, with what happens."""
    said = [(trap, trap.check(found)) for trap in TRAPS if trap.check is not None]
    return [(trap, sentence) for trap, sentence in said if sentence]


# ---- the checks ----


def _keys(f: Facts) -> str | None:
    wanted = ["scoring_func", "topk_method", "moe_layer_freq"] if f.gated else []
    wanted += ["rope_theta", "rope_parameters"] if f.latent else []
    missing = [key for key in wanted if key not in f.config]
    if f.latent and f.rope.get("rope_type", f.rope.get("type", "default")) != "default":
        missing += [] if f.config.get("rope_scaling") else ["rope_scaling"]
    if not missing:
        return None
    return f"config.json lacks {', '.join(missing)}, which others read and replace by defaults of their own"


def _eps(f: Facts) -> str | None:
    eps = f.config.get("rms_norm_eps", LATENT_EPS)
    if not f.latent or eps == LATENT_EPS or not isinstance(eps, float):
        return None
    return f"rms_norm_eps is {eps:g}: the latents are normed with that here, and with 1e-06 in transformers"


def _mask(f: Facts) -> str | None:
    if not f.gated or f.count("n_group", 1) < 2 or f.least_bias is None or f.least_bias >= 0:
        return None
    return f"a correction of {f.least_bias:.3g} can take a score below 0; groups masked with 0 are then chosen instead"


def _groups(f: Facts) -> str | None:
    groups, experts = f.count("n_group", 1), f.count("n_routed_experts")
    if not f.gated or experts >= 2 * groups:
        return None
    return f"{groups} groups of {experts} experts: a group is scored by its best two experts, and has fewer"


def _interleave(f: Facts) -> str | None:
    if not f.latent or f.config.get("rope_interleave", True):
        return None
    return "rope_interleave is false, a key that only transformers reads: others rotate neighbouring rows all the same"


def _yarn(f: Facts) -> str | None:
    kind = f.rope.get("rope_type", f.rope.get("type", "default"))
    if f.config.get("model_type") != "deepseek_v2" or kind != "yarn" or not f.rope.get("mscale_all_dim"):
        return None
    return (
        "mscale_all_dim asks for sharper attention, which is left out: position 0 agrees and later ones drift"
    )


def _kv_heads(f: Facts) -> str | None:
    heads, kv = f.config.get("num_attention_heads"), f.config.get("num_key_value_heads")
    if not f.latent or kv is None or kv == heads:
        return None
    return f"num_key_value_heads is {kv}, not the {heads} of num_attention_heads: heads are repeated once too often"


def _biases(f: Facts) -> str | None:
    if not f.latent:
        return None
    if f.config.get("attention_bias"):
        return "attention_bias is true: q_a, kv_a and o are built without a bias there"
    act = f.config.get("hidden_act", "silu")
    return None if act == "silu" else f"hidden_act is {act}; only silu is built there"


def _mtp(f: Facts) -> str | None:
    layers = f.count("num_hidden_layers")
    if (
        not f.latent
        or layers == 61
        or not any(name.startswith(f"model.layers.{layers}.") for name in f.names)
    ):
        return None
    return (
        f"the prediction module is layer {layers} and only layer 61 is known as one: its tensors are reported as "
        "unexpected and speculation with it fails; the model itself loads"
    )


def _expanded(f: Facts) -> str | None:
    if not f.latent:
        return None
    return "keys and values of the whole history are expanded again for each token, so latents hardly speed it up"


def _tokenizer(f: Facts) -> str | None:
    return f.tokenizer_problem


def _demo(f: Facts) -> str | None:
    if f.least_bias is None or not f.latent or f.config.get("hidden_size") == 7168:
        return None
    return f"the correction bias is only read at hidden_size 7168, and this is {f.config.get('hidden_size')}"


def _fp8(f: Facts) -> str | None:
    if not any(name.endswith(SCALE) for name in f.names):
        return None
    said = "FP8 weights: DeepSeek's script expands them with CUDA and Triton only"
    if f.ragged:
        said += f"; transformers without a GPU reads {f.ragged} in blocks that are not 128 x 128, or stops"
    return said


def _balance(f: Facts) -> str | None:
    if not f.gated or "aux_loss_alpha" in f.config:
        return None
    return (
        "config.json lacks aux_loss_alpha: a trainer that takes it from there trains without a balance loss"
    )


TRAPS = (
    Trap(1, "keys that transformers leaves out", "vLLM, llama.cpp", _keys, "writes every key in both spellings"),
    Trap(2, "epsilon of the latents' norms", "vLLM, llama.cpp", _eps, "norms with 1e-06 and trains with it throughout"),
    Trap(3, "masked groups", "transformers before #45440", _mask, "masks with minus infinity"),
    Trap(4, "groups of one expert", "transformers, torchtitan", _groups, "refuses such a config in one line"),
    Trap(5, "order of rotated rows", "vLLM, llama.cpp", _interleave, "reads and writes neighbouring pairs only"),
    Trap(6, "yarn's factor m squared", "transformers before #47435", _yarn, "multiplies the scores by it under yarn"),
    Trap(7, "number of key-value heads", "transformers", _kv_heads, "writes the number of heads, refuses another"),
    Trap(8, "biases and activations", "vLLM", _biases, "builds latent attention without biases"),
    Trap(9, "prediction modules", "transformers", _mtp, "trains, saves and speculates with them at any depth"),
    Trap(10, "latents expanded at each token", "transformers", _expanded, "decodes in the absorbed form"),
    Trap(
        11, "precision of the router", "DeepSeek's demo, vLLM", None,
        "routes in float32, and replays the sampler's choices when it trains on samples",
    ),
    Trap(12, "a tokenizer without a name", "llama.cpp", _tokenizer, "trains tokenizers that cut text in a known way"),
    Trap(13, "a correction that is not read", "DeepSeek's demo", _demo, "reads it at any size, and norms gates safely"),
    Trap(14, "FP8 without a GPU", "DeepSeek's script, transformers", _fp8, "expands it on the CPU (--to hf-bf16)"),
    Trap(15, "a balance loss that vanishes", "Megatron-Bridge", _balance, "takes it from the recipe, and writes it"),
)  # fmt: skip
