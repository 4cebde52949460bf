"""A network's weights in the form that compiled products read, filled again after each change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from farthing.model.kernels.native.codes import Code
from farthing.model.kernels.native.operations import Operations, aligned, padded
from farthing.model.kernels.native.sizes import BLOCK_BYTES, GROUP, LANES, PACKED, TILE

Source = Callable[[], Tensor]  # a parameter as it is now, contiguous


@dataclass(frozen=True)
class Weight:
    """A packed weight, or several of one shape, one after another."""

    kind: int  # its place in the library's list of kinds
    memory: Tensor
    inputs: int  # padded
    tiles: int
    stride: int  # bytes of a block of 16 outputs
    parts: int

    @property
    def start(self) -> int:
        """Address of the first block."""
        return aligned(self.memory.data_ptr())

    @property
    def part_bytes(self) -> int:
        return 2 * self.tiles * self.stride

    @property
    def fields(self) -> dict[str, int]:
        """What an operation that multiplies with it has to know."""
        return {
            "kind": self.kind,
            "k": self.inputs,
            "w": self.start,
            "w_step": self.part_bytes,
            "stride": self.stride,
            "count": self.tiles,
        }


@dataclass
class Packer:
    """Remembers where every packed number comes from.

    Args:
        kinds: of weights in the library, by number.
    """

    kinds: tuple[str, ...]
    _matrices: list[tuple[Source, int, dict[str, int]]] = field(default_factory=list)
    _vectors: list[tuple[Source, Tensor, Tensor, Tensor]] = field(default_factory=list)
    _kept: list[Tensor] = field(default_factory=list)  # what is known by address only

    def weight(
        self, source: Source, outs: np.ndarray, ins: np.ndarray, kind: int, firsts: Sequence[int] = (0,)
    ) -> Weight:
        """Pack the elements `first + outs[n] + ins[k]` of a tensor, for each of `firsts`; -1 packs a zero."""
        outs = np.pad(outs, (0, -len(outs) % TILE), constant_values=-1)
        ins = np.pad(ins, (0, -len(ins) % GROUP), constant_values=-1)
        name = self.kinds[kind]
        stride = len(ins) * BLOCK_BYTES[name]
        memory = torch.empty(len(firsts) * len(outs) // LANES * stride + 64, dtype=torch.uint8)
        weight = Weight(kind, memory, len(ins), len(outs) // TILE, stride, len(firsts))
        size = source().element_size()
        out_bytes, in_bytes = (
            torch.from_numpy(np.where(places < 0, -1, places * size)) for places in (outs, ins)
        )
        self._kept += [memory, out_bytes, in_bytes]
        # inputs that follow each other in memory, from the first on
        ends = np.nonzero(np.diff(ins) != 1)[0]
        together = 0 if ins[0] < 0 else int(ends[0]) + 1 if len(ends) else len(ins)
        for number, first in enumerate(firsts):
            fields = {
                "kind": PACKED.index(name),
                "stored": size,
                "outs": out_bytes.data_ptr(),
                "ins": in_bytes.data_ptr(),
                "inputs": len(ins),
                "together": together,
                "target": weight.start + number * weight.part_bytes,
                "stride": stride,
                "count": weight.tiles,
            }
            self._matrices.append((source, first * size, fields))
        return weight

    def vector(self, source: Source, places: np.ndarray | None = None) -> int:
        """Address of a float32 copy of a small parameter, spread to its places and padded with zeros."""
        if places is None:
            places = np.arange(source().numel())
        copy = torch.zeros(padded(len(places)))
        where = torch.from_numpy(np.nonzero(places >= 0)[0])
        self._vectors.append((source, copy, where, torch.from_numpy(places[places >= 0])))
        return copy.data_ptr()

    @torch.no_grad()
    def operations(self) -> tuple[Operations, list[Tensor]]:
        """Copy the small parameters. Return the operations that pack the matrices, and the tensors that they read,
        to be kept until they have."""
        for source, copy, where, order in self._vectors:
            copy[where] = source().float().flatten()[order]
        operations = Operations()
        found: dict[int, Tensor] = {}
        for source, first, fields in self._matrices:
            tensor = found.setdefault(id(source), source())
            operations.add(Code.PACK, source=tensor.data_ptr() + first, **fields)
        return operations, list(found.values())
