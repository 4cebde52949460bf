"""Block-scaled FP8, as DeepSeek-V3's folders hold it: one float32 scale for each block of 128 x 128 weights.

A linear layer's `<name>.weight` is stored as float8 e4m3 beside `<name>.weight_scale_inv`, and the weight meant is
their product, block by block (DeepSeek-V3 report, arXiv:2412.19437, section 3.3, and its README_WEIGHTS).
Everything here runs on the CPU.

Legend: R rows, C columns of a weight; r, c rows and columns of blocks, r = ceil(R / 128), c = ceil(C / 128).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farthing.base.errors import UserError
from farthing.weights import mxfp4
from farthing.weights.folder import read_config, tensor_headers

BLOCK = (128, 128)
SCALE = "_scale_inv"  # suffix of a weight's name that names its scales
QUANTIZATION_CONFIG: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": list(BLOCK),
    "activation_scheme": "dynamic",
}
# Embeddings, heads, the router and MTP's projection stay as they are: the report keeps them in higher precision.
_KEPT = re.compile(
    r"(?:^|\.)(?:embed_tokens|lm_head|shared_head\.head|(?:mlp|block_sparse_moe)\.gate|eh_proj)\.weight$"
)
_LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
_SMALLEST = torch.finfo(torch.float32).tiny


def is_quantised(name: str, shape: tuple[int, ...]) -> bool:
    """Whether DeepSeek's layout stores this tensor in FP8: the matrices of linear layers with a few exceptions."""
    return len(shape) == 2 and name.endswith(".weight") and not _KEPT.search(name)


def quantise(weight_RC: Tensor, name: str = "the weight") -> tuple[Tensor, Tensor]:
    """A weight [R, C] as (float8 e4m3 [R, C], float32 scales [r, c]); each block's largest value becomes 448.

    Raises:
        UserError: when the weight holds a NaN or an infinity, which no scale can bring into range.
    """
    values = weight_RC.float()
    blocks = [size // block + (size % block > 0) for size, block in zip(values.shape, BLOCK, strict=True)]
    padded = values.new_zeros([count * block for count, block in zip(blocks, BLOCK, strict=True)])
    padded[: values.shape[0], : values.shape[1]] = values
    largest_rc = padded.view(blocks[0], BLOCK[0], blocks[1], BLOCK[1]).abs().amax(dim=(1, 3))
    if not largest_rc.isfinite().all():
        raise UserError(
            f"{name} holds a NaN or an infinity, which FP8 cannot; the model diverged in training"
        )
    scale_rc = (largest_rc / _LARGEST).clamp_min(_SMALLEST)
    return (values / _spread(scale_rc, values.shape, BLOCK)).to(torch.float8_e4m3fn), scale_rc


def dequantise(
    weight_RC: Tensor, scale_rc: Tensor, name: str = "the weight", block: tuple[int, int] = BLOCK
) -> Tensor:
    """The float32 weight [R, C] of an FP8 weight and its scales [r, c].

    Raises:
        UserError: if the scales are not one positive number per block; names the tensor.
    """
    if weight_RC.ndim != 2:
        raise UserError(f"{name} has FP8 scales but {weight_RC.ndim} dimensions; only matrices have them")
    wanted = tuple(-(-size // side) for size, side in zip(weight_RC.shape, block, strict=True))
    if tuple(scale_rc.shape) != wanted:
        raise UserError(
            f"{name}{SCALE} has the shape {tuple(scale_rc.shape)}, not the {wanted} of a weight of "
            f"{tuple(weight_RC.shape)} in blocks of {block[0]} x {block[1]}; download the folder again"
        )
    scale_rc = scale_rc.float()
    if not (scale_rc.isfinite() & (scale_rc > 0)).all():
        raise UserError(
            f"{name}{SCALE} holds a scale that is not a positive number; download the folder again"
        )
    return weight_RC.float().mul_(_spread(scale_rc, weight_RC.shape, block))


def _spread(scale_rc: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """[R, C]: every weight's own scale."""
    rows = scale_rc.repeat_interleave(block[0], dim=0)[: shape[0]]
    return rows.repeat_interleave(block[1], dim=1)[:, : shape[1]]


class Weights(Mapping[str, Tensor]):
    """The tensors of a model folder by name, each read on demand; FP8 ones are dequantised to float32, MXFP4 ones
    (`weights.mxfp4`) to bfloat16.

    Their scales are not among the names, though `headers` describes every tensor stored. A weight and its scales may
    lie in any shards, and in any order.

    Raises:
        UserError: as `tensor_headers` and `dequantise` do; for an FP8 weight without scales, scales without a
            weight, or a quantisation that is not this one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.headers = tensor_headers(folder)
        self._open: dict[Path, Any] = {}
        given = read_config(folder).get("quantization_config")
        self._packed: set[str] = set()
        if isinstance(given, dict) and given.get("quant_method") == "mxfp4":
            given = None
            self._packed = {
                name.removesuffix(mxfp4.BLOCKS) for name in self.headers if name.endswith(mxfp4.BLOCKS)
            }
        self._block = BLOCK if given is None else _block(given)
        parts = {name + part for name in self._packed for part in (mxfp4.BLOCKS, mxfp4.SCALES)}
        if missing := sorted(parts - self.headers.keys()):
            raise UserError(f"{folder}: {missing[0]} is missing; download the folder again")
        scales = {name for name in self.headers if name.endswith(".weight" + SCALE)}
        stored = [name for name in self.headers if name not in scales | parts]
        self._names = dict.fromkeys([*stored, *sorted(self._packed)])
        lonely = sorted(name for name in scales if name[: -len(SCALE)] not in self)
        if lonely:
            raise UserError(f"{folder}: {lonely[0]} has no weight to scale; download the folder again")

    def __getitem__(self, name: str) -> Tensor:
        if name in self._packed:
            blocks, scales = (self._read(name + part) for part in (mxfp4.BLOCKS, mxfp4.SCALES))
            return mxfp4.dequantise(blocks, scales, f"{self._folder}: {name}")
        tensor = self._read(name)
        if name + SCALE in self.headers:
            return dequantise(tensor, self._read(name + SCALE), f"{self._folder}: {name}", self._block)
        if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            raise UserError(f"{self._folder}: {name} is FP8 without {name}{SCALE}; download the folder again")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        if name in self._packed:
            experts, outputs, blocks, *_ = (*self.headers[name + mxfp4.BLOCKS].shape, 0, 0, 0)
            return experts, blocks * mxfp4.WIDTH, outputs
        return self.headers[name].shape

    def dtype(self, name: str) -> str:
        """The numbers of a tensor, in safetensors' word."""
        return "BF16" if name in self._packed else self.headers[name].dtype

    def _read(self, name: str) -> Tensor:
        with self._damage(name) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    @contextmanager
    def _damage(self, name: str) -> Iterator[Any]:
        """The open file of a tensor. Raises UserError if it is damaged."""
        from safetensors import SafetensorError, safe_open

        path = self.headers[name].file
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
            yield self._open[path]
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}); download it again") from None


def _block(given: Any) -> tuple[int, int]:
    """The block size of a config's quantization_config, which must be of this module's kind."""
    fields = given if isinstance(given, dict) else {"quant_method": given}
    method, block = fields.get("quant_method"), fields.get("weight_block_size")
    if method == "fp8" and isinstance(block, list) and len(block) == 2:
        rows, columns = block
        if type(rows) is int and type(columns) is int and rows > 0 and columns > 0:
            return rows, columns
    raise UserError(
        f"config.json: quantization_config of {method!r} with weight_block_size {block} is not supported; only fp8 "
        "with a block such as [128, 128] is, so take the model's bf16 folder"
    )
