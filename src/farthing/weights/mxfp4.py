"""MXFP4, as OpenAI's gpt-oss folders hold experts: 32 numbers of 4 bits and the exponent that they share (OCP
Microscaling Formats 1.0, section 5). `<name>_blocks` has two numbers a byte, the first in its lower half;
`<name>_scales` has the exponents.

Legend: E experts, O outputs, I inputs, B blocks of a row (I / 32).
"""

from __future__ import annotations

import torch
from torch import Tensor

from farthing.base.errors import UserError

BLOCKS, SCALES = "_blocks", "_scales"
WIDTH = 32  # numbers of a block
_BIAS = 127  # of an exponent
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the lower three bits; the fourth is the sign


def dequantise(blocks_EOBb: Tensor, scales_EOB: Tensor, name: str = "the weight") -> Tensor:
    """The weight [E, I, O] in bfloat16, which holds every such number exactly.

    Raises:
        UserError: if blocks and scales do not belong together; names the tensor.
    """
    shape = blocks_EOBb.shape
    if len(shape) != 4 or shape[3] * 2 != WIDTH or scales_EOB.shape != shape[:3]:
        raise UserError(
            f"{name}{BLOCKS} of shape {tuple(shape)} and {name}{SCALES} of shape {tuple(scales_EOB.shape)} are no "
            "MXFP4 weight; download the folder again"
        )
    if blocks_EOBb.dtype != torch.uint8 or scales_EOB.dtype != torch.uint8:
        raise UserError(f"{name}{BLOCKS} and {name}{SCALES} must hold bytes; download the folder again")
    numbers = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])
    out_EIO = torch.empty(shape[0], shape[2] * WIDTH, shape[1], dtype=torch.bfloat16)
    for expert, (blocks_OBb, scales_OB) in enumerate(zip(blocks_EOBb, scales_EOB, strict=True)):
        codes_OBw = torch.stack([blocks_OBb & 15, blocks_OBb >> 4], -1).flatten(-2)
        values_OBw = torch.ldexp(numbers[codes_OBw.int()], (scales_OB.int() - _BIAS)[..., None])
        out_EIO[expert] = values_OBw.flatten(-2).T
    return out_EIO
