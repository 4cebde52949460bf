"""Whether compiled code can be trusted on this machine: a product of every number of rows, beside torch's."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.model.kernels.native import library
from farthing.model.kernels.native.codes import Code
from farthing.model.kernels.native.operations import Operations, Rows
from farthing.model.kernels.native.packing import Packer
from farthing.model.kernels.native.session import Session
from farthing.model.kernels.native.sizes import STORE, TILE
from farthing.model.kernels.probe import Kernel, cpu_floats, numbers

KINDS = ("bfloat16",)  # what nearly every network needs, so that a trial compiles nothing else


def product(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T by the compiled step, with the weight rounded to bfloat16, [N, O] in x's dtype.

    Args:
        x_NI: I a multiple of 32. O is too.
    """
    (rows, inputs), outputs = x_NI.shape, len(weight_OI)
    packer = Packer(KINDS)
    weight = packer.weight(lambda: weight_OI, np.arange(outputs) * inputs, np.arange(inputs), 0)
    x, out = Rows(x_NI.float().contiguous(), 4 * inputs), torch.zeros(rows, outputs)
    packing, kept = packer.operations()
    multiplying = Operations()
    multiplying.add(
        Code.MULTIPLY,
        **weight.fields,
        x=x.at(),
        x_pitch=x.pitch,
        x_step=0,
        grain=1,
        bias=0,
        mode=STORE,
        y=out.data_ptr(),
        y_pitch=4 * outputs,
        y_step=0,
        parts=1,
    )
    session = Session(KINDS, 256 * (rows + TILE))
    session.run(packing)
    session.run(
        multiplying, rows, rows // 2 if x_NI.dtype == torch.bfloat16 else None
    )  # rounding changes no row
    del kept  # read until here
    return out.to(x_NI.dtype)


def _reference(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    return F.linear(x_NI, weight_OI.bfloat16().to(x_NI.dtype))


def lacks(device: torch.device, dtype: torch.dtype) -> str:
    """`Kernel.lacks` of whatever is compiled."""
    return cpu_floats(device, dtype) or library.lacks()


def _examples() -> list[tuple[Any, ...]]:
    return [(numbers(rows, 64), numbers(96, 64, seed=1)) for rows in (*range(1, 9), 12, 20)]


KERNEL = Kernel("decoding", "steps compiled by numba", product, _reference, lacks, _examples)
