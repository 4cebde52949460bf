"""Model folders in and out. `load` and `save` are the pair every stage uses."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from farthing.errors import UserError
from farthing.model import Decoder, ModelConfig
from farthing.model.memory import keep_freed_memory
from farthing.weights import llama, qwen
from farthing.weights.folder import read_config, read_tensors, write_folder

LAYOUTS: tuple[ModuleType, ...] = (llama, qwen)

__all__ = ["decoder_config", "export_tensors", "load_decoder", "save_decoder"]


def _layout(hf: dict[str, Any]) -> ModuleType:
    kind = hf.get("model_type")
    for layout in LAYOUTS:
        if kind in layout.MODEL_TYPES:
            return layout
    known = ", ".join(sorted(name for layout in LAYOUTS for name in layout.MODEL_TYPES))
    raise UserError(f"config.json: model_type {kind!r} is not a family Farthing knows; known are {known}")


def decoder_config(hf: dict[str, Any]) -> ModelConfig:
    """The network a config.json describes.

    Raises:
        UserError: for a family or a setting that is not supported, or numbers that cannot be a network.
    """
    layout = _layout(hf)
    try:
        config: ModelConfig = layout.model_config(hf)
    except UserError:
        raise
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"config.json: {error}") from error
    return config


def load_decoder(folder: Path, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> Decoder:
    """The network of a model folder.

    Raises:
        UserError: when a tensor is missing, has the wrong shape or is one this family does not have.
    """
    hf = read_config(folder)
    layout, config = _layout(hf), decoder_config(hf)
    if device == "cpu":
        keep_freed_memory()
    with torch.device("meta"):
        decoder = Decoder(config)
    try:
        decoder.to(dtype).to_empty(device=device)
    except (RuntimeError, MemoryError) as error:
        size = sum(parameter.numel() for parameter in decoder.parameters())
        raise UserError(f"{folder}: there is no memory for its {size:,} parameters on {device}") from error
    if config.tied_head:
        decoder.head.weight = decoder.embed.weight
    parameters = dict(decoder.named_parameters())
    places = {
        theirs: (ours, part)
        for ours, names in layout.tensors(config).items()
        for part, theirs in enumerate(names)
    }
    missing = set(places)
    for name, tensor in read_tensors(folder):
        if name not in places:
            if (name == "lm_head.weight" and config.tied_head) or name.endswith("rotary_emb.inv_freq"):
                continue  # a copy of the tied embedding, or a buffer of old releases: nothing is lost without it
            raise UserError(
                f"{folder}: tensor {name!r} is not part of a {hf['model_type']} model; is config.json its own?"
            )
        ours, part = places[name]
        target = _rows(decoder, ours, parameters[ours], part)
        if target.shape != tensor.shape:
            raise UserError(
                f"{folder}: tensor {name!r} has shape {tuple(tensor.shape)}, config.json asks for {tuple(target.shape)}"
            )
        with torch.no_grad():
            target.copy_(tensor)
        missing.discard(name)
    if missing:
        raise UserError(
            f"{folder}: tensor {min(missing)!r} is missing ({len(missing)} in all); download the folder again"
        )
    return decoder.eval()


def _rows(decoder: Decoder, name: str, parameter: Tensor, part: int) -> Tensor:
    """The rows of a fused parameter that belong to its part number `part`."""
    parts = getattr(decoder.get_submodule(name.rpartition(".")[0]), "parts", (parameter.shape[0],))
    return parameter.detach().split(parts)[part]


def export_tensors(decoder: Decoder, hf: dict[str, Any]) -> dict[str, Tensor]:
    """The network's weights under the names its family's folders use, low-rank updates merged in."""
    merged = dict(decoder.named_parameters())
    for name, module in decoder.named_modules():
        if getattr(module, "lora", None) is not None:
            weight = merged[f"{name}.weight"]
            merged[f"{name}.weight"] = (weight.detach().float() + module.lora.delta()).to(weight.dtype)
    table: dict[str, list[str]] = _layout(hf).tensors(decoder.config)
    return {
        theirs: _rows(decoder, ours, merged[ours], part).contiguous()
        for ours, names in table.items()
        for part, theirs in enumerate(names)
    }


def save_decoder(decoder: Decoder, hf: dict[str, Any], folder: Path, tokenizer_from: Path | None) -> Path:
    """Write an ordinary Hugging Face folder that transformers loads with no missing and no unexpected key."""
    dtype = str(decoder.embed.weight.dtype).removeprefix("torch.")
    config = {**hf, "torch_dtype": dtype, "dtype": dtype}
    return write_folder(folder, export_tensors(decoder, hf), config, tokenizer_from)
