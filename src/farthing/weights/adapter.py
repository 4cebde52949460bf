"""LoRA folders, as peft saves them: low-rank updates of some matrices of a base model that the folder names.

An update is scale * B A (Hu et al., arXiv:2106.09685), with scale = alpha / rank, or alpha / sqrt(rank) for rsLoRA
(Kalajdzievski, arXiv:2312.03732). It is merged into the matrices it changes, so that a model with it is as fast as its
base; every other tensor is the base's own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from farthing.base.errors import UserError
from farthing.base.files import read_json, require_file
from farthing.base.schema import given
from farthing.model import Decoder
from farthing.weights.check import require_finite
from farthing.weights.folder import ADAPTER, ADAPTER_WEIGHTS, file_header, read_file
from farthing.weights.layouts import layout_of, places, row_order

_PREFIX = "base_model.model."
_FLOATS = ("F32", "F16", "BF16")
# Settings of peft's that change what an adapter computes, with the values that leave it as it is built here.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "alpha_pattern": (None, {}),
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "layer_replication": (None,),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_dora": (None, False),
    "use_qalora": (None, False),
}


@dataclass(frozen=True)
class Adapter:
    """A LoRA folder.

    Attributes:
        base: the source of its base model, as it says.
        updates: by module of the base, under its family's names: A [rank, in], B [out, rank] and the scale.
    """

    folder: Path
    base: str
    updates: Mapping[str, tuple[Tensor, Tensor, float]]


def base_of(folder: Path) -> str:
    """The source of the base model that a LoRA folder names; a path may be relative to the folder.

    Raises:
        UserError: if it names none.
    """
    name = read_json(folder / ADAPTER).get("base_model_name_or_path")
    if not isinstance(name, str) or not name.strip():
        raise UserError(
            f"{folder / ADAPTER}: base_model_name_or_path is {given(name)}; let it name the base model"
        )
    beside = folder / name
    return str(beside) if not Path(name).exists() and beside.is_dir() else name


def read_adapter(folder: Path) -> Adapter:
    """Read a LoRA folder.

    Raises:
        UserError: for another kind of adapter, a setting that is not built, weights that are missing or damaged.
    """
    settings, path = read_json(folder / ADAPTER), folder / ADAPTER
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {given(settings.get('peft_type'))}; only LORA is read")
    for key, neutral in _NEUTRAL.items():
        if settings.get(key) not in neutral:
            raise UserError(
                f"{path}: {key}: {given(settings[key])} is not supported; merge the adapter with peft "
                "(merge_and_unload, then save_pretrained) and give the merged folder"
            )
    alpha = settings.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise UserError(f"{path}: lora_alpha is {given(alpha)}; it must be a number")
    power = 0.5 if settings.get("use_rslora") is True else 1.0
    pairs = _pairs(folder)
    updates = {module: (down, up, alpha / len(down) ** power) for module, (down, up) in pairs.items()}
    return Adapter(folder, base_of(folder), updates)


def _pairs(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by module."""
    path = folder / ADAPTER_WEIGHTS
    require_file(path, "save the adapter again")
    if not path.is_file():
        raise UserError(f"{folder} holds no {ADAPTER_WEIGHTS}; save the adapter with peft's save_pretrained")
    found: dict[str, dict[str, Tensor]] = {}
    for name, stored in file_header(path).items():
        module, _, which = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if which not in ("lora_A", "lora_B") or not name.endswith(".weight"):
            raise UserError(
                f"{path}: {name} is no part of a LoRA update that is read here; merge it with peft"
            )
        if len(stored.shape) != 2 or 0 in stored.shape or stored.dtype not in _FLOATS:
            raise UserError(
                f"{path}: {name} is {stored.dtype} {list(stored.shape)}; it must be a matrix of numbers"
            )
        found.setdefault(module, {})
    for name, tensor in read_file(path):
        module, _, which = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        require_finite(tensor, f"{path}: {name}")
        found[module][which] = tensor.float()
    if not found:
        raise UserError(f"{path} holds no update")
    for module, pair in found.items():
        if missing := sorted({"lora_A", "lora_B"} - pair.keys()):
            raise UserError(f"{path}: {module} lacks {missing[0]}; save the adapter again")
        if pair["lora_A"].shape[0] != pair["lora_B"].shape[1]:
            raise UserError(
                f"{path}: {module}: lora_A has rank {pair['lora_A'].shape[0]} and lora_B {pair['lora_B'].shape[1]}"
            )
    return {module: (pair["lora_A"], pair["lora_B"]) for module, pair in found.items()}


@torch.no_grad()
def adapted(decoder: Decoder, hf: Mapping[str, Any], adapter: Adapter) -> Decoder:
    """A network with an adapter's updates; the parameters that they leave alone are shared with `decoder`.

    Raises:
        UserError: if the network lacks a matrix that the adapter changes, or has it in another shape.
    """
    layout, config = layout_of(hf), decoder.config
    found = {theirs: (ours, rows) for theirs, ours, rows in places(layout, decoder)}
    for module, (down, up, _) in adapter.updates.items():
        _, rows = found.get(f"{module}.weight", (None, None))
        if rows is None or rows.dim() != 2:
            raise UserError(
                f"{adapter.folder}: changes {module}, which its base {adapter.base} does not have; was it trained on "
                "another base?"
            )
        if (up.shape[0], down.shape[1]) != tuple(rows.shape):
            raise UserError(
                f"{adapter.folder}: its update of {module} is {up.shape[0]} x {down.shape[1]}, and the matrix of its "
                f"base {adapter.base} {rows.shape[0]} x {rows.shape[1]}; was it trained on another base?"
            )
    changed = {found[f"{module}.weight"][0] for module in adapter.updates}
    own = {name: decoder.get_parameter(name).detach().clone() for name in changed}
    for theirs, _, rows in places(layout, decoder, own):
        update = adapter.updates.get(theirs.removesuffix(".weight"))
        if update is None:
            continue
        down, up, scale = update
        delta, order = (up @ down) * scale, row_order(layout, config, theirs)
        merged = rows.float() + (delta if order is None else delta[order]).to(rows.device)
        rows.copy_(merged.to(decoder.stored or merged.dtype))
    made = copy.deepcopy(decoder, {id(one): one for one in (*decoder.parameters(), *decoder.buffers())})
    for name, values in own.items():
        module, _, leaf = name.rpartition(".")
        setattr(made.get_submodule(module), leaf, nn.Parameter(values))
    return made
