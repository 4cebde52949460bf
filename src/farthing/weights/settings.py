"""A config.json as transformers understands it: a family's defaults, every value checked, nothing assumed.

Folders are written by other people's programs. A value of the wrong type, an impossible number and a setting that
would change the computation, but is not built here, are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from farthing.base.errors import UserError
from farthing.model.rotary import KINDS

LARGEST = 2**31 - 1  # of a whole number: ids and sizes are 32-bit in every engine
_SHOWN = 60  # characters of a value in a message
_TYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")  # of stored weights

# Settings that change what a network computes, with the values that leave it as it is built here.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (None, False),
    "alibi": (None, False),
    "attention_chunk_size": (None,),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "attn_output_gate": (None, False),
    "attn_temperature_tuning": (None, False),
    "clip_qkv": (None,),
    "embedding_multiplier": (None, 1),
    "final_logit_softcapping": (None,),
    "index_topk": (None,),
    "is_causal": (None, True),
    "is_encoder_decoder": (None, False),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "mlp_only_layers": (None, []),
    "n_routed_experts": (None, 0),
    "no_rope_layer_interval": (None, 0),
    "no_rope_layers": (None, []),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "parallel_attn": (None, False),
    "qk_layernorm": (None, False),
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": (None, 1),
    "rotary_dim": (None,),
    "rotary_pct": (None, 1),
    "scale_depth": (None,),
    "scale_emb": (None, 1),
    "swiglu_limit": (None,),
    "text_config": (None,),  # of a model that sees: transformers reads other keys there
    "use_bidirectional_attention": (None, False),
    "use_parallel_residual": (None, False),
    "use_qk_norm": (None, False),
}


class Settings(Mapping[str, Any]):
    """The keys of a config.json over its family's defaults.

    A getter returns the value that transformers would use, or raises UserError that names the key.
    """

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any], where: str = "") -> None:
        self._values = {**defaults, **given}
        self._where = f"{where}." if where else ""

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Any:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def over(self, **values: Any) -> Settings:
        """These settings with some values replaced."""
        return Settings({**self._values, **values}, {})

    def whole(self, key: str, least: int = 1) -> int:
        """A whole number of at least `least`."""
        value = self._wanted(key)
        if type(value) is not int or not least <= value <= LARGEST:
            largest = f" and at most {LARGEST:,}" if type(value) is int and value > LARGEST else ""
            raise self._refuse(key, f"a whole number of at least {least}{largest}")
        return value

    def whole_or(self, key: str, otherwise: int, least: int = 1) -> int:
        """`whole`, or `otherwise` where the key is missing or null."""
        return otherwise if self._values.get(key) is None else self.whole(key, least)

    def number(self, key: str, above: float = 0.0) -> float:
        """A finite number above `above`."""
        value = self._wanted(key)
        if type(value) not in (int, float) or not above < value < 1e38:  # NaN compares false
            raise self._refuse(key, f"a number above {above:g}" if above >= 0 else "a number of at least 0")
        return float(value)

    def number_or(self, key: str, otherwise: float, above: float = 0.0) -> float:
        """`number`, or `otherwise` where the key is missing or null."""
        return otherwise if self._values.get(key) is None else self.number(key, above)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """So many finite numbers above 0."""
        values = self._wanted(key)
        if (
            not isinstance(values, list)
            or len(values) != count
            or not all(type(value) in (int, float) and 0 < value < 1e38 for value in values)
        ):
            raise self._refuse(key, f"a list of {count} numbers above 0")
        return tuple(map(float, values))

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self._wanted(key)
        if type(value) is not bool:
            raise self._refuse(key, "true or false")
        return value

    def choice(self, key: str, *known: str) -> str:
        """One of the words `known`."""
        value = self._wanted(key)
        if value not in known if isinstance(value, str) else True:
            raise UserError(
                f"config.json: {self._where}{key} {self._shown(key)} is not supported; supported: {', '.join(known)}"
            )
        return str(value)

    def mapping(self, key: str) -> dict[str, Any]:
        """A mapping; empty where the key is missing or null."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self._refuse(key, "a mapping or null")
        return dict(value or {})

    def check_token_ids(self) -> None:
        """Refuse ids of special tokens that are no ids: transformers, vLLM and our own chat read them."""
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = self._values.get(key)
            ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
            if not all(one is None or (type(one) is int and -1 <= one <= LARGEST) for one in ids):
                raise self._refuse(key, "the number of a token, or null")
        padding, size = self._values.get("pad_token_id"), self._values.get("vocab_size")
        if padding is not None and type(size) is int and padding >= size:
            raise self._refuse("pad_token_id", f"below the {size} of vocab_size, or null")

    def check_unused(self) -> None:
        """Refuse what transformers refuses to read, though it changes nothing here: a folder stays a stock folder."""
        for key in ("output_router_logits", "use_cache"):
            if key in self._values:
                self.flag(key)
        if "initializer_range" in self._values:
            self.number("initializer_range", above=-1e-9)
        for key in ("dtype", "torch_dtype"):
            if self._values.get(key) is not None:
                self.choice(key, *_TYPES)

    def refuse_unbuilt(self, *built: str) -> None:
        """Refuse settings that change the computation and are not built here; `built` are the family's own."""
        for key, neutral in _NEUTRAL.items():
            value = self._values.get(key)
            if key not in built and value not in neutral:
                raise UserError(
                    f"config.json: {key} is {self._shown(key)}, which changes what the model computes and is not "
                    "supported; use a model without it"
                )

    def _wanted(self, key: str) -> Any:
        if key not in self._values:
            raise UserError(f"config.json has no {self._where + key!r}; download the model's folder again")
        return self._values[key]

    def _shown(self, key: str) -> str:
        said = repr(self._values[key])
        return said if len(said) <= _SHOWN else f"{said[:_SHOWN]}…"

    def _refuse(self, key: str, wanted: str) -> UserError:
        return UserError(f"config.json: {self._where}{key} is {self._shown(key)}; it must be {wanted}")


PARTIAL = ("phi3", "glm4_moe")  # families that may rotate a part of each head
_ROPE_KEYS = frozenset(
    {
        "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
        "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate", "finetuned", "short_factor", "long_factor",
    }
)  # fmt: skip


def rope_key(hf: Mapping[str, Any]) -> str:
    """The key whose rotary settings count: of two that disagree transformers takes `rope_scaling`."""
    return "rope_parameters" if hf.get("rope_scaling") in (None, {}) else "rope_scaling"


def rope_settings(settings: Settings) -> tuple[str, Settings]:
    """The kind of rotary scaling and its settings, from `rope_parameters` (transformers 5) or `rope_theta` and
    `rope_scaling` (4 and before), completed as transformers completes them.

    Raises:
        UserError: for an unsupported scaling or key, and for rotation of a part of each head in other families than
            `PARTIAL`.
    """
    name = rope_key(settings)
    given = settings.mapping(name)
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in settings:
            given.setdefault(key, settings[key])
    given["rope_type"] = given.get("rope_type") or given.get("type") or "default"
    phi = settings["model_type"] == "phi3"
    kind = Settings(given, {}, name).choice(
        "rope_type", *(kind for kind in KINDS if phi or kind != "longrope")
    )
    if kind in ("llama3", "yarn", "longrope"):
        if "original_max_position_embeddings" in settings:
            given["original_max_position_embeddings"] = settings["original_max_position_embeddings"]
        if "original_max_position_embeddings" not in given:
            given["original_max_position_embeddings"] = settings["max_position_embeddings"]
    if unknown := sorted(given.keys() - _ROPE_KEYS):
        raise UserError(
            f"config.json: {name}.{unknown[0]} is not supported, and would change the rotary embedding; use a model "
            "without it"
        )
    found = Settings(given, {}, name)
    if found.get("partial_rotary_factor", 1.0) != 1.0 and settings["model_type"] not in PARTIAL:
        raise UserError(
            "config.json: only partial_rotary_factor 1.0 is supported in this family, which rotates whole heads"
        )
    return kind, found


def rope_by_kind(settings: Settings, kind: str, theta: float, local: bool = False) -> Settings:
    """These settings with one rotation, that of layers of this `kind` (`full_attention` or `sliding_attention`), where
    `rope_parameters` has one for each.

    Args:
        theta: its rotary base if it states none.
        local: it has no scaling but its own; an older `rope_scaling` is the full layers'.

    Raises:
        UserError: for `rope_parameters` that are not by kind.
    """
    by_kind = settings.mapping("rope_parameters")
    if by_kind.keys() - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"config.json: rope_parameters of a {settings['model_type']} must be a mapping of full_attention and "
            "sliding_attention to their own settings"
        )
    own = Settings(by_kind, {}, "rope_parameters").mapping(kind)
    if not local:
        own |= settings.mapping("rope_scaling")
    own.setdefault("rope_theta", theta)
    return settings.over(rope_parameters=own, rope_scaling=None)


def yarn_scales(found: Settings, factor: float) -> tuple[float, float]:
    """YaRN's factor for the tables and, in DeepSeek's attention, for the scores (arXiv:2309.00071 eq. 15;
    DeepSeek-V2, arXiv:2405.04434 section 3.1.4)."""

    def m(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    over, under = (found.number_or(key, 0.0, above=-1e-9) for key in ("mscale", "mscale_all_dim"))
    derived = m(over) / m(under) if over and under else m(1.0)
    return found.number_or("attention_factor", derived), m(under) ** 2 if under else 1.0
