"""Products with a weight packed once for oneDNN, fused with the operation that follows. No gradients.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.model.kernels.probe import Kernel, cpu_floats, numbers


class Layout:
    """A weight packed for oneDNN, part by part; opaque, so copies start empty.

    The cache is keyed by the weight's address and version counter. Every in-place update advances the counter (except
    one through `.data`), so sampling between two optimizer steps reads the new weights.
    """

    def __init__(self) -> None:
        self._parts: tuple[Tensor, ...] = ()
        self._key: tuple[int, int, tuple[int, ...]] = (0, 0, ())

    def __reduce__(self) -> tuple[type[Layout], tuple[()]]:
        return Layout, ()

    def of(self, weight_OI: Tensor, rows: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Return the weight's parts, packed; part i has `rows[i]` rows."""
        key = (weight_OI.data_ptr(), weight_OI._version, rows)
        if self._key != key:
            self._parts = tuple(pack(part) for part in weight_OI.detach().split(rows))
            self._key = key
        return self._parts


def usable(weight_OI: Tensor) -> bool:
    """Return whether products with this weight can use the packed form now."""
    # a weight made in inference mode has no version counter, so changes would go unnoticed
    return not torch.is_grad_enabled() and not weight_OI.is_inference() and KERNEL.on(weight_OI)


def pack(weight_OI: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous())


def linear(x_NI: Tensor, packed: Tensor, bias_O: Tensor | None, plus_NO: Tensor | None) -> Tensor:
    """Return x W^T + b, plus `plus` if given, [N, O]."""
    if plus_NO is None:
        return torch.ops.mkldnn._linear_pointwise(x_NI, packed, bias_O, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x_NI, plus_NO, packed, bias_O, "add")


def silu_product(x_NI: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(x gate^T) * (x up^T), [N, O]."""
    inner_NO = torch.ops.mkldnn._linear_pointwise(x_NI, gate, None, "swish", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x_NI, inner_NO, up, None, "mul")


def _all_products(x_NI: Tensor, gate_OI: Tensor, up_OI: Tensor, bias_O: Tensor, plus_NO: Tensor) -> Tensor:
    gate, up = pack(gate_OI), pack(up_OI)
    outs = (linear(x_NI, gate, None, None), linear(x_NI, up, bias_O, plus_NO), silu_product(x_NI, gate, up))
    return torch.stack(outs)


def _reference(x_NI: Tensor, gate_OI: Tensor, up_OI: Tensor, bias_O: Tensor, plus_NO: Tensor) -> Tensor:
    gate_NO, up_NO = F.linear(x_NI, gate_OI), F.linear(x_NI, up_OI)
    return torch.stack([gate_NO, plus_NO + up_NO + bias_O, F.silu(gate_NO) * up_NO])


def _lacks(device: torch.device, dtype: torch.dtype) -> str:
    if reason := cpu_floats(device, dtype):
        return reason
    if not torch.backends.mkldnn.is_available():
        return "this torch is built without oneDNN"
    ops = torch.ops.mkldnn
    for name in ("_reorder_linear_weight", "_linear_pointwise"):
        if not hasattr(ops, name):
            return f"this torch has no mkldnn.{name}"
    supported = getattr(ops, "_is_mkldnn_bf16_supported", None) if dtype == torch.bfloat16 else None
    if supported is not None and not supported():
        return "oneDNN has no bfloat16 on this processor"
    return ""


def _examples() -> list[tuple[Any, ...]]:
    weights = (numbers(48, 32, seed=1), numbers(48, 32, seed=2), numbers(48, seed=3))
    return [(numbers(n, 32), *weights, numbers(n, 48, seed=4)) for n in (1, 20)]


KERNEL = Kernel(
    "packed products", "oneDNN products with packed weights", _all_products, _reference, _lacks, _examples
)
