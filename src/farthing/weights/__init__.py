"""Model folders in and out: the functions that every stage loads and saves with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from farthing.base.device import free_memory, keep_freed_memory
from farthing.base.errors import UserError
from farthing.model import Decoder, ModelConfig
from farthing.model.kernels import packed
from farthing.model.moe import Experts
from farthing.weights import deepseek, glm, llama, qwen
from farthing.weights.folder import read_config, read_tensors, write_folder
from farthing.weights.fp8 import read_dequantised

LAYOUTS: tuple[ModuleType, ...] = (llama, qwen, deepseek, glm)

__all__ = ["decoder_config", "export_tensors", "folder_config", "load_decoder", "save_decoder"]


def _layout(hf: dict[str, Any]) -> ModuleType:
    kind = hf.get("model_type")
    for layout in LAYOUTS:
        if kind in layout.MODEL_TYPES:
            return layout
    known = ", ".join(sorted(name for layout in LAYOUTS for name in layout.MODEL_TYPES))
    raise UserError(f"config.json: model_type {kind!r} is not a supported family; supported are {known}")


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


def load_decoder(
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    stored: torch.dtype | None = None,
) -> Decoder:
    """The network of a model folder.

    Args:
        dtype: that it is computed in.
        stored: as in `Decoder`; the weights are rounded to it.

    Raises:
        UserError: if a tensor is missing, has the wrong shape or does not belong to this family, and if the weights
        do not fit into free memory.
    """
    hf = read_config(folder)
    layout, config = _layout(hf), decoder_config(hf)
    if device == "cpu":
        keep_freed_memory()
    with torch.device("meta"):
        decoder = Decoder(config).to(dtype)
    check_memory(folder, decoder, device)
    decoder.to_empty(device=device)
    decoder.stored = stored
    if config.tied_head:
        decoder.head.weight = decoder.embed.weight
    parameters = dict(decoder.named_parameters())
    places = {
        theirs: (ours, part)
        for ours, names in layout.tensors(config).items()
        for part, theirs in enumerate(names)
    }
    ignored = {*_copies(layout, config), *(["lm_head.weight"] if config.tied_head else [])}
    missing = set(places)
    read = read_dequantised(folder) if "quantization_config" in hf else read_tensors(folder)
    for name, tensor in read:
        if name not in places:
            if name in ignored or name.endswith("rotary_emb.inv_freq") or not tensor.numel():
                # a copy of a shared tensor, a buffer of old releases, or the shared experts of a model without any
                continue
            raise UserError(
                f"{folder}: tensor {name!r} is not part of a {hf['model_type']} model; is config.json its own?"
            )
        ours, part = places[name]
        target = _rows(decoder, ours, parameters[ours], part)
        if target.shape != tensor.shape:
            raise UserError(
                f"{folder}: tensor {name!r} has shape {tuple(tensor.shape)}, config.json asks for {tuple(target.shape)}"
            )
        order = _row_order(layout, config, name)
        if stored is not None and not ours.endswith("router.bias"):
            tensor = tensor.to(stored)
        with torch.no_grad():
            target.copy_(tensor if order is None else tensor[order])
        missing.discard(name)
    if (
        missing
        and {places[name][0].partition(".")[0] for name in missing} == {"mtp"}
        and len(missing) == sum(ours.startswith("mtp.") for ours, _ in places.values())
    ):
        # transformers writes one prediction module into every config.json and none into the weights
        decoder.mtp = torch.nn.ModuleList()
        decoder.config = replace(config, mtp_depth=0)
        missing.clear()
    if missing:
        raise UserError(
            f"{folder}: tensor {min(missing)!r} is missing ({len(missing)} in all); download the folder again"
        )
    return decoder.eval()


def check_memory(folder: Path, decoder: Decoder, device: str) -> None:
    """Refuse a network whose weights exceed free memory, before any is allocated. On a CPU that
    packs its weights to sample (`kernels.packed`) they are there twice.

    Raises:
        UserError: that says what it needs, what is free and what would fit.
    """
    count = sum(parameter.numel() for parameter in decoder.parameters())

    def each(dtype: torch.dtype) -> int:
        """Bytes of a parameter."""
        return dtype.itemsize * (2 if packed.KERNEL.status(torch.device(device), dtype).on else 1)

    own, free = each(decoder.embed.weight.dtype), free_memory(device)
    if count * own <= free:
        return
    fits = f"a model of {free / own / 1e9:.2g} B parameters would fit"
    narrow = each(torch.bfloat16)
    if narrow < own and count * narrow <= free:
        fits = f"it would fit with dtype: bfloat16 ({count * narrow / 1e9:.1f} GB), and {fits}"
    raise UserError(
        f"{folder}: its {count / 1e9:.2g} B parameters take {count * own / 1e9:.1f} GB on {device} in "
        f"{str(decoder.embed.weight.dtype).removeprefix('torch.')}, {free / 1e9:.1f} GB are free; {fits}"
    )


def _copies(layout: ModuleType, config: ModelConfig) -> dict[str, str]:
    copies: dict[str, str] = layout.copies(config) if hasattr(layout, "copies") else {}
    return copies


def _row_order(layout: ModuleType, config: ModelConfig, theirs: str) -> Tensor | None:
    order: Tensor | None = layout.row_order(config, theirs) if hasattr(layout, "row_order") else None
    return order


def _rows(decoder: Decoder, name: str, parameter: Tensor, part: int) -> Tensor:
    """The rows of a fused parameter that belong to its part number `part`; stacked matrices lie one below another."""
    module = decoder.get_submodule(name.rpartition(".")[0])
    flat = parameter.detach().flatten(0, -2) if parameter.dim() > 2 else parameter.detach()
    if isinstance(module, Experts):
        return flat.split(module.inner if name.endswith("gate_up") else parameter.shape[1])[part]
    return flat.split(getattr(module, "parts", (len(flat),)))[part]


def export_tensors(decoder: Decoder, hf: dict[str, Any]) -> dict[str, Tensor]:
    """The network's weights under its family's names, low-rank updates merged in."""
    layout, config = _layout(hf), decoder.config
    merged = dict(decoder.named_parameters())
    for name, module in decoder.named_modules():
        if getattr(module, "lora", None) is not None:
            weight = merged[f"{name}.weight"]
            merged[f"{name}.weight"] = (weight.detach().float() + module.lora.delta()).to(weight.dtype)
    stored = decoder.stored or decoder.embed.weight.dtype
    out: dict[str, Tensor] = {}
    for ours, names in layout.tensors(config).items():
        for part, theirs in enumerate(names):
            rows = _rows(decoder, ours, merged[ours], part)
            if not ours.endswith("router.bias"):  # float32 in every folder
                rows = rows.to(stored)
            order = _row_order(layout, config, theirs)
            out[theirs] = rows.contiguous() if order is None else rows[order.argsort()]
    # safetensors refuses two names for one memory
    return out | {theirs: out[original].clone() for theirs, original in _copies(layout, config).items()}


def folder_config(hf: dict[str, Any], config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json for this network in `dtype`, with every key that other engines need."""
    name = str(dtype).removeprefix("torch.")
    layout = _layout(hf)
    complete = layout.complete(hf, config) if hasattr(layout, "complete") else hf
    kept = {key: value for key, value in complete.items() if key != "quantization_config"}
    return {**kept, "torch_dtype": name, "dtype": name}


def save_decoder(decoder: Decoder, hf: dict[str, Any], folder: Path, tokenizer_from: Path | None) -> Path:
    """Write an ordinary Hugging Face folder that transformers loads with no missing and no unexpected key."""
    config = folder_config(hf, decoder.config, decoder.stored or decoder.embed.weight.dtype)
    return write_folder(folder, export_tensors(decoder, hf), config, tokenizer_from)
