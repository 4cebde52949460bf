"""The families that Farthing reads and writes, and where each of a network's parameters lies in their folders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from torch import Tensor

from farthing.base.errors import UserError
from farthing.base.schema import given
from farthing.model import Decoder, ModelConfig
from farthing.model.moe import Experts
from farthing.weights import deepseek, gemma, glm, gpt_oss, llama, mixtral, olmo, phi, qwen
from farthing.weights.settings import Settings

LAYOUTS: tuple[ModuleType, ...] = (llama, qwen, mixtral, phi, gemma, olmo, gpt_oss, deepseek, glm)
SCORE = "score.weight"  # the head of a reward model, in every family
ALIASES = {"kimi_k2": "deepseek_v3"}  # other names of a family: Kimi K2 is DeepSeek-V3 with other sizes


def family(hf: Mapping[str, Any]) -> str:
    """The model type of a config.json under its family's own name."""
    kind = hf.get("model_type")
    return ALIASES.get(kind, kind) if isinstance(kind, str) else str(kind)


def layout_of(hf: Mapping[str, Any]) -> ModuleType:
    """The layout of a config.json's family. Raises UserError for a family that is not supported."""
    for layout in LAYOUTS:
        if family(hf) in layout.MODEL_TYPES:
            return layout
    known = ", ".join(sorted(name for layout in LAYOUTS for name in layout.MODEL_TYPES))
    raise UserError(
        f"config.json: model_type {given(hf.get('model_type'))} is not a supported family; supported are {known}"
    )


def decoder_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The network that a config.json describes, as transformers understands it.

    Raises:
        UserError: for a family or a setting that is not supported, or numbers that cannot be a network.
    """
    layout = layout_of(hf)
    settings = Settings({**hf, "model_type": family(hf)}, layout.DEFAULTS[family(hf)])
    settings.check_token_ids()
    settings.check_unused()
    try:
        config: ModelConfig = layout.model_config(settings)
    except UserError:
        raise
    except ValueError as error:  # of ModelConfig and its parts
        raise UserError(f"config.json: {error}") from error
    return config


def meant(hf: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """A config.json as its folder's tensors mean it: under the family's own name, with the head and the prediction
    modules that are there."""
    found = {**hf, "model_type": family(hf)}
    if bool(hf.get("tie_word_embeddings")) != config.tied_head:
        found["tie_word_embeddings"] = config.tied_head
    if found.pop("num_mtp_layers", None) is not None or "num_nextn_predict_layers" in hf:
        found["num_nextn_predict_layers"] = config.mtp_depth
    return found


def copies(layout: ModuleType, config: ModelConfig) -> dict[str, str]:
    """Tensors on disk that repeat another one, and which."""
    found: dict[str, str] = layout.copies(config) if hasattr(layout, "copies") else {}
    return found


def row_order(layout: ModuleType, config: ModelConfig, theirs: str) -> Tensor | None:
    """For each row of a tensor here, its row on disk; None if the order is the same."""
    order: Tensor | None = layout.row_order(config, theirs) if hasattr(layout, "row_order") else None
    return order


def places(
    layout: ModuleType, decoder: Decoder, replaced: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[str, str, Tensor]]:
    """For each tensor on disk: its name, the parameter it is part of, and the rows of the parameter that it is.

    `replaced` holds other values for some parameters.
    """
    parameters = {**dict(decoder.named_parameters()), **(replaced or {})}
    table = layout.tensors(decoder.config) | ({"head.weight": [SCORE]} if decoder.config.scores else {})
    for ours, names in table.items():
        for theirs, rows in zip(names, _parts(decoder, ours, parameters[ours], len(names)), strict=True):
            yield theirs, ours, rows


def _parts(decoder: Decoder, name: str, parameter: Tensor, count: int) -> tuple[Tensor, ...]:
    """A fused parameter cut into what is joined in it, one below another, unless the disk joins it too."""
    module = decoder.get_submodule(name.rpartition(".")[0])
    if count == 1 and not isinstance(module, Experts):
        return (parameter.detach(),)
    flat = parameter.detach().flatten(0, -2) if parameter.dim() > 2 else parameter.detach()
    if isinstance(module, Experts):
        return flat.split(module.inner if name.endswith("gate_up") else parameter.shape[1])
    parts: tuple[Tensor, ...] = flat.split(getattr(module, "parts", (len(flat),)))
    return parts
