"""Layout of each expert's rows, and products over all experts at once.

Shapes: N tokens, K experts a token, E experts, A and B widths, S rows of all experts together (N * K and, where experts
are padded to one length, what fills them up).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.model.kernels.probe import Kernel, numbers

PAD_TO = 64  # rows of an expert are rounded up to this, so that few shapes occur and each is planned once
MOST_PADDING = 1.5  # beyond this many rows for each real one, several products are faster than one
GROUPS = 4  # of experts with similar loads


@dataclass(frozen=True)
class Rows:
    """Layout of each expert's rows, one expert after another, and how all of them are multiplied.

    Padded to one length they are one batched product. When the loads differ too much for that, a GPU has a product
    over ragged rows; elsewhere experts with similar loads are padded together, a batched product for each group.
    """

    source_S: Tensor  # the token a row is taken from; 0 for filling
    row_NK: Tensor  # the row of a token's k-th expert
    ends_E: Tensor | None = None  # of the experts' rows, for the ragged product
    order_E: Tensor | None = None  # the experts as their rows lie, where they are in groups
    groups: tuple[tuple[int, int], ...] = ()  # (experts, rows of each)

    @staticmethod
    def of(chosen_NK: Tensor, experts: int, may_be_ragged: bool) -> Rows:
        flat = chosen_NK.flatten()
        counts_E = torch.bincount(flat, minlength=experts)
        most = _padded(int(counts_E.max()))
        kinds: dict[str, Any] = {}
        if experts * most <= max(MOST_PADDING * len(flat), PAD_TO * experts):
            lengths_E = torch.full_like(counts_E, most)
            starts_E = lengths_E.cumsum(0) - lengths_E
        elif may_be_ragged:
            lengths_E, kinds["ends_E"] = counts_E, counts_E.cumsum(0).to(torch.int32)
            starts_E = lengths_E.cumsum(0) - lengths_E
        else:
            sorted_E, order_E = counts_E.sort(descending=True)
            parts = [part for part in sorted_E.tensor_split(GROUPS) if len(part)]
            groups = tuple((len(part), _padded(int(part[0]))) for part in parts)
            lengths_E = torch.cat([counts_E.new_full((count,), rows) for count, rows in groups])
            starts_E = torch.empty_like(counts_E)
            starts_E[order_E] = lengths_E.cumsum(0) - lengths_E
            kinds |= {"order_E": order_E, "groups": groups}
        order = flat.argsort(stable=True)
        expert = flat[order]
        nth = torch.arange(len(flat), device=flat.device) - (counts_E.cumsum(0) - counts_E)[expert]
        place = starts_E[expert] + nth
        row = torch.empty_like(flat)
        row[order] = place
        source_S = flat.new_zeros(int(lengths_E.sum()))
        source_S[place] = order // chosen_NK.shape[1]
        return Rows(source_S, row.view_as(chosen_NK), **kinds)

    def product(self, x_SA: Tensor, weight_EBA: Tensor, transposed: bool = False) -> Tensor:
        """Each expert's rows times its matrix transposed, [S, B]; times the matrix as it is if `transposed`."""
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
        """Each expert's sum over its rows of x times y, [E, A, B]."""
        if self.ends_E is not None:
            return F.grouped_mm(x_SA.t(), y_SB, offs=self.ends_E)
        if self.order_E is None:
            x_EAR = x_SA.view(experts, -1, x_SA.shape[-1]).transpose(1, 2)
            return torch.bmm(x_EAR, y_SB.view(experts, -1, y_SB.shape[-1]))
        parts = zip(self._split(x_SA), self._split(y_SB), strict=True)
        sorted_EAB = torch.cat([torch.bmm(x.transpose(1, 2), y) for x, y in parts])
        return torch.empty_like(sorted_EAB).index_copy_(0, self.order_E, sorted_EAB)

    def _split(self, t_SA: Tensor) -> list[Tensor]:
        """Each group's rows, [experts, rows, A]."""
        parts = t_SA.split([count * rows for count, rows in self.groups])
        return [part.view(count, rows, -1) for part, (count, rows) in zip(parts, self.groups, strict=True)]


def _padded(rows: int) -> int:
    return max(1, -(-rows // PAD_TO)) * PAD_TO


def ragged_works(x_NC: Tensor, inner: int) -> bool:
    """Whether products over ragged rows are possible: both widths must be multiples of 16 bytes."""
    aligned = all(n * x_NC.element_size() % 16 == 0 for n in (x_NC.shape[-1], inner))
    return aligned and RAGGED.on(x_NC)


def _ragged(x_SA: Tensor, y_SB: Tensor, weight_EBA: Tensor, ends_E: Tensor) -> Tensor:
    """x weight^T, y weight and the sums of x times y, all flat and joined."""
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
        return "for bfloat16 on a GPU"  # on a CPU it plans every new shape, at 30 ms a call
    if not hasattr(F, "grouped_mm"):
        return "this torch has no grouped_mm"
    capability = torch.cuda.get_device_capability(device)
    return "" if capability >= (8, 0) else "a GPU before compute capability 8.0"


def _examples() -> list[tuple[Tensor, ...]]:
    ends_E = torch.tensor([24, 24, 33], dtype=torch.int32)  # the second expert has no rows
    return [(numbers(33, 16), numbers(33, 32, seed=1), numbers(3, 32, 16, seed=2), ends_E)]


RAGGED = Kernel("ragged products", "torch's grouped_mm", _ragged, _reference, _lacks, _examples)
