"""One strict check of a model folder, which loading, inspecting and every export share.

A folder passes if its config.json is understood and its weights are that network's: no tensor is missing, extra or
misshapen, all are floating point, and none holds a NaN or an infinity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

from farthing.base.errors import UserError
from farthing.model import Decoder, ModelConfig
from farthing.weights.folder import read_config
from farthing.weights.fp8 import Weights
from farthing.weights.layouts import copies, decoder_config, layout_of, meant, places
from farthing.weights.reward import is_reward_model, reward_config

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_LEAST_TENSORS = 4  # of a layer, in any family
_DRAWING = (init.normal_, init.uniform_, init.kaiming_uniform_)  # what torch's own layers begin with


@dataclass(frozen=True)
class Checked:
    """A model folder that passed.

    `hf` is its config.json as its tensors mean it: a head that differs from the embedding is not tied, whatever
    config.json says (transformers reads it so too), and the prediction modules are those that are there. `decoder` is
    the network, on the meta device.
    """

    folder: Path
    hf: Mapping[str, Any]
    config: ModelConfig
    layout: ModuleType
    weights: Weights
    decoder: Decoder

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor, one at a time; FP8 as float32.

        Raises:
            UserError: for one that holds a NaN or an infinity, or whose file is damaged.
        """
        for name, tensor in self.weights.items():
            require_finite(tensor, f"{self.folder}: {name}")
            yield name, tensor


def check(folder: Path, scores: bool = False) -> Checked:
    """Check a model folder's config.json against the headers of its weights; `Checked.values` reads the weights.

    Args:
        scores: the folder must hold a reward model; otherwise it must hold none.

    Raises:
        UserError: that names the file, the key or the tensor that is wrong.
    """
    hf = reward_config(folder) if scores else read_config(folder)
    try:
        layout, config = layout_of(hf), decoder_config(hf)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    if scores:  # transformers scores with one map, without what comes before or after a vocabulary's
        config = replace(config, scores=True, tied_head=False, logit_softcap=None, mtp_depth=0)
    elif is_reward_model(hf):
        raise UserError(
            f"{folder} holds a reward model, which writes no text; name it under reward, as reward_model"
        )
    weights = Weights(folder)
    headers = weights.headers
    if config.num_layers * _LEAST_TENSORS > len(headers):
        raise UserError(
            f"{folder}: config.json asks for {config.num_layers:,} layers, and there are {len(headers):,} tensors; "
            "is config.json its own?"
        )
    for name in weights:
        if weights.dtype(name) not in _FLOATS:
            raise UserError(
                f"{folder}: {name} holds {weights.dtype(name)} numbers, not floating point; take the model's bf16 "
                "folder"
            )
    if config.tied_head and not _same(weights, "lm_head.weight", "model.embed_tokens.weight"):
        config = replace(config, tied_head=False)
    decoder = _check_tensors(folder, layout, config, weights)
    return Checked(folder, meant(hf, decoder.config), decoder.config, layout, weights, decoder)


def _check_tensors(folder: Path, layout: ModuleType, config: ModelConfig, weights: Weights) -> Decoder:
    """The network whose tensors these are. Raises UserError for a tensor that is missing, extra or misshapen."""
    decoder = _without_numbers(config)
    wanted = {theirs: (ours, tuple(rows.shape)) for theirs, ours, rows in places(layout, decoder)}
    repeated = copies(layout, config) | ({"lm_head.weight": ""} if config.tied_head else {})
    for name in weights:
        shape = weights.shape(name)
        if name in wanted:
            if shape != wanted[name][1]:
                raise UserError(
                    f"{folder}: tensor {name!r} has shape {shape}, config.json asks for {wanted[name][1]}"
                )
        elif name in repeated:
            if repeated[name] and not _same(weights, name, repeated[name]):
                raise UserError(
                    f"{folder}: {name!r} should repeat {repeated[name]!r} and differs from it; that is not supported"
                )
        # a buffer of old releases, or the shared experts of a model without any
        elif not name.endswith("rotary_emb.inv_freq") and 0 not in shape:
            raise UserError(
                f"{folder}: tensor {name!r} is not part of a model of this family; is config.json its own?"
            )
    missing = wanted.keys() - set(weights)
    modules = {name for name, (ours, _) in wanted.items() if ours.startswith("mtp.")}
    if modules and missing == modules:
        # transformers writes one prediction module into every config.json and none into the weights
        return _without_numbers(replace(config, mtp_depth=0))
    if missing:
        raise UserError(
            f"{folder}: tensor {min(missing)!r} is missing ({len(missing)} in all); download the folder again"
        )
    return decoder


def _without_numbers(config: ModelConfig) -> Decoder:
    """A network on the meta device."""
    with _NothingDrawn(), torch.device("meta"):
        return Decoder(config)


class _NothingDrawn(TorchFunctionMode):
    """Leaves out the first random values of a layer. On the meta device there are none to draw, and torch loads its
    compiler, which takes a second, to find that out."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _DRAWING:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def _same(weights: Weights, one: str, other: str) -> bool:
    """Whether two tensors are equal; so if the first is not there."""
    if one not in weights or other not in weights:
        return True
    return weights.shape(one) == weights.shape(other) and torch.equal(weights[one], weights[other])


def require_finite(tensor: Tensor, name: str) -> None:
    """Raise UserError if a tensor holds a NaN or an infinity."""
    if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
        raise UserError(
            f"{name} holds a NaN or an infinity, so the model answers nothing; its training diverged or its file is "
            "damaged: take an earlier checkpoint, or download it again"
        )
