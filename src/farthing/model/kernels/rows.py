"""Layout of the experts' rows, and products over all experts at once.

Shapes: N tokens, K experts per token, E experts, A and B widths, S rows of all experts (N * K, plus padding rows where
experts are padded to one length).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.model.kernels.probe import Kernel, numbers

PAD_TO = (
    32  # an expert's rows are rounded up to a multiple of this, so few shapes occur and each is planned once
)
CALL = 32  # rows that a product of its own for each expert costs in addition
MOST_PADDING = 1.5  # beyond this many rows per real row, the ragged product is faster


@dataclass(frozen=True)
class Rows:
    """Layout of the experts' rows, one expert after another, and the products over them.

    Experts padded to one length form one batched product. If the loads differ too much for that, a GPU runs a ragged
    product; other devices compute one expert after another.
    """

    source_S: Tensor  # the token each row is copied from; 0 for padding
    row_NK: Tensor  # the row of a token's k-th expert
    ends_E: Tensor | None = None  # end of each expert's rows, for the ragged product
    sizes: tuple[int, ...] = ()  # rows of each expert, if they are computed one after another

    @staticmethod
    def of(chosen_NK: Tensor, experts: int, may_be_ragged: bool) -> Rows:
        """Lay out the rows of the chosen experts; `may_be_ragged` permits the ragged product."""
        flat = chosen_NK.flatten()
        counts_E = torch.bincount(flat, minlength=experts)
        sizes = [_padded(count) for count in counts_E.tolist()]
        layout: dict[str, Any] = {}
        alone = sum(sizes) + CALL * experts
        most = max(MOST_PADDING * len(flat), PAD_TO * experts) if may_be_ragged else alone
        if experts * max(sizes) <= most:
            lengths_E = torch.full_like(counts_E, max(sizes))
        elif may_be_ragged:
            lengths_E, layout["ends_E"] = counts_E, counts_E.cumsum(0).to(torch.int32)
        else:
            lengths_E, layout["sizes"] = counts_E.new_tensor(sizes), tuple(sizes)
        starts_E = lengths_E.cumsum(0) - lengths_E
        order = flat.argsort(stable=True)
        expert = flat[order]
        rank = torch.arange(len(flat), device=flat.device) - (counts_E.cumsum(0) - counts_E)[expert]
        sorted_row = starts_E[expert] + rank
        row = torch.empty_like(flat)
        row[order] = sorted_row
        source_S = flat.new_zeros(int(lengths_E.sum()))
        source_S[sorted_row] = order // chosen_NK.shape[1]
        return Rows(source_S, row.view_as(chosen_NK), **layout)

    def product(self, x_SA: Tensor, weight_EBA: Tensor, transposed: bool = False) -> Tensor:
        """Return x W^T for each expert, [S, B]; if `transposed`, x W instead."""
        weight = weight_EBA if transposed else weight_EBA.transpose(1, 2)
        if self.ends_E is not None:
            return F.grouped_mm(x_SA, weight, offs=self.ends_E)
        if not self.sizes:
            return torch.bmm(x_SA.view(len(weight), -1, x_SA.shape[-1]), weight).flatten(0, 1)
        out_SB = x_SA.new_empty(len(x_SA), weight.shape[-1])
        parts = zip(x_SA.split(self.sizes), weight.unbind(), out_SB.split(self.sizes), strict=True)
        for x, own, out in parts:
            if len(x):
                torch.mm(x, own, out=out)
        return out_SB

    def outer(self, x_SA: Tensor, y_SB: Tensor, experts: int) -> Tensor:
        """Return x^T y over each expert's rows, [E, A, B]."""
        if self.ends_E is not None:
            return F.grouped_mm(x_SA.t(), y_SB, offs=self.ends_E)
        if not self.sizes:
            x_EAR = x_SA.view(experts, -1, x_SA.shape[-1]).transpose(1, 2)
            return torch.bmm(x_EAR, y_SB.view(experts, -1, y_SB.shape[-1]))
        out_EAB = x_SA.new_empty(experts, x_SA.shape[-1], y_SB.shape[-1])
        parts = zip(x_SA.split(self.sizes), y_SB.split(self.sizes), out_EAB.unbind(), strict=True)
        for x, y, out in parts:
            if len(x):
                torch.mm(x.T, y, out=out)
            else:
                out.zero_()
        return out_EAB


def _padded(rows: int) -> int:
    return -(-rows // PAD_TO) * PAD_TO


def ragged_works(x_NC: Tensor, inner: int) -> bool:
    """Return whether the ragged product is available; it needs both widths in multiples of 16 bytes."""
    aligned = all(n * x_NC.element_size() % 16 == 0 for n in (x_NC.shape[-1], inner))
    return aligned and RAGGED.on(x_NC)


def _ragged(x_SA: Tensor, y_SB: Tensor, weight_EBA: Tensor, ends_E: Tensor) -> Tensor:
    """Return x W^T, y W and x^T y of each expert, flattened and concatenated."""
    rows = Rows(ends_E, ends_E, ends_E=ends_E)
    outs = (rows.product(x_SA, weight_EBA), rows.product(y_SB, weight_EBA, transposed=True))
    return torch.cat([t.flatten() for t in (*outs, rows.outer(x_SA, y_SB, len(ends_E)))])


def _reference(x_SA: Tensor, y_SB: Tensor, weight_EBA: Tensor, ends_E: Tensor) -> Tensor:
    sizes = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
    parts = list(zip(x_SA.split(sizes), y_SB.split(sizes), weight_EBA, strict=True))
    outs = [x @ w.T for x, _, w in parts] + [y @ w for _, y, w in parts] + [x.T @ y for x, y, _ in parts]
    return torch.cat([t.flatten() for t in outs])


def _lacks(device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cuda" or dtype != torch.bfloat16:
        return "for bfloat16 on a GPU"  # a CPU plans every new shape, at 30 ms per call
    if not hasattr(F, "grouped_mm"):
        return "this torch has no grouped_mm"
    capability = torch.cuda.get_device_capability(device)
    return "" if capability >= (8, 0) else "a GPU before compute capability 8.0"


def _examples() -> list[tuple[Tensor, ...]]:
    ends_E = torch.tensor([24, 24, 33], dtype=torch.int32)  # the second expert has no rows
    return [(numbers(33, 16), numbers(33, 32, seed=1), numbers(3, 32, 16, seed=2), ends_E)]


RAGGED = Kernel("ragged products", "torch's grouped_mm", _ragged, _reference, _lacks, _examples)
