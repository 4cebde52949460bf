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
    64  # an expert's rows are rounded up to a multiple of this, so few shapes occur and each is planned once
)
MOST_PADDING = 1.5  # beyond this many rows per real row, several products are faster than one
GROUPS = 4  # groups of experts with similar loads


@dataclass(frozen=True)
class Rows:
    """Layout of the experts' rows, one expert after another, and the products over them.

    Experts padded to one length form one batched product. If the loads differ too much for that, a GPU runs a ragged
    product; other devices pad experts with similar loads together, with one batched product per group.
    """

    source_S: Tensor  # the token each row is copied from; 0 for padding
    row_NK: Tensor  # the row of a token's k-th expert
    ends_E: Tensor | None = None  # end of each expert's rows, for the ragged product
    order_E: Tensor | None = None  # experts in the order of their rows, when grouped
    groups: tuple[tuple[int, int], ...] = ()  # (experts, rows per expert)

    @staticmethod
    def of(chosen_NK: Tensor, experts: int, may_be_ragged: bool) -> Rows:
        """Lay out the rows of the chosen experts; `may_be_ragged` permits the ragged product."""
        flat = chosen_NK.flatten()
        counts_E = torch.bincount(flat, minlength=experts)
        longest = _padded(int(counts_E.max()))
        layout: dict[str, Any] = {}
        if experts * longest <= max(MOST_PADDING * len(flat), PAD_TO * experts):
            lengths_E = torch.full_like(counts_E, longest)
            starts_E = lengths_E.cumsum(0) - lengths_E
        elif may_be_ragged:
            lengths_E, layout["ends_E"] = counts_E, counts_E.cumsum(0).to(torch.int32)
            starts_E = lengths_E.cumsum(0) - lengths_E
        else:
            sorted_E, order_E = counts_E.sort(descending=True)
            parts = [part for part in sorted_E.tensor_split(GROUPS) if len(part)]
            groups = tuple((len(part), _padded(int(part[0]))) for part in parts)
            lengths_E = torch.cat([counts_E.new_full((count,), rows) for count, rows in groups])
            starts_E = torch.empty_like(counts_E)
            starts_E[order_E] = lengths_E.cumsum(0) - lengths_E
            layout |= {"order_E": order_E, "groups": groups}
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
        if self.order_E is not None:
            weight_EBA = weight_EBA.index_select(0, self.order_E)
        weight = weight_EBA if transposed else weight_EBA.transpose(1, 2)
        if self.ends_E is not None:
            return F.grouped_mm(x_SA, weight, offs=self.ends_E)
        if self.order_E is None:
            return torch.bmm(x_SA.view(len(weight), -1, x_SA.shape[-1]), weight).flatten(0, 1)
        out_SB = x_SA.new_empty(len(x_SA), weight.shape[-1])
        pieces = weight.split([count for count, _ in self.groups])
        for x, piece, out in zip(self._split(x_SA), pieces, self._split(out_SB), strict=True):
            torch.bmm(x, piece, out=out)
        return out_SB

    def outer(self, x_SA: Tensor, y_SB: Tensor, experts: int) -> Tensor:
        """Return x^T y over each expert's rows, [E, A, B]."""
        if self.ends_E is not None:
            return F.grouped_mm(x_SA.t(), y_SB, offs=self.ends_E)
        if self.order_E is None:
            x_EAR = x_SA.view(experts, -1, x_SA.shape[-1]).transpose(1, 2)
            return torch.bmm(x_EAR, y_SB.view(experts, -1, y_SB.shape[-1]))
        parts = zip(self._split(x_SA), self._split(y_SB), strict=True)
        sorted_EAB = torch.cat([torch.bmm(x.transpose(1, 2), y) for x, y in parts])
        return torch.empty_like(sorted_EAB).index_copy_(0, self.order_E, sorted_EAB)

    def _split(self, t_SA: Tensor) -> list[Tensor]:
        """Split into groups, [experts, rows, A] each."""
        parts = t_SA.split([count * rows for count, rows in self.groups])
        return [part.view(count, rows, -1) for part, (count, rows) in zip(parts, self.groups, strict=True)]


def _padded(rows: int) -> int:
    return max(1, -(-rows // PAD_TO)) * PAD_TO


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
