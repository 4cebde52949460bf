"""Export a model folder: a .gguf, a folder in block-scaled FP8, a folder in bfloat16."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farthing.base.errors import UserError
from farthing.base.files import new_folder, write_json
from farthing.weights.check import Checked, check
from farthing.weights.decoders import folder_config
from farthing.weights.folder import TOKENIZER_FILES, write_tensors
from farthing.weights.fp8 import BLOCK, QUANTIZATION_CONFIG, SCALE, Weights, is_quantised, quantise
from farthing.weights.gguf_write import TYPES, export_gguf
from farthing.weights.tokenizer import finish_copy

FORMATS = ("gguf", "hf-fp8", "hf-bf16")
_CARRIED = (*TOKENIZER_FILES, "README.md")
_EXACT = ".e_score_correction_bias"  # float32 in every folder: its differences are smaller than bf16's steps


def export(folder: Path, to: str, out: Path, kind: str = "f16") -> list[str]:
    """Write the model of `folder` as `out` in the format `to`; returns what is left out or differs, one sentence each.

    `kind` is the type of a .gguf's tensors, ignored by the other formats.

    Raises:
        UserError: for an unknown format, type or family, a damaged folder, a target that is the folder itself or not
        a model folder, or a full disk.
    """
    if to not in FORMATS:
        raise UserError(f"--to {to}: there is no such format; give one of {', '.join(FORMATS)}")
    if kind not in TYPES:
        raise UserError(f"--type {kind}: not one that is written; give one of {', '.join(TYPES)}")
    if out.resolve() == folder.resolve():
        raise UserError(f"{out} is the folder to be exported; give another place with --out")
    if to == "gguf":
        return export_gguf(folder, out, kind)
    model = check(folder)
    config, weights = model.config, model.weights
    if to == "hf-fp8" and config.moe is not None and config.moe.limit is not None:
        raise UserError(f"{folder}: the layout of hf-fp8 has no place for gpt-oss's experts; use hf-bf16")
    written = folder_config(dict(model.hf), config, torch.bfloat16)
    notes: list[str] = []
    if to == "hf-fp8":
        written["quantization_config"] = QUANTIZATION_CONFIG
        odd = config.moe.expert_size if config.moe else config.intermediate_size
        if odd % BLOCK[0]:
            notes.append(f"vLLM will refuse it: a feed-forward width of {odd} is no multiple of {BLOCK[0]}")
    with new_folder(out, _bytes(weights, to)) as temporary:
        for name in _CARRIED:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, temporary / name)
        finish_copy(folder, temporary)
        write_tensors(temporary, _fp8(model) if to == "hf-fp8" else _bfloat16(model))
        write_json(temporary / "config.json", written)
    return notes


def _bytes(weights: Weights, to: str) -> int:
    shapes = {name: weights.shape(name) for name in weights}
    return sum(
        math.prod(shape) * (1 if to == "hf-fp8" and is_quantised(name, shape) else 2)
        for name, shape in shapes.items()
    )


def _bfloat16(model: Checked) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.values():
        yield name, tensor if name.endswith(_EXACT) else tensor.bfloat16()


def _fp8(model: Checked) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.values():
        if is_quantised(name, tuple(tensor.shape)):
            stored, scale = quantise(tensor, name)
            yield name, stored
            yield name + SCALE, scale
        else:
            yield name, tensor if name.endswith(_EXACT) else tensor.bfloat16()


def default_name(source: str, to: str, kind: str) -> str:
    """Default name of a source's export: `NAME-f16.gguf`, `NAME-fp8`."""
    path = Path(source.partition("@")[0].removeprefix("pypi:").removeprefix("hf:")).absolute()
    path = path.parent if path.name == "model" else path  # of runs/NAME/model
    stem = path.stem if path.suffix == ".gguf" else path.name
    return f"{stem}-{kind}.gguf" if to == "gguf" else f"{stem}-{to.removeprefix('hf-')}"


def describe(path: Path, to: str, notes: list[str]) -> dict[str, Any]:
    """The export as JSON."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {
        "path": str(path),
        "format": to,
        "bytes": sum(file.stat().st_size for file in files),
        "notes": notes,
    }
