"""A model folder as one .gguf for llama.cpp: the Llama family and DeepSeek's (`deepseek2`).

What a .gguf cannot say is refused rather than approximated. Tensors are written one at a time; the file appears whole
or not at all.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from farthing.errors import UserError
from farthing.model import ModelConfig
from farthing.weights import decoder_config
from farthing.weights.folder import is_disk_full, read_config, sync
from farthing.weights.fp8 import Weights
from farthing.weights.gguf_layout import ARCHITECTURES, Planned, rope_divisors, sizes, tensors
from farthing.weights.gguf_vocabulary import tokenizer_metadata

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

TYPES = ("f16", "bf16", "q8_0", "f32")
_PIECE = 16_000_000  # weights converted at a time: bounds the float32 copies to 64 MB
_ALIGNMENT = 32  # bytes; tensors in a .gguf start at multiples of it
_F16_LARGEST = 65504.0


def export_gguf(folder: Path, path: Path, kind: str = "f16") -> list[str]:
    """Write the model folder as the file `path`, and return what the file leaves out, a sentence each.

    `kind` is one of `TYPES`. Vectors and routers are float32 whatever it is, and rows that q8_0's blocks of 32 do not
    divide are f16.

    Raises:
        UserError: for a family, a setting or a tokenizer that llama.cpp has no words for, tensors that do not fit the
            config, a number too large for f16, or a full disk.
    """
    assert kind in TYPES
    hf = read_config(folder)
    architecture = ARCHITECTURES.get(str(hf.get("model_type")))
    if architecture is None:
        raise UserError(
            f"{folder}: a .gguf of a {hf.get('model_type')!r} model is not supported; "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    if path.suffix != ".gguf" or path.is_dir():
        raise UserError(f"{path} is no name for the file; give one that ends in .gguf")
    config = decoder_config(hf)
    weights = Weights(folder)
    metadata = {
        "general.name": folder.resolve().name,
        **_licence(folder),
        **tokenizer_metadata(folder, config.vocab_size),
        **{f"{architecture}.{key}": value for key, value in sizes(config, architecture).items()},
    }
    plan = tensors(config, architecture)
    notes = _check(folder, weights, plan, config)
    _write(path, architecture, metadata, plan, weights, config, kind)
    return notes


def _licence(folder: Path) -> dict[str, str]:
    from farthing.weights.sources import Source

    licence = Source("folder", str(folder), folder).license
    return {"general.license": licence} if licence else {}


def _check(folder: Path, weights: Weights, plan: list[Planned], config: ModelConfig) -> list[str]:
    """That the folder holds the plan's tensors and no others, in their shapes; what of it is left out."""
    used = {source for planned in plan for source in planned.sources}
    for planned in plan:
        for source in planned.sources:
            if source not in weights:
                raise UserError(f"{folder}: tensor {source!r} is missing; download the folder again")
            if weights.shape(source) != planned.source_shape:
                raise UserError(
                    f"{folder}: tensor {source!r} has shape {weights.shape(source)}, config.json asks for "
                    f"{planned.source_shape}"
                )
    modules = {f"model.layers.{config.num_layers + depth}." for depth in range(config.mtp_depth)}
    left = [name for name in weights if name not in used and not name.endswith("rotary_emb.inv_freq")]
    predicting = [name for name in left if name.startswith(tuple(modules))]
    odd = sorted(set(left) - set(predicting) - ({"lm_head.weight"} if config.tied_head else set()))
    if odd:
        raise UserError(f"{folder}: tensor {odd[0]!r} has no place in a .gguf of this family")
    notes = []
    if predicting:
        notes.append(
            f"left out: {len(predicting)} tensors of {config.mtp_depth} prediction module(s) (MTP), which this "
            "architecture of llama.cpp is exported without"
        )
    if config.mla and not math.isclose(config.rms_eps, 1e-6):
        notes.append(
            f"differs: llama.cpp norms the latents with rms_norm_eps {config.rms_eps:g}, this model with 1e-06"
        )
    return notes


# ---- writing ----


def _write(
    path: Path,
    architecture: str,
    metadata: dict[str, Any],
    plan: list[Planned],
    weights: Weights,
    config: ModelConfig,
    kind: str,
) -> None:
    from gguf import GGUFWriter, LlamaFileType, quant_shape_to_byte_shape

    types = [_type(planned, kind) for planned in plan]
    shapes = [
        tuple(quant_shape_to_byte_shape(planned.shape, one)) for planned, one in zip(plan, types, strict=True)
    ]
    divisors = rope_divisors(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(math.prod(shape) + _ALIGNMENT for shape in shapes)
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise UserError(f"no room on the disk for {path}: it needs {needed:,} bytes and {free:,} are free")
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    writer = GGUFWriter(partial, architecture)
    writer.add_file_type(LlamaFileType[f"{'ALL' if kind == 'f32' else 'MOSTLY'}_{kind.upper()}"])
    for key, value in metadata.items():
        _add(writer, key, value)
    if divisors is not None:
        writer.add_tensor_info("rope_freqs.weight", divisors.shape, divisors.dtype, divisors.nbytes)
    for planned, one, shape in zip(plan, types, shapes, strict=True):
        writer.add_tensor_info(planned.name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=one)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if divisors is not None:
            writer.write_tensor_data(divisors)
        for planned, one, shape in zip(plan, types, shapes, strict=True):
            writer.write_tensor_data(_converted(planned, weights, one, shape))
        writer.close()
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except OSError as error:
        if is_disk_full(error):
            raise UserError(
                f"no room on the disk for {path}; free some space or choose another place"
            ) from None
        raise
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value:  # the format has no empty lists
        writer.add_array(key, value)


def _type(planned: Planned, kind: str) -> GGMLQuantizationType:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(planned.shape) == 1 or planned.name.endswith("ffn_gate_inp.weight"):
        return GGMLQuantizationType.F32
    wanted = GGMLQuantizationType[kind.upper()]
    divides = planned.shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0
    return wanted if divides else GGMLQuantizationType.F16


def _converted(
    planned: Planned, weights: Weights, kind: GGMLQuantizationType, shape: tuple[int, ...]
) -> np.ndarray[Any, Any]:
    """The tensor's bytes in the file, [..., bytes of a row]; only it and one source are in memory."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    out = np.empty((math.prod(shape[:-1]), shape[-1]), dtype=np.uint8)
    step = max(1, _PIECE // planned.shape[-1])
    row = 0
    for source in planned.sources:
        tensor = weights[source]
        rows = (tensor if planned.turn is None else planned.turn(tensor)).reshape(-1, planned.shape[-1])
        for start in range(0, len(rows), step):
            piece = rows[start : start + step].float().contiguous().numpy()
            if kind == GGMLQuantizationType.F16 and np.abs(piece).max(initial=0.0) > _F16_LARGEST:
                raise UserError(
                    f"tensor {source!r} holds a number beyond f16's {_F16_LARGEST:g}; use --type bf16"
                )
            out[row : row + len(piece)] = quantize(piece, kind).view(np.uint8).reshape(len(piece), -1)
            row += len(piece)
    assert row == len(out)
    return out.reshape(shape)
