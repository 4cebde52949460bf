"""The network of a model folder, in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from farthing.base.device import free_memory
from farthing.base.errors import UserError
from farthing.base.heap import keep_freed_memory
from farthing.model import Decoder, ModelConfig
from farthing.model.kernels import packed
from farthing.weights.check import check
from farthing.weights.folder import write_folder
from farthing.weights.layouts import copies, layout_of, meant, places, row_order

# Weights are written unquantised, and `auto_map` names programs, which are not copied.
_NOT_KEPT = ("quantization_config", "auto_map")


def load_decoder(
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    stored: torch.dtype | None = None,
    scores: bool = False,
) -> Decoder:
    """The network of a model folder.

    Args:
        dtype: that it is computed in.
        stored: as in `Decoder`; the weights are rounded to it.
        scores: it is a reward model.

    Raises:
        UserError: as `check` does, and if the weights do not fit into free memory.
    """
    model = check(folder, scores)
    if device == "cpu":
        keep_freed_memory()
    decoder = model.decoder.to(dtype)
    check_memory(folder, decoder, device)
    _allocate(decoder, device)
    decoder.stored = stored
    if model.config.tied_head:
        decoder.head.weight = decoder.embed.weight
    targets = {theirs: (ours, rows) for theirs, ours, rows in places(model.layout, decoder)}
    for name, tensor in model.values():
        if name not in targets:
            continue  # a copy of another tensor, as `check` has made sure
        ours, rows = targets[name]
        order = row_order(model.layout, model.config, name)
        if stored is not None and not ours.endswith("router.bias"):
            tensor = tensor.to(stored)
        with torch.no_grad():
            rows.copy_(tensor if order is None else tensor[order])
    return decoder.eval()


def _allocate(decoder: Decoder, device: str) -> None:
    """Give a network on the meta device memory, not yet filled; tied weights come apart.

    As `to_empty` does, which loads torch's symbolic shapes, and sympy with them, for a third of a second.
    """
    for module in decoder.modules():
        for name, old in module.named_parameters(recurse=False):
            new = torch.empty(old.shape, dtype=old.dtype, device=device)
            setattr(module, name, nn.Parameter(new, old.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))


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


def export_tensors(decoder: Decoder, hf: dict[str, Any]) -> dict[str, Tensor]:
    """The network's weights under its family's names, low-rank updates merged in."""
    layout, config = layout_of(hf), decoder.config
    merged = {}
    for name, module in decoder.named_modules():
        if getattr(module, "lora", None) is not None:
            weight = module.weight.detach()
            merged[f"{name}.weight"] = (weight.float() + module.lora.delta()).to(weight.dtype)
    stored = decoder.stored or decoder.embed.weight.dtype
    out: dict[str, Tensor] = {}
    for theirs, ours, rows in places(layout, decoder, merged):
        if not ours.endswith("router.bias"):  # float32 in every folder
            rows = rows.to(stored)
        order = row_order(layout, config, theirs)
        out[theirs] = rows.contiguous() if order is None else rows[order.argsort()]
    # safetensors refuses two names for one memory
    return out | {theirs: out[original].clone() for theirs, original in copies(layout, config).items()}


def folder_config(hf: dict[str, Any], config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json for this network in `dtype`, with every key that other engines need."""
    name = str(dtype).removeprefix("torch.")
    layout, hf = layout_of(hf), meant(hf, config)
    complete = layout.complete(hf, config) if hasattr(layout, "complete") else hf
    kept = {key: value for key, value in complete.items() if key not in _NOT_KEPT}
    return {**kept, "torch_dtype": name, "dtype": name}


def save_decoder(
    decoder: Decoder,
    hf: dict[str, Any],
    folder: Path,
    tokenizer_from: Path | None,
    chat_template: tuple[str, list[int]] | None = None,
) -> Path:
    """Write an ordinary Hugging Face folder that transformers loads with no missing and no unexpected key.

    `chat_template` as in `write_folder`.
    """
    config = folder_config(hf, decoder.config, decoder.stored or decoder.embed.weight.dtype)
    return write_folder(folder, export_tensors(decoder, hf), config, tokenizer_from, chat_template)
