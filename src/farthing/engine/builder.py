"""What a network is built from for the compiled step (`model.kernels.native`): rows, weights, single operations.

Shapes: R rows (new tokens), C model width, H query heads, G key/value heads, D head width. Rows are padded to whole
tiles of 32; a weight's padding is zero, so what a row's padding holds never counts.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from farthing.engine.cache import PagedCache
from farthing.model import Decoder
from farthing.model.attention import GroupedQueryAttention
from farthing.model.config import Rope
from farthing.model.kernels.native.codes import Code
from farthing.model.kernels.native.operations import Operations, Rows, padded, spread
from farthing.model.kernels.native.packing import Packer, Weight
from farthing.model.kernels.native.sizes import GROUP, LANES, SPAN, STORE, TILE
from farthing.model.latent import LatentAttention
from farthing.model.layers import Linear, RMSNorm
from farthing.model.rotary import tables

ITEMS = 16  # a product is cut into about this many parts, or more for many threads


class Builder:
    """Buffers, packed weights and single operations of a network; `network.Network` puts them together.

    Args:
        rows: the most new tokens of a step.
        positions: the most tokens of a sequence.
        kinds: of the library's weights: of matrices first, of what is never quantized last, the head's between if there
            are three.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: PagedCache,
        rows: int,
        positions: int,
        kinds: tuple[str, ...],
        threads: int,
    ) -> None:
        self.decoder, self.cache, self.rows, self.kinds = decoder, cache, rows, kinds
        self.config, self.threads, self.positions = decoder.config, threads, positions
        self.packer = Packer(kinds)
        self.chosen: dict[int, Tensor] = {}  # experts of each row, [R, K], by layer
        width = padded(self.config.hidden_size)
        self.x, self.normed, self.halves, self.hidden = (self.buffer(width) for _ in range(4))
        self.logits = self.buffer(padded(self.config.vocab_size))
        self._kept: list[Tensor] = []  # what is known by address only
        self._shared: dict[tuple[str, int, int], Rows] = {}
        self._rotations: dict[Rope, tuple[int, int]] = {}
        self.quantized: tuple[int, int] | None = None  # what the quantized rows hold: address and width
        self._ended = self.keep(torch.zeros(rows * self.config.num_heads, dtype=torch.int64))

    def keep(self, tensor: Tensor) -> int:
        """Keep a tensor, and return its address."""
        self._kept.append(tensor)
        return tensor.data_ptr()

    def buffer(self, width: int, rows: int | None = None) -> Rows:
        """Rows of zeros; products over heads may read a little beyond the last."""
        return Rows(torch.zeros((rows or self.rows) * width + 2 * TILE), 4 * width)

    def scratch(self, name: str, width: int, rows: int | None = None) -> Rows:
        """Rows that all layers share, by name, width and number."""
        key = (name, width, rows or self.rows)
        if key not in self._shared:
            self._shared[key] = self.buffer(width, rows)
        return self._shared[key]

    # ---- weights ----

    def linear(
        self, linear: Linear, kind: int = 0, outs: np.ndarray | None = None, ins: np.ndarray | None = None
    ) -> Weight:
        """A linear map's weight; `outs` and `ins` say which row and column stands in each place."""
        rows = np.arange(linear.out_features) if outs is None else outs
        columns = np.arange(linear.in_features) if ins is None else ins
        rows = np.where(rows < 0, -1, rows * linear.in_features)
        return self.packer.weight(lambda: linear.merged().contiguous(), rows, columns, kind)

    def bias(self, linear: Linear, outs: np.ndarray | None = None) -> int:
        """Address of a linear map's bias, 0 if it has none."""
        return 0 if linear.bias is None else self.packer.vector(lambda: linear.bias, outs)

    # ---- single operations ----

    def embed(self, out: Operations, target: Rows) -> None:
        weight = self.decoder.embed.weight
        scale = float(torch.tensor(self.config.embed_scale, dtype=weight.dtype))
        out.add(
            Code.EMBED,
            stored=weight.element_size(),
            width=self.config.hidden_size,
            scale=scale,
            out=target.at(),
            pitch=target.pitch,
        )
        self.quantized = None

    def norm(
        self,
        out: Operations,
        norm: RMSNorm,
        x: Rows,
        target: Rows,
        *,
        x_at: int = 0,
        target_at: int = 0,
        plus: Rows | None = None,
        groups: int = 1,
        step: int = 0,
        places: np.ndarray | None = None,
    ) -> None:
        """RMSNorm of `groups` parts of each row, `step` elements apart, each from element `x_at` to `target_at`.

        Args:
            places: which of the norm's elements stands in each place, if not all side by side.
        """
        width = len(norm.weight) if places is None else int((places >= 0).sum())
        centred = norm.centred
        out.add(
            Code.NORM,
            x=x.at(x_at),
            pitch=x.pitch,
            groups=groups,
            step=4 * step,
            length=padded(width if places is None else len(places), LANES),
            width=width,
            weight=self.packer.vector(lambda: norm.weight.float() + centred, places),
            eps=float(norm.eps),
            plus=plus.at() if plus else 0,
            out=target.at(target_at),
            out_pitch=target.pitch,
            out_step=4 * step,
        )
        self.quantized = None

    def product(
        self,
        out: Operations,
        weight: Weight,
        x: Rows,
        y: Rows,
        *,
        bias: int = 0,
        mode: int = STORE,
        x_step: int = 0,
        y_step: int = 0,
    ) -> None:
        """y = x W^T: of each part of the weight with its part of x, `x_step` elements after the last."""
        address, pitch = self.operand(out, weight, x)
        out.add(
            Code.MULTIPLY,
            **weight.fields,
            x=address,
            x_pitch=pitch,
            x_step=4 * x_step,
            grain=max(1, weight.parts * weight.tiles // max(ITEMS, 8 * self.threads)),
            bias=bias,
            mode=mode,
            y=y.at(),
            y_pitch=y.pitch,
            y_step=4 * y_step,
            parts=weight.parts,
        )
        if self.quantized is not None and self.quantized[0] == y.at():
            self.quantized = None

    def operand(self, out: Operations, weight: Weight, x: Rows, repeats: int = 1) -> tuple[int, int]:
        """Address and pitch of the rows that a product reads; quantizes them first if its weight asks for it.

        Args:
            repeats: rows of x for each row of the step.
        """
        if self.kinds[weight.kind] in ("float32", "bfloat16"):
            return x.at(), x.pitch
        width = weight.inputs
        pitch = padded(2 * width + 4 * (width // GROUP + 1), 64)
        target = self.scratch("quantized", pitch // 4, repeats * self.rows)
        if self.quantized != (x.at(), width):
            out.add(
                Code.QUANTIZE,
                x=x.at(),
                pitch=x.pitch,
                width=width,
                out=target.at(),
                out_pitch=pitch,
                repeats=repeats,
            )
            self.quantized = (x.at(), width)
        return target.at(), pitch

    def rotation(self, layer: int) -> dict[str, int]:
        """Addresses of cos and sin of every position, [positions, D / 2] float32 each."""
        rope = self.config.rope_of(layer)
        if rope not in self._rotations:
            half = self.config.rotary_dim // 2
            cos, sin = tables(rope, self.config.rotary_dim, self.positions)
            self._rotations[rope] = (
                self.keep(cos[:, :half].contiguous()),
                self.keep(sin[:, half:].contiguous()),
            )
        return dict(zip(("cos", "sin"), self._rotations[rope], strict=True))

    def attended(self, width: int, result: Rows, each: int) -> dict[str, int]:
        """Where attention leaves what it finds."""
        entry, heads = LANES + padded(width, LANES), self.config.num_heads
        spans = -(-self.positions // SPAN)
        key = ("partial", entry, self.rows * heads * spans)
        if key not in self._shared:
            # no page of it is used before it is needed
            self._shared[key] = Rows(torch.empty(math.prod(key[1:])), 4 * entry)
        partial = self._shared[key]
        return {
            "partial": partial.at(),
            "ended": self._ended,
            "out": result.at(),
            "out_pitch": result.pitch,
            "each": each,
        }


def places_of_heads(attention: GroupedQueryAttention | LatentAttention) -> np.ndarray:
    """Which input of an attention's last product stands in each place of what the heads leave."""
    if isinstance(attention, LatentAttention):
        width = attention.widths.v_dim
        return spread(attention.heads, width, padded(width))
    return spread(attention.heads, attention.head_dim, padded(attention.head_dim, LANES))


def places_of_both(hidden: int) -> np.ndarray:
    """Which input of a prediction module's first product stands in each place: the embedding's, the stream's."""
    return spread(2, hidden, padded(hidden))


def side_by_side(inner: int) -> np.ndarray:
    """Rows of gate and up in turns of 16, as a tile finishes them together."""
    wide = padded(inner, LANES)
    gate = np.pad(np.arange(inner), (0, wide - inner), constant_values=-1).reshape(-1, 1, LANES)
    up = np.where(gate < 0, -1, gate + inner)
    return np.concatenate([gate, up], 1).ravel()
